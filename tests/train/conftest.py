"""What the tests of the loop share."""

from __future__ import annotations

import os

import pytest
from faults import TinyStage, metrics_without_times

from spcl_fast.runs.folder import Run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    stage = TinyStage()
    stage.fit(folder)
    return stage.state(), metrics_without_times(Run(folder))


@pytest.fixture
def instant_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
