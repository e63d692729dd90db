"""What N labelled target images are worth by themselves: a linear head on the frozen ImageNet encoder, without a source or adaptation.

The yardstick of `target.labelled`: minutes instead of a run, and nothing is adapted. Evaluated on the drive that is left out.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.adaptation.lines import Spread, add_line, spread, text_of
from benchmarks.adaptation.lines import read as read_lines
from benchmarks.tables import markdown
from spcl_fast.config import Config
from spcl_fast.config.load import load_config
from spcl_fast.data import build_dataset
from spcl_fast.method.head import train_head
from spcl_fast.runs import layout

COUNTS = (1, 5, 10, 23, 46)  # and all of them
ALL = -1  # which stands for as many as there are
ITERATIONS = 300
FILE = RESULTS / "labels_alone.jsonl"


def measure(
    root: Path,
    weights: Path | None,
    seeds: Iterable[int],
    runs: Path,
    file: Path = FILE,
    picked: Path | None = None,
    **changes: str,
) -> Iterator[str]:
    """A line for every number of labels and seed that has none yet. root: images/ and labels/, train and val.

    picked: names, the most useful one first, as `spcl-fast pick-images` writes them; the first N are learned from instead of N at random.
    """
    images = len(build_dataset("folders", root, "train", labels=False).names)
    counts = [count for count in COUNTS if count < images]
    names = None if picked is None else picked.read_text(encoding="utf-8").splitlines()
    counts = [*counts, images] if names is None else [count for count in counts if count <= len(names)]
    known = {(line["root"], line["labels"], line["seed"]) for line in read(file, picked=names is not None)}
    for seed in seeds:
        for count in counts:
            if (root.name, count, seed) in known:
                continue
            labelled, name = str(count), f"{root.name}-{count}-{seed}"
            if names is not None:
                name = f"{root.name}-picked-{count}-{seed}"
                chosen = runs / f"{name}.txt"  # a name of digits alone would be a count
                chosen.parent.mkdir(parents=True, exist_ok=True)
                chosen.write_text("\n".join(names[:count]), encoding="utf-8")
                labelled = str(chosen)
            config = _config(name, root, weights, seed, labelled, runs, changes)
            train_head(config)
            summary = json.loads((runs / config.name / layout.SUMMARY).read_text(encoding="utf-8"))
            line = {
                "root": root.name, "labels": count, "seed": seed, "iterations": config.head.iterations, "weights": weights and weights.name,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "miou": summary["head"]["miou"], "iou": summary["head"]["iou"], "machine": summary["machine"],
                **({} if names is None else {"picked": True}),
            }  # fmt: skip
            add_line(file, line)
            yield f"{root.name}: {count} {'labels' if names is None else 'picked labels'}, seed {seed}: {line['miou']:.1f} mIoU"


def _config(
    name: str, root: Path, weights: Path | None, seed: int, labelled: str, runs: Path, changes: Mapping[str, str]
) -> Config:
    values = {
        "name": name, "runs_dir": str(runs), "seed": str(seed), "target.root": str(root),
        "target.labelled": labelled, "model.name": "lite0", "model.weights": weights and str(weights),
        "head.iterations": str(ITERATIONS), "head.class_weight_power": "0.5", "loop.workers": "0", **changes,
    }  # fmt: skip
    return load_config("folders", sets=("head",), overrides=list(values.items()))


def read(file: Path = FILE, *, picked: bool = False) -> list[dict[str, Any]]:
    """The lines of images that were drawn at random, or of those that a net picked."""
    return [line for line in read_lines(file) if line.get("picked", False) == picked]


def in_order(counts: Iterable[int]) -> list[int]:
    """Numbers of labels, all of them last."""
    return sorted(counts, key=lambda count: math.inf if count == ALL else count)


def words(count: int) -> str:
    return "all" if count == ALL else str(count)


def by_count(of_roots: Iterable[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Number of labels (ALL: one that is not of COUNTS, as many as there are) -> root -> mIoU, the mean over the seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for line in of_roots:
        found.setdefault(line["root"], {}).setdefault(line["labels"], []).append(line["miou"])
    scores: dict[int, dict[str, float]] = {}
    for root, counts in found.items():
        for count, values in counts.items():
            scores.setdefault(count if count in COUNTS else ALL, {})[root] = Spread(tuple(values)).mean
    return scores


def table(lines: Iterable[dict[str, Any]]) -> str:
    """A row for each root, a column for each number of labels: mean ± standard error over the seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for line in lines:
        found.setdefault(line["root"], {}).setdefault(line["labels"], []).append(line["miou"])
    counts = sorted({count for of_root in found.values() for count in of_root})
    rows = [
        [root, *(text_of(spread(of_root.get(count, []))) for count in counts)]
        for root, of_root in sorted(found.items())
    ]
    return markdown(["trained on", *(str(count) for count in counts)], rows)
