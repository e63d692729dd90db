"""Processes that are killed or signalled: started again, they end with the bits of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import (
    QUIET,
    STEPS,
    Begun,
    TinyStage,
    metrics_without_times,
    same_bits,
    start_process,
    tiny_batches,
    train_tiny,
)

from spcl_fast.errors import NumericError
from spcl_fast.runs.folder import Run
from spcl_fast.train.signals import stop_requests


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Trained in a process of its own kind: the same number of threads as those that are killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start_process(train_tiny, folder, Begun(folder), 0.005)
    process.join(120)
    assert process.exitcode == 0
    return final_state(folder), metrics_without_times(Run(folder))


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Run(folder).checkpoints("tiny").latest()
    assert checkpoint is not None and checkpoint.step == STEPS
    return checkpoint.tensors


def kill_until_finished(folder: Path, rng: random.Random, pause: float) -> int:
    """Start the run, kill it after a random while, again and again until it gets through; how often it was killed."""
    kills = 0
    while True:
        begun = Begun(folder.parent)
        process = start_process(train_tiny, folder, begun, pause)
        if rng.random() < 0.8:
            while (
                not begun.wait(0.01) and process.is_alive()
            ):  # mostly in the training; sometimes while it still starts
                pass
        process.join(
            rng.uniform(0, 0.5 * STEPS * (pause + 0.004)) * (1 + kills / 20)
        )  # longer where a busy machine gets nowhere
        process.kill()
        process.join(60)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        assert kills < 100, "no progress"


def assert_kills_do_not_show(tmp_path: Path, undisturbed, kills_wanted: int, seed: int) -> None:
    rng = random.Random(seed)
    kills = runs = 0
    while kills < kills_wanted:
        folder = tmp_path / str(runs)
        kills += kill_until_finished(folder, rng, 0.005)
        runs += 1
        assert same_bits(final_state(folder), undisturbed[0]), (seed, runs)
        assert metrics_without_times(Run(folder)) == undisturbed[1], (seed, runs)
        leftovers = [path for path in (folder / "tiny" / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not leftovers and Run(folder).done("tiny")


def test_kill_9_at_random_moments_changes_no_bit(tmp_path, undisturbed):
    assert_kills_do_not_show(tmp_path, undisturbed, kills_wanted=25, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(8))
def test_200_kills_change_no_bit(tmp_path, undisturbed, seed):
    assert_kills_do_not_show(tmp_path, undisturbed, kills_wanted=25, seed=100 + seed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_next_step_and_exits_75(tmp_path, undisturbed, number):
    begun = Begun(tmp_path)
    process = start_process(train_tiny, tmp_path, begun, 0.02)
    assert begun.wait(60)
    time.sleep(0.1)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 75
    step = Run(tmp_path).checkpoints("tiny").steps()[0]
    assert 0 < step < STEPS
    stage = TinyStage()
    stage.fit(tmp_path)
    assert stage.calls[0] == step, "nothing is done twice"
    assert metrics_without_times(Run(tmp_path))[-1]["step"] == STEPS


def test_a_signal_to_the_whole_group_leaves_the_data_workers_their_work(tmp_path):
    """As `timeout` and batch systems send it."""
    settings = {
        "runs_dir": tmp_path,
        "name": "run",
        "loop.workers": 1,
        "loop.log_every": 1,
        "source_only.iterations": 100_000,
    }
    sizes = {"source.size": "48,32", "source.eval_size": "48,32", "source.train_images": 6, "source_only.batch_size": 2}
    words = [word for key, value in {**settings, **sizes}.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "spcl_fast", "source-only", "--preset", "demo", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert any("source_only 3/" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.stdout.read()
        assert process.wait(120) == 75, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def endless_step(folder: Path, begun) -> None:
    def hang(it):
        begun.set()
        time.sleep(600)

    TinyStage(after_step=hang).fit(folder)


def test_two_interrupts_end_a_step_that_hangs(tmp_path):
    begun = Begun(tmp_path)
    process = start_process(endless_step, tmp_path, begun)
    assert begun.wait(60)
    os.kill(process.pid, signal.SIGINT)
    process.join(0.3)
    assert process.is_alive(), "the first one waits for the step"
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 75


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, i):
        return next(tiny_batches(i)).images


class Loaded:
    def __init__(self, images):
        self.images, self.names = images, ["x"] * len(images)


def with_loading_process(folder: Path, begun) -> None:
    def batches(start):
        loader = torch.utils.data.DataLoader(Images(), batch_size=None, num_workers=1, multiprocessing_context="fork")
        return (Loaded(images) for images in loader)

    TinyStage(0.02, lambda it: begun.set()).fit(folder, batches=batches)


def test_a_signal_to_the_whole_process_group_still_saves(tmp_path):
    """Batch systems and Ctrl-C signal the data-loading processes too."""
    begun = Begun(tmp_path)
    process = start_process(with_loading_process, tmp_path, begun)
    assert begun.wait(60)
    os.killpg(process.pid, signal.SIGUSR1)
    process.join(60)
    assert process.exitcode == 75
    assert Run(tmp_path).checkpoints("tiny").latest() is not None


def test_nan_exits_4(tmp_path, capfd):
    process = start_process(_train_on_nan, tmp_path)
    process.join(60)
    assert process.exitcode == NumericError.exit_code == 4


def _train_on_nan(folder: Path) -> None:
    TinyStage().fit(folder, batches=lambda start: tiny_batches(start, broken_at=2))


def test_work_without_a_loop_can_ask_for_the_stop_itself():
    with stop_requests() as outer, stop_requests() as inner:
        assert inner is outer and not inner.requested
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(
            Exception, match="Stopped by SIGTERM while writing pseudo-labels. Start the same command again"
        ) as caught:
            inner.raise_if_requested("writing pseudo-labels")
    assert caught.value.exit_code == 75


_TORCHRUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from faults import QUIET, TinyStage, tiny_batches
from spcl_fast import distributed
folder = Path(sys.argv[1])
with distributed.session("cpu") as world:
    def kill_once(it):
        if it == 10 and world.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
    stage = TinyStage(after_step=kill_once)
    result = stage.fit(folder, QUIET, batches=lambda start: tiny_batches(start, rank=world.rank, world_size=world.size))
    if world.rank == 0:
        (folder / "result.txt").write_text(f"{result.resumed_from} {result.steps}")
"""


@pytest.mark.soak
def test_torchrun_restarts_after_a_killed_rank_and_the_run_goes_on(tmp_path):
    import subprocess

    (tmp_path / "job.py").write_text(_TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = tmp_path / "run"
    done = subprocess.run(
        [*torchrun, str(tmp_path / "job.py"), str(folder), str(Path(__file__).parents[1])], env=environment, timeout=280
    )
    assert done.returncode == 0
    resumed_from, steps = map(int, (folder / "result.txt").read_text().split())
    assert steps == STEPS and resumed_from % QUIET.checkpoint_every == 0 and 0 < resumed_from <= 10
