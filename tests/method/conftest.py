"""What the tests of the method share."""

from __future__ import annotations

import pytest
from tiny_run import STAGES, tiny_config

from spcl_fast.method.context import Context
from spcl_fast.method.run import run_stages


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Context:
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    run_stages(config, STAGES)
    return Context(config)
