"""Signs of a collapse in what training logs. None needs a label of the target: said while a net trains, and again in the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import catalog

COLLAPSED = 0.8  # share of all pixels predicted as one class
ALL_KEPT = 0.95  # share of target pixels with a pseudo-label, where about half is asked for
ALIKE = 0.98  # cosine of two prototypes; those of healthy nets stay below 0.9


@dataclass(frozen=True)
class Sign:
    title: str
    text: str


def _unknown(name: str) -> None:
    return None


def signs(
    record: Mapping[str, Any],
    classes: Sequence[str],
    expected: Callable[[], Mapping[str, float]] = dict,
    setting: Callable[[str], Any] = _unknown,
) -> list[Sign]:
    """What a logged line of a stage shows; values of the wrong kind say nothing.

    expected: share of each class in the labels, asked for only where one class takes most of the pixels: where most are background, a
    net that says so is right.
    setting: value of a setting by its dotted name, None where it is not known: what is off is not to be lowered.
    """
    stage = str(record.get("stage"))
    share, nearest = (_by_class(record.get(name), classes) for name in ("predicted_share", "prototype_nearest"))
    found = (_one_class(stage, share, expected, setting), _alike(nearest), *_nothing_counts(stage, record))
    return [sign for sign in found if sign is not None]


def nearly_all_kept(stage: str, predicted: float, kept: float) -> Sign | None:
    """predicted, kept: pixels of the target's training images that a class was predicted for, and those whose label was kept."""
    if not predicted or kept / predicted <= ALL_KEPT:
        return None
    text = (
        f"{kept / predicted:.0%} of the pixels passed their threshold in {stage}. Thresholds that keep everything filter nothing: "
        "the net is over-confident, or pseudo_label.quantile is too low."
    )
    return Sign("Nearly every pixel got a pseudo-label", text)


def gain_note(summary: Mapping[str, Any]) -> str:
    """What a gain over the baseline is where no net was trained for as long without adaptation; else empty."""
    nets = {name for name, value in summary.items() if isinstance(value, dict) and "miou" in value}
    base = next((row for row in catalog.with_role("baseline") if row.net in nets), None)
    if base is None or not any(row.net in nets for row in catalog.with_role("result")):
        return ""
    absent = [row for row in catalog.with_role("matched") if row.net not in nets]
    return "".join(
        f"gain: over {base.title}, which was trained for less time; part of it may come from more training alone. "
        f"The {row.title} (spcl-fast {row.command} --run-folder RUN) shows how much.\n"
        for row in absent
    )


def _by_class(values: Any, classes: Sequence[str]) -> dict[str, float]:
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return {}
    return dict(zip(classes, values, strict=False))


def _one_class(
    stage: str,
    share: Mapping[str, float],
    expected: Callable[[], Mapping[str, float]],
    setting: Callable[[str], Any],
) -> Sign | None:
    most = max(share, key=share.__getitem__, default=None)
    if most is None or not share[most] > COLLAPSED:
        return None
    true = expected().get(most, 0.0)
    if share[most] <= (1 + true) / 2:  # halfway from the labels' share to all pixels
        return None
    text = f"{share[most]:.0%} of the target batch was predicted {most} in {stage}. A falling loss means nothing then. "
    return Sign("One class takes over during training", f"{text}{catalog.remedy(stage, setting)}.")


def _alike(nearest: Mapping[str, float]) -> Sign | None:
    alike = [name for name, cosine in nearest.items() if cosine > ALIKE]
    if not alike:
        return None
    text = (
        f"The prototypes of {', '.join(alike)} point where another class's does (cosine above {ALIKE}): the contrast cannot tell these "
        "classes apart. Train the source stage longer, raise adapt.keep, or merge the classes."
    )
    return Sign("Prototypes have become alike", text)


def _nothing_counts(stage: str, record: Mapping[str, Any]) -> Iterator[Sign]:
    """A stage that moves prototypes logs no contrastive loss of a domain where no pixel counts."""
    if "prototype_norm" not in record:
        return
    if "source_excess" not in record:
        text = (
            f"No pixel of the source labels was predicted right in {stage}, so the prototypes stand still and the contrastive loss of the "
            "source is 0. Look at the labels (spcl-fast check-data), or train the stage before it longer."
        )
        yield Sign("No source pixel counts in the contrastive loss", text)
    if "target_excess" not in record:
        text = (
            f"No target pixel of {stage} has a pseudo-label, so the contrastive loss of the target is 0. Look at the pseudo-labels that it "
            "started from, or lower pseudo_label.quantile."
        )
        yield Sign("No target pixel counts in the contrastive loss", text)
