"""Which font draws the names of classes in a plot, and what stands for a name that no installed font has the letters of."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

FONT = "DejaVu Sans"  # comes with matplotlib


def plot_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as plots show them: "class 3" for one that cannot be drawn, and no line breaks."""
    return tuple(
        " ".join(name.split()) if font_of(name) is not None else f"class {index}" for index, name in enumerate(names)
    )


def undrawn(names: Sequence[str]) -> list[tuple[str, str]]:
    """(what a plot shows, name) of the names that no installed font can draw."""
    return [(shown, name) for name, shown in zip(names, plot_names(names), strict=True) if font_of(name) is None]


def families(names: Sequence[str]) -> list[str]:
    """Font families that together have every letter of the names that can be drawn, the usual one first."""
    return list(dict.fromkeys([FONT, *(font for name in names if (font := font_of(name)) is not None)]))


@functools.cache
def font_of(name: str) -> str | None:
    """The family of a font with all letters of `name`: the usual one, else any that is installed; None: there is none."""
    letters = frozenset(ord(letter) for letter in name if not letter.isspace())
    usual = font_manager.findfont(FONT)
    if letters <= _letters(usual):
        return FONT
    plain = [
        font for font in font_manager.fontManager.ttflist if not re.search("Emoji|Last Resort", font.name)
    ]  # bitmaps and boxes
    fonts = sorted(plain, key=lambda font: (font.name, font.style != "normal"))
    return next((font.name for font in fonts if font.fname != usual and letters <= _letters(font.fname)), None)


@functools.cache
def _letters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a font file that is no longer there, or damaged
        return frozenset()
