"""Settings: `schema.py` has every one of them, `load.py` merges and types them, `rules.py` says what they must obey."""

from .schema import *  # noqa: F403
