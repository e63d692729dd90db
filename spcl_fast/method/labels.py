"""Counts the labels that a stage is about to learn from, says what is odd about them, and stops where nothing sensible can be learned."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import Dataset
from ..data.statistics import census
from ..errors import DataError
from .context import Context
from .stage import Feed

COUNTED_IMAGES = 1000  # at most so many labels are read, spread evenly


def check_own_labels(context: Context, stage: str, feed: Feed, dataset: Dataset) -> None:
    """A domain's own labels, once per run. Raises DataError for labels of one class, of none, or of ids that mean something else."""
    side, which = feed.side, (feed.side, feed.labels)
    if dataset.image_path(0) is None or which in context.labels_checked:
        return  # scenes made on the fly have the labels they are meant to have
    context.labels_checked.add(which)
    for finding in census(dataset, COUNTED_IMAGES).findings():
        where = f"the {side}'s labels ({dataset.kind}, split {dataset.split!r})"
        if finding.stops:
            raise DataError(
                f"{stage} was not started: in {where} {finding.text}. `spcl-fast check-data --side {side}"
                f"{' --labels' if side == 'target' else ''}` lists what is there."
            )
        context.run.say(f"warning: in {where} {finding.text}.")


def check_pseudo_labels(context: Context, stage: str, datasets: Sequence[Dataset], *, alone: bool) -> None:
    """alone: the stage learns from these labels and no others. Raises DataError where none of their pixels has a class then."""
    for dataset in datasets:
        found = census(dataset, COUNTED_IMAGES)
        met = found.pixels[: len(found.classes)] > 0
        if met.all():
            continue
        if alone and not met.any():
            raise DataError(
                f"{stage} was not started: no pixel of the {found.counted} pseudo-labels counted has a class. "
                "Lower pseudo_label.cap or pseudo_label.quantile, or look at the net that made them."
            )
        absent = ", ".join(name for name, there in zip(found.classes, met, strict=True) if not there)
        context.run.say(f"warning: {stage}: the {found.counted} pseudo-labels counted have no pixel of {absent}")
