"""`adapt` trains with any loss of the catalog by name: planned, run, resumed."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_run import tiny_config

from spcl_fast import catalog
from spcl_fast.memory_plan.peak import forecast
from spcl_fast.method.run import run_stages

OTHERS = [name for name in catalog.names(catalog.LOSSES) if name != "spcl"]


@pytest.mark.parametrize("name", OTHERS)
def test_adapt_takes_the_loss_by_its_name(name, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished.run.folder, folder)
    for stage in ("adapt", "pseudo_labels_2", "distill"):
        shutil.rmtree(folder / stage, ignore_errors=True)
    changes = {"adapt.loss": name, "adapt.contrast_temperature": "0.5", "adapt.contrast_regularizer": "0.1"}
    run_stages(tiny_config(tmp_path, **changes), ("adapt",), forecast=forecast)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["stage"] == "adapt" and "target_excess" in line]
    assert mine[-1]["step"] == 2 and all(abs(line["source_excess"]) < 100 for line in mine)
