"""PseudoLabelThresholds: the confidence that a pseudo-label of each class needs, from a stream of predictions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_BINS = 16384  # of a class at most: 256 KB
_COARSE = 512  # of them for what lies far from the quantile, on either side


class PseudoLabelThresholds(nn.Module):
    """threshold_k = min(cap, quantile of the confidences of the pixels predicted k); a class never predicted has `cap`.

    The quantile is an element of the data, `sorted(x)[round(quantile * len(x))]` (half to even, at most the last), as in the release,
    which stores every confidence: 18.7 GB for Cityscapes. Here a class is a histogram whose bins are single float32 values; when there
    are more than 16384 of them, those far from the quantile are joined into ranges. So the result is exact as long as the quantile has
    not wandered into a joined range (`exact()` tells), and off by less than that range's width otherwise. Under 5 MB for 19 classes,
    whatever the number of pixels. Source: arXiv 2111.12358; `core/utils/pseudo_label.py` of the released code.
    """

    def __init__(self, num_classes: int, *, quantile: float = 0.5, cap: float = 0.9) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"PseudoLabelThresholds: num_classes must be at least 1, got {num_classes}")
        if not 0 <= quantile <= 1:
            raise ValueError(f"PseudoLabelThresholds: quantile must be in [0, 1], got {quantile}")
        if not 0 < cap <= 1:
            raise ValueError(f"PseudoLabelThresholds: cap must be in (0, 1], got {cap}")
        self.num_classes = num_classes
        self.cap = cap
        self._classes = [_Histogram(quantile) for _ in range(num_classes)]

    @torch.no_grad()
    def update(self, prediction: tuple[Tensor, Tensor]) -> None:
        """prediction: integer labels and confidence, of one shape, as `upsampled_prediction` gives. Labels >= num_classes are left out.

        Raises ValueError for shapes that differ and for a confidence that is not a number.
        """
        labels, confidence = prediction
        if labels.shape != confidence.shape:
            raise ValueError(
                f"PseudoLabelThresholds: labels and confidence must have one shape, got {list(labels.shape)} and {list(confidence.shape)}"
            )
        values = confidence.detach().float().cpu().numpy().ravel()
        if np.isnan(values).any():
            raise ValueError("PseudoLabelThresholds: a confidence is NaN; the net's logits are not finite")
        values = np.minimum(values, np.float32(self.cap))  # above the cap they are all the same
        labels = labels.detach().cpu().numpy().ravel()
        for k in np.unique(labels):
            if 0 <= k < self.num_classes:
                self._classes[k].add(values[labels == k])

    def thresholds(self) -> Tensor:
        """[K] float32."""
        return torch.tensor([min(self.cap, histogram.value()) if histogram.total else self.cap for histogram in self._classes])

    def counts(self) -> Tensor:
        """[K] int64: pixels predicted as each class so far."""
        return torch.tensor([histogram.total for histogram in self._classes])

    def exact(self) -> Tensor:
        """[K] bool: whether the threshold is the exact element of the data."""
        return torch.tensor([histogram.is_exact() for histogram in self._classes])


class _Histogram:
    """Counts of disjoint ranges [lower, upper] in ascending order; a single value is a range of width 0."""

    def __init__(self, quantile: float) -> None:
        self.quantile = quantile
        self.lower = np.empty(0, np.float32)
        self.upper = np.empty(0, np.float32)
        self.counts = np.empty(0, np.int64)
        self.total = 0

    def add(self, values: np.ndarray) -> None:
        values, counts = np.unique(values, return_counts=True)
        self.total += int(counts.sum())
        home = np.searchsorted(self.lower, values, side="right") - 1
        known = (home >= 0) & (values <= self.upper[home]) if len(self.lower) else np.zeros(len(values), bool)
        np.add.at(self.counts, home[known], counts[known])
        self.lower = np.concatenate([self.lower, values[~known]])
        self.upper = np.concatenate([self.upper, values[~known]])
        self.counts = np.concatenate([self.counts, counts[~known]])
        order = np.argsort(self.lower, kind="stable")
        self.lower, self.upper, self.counts = self.lower[order], self.upper[order], self.counts[order]
        if len(self.lower) > _BINS:
            self._join_far()

    def _bin(self) -> int:
        rank = min(int(np.round(self.total * self.quantile)), self.total - 1)
        return int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))

    def _join_far(self) -> None:
        near = _BINS * 3 // 8  # values kept apart on either side of the quantile; a fifth of the room is free again
        centre = self._bin()
        start, stop = max(0, centre - near), centre + near
        edges = np.unique(
            np.concatenate([
                np.linspace(0, start, _COARSE + 1).astype(int)[:-1],
                np.arange(start, min(stop, len(self.lower))),
                np.linspace(stop, len(self.lower), _COARSE + 1).astype(int)[:-1] if stop < len(self.lower) else [],
            ]).astype(int)
        )  # fmt: skip
        self.counts = np.add.reduceat(self.counts, edges)
        self.lower = self.lower[edges]
        self.upper = self.upper[np.append(edges[1:], len(self.upper)) - 1]

    def is_exact(self) -> bool:
        return self.total == 0 or bool(self.lower[self._bin()] == self.upper[self._bin()])

    def value(self) -> float:
        """The quantile; the middle of its range where it is not known exactly."""
        at = self._bin()
        return float(self.lower[at]) if self.lower[at] == self.upper[at] else float((self.lower[at] + self.upper[at]) / 2)
