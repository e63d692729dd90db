"""Use the package from the checkout, not installed: `kernels/` lies beside `spcl_fast/` and is imported as spcl_fast.kernels.

Imported by `gpu.py`, and by pytest as a plugin (`-p offline`), on machines where nothing can be installed.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import spcl_fast  # noqa: E402

if importlib.util.find_spec("spcl_fast.kernels") is None:
    spcl_fast.__path__.append(str(ROOT))
