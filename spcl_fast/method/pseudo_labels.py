"""Labels for the target's training images from a trained net: thresholds from one pass over the images, or two where the first leaves them
inexact; label PNGs from one more. Images of target.labelled keep the labels that they have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..compat.spcl import load_thres_const
from ..config import Config
from ..data import Dataset, eval_batches, with_pseudo_labels, write_label_png
from ..data.left_out import counted
from ..errors import NumericError
from ..estimators.thresholds import PseudoLabelThresholds
from ..models import SegmentationModel
from ..ops import upsampled_prediction
from ..runs import layout
from ..runs.signs import nearly_all_kept
from .context import Context
from .stage import TRAIN_AGAIN

_CACHED_LOGITS_BYTES = 512 << 20  # low-resolution logits kept between the two passes
LogitsByName = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class PseudoLabels:
    name: str
    may_be_given: bool = False  # by pseudo_label.folder and pseudo_label.thresholds

    def folder(self, config: Config) -> Path:
        """Where the labels are, for the stage that trains on them."""
        given = config.pseudo_label.folder if self.may_be_given else None
        return Path(given) if given is not None else layout.folder_of(config) / self.name

    def sees(self, config: Config) -> tuple[int, int]:
        return config.target.eval_size

    def write(self, context: Context, start: str | None) -> Mapping[str, Any]:
        settings, run = context.config.pseudo_label, context.run
        if self.may_be_given and settings.folder is not None:
            labelled = with_pseudo_labels(context.domains.unlabelled_target(), self.folder(context.config))
            run.say(f"{self.name}: {counted(len(labelled), 'label')} from {settings.folder}")
            return {}
        assert start is not None  # the catalog says from which stage
        model = context.model_of(start).eval()
        if distributed.is_main():
            self._label(context, model, start)
        return {}

    def _label(self, context: Context, model: SegmentationModel, start: str | None) -> None:
        settings, dataset = context.config.pseudo_label, context.domains.unlabelled_target()
        use_size = context.config.target.eval_size
        estimate_size = settings.estimate_size or use_size
        estimate = _logits_of(context, model, dataset, estimate_size)
        thresholds = PseudoLabelThresholds(len(context.classes), quantile=settings.quantile, cap=settings.cap)
        self._observe(thresholds, estimate, estimate_size, start)
        if not thresholds.exact().all():
            thresholds.second_pass()
            self._observe(thresholds, estimate, estimate_size, start)
        applied = thresholds.thresholds()
        if self.may_be_given and settings.thresholds is not None:
            applied = load_thres_const(settings.thresholds, len(applied))
        apply = estimate if estimate_size == use_size else _logits_of(context, model, dataset, use_size)
        kept = self._write_labels(context, apply, applied, use_size)
        record = self._record(context, thresholds, applied, kept)
        context.run.write_json(layout.of_stage(self.name, layout.THRESHOLDS), record)

    def _observe(
        self, thresholds: PseudoLabelThresholds, estimate: LogitsByName, size: tuple[int, int], start: str | None
    ) -> None:
        for name, logits in estimate():
            prediction = upsampled_prediction(logits, (size[1], size[0]))
            if prediction.confidence.isnan().any():
                raise NumericError(
                    f"{self.name}: the logits of the net of {start} are not finite on {name}. {TRAIN_AGAIN}"
                )
            thresholds.update(prediction)

    def _write_labels(self, context: Context, apply: LogitsByName, thresholds: Tensor, size: tuple[int, int]) -> Tensor:
        """-> kept pixels of each class [K]."""
        kept = torch.zeros(len(context.classes), dtype=torch.int64)
        true = _true_labels(context)
        for name, logits in apply():
            if name in true:
                labels = true[name]()
            else:
                shown = upsampled_prediction(logits, (size[1], size[0]), thresholds=thresholds.to(logits.device))
                labels = shown.labels[0].cpu().numpy()
                kept += torch.from_numpy(np.bincount(labels.ravel(), minlength=256))[: len(kept)]
            write_label_png(context.run.path(self.name, f"{name}.png"), labels, context.classes.palette)
        return kept

    def _record(self, context: Context, thresholds: PseudoLabelThresholds, applied: Tensor, kept: Tensor) -> dict:
        names, predicted = context.classes.names, thresholds.counts()
        sign = nearly_all_kept(self.name, int(predicted.sum()), int(kept.sum()))
        if sign is not None:
            context.run.say(f"warning: {sign.title}. {sign.text}")
        never = [name for name, count in zip(names, predicted.tolist(), strict=True) if not count]
        if never:
            context.run.say(f"pseudo-labels: never predicted on target: {', '.join(never)}")
        return {
            "thresholds": dict(zip(names, applied.tolist(), strict=True)),
            "predicted_pixels": dict(zip(names, predicted.tolist(), strict=True)),
            "kept_pixels": dict(zip(names, kept.tolist(), strict=True)),
            "exact": bool(thresholds.exact().all()),
        }


FIRST = PseudoLabels("pseudo_labels", may_be_given=True)  # for adaptation, from the net that it starts from
SECOND = PseudoLabels("pseudo_labels_2")  # for distillation, from the adapted net


def _true_labels(context: Context) -> dict[str, Callable[[], np.ndarray]]:
    """By name what reads the label of an image of target.labelled: a label that is known needs no prediction."""
    labelled = context.domains.labelled_target
    if labelled is None:
        return {}
    return {name: functools.partial(_label_of, labelled, index) for index, name in enumerate(labelled.names)}


def _label_of(dataset: Dataset, index: int) -> np.ndarray:
    label = dataset.load(index)[1]
    assert label is not None  # these images have labels
    return label


def _logits_of(context: Context, model: SegmentationModel, dataset: Dataset, size: tuple[int, int]) -> LogitsByName:
    """A function that yields (name, low-resolution logits) of every image; the second call computes only what did not fit into memory."""
    cached: dict[str, Tensor] = {}

    @torch.no_grad()
    def logits_by_name() -> Iterator[tuple[str, Tensor]]:
        missing = [i for i, name in enumerate(dataset.names) if name not in cached]
        yield from list(cached.items())
        room = _CACHED_LOGITS_BYTES - sum(logits.nbytes for logits in cached.values())
        for image, _, name in eval_batches(
            dataset.select(missing), size, workers=context.config.loop.workers, labels=False
        ):
            context.stop.raise_if_requested("predicting pseudo-labels")
            with context.precision.autocast():
                _, logits = model(image.to(context.device))
            logits = logits.float()
            if logits.nbytes <= room:
                cached[name] = logits
                room -= logits.nbytes
            yield name, logits

    return logits_by_name
