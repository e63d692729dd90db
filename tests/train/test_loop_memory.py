"""`fit` and memory: what it does when there is no more, and what its log says of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from faults import (
    TinyStage,
    same_bits,
)

from spcl_fast.config import LoopConfig
from spcl_fast.errors import OutOfMemory
from spcl_fast.runs.folder import Run
from spcl_fast.train import memory
from spcl_fast.train.absorb import AbsorbingSGD


class Full(RuntimeError):
    """What torch raises where malloc fails."""

    def __init__(self):
        super().__init__(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), Full()], ids=lambda e: type(e).__name__
)
def test_out_of_memory_saves_the_step_before_and_names_the_setting(tmp_path, undisturbed, error):
    """Statistics had moved, gradients were formed: both are taken back, and the run ends with the bits of an undisturbed one."""
    stage = TinyStage()

    def burst(it):
        if it == 7:
            raise error

    stage.after_step = burst
    with pytest.raises(OutOfMemory) as caught:
        stage.fit(tmp_path)
    text = str(caught.value)
    assert caught.value.exit_code == 2 and "Out of memory at step 7 of tiny on cpu" in text and "step_00000007" in text
    assert "Start the same command with --loop.checkpoint auto to go on; `spcl-fast plan tiny --fit 4GiB`" in text
    again = TinyStage()
    assert again.fit(tmp_path).resumed_from == 7
    assert same_bits(again.state(), undisturbed[0])


def test_out_of_memory_in_the_first_step_saves_nothing(tmp_path):
    stage = TinyStage()

    def burst(it):
        raise MemoryError

    stage.after_step = burst
    with pytest.raises(OutOfMemory, match="There was no step to save yet"):
        stage.fit(tmp_path)
    assert not Run(tmp_path).checkpoints("tiny").steps()


def test_out_of_memory_amid_absorbed_gradients_falls_back_to_the_last_checkpoint(tmp_path):
    """The momenta hold a part of the step that failed: they must not be saved."""
    stage = TinyStage()
    stage.optimizers["main"] = AbsorbingSGD(stage.optimizers["main"].param_groups, lr=0.05, momentum=0.9)

    def burst(it):
        if it == 7:
            raise MemoryError

    stage.after_step = burst
    with pytest.raises(OutOfMemory, match="The newest state is in .*step_00000006"):
        stage.fit(tmp_path)
    assert Run(tmp_path).checkpoints("tiny").steps()[0] == 6


def test_any_other_error_is_no_lack_of_memory(tmp_path):
    stage = TinyStage()

    def burst(it):
        raise RuntimeError("shapes differ")

    stage.after_step = burst
    with pytest.raises(RuntimeError, match="shapes differ"):
        stage.fit(tmp_path)


def test_the_remedy_is_the_next_setting_that_is_not_taken_yet():
    settings, told = LoopConfig(), []
    for change in (
        {"checkpoint": "auto"},
        {"offload": True},
        {"precision": "bf16"},
        {"absorb_gradients": True},
        {"accumulate": 4},
        {},
    ):
        told.append(memory.next_setting(settings, "adapt", torch.device("cuda")).split(";")[0])
        settings = dataclasses.replace(settings, **change)
    wanted = (
        "checkpoint auto",
        "offload",
        "precision bf16",
        "absorb_gradients",
        "accumulate N, with N a divisor of adapt.batch_size",
    )
    assert all(f"with --loop.{flag}" in text for flag, text in zip(wanted, told, strict=False))
    assert ["same command" in text for text in told] == [True, True, False, False, False, False]
    assert told[5] == "Start a run of another name with a smaller --source.size and --target.size"
    on_cpu = memory.next_setting(LoopConfig(checkpoint="auto"), "adapt", torch.device("cpu"))
    assert "offload" not in on_cpu and "--loop.precision bf16" in on_cpu


# --- memory in the log ---


def test_the_log_has_the_predicted_peak_and_the_measured_one_of_each_phase(tmp_path):
    stage = TinyStage()
    real = stage.step

    def step(batch, it):
        with memory.phase("forward"):
            return real(batch, it)

    stage.fit(tmp_path, iterations=8, step=step, predicted_peak=lambda: 12345)
    first, second = Run(tmp_path).metrics("tiny")
    assert first["predicted_peak_bytes"] == second["predicted_peak_bytes"] == 12345
    assert first["phase_peak_bytes"].keys() == {"forward", "step"} and all(
        value > 0 for value in first["phase_peak_bytes"].values()
    )
    assert first["peak_memory_bytes"] >= max(first["phase_peak_bytes"].values())
