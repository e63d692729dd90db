"""PseudoLabelThresholds: the confidence that a pseudo-label of each class needs, from a stream of predictions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_BINS = 16384  # of a class: 256 KB; more than that are merged
_NEAR = 4096  # of them are kept apart on either side of the quantile
_CELL_BITS = 13  # values are merged only inside a cell: those whose float32 bits agree but for these, 1/1024 of their size at most


class PseudoLabelThresholds(nn.Module):
    """threshold_k = min(cap, quantile of the confidences of the pixels predicted k); a class never predicted has `cap`.

    The quantile is an element of the data, `sorted(x)[round(quantile * len(x))]` (half to even, at most the last), as in the release,
    which stores every confidence: 18.7 GB for Cityscapes. Here a class is a histogram whose bins are single float32 values; when there
    are more than 16384 of them, those far from the quantile are merged into cells of 1/1024 of their size. So the result is exact as long
    as the quantile has not moved into a merged cell (`exact()` reports it), and off by less than half a cell, 1/2048 of the threshold,
    otherwise. A second pass over the same predictions, after `second_pass()`, makes it exact. Under 5 MB for 19 classes, whatever the
    number of pixels. The state is in `state_dict`. Source: arXiv 2111.12358; `core/utils/pseudo_label.py` of the released code.
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
        if not isinstance(labels, Tensor) or not isinstance(confidence, Tensor):
            what = f"{type(labels).__name__} and {type(confidence).__name__}"
            raise TypeError(f"PseudoLabelThresholds: labels and confidence must be tensors, got {what}")
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
        return torch.tensor(
            [min(self.cap, histogram.value()) if histogram.total else self.cap for histogram in self._classes]
        )

    def counts(self) -> Tensor:
        """[K] int64: pixels predicted as each class so far."""
        return torch.tensor([histogram.total for histogram in self._classes])

    def exact(self) -> Tensor:
        """[K] bool: whether the threshold is the exact element of the data."""
        return torch.tensor([histogram.is_exact() for histogram in self._classes])

    def get_extra_state(self) -> dict[str, Tensor]:
        """In `state_dict`: the histograms of all classes, one after the other. Tensors, so that weights_only=True reads them."""
        return {
            "bins": torch.tensor([len(histogram.lower) for histogram in self._classes]),
            "total": torch.tensor([histogram.total for histogram in self._classes]),
            "lower": torch.from_numpy(np.concatenate([histogram.lower for histogram in self._classes])),
            "upper": torch.from_numpy(np.concatenate([histogram.upper for histogram in self._classes])),
            "counts": torch.from_numpy(np.concatenate([histogram.counts for histogram in self._classes])),
        }

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """What `get_extra_state` gave, for as many classes. Raises ValueError for another number of them."""
        if len(state["bins"]) != self.num_classes:
            raise ValueError(
                f"PseudoLabelThresholds: the state is that of {len(state['bins'])} classes, expected {self.num_classes}"
            )
        ends = np.cumsum(state["bins"].cpu().numpy())[:-1]
        parts = (np.split(state[name].cpu().numpy(), ends) for name in ("lower", "upper", "counts"))
        for histogram, total, lower, upper, counts in zip(self._classes, state["total"].tolist(), *parts, strict=True):
            histogram.total, histogram.lower, histogram.upper, histogram.counts = (
                total,
                lower.copy(),
                upper.copy(),
                counts.copy(),
            )

    def second_pass(self) -> None:
        """Forget the counts, but not where each quantile lies: `update` with the same predictions once more gives exact thresholds."""
        self._classes = [histogram.around_quantile() for histogram in self._classes]


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
        centre = self._bin()
        at = np.arange(len(self.lower))
        cell = self.lower.view(np.int32) >> _CELL_BITS  # the bits of positive floats are in their order
        starts = np.r_[True, cell[1:] != cell[:-1]] | (abs(at - centre) <= _NEAR) | (abs(at - 1 - centre) <= _NEAR)
        edges = np.flatnonzero(starts)
        self.counts = np.add.reduceat(self.counts, edges)
        self.lower = self.lower[edges]
        self.upper = self.upper[np.append(edges[1:], len(self.upper)) - 1]

    def around_quantile(self) -> _Histogram:
        """An empty one that keeps the values of the quantile's bin apart and everything below and above it together."""
        fresh = _Histogram(self.quantile)
        if self.total:
            at = self._bin()
            below, above = np.nextafter(self.lower[at], np.float32(-1)), np.nextafter(self.upper[at], np.float32(2))
            fresh.lower = np.array([-np.inf, above], np.float32)
            fresh.upper = np.array([below, np.inf], np.float32)
            fresh.counts = np.zeros(2, np.int64)
        return fresh

    def is_exact(self) -> bool:
        return self.total == 0 or bool(self.lower[self._bin()] == self.upper[self._bin()])

    def value(self) -> float:
        """The quantile; the middle of its range where it is not known exactly."""
        at = self._bin()
        return (
            float(self.lower[at]) if self.lower[at] == self.upper[at] else float((self.lower[at] + self.upper[at]) / 2)
        )
