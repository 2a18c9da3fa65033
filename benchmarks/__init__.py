"""Benchmarks: a real model, and microbenchmarks against what people use today. `python -m benchmarks --help`."""
