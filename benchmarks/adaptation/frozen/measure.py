"""Lines for the variants of plans/frozen.yaml and for the numbers of labels of plans/frozen_labels.yaml, and their tables."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.adaptation.frozen.chain import Study
from benchmarks.adaptation.frozen.variants import VARIANTS
from benchmarks.adaptation.labels_alone import ALL, COUNTS, in_order, words
from benchmarks.adaptation.lines import ROUNDING, add_line, read, spread, text_of
from benchmarks.adaptation.plan import Plan, recipe_sha256
from benchmarks.adaptation.seed import commit
from benchmarks.tables import markdown
from spcl_fast import catalog
from spcl_fast.config import Config

FILE = RESULTS / "frozen_encoder.jsonl"
LABELS_FILE = RESULTS / "frozen_labels.jsonl"
_SETTING = "frozen"
_BASE, _MATCHED = (row.net for row in catalog.with_role("baseline", "matched"))
_ADAPTED, _FINAL = (row.net for row in catalog.with_role("result")[-2:])
_PLAIN = "plain"


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
            yardsticks = {_BASE: study.miou(start), _MATCHED: study.miou(study.control(start))}
            begun = {0: (study, start, study.pseudo_labels(start).labels)}
            for name in missing:
                variant = VARIANTS[name]
                if variant.labels not in begun:
                    with_labels = Study(_with_labels(config, variant.labels), folder)
                    first = with_labels.few_labels(start)
                    begun[variant.labels] = with_labels, first, with_labels.pseudo_labels(first).labels
                study, begins, labels = begun[variant.labels]
                weight = config.adapt.contrast_weight if variant.weight is None else variant.weight
                adapted, objective = study.adapted(begins, variant.make, labels, weight=weight)
                second = study.pseudo_labels(adapted, rectified=variant.rectified)
                distilled = study.distilled(adapted, second.labels, objective if variant.in_distillation else None)
                scores = {_ADAPTED: study.miou(adapted), _FINAL: study.miou(distilled)}
                line = _line(study, pair, {**yardsticks, **scores})
                line |= {"variant": name, "distilled_from": {"kept_share": second.kept, "precision": second.precision}}
                add_line(file, line)
                yield f"{pair}, {name}, seed {seed}: {line['miou'][_FINAL]:.1f} mIoU"


def measure_labels(plan: Plan, folder: Path, file: Path = LABELS_FILE) -> Iterator[str]:
    """A line for every number of labelled images, pair and seed that has none: the recipe with them, and its control."""
    known = {(line["pair"], line["labels"], line["seed"]) for line in read(file)}
    for seed in plan.seeds:
        for pair in plan.pairs:
            without = Study(plan.config(pair, "without", seed), folder)
            every = len(without.context.domains.dataset("target", "train", labels=False))
            missing = [count for count in _counts(every) if (pair, count, seed) not in known]
            start = without.source_only() if missing else None
            for count in missing:
                assert start is not None
                study = (
                    without if count == 0 else Study(_with_labels(plan.config(pair, "labelled", seed), count), folder)
                )
                begun = start if count == 0 else study.few_labels(start)
                weight = study.config.adapt.contrast_weight
                labels = study.pseudo_labels(begun).labels
                adapted, _ = study.adapted(begun, VARIANTS["spcl"].make, labels, weight=weight)
                distilled = study.distilled(adapted, study.pseudo_labels(adapted).labels)
                scores = {_BASE: start, _MATCHED: study.control(start), _ADAPTED: adapted, _FINAL: distilled}
                line = _line(study, pair, {net: study.miou(model) for net, model in scores.items()})
                line |= {"labels": count, "of": every}
                add_line(file, line)
                yield f"{pair}, {count} labels, seed {seed}: {line['miou'][_FINAL]:.1f} mIoU"


def _counts(every: int) -> list[int]:
    return [count for count in (0, *COUNTS) if count < every] + [every]


def _with_labels(config: Config, count: int) -> Config:
    return dataclasses.replace(config, target=dataclasses.replace(config.target, labelled=str(count)))


def _line(study: Study, pair: str, miou: dict[str, float]) -> dict[str, Any]:
    return {
        "pair": pair, "seed": study.config.seed, "settings_sha256": recipe_sha256(study.config), "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "miou": miou,
    }  # fmt: skip


Lines = dict[str, list[dict[str, Any]]]  # by variant


def table(titles: Mapping[str, str] | None = None) -> str:
    """A row for each variant: the final net of `plain`, and by how much those of the others are above it or what they stand next to.

    titles: of the pairs, for the reader.
    """
    found: dict[str, Lines] = {}
    for line in read(FILE):
        found.setdefault(line["pair"], {}).setdefault(line["variant"], []).append(line)
    rows = [
        ["the net that it starts from", *(_scores(of_pair, _BASE) for of_pair in found.values())],
        ["that, trained on for as long (control)", *(_scores(of_pair, _MATCHED) for of_pair in found.values())],
    ]
    for name, variant in VARIANTS.items():
        cells = (
            _scores(p, _FINAL, name) if name == _PLAIN else _gain(p, name, variant.next_to) for p in found.values()
        )
        rows.append([f"{variant.summary} (`{name}`)", *cells])
    header = ["the contrastive term", *((titles or {}).get(pair, pair) for pair in found)]
    return markdown(header, rows)


def _scores(of_pair: Lines, net: str, variant: str = _PLAIN) -> str:
    """Of a seed that was measured again the last line counts."""
    return text_of(spread({line["seed"]: line["miou"][net] for line in of_pair.get(variant, [])}.values()))


def _gain(of_pair: Lines, name: str, next_to: str) -> str:
    """Seed by seed, between lines whose nets started from the same one: of other revisions of the code it may be another."""
    gains = {
        mine["seed"]: mine["miou"][_FINAL] - other["miou"][_FINAL]
        for mine in of_pair.get(name, [])
        for other in of_pair.get(next_to, [])
        if mine["seed"] == other["seed"] and abs(mine["miou"][_BASE] - other["miou"][_BASE]) < ROUNDING
    }
    return text_of(spread(gains.values()), "+.1f")


Nets = dict[str, float]  # `control`, and `adapted`, the final net: mIoU


def _by_labels() -> dict[str, dict[int, list[Nets]]]:
    """pair -> number of labelled images (ALL: as many as there are) -> the nets of each seed."""
    found: dict[str, dict[int, list[Nets]]] = {}
    for line in read(LABELS_FILE):
        count = ALL if line["labels"] == line["of"] else line["labels"]
        nets = {"control": line["miou"][_MATCHED], "adapted": line["miou"][_FINAL]}
        found.setdefault(line["pair"], {}).setdefault(count, []).append(nets)
    return found


def by_labels() -> dict[str, dict[int, Nets]]:
    """The same, means over the seeds."""
    return {pair: {count: _mean(nets) for count, nets in counts.items()} for pair, counts in _by_labels().items()}


def _mean(nets: list[Nets]) -> Nets:
    return {key: sum(net[key] for net in nets) / len(nets) for key in nets[0]}


def labels_table(titles: Mapping[str, str]) -> str:
    """A row for each number of labelled images: source and labels, the final net with adaptation, and the difference.

    titles: pair -> for the reader. Of several pairs of one title: means over the pairs, where all have been measured, of their means over
    seeds; of one pair: over its seeds.
    """
    pairs: dict[str, list[dict[int, list[Nets]]]] = {}
    for pair, counts in _by_labels().items():
        pairs.setdefault(titles[pair], []).append(counts)
    every = {count for found in pairs.values() for counts in found for count in counts}
    rows = []
    for count in in_order(every):
        row = [words(count)]
        for found in pairs.values():
            of_pairs = [counts[count] for counts in found if count in counts]
            nets = [_mean(nets) for nets in of_pairs] if len(of_pairs) == len(found) else []
            nets = of_pairs[0] if len(found) == 1 and of_pairs else nets
            row += [text_of(spread(net[key] for net in nets)) for key in ("control", "adapted")]
            row.append(text_of(spread(net["adapted"] - net["control"] for net in nets), "+.1f"))
        rows.append(row)
    parts = ("source and labels", "adapted", "difference")
    return markdown(["labelled images", *(f"{title}: {part}" for title in pairs for part in parts)], rows)
