"""Checkpoints: exact, whole or absent, old ones kept until the new one is verified, and never more than data."""

from __future__ import annotations

import json
import os
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
from faults import FAULTS, Crash, FaultyDisk, same_bits

from spcl_fast.errors import CheckpointError
from spcl_fast.runs import checkpoint as checkpoint_module
from spcl_fast.runs import durable
from spcl_fast.runs.checkpoint import Checkpoint, CheckpointStore, _manifest_sha256, read_checkpoint
from spcl_fast.runs.tensorfile import read_tensors


@pytest.fixture(autouse=True)
def instant_fsync(monkeypatch):
    """Power cuts are simulated, so nothing needs to wait for a real disk; `FaultyDisk` still sees every call."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return {"model/weight": weight, "model/bias": torch.full((), float(step)), "optimizer/step": torch.tensor(step)}


def assert_is(checkpoint: Checkpoint | None, *steps: int) -> None:
    assert checkpoint is not None and checkpoint.step in steps
    assert same_bits(checkpoint.tensors, tensors_of(checkpoint.step))
    assert checkpoint.meta == {"of": checkpoint.step}


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, tensors_of(step), {"of": step})


# --- which ones stay, which one is read ---


def test_the_newest_two_stay(tmp_path):
    store = CheckpointStore(tmp_path / "deep" / "folder", keep=2)
    for step in (1, 2, 3, 10):
        save(store, step)
    assert store.steps() == [10, 3]
    assert_is(store.latest(), 10)


def test_no_checkpoint_is_none_and_all_damaged_is_an_error_in_words(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    save(store, 1)
    (store.paths()[0] / "model.safetensors").write_bytes(b"")
    damaged = r"model.safetensors is damaged: 0 bytes instead of \d+"
    with pytest.raises(CheckpointError, match=rf"No checkpoint in .* is whole:\n.*{damaged}(.|\n)*Remove"):
        store.latest()


def test_a_damaged_newest_one_gives_the_older_one_and_says_so(tmp_path, two_checkpoints):
    rebuild(tmp_path, two_checkpoints)
    store = CheckpointStore(tmp_path)
    file = tmp_path / "step_00000002" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(
        UserWarning,
        match="step_00000002/model.safetensors is damaged: its sha256 differs.* Going on from step_00000001",
    ):
        assert_is(store.latest(), 1)


def test_old_ones_stay_until_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    real = durable.write_file

    def bad_disk(path, chunks):
        result = real(path, chunks)
        if path.name == "model.safetensors":
            with open(path, "r+b") as file:
                file.write(b"\xff")
        return result

    monkeypatch.setattr("spcl_fast.runs.tensorfile.write_file", bad_disk)
    with pytest.raises(CheckpointError, match="damaged"):
        save(store, 2)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_is(CheckpointStore(tmp_path).latest(), 1)


def test_going_on_from_an_older_one_drops_the_abandoned_future(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        save(store, step)
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    save(store, 2)  # written again
    assert store.steps() == [2]
    assert_is(store.latest(), 2)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    store = CheckpointStore(tmp_path)
    for name in (".tmp-step_00000001-99", ".removed-step_00000000-99"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    save(store, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_key_that_is_a_path_never_leaves_the_folder(tmp_path):
    for key in ("../evil/x", "/etc/x", "a\\b/x", ".hidden/x", "/x"):
        with pytest.raises(ValueError, match="plain file name"):
            CheckpointStore(tmp_path / "c").save(1, {key: torch.zeros(1)}, {})


# --- faults ---


def faulty_save(folder: Path, kind: str, at: int, before: tuple[int, ...], step: int, keep: int) -> tuple[bool, bool]:
    """Whether the fault was reached and whether `save` returned."""
    store = CheckpointStore(folder, keep)
    for earlier in before:
        save(store, earlier)
    returned = False
    with FaultyDisk(folder, kind, at) as disk:
        try:
            save(store, step)
            returned = True
        except CheckpointError as error:
            assert kind in ("ENOSPC", "EIO")
            assert "No space left" in str(error) or "Input/output error" in str(error)
        except Crash:
            assert kind in ("crash", "power cut")
    return disk.fails, returned


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize(
    "before, step, keep", [((1,), 2, 1), ((1, 2), 2, 2), ((), 1, 2)], ids=["next", "again", "first"]
)
def test_the_nth_file_operation_fails_and_a_whole_checkpoint_is_still_found(tmp_path, kind, before, step, keep):
    warnings.simplefilter("ignore")
    for at in range(1, 200):
        folder = tmp_path / str(at)
        reached, returned = faulty_save(folder, kind, at, before, step, keep)
        found = CheckpointStore(folder).latest()
        if returned:
            assert_is(found, step)
        elif before:
            assert_is(found, before[-1], step)
        else:
            assert found is None or found.step == step
        save(CheckpointStore(folder, keep), step + 1)
        assert_is(CheckpointStore(folder).latest(), step + 1)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], "leftovers"
        if not reached:
            break
    assert 25 < at < 199, "every operation had its turn"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sabotage", ["write_file", "sync_folder"])
def test_a_store_that_forgets_to_flush_is_caught_by_the_power_cut(tmp_path, monkeypatch, sabotage):
    """The test above has teeth: without these flushes a power cut leaves nothing whole."""

    def unflushed_write(path, chunks):
        content = b"".join(bytes(chunk) for chunk in chunks)
        descriptor = durable.os.open(path, durable.os.O_WRONLY | durable.os.O_CREAT, 0o666)
        durable.os.write(descriptor, content)
        durable.os.close(descriptor)
        return len(content), durable.hashlib.sha256(content).hexdigest()

    if sabotage == "write_file":
        monkeypatch.setattr("spcl_fast.runs.tensorfile.write_file", unflushed_write)
    else:
        monkeypatch.setattr(checkpoint_module, "sync_folder", lambda folder: None)
    losses = 0
    for at in range(1, 60):
        faulty_save(tmp_path / str(at), "power cut", at, (1,), 2, 1)
        try:
            losses += CheckpointStore(tmp_path / str(at)).latest() is None
        except CheckpointError:
            losses += 1
    assert losses > 0


# --- damage ---


def mutate(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    place = rng.randrange(len(data) or 1)
    kind = rng.randrange(7)
    if kind == 0 and data:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data += rng.randbytes(rng.randrange(1, 64))
    elif kind == 3:
        data[place : place + 16] = bytes(16)
    elif kind == 4:
        data = bytearray(rng.randbytes(len(data)))
    elif kind == 5:
        data[place:place] = rng.choice([b"9" * 5000, b"[" * 5000, b'"', b"\x00", b"NaN", b"-1", b"{}"])
    else:
        del data[place : place + rng.randrange(1, 32)]
    return bytes(data)


def sign_again(folder: Path) -> None:
    """Make the manifest fit whatever the files hold now: damage that the checksums cannot see, or malice."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in manifest["files"]:
        manifest["files"][name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": durable.file_sha256(folder / name),
        }
    manifest["sha256"] = _manifest_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    store = CheckpointStore(tmp_path_factory.mktemp("two"))
    save(store, 1)
    save(store, 2)
    return {path.relative_to(store.folder): path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}


