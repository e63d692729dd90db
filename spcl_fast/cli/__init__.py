"""The command line. Nothing here imports torch until a command needs it, so that `--help` answers at once."""

from .entry import main

__all__ = ["main"]
