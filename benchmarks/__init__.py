"""Benchmarks: `python -m benchmarks.cpu` from the root of a checkout."""
