"""The gates of `make instructions` and `make arm64` see what they are there for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.levels import arm64, build, instructions

COUNTS = {"class_moments": 1000, "contrast_forward": 2000}


def test_a_count_that_is_more_than_3_percent_off_is_named_and_one_within_is_not():
    assert instructions.complaints({"class_moments": 1029, "contrast_forward": 1941}, COUNTS) == []
    more, fewer = instructions.complaints({"class_moments": 1031, "contrast_forward": 1939}, COUNTS)
    assert more == "class_moments: 1031 instructions, recorded 1000: +3.1 %" and "contrast_forward" in fewer


def test_an_op_that_is_new_or_gone_is_named():
    new, gone = instructions.complaints({"class_moments": 1000, "other": 5}, COUNTS)
    assert new == "other has no recorded count" and gone == "contrast_forward is recorded and does not exist"
    assert instructions.complaints({"class_moments": 1000}, COUNTS, whole=False) == []


def test_counts_of_another_compiler_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instructions, "SAVED", tmp_path / "instructions.json")
    assert instructions.compared(COUNTS, "g++ 12", whole=True) == 1
    instructions.SAVED.write_text(json.dumps({"compiler": "g++ 12", "counts": COUNTS}))
    assert instructions.compared(COUNTS, "g++ 12", whole=True) == 0
    assert instructions.compared(COUNTS, "g++ 13", whole=True) == 3 and "cannot be compared" in capsys.readouterr().err


def test_the_committed_counts_are_of_the_ops_that_there_are():
    record = json.loads(instructions.SAVED.read_text())
    source = (build.ROOT / "benchmarks" / "levels" / "ops.cpp").read_text()
    assert record["level"] == "avx2" and all(f'{{"{op}", ' in source for op in record["counts"])
    assert source.count("{ return ") >= len(record["counts"]) > 10


def test_the_flags_are_those_of_the_package():
    assert "-ffp-contract=fast" in build.setup_list("KERNEL_FLAGS") and "-mavx2" in build.setup_list("AVX2")
    with pytest.raises(KeyError, match="NONE"):
        build.setup_list("NONE")


def test_other_values_sizes_and_many_other_labels_are_seen():
    numbers = np.array([2, 0.5, -4, 3, 1, 2, 3], np.float32)
    parts = arm64.parts(numbers)
    assert [list(part) for part in parts] == [[0.5, -4], [1, 2, 3]] and arm64.distance(parts, parts) == 0
    moved = [parts[0] + np.float32(0.004), parts[1]]
    assert arm64.distance(moved, parts) == pytest.approx(1e-3, rel=1e-3) and not arm64.same_bits(moved, parts)
    assert arm64.distance([parts[0], parts[1] + 1], parts) == np.inf
    assert arm64.distance([parts[0] * np.float32(np.nan), parts[1]], parts) == np.inf
    assert arm64.distance(parts[:1], parts) == np.inf
