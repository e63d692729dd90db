"""Result lines of the adaptation benchmark: what is read from them, tabled and drawn."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.adaptation.lines import Spread, add_line, by_setting, latest, paired
from benchmarks.adaptation.plots import plot
from benchmarks.adaptation.table import gap_closed_percent, table
from spcl_fast import catalog
from spcl_fast.errors import DataError
from spcl_fast.runs.identity import settings_sha256

ROOT = Path(__file__).resolve().parents[2]
ADAPTATION = ROOT / "benchmarks" / "adaptation"
STAGES = {row.net: row.name for row in catalog.trained()}


def line_with(
    setting: str, seed: int, adapted: float, sha: str = "a", source: float = 30.0, settings: dict | None = None, **more
) -> dict:
    signals = dict.fromkeys(
        ("source_miou", "entropy", "agreement_flip", "agreement_scale", "share_distance", "margin"), 0.5
    )
    nets = {
        name: {"miou": value, "iou": {"road": value, "sky": None}, "signals": signals}
        for name, value in (("source_only", source), ("adapted", adapted), *more.items())
    }
    labels = {"pseudo_labels": {"kept_share": 0.5}}
    whole = {"stages": [STAGES[net] for net in nets], "warmup.init": "weights", **(settings or {})}
    return {
        "setting": setting,
        "seed": seed,
        "settings_sha256": sha,
        "nets": nets,
        "pseudo_labels": labels,
        "settings": whole,
    }


@pytest.fixture
def results(tmp_path) -> Path:
    path = tmp_path / "pair.jsonl"
    for seed, a, b in ((0, 40.0, 39.0), (1, 42.0, 40.0), (2, 50.0, 47.0)):
        add_line(path, line_with("a", seed, a, source=30.0 + seed))
        add_line(path, line_with("b", seed, b, source=30.0 + seed))
    return path


def test_mean_standard_error_and_pairs_are_the_textbook_ones(results):
    values = Spread((1.0, 2.0, 3.0))
    assert values.mean == 2 and values.error == pytest.approx(1 / math.sqrt(3)) and values.text() == "2.0 ± 0.6"
    assert math.isnan(Spread((1.0,)).error) and Spread((1.0,)).text("+.1f") == "+1.0"
    add_line(results, line_with("a", 7, 0.0))  # a seed that b has not is no pair
    settings = by_setting(results)
    difference = paired(settings["a"], "adapted", settings["b"], "adapted")
    assert (
        difference.values == (1.0, 2.0, 3.0) and paired(settings["a"], "distilled", settings["b"], "distilled") is None
    )


def test_the_last_line_of_a_seed_counts_and_recipes_do_not_mix(results):
    add_line(results, line_with("a", 0, 41.0))
    assert by_setting(results)["a"][0]["nets"]["adapted"]["miou"] == 41
    add_line(results, line_with("a", 3, 41.0, sha="of a later version", settings={"adapt.loss": "spcl"}))
    assert 3 in by_setting(results)["a"]  # what a line lacks was at its default
    add_line(results, line_with("a", 4, 41.0, settings={"adapt.lr": 3}))
    with pytest.raises(DataError, match="the seeds of a have different settings"):
        by_setting(results)


def test_a_yardstick_serves_every_setting_that_it_is_one_for(tmp_path):
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    recipe = {"source.root": "a", "target.root": "t", "control.lr": 1, "oracle.lr": 1, "adapt.lr": 1}
    add_line(here, line_with("whole", 0, 40.0, settings=recipe, control=35.0, oracle=60.0))
    add_line(here, line_with("part", 0, 38.0, settings={**recipe, "adapt.lr": 2}))
    add_line(here, line_with("longer", 0, 38.0, settings={**recipe, "control.lr": 2}))
    add_line(here, line_with("part", 1, 38.0, settings={**recipe, "adapt.lr": 2}))
    add_line(there, line_with("part", 0, 50.0, settings={**recipe, "source.root": "b"}))
    settings = by_setting(here)
    assert settings["part"][0]["nets"]["control"]["miou"] == 35 and settings["part"][0]["nets"]["oracle"]["miou"] == 60
    assert "control" not in settings["longer"][0]["nets"] and settings["longer"][0]["nets"]["oracle"]["miou"] == 60
    assert not {"control", "oracle"} & set(settings["part"][1]["nets"])  # another seed
    other = by_setting(there)["part"][0]["nets"]
    assert (
        other["oracle"]["miou"] == 60 and "control" not in other
    )  # the control has seen the source, the oracle has not
    assert "| setting | seeds | source_only | adapted | oracle | gap closed, % |" in table(there)  # what some line has
    assert "| part | 1 | 30.0 | 50.0 | 60.0 | 67 |" in table(there)
    assert "| part | oracle | 60.0 |" in table(there) and "| part | oracle | 0.5 |" not in table(there)


def test_a_torn_line_is_named(results):
    with open(results, "a") as file:
        file.write('{"setting": "a", "se')
    with pytest.raises(DataError, match="line 7 is no result"):
        latest(results)


def test_the_table_has_means_errors_and_only_differences_that_can_be_told(results):
    text = table(results)
    assert "| a | 3 | 31.0 ± 0.6 |" in text and "44.0 ± 3.1" in text
    assert "| a - b: adapted | 3 | +2.00 ± 0.58 | +1.0, +2.0, +3.0 |" in text
    assert "a - b: source_only" not in text  # one net for both
    assert "| a | adapted | 44.0 ± 3.1 |  |" in text  # a class that is nowhere has no IoU


@pytest.mark.parametrize("apart, told", [(0.03, False), (0.3, True)])
def test_what_two_machines_round_apart_is_no_difference(results, apart, told):
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for line in lines:
        line["nets"]["source_only"]["miou"] += apart * (line["setting"] == "b")
    results.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert ("a - b: source_only" in table(results)) is told


def test_the_gap_is_that_between_source_only_and_the_oracle():
    def line(**nets):
        return {"nets": {net: {"miou": value} for net, value in nets.items()}}

    assert gap_closed_percent(line(source_only=40.0, adapted=42.0, distilled=45.0, oracle=60.0)) == 25
    assert gap_closed_percent(line(source_only=40.0, adapted=42.0, oracle=60.0)) == 10
    assert gap_closed_percent(line(source_only=40.0, distilled=45.0)) is None
    assert gap_closed_percent(line(source_only=40.0, oracle=60.0)) is None


def test_the_plot_is_a_picture(results, tmp_path):
    with Image.open(plot(results, tmp_path / "plots" / "pair.png")) as picture:
        assert picture.size[0] > 800 and np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize("path", sorted((ADAPTATION / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_lines_are_what_they_say(path):
    for setting, lines in by_setting(path).items():
        for line in lines.values():
            assert line["settings_sha256"] == settings_sha256(line["settings"]), (setting, line["seed"])
            assert os.sep + "work" not in json.dumps(line) and line["settings"]["evaluate.selection"] != "target_val"
