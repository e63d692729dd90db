"""Peak memory: `python -m benchmarks.memory.tables` predicts it, `python -m benchmarks.memory.full_resolution` runs a step."""
