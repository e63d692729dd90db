"""The cases of `make bench` for pytest-benchmark, with its statistics, its saved runs and its comparisons:

python -m pytest benchmarks/cpu/test_speed.py -k "class_moments and not compiled" --benchmark-autosave
python -m pytest benchmarks/cpu/test_speed.py -k spcl_fast --benchmark-compare

Peers run one after the other, so that a busy minute hits one of them alone; `make bench` times them in turn.
"""

from __future__ import annotations

import functools

import pytest

from benchmarks.cpu.__main__ import cases
from benchmarks.cpu.case import Case, runnable
from benchmarks.cpu.timing import SLOW_ROUNDS


@functools.lru_cache(maxsize=1)  # tests of one shape follow each other
def _case(op: str, shape: str) -> Case:
    (make,) = [make for name, of, make in cases(op, shape) if name == op]
    return make(shape)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names: dict[str, list[str]] = {}
    for op, shape, _ in cases("", ""):
        names.setdefault(op, []).append(shape)
    rows = [(op, shape, peer) for op, found in names.items() for shape in found for peer in _case(op, found[0]).peers]
    metafunc.parametrize(("op", "shape", "peer"), rows)


def test_speed(benchmark, op, shape, peer):
    case = _case(op, shape)
    good, skipped = runnable(case, peer)
    if peer in skipped:
        pytest.skip(skipped[peer])
    benchmark.group = f"{op} {shape}"
    benchmark.pedantic(case.call(good[peer]), rounds=SLOW_ROUNDS, iterations=1, warmup_rounds=1)
