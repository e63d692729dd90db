"""Labels for the target's training images from a trained net: thresholds from one pass over the images, or two where the first leaves them
inexact; label PNGs from one more. Images of target.labelled keep the labels that they have.

With pseudo_label.rectify, labels made like this only serve to average the features of each class over the target; the distances of a
pixel's feature to these means are then taken off its logits (ProDA, arXiv 2101.10979, eq. 4 and 5, with means of the target alone), and
thresholds and labels are made of that. Two passes more.
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
from ..losses.proda import prototype_distances
from ..models import SegmentationModel
from ..ops import class_moments, upsampled_prediction
from ..runs import layout
from ..runs.signs import nearly_all_kept
from .context import Context
from .stage import TRAIN_AGAIN

_CACHED_LOGITS_BYTES = 512 << 20  # low-resolution logits kept between the two passes
LogitsByName = Callable[[], Iterator[tuple[str, Tensor]]]
Rectified = Callable[[Tensor, Tensor], Tensor]  # features [1, D, h, w], logits [1, K, h, w] -> other logits


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
        thresholds, applied = self._thresholds(context, estimate, estimate_size, start)
        rectified: Rectified | None = None
        if settings.rectify:
            means = _class_means(context, model, dataset, estimate_size, applied)
            rectified = functools.partial(_rectified, means=means, scale=settings.rectify)
            estimate = _logits_of(context, model, dataset, estimate_size, rectified)
            thresholds, applied = self._thresholds(context, estimate, estimate_size, start)
        apply = estimate if estimate_size == use_size else _logits_of(context, model, dataset, use_size, rectified)
        kept = self._write_labels(context, apply, applied, use_size)
        record = self._record(context, thresholds, applied, kept)
        context.run.write_json(layout.of_stage(self.name, layout.THRESHOLDS), record)

    def _thresholds(
        self, context: Context, estimate: LogitsByName, size: tuple[int, int], start: str | None
    ) -> tuple[PseudoLabelThresholds, Tensor]:
        """What was estimated, and the thresholds [K] to be used: those that are given where there are any."""
        settings = context.config.pseudo_label
        thresholds = PseudoLabelThresholds(len(context.classes), quantile=settings.quantile, cap=settings.cap)
        self._observe(thresholds, estimate, size, start)
        if not thresholds.exact().all():
            thresholds.second_pass()
            self._observe(thresholds, estimate, size, start)
        if self.may_be_given and settings.thresholds is not None:
            return thresholds, load_thres_const(settings.thresholds, len(context.classes))
        return thresholds, thresholds.thresholds()

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


@torch.no_grad()
def _class_means(
    context: Context, model: SegmentationModel, dataset: Dataset, size: tuple[int, int], thresholds: Tensor
) -> Tensor:
    """[K, D] float32: the mean feature of each class, by pseudo-labels and the labels of target.labelled; NaN of a class without."""
    classes, true = len(context.classes), _true_labels(context)
    sums = torch.zeros(classes, model.channels, dtype=torch.float64, device=context.device)
    counts = torch.zeros(classes, 1, dtype=torch.float64, device=context.device)
    for image, _, name in eval_batches(dataset, size, workers=context.config.loop.workers, labels=False):
        context.stop.raise_if_requested("averaging the features of the target")
        with context.precision.autocast():
            features, logits = model(image.to(context.device))
        if name in true:
            labels = torch.tensor(true[name](), device=context.device)[None]
        else:
            applied = thresholds.to(logits.device)
            labels = upsampled_prediction(logits.float(), (size[1], size[0]), thresholds=applied).labels
        moments = class_moments(features, labels, classes, normalize=False)
        sums += moments.sums
        counts += moments.counts[:, None]
    return (sums / counts).float()


def _rectified(features: Tensor, logits: Tensor, *, means: Tensor, scale: float) -> Tensor:
    """logits - scale * distance to each class's mean; a class without a mean is as far as the farthest."""
    known = means.isfinite().all(1)
    distances = prototype_distances(features.float(), means.nan_to_num())
    farthest = distances[:, known].amax(1, keepdim=True) if known.any() else torch.zeros_like(logits[:, :1])
    return logits - scale * torch.where(known[:, None, None], distances, farthest)


def _logits_of(
    context: Context,
    model: SegmentationModel,
    dataset: Dataset,
    size: tuple[int, int],
    rectified: Rectified | None = None,
) -> LogitsByName:
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
                features, logits = model(image.to(context.device))
            logits = logits.float() if rectified is None else rectified(features, logits.float())
            if logits.nbytes <= room:
                cached[name] = logits
                room -= logits.nbytes
            yield name, logits

    return logits_by_name
