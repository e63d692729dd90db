"""Fixtures and the table of the CPU benchmarks; what they share is in cpu_context.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cpu_context  # noqa: E402
from cpu_context import Problem, UpsampledProblem  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        action="store_true",
        help=f"write the figures to benchmarks/results/{cpu_context.RESULTS.name}",
    )


@pytest.fixture(params=cpu_context.SHAPES, ids=lambda name: name.replace("'", "_prime"))
def problem(request: pytest.FixtureRequest) -> Problem:
    return cpu_context.make_problem(request.param)


@pytest.fixture(params=cpu_context.UPSAMPLED_SHAPES, ids=lambda name: name.replace("'", "_prime"))
def upsampled_problem(request: pytest.FixtureRequest) -> UpsampledProblem:
    return cpu_context.make_upsampled_problem(request.param)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(cpu_context.THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def figure(benchmark) -> Callable:
    """figure(op, problem, peer, call, rounds): time `call` and keep the result beside the others of this op and shape."""

    def time_it(
        op: str, problem: Problem | UpsampledProblem, peer: str, call: Callable[[], object], rounds: int
    ) -> None:
        benchmark.group = f"{op} {problem.name}"
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=2 if rounds > 4 else 1)
        if benchmark.disabled:
            return
        stats = benchmark.stats.stats
        figures = {"median_ms": 1e3 * stats.median, "min_ms": 1e3 * stats.min, "iqr_ms": 1e3 * stats.iqr}
        cpu_context.entry(op, problem)["times"][peer] = {key: round(value, 3) for key, value in figures.items()} | {
            "rounds": rounds
        }

    return time_it


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    for op in cpu_context.figures.values():
        cpu_context.finish(op)
    if cpu_context.figures and session.config.getoption("--save-results"):
        cpu_context.save(int(exitstatus))


def pytest_terminal_summary(terminalreporter) -> None:
    timed = {op: shapes for op, shapes in cpu_context.figures.items() if any(one["times"] for one in shapes.values())}
    for op, shapes in timed.items():
        terminalreporter.section(f"{op}: milliseconds, median (min, interquartile range)")
        for name, one in shapes.items():
            terminalreporter.line(f"{name} {one['shape']}")
            for peer, t in one["times"].items():
                faster = one.get("times_faster_than", {}).get(peer)
                line = f"  {peer:<28}{t['median_ms']:>10.2f}  ({t['min_ms']:.2f}, {t['iqr_ms']:.2f})"
                terminalreporter.line(line + (f"   spcl_fast is {faster} x as fast" if faster else ""))
            if "share_of_floor" in one:
                terminalreporter.line(
                    f"  floor {one['floor']['ms']:.2f} ms = {one['floor']['is']}; share of floor {one['share_of_floor']}"
                )
            for peer, reason in one["skipped"].items():
                terminalreporter.line(f"  {peer} was skipped: {reason}")
