"""Benchmarks: `python -m benchmarks.cpu`, `.gpu`, `.one` and `.report`; `pytest benchmarks`."""
