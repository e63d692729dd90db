"""What the lines of plans/drives.yaml say together: each drive of CamVid left out in turn, and what a few labels of the others add.

A fold is a drive that no stage saw. Its figure is the mean over its seeds; the standard errors are those over the folds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.adaptation import labels_alone
from benchmarks.adaptation.lines import Spread, by_setting, miou, paired, spread, text_of
from benchmarks.adaptation.plan import read_plan
from benchmarks.tables import markdown
from spcl_fast import catalog

HERE = Path(__file__).parent
PLAN = read_plan(HERE / "plans" / "drives.yaml")
_RECIPE = "near"  # without a label; labels_N: the same with N of them
_BASE, _MATCHED, _BOUND = (catalog.with_role(role)[-1] for role in ("baseline", "matched", "bound"))


def _folds() -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """drive -> setting -> seed -> line."""
    every = {pair.rpartition("_")[2]: HERE / "results" / f"{pair}.jsonl" for pair in PLAN.pairs}
    return {drive: by_setting(file) for drive, file in every.items() if file.exists()}


def _final(lines: dict[int, dict[str, Any]]) -> catalog.Stage | None:
    """The last net that was adapted, if all seeds have it."""
    had = [row for row in catalog.with_role("result") if all(row.net in line["nets"] for line in lines.values())]
    return had[-1] if had else None


def _mean(found: Spread | None) -> float | None:
    return None if found is None else found.mean


def _score(lines: dict[int, dict[str, Any]], row: catalog.Stage | None) -> float | None:
    return None if row is None else _mean(spread(miou(line, row.net) for line in lines.values()))


def drives_table() -> str:
    """Without a label: a row for each setting and drive, and one for the mean over the drives."""
    folds, rows = _folds(), []
    for setting in [name for name in PLAN.settings if _labels_of(name) == 0]:
        nets, gains = [], []
        for drive, settings in folds.items():
            lines = settings.get(setting, {})
            final = _final(lines)
            if not lines or final is None:
                continue
            gain = paired(lines, final.net, lines, _MATCHED.net)
            shown = [*catalog.with_role("baseline", "matched", "result"), _BOUND]
            nets.append([_score(lines, row) for row in shown])
            gains.append(_mean(gain))
            rows.append([f"`{setting}`, {drive}", str(len(lines)), *map(_number, nets[-1]), text_of(gain, "+.1f")])
        if len(nets) == len(folds):
            means = [spread(column) for column in zip(*nets, strict=True)]
            rows.append([f"`{setting}`, mean of the drives", "", *map(text_of, means), text_of(spread(gains), "+.1f")])
    titles = [row.title for row in (*catalog.with_role("baseline", "matched", "result"), _BOUND)]
    header = ["the drive left out, mIoU in percent", "seeds", *titles, "final − control"]
    kept = [i for i in range(len(header)) if any(row[i] for row in rows) or i < 2]
    return markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _labels_of(setting: str) -> int | None:
    """How many labelled images a setting of the plan has; None where they are listed in a file."""
    wanted = PLAN.settings[setting].get("target.labelled", "0")
    return int(wanted) if re.fullmatch(r"\d+", wanted) else None


def few_labels() -> dict[int, dict[str, dict[str, float | None]]]:
    """Number of labels (or ALL) -> drive -> what is reached there: `alone`, `picked`, `control`, `adapted`, `baseline`, `bound`."""
    found: dict[int, dict[str, dict[str, float | None]]] = {}
    heads = {"alone": labels_alone.read(), "picked": labels_alone.read(picked=True)}
    for drive, settings in _folds().items():
        for key, lines in heads.items():
            for count, scores in labels_alone.by_count(line for line in lines if line["root"].endswith(drive)).items():
                found.setdefault(count, {}).setdefault(drive, {})[key] = _mean(spread(scores.values()))
        for name in (_RECIPE, *(name for name in PLAN.settings if name.startswith("labels_"))):
            lines, count = settings.get(name), _labels_of(name)
            if lines and count is not None and _final(lines) is not None:
                cell = found.setdefault(count, {}).setdefault(drive, {})
                cell |= {"control": _score(lines, _MATCHED), "adapted": _score(lines, _final(lines))}
                cell |= {"baseline": _score(lines, _BASE), "bound": _score(lines, _BOUND)}
    return {count: found[count] for count in labels_alone.in_order(found)}


def few_labels_table() -> str:
    """A row for each number of labels: means over the drives, where each has one, and the share of the gap to the oracle."""
    few, rows = few_labels(), []
    for count, drives in few.items():
        keys = ("alone", "picked", "control", "adapted")
        every = [[cell.get(key) for cell in drives.values()] for key in keys]
        # a mean over some of the drives would be another one
        columns = [None if None in values else spread(values) for values in every]
        gains = spread(_minus(cell.get("adapted"), cell.get("control")) for cell in drives.values())
        share = _share(drives, few.get(0, {}))
        rows.append(
            [
                labels_alone.words(count),
                *map(text_of, columns),
                text_of(gains, "+.1f"),
                "" if share is None else f"{share:.0f}",
            ]
        )
    header = [
        "labelled images",
        "labels alone",
        "the same, picked",
        "source and labels (control)",
        "adapted with labels",
    ]
    return markdown([*header, "adapted − control", "gap closed, %"], rows)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _share(drives: dict[str, dict[str, float | None]], unlabelled: dict[str, dict[str, float | None]]) -> float | None:
    """Of the way from source-only to the oracle, in percent: a ratio of means over the drives, as the way of one drive may be 0."""
    gains, gaps = [], []
    for drive, cell in drives.items():
        start, end = (unlabelled.get(drive, {}).get(key) for key in ("baseline", "bound"))
        here = cell.get("adapted")
        if start is not None and end is not None and here is not None:
            gains.append(here - start)
            gaps.append(end - start)
    return 100 * sum(gains) / sum(gaps) if sum(gaps) else None
