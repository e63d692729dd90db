"""Lines for the user, wherever they go: a terminal with few characters, a closed pipe, a full disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO


def tell(output: TextIO, line: str) -> None:
    """Print a line, with escapes for letters that the output cannot show. Where nobody reads any more (`| head`, a `tee` that died), or
    the disk of a log is full, training goes on, unheard.
    """
    encoding = getattr(output, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=output, flush=True)
    except BrokenPipeError:
        silence(output)
    except OSError as error:
        silence(output)
        with contextlib.suppress(OSError):
            print(f"nothing more is shown: the output cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def make_folder_of(path: Path, say: Callable[[str], None] = print) -> None:
    """Make the folder of a file that is about to be written, and say so where it was not there: its name may be a slip."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"new folder: {path.parent}")


def silence(output: TextIO) -> None:
    """What is written to it from now on, and what is still in its buffer, goes nowhere."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), output.fileno())
