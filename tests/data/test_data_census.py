"""What odd labels are taken for: each mistake that people make is named with its way on, by `check-data` and before a run's first step."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from spcl_fast.cli.entry import main
from spcl_fast.data import CITYSCAPES_19, build_dataset, check_data
from spcl_fast.data.classes import CITYSCAPES_IDS_19
from spcl_fast.data.statistics import census, class_counts

THREE = ("sky", "road", "car")


def labelled(root, ids, names=THREE, images=2, kind="folders"):
    """A set whose labels hold these ids in equal shares, in train and val."""
    pixels = np.resize(np.array(ids, np.uint8), (48, 64))
    for split in ("train", "val"):
        where = {"folders": (f"images/{split}", f"labels/{split}"), "gta5": ("images", "labels")}[kind]
        for index in range(images):
            for folder, array in zip(where, (np.zeros((48, 64, 3), np.uint8), pixels), strict=True):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / f"{index}.png")
    if kind == "folders":
        (root / "classes.json").write_text(json.dumps({"names": names}))
    return build_dataset(kind, root, "train")


MISTAKES = {
    "masks of 0 and 255": ((0, 255), ("background", "defect"), "only class in 2 labels; 50.0%.*masks of 0 and 255"),
    "masks of nothing but 255": ((255,), ("background", "defect"), "no pixel of 2 labels.*masks of 0 and 255"),
    "ids from 1": ((1, 2, 3), THREE, "sky never occurs.*Do the ids start at 1"),
    "ids from 1 and 0 for unlabelled": ((0, 1, 2, 3), THREE, r"unknown ids.*3 \(1536 pixels\).*Do the ids start at 1"),
    "ids stretched to be seen": ((0, 85, 170, 255), THREE, "multiples of 85"),
    "ids stretched by ten": ((10, 20, 0), THREE, "multiples of 10"),
    "label ids": ((7, 8, 11, 21, 23, 24, 26, 33), CITYSCAPES_19.names, "Cityscapes' label ids.*instead of its 19"),
    "one class": ((1,), THREE, "road is the only class"),
    "mostly unknown": ((0, 1, 7, 9, 11, 12, 13), THREE, "unknown ids.*Name them in classes.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_labels_that_teach_nothing_or_something_else_stop_a_run_and_fail_the_check(tmp_path, mistake, capsys):
    ids, names, told = MISTAKES[mistake]
    data = labelled(tmp_path / "set", ids, names)
    findings = census(data).findings()
    assert any(finding.stops for finding in findings), findings
    report = check_data(data)
    text = report.text().replace("\n", " ")
    assert not report.ok and any(problem.name == "labels" for problem in report.problems)
    assert re.search(told, text), text
    assert run(tmp_path) == 3
    error = capsys.readouterr().err
    assert "source_only was not started: in the source's labels (folders, split 'train')" in error
    assert "spcl-fast check-data --side source" in error and "Traceback" not in error
    assert not (tmp_path / "runs" / "x" / "source_only" / "checkpoints").exists()


def run(tmp_path, *more):
    words = [
        "run",
        "--preset",
        "folders",
        "--model.name",
        "tiny",
        "--loop.workers",
        "0",
        "--loop.device",
        "cpu",
        "--stages",
    ]
    words += ["source_only", "--source_only.iterations", "1", "--source_only.batch_size", "2", "--name", "x"]
    for setting in ("source.size", "source.eval_size", "target.size", "target.eval_size", "source_only.augment.crop"):
        words += [f"--{setting}", "64,48"]
    roots = ["--source.root", str(tmp_path / "set"), "--target.root", str(tmp_path / "set")]
    return main([*words, *roots, "--runs_dir", str(tmp_path / "runs"), *more])


@pytest.mark.parametrize(
    ("ids", "told"),
    [((0, 1), "car never occurs in 2 labels"), ((0, 1, 2, 0, 1, 2, 0, 1, 2, 9), r"unknown ids in 2 labels.*9 \(")],
)
def test_odd_labels_are_a_problem_of_the_check_and_a_warning_of_a_run(tmp_path, ids, told, capsys):
    data = labelled(tmp_path / "set", ids)
    assert not any(finding.stops for finding in census(data).findings())
    with pytest.raises(AssertionError, match=told):
        assert check_data(data).ok, check_data(data).text()
    assert main(["check-data", "--preset", "folders", "--side", "source", "--source.root", str(tmp_path / "set")]) == 3
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert "warning: in the source's labels (folders, split 'train')" in capsys.readouterr().out


def test_train_ids_where_label_ids_are_expected_are_told(tmp_path):
    data = labelled(tmp_path, range(19), kind="gta5")
    (finding, *_) = census(data).findings()
    assert finding.stops and "Are these train ids (0 to 18) where label ids (0 to 33) are expected" in finding.text
    assert not check_data(data).ok


def test_label_ids_where_label_ids_are_expected_are_fine(tmp_path):
    data = labelled(tmp_path, [*CITYSCAPES_IDS_19, 0, 4], kind="gta5")
    assert census(data).findings() == [] and check_data(data).ok


def test_whole_labels_are_fine_and_counted_as_the_class_weights_count(tmp_path):
    data = labelled(tmp_path, (0, 1, 2, 255))
    found = census(data)
    assert found.findings() == [] and check_data(data).ok and found.counted == 2
    assert found.pixels[:3].tolist() == class_counts(data).sum(0).tolist() and found.ignored == 2 * 48 * 64 // 4


def test_255_can_be_mapped_to_the_object(tmp_path):
    labelled(tmp_path / "set", (0, 255), ("background", "defect"))
    table = {"names": ["background", "defect"], "from": {"set": {"0": 0, "255": 1}}}
    (tmp_path / "classes.json").write_text(json.dumps(table))
    data = build_dataset("folders", tmp_path / "set", "train", classes=tmp_path / "classes.json")
    assert set(np.unique(data.label(0))) == {0, 1} and check_data(data).ok and not census(data).findings()


def test_a_class_that_the_table_leaves_out_may_be_absent(tmp_path):
    labelled(tmp_path / "set", (0, 1))
    shared = {"names": [*THREE, "bus"], "from": {"set": {"0": 0, "1": 1}}}
    (tmp_path / "classes.json").write_text(json.dumps(shared))
    data = build_dataset("folders", tmp_path / "set", "train", classes=tmp_path / "classes.json")
    assert check_data(data).ok and not census(data).findings()


def test_a_sample_of_the_labels_or_a_validation_split_may_lack_a_class(tmp_path):
    data = labelled(tmp_path, (0, 1))
    assert check_data(data, 1).ok and check_data(build_dataset("folders", tmp_path, "val")).ok
    assert not check_data(build_dataset("folders", tmp_path, "val"), training=True).ok


def test_scenes_made_on_the_fly_may_lack_a_class():
    data = build_dataset("generated_driver", None, "train", limit=2)  # trains never come
    assert check_data(data).ok
