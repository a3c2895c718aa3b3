"""Benchmarks: each prints its figures beside their baselines, from one run."""
