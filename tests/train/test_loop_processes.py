"""Two processes (gloo): the gradient of the joined batch, one decision about stopping and about NaN, resume from the first one's files."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from faults import QUIET, STEPS, TinyStage, as_rank, metrics_without_times, same_bits, start_process, tiny_batches
from torch import nn

from spcl_fast import distributed
from spcl_fast.errors import ConfigError, SpclFastError
from spcl_fast.runs.folder import Run


def run_ranks(target, *args, world_size: int = 2) -> list[int]:
    """Exit codes of `world_size` processes that run `target(*args)` as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start_process(as_rank, rank, world_size, port, target, *args) for rank in range(world_size)]
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


class PlainStage(TinyStage):
    """Without dropout and batch statistics: then two halves of a batch must equal the whole."""

    def __init__(self, **changes) -> None:
        super().__init__(**changes)
        self.model.body[1] = nn.Identity()
        self.model.body[3] = nn.Identity()
        parameters = [*self.model.body[0].parameters(), *self.model.body[4].parameters()]
        self.optimizers["main"] = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def shared_batches(start: int, broken_at: int | None = None):
    return tiny_batches(start, rank=distributed.rank(), world_size=distributed.world_size(), broken_at=broken_at)


def train_plain(folder: Path) -> None:
    stage = PlainStage()
    if distributed.rank() == 1:
        with torch.no_grad():
            stage.model.body[0].weight.zero_()  # the first process's initial weights count
    stage.fit(folder / "run", iterations=6, batches=shared_batches)
    torch.save(stage.state(), folder / f"rank_{distributed.rank()}.pt")


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    assert run_ranks(train_plain, tmp_path) == [0, 0]
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    weights = [name for name in ranks[0] if name != "model.drift"]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in weights), "all processes hold the same bits"
    one = PlainStage()
    one.fit(tmp_path / "one", iterations=6)
    for name in weights:
        torch.testing.assert_close(
            ranks[0][name], one.state()[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    logged, expected = metrics_without_times(Run(tmp_path / "run")), metrics_without_times(Run(tmp_path / "one"))
    assert [record["step"] for record in logged] == [record["step"] for record in expected]
    for a, b in zip(logged, expected, strict=True):
        assert a["loss_main"] == pytest.approx(b["loss_main"], rel=1e-5) and a["shares"] == pytest.approx(
            b["shares"], rel=1e-4
        )


def stop_one_then_go_on(folder: Path) -> None:
    """The second process alone gets a signal; both stop at one step; the second one's own folder is empty when they go on."""
    rank = distributed.rank()

    def signal_one(it: int) -> None:
        if rank == 1 and it == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        TinyStage(after_step=signal_one).fit(folder / "run", batches=shared_batches)
    except SpclFastError as error:
        assert error.exit_code == 75
        (folder / f"stop_{rank}.txt").write_text(str(error))
    own = folder / "run" if rank == 0 else folder / "another machine"
    stage = TinyStage()
    assert stage.fit(own, batches=shared_batches).resumed_from == 5
    whole = TinyStage()
    whole.fit(folder / "whole", batches=shared_batches)
    weights = [
        name for name in whole.state() if "running" not in name and "drift" not in name
    ]  # batch statistics: each process its own
    assert all(torch.equal(stage.state()[name], whole.state()[name]) for name in weights)
    if rank == 0:
        assert same_bits(stage.state(), whole.state())
    assert not (folder / "another machine").exists(), "only the first process writes"


def test_a_signal_to_one_process_stops_all_at_one_step_and_the_first_ones_files_are_enough(tmp_path):
    assert run_ranks(stop_one_then_go_on, tmp_path) == [0, 0]
    texts = [(tmp_path / f"stop_{rank}.txt").read_text() for rank in (0, 1)]
    assert all("at step 5 of tiny" in text for text in texts)
    assert metrics_without_times(Run(tmp_path / "run"))[-1]["step"] == STEPS


def nan_on_one(folder: Path) -> None:
    try:
        TinyStage().fit(folder / "run", QUIET, batches=lambda start: shared_batches(start, broken_at=5))
    except SpclFastError as error:
        (folder / f"rank_{distributed.rank()}.txt").write_text(str(error))
        sys.exit(error.exit_code)


def test_a_nan_in_one_process_stops_all_and_names_its_file(tmp_path):
    assert run_ranks(nan_on_one, tmp_path) == [4, 4]
    for rank in (0, 1):
        text = (tmp_path / f"rank_{rank}.txt").read_text()
        assert "not finite at step 5" in text and "image_5_3.png" in text and "step_00000003" in text


def collectives() -> None:
    rank = distributed.rank()
    tensors = [
        torch.full((3,), float(rank)),
        torch.full((2, 2), rank + 1),
        torch.ones(5, dtype=torch.bfloat16) * rank,
        torch.empty(0),
    ]
    tensors += [torch.ones(4).double(), torch.arange(6.0).reshape(2, 3).t() * rank]
    distributed.BUCKET_BYTES = 16  # several buckets of a dtype
    distributed.all_reduce_(tensors)
    assert (
        tensors[0].tolist() == [1.0] * 3
        and tensors[1].tolist() == [[3, 3], [3, 3]]
        and tensors[2].tolist() == [1.0] * 5
    )
    assert tensors[4].tolist() == [2.0] * 4 and torch.equal(tensors[5], torch.arange(6.0).reshape(2, 3).t())
    average = [torch.full((2,), float(4 * rank))]
    distributed.all_reduce_(average, average=True)
    assert average[0].tolist() == [2.0, 2.0]
    assert distributed.any_rank(rank == 1) and not distributed.any_rank(False)
    assert distributed.gather_objects(rank) == [0, 1] and distributed.broadcast_object(rank) == 0
    given = {
        "a": torch.tensor(3),
        "b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "c": torch.tensor([True, False]),
    }
    given |= {"empty": torch.empty(0), "expanded": torch.ones(2, 1).expand(2, 3)}
    back = distributed.broadcast_tensors(given if rank == 0 else None)
    assert (
        back["a"] == 3
        and back["c"].tolist() == [True, False]
        and back["b"].is_contiguous(memory_format=torch.channels_last)
    )
    assert len({bytes(row) for row in distributed.gather_objects(back["b"].numpy().tobytes())}) == 1
    distributed.barrier()


def test_collectives_are_exact_for_every_dtype_and_bucket():
    assert run_ranks(collectives) == [0, 0]


def test_one_process_needs_no_group():
    assert distributed.start("cpu").size == 1 and distributed.is_main() and distributed.world_size() == 1
    tensor = torch.ones(2)
    distributed.all_reduce_([tensor], average=True)
    assert tensor.tolist() == [1, 1] and distributed.any_rank(True) and distributed.gather_objects(1) == [1]
    distributed.barrier()
    distributed.stop()


def test_half_of_torchruns_variables_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match="RANK is set but MASTER_ADDR, MASTER_PORT is not: start several processes with `torchrun"
    ):
        distributed.start("cpu")
