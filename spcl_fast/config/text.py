"""Text files as editors save them: UTF-8 with or without a byte order mark, and UTF-16 with one (Notepad, PowerShell's >)."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError, and UnicodeError for bytes that are none of these."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        if len(data) == 2:
            raise UnicodeError("it begins as UTF-16 and ends there")
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError:
            raise UnicodeError("it begins as UTF-16 and goes on as something else; save it as UTF-8") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UnicodeError(f"line {line} is not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from None
