"""`python -m benchmarks.cpu [-k moments] [--save-results]`: pytest-benchmark over this folder; further words go to pytest."""

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([str(Path(__file__).parent), "--benchmark-only", *sys.argv[1:]]))
