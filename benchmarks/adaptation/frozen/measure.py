"""A line for every variant, pair and seed of plans/frozen.yaml, and the table of them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.adaptation.frozen.chain import Study
from benchmarks.adaptation.frozen.variants import VARIANTS
from benchmarks.adaptation.lines import add_line, spread, text_of
from benchmarks.adaptation.plan import Plan, recipe_sha256
from benchmarks.adaptation.seed import commit
from benchmarks.tables import markdown
from spcl_fast import catalog

FILE = RESULTS / "frozen_encoder.jsonl"
_SETTING = "frozen"
_BASE, _MATCHED = (row.net for row in catalog.with_role("baseline", "matched"))
_ADAPTED, _FINAL = (row.net for row in catalog.with_role("result")[-2:])
_PLAIN = {
    False: "plain",
    True: "plain_rectified",
}  # what a variant is compared with, by whether its pseudo-labels are rectified


def measure(plan: Plan, folder: Path, file: Path = FILE) -> Iterator[str]:
    """One after another; a variant that has its line is not repeated."""
    known = {(line["pair"], line["variant"], line["seed"]) for line in read(file)}
    for seed in plan.seeds:
        for pair in plan.pairs:
            missing = [name for name in VARIANTS if (pair, name, seed) not in known]
            if not missing:
                continue
            config = plan.config(pair, _SETTING, seed)
            study = Study(config, folder)
            start = study.source_only()
            labels = study.pseudo_labels(start).labels
            yardsticks = {_BASE: study.miou(start), _MATCHED: study.miou(study.control(start))}
            for name in missing:
                variant = VARIANTS[name]
                weight = config.adapt.contrast_weight if variant.weight is None else variant.weight
                adapted, objective = study.adapted(start, variant.make, labels, weight=weight)
                second = study.pseudo_labels(adapted, rectified=variant.rectified)
                distilled = study.distilled(adapted, second.labels, objective if variant.in_distillation else None)
                line = {
                    "pair": pair, "variant": name, "seed": seed,
                    "settings_sha256": recipe_sha256(config), "commit": commit(),
                    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                    "miou": {**yardsticks, _ADAPTED: study.miou(adapted), _FINAL: study.miou(distilled)},
                    "distilled_from": {"kept_share": second.kept, "precision": second.precision},
                }  # fmt: skip
                add_line(file, line)
                yield f"{pair}, {name}, seed {seed}: {line['miou'][_FINAL]:.1f} mIoU"


Lines = dict[str, dict[int, dict[str, float]]]  # variant -> seed -> net -> mIoU


def read(file: Path = FILE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(titles: Mapping[str, str] | None = None) -> str:
    """A row for each variant: the final net of what it is compared with, and of the others by how much they are above that, seed by seed.

    titles: of the pairs, for the reader.
    """
    found: dict[str, Lines] = {}
    for line in read():
        found.setdefault(line["pair"], {}).setdefault(line["variant"], {})[line["seed"]] = line["miou"]
    rows = [
        ["the net that it starts from", *(_scores(of_pair, _BASE) for of_pair in found.values())],
        ["that, trained on for as long (control)", *(_scores(of_pair, _MATCHED) for of_pair in found.values())],
    ]
    for name, variant in VARIANTS.items():
        base = _PLAIN[variant.rectified]
        cells = (_scores(p, _FINAL, name) if name == base else _gain(p, name, base) for p in found.values())
        rows.append([f"{variant.summary} (`{name}`)", *cells])
    header = ["the contrastive term", *((titles or {}).get(pair, pair) for pair in found)]
    return markdown(header, rows)


def _scores(of_pair: Lines, net: str, variant: str = _PLAIN[False]) -> str:
    return text_of(spread(scores[net] for scores in of_pair.get(variant, {}).values()))


def _gain(of_pair: Lines, name: str, base: str) -> str:
    mine, other = of_pair.get(name, {}), of_pair.get(base, {})
    both = sorted(mine.keys() & other.keys())
    return text_of(spread(mine[seed][_FINAL] - other[seed][_FINAL] for seed in both), "+.1f")
