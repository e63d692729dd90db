"""`fit` stopped and started again within one process: the same bits, or an error that says why not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal

import pytest
import torch
from faults import (
    QUIET,
    STEPS,
    Crash,
    FaultyDisk,
    TinyStage,
    metrics_without_times,
    same_bits,
)

from spcl_fast.errors import CheckpointError, Interrupted
from spcl_fast.runs.checkpoint import CheckpointStore
from spcl_fast.runs.folder import Run


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
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    TinyStage().fit(tmp_path, iterations=1)
    assert before == [signal.getsignal(number) for number in numbers]


def test_a_closed_terminal_does_not_stop_what_runs_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stage = TinyStage()
        stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGHUP) if it == 1 else None
        assert stage.fit(tmp_path, iterations=3).steps == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_from_the_keyboard_stops_at_once_and_saves_the_state_before_the_step(tmp_path, undisturbed):
    stage = TinyStage()

    def twice(it):
        if it == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    stage.after_step = twice
    with pytest.raises(Interrupted, match="Interrupted within step 4 of tiny; the newest state is in .*step_00000004"):
        stage.fit(tmp_path)
    assert Run(tmp_path).checkpoints("tiny").steps() == [4, 3]
    again = TinyStage()
    again.fit(tmp_path)
    assert again.calls[0] == 4 and same_bits(again.state(), undisturbed[0])


def test_a_second_interrupt_while_the_state_is_saved_waits_for_it(tmp_path, monkeypatch, undisturbed):
    original = CheckpointStore.save

    def save(self, step, *rest):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, *rest)

    stage = TinyStage()
    stage.after_step = lambda it: os.kill(os.getpid(), signal.SIGINT) if it == 4 else None
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="Stopped by SIGINT at step 5"):
        patch.setattr(CheckpointStore, "save", save)
        stage.fit(tmp_path)
    again = TinyStage()
    assert again.fit(tmp_path).resumed_from == 5 and same_bits(again.state(), undisturbed[0])


def test_an_interrupt_between_two_steps_saves_the_last_one(tmp_path, undisturbed):
    def impatient(record):
        if record["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="Interrupted within step 8 of tiny; the newest state is in .*step_00000008"):
        TinyStage().fit(tmp_path, watch=impatient)
    again = TinyStage()
    assert again.fit(tmp_path).resumed_from == 8 and same_bits(again.state(), undisturbed[0])


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
