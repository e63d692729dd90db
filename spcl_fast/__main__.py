"""`python -m spcl_fast` and `torchrun ... -m spcl_fast` are `spcl-fast`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
