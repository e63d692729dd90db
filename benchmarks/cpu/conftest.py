"""Fixtures and the table of the CPU benchmarks; what they share is in figures.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import shapes
from benchmarks.cpu import figures
from benchmarks.cpu.figures import Problem, UpsampledProblem


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        action="store_true",
        help=f"write the figures to benchmarks/results/{figures.SAVED.name}",
    )


@pytest.fixture(params=shapes.CPU, ids=lambda name: name.replace("'", "_prime"))
def problem(request: pytest.FixtureRequest) -> Problem:
    return figures.make_problem(request.param)


@pytest.fixture(params=shapes.CPU_UPSAMPLED, ids=lambda name: name.replace("'", "_prime"))
def upsampled_problem(request: pytest.FixtureRequest) -> UpsampledProblem:
    return figures.make_upsampled_problem(request.param)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(figures.THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def figure(benchmark) -> Callable:
    """figure(op, problem, peer, call, rounds): time `call` and keep the result next to the others of this op and shape."""

    def time_it(
        op: str, problem: Problem | UpsampledProblem, peer: str, call: Callable[[], object], rounds: int
    ) -> None:
        benchmark.group = f"{op} {problem.name}"
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=2 if rounds > 4 else 1)
        if benchmark.disabled:
            return
        stats = benchmark.stats.stats
        figures = {"median_ms": 1e3 * stats.median, "min_ms": 1e3 * stats.min, "iqr_ms": 1e3 * stats.iqr}
        figures.entry(op, problem)["times"][peer] = {key: round(value, 3) for key, value in figures.items()} | {
            "rounds": rounds
        }

    return time_it


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    for op in figures.figures.values():
        figures.finish(op)
    if figures.figures and session.config.getoption("--save-results"):
        figures.save(int(exitstatus))


def pytest_terminal_summary(terminalreporter) -> None:
    timed = {op: by_shape for op, by_shape in figures.figures.items() if any(one["times"] for one in by_shape.values())}
    for op, by_shape in timed.items():
        terminalreporter.section(f"{op}: milliseconds, median (min, interquartile range)")
        for name, one in by_shape.items():
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
