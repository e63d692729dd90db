"""How good a net is: one int64 confusion matrix, IoU by class from it, and what the net predicts how often."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data import ClassSet, Dataset, eval_batches
from ..data.classes import distinct
from ..errors import NumericError
from ..ops import upsampled_confusion, upsampled_prediction
from .windows import Windows, windowed_logits

Keep = Callable[[int, str, Callable[[], np.ndarray]], None]


class Predictor(Protocol):
    """What evaluation asks of a net, or of an exported one: images [B, 3, H, W] -> (anything, logits [B, K, h, w])."""

    stride: int
    training: bool

    def __call__(self, images: Tensor, /) -> tuple[Any, Tensor]: ...
    def eval(self) -> Any: ...
    def train(self, mode: bool = True, /) -> Any: ...


@dataclass(frozen=True)
class Scores:
    """confusion [K, K]: pixels by true (row) and predicted (column) class; unlabelled pixels are not counted."""

    classes: ClassSet
    confusion: np.ndarray

    @property
    def by_index(self) -> list[float | None]:
        """IoU in percent of each class; None where it is neither there nor predicted."""
        hit = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hit
        return [100 * float(h) / float(u) if u else None for h, u in zip(hit, union, strict=True)]

    @property
    def iou(self) -> dict[str, float | None]:
        """`by_index` by name."""
        return dict(zip(distinct(self.classes.names), self.by_index, strict=True))

    @property
    def miou(self) -> float | None:
        """Mean IoU in percent over the classes that occur or are predicted; None where no pixel is labelled."""
        return mean_iou(self.by_index)

    def as_json(self) -> dict[str, Any]:
        total = max(int(self.confusion.sum()), 1)
        names = distinct(self.classes.names)
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


@torch.no_grad()
def predict_logits(
    model: Predictor, images: Tensor, name: str, *, tta: str = "none", windows: Windows | None = None
) -> Tensor:
    """Low-resolution logits [B, K, h, w]; with tta="flip" the mean of those of the image (or window) and of its mirror image.

    Raises NumericError that names the image (`name`) where they are not finite: such a net predicts class 0 everywhere.
    """

    def net(seen: Tensor) -> Tensor:
        _, logits = model(seen)
        if tta == "flip":
            _, mirrored = model(seen.flip(3))
            logits = (logits + mirrored.flip(3)) / 2
        return logits

    logits = net(images) if windows is None else windowed_logits(net, images, windows, model.stride)
    if not logits.amax(1).isfinite().all():  # a class may be masked by -inf; all of them may not
        raise NumericError(
            f"The logits of the net are not finite on {name}, so it predicts nothing. "
            "Look at the image; if it is sound, the weights are not: train them again with a lower learning rate, or take others."
        )
    return logits


def label_map(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Class of every pixel of one image of (height, width), from its low-resolution logits [1, K, h, w]."""
    return upsampled_prediction(logits, size).labels[0].cpu().numpy()


@torch.no_grad()
def evaluate_model(
    model: Predictor,
    dataset: Dataset,
    size: tuple[int, int],
    *,
    device: torch.device | str = "cpu",
    tta: str = "none",
    windows: Windows | None = None,
    images: int | None = None,
    workers: int = 0,
    keep: Keep | None = None,
) -> Scores:
    """Predict every labelled image of `dataset`, seen at `size` (width, height), at its label's own size, and count.

    windows: the net sees the image in windows; None: whole. images: only so many, spread evenly.
    keep(index, name, predicted) is called for every image; predicted() makes its labels, [H, W]. The model's mode is put back.
    Raises NumericError that names the image where the net's output is not finite.
    Memory: the net's own, and the low-resolution logits; of the labels' size is a label map alone, where `predicted` is called.
    """
    dataset = dataset.spread(images)
    num_classes = len(dataset.classes)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    mode = model.training
    model.eval()
    try:
        for index, (image, label, name) in enumerate(eval_batches(dataset, size, workers=workers)):
            assert label is not None  # of a labelled data set
            logits = predict_logits(model, image.to(device), name, tta=tta, windows=windows)
            truth = torch.from_numpy(np.asarray(label))[None].to(device)
            if keep is not None:
                keep(index, name, functools.partial(label_map, logits, label.shape))
            confusion += upsampled_confusion(logits, truth, ignore_index=dataset.classes.ignore_index).cpu()
    finally:
        model.train(mode)
    return Scores(dataset.classes, confusion.numpy())
