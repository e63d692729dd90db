"""Checkpoints that survive kill -9, a full disk and a power cut: either whole or not there.

A checkpoint is a folder `step_XXXXXXXX` with safetensors files, `state.json` and `manifest.json`, nothing that can run code. It is
written as `.tmp-...`: files flushed, the manifest (sizes and sha256 of all others) last, the folder renamed, its parent flushed. It is
then read back; only after it verified are older ones removed. A reader takes the newest one that verifies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .durable import file_sha256, make_folder, remove_folder, sync_folder, write_file
from .layout import MANIFEST, STATE
from .tensorfile import read_tensors, write_tensors

FORMAT = 1
_FOLDER = re.compile(r"step_(\d{8,12})(\.replaced)?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_UNNAMED = "tensors"  # the file of tensors whose key names none
_MANIFEST_BYTES = 1 << 20  # larger is not ours: do not parse it


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: CPU tensors by `file/name`, and whatever JSON was saved next to them."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, without its name: `group("model")` is a state dict."""
        return {key[len(name) + 1 :]: tensor for key, tensor in self.tensors.items() if key.startswith(name + "/")}


class CheckpointStore:
    """The checkpoints of one stage, in `folder`; the newest `keep` stay. One writer at a time, any number of readers."""

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Commit one checkpoint and return its folder; those of later steps (of an abandoned continuation) and the oldest ones go.

        A key `file/name` puts the tensor into `file.safetensors`; a key without `/` into `tensors.safetensors`. `meta` must be JSON.
        Raises CheckpointError if it could not be written and read back; then the older checkpoints are all still there.
        """
        try:
            path = self._commit(step, _by_file(tensors), dict(meta))
        except OSError as error:
            self.remove_leftovers()
            raise CheckpointError(self._why_not_saved(step, error)) from error
        verify_checkpoint(path)
        self._prune(step)
        return path

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if there never was one. Damaged ones are skipped with a warning.

        Raises CheckpointError if there are checkpoints and none is whole.
        """
        problems = []
        for path in self.paths():
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem} Going on from {path.name}.", stacklevel=2)
            return checkpoint
        if problems:
            raise CheckpointError(
                f"No checkpoint in {self.folder} is whole:\n  "
                + "\n  ".join(problems)
                + "\nRemove that folder to start the stage anew."
            )
        return None

    def paths(self) -> list[Path]:
        """Folders of the checkpoints, newest first, whole or not."""
        found = []
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"Cannot list the checkpoints in {self.folder}: {error.strerror}.") from error
        for name in names:
            match = _FOLDER.fullmatch(name)
            if match:
                found.append((int(match[1]), match[2] is None, name))
        return [self.folder / name for _, _, name in sorted(found, reverse=True)]

    def steps(self) -> list[int]:
        """Their steps, newest first."""
        return [_step_of(path) for path in self.paths()]

    def remove_leftovers(self) -> None:
        """Remove what an interrupted `save` left behind (the writer only); failing to do so is no reason to stop."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):
                if name.startswith((".tmp-step_", ".removed-step_")):
                    remove_folder(self.folder / name)

    def _commit(self, step: int, files: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> Path:
        make_folder(self.folder)
        self.remove_leftovers()
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".tmp-{final.name}-{os.getpid()}"
        os.mkdir(temporary)
        written = {
            f"{name}.safetensors": write_tensors(temporary / f"{name}.safetensors", group)
            for name, group in files.items()
        }
        written[STATE] = write_file(temporary / STATE, [_json({"step": step, "meta": meta})])
        entries = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in written.items()}
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "files": entries}
        manifest["sha256"] = _manifest_sha256(manifest)
        write_file(temporary / MANIFEST, [_json(manifest)])
        sync_folder(temporary)
        if (
            final.exists()
        ):  # written again after a resume from an older one: stays readable until the new one has verified
            self._set_aside(final)
        os.rename(temporary, final)
        sync_folder(self.folder)
        return final

    def _set_aside(self, final: Path) -> None:
        aside = final.with_name(final.name + ".replaced")
        if aside.exists():
            remove_folder(aside)
        os.rename(final, aside)

    def _prune(self, step: int) -> None:
        paths = self.paths()
        new = self.folder / f"step_{step:08d}"
        older = [path for path in paths if _step_of(path) < step]
        keep = {new, *older[: self.keep - 1]}
        for path in paths:
            if path not in keep:
                try:
                    remove_folder(path)
                except OSError as error:
                    warnings.warn(f"Cannot remove the old checkpoint {path}: {error.strerror}.", stacklevel=3)

    def _why_not_saved(self, step: int, error: OSError) -> str:
        kept = self.paths()
        still = f"The checkpoint before it, {kept[0].name}, is untouched" if kept else "There is no earlier checkpoint"
        advice = (
            "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "repair the disk or its permissions"
        )
        what = f"Cannot write the checkpoint of step {step} into {self.folder}: {error.strerror}."
        return f"{what} {still}; {advice} and start the same command again."


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Verify and load one checkpoint folder. Raises CheckpointError that says which file is damaged and how."""
    path = Path(path)
    manifest = verify_checkpoint(path)
    tensors: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            prefix = "" if name == f"{_UNNAMED}.safetensors" else name.removesuffix(".safetensors") + "/"
            tensors.update({prefix + key: tensor for key, tensor in read_tensors(path / name).items()})
    state = _read_json(path / STATE, None)
    if not isinstance(state, dict) or state.get("step") != manifest["step"] or not isinstance(state.get("meta"), dict):
        raise CheckpointError(f"{path / STATE} does not belong to its manifest.")
    return Checkpoint(manifest["step"], tensors, state["meta"], path)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return that. Raises CheckpointError."""
    step = _step_of(path)
    manifest = _read_json(path / MANIFEST, _MANIFEST_BYTES)
    try:
        whole = (
            manifest["format"] == FORMAT
            and manifest["step"] == step
            and manifest["sha256"] == _manifest_sha256(manifest)
        )
        files = dict(manifest["files"].items())
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error!r}.") from error
    if not whole or STATE not in expected or not all(_FILE.fullmatch(name) for name in expected):
        why = "its checksum, format, step or file names do not fit"
        raise CheckpointError(f"{path / MANIFEST} is damaged or of another version: {why}.")
    for name, (size, sha256) in expected.items():
        _verify_file(path / name, size, sha256)
    return manifest


def _verify_file(path: Path, size: int, sha256: str) -> None:
    try:
        status = os.stat(path)
        found = status.st_size if stat.S_ISREG(status.st_mode) else -1  # never open a pipe
        same = found == size and file_sha256(path) == sha256
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not same:
        how = f"{found} bytes instead of {size}" if found != size else "its sha256 differs from the manifest"
        raise CheckpointError(f"{path} is damaged: {how}.")


def _by_file(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        file, slash, name = key.partition("/")
        if not slash:
            file, name = _UNNAMED, key
        if not _FILE.fullmatch(file) or (slash and file == _UNNAMED):
            raise ValueError(
                f"Tensor key {key!r}: the part before '/' must be a plain file name other than {_UNNAMED!r}."
            )
        files.setdefault(file, {})[name] = tensor
    return files


def _step_of(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder; expected a name like step_00000100.")
    return int(match[1])


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path, limit: int | None) -> Any:
    try:
        if limit is not None and os.stat(path).st_size > limit:
            raise CheckpointError(f"{path} is damaged: larger than {limit} bytes.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
