"""Experiments and measurements: each part runs as `python -m benchmarks.<part>` from the root of a checkout."""
