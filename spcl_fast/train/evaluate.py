"""How good a net is: one int64 confusion matrix, IoU by class from it, and what the net predicts how often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ClassSet, Dataset, eval_batches
from ..errors import NumericError
from ..models import SegmentationModel
from ..ops import Prediction, upsampled_prediction


@dataclass(frozen=True)
class Scores:
    """confusion [K, K]: pixels by true (row) and predicted (column) class; unlabelled pixels are not counted."""

    classes: ClassSet
    confusion: np.ndarray

    @property
    def iou(self) -> dict[str, float | None]:
        """In percent by class; None where the class is neither there nor predicted."""
        hit = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hit
        return {
            name: 100 * float(h) / float(u) if u else None
            for name, h, u in zip(self.classes.names, hit, union, strict=True)
        }

    @property
    def miou(self) -> float | None:
        """Mean IoU in percent over the classes that occur or are predicted; None where no pixel is labelled."""
        return mean_iou([*self.iou.values()])

    def as_json(self) -> dict[str, Any]:
        total = max(int(self.confusion.sum()), 1)
        names = self.classes.names
        return {
            "miou": self.miou,
            "iou": self.iou,
            "confusion": self.confusion.tolist(),
            "predicted_share": {n: float(v) / total for n, v in zip(names, self.confusion.sum(0), strict=True)},
            "true_share": {n: float(v) / total for n, v in zip(names, self.confusion.sum(1), strict=True)},
        }


def mean_iou(values: Sequence[float | None]) -> float | None:
    """Mean of the known ones; None where there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def mean_text(miou: float | None) -> str:
    """For a line of text."""
    return "no mIoU (no pixel is labelled)" if miou is None else f"{miou:.1f} mIoU"


def finite_labels(prediction: Prediction, name: str) -> Tensor:
    """The labels of one image. Raises NumericError where a confidence is NaN: such a net predicts class 0 everywhere."""
    if prediction.confidence.isnan().any():
        raise NumericError(
            f"The logits of the net are not finite on {name}, so it predicts nothing. "
            "Look at the image; if it is sound, the weights are not: train them again with a lower learning rate, or take others."
        )
    return prediction.labels[0].cpu()


@torch.no_grad()
def predict_logits(model: SegmentationModel, images: Tensor, tta: str = "none") -> Tensor:
    """Low-resolution logits [B, K, h, w]; with tta="flip" the mean of those of the image and of its mirror image."""
    _, logits = model(images)
    if tta == "flip":
        _, mirrored = model(images.flip(3))
        logits = (logits + mirrored.flip(3)) / 2
    return logits


@torch.no_grad()
def evaluate_model(
    model: SegmentationModel,
    dataset: Dataset,
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    tta: str = "none",
    images: int | None = None,
    workers: int = 0,
    keep: Callable[[int, str, np.ndarray], None] | None = None,
) -> Scores:
    """Predict every labelled image of `dataset`, seen at `size` (width, height), at its label's own size, and count.

    images: only so many, spread evenly. keep(index, name, labels uint8 [H, W]) gets every prediction. The model's mode is put back.
    Raises NumericError that names the image where the net's output is not finite.
    """
    dataset = dataset.spread(images)
    num_classes = len(dataset.classes)
    confusion = torch.zeros(num_classes**2, dtype=torch.int64)
    mode = model.training
    model.eval()
    try:
        for index, (image, label, name) in enumerate(eval_batches(dataset, size, workers=workers)):
            assert label is not None  # of a labelled data set
            height, width = label.shape
            logits = predict_logits(model, image.to(device), tta)
            predicted = finite_labels(upsampled_prediction(logits, (height, width)), name)
            if keep is not None:
                keep(index, name, predicted.numpy())
            truth = torch.from_numpy(np.asarray(label)).long()
            labelled = truth != dataset.classes.ignore_index
            pair = truth[labelled] * num_classes + predicted[labelled].long()
            confusion += torch.bincount(pair, minlength=num_classes**2)
    finally:
        model.train(mode)
    return Scores(dataset.classes, confusion.view(num_classes, num_classes).numpy())
