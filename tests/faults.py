"""Fault injection shared by the tests: a disk that fails at the n-th operation, and a tiny training run to kill.

`FaultyDisk` replaces the writing functions of `os` while it is active and counts those that touch its folder. Kinds of fault:
ENOSPC (a full disk stays full: only removals still work), EIO (one operation fails), "crash" (the process is gone: nothing runs any more,
what was written stays) and "power cut" (as crash, and what was not flushed is lost: half of a file's new bytes, new names, renames).
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from spcl_fast import distributed
from spcl_fast.config import LoopConfig
from spcl_fast.errors import SpclFastError
from spcl_fast.runs.folder import Run
from spcl_fast.train.loop import FitResult, fit

FAULTS = ("ENOSPC", "EIO", "crash", "power cut")


class Crash(BaseException):
    """The process ended here. Not an Exception: no code of the package may run after it."""


class FaultyDisk:
    """Context manager; `fails` says afterwards whether the n-th operation was reached, `count` how many there were."""

    def __init__(self, folder: Path, kind: str, at: int) -> None:
        self.folder, self.kind, self.at = os.fspath(folder), kind, at
        self.count = 0
        self.fails = False
        self._real: dict[str, Callable[..., Any]] = {}
        self._descriptors: dict[int, str] = {}
        self._flushed: dict[str, int] = {}  # file -> how many of its bytes are on the disk for sure
        self._names: dict[
            str, list[tuple[str, ...]]
        ] = {}  # folder -> creations and renames that are not on the disk yet

    def __enter__(self) -> FaultyDisk:
        for name in ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir"):
            self._real[name] = getattr(os, name)
            setattr(os, name, getattr(self, "_" + name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)
        if self.fails and self.kind == "power cut":
            self._lose_what_was_not_flushed()

    def _operation(self, name: str) -> None:
        if self.fails and self.kind in ("crash", "power cut"):
            raise Crash
        self.count += 1
        if self.fails and self.kind == "ENOSPC" and name in ("create", "write", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.count == self.at:
            self.fails = True
            if self.kind in ("crash", "power cut"):
                raise Crash
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number))

    def _inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.folder)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = os.fspath(path)
        if dir_fd is not None and dir_fd in self._descriptors:
            name = os.path.join(self._descriptors[dir_fd], name)
        if not self._inside(name):
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)
        creates = bool(flags & os.O_CREAT) and not os.path.exists(name)
        before = 0 if creates or flags & os.O_TRUNC or os.path.isdir(name) else os.path.getsize(name)
        self._operation("create" if creates else "open")
        descriptor = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        self._descriptors[descriptor] = name
        if not os.path.isdir(name):
            self._flushed[name] = 0 if flags & os.O_TRUNC else self._flushed.get(name, before)
        if creates:
            self._names.setdefault(os.path.dirname(name), []).append(("create", name))
        return descriptor

    def _write(self, descriptor: int, data: Any) -> int:
        if descriptor in self._descriptors:
            try:
                self._operation("write")
            except (OSError, Crash):
                self._real["write"](descriptor, data[: len(data) // 2])  # the half that still fitted
                raise
        return self._real["write"](descriptor, data)

    def _fsync(self, descriptor: int) -> None:
        name = self._descriptors.get(descriptor)
        if name is not None:
            self._operation("fsync")
            if name in self._flushed:
                self._flushed[name] = os.path.getsize(name)
            self._names.pop(name, None)
        self._real["fsync"](descriptor)

    def _close(self, descriptor: int) -> None:
        gone = self.fails and self.kind in (
            "crash",
            "power cut",
        )  # then `finally` clauses must not turn the crash into an EBADF
        known = self._descriptors.pop(descriptor, None)
        with contextlib.suppress(OSError) if gone else contextlib.nullcontext():
            self._real["close"](descriptor)
        if known is not None or gone:
            self._operation("close")

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if self._inside(path):
            self._operation("mkdir")
        self._real["mkdir"](path, mode, dir_fd=dir_fd)

    def _rename(self, source: Any, target: Any) -> None:
        self._move("rename", source, target)

    def _replace(self, source: Any, target: Any) -> None:
        self._move("replace", source, target)

    def _move(self, how: str, source: Any, target: Any) -> None:
        source, target = os.fspath(source), os.fspath(target)
        if self._inside(target):
            self._operation(how)
            if not os.path.exists(target):
                self._names.setdefault(os.path.dirname(target), []).append(("rename", source, target))
        self._real[how](source, target)
        for table in (self._flushed, self._names):
            for name in [name for name in table if name == source or name.startswith(source + os.sep)]:
                table[target + name[len(source) :]] = table.pop(name)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        if dir_fd in self._descriptors or (dir_fd is None and self._inside(path)):
            self._operation("unlink")
        self._real["unlink"](path, dir_fd=dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        if dir_fd in self._descriptors or (dir_fd is None and self._inside(path)):
            self._operation("rmdir")
        self._real["rmdir"](path, dir_fd=dir_fd)

    def _lose_what_was_not_flushed(self) -> None:
        for name, safe in self._flushed.items():
            if os.path.exists(name):
                os.truncate(name, (safe + max(os.path.getsize(name), safe)) // 2)
        for folder, changes in self._names.items():
            for change in reversed(changes):
                if change[0] == "create" and os.path.exists(os.path.join(folder, os.path.basename(change[1]))):
                    os.unlink(os.path.join(folder, os.path.basename(change[1])))
                elif change[0] == "rename" and os.path.exists(change[2]) and not os.path.exists(change[1]):
                    os.rename(change[2], change[1])


# --- a tiny training run -----------------------------------------------------------------------------------------------------------------

STEPS = 30
QUIET = LoopConfig(device="cpu", workers=0, log_every=4, checkpoint_every=3)


class TinyNet(nn.Module):
    """Convolution, batch statistics, dropout, a 0-dim buffer: what a resume must restore or reproduce."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 2, 1))
        self.register_buffer("drift", torch.tensor(0.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.drift += images.mean()
        return self.body(images)


def tiny_batches(
    start: int, size: int = 4, rank: int = 0, world_size: int = 1, broken_at: int | None = None
) -> Iterator[SimpleNamespace]:
    """Batch t is a function of t; several processes share it out."""
    t = start
    while True:
        images = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(t))
        if t == broken_at:
            images[-1] = float("nan")
        share = slice(rank * size // world_size, (rank + 1) * size // world_size)
        yield SimpleNamespace(images=images[share], names=[f"image_{t}_{i}.png" for i in range(size)][share])
        t += 1


class TinyStage:
    """Everything `fit` needs, made from a seed; `pause` seconds per step make it long enough to be hit by a signal."""

    def __init__(self, pause: float = 0.0, after_step: Callable[[int], None] | None = None) -> None:
        torch.manual_seed(1)
        self.model, self.critic = TinyNet(), nn.Linear(2, 1)
        self.model = self.model.to(memory_format=torch.channels_last)
        stem, head = self.model.body[0], self.model.body[1:]
        groups = [{"params": list(stem.parameters()), "lr": 0.05}, {"params": list(head.parameters()), "lr": 0.1}]
        sgd = torch.optim.SGD(groups, momentum=0.9)
        self.optimizers = {"main": sgd, "critic": torch.optim.AdamW(self.critic.parameters(), lr=1e-2)}
        self.pause, self.after_step = pause, after_step
        self.calls: list[int] = []

    def step(self, batch: Any, it: int) -> dict[str, torch.Tensor]:
        self.calls.append(it)
        scores = self.model(batch.images)
        loss = scores.square().mean() + 0.1 * (self.critic(scores.detach().mean((2, 3))) - 1).square().mean()
        loss.backward()
        time.sleep(self.pause)
        if self.after_step is not None:
            self.after_step(it)
        return {"loss_main": loss, "shares": scores.detach().mean((0, 2, 3))}

    def fit(self, folder: Path, settings: LoopConfig = QUIET, iterations: int = STEPS, **changes: Any) -> FitResult:
        wanted: dict[str, Any] = {
            "stage": "tiny",
            "run": Run(folder, tensorboard=False, output=changes.pop("output", None) or open(os.devnull, "w")),  # noqa: SIM115
            "modules": {"model": self.model, "critic": self.critic},
            "optimizers": self.optimizers,
            "step": self.step,
            "batches": tiny_batches,
            "iterations": iterations,
            "schedule": lambda it: 1 - it / 100,
            "seed": 3,
            "settings": settings,
            "identity": {"tiny": {"lr": 0.05}},
        }
        return fit(**(wanted | changes))

    def state(self) -> dict[str, torch.Tensor]:
        """Every bit of it, optimisers too."""
        state = {f"model.{key}": value.clone() for key, value in self.model.state_dict().items()}
        state.update({f"critic.{key}": value.clone() for key, value in self.critic.state_dict().items()})
        for name, optimizer in self.optimizers.items():
            for i, entry in optimizer.state_dict()["state"].items():
                state.update(
                    {
                        f"{name}.{i}.{key}": value.clone()
                        for key, value in entry.items()
                        if isinstance(value, torch.Tensor)
                    }
                )
        return state


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def metrics_without_times(run: Run) -> list[dict[str, Any]]:
    times = {"seconds", "images_per_s", "data_wait", "peak_memory_bytes", "phase_peak_bytes"}
    return [{key: value for key, value in record.items() if key not in times} for record in run.metrics()]


# --- processes that are killed -----------------------------------------------------------------------------------------------------------

_server = multiprocessing.get_context("forkserver")
# imported once, so that a child starts in milliseconds; the first optimiser of a process would import torch._dynamo
_server.set_forkserver_preload(["torch", "torch._dynamo", "safetensors.torch", "pytest", "spcl_fast.train.loop"])


def start_process(target: Callable[..., None], *args: Any) -> Any:
    """A process of its own, forked from a clean server: no threads, no torch import. Joined and looked at by the caller."""
    process = _server.Process(target=_child, args=(target, args))
    process.start()
    return process


def _child(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.setsid()  # a group of its own: a test may signal the group
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        target(*args)
    except SpclFastError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def train_tiny(folder: Path, begun: Begun, pause: float = 0.0, iterations: int = STEPS) -> None:
    """Train or go on training in `folder`; `begun` is set once the first step is done."""
    # the tests themselves may run under nohup, where a closed terminal stops nothing
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stage = TinyStage(pause, after_step=lambda it: begun.set())
    stage.fit(folder, iterations=iterations)


class Begun:
    """A flag between processes that a killed one cannot leave locked: a file."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="begun-", dir=folder)) / "flag"

    def set(self) -> None:
        self.path.touch()

    def wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.path.exists():
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True


def as_rank(rank: int, world_size: int, port: int, target: Callable[..., None], *args: Any) -> None:
    """Run `target` as torchrun would."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    with distributed.session("cpu"):
        target(*args)
