"""Exponents, phases and ratios of the CPU benchmarks are what they say."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.cpu import results, step, variants
from benchmarks.cpu.case import Case, Floor, runnable
from benchmarks.cpu.floors import Problem
from benchmarks.cpu.growth import exponent
from benchmarks.cpu.timing import in_turn
from benchmarks.problems import contrast_problem
from spcl_fast.train import memory


def test_the_exponent_of_a_power_is_its_exponent():
    values = [10, 20, 80, 1000]
    assert exponent(values, [3 * value**0.95 for value in values]) == pytest.approx(0.95)


def test_calls_take_turns_and_slow_ones_fewer():
    seen = []
    calls = {"quick": lambda: seen.append("q"), "slow": lambda: (seen.append("s"), time.sleep(0.16))}
    times = in_turn(calls, rounds=3, slow_rounds=1)
    assert seen == ["q", "s", "q", "s", "q", "q"]
    assert times["slow"]["median_ms"] >= 160 and times["slow"]["rounds"] == 1 and times["quick"]["rounds"] == 3


def test_a_peer_with_another_answer_is_skipped_and_ours_is_not():
    def refuse(peer, function):
        assert function() == 1, "expected 1"

    peers = {"spcl_fast": lambda: 1, "wrong": lambda: 2, "broken": lambda: 1 // 0}
    case = Case("op", "A", {}, peers, {"absent": "not installed"}, refuse, lambda f: f, lambda: Floor(1, ""))
    good, skipped = runnable(case, "")
    assert list(good) == ["spcl_fast"] and skipped == {
        "absent": "not installed",
        "wrong": "gives another answer: expected 1",
        "broken": "does not run here: integer division or modulo by zero",
    }
    with pytest.raises(AssertionError):
        runnable(case._replace(peers={"spcl_fast": lambda: 2}), "")


def test_ratios_are_theirs_over_ours():
    times = {"spcl_fast": {"median_ms": 2.0}, "peer": {"median_ms": 5.0}}
    entry = results.with_ratios({"times": times, "floor": {"ms": 1.0}}, "spcl_fast")
    assert entry["times_faster_than"] == {"peer": 2.5} and entry["share_of_floor"] == 0.5


def test_the_clock_gives_each_phase_its_own_time():
    clock = step.Clock()
    with memory.recording(clock):
        clock.enter("data")
        time.sleep(0.02)
        clock.enter("step")
        with memory.phase("forward"):
            time.sleep(0.04)
            with memory.phase("host"):
                pass
        clock.enter("step")
    assert clock.seconds["data"] >= 0.02 and clock.seconds["forward"] >= 0.04 and clock.seconds["step"] > 0
    assert clock.seconds["loss"] == clock.seconds["backward"] == 0


def test_each_variant_is_timed_on_features_of_its_dtype_layout_and_threads(monkeypatch):
    seen = []

    def note(features, labels, prototypes):
        seen.append((features.dtype, prototypes.dtype, features.stride(1), torch.get_num_threads()))

    def once(calls):
        for call in calls.values():
            call()
        return dict.fromkeys(calls)

    monkeypatch.setitem(variants.OPS, "op", note)
    monkeypatch.setattr(variants, "in_turn", once)
    monkeypatch.setattr(variants, "make_problem", lambda name: Problem(name, *contrast_problem((1, 3, 4, 5), 2)))
    threads = torch.get_num_threads()
    try:
        assert set(variants.times_of("op", "A")) == set(variants.VARIANTS)
    finally:
        torch.set_num_threads(threads)
    half, full = torch.bfloat16, torch.float32
    n = variants.THREADS
    assert seen == [
        (full, full, 20, n),
        (full, full, 1, n),
        (half, half, 20, n),
        (half, half, 1, n),
        (full, full, 20, 1),
    ]
