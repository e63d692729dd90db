"""Every loss of the catalog trains in `adapt` and is counted by the memory plan."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_run import tiny_config

from spcl_fast import catalog
from spcl_fast.memory_plan.peak import peak_memory
from spcl_fast.method.run import run_stages

STAGES = ("source_only", "prototypes", "pseudo_labels")
LOSSES = tuple(name for name in catalog.names(catalog.LOSSES) if name != "spcl")  # which the other tests train


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run up to the pseudo-labels; each loss starts from a copy of its stages."""
    folder = tmp_path_factory.mktemp("losses")
    run_stages(tiny_config(folder, "start"), STAGES)
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_adapt_trains_it_and_writes_what_it_logged(loss, start):
    shutil.copytree(start / "start", start / loss)
    config = tiny_config(start, loss, **{"adapt.loss": loss, "adapt.contrast_temperature": "0.5"})
    run_stages(config, (*STAGES, "adapt"))
    lines = [json.loads(line) for line in (start / loss / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "target_excess" in line]
    assert logged and all(abs(line["segmentation"]) < 1e3 for line in logged)
    shutil.rmtree(start / loss / "adapt" / "checkpoints", ignore_errors=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_memory_plan_counts_it(loss, tmp_path):
    config = tiny_config(tmp_path, **{"adapt.loss": loss})
    assert peak_memory(config, "adapt").peak_bytes > 0
