"""The emulator that runs the CUDA kernels on the CPU: it computes what CUDA would, and it sees what would go wrong there."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch
from cuda_emulator import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs a C++ compiler")
NONE, READ, WRITE, SHARED, NO_BARRIER, NO_WAIT, DIVERGENT, UNWRITTEN, LANES = range(9)


@pytest.fixture(scope="module")
def handle():
    return build.load(build.library("sample", ["tests/cuda_emulator/sample.cpp"]))


@pytest.fixture(scope="module")
def sample(handle):
    handle.sample.restype = ctypes.c_char_p
    handle.sample.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]

    def run(fault: int, order: str = "forward", n: int = 100):
        memory = build.Guarded(handle)
        given = memory.copy(torch.arange(n, dtype=torch.float32), alignment=4)
        out = memory.empty(n, alignment=4)
        with build.order(handle, order):
            said = handle.sample(given.data_ptr(), out.data_ptr(), n, fault)
        result = out.clone()
        memory.close()
        return said and said.decode(), result

    return run


@pytest.mark.parametrize("order", build.ORDERS)
def test_what_is_right_gives_the_same_in_every_order(sample, order):
    said, out = sample(NONE, order)
    assert said is None
    assert out.tolist() == [float(sum(range(64)))] * 64 + [float(sum(range(64, 100)))] * 36


@pytest.mark.parametrize(
    ("fault", "words"),
    [(READ, "a buffer"), (WRITE, "a buffer"), (SHARED, "out of bounds"), (LANES, "lanes of one warp met in")],
)
def test_a_wrong_access_is_named(sample, fault, words):
    said, _ = sample(fault)
    assert said is not None and words in said


def test_a_lost_thread_is_a_deadlock_and_not_a_hang(sample):
    assert "deadlock" in sample(DIVERGENT)[0]


@pytest.mark.parametrize("fault", [NO_WAIT, UNWRITTEN])
def test_what_was_not_written_or_not_waited_for_is_nan(sample, fault):
    said, out = sample(fault)
    assert said is None and out.isnan().any()


def test_a_missing_barrier_shows_in_another_order(sample):
    assert any(sample(NO_BARRIER, order)[1].isnan().any() for order in build.ORDERS)


def told(handle, order: str, clusters: int, size: int, waits: bool):
    handle.sample_cluster.restype = ctypes.c_char_p
    memory = build.Guarded(handle)
    out = memory.empty(clusters * size)
    with build.order(handle, order):
        said = handle.sample_cluster(ctypes.c_void_p(out.data_ptr()), clusters, size, int(waits))
    result = out.tolist()
    memory.close()
    return said and said.decode(), result


@pytest.mark.parametrize("order", build.ORDERS)
def test_blocks_of_a_cluster_read_each_others_memory(handle, order):
    for size in (1, 2, 8):
        said, out = told(handle, order, 3, size, waits=True)
        assert said is None and out == [1 + c * size + (rank + 1) % size for c in range(3) for rank in range(size)]


def test_the_memory_of_a_block_that_has_ended_is_not_read(handle):
    assert any("has ended" in (told(handle, order, 1, 4, waits=False)[0] or "") for order in build.ORDERS)


@pytest.mark.parametrize("busy", [True, False])
def test_what_another_process_compiles_is_left_to_it(tmp_path, busy):
    with (
        build._lock(tmp_path / "made.o") if busy else contextlib.nullcontext(),
        build._lock(tmp_path / "made.o", waits=False) as is_ours,
    ):
        assert is_ours != busy
