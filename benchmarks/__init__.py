"""Benchmarks: `python -m benchmarks.cpu`, `.gpu` and `.report`; `pytest benchmarks`."""
