"""Triton kernels, one file or folder per op word. They import torch and triton alone: the backend hands them problems and the label flag.

On CUDA tensors they are compiled; on CPU tensors they run in Triton's interpreter where TRITON_INTERPRET=1 was set before triton was
imported (tests).
"""

from __future__ import annotations

from .pixels import INTERPRETED, interpreter_trouble

__all__ = ["INTERPRETED", "interpreter_trouble"]
