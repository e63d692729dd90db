"""The tables of the README and of docs/losses.md say what the result files and the backends say."""

from __future__ import annotations

import pytest

from benchmarks import figures


@pytest.mark.parametrize("page", figures.TABLES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_result_files_and_of_the_backends(page):
    assert figures.filled(page) == page.read_text(encoding="utf-8"), "a table is out of date: make figures"


def test_a_changed_figure_is_seen_and_a_missing_marker_too():
    text = figures.README.read_text(encoding="utf-8")
    assert "15.41" in text and figures.refilled(text.replace("15.41", "15.42"), figures.TABLES[figures.README]) == text
    with pytest.raises(KeyError, match="memory"):
        figures.refilled(text.replace("<!-- memory -->", ""), figures.TABLES[figures.README])


def test_lines_are_short_and_the_pictures_are_there():
    text = figures.README.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 140]
    pictures = [part.split(")")[0] for part in text.split("](")[1:] if part.split(")")[0].endswith(".png")]
    assert len(pictures) == 3 and not [name for name in pictures if not (figures.ROOT / name).is_file()]
