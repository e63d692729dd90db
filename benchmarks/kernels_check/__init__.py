"""Compiles every GPU kernel without a GPU: registers, shared memory, spills."""