def rebuild(folder: Path, files: dict[Path, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("both", [False, True], ids=["newest", "both"])
def test_mutated_files_give_the_older_one_or_an_error(tmp_path, two_checkpoints, both):
    warnings.simplefilter("ignore")
    rng = random.Random(0)
    names = sorted(two_checkpoints)
    for i in range(100):
        files = dict(two_checkpoints)
        for step in (1, 2) if both else (2,):
            victim = rng.choice([name for name in names if name.parts[0] == f"step_{step:08d}"])
            files[victim] = mutate(files[victim], rng)
        rebuild(tmp_path / str(i), files)
        try:
            found = CheckpointStore(tmp_path / str(i)).latest()
        except CheckpointError:
            assert both, "the older one was whole"
            continue
        assert_is(found, 1, 2)


@pytest.mark.parametrize("victim", ["model.safetensors", "state.json"])
def test_damage_under_a_fitting_manifest_is_an_error_or_plain_data(tmp_path, two_checkpoints, victim):
    rng = random.Random(1)
    for i in range(100):
        folder = tmp_path / str(i)
        rebuild(folder, two_checkpoints)
        file = folder / "step_00000002" / victim
        file.write_bytes(mutate(file.read_bytes(), rng))
        sign_again(file.parent)
        try:
            found = read_checkpoint(file.parent)
        except CheckpointError:
            continue
        assert found.step == 2 and all(isinstance(tensor, torch.Tensor) for tensor in found.tensors.values())


class Payload:
    def __reduce__(self):
        return (Path.write_text, (Path("payload-ran"), "ran"))


def test_a_pickle_in_place_of_tensors_is_never_run(tmp_path, two_checkpoints, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "state.json"):
        folder = tmp_path / name.replace(".", "_")
        rebuild(folder, two_checkpoints)
        (folder / "step_00000002" / name).write_bytes(pickle.dumps(Payload()))
        sign_again(folder / "step_00000002")
        with pytest.raises(CheckpointError):
            read_checkpoint(folder / "step_00000002")
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "a/b", ".x"])
def test_a_manifest_never_reads_outside_its_folder(tmp_path, two_checkpoints, name):
    rebuild(tmp_path, two_checkpoints)
    file = tmp_path / "step_00000002" / "manifest.json"
    manifest = json.loads(file.read_bytes())
    manifest["files"][name] = {"bytes": 0, "sha256": durable.hashlib.sha256(b"").hexdigest()}
    manifest["sha256"] = _manifest_sha256(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="file names do not fit"):
        read_checkpoint(file.parent)


def test_a_folder_or_a_pipe_in_place_of_a_file_is_an_error_not_a_hang(tmp_path, two_checkpoints):
    for make in (os.mkdir, os.mkfifo):
        folder = tmp_path / make.__name__
        rebuild(folder, two_checkpoints)
        file = folder / "step_00000002" / "model.safetensors"
        file.unlink()
        make(file)
        with pytest.raises(CheckpointError):
            read_checkpoint(file.parent)


def test_strides_that_ask_for_all_memory_are_refused(tmp_path):
    strides = {"strides": json.dumps({"x": [1 << 45, 1]})}
    header = {"__metadata__": strides, "x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError, match="strides"):
        read_tensors(tmp_path / "x.safetensors")
