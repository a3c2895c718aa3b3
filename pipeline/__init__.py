"""Clips in, batches out; knows nothing of models."""
