"""The result lines of a pair as Markdown: means, standard errors, and differences taken seed by seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.adaptation.lines import ROUNDING, by_setting, miou, paired, spread, text_of
from spcl_fast import catalog
from spcl_fast.method.summary import gap_closed

NET_NAMES = tuple(row.net for row in catalog.trained())
SIGNALS = ("source_miou", "entropy", "agreement_flip", "agreement_scale", "share_distance", "margin")
FINAL = tuple(row.net for row in reversed(catalog.with_role("result")))
BASES = tuple(row.net for row in catalog.trained() if row.role != "bound" and row.net != FINAL[0])
Lines = dict[str, dict[int, dict[str, Any]]]


def table(path: Path) -> str:
    """Everything results/<pair>.jsonl says, as one Markdown section."""
    settings = by_setting(path)
    parts = [
        f"## {path.stem}",
        *_scores(settings),
        *_differences(settings),
        *_classes(settings),
        *_signals(settings),
        *_kept(settings),
    ]
    return "\n".join(parts) + "\n"


def _rows(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield ""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def _text(values: Any, form: str = ".1f") -> str:
    return text_of(spread(values), form)


def _scores(settings: Lines) -> Iterator[str]:
    yield "\nmIoU on target validation images, mean ± standard error over the seeds."
    trained = [
        net for net in NET_NAMES if any(net in line["nets"] for lines in settings.values() for line in lines.values())
    ]
    rows = [
        [
            name,
            str(len(lines)),
            *(_text(miou(line, net) for line in lines.values()) for net in trained),
            _text((gap_closed_percent(line) for line in lines.values()), ".0f"),
        ]
        for name, lines in settings.items()
    ]
    yield from _rows(["setting", "seeds", *trained, "gap closed, %"], rows)


def gap_closed_percent(line: dict[str, Any]) -> float | None:
    share = gap_closed(line["nets"])
    return None if share is None else 100 * share


def differences(settings: Lines) -> Iterator[tuple[str, Any]]:
    """(what, Spread): within each setting, then of the first setting with each other one, on the nets that they train apart."""
    for name, lines in settings.items():
        for net in FINAL:
            for base in BASES:
                if base != net and (found := paired(lines, net, lines, base)) is not None:
                    yield f"{name}: {net} - {base}", found
    first, others = next(iter(settings), ""), list(settings)[1:]
    for other in others:
        for net in NET_NAMES:
            found = paired(settings[first], net, settings[other], net)
            if found is not None and max(map(abs, found.values)) > ROUNDING:
                yield f"{first} - {other}: {net}", found


def _differences(settings: Lines) -> Iterator[str]:
    yield "\nPaired differences in mIoU: taken seed by seed, then averaged."
    rows = [
        [what, str(len(d.values)), d.text("+.2f"), ", ".join(f"{v:+.1f}" for v in d.values)]
        for what, d in differences(settings)
    ]
    yield from _rows(["difference", "seeds", "mean ± standard error", "by seed"], rows)


def _nets(settings: Lines) -> Iterator[tuple[str, str, list[dict]]]:
    """(setting, net, that net in every line)."""
    for name, lines in settings.items():
        for net in NET_NAMES:
            if found := [line["nets"][net] for line in lines.values() if net in line["nets"]]:
                yield name, net, found


def _classes(settings: Lines) -> Iterator[str]:
    yield "\nIoU by class."
    nets = list(_nets(settings))
    classes = list(nets[0][2][0]["iou"]) if nets else []
    rows = [[name, net, *(_text(one["iou"][c] for one in found) for c in classes)] for name, net, found in nets]
    yield from _rows(["setting", "net", *classes], rows)


def _signals(settings: Lines) -> Iterator[str]:
    yield "\nWhat can be known without labels of the target: source validation mIoU, and signals on target training images."
    rows = [
        [
            name,
            net,
            *(_text((one["signals"][s] for one in found), ".1f" if s == "source_miou" else ".3f") for s in SIGNALS),
        ]
        for name, net, found in _nets(settings)
        if all(one["signals"] for one in found)
    ]
    yield from _rows(["setting", "net", *SIGNALS], rows)


def _kept(settings: Lines) -> Iterator[str]:
    yield "\nShare of the pseudo-labels' pixels that are kept."
    rows = [
        [name, stage, _text((line["pseudo_labels"][stage]["kept_share"] for line in lines.values()), ".3f")]
        for name, lines in settings.items()
        for stage in catalog.names(catalog.STAGES)
        if all(line["pseudo_labels"].get(stage) for line in lines.values())
    ]
    yield from _rows(["setting", "stage", "kept"], rows)
