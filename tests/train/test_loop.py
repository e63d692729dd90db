"""`fit` within one process: what it logs, when it stops, what it refuses, and that it never waits for the device between log lines."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
from faults import (
    QUIET,
    STEPS,
    Begun,
    TinyStage,
    same_bits,
    start_process,
    tiny_batches,
    train_tiny,
)
from torch.utils._python_dispatch import TorchDispatchMode

from spcl_fast.config import SourceConfig
from spcl_fast.errors import CheckpointError, ConfigError, DataError, Interrupted, NumericError
from spcl_fast.runs.folder import Run
from spcl_fast.train.device import Precision, choose_device
from spcl_fast.train.resume import load_modules
from spcl_fast.train.schedule import poly_schedule

# --- results ---


def test_losses_are_averages_since_the_last_line_and_vectors_the_last_value(tmp_path):
    seen: list[dict] = []
    stage = TinyStage()
    real = stage.step

    def step(batch, it):
        values = real(batch, it)
        seen.append({name: value.detach().clone() for name, value in values.items()})
        return values

    stage.fit(tmp_path, iterations=10, step=step)
    records = Run(tmp_path).metrics("tiny")
    assert [record["step"] for record in records] == [4, 8, 10]
    for record, window in zip(records, (seen[0:4], seen[4:8], seen[8:10]), strict=True):
        assert record["loss_main"] == pytest.approx(
            sum(v["loss_main"].double().item() for v in window) / len(window), rel=1e-12
        )
        assert record["shares"] == pytest.approx(window[-1]["shares"].tolist())
        assert {"images_per_s", "data_wait", "peak_memory_bytes", "seconds", "lr", "stage"} <= record.keys()
    assert records[0]["lr"] == pytest.approx(0.05 * (1 - 3 / 100))


def test_every_group_keeps_its_own_base_rate(tmp_path):
    stage = TinyStage()
    rates = []
    stage.after_step = lambda it: rates.append(
        [group["lr"] for optimizer in stage.optimizers.values() for group in optimizer.param_groups]
    )
    stage.fit(tmp_path, iterations=3)
    assert rates == [pytest.approx([0.05 * f, 0.1 * f, 0.01 * f]) for f in (1, 0.99, 0.98)]


def test_the_last_step_is_a_checkpoint_and_done_is_written_after_it(tmp_path):
    stage = TinyStage()
    result = stage.fit(tmp_path, iterations=5)
    assert Run(tmp_path).checkpoints("tiny").steps() == [5, 3]
    done = json.loads((tmp_path / "tiny" / "done.json").read_text())
    assert done["step"] == 5 and done["checkpoint"] == "step_00000005" and done["settings"]["tiny.lr"] == 0.05
    assert result.steps == 5 and not result.skipped and result.peak_memory_bytes > 0


def test_a_finished_stage_is_skipped_and_its_modules_are_loaded(tmp_path, undisturbed):
    TinyStage().fit(tmp_path)
    again = TinyStage()
    result = again.fit(tmp_path)
    assert result.skipped and again.calls == []
    assert same_bits(again.state(), undisturbed[0])


def test_a_finished_stage_whose_last_checkpoint_is_damaged_is_done_again_from_the_one_before(tmp_path, undisturbed):
    TinyStage().fit(tmp_path)
    (tmp_path / "tiny" / "checkpoints" / f"step_{STEPS:08d}" / "state.json").unlink()
    again = TinyStage()
    with pytest.warns(UserWarning, match="Going on from"):
        assert not again.fit(tmp_path).skipped
    assert again.calls == [27, 28, 29] and same_bits(again.state(), undisturbed[0])


def test_modules_of_an_earlier_stage_load_by_name(tmp_path):
    stage = TinyStage()
    stage.fit(tmp_path, iterations=3)
    other = TinyStage()
    load_modules(Run(tmp_path).checkpoints("tiny").latest(), {"model": other.model}, "tiny")
    assert torch.equal(other.model.body[0].weight, stage.model.body[0].weight)
    with pytest.raises(CheckpointError, match="critic.safetensors does not fit TinyNet"):
        load_modules(Run(tmp_path).checkpoints("tiny").latest(), {"critic": other.model}, "tiny")
    with pytest.raises(CheckpointError, match="No checkpoint of warmup in this run"):
        load_modules(None, {"model": other.model}, "warmup")


def test_poly_schedule_is_the_released_one():
    factor = poly_schedule(SourceConfig(iterations=40_000, schedule_iterations=62_500, power=0.9))
    assert factor(0) == 1 and factor(40_000 - 1) == pytest.approx((1 - 39_999 / 62_500) ** 0.9)
    warm = poly_schedule(SourceConfig(iterations=10, schedule_iterations=None, warmup_iterations=4))
    assert warm(0) == pytest.approx(0.25) and warm(10) == 0


# --- no waiting ---


class Waits(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.log: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"):
            self.log.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_log_lines(tmp_path, monkeypatch):
    # `tolist` reads memory without a dispatched op, so it is watched on its own
    waits = Waits()
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self, real=torch.Tensor.tolist: (waits.log.append("tolist"), real(self))[1]
    )
    stage = TinyStage()
    stage.optimizers["critic"] = torch.optim.SGD(
        stage.critic.parameters(), lr=0.1
    )  # AdamW on the CPU reads its step counter
    counts: list[int] = []
    stage.after_step = lambda it: counts.append(len(waits.log))
    with waits:
        stage.fit(tmp_path, dataclasses.replace(QUIET, log_every=10, checkpoint_every=10**6), iterations=20)
    assert counts == [0] * 10 + [counts[10]] * 10 and counts[10] > 0, "only the log line after step 10 may wait"
    assert len(waits.log) > counts[10]


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu_between_log_lines(tmp_path):
    stage = TinyStage()
    stage.model.to("cuda")
    stage.critic.to("cuda")

    def on_gpu(start):
        for batch in tiny_batches(start):
            batch.images = batch.images.to("cuda")
            torch.cuda.set_sync_debug_mode(
                "error" if batch.names[0] not in ("image_0_0.png", "image_10_0.png") else "default"
            )
            yield batch

    # on from the fetch of a batch to the next fetch; the log lines after steps 10 and 20 may wait, so it is switched off before them
    stage.after_step = lambda it: torch.cuda.set_sync_debug_mode("default") if it in (9, 19) else None
    try:
        stage.fit(
            tmp_path,
            dataclasses.replace(QUIET, device="cuda", log_every=10, checkpoint_every=10**6),
            iterations=20,
            batches=on_gpu,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- not finite ---


def test_a_nan_names_the_files_of_its_batch_and_the_last_good_checkpoint(tmp_path):
    stage = TinyStage()
    with pytest.raises(NumericError) as caught:
        stage.fit(tmp_path, batches=lambda start: tiny_batches(start, broken_at=13))
    text = str(caught.value)
    assert "Loss 'loss_main' is not finite at step 13 of tiny" in text
    assert "image_13_0.png, image_13_1.png, image_13_2.png, image_13_3.png (the step before: image_12_0.png" in text
    assert "step_00000012" in text and caught.value.exit_code == 4
    assert Run(tmp_path).checkpoints("tiny").steps()[0] == 12


def test_weights_that_became_nan_are_never_written(tmp_path):
    stage = TinyStage()

    def spoil(it):
        if it == 5:  # after the loss was formed: only the update is spoilt
            stage.model.body[0].weight.grad.fill_(float("inf"))

    stage.after_step = spoil
    with pytest.raises(
        NumericError,
        match="After the update, 'model/body.0.weight' is not finite at step 5.*image_5_0.png.*step_00000003",
    ):
        stage.fit(tmp_path)
    assert Run(tmp_path).checkpoints("tiny").steps() == [3]


# --- what it is given ---


def test_two_processes_never_write_one_run(tmp_path):
    begun = Begun(tmp_path)
    process = start_process(train_tiny, tmp_path, begun, 0.05, 10_000)
    try:
        assert begun.wait(60)
        with pytest.raises(CheckpointError, match="Another process is writing the run"):
            TinyStage().fit(tmp_path)
    finally:
        process.kill()
        process.join()
    with Run(tmp_path).exclusive():
        pass  # a killed process holds nothing


def test_batches_that_end_are_an_error(tmp_path):
    with pytest.raises(DataError, match="The batches of tiny ended at step 2 of 30"):
        TinyStage().fit(tmp_path, batches=lambda start: iter([next(tiny_batches(t)) for t in (0, 1)]))


def test_a_failing_reader_is_shown_unless_a_stop_was_asked_for(tmp_path):
    def broken(start, stopping):
        yield from (next(tiny_batches(t)) for t in range(start, 5))
        if stopping:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker exited unexpectedly")

    with pytest.raises(RuntimeError, match="worker exited"):
        TinyStage().fit(tmp_path / "a", batches=lambda start: broken(start, False))
    with pytest.raises(Interrupted, match="at step 5 of tiny"):
        TinyStage().fit(tmp_path / "b", batches=lambda start: broken(start, True))


def test_a_value_named_like_a_column_of_the_log_is_refused(tmp_path):
    stage = TinyStage()
    with pytest.raises(ValueError, match="returned a name that the log keeps for itself"):
        stage.fit(tmp_path, step=lambda batch, it: {"lr": stage.step(batch, it)["loss_main"]})


def test_the_hook_is_complete_for_every_checkpoint_on_the_disk(tmp_path):
    calls = []

    def hook(done):
        calls.append(done)
        assert done not in Run(tmp_path).checkpoints("tiny").steps()

    TinyStage().fit(tmp_path, iterations=7, at_checkpoint=hook)
    assert calls == [3, 6, 7]


def test_bf16_autocast_trains_and_fp16_is_refused(tmp_path):
    with Precision(torch.device("cpu"), "bf16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with Precision(torch.device("cpu")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ConfigError, match="loop.precision: 'fp16' is not known; expected fp32 or bf16"):
        Precision(torch.device("cpu"), "fp16")


def test_devices_are_named_in_words():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="loop.device: 'tpu9' is not a device; expected auto, cpu, cuda or cuda:N"):
        choose_device("tpu9")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="sees no GPU. Use auto or cpu"):
            choose_device("cuda")
