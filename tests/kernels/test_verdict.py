"""What limits a kernel, by the counts: each planted defect changes the verdict, and the rates are those that are published."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("triton")

from strided import counted_copy  # noqa: E402

from benchmarks.tables import read  # noqa: E402
from benchmarks.traffic import count, page, works  # noqa: E402
from benchmarks.traffic import verdict as v  # noqa: E402
from benchmarks.traffic.cases import Case  # noqa: E402
from benchmarks.traffic.ledger import moved, total  # noqa: E402
from benchmarks.traffic.machines import A100, H200, MACHINES  # noqa: E402

S = 1e9  # bytes
COPY = v.Work("copy", S, S, wavefronts=S / 128, blocks=132 * 2 * 50, resident_blocks=2, in_flight_bytes=32 << 10)
EMULATED = pytest.mark.skipif(
    torch.cuda.is_available() or not (shutil.which("g++") and shutil.which("nm")), reason="counts in the emulator"
)


def verdict_of(work: v.Work, machine=H200) -> v.Verdict:
    return v.verdict_of([work], S, machine)


def test_a_copy_is_limited_by_its_bytes_and_has_all_of_copy_speed():
    for machine in MACHINES:
        whole_waves = COPY._replace(blocks=100 * machine.multiprocessors)
        assert verdict_of(whole_waves, machine) == (v.DRAM, 1.0, "copy")


@pytest.mark.parametrize(
    ("defect", "limiter", "share"),
    [
        (COPY._replace(dram_bytes=2 * S, cache_bytes=2 * S), v.DRAM, 0.5),  # a second pass
        (COPY._replace(cache_bytes=8 * S), v.CACHE, 0.264),  # a strided load whose sectors are in L2
        (COPY._replace(wavefronts=S / 16), v.SHARED, 0.871),  # an eight-way bank conflict
        (
            COPY._replace(resident_blocks=1, in_flight_bytes=8 << 10),
            v.FLIGHT,
            0.25,
        ),  # registers for one block, small tiles
        (COPY._replace(blocks=133), v.WAVES, 0.504),
        (COPY._replace(exponentials=S), v.EXP, 0.871),
        (COPY._replace(instructions=1.5 * S / 4), v.ISSUE, 0.581),
        (COPY._replace(flop=2 * S * 50), v.FMA, 0.139),
        (COPY._replace(flop=2 * S * 500, is_half=True), v.TENSOR, 0.206),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_defect_has_its_limiter(defect, limiter, share):
    found = verdict_of(defect)
    assert found.limiter == limiter and found.share == pytest.approx(share, rel=0.01)


def test_the_published_rates_agree_with_each_other():
    """Peak FMA rates from the clocks: 67 TFLOP/s of an H200, 19.5 of an A100."""
    assert H200.fma_flop_clock * H200.clocks_s == pytest.approx(67e12, rel=0.01)
    assert A100.fma_flop_clock * A100.clocks_s == pytest.approx(19.5e12, rel=0.01)


def test_the_longest_kernel_names_the_limiter_and_all_of_them_the_share():
    slow = COPY._replace(name="slow", wavefronts=S / 8)
    found = v.verdict_of([COPY, slow], S, H200)
    assert (found.limiter, found.kernel) == (v.SHARED, "slow")
    assert found.share == pytest.approx(1 / (1 + 1 / verdict_of(slow).share), rel=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_strided_load_changes_the_verdict():
    shares = []
    for step in (1, 8):
        launches, source = counted_copy(step)
        everything = total(launches)
        dram = moved(launches[0], source).compulsory + everything.written_sectors
        work = v.Work("read", dram, everything.read_sectors + everything.written_sectors)
        shares.append(v.verdict_of([work], everything.read + everything.written, H200).share)
    assert shares[0] == 1.0 and shares[1] == pytest.approx(2 / 9)


def static(monkeypatch, **changed) -> None:
    """Every pinned row with these values instead."""
    rows = [row | changed for row in works._rows()]
    monkeypatch.setattr(works, "_rows", lambda: rows)


# 32 KB in flight are assumed: this one needs what three stages keep on their way
HUNGRY = H200._replace(in_flight_bytes=60 << 10)


def test_a_register_cliff_changes_the_verdict(monkeypatch, committed):
    row = committed(Case("prototype_contrastive_loss", "B", "float32", "even"), "triton")
    before = works.verdicts(row, H200)["backward"]
    static(monkeypatch, registers=255)
    after = works.verdicts(row, H200)["backward"]
    assert before.limiter != after.limiter == v.FLIGHT and after.share < 0.7 * before.share


def test_a_lost_stage_changes_the_verdict(monkeypatch, committed):
    row = committed(Case("prototype_contrastive_loss", "A", "half", "odd"), "triton")
    before = works.verdicts(row, HUNGRY)["backward"]
    static(monkeypatch, stages=2)
    after = works.verdicts(row, HUNGRY)["backward"]
    assert before.limiter != after.limiter == v.FLIGHT and after.share < before.share


@pytest.fixture
def committed():
    import json

    from benchmarks.traffic.__main__ import RESULT

    rows = {(row["case"], row["by"]): row for row in json.loads(RESULT.read_text())["rows"]}
    return lambda case, by: rows[case.name, by]


CONTRAST = Case("prototype_contrastive_loss", "B", "half", "even")


@EMULATED
@pytest.mark.parametrize(
    ("new", "limiter"),
    [
        (("contrast_plan.h", "classes <= 64 ? 3 : 2", "2"), v.FLIGHT),
        (("contrast_plan.h", "kProtoRow = kHalf ? 72", "kProtoRow = kHalf ? 64"), v.SHARED),
    ],
    ids=["a lost stage of cp.async", "a bank conflict"],
)
def test_a_defect_in_cuda_changes_the_counted_verdict(new, limiter, committed):
    row, kept = count.ours(CONTRAST, "cuda", (*count.FLOAT32_LEFT_OUT, new)), committed(CONTRAST, "cuda")
    mine, theirs = (works.verdicts(r, HUNGRY)["forward"] for r in (row, kept))
    assert theirs.limiter == v.DRAM and mine.limiter == limiter and mine.share < theirs.share


def test_the_page_is_that_of_the_result_files():
    assert page.PAGE.read_text(encoding="utf-8") == page.text(read("traffic.json")), (
        "python -m benchmarks.traffic --page"
    )


def test_every_quoted_shape_has_a_verdict(committed):
    for shape, layout in (("A", "odd"), ("B", "even"), ("C", "even"), ("D", "even")):
        for dtype in ("float32", "half"):
            for by in ("triton", "cuda"):
                row = committed(Case("prototype_contrastive_loss", shape, dtype, layout), by)
                for found in works.verdicts(row, H200).values():
                    assert 0 < found.share <= 1
                for work in works.works(row, "forward", H200):
                    assert work.resident_blocks, f"{work.name} of {row['case']} is not in the pinned table"
