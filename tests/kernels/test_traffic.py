"""The ledger of what the GPU kernels move: the committed figures are those of this tree, and a worse kernel shows in them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("triton")

from strided import counted_copy  # noqa: E402

from benchmarks.traffic import count, page, triton_launches  # noqa: E402
from benchmarks.traffic.__main__ import RESULT  # noqa: E402
from benchmarks.traffic.cases import CASES, Case  # noqa: E402
from spcl_fast.backends import cuda  # noqa: E402

if torch.cuda.is_available() or not (shutil.which("g++") and shutil.which("nm")):
    pytest.skip("counts in Triton's interpreter, and in an emulator that g++ builds", allow_module_level=True)

CONTRAST = "prototype_contrastive_loss"
KEPT = [
    Case(CONTRAST, "B", "half", "odd"),
    Case(CONTRAST, "B", "float32", "even"),
    Case(CONTRAST, "B", "float32", "even", learned=True),
    Case(CONTRAST, "A", "float32", "odd"),
    Case("class_moments", "A", "half", "odd"),
    Case("class_moments", "B", "float32", "channels_last"),
    Case("upsampled_prediction", "U2", "float32", "even"),
    Case("upsampled_confusion", "U1", "float32", "even"),
]
FIGURES = ("read", "read_sectors", "compulsory", "again_in_block", "gradient_written", "gradient_sectors")


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads(RESULT.read_text())


def committed(result: dict, case: Case, by: str) -> dict:
    return next(row for row in result["rows"] if (row["case"], row["by"]) == (case.name, by))


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
@pytest.mark.parametrize("by", ["triton", "cuda"])
def test_the_committed_figures_are_counted_again(result, by, case):
    if by == "cuda" and case.op not in cuda.OPTIONS:
        pytest.skip(f"CUDA has no {case.op}")
    row, kept = count.ours(case, by), committed(result, case, by)
    assert row.keys() == kept.keys()
    for phase in ("forward", "backward"):
        if phase in row:
            assert {key: row[phase][key] for key in FIGURES} == {key: kept[phase][key] for key in FIGURES}, (
                "another tree moves other bytes: `python -m benchmarks.traffic` counts them and writes the page"
            )
            assert row[phase]["all_requested"] == pytest.approx(kept[phase]["all_requested"], rel=0.02)
            for mine, theirs in zip(row[phase]["kernels"], kept[phase]["kernels"], strict=True):
                assert mine["name"] == theirs["name"]
                for side in {"shared_reads_over_ideal", "shared_writes_over_ideal"} & theirs.keys():
                    wanted = theirs[side]  # another compiler joins other loads
                    assert mine[side] == (wanted and pytest.approx(wanted, rel=0.1))


def test_every_case_is_in_the_result_file_and_no_other(result):
    assert {row["case"] for row in result["rows"]} == {case.name for case in CASES}


def test_the_page_shows_the_result_file(result):
    assert page.PAGE.read_text(encoding="utf-8") == page.text(result)


# ---- a worse kernel shows -------------------------------------------------------------------------------------------


def test_a_bank_conflict_shows_in_the_wavefronts(result):
    case, figure = Case(CONTRAST, "B", "half", "even"), "shared_reads_over_ideal"
    conflict = ("contrast_plan.h", "kProtoRow = kHalf ? 72", "kProtoRow = kHalf ? 64")
    row = count.ours(case, "cuda", (*count.FLOAT32_LEFT_OUT, conflict))
    assert row["forward"]["kernels"][0][figure] > 1.3 * committed(result, case, "cuda")["forward"]["kernels"][0][figure]


def test_a_second_pass_over_the_features_shows(result, monkeypatch):
    case = Case(CONTRAST, "A", "float32", "odd")
    monkeypatch.setattr(cuda, "saves_logits", lambda *_, **__: False)
    assert count.ours(case, "cuda")["backward"]["read"] > 1.9 * committed(result, case, "cuda")["backward"]["read"]


def test_a_strided_load_shows_in_the_sectors():
    for step, sectors in ((1, 16), (2, 32), (8, 128)):
        launches, _ = counted_copy(step)
        s = launches[0].sectors
        assert (launches[0].kernel, launches[0].blocks) == ("copy_kernel", 4)
        assert s.read_bytes.sum() == s.written_bytes.sum() == 512
        assert (s.read_requests > 0).sum() == sectors and s.written_requests.sum() == 16


def test_sectors_that_two_tiles_share_are_moved_twice():
    import triton
    import triton.language as tl

    @triton.jit
    def sum_kernel(source, target, block: tl.constexpr):
        at = tl.program_id(0) * block + tl.arange(0, block)
        tl.store(target + tl.program_id(0), tl.sum(tl.load(source + 1 + at)))

    with triton_launches.counted("sm_90") as launches:
        sum_kernel[(2,)](torch.zeros(64), torch.zeros(2), 16)
    s = launches[0].sectors
    read = s.read_requests[s.read_requests > 0]
    assert (read.size, read.sum(), s.read_bytes.sum()) == (5, 6, 128)
    assert s.reading_blocks.max() == 2
