"""`fit` within one process: what it logs, when it stops, what it refuses, and that it never waits for the device between log lines."""

from __future__ import annotations

import contextlib
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
    Crash,
    FaultyDisk,
    TinyStage,
    metrics_without_times,
    same_bits,
    start_process,
    tiny_batches,
    train_tiny,
)
from torch.utils._python_dispatch import TorchDispatchMode

from spcl_fast.config import LoopConfig, SourceConfig
from spcl_fast.errors import CheckpointError, ConfigError, DataError, Interrupted, NumericError, OutOfMemory
from spcl_fast.runs.folder import Run
from spcl_fast.train import memory
from spcl_fast.train.absorb import AbsorbingSGD
from spcl_fast.train.device import Precision, choose_device
from spcl_fast.train.resume import load_modules
from spcl_fast.train.schedule import poly_schedule


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    stage = TinyStage()
    stage.fit(folder)
    return stage.state(), metrics_without_times(Run(folder))


@pytest.fixture
def instant_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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


# --- resume ---


@pytest.mark.parametrize("stop_at", [1, 3, 7, 29])
def test_a_stopped_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, undisturbed, stop_at):
    stage = TinyStage()
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGTERM) if it == stop_at - 1 else None
    with pytest.raises(Interrupted) as caught:
        stage.fit(tmp_path)
    assert caught.value.exit_code == 75 and f"Stopped by SIGTERM at step {stop_at} of tiny; its state is in" in str(
        caught.value
    )
    again = TinyStage()
    torch.rand(100)  # the generator's past does not matter
    assert again.fit(tmp_path).resumed_from == stop_at
    assert again.calls == list(range(stop_at, STEPS))
    assert same_bits(again.state(), undisturbed[0])
    assert metrics_without_times(Run(tmp_path)) == undisturbed[1]


def test_seconds_add_up_over_a_restart(tmp_path):
    stage = TinyStage(pause=0.02)
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGUSR1) if it == 9 else None
    with pytest.raises(Interrupted, match="SIGUSR1"):
        stage.fit(tmp_path, iterations=12)
    assert TinyStage().fit(tmp_path, iterations=12).seconds >= 10 * 0.02


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    TinyStage().fit(tmp_path, iterations=1)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


def test_a_second_interrupt_from_the_keyboard_stops_at_once(tmp_path):
    stage = TinyStage()

    def twice(it):
        if it == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    stage.after_step = twice
    with pytest.raises(KeyboardInterrupt):
        stage.fit(tmp_path)
    assert Run(tmp_path).checkpoints("tiny").steps() == [3]


def test_a_stop_in_the_last_step_finishes_the_stage_and_still_stops_the_run(tmp_path):
    stage = TinyStage()
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGTERM) if it == 4 else None
    with pytest.raises(Interrupted):
        stage.fit(tmp_path, iterations=5)
    assert TinyStage().fit(tmp_path, iterations=5).skipped


def test_other_settings_are_refused_and_the_differing_keys_named(tmp_path):
    stage = TinyStage()
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGTERM) if it == 4 else None
    with pytest.raises(Interrupted):
        stage.fit(tmp_path)
    differ = r"\(tiny.lr: 0.05 -> 0.1; tiny.new: '\(absent\)' -> 1\)"
    with pytest.raises(CheckpointError, match=f"belongs to other settings {differ}.*Set them back") as caught:
        TinyStage().fit(tmp_path, identity={"tiny": {"lr": 0.1, "new": 1}})
    assert caught.value.exit_code == 5
    TinyStage().fit(tmp_path)
    with pytest.raises(CheckpointError, match=r"was finished with other settings \(seed: 3 -> 4\)"):
        TinyStage().fit(tmp_path, seed=4)


def test_how_it_is_logged_and_saved_may_change_between_starts(tmp_path, undisturbed):
    stage = TinyStage()
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGTERM) if it == 4 else None
    with pytest.raises(Interrupted):
        stage.fit(tmp_path)
    again = TinyStage()
    again.fit(tmp_path, dataclasses.replace(QUIET, log_every=7, checkpoint_every=5, workers=3))
    assert same_bits(again.state(), undisturbed[0])


def test_resume_never_refuses_a_folder_with_checkpoints_and_a_path_starts_from_it(tmp_path, undisturbed):
    stage = TinyStage()
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGTERM) if it == 16 else None
    with pytest.raises(Interrupted):
        stage.fit(tmp_path / "a")
    with pytest.raises(CheckpointError, match="loop.resume is 'never'"):
        TinyStage().fit(tmp_path / "a", dataclasses.replace(QUIET, resume="never"))
    again = TinyStage()
    path = tmp_path / "a" / "tiny" / "checkpoints" / "step_00000015"
    assert again.fit(tmp_path / "b", dataclasses.replace(QUIET, resume=str(path))).resumed_from == 15
    assert same_bits(again.state(), undisturbed[0])
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        TinyStage().fit(tmp_path / "c", dataclasses.replace(QUIET, resume=str(tmp_path)))


def test_a_checkpoint_of_another_net_is_an_error_in_words(tmp_path):
    stage = TinyStage()
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGTERM) if it == 4 else None
    with pytest.raises(Interrupted):
        stage.fit(tmp_path)
    other = TinyStage()
    other.model.body[4] = torch.nn.Conv2d(4, 3, 1)
    with pytest.raises(CheckpointError, match="does not fit this stage's modules and optimisers(.|\n)*body.4.weight"):
        other.fit(tmp_path)


def test_every_file_operation_of_a_run_may_be_its_last(tmp_path, undisturbed, instant_fsync):
    """Checkpoints, metrics and done.json together: killed (or cut off) at operation n, started again, the end is the same."""
    short = dataclasses.replace(QUIET, log_every=2, checkpoint_every=2)
    clean = TinyStage()
    clean.fit(tmp_path / "clean", short, iterations=4)
    expected = clean.state(), metrics_without_times(Run(tmp_path / "clean"))
    for at in range(1, 400):
        folder = tmp_path / str(at)
        with FaultyDisk(folder, ("crash", "power cut")[at % 2], at) as disk, contextlib.suppress(Crash):
            TinyStage().fit(folder, short, iterations=4)
        if not disk.fails:
            break
        again = TinyStage()
        again.fit(folder, short, iterations=4)
        assert same_bits(again.state(), expected[0]), at
        assert metrics_without_times(Run(folder)) == expected[1], at
        assert Run(folder).done("tiny") is not None
    assert 80 < at < 399


def test_a_full_disk_stops_the_run_in_words_and_the_older_checkpoint_is_whole(tmp_path, undisturbed, instant_fsync):
    """The disk fills at many different moments; once there is room again, the run goes on to the same bits."""
    for at in range(10, 140, 13):
        folder = tmp_path / str(at)
        text = "No space left on device.* start the same command again"
        with FaultyDisk(folder, "ENOSPC", at) as disk, pytest.raises(CheckpointError, match=text):
            TinyStage().fit(folder)
        assert disk.fails
        again = TinyStage()
        again.fit(folder)
        assert same_bits(again.state(), undisturbed[0])
        assert metrics_without_times(Run(folder)) == undisturbed[1]


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


# --- out of memory ---


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
        told.append(memory.remedy(settings, "adapt", torch.device("cuda")).split(";")[0])
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
    on_cpu = memory.remedy(LoopConfig(checkpoint="auto"), "adapt", torch.device("cpu"))
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
