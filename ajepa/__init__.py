"""Batches in, representations out."""
