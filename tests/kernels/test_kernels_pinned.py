"""The pinned table of what the compilers made: a change shows as rows, occupancy is NVIDIA's, and the committed table has no spill."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.kernels_check import before, cuda_kernels, launches, pinned, sass, triton_kernels  # noqa: E402
from benchmarks.kernels_check.occupancy import resident_blocks  # noqa: E402

ROW = {
    "by": "cuda", "kernel": "k", "case": "k.cu", "arch": "sm_90a", "registers": 40, "instructions": {"fma": 3, "alu": 1},
}  # fmt: skip
LISTING = """
	.section	.text.first_kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
.L_x_0:
        /*0020*/              @!P0 FFMA R0, R4, R5, R0 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR6][R2.64] ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
        /*0060*/                   MUFU.EX2 R0, R0 ;
        /*0070*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0080*/                   EXIT ;
	.section	.text.second_kernel,"ax",@progbits
        /*0000*/                   IADD3 R1, R1, R2, RZ ;
        /*0010*/                   NOP ;
"""


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared", "blocks"),
    [
        (90, 256, 64, 0, 4), (90, 256, 65, 0, 3), (90, 384, 160, 0, 1), (90, 384, 80, 0, 2), (90, 128, 32, 100 << 10, 2),
        (90, 128, 32, 114 << 10, 1), (80, 128, 255, 0, 2), (80, 1024, 65, 0, 0), (80, 32, 16, 0, 32), (80, 64, 32, 164 << 10, 0),
    ],
)  # fmt: skip
def test_resident_blocks_follow_the_rules_of_allocation(capability, threads, registers, shared, blocks):
    assert resident_blocks(capability, threads, registers, shared) == blocks


def test_instructions_and_loops_of_a_listing_are_counted_by_pipe():
    first, second = sass.parsed(LISTING).values()
    assert first.pipes == {"tensor": 1, "fma": 1, "xu": 1, "lsu": 3, "control": 3}
    assert first.loops == (sass.Loop({"fma": 1, "lsu": 1, "control": 1}, 16),) and first.hot == first.loops[0]
    assert second.pipes == {"alu": 1} and second.hot is None


def test_a_change_shows_as_a_row_with_what_changed():
    worse = ROW | {"registers": 41, "instructions": {"fma": 3, "xu": 2}}
    assert pinned.differences([ROW], [ROW]) == []
    (line,) = pinned.differences([worse], [ROW])
    assert line.startswith("~ cuda k k.cu sm_90a: registers 40 -> 41")
    assert "instructions alu 1 -> 0" in line and "instructions xu 0 -> 2" in line


def test_a_row_that_is_new_or_gone_shows_and_a_part_drops_none():
    other = ROW | {"kernel": "other"}
    complete = {("cuda", "sm_90a")}
    assert pinned.differences([other], [ROW], complete) == [
        "+ cuda other k.cu sm_90a: not pinned",
        "- cuda k k.cu sm_90a: pinned, no longer there",
    ]
    assert pinned.differences([other], [ROW]) == ["+ cuda other k.cu sm_90a: not pinned"]
    assert pinned.merged([other], [ROW], complete) == [other]
    assert pinned.merged([other], [ROW]) == [other, ROW]


def test_the_table_is_a_row_per_line_and_reads_back(tmp_path):
    path = tmp_path / "kernels.json"
    pinned.write({"cuda": "13.0"}, [ROW, ROW | {"arch": "sm_80"}], path)
    assert [row["arch"] for row in pinned.read(path)["rows"]] == ["sm_80", "sm_90a"]
    assert pinned.read(path)["compilers"] == {"cuda": "13.0"} and len(path.read_text().splitlines()) == 4


def test_the_committed_table_has_every_kernel_and_no_spill():
    rows = pinned.read()["rows"]
    assert not [pinned.key(row) for row in rows if row["stack_bytes"] or row.get("spill_bytes")]
    assert not [pinned.key(row) for row in rows if row["resident_blocks"] == 0]
    files = {path.name for path in cuda_kernels.SOURCES.glob("*/*.cu")}
    for arch in ("sm_80", "sm_90a", "sm_100"):
        assert {row["case"] for row in rows if (row["by"], row["arch"]) == ("cuda", arch)} == files
    launched = {
        name.removesuffix("_kernel")
        for module in launches._MODULES for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")
    }  # fmt: skip
    for capability in triton_kernels.PINNED:
        assert {row["kernel"] for row in rows if (row["by"], row["arch"]) == ("triton", f"sm_{capability}")} == launched


def test_no_kernel_keeps_fewer_warps_resident_than_at_fece1ad_and_one_that_takes_more_says_why():
    pairs = before.pairs()
    assert len(pairs) > 480
    assert not [pair.key for pair in pairs if before.resident_warps(pair.after) < before.resident_warps(pair.before)]
    assert not [pair.key for pair in pairs if pair.takes_more and before.reason_of(pair) is None]
    given = {before.reason_of(pair) for pair in pairs if pair.takes_more}
    assert given == {why for *_, why in before.REASONS}, "a reason that no row needs any longer"


def test_a_kernel_that_takes_more_than_at_fece1ad_is_found_by_each_of_its_cases():
    old = {"by": "triton", "kernel": "k", "case": "contrast A fp32", "arch": "sm_90", "also": ["contrast B"], "registers": 40,
           "shared_bytes": 8, "stack_bytes": 0, "resident_blocks": 2, "warps": 8}  # fmt: skip
    assert before._by_case([old]).keys() == {("triton", "k", f"contrast {name} fp32", "sm_90") for name in "AB"}
    for change, more in (
        ({}, False), ({"registers": 41}, True), ({"shared_bytes": 9}, True), ({"stack_bytes": 4}, True), ({"resident_blocks": 1}, True),
        ({"resident_blocks": 1, "warps": 16}, False), ({"registers": 39}, False),
    ):  # fmt: skip
        assert before.Pair(("triton", "k", "c", "sm_90"), old, old | change).takes_more == more, change


def test_kernels_check_fails_with_the_rows_that_differ_until_they_are_pinned(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # which the command would set
    from benchmarks.kernels_check import __main__ as command

    found, version = [ROW], {"cuda": "13.0"}
    monkeypatch.setattr(pinned, "TABLE", tmp_path / "kernels.json")
    monkeypatch.setattr(triton_kernels.pixels, "INTERPRETED", False)
    monkeypatch.setattr(command, "compilers", lambda: version)
    monkeypatch.setattr(command, "_rows", lambda options: ((row, "a line", False) for row in found))
    assert command.main(["--update"]) == 0 and command.main([]) == 0
    assert "1 rows as pinned" in capsys.readouterr().out
    found[:] = [ROW | {"registers": 99}]
    assert command.main([]) == 1
    assert "~ cuda k k.cu sm_90a: registers 40 -> 99" in (out := capsys.readouterr().out) and "ARGS=--update" in out
    version["cuda"] = "13.1"
    assert command.main([]) == 0 and "cuda 13.1 is not what the table was made with (13.0)" in capsys.readouterr().out
    monkeypatch.setattr(command, "_rows", lambda options: iter([(ROW, "spilled", True), (None, "late", False)]))
    assert command.main([]) == 1 and "1 left for the next call" in capsys.readouterr().out


def test_a_block_whose_registers_do_not_fit_is_faulty():
    launch = launches.Launch("no", None, (), (), (), (), (1,), ())
    usage = triton_kernels.Usage(147, 0, 0, "wgmma", 1, 16, b"")
    assert "do not fit a multiprocessor" in " ".join(triton_kernels.faults(launch, usage, 90))


def test_a_file_is_compiled_again_where_what_it_includes_changed(tmp_path):
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include <vector>\n')
    (tmp_path / "b.cuh").write_text('#include "c.h"\n#include "b.cuh"\n')
    (tmp_path / "c.h").write_text("")
    assert [path.name for path in cuda_kernels.sources_of(tmp_path / "a.cu")] == ["a.cu", "b.cuh", "c.h"]
