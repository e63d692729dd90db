"""What holds for every test: which Triton, which hypothesis, which machine."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if (
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1
):  # threads of several processes on few cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton decides at import whether it interprets kernels on the CPU, so this comes before anything that may import it.
# torch itself imports triton only when something is compiled.
import torch

if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton was imported before conftest.py could choose its interpreter"
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter_bounds
    import interpreter_speed

    interpreter_bounds.install()
    interpreter_speed.install()

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# One and the same set of examples everywhere: a red test is red again, and a slow machine fails nothing.
settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels in the interpreter meet bad labels, as on a GPU; else their CPU tensors are looked at before."""
    from spcl_fast import backends

    monkeypatch.setattr(backends.module("triton"), "refuse_bad_labels", lambda *_: None, raising=False)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real images that lie next to the checkout and are no part of it."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the real images in {SHARED / 'data'}, which are not part of the repository")
    return SHARED


@pytest.fixture(autouse=True)
def emulated_cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test whose `backend` is "cuda" runs its kernels in the emulator, where there is no GPU."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend != "cuda" or torch.cuda.is_available():
        yield
        return
    from cuda_emulator import emulated

    with emulated.taken_on_demand():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked_for_soak = "soak" in config.getoption("markexpr")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("soak") and not asked_for_soak:
            item.add_marker(pytest.mark.skip(reason="the long form: run it by `make soak`"))


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: each gc.collect() of one of them would take 0.4 s to walk over all."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """`make soak` keeps what ran and how it ended, a line per test, for docs/reliability.md (benchmarks/soak.py)."""
    if report.when == "call" and "soak" in report.keywords and (log := os.environ.get("SPCL_FAST_SOAK_LOG")):
        from benchmarks import soak  # in a checkout alone: these tests run without it, too

        soak.keep(Path(log), report.nodeid, report.outcome, report.duration)
