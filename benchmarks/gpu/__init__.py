"""Checks and times of the GPU backends on an NVIDIA GPU: `python -m benchmarks.gpu`."""
