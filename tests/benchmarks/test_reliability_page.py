"""docs/reliability.md says what benchmarks/reliability.txt and the tests say."""

from __future__ import annotations

import pytest

from benchmarks import soak
from benchmarks.reliability import PAGE, TABLE, WAYS, Line, Run, page, read_table

USERS, MACHINERY = read_table(TABLE.read_text(encoding="utf-8"))


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(USERS, MACHINERY), "out of date: make reliability"


def test_a_test_that_is_gone_and_a_number_that_no_test_has_are_seen():
    gone = Line("a", "accepted", "c", "ops/test_leaks.py::test_of_yesterday")
    with pytest.raises(LookupError, match="test_of_yesterday: there is no such test"):
        page({"Figures": [gone]}, [])
    test = "train/test_loop_restart.py::test_kill_9_at_random_moments_changes_no_bit"
    with pytest.raises(LookupError, match="says 9999 kills, and 9999 does not stand in"):
        page({}, [Run("kills", "9999 kills", "here", test)])
    with pytest.raises(LookupError, match="says `make soak`, and the test is not marked as soak"):
        page({}, [Run("kills", "25 kills", "`make soak`", test)])
    with pytest.raises(LookupError, match="says every `make test`, and the test is marked as soak"):
        page(
            {},
            [
                Run(
                    "kills",
                    "25 kills",
                    "every `make test`",
                    test.replace("kill_9_at_random_moments_changes", "200_kills_change"),
                )
            ],
        )
    with pytest.raises(ValueError, match="line 2: expected four cells, got 2"):
        read_table("## Figures\na | b\n")


def test_every_line_is_accepted_refused_or_reported_and_stands_once():
    lines = [line for found in USERS.values() for line in found]
    assert {line.how for line in lines} == set(WAYS)
    assert len({line.situation for line in lines}) == len(lines) and len(MACHINERY) > 10


def test_a_soak_is_what_its_log_says_and_a_failed_piece_of_it_is_shown(tmp_path):
    test = "train/test_loop_restart.py::test_200_kills_change_no_bit"
    run = Run("kills", "25 kills x 8 seeds", "`make soak`", test)
    assert "| `make soak`: not run yet |" in page({}, [run], [])
    log = tmp_path / "soak.jsonl"
    for seed, outcome in ((0, "failed"), (1, "passed"), (0, "passed")):  # the last outcome of each counts
        soak.keep(log, f"tests/{test}[{seed}]", outcome, 60.0)
    assert "`make soak`: 2 of 2 passed" in page({}, [run], soak.read(log)) and "2.0 minutes" in page(
        {}, [run], soak.read(log)
    )
    soak.keep(log, f"tests/{test}[1]", "failed", 1.0)
    assert "`make soak`: 1 of 2 FAILED: 1 (" in page({}, [run], soak.read(log))
