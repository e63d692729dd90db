"""The benchmark next to the authors' code: what it refuses, skips, measures and writes. The authors' code itself is not needed here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.family import __main__ as family
from benchmarks.family import page
from benchmarks.family.authors import REPOSITORIES, Authors, Missing, Nothing
from benchmarks.family.case import Case, Goal, differences


def case(theirs=1.0, **more) -> Case:
    def step(value, given):
        return lambda: {"loss": torch.tensor(value) * given.factor}

    return Case(
        "toy", "SePiCo", "a toy", {"factor": 2}, {"factor": 1}, lambda factor: SimpleNamespace(factor=factor),
        lambda authors, given: step(theirs, given), lambda given: step(1.0, given), **more,
    )  # fmt: skip


def test_another_answer_is_refused_before_it_is_timed(tmp_path):
    assert family.checked(case(), Authors(tmp_path), {"factor": 2}) == {"loss": 0.0}
    with pytest.raises(AssertionError, match=r"toy: another answer than the authors' code: \{'loss': 0.5\}"):
        family.checked(case(theirs=2.0), Authors(tmp_path), {"factor": 2})
    with pytest.raises(AssertionError, match="another answer"):
        family.checked(case(theirs=float("nan")), Authors(tmp_path), {"factor": 2})
    with pytest.raises(AssertionError, match="gradient"):
        differences({"loss": torch.ones(1), "gradient": torch.ones(1)}, {"loss": torch.ones(1)})


def test_a_missing_repository_and_a_lack_of_memory_are_reasons(tmp_path):
    assert family.why_not(case(), Authors(tmp_path)) == (
        "no SePiCo in the folder of the authors' code: git clone BIT-DA/SePiCo"
    )
    (tmp_path / "SePiCo").mkdir()
    assert family.why_not(case(), Authors(tmp_path)) is None
    assert "the authors' step needs 1000000.0 GB" in (family.why_not(case(theirs_gb=1e6), Authors(tmp_path)) or "")


def test_a_file_of_the_authors_runs_without_what_it_imports(tmp_path):
    (tmp_path / "swav").mkdir()
    (tmp_path / "swav" / "loss.py").write_text(
        "import apex_that_is_not_there\n"
        "from lib.absent import LOSSES, Float\n"
        "from lib.given import three\n"
        "@LOSSES.register_module()\n"
        "class Loss:\n"
        "    def __call__(self, x: Float['n'] | None):\n"
        "        return x + three\n"
    )
    imports = {"apex_that_is_not_there": None, "lib.absent": None, "lib.given": {"three": 3}}
    module = Authors(tmp_path).load("swav", "loss.py", imports)
    assert module.Loss()(4) == 7 and isinstance(module.apex_that_is_not_there.anything, Nothing)
    with pytest.raises(ModuleNotFoundError):
        import lib.absent  # noqa: F401  # pyright: ignore[reportMissingImports]
    with pytest.raises(Missing, match="no dino"):
        Authors(tmp_path).load("dino", "main.py")


def test_goals_are_met_by_time_or_by_memory_and_never_by_a_slower_step():
    either, both = Goal(10, 20), Goal(10, 50, either=False)
    assert either.is_met(10, 1) and either.is_met(1, 20) and not either.is_met(9.9, 19.9) and not either.is_met(0.9, 99)
    assert both.is_met(10, 50) and not both.is_met(99, 49) and not both.is_met(9, 99)


def test_processor_time_leaves_the_first_call_out():
    counted = family.Counted(lambda: None)
    counted.ms = [1000.0, 1.0, 2.0, 3.0]
    assert counted.median_ms() == 2.0


def test_every_case_has_a_repository_and_small_problems_run_here():
    for name, one in family.CASES.items():
        assert name == one.name and one.repository in REPOSITORIES and one.sizes.keys() == one.small.keys()
        found = one.ours(one.problem(**one.small))()
        assert found and all(value.isfinite().all() for value in found.values())


def test_the_file_has_every_case_with_figures_that_its_ratios_follow_from():
    record = json.loads(page.SAVED.read_text(encoding="utf-8"))
    assert set(record["cases"]) | set(record["skipped"]) == set(family.CASES)
    for name, entry in record["cases"].items():
        one = family.CASES[name]
        assert entry["is"] == one.words and entry["sizes"] == dict(one.sizes), f"{name} was measured at another shape"
        assert all(gap <= one.tolerance for gap in entry["differences"].values())
        assert entry.items() >= family.ratios(entry, one).items()


def test_one_case_measured_anew_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "SAVED", tmp_path / "family.json")
    family.save({"dino": {"value": 1}}, {"swav": "missing"}, {"load": 1})
    family.save({"swav": {"value": 2}}, {}, {"load": 2})
    record = json.loads((tmp_path / "family.json").read_text(encoding="utf-8"))
    assert record == {
        "cases": {"dino": {"value": 1, "machine": {"load": 1}}, "swav": {"value": 2, "machine": {"load": 2}}},
        "skipped": {},
    }
