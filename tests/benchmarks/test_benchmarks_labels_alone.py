"""Heads on the frozen features of a few labelled images: a line for every number of labels and seed, once, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.adaptation import labels_alone

SMALL = {
    "model.name": "tiny",
    "target.size": "48,32",
    "target.eval_size": "48,32",
    "head.iterations": "2",
    "head.batch_size": "2",
}


def save_pictures(root: Path) -> Path:
    """Four pictures of each split, a bright class above a dark one."""
    for split, i in ((split, i) for split in ("train", "val") for i in range(4)):
        label = np.zeros((32, 48), np.uint8)
        label[8 + 4 * i :] = 1
        for part, array in (("images", np.stack([200 - 150 * label] * 3, -1)), ("labels", label)):
            path = root / part / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    (root / "classes.json").write_text(json.dumps({"names": ["sky", "road"]}))
    return root


def test_every_number_of_labels_and_seed_has_one_line(tmp_path, monkeypatch):
    root, file = save_pictures(tmp_path / "scenes"), tmp_path / "lines.jsonl"
    monkeypatch.setattr(labels_alone, "COUNTS", (1, 3, 9))

    def run(*seeds):
        return list(labels_alone.measure(root, None, seeds, tmp_path / "runs", file, **SMALL))

    said = run(0)
    assert [line.split(",")[0] for line in said] == ["scenes: 1 labels", "scenes: 3 labels", "scenes: 4 labels"]
    assert run(0) == [] and len(run(0, 1)) == 3  # what has its line is not run again
    lines = labels_alone.read(file)
    assert {(line["labels"], line["seed"]) for line in lines} == {(n, seed) for n in (1, 3, 4) for seed in (0, 1)}
    learnt = (tmp_path / "runs" / "scenes-1-0" / "labelled.txt").read_text().split()
    assert len(learnt) == 1 and learnt[0] in "0123"


def test_picked_images_are_the_first_of_the_list_and_lines_of_their_own(tmp_path, monkeypatch):
    root, file = save_pictures(tmp_path / "scenes"), tmp_path / "lines.jsonl"
    monkeypatch.setattr(labels_alone, "COUNTS", (1, 3))
    (tmp_path / "picked.txt").write_text("2\n0\n3\n")

    def run(picked):
        return list(labels_alone.measure(root, None, [0], tmp_path / "runs", file, picked, **SMALL))

    said = run(tmp_path / "picked.txt")
    assert [line.split(",")[0] for line in said] == ["scenes: 1 picked labels", "scenes: 3 picked labels"]
    learnt = {n: (tmp_path / "runs" / f"scenes-picked-{n}-0" / "labelled.txt").read_text().split() for n in (1, 3)}
    assert learnt == {1: ["2"], 3: ["2", "0", "3"]}
    assert run(tmp_path / "picked.txt") == [] and len(run(None)) == 3  # those drawn at random are measured, too
    assert [line["labels"] for line in labels_alone.read(file, picked=True)] == [1, 3]
    assert [line["labels"] for line in labels_alone.read(file)] == [1, 3, 4]
    by_count = labels_alone.by_count(labels_alone.read(file, picked=True))
    assert list(by_count) == [1, 3]  # 3 is not all of them


def test_the_table_has_means_over_seeds():
    lines = [{"root": "a", "labels": n, "seed": seed, "miou": 10.0 * n + seed} for n in (1, 23) for seed in (0, 2)]
    header, _, row = labels_alone.table([*lines, {"root": "b", "labels": 5, "seed": 0, "miou": 7.0}]).splitlines()[:3]
    assert header == "| trained on | 1 | 5 | 23 |" and row == "| a | 11.0 ± 1.0 |  | 231.0 ± 1.0 |"
