"""The run folder, its metrics file, and what the user sees while it fills. Only the main process writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from .. import distributed
from ..errors import CheckpointError, ConfigError, DataError
from . import layout
from .checkpoint import CheckpointStore
from .durable import finite, make_folder, replace_file, replace_json
from .identity import flat_settings, settings_difference, settings_sha256
from .output import tell

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class Run:
    """A run folder: `metrics.jsonl`, one folder a stage with checkpoints and `done.json`, and files of the run as a whole."""

    def __init__(
        self, folder: Path | str, *, tensorboard: bool = True, output: TextIO | None = None, writes: bool | None = None
    ) -> None:
        self.folder = Path(folder)
        self._writes = writes
        self.output = output if output is not None else sys.stdout or open(os.devnull, "w")  # noqa: SIM115  closed: `>&-`
        self._tensorboard = tensorboard
        self._boards: dict[str, Any] = {}
        self._lock: int | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes: asked anew each time, as a run may be opened before the processes have met."""
        return distributed.is_main() if self._writes is None else self._writes

    # --- files -------------------------------------------------------------------------------------------------------------------

    def path(self, *parts: str) -> Path:
        """A path inside the run; nothing is created."""
        return self.folder.joinpath(*parts)

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a stage name: letters, digits, - and _ only")
        return self.folder / name

    def checkpoints(self, stage: str, keep: int = 2) -> CheckpointStore:
        return CheckpointStore(self.stage(stage) / layout.CHECKPOINTS, keep)

    def write_json(self, name: str, value: Any) -> None:
        """Replace `name` (relative to the run) in one step; NaN and infinity become null."""
        if self.writes:
            with self._explained(name):
                replace_json(self.folder / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Replace `name` (relative to the run) in one step."""
        if self.writes:
            with self._explained(name):
                replace_file(self.folder / name, [text.encode()])

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run, or None if it is not there. Raises CheckpointError if it is damaged."""
        path = self.folder / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Remove it to have it made anew.") from error

    def say(self, text: str) -> None:
        """One line for the user, from the main process only."""
        if self.writes:
            tell(self.output, text)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run for writing. Raises CheckpointError if another process does; the system frees it when a process dies."""
        if not self.writes or self._lock is not None:
            yield
            return
        with self._explained(layout.LOCK):
            make_folder(self.folder)
            self._lock = os.open(self.folder / layout.LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take_lock(self._lock)
            yield
        finally:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self, descriptor: int) -> None:
        try:
            import fcntl

            fcntl.lockf(
                descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # not flock: forked data-loading processes would inherit that
        except (BlockingIOError, PermissionError) as error:
            what = f"Another process is writing the run {self.folder}"
            raise CheckpointError(f"{what}. Wait for it, stop it, or give this run another name.") from error
        except (ImportError, OSError):
            pass  # a system or file system without locks: the check is a courtesy

    @contextlib.contextmanager
    def leaves_nothing_if_refused(self) -> Iterator[None]:
        """Remove a folder that was made in here and holds no more than what a run says of itself, where settings, data or weights are
        refused: it would look like a run. Around `exclusive`.
        """
        fresh = not self.folder.exists()
        try:
            yield
        except (ConfigError, DataError, CheckpointError):
            if fresh and self.writes and self.folder.is_dir():
                said = [self.folder / name for name in layout.SAID_BEFORE_STAGES]
                if all(path in said for path in self.folder.iterdir()):
                    for path in said:
                        path.unlink(missing_ok=True)
                    self.folder.rmdir()
            raise

    # --- finished stages ------------------------------------------------------------------------------------------------------------

    def done(self, stage: str) -> dict[str, Any] | None:
        """What `mark_done` wrote for the stage, or None: not finished, or its file is damaged."""
        try:
            record = self.read_json(layout.of_stage(stage, layout.DONE))
        except CheckpointError:
            return None
        if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
            return None
        return record if record.get("settings_sha256") == settings_sha256(record["settings"]) else None

    def is_done(self, stage: str, identity: Any) -> bool:
        """Whether the stage finished with these settings and inputs (any nesting of dataclasses, dicts and values).

        Raises CheckpointError that names the keys if it finished with others: nothing is overwritten silently.
        """
        record = self.done(stage)
        if record is None:
            return False
        difference = settings_difference(record["settings"], flat_settings(identity))
        if difference:
            raise CheckpointError(
                f"Stage {stage} in {self.folder} was finished with other settings ({difference}). "
                f"Give this run another name, or remove {self.stage(stage)} to do the stage again."
            )
        return True

    def mark_done(self, stage: str, identity: Any, **facts: Any) -> None:
        """Write the stage's `done.json`, the last thing a finished stage does."""
        settings = flat_settings(identity)
        self.write_json(
            layout.of_stage(stage, layout.DONE),
            {"stage": stage, **facts, "settings_sha256": settings_sha256(settings), "settings": settings},
        )

    # --- metrics --------------------------------------------------------------------------------------------------------------------

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl` (and one point a number to TensorBoard). `record` has "stage" and "step"."""
        if not self.writes:
            return
        line = json.dumps(finite(dict(record))).encode() + b"\n"
        with self._explained(layout.METRICS):
            make_folder(self.folder)
            descriptor = os.open(self.folder / layout.METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(
                        errno.ENOSPC, os.strerror(errno.ENOSPC)
                    )  # a short write to a file is a disk that just became full
            finally:
                os.close(descriptor)
        self._append_tensorboard(record)

    def sync_metrics(self) -> None:
        """Flush `metrics.jsonl` to the disk: before a checkpoint, so that a resumed run misses no line."""
        if self.writes and (self.folder / layout.METRICS).exists():
            with self._explained(layout.METRICS):
                descriptor = os.open(self.folder / layout.METRICS, os.O_RDWR)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def forget_metrics_after(self, stage: str, step: int) -> None:
        """Drop the stage's lines beyond `step`, and torn ones: a resumed run writes them again."""
        path = self.folder / layout.METRICS
        if not self.writes or not path.exists():
            return
        with self._explained(layout.METRICS):
            text = path.read_bytes()
            lines = text.splitlines(keepends=True)
            kept = [line for line in lines if _belongs(line, stage, step)]
            if kept != lines:
                replace_file(path, kept)

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The logged records, of one stage or of all; torn lines left out."""
        try:
            text = (self.folder / layout.METRICS).read_bytes()
        except FileNotFoundError:
            return []
        records = [record for line in text.splitlines() if (record := _parsed(line)) is not None]
        return [record for record in records if stage is None or record.get("stage") == stage]

    def close(self) -> None:
        for board in self._boards.values():
            board.close()
        self._boards.clear()

    def _append_tensorboard(self, record: Mapping[str, Any]) -> None:
        stage, step = str(record["stage"]), int(record["step"])
        if stage not in self._boards:
            writer = _summary_writer() if self._tensorboard else None
            if writer is None:
                self._tensorboard = False
                return
            self._boards[stage] = writer(str(self.folder / layout.TENSORBOARD / stage), purge_step=step)
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._boards[stage].add_scalar(name, value, step)
            elif isinstance(value, list | tuple):
                for i, item in enumerate(value):
                    self._boards[stage].add_scalar(f"{name}/{i:02d}", item, step)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"Cannot write {self.folder / name}: {error.strerror}"
            raise CheckpointError(f"{what}. Make room or repair the disk and start the same command again.") from error


def _summary_writer() -> Any:
    """TensorBoard's writer class, or None where it is not installed or does not import."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # a broken TensorFlow next to it raises anything; TensorBoard is optional
        return None
    return SummaryWriter


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _belongs(line: bytes, stage: str, step: int) -> bool:
    record = _parsed(line) if line.endswith(b"\n") else None
    if record is None:
        return False
    return record.get("stage") != stage or not isinstance(record.get("step"), int) or record["step"] <= step
