"""mIoU against the number of labelled images: labels alone, next to a source, and with adaptation; fine-tuned nets and frozen encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.adaptation import drives, labels_alone
from benchmarks.adaptation.frozen import measure
from benchmarks.adaptation.labels_alone import in_order, words
from benchmarks.adaptation.lines import spread

Few = Mapping[int, Mapping[str, Mapping[str, float | None]]]  # what drives.few_labels gives
Curve = dict[int, dict[str, float]]  # number of labels -> pair -> mIoU
_COLOURS = {"alone": "#B0B0B0", "picked": "#E69F00", "control": "#5A5A5A", "adapted": "#0072B2"}
_WORDS = {
    "alone": "labels alone, frozen encoder",
    "picked": "the same, images picked by a net",
    "control": "source and labels",
    "adapted": "adapted with labels",
}
_PANELS = {  # title -> how the names of its pairs end
    "CamVid, each drive left out in turn": tuple(pair.rpartition("_")[2] for pair in drives.PLAN.pairs),
    "crop and weed": ("carrot_weed",),
}


def draw_labels(path: Path) -> None:
    """Full lines: whole nets; dashed: on a frozen encoder. Thin: each pair; with markers: their mean, where every pair was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(3, 2))
    few = drives.few_labels()
    for axes, (title, endings) in zip(panels, _PANELS.items(), strict=True):
        of_panel = {"-": _whole(endings, few), "--": _frozen(endings)}
        counts = in_order({n for curves in of_panel.values() for curve in curves.values() for n in curve})
        places = {count: at for at, count in enumerate(counts)}
        for style, curves in of_panel.items():
            for key, curve in curves.items():
                _draw(axes, curve, places, style, key, len(endings))
        axes.set_xticks(list(places.values()), [words(count) for count in counts])
        axes.set_xlabel("labelled images of the target")
        axes.set_title(title, fontsize=10)
    bound = spread(cell.get("bound") for cell in few.get(0, {}).values())
    if bound is not None:
        panels[0].axhline(bound.mean, color="black", linestyle=":", linewidth=0.8)
        last = panels[0].get_xticks()[-1]
        panels[0].text(last, bound.mean, "oracle: all labels, no source", va="bottom", ha="right", fontsize=8)
    panels[0].set_ylabel("mIoU on images that no stage saw, %")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes: Any, curve: Curve, places: Mapping[int, int], style: str, key: str, pairs: int) -> None:
    for pair in dict.fromkeys(pair for scores in curve.values() for pair in scores):
        known = [(places[n], curve[n][pair]) for n in in_order(curve) if pair in curve[n]]
        axes.plot(*zip(*known, strict=True), style, color=_COLOURS[key], alpha=0.3, linewidth=0.8)
    whole = [(places[n], spread(curve[n].values())) for n in in_order(curve) if len(curve[n]) == pairs]
    means = [(at, found.mean) for at, found in whole if found is not None]
    if means:
        label = _WORDS[key] + (", frozen encoder" if style == "--" else "")
        axes.plot(*zip(*means, strict=True), f"o{style}", color=_COLOURS[key], markersize=4, label=label)


def _whole(endings: tuple[str, ...], few: Few) -> dict[str, Curve]:
    """Labels alone, and the lines of plans/drives.yaml, which are those of one panel."""
    heads = {"alone": labels_alone.read(), "picked": labels_alone.read(picked=True)}
    found: dict[str, Curve] = {
        key: labels_alone.by_count(line for line in lines if line["root"].endswith(endings))
        for key, lines in heads.items()
    }
    found |= {"control": {}, "adapted": {}}
    for count, of_drives in few.items():
        for drive, cell in of_drives.items():
            for key in ("control", "adapted"):
                score = cell.get(key)
                if score is not None and drive in endings:
                    found[key].setdefault(count, {})[drive] = score
    return found


def _frozen(endings: tuple[str, ...]) -> dict[str, Curve]:
    found: dict[str, Curve] = {"control": {}, "adapted": {}}
    for pair, counts in measure.by_labels().items():
        if pair.endswith(endings):
            for count, nets in counts.items():
                for key, score in nets.items():
                    found[key].setdefault(count, {})[pair] = score
    return found
