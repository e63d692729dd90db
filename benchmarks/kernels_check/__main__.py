"""Both compilers, one after the other: `python -m benchmarks.kernels_check [arguments of triton_kernels]`."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "spcl_fast_kernels_check"))

from . import cuda_kernels, triton_kernels  # noqa: E402 - triton reads its cache's folder when it is imported

if __name__ == "__main__":
    sys.exit(triton_kernels.main() or cuda_kernels.main([]))
