"""README's tables say what the result files say."""

from __future__ import annotations

import pytest

from benchmarks import figures


def test_the_readmes_tables_are_those_of_the_result_files():
    text = figures.README.read_text(encoding="utf-8")
    assert figures.filled(text) == text, "a table is out of date: make figures"


def test_a_changed_figure_is_seen_and_a_missing_marker_too():
    text = figures.README.read_text(encoding="utf-8")
    assert "15.41" in text and figures.filled(text.replace("15.41", "15.42")) == text
    with pytest.raises(KeyError, match="memory"):
        figures.filled(text.replace("<!-- memory -->", ""))


def test_lines_are_short_and_the_pictures_are_there():
    text = figures.README.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 140]
    pictures = [part.split(")")[0] for part in text.split("](")[1:] if part.split(")")[0].endswith(".png")]
    assert len(pictures) == 3 and not [name for name in pictures if not (figures.ROOT / name).is_file()]
