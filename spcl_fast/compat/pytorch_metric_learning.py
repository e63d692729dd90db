"""Losses of pytorch-metric-learning that mean the same as an op here, same names, arguments, defaults and state: change the import.

    from spcl_fast.compat.pytorch_metric_learning import NormalizedSoftmaxLoss, CosFaceLoss, ProxyNCALoss, NTXentLoss

forward(embeddings [N, D], labels [N], indices_tuple=None, ref_emb=None, ref_labels=None) -> []. Each has its default distance and reducer
(the mean); miners' indices, other distances, reducers and regularisers are refused: use the library for them. `W` and `proxies` are its
parameters, so its state_dicts load. Different: no [N, classes] logits are kept; half embeddings give float32 losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..losses.pairs import pair_info_nce


class _Loss(nn.Module):
    """Takes what the library's losses take, and refuses, with the reason, what is not supported here."""

    takes_references = False

    def __init__(self, **others: Any) -> None:
        super().__init__()
        if others:
            raise ValueError(
                f"{type(self).__name__}: {', '.join(sorted(others))} is not taken here; use pytorch_metric_learning.losses for it"
            )

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Any = None, ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        name = type(self).__name__
        if labels is None or indices_tuple is not None:
            raise ValueError(
                f"{name}: needs labels and no indices_tuple; use pytorch_metric_learning.losses for mined pairs"
            )
        if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"{name}: embeddings must be [N, D] and labels [N], got {list(embeddings.shape)} and {list(labels.shape)}"
            )
        if ref_emb is not None and not self.takes_references:
            raise ValueError(f"{name}: ref_emb is not supported by this loss")
        return self.compute(embeddings, labels.to(embeddings.device), ref_emb, ref_labels)

    def compute(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> Tensor:
        raise NotImplementedError


class _Classes(_Loss):
    """Losses with a learnt row per class."""

    def __init__(
        self, num_classes: int, embedding_size: int, weight_init_func: Callable[[Tensor], Any] | None = None, **others: Any
    ) -> None:  # fmt: skip
        super().__init__(**others)
        self.num_classes = num_classes
        self._make(num_classes, embedding_size, weight_init_func or nn.init.normal_)

    def _make(self, num_classes: int, embedding_size: int, init: Callable[[Tensor], Any]) -> None:
        self.W = nn.Parameter(torch.empty(embedding_size, num_classes))
        init(self.W)

    def rows(self) -> Tensor:
        """[K, D] of unit length."""
        return F.normalize(self.W, dim=0).t()

    def settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def compute(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> Tensor:
        return ops.prototype_contrastive_loss(embeddings, labels, self.rows(), ignore_index=-100, **self.settings())

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """[N, K], without a margin."""
        temperature = self.settings()["temperature"]
        return ops.prototype_logits(embeddings, self.rows(), temperature=temperature)


class NormalizedSoftmaxLoss(_Classes):
    """-log softmax(cos(x, W_k) / temperature)_y, mean over the batch. Source: arXiv 1811.12649."""

    def __init__(self, num_classes: int, embedding_size: int, temperature: float = 0.05, **others: Any) -> None:
        super().__init__(num_classes, embedding_size, **others)
        self.temperature = temperature

    def settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature}


class CosFaceLoss(_Classes):
    """-log softmax(scale (cos(x, W_k) - margin [k = y]))_y, mean over the batch. Source: arXiv 1801.09414."""

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float = 64, **others: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **others)
        self.margin, self.scale = margin, scale

    def settings(self) -> dict[str, Any]:
        return {"temperature": 1 / self.scale, "margin": self.margin}


class ProxyNCALoss(_Classes):
    """-log softmax(-softmax_scale |u - proxy_k/|proxy_k||^2)_y, u = x/|x|: with unit lengths |u - p|^2 = 2 - 2 <u, p>.

    Quirk kept: the proxy of the label is in the denominator, as in the library and unlike the paper. Source: arXiv 1703.07464.
    """

    def __init__(self, num_classes: int, embedding_size: int, softmax_scale: float = 1, **others: Any) -> None:
        super().__init__(num_classes, embedding_size, **others)
        self.softmax_scale = softmax_scale

    def _make(self, num_classes: int, embedding_size: int, init: Callable[[Tensor], Any]) -> None:
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        init(self.proxies)

    def rows(self) -> Tensor:
        return F.normalize(self.proxies, dim=1)

    def settings(self) -> dict[str, Any]:
        return {"temperature": 1 / (2 * self.softmax_scale)}

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """[N, K]: squared distances, as the library's."""
        return 2 - 2 * ops.prototype_logits(embeddings, self.rows(), temperature=1.0)


class NTXentLoss(_Loss):
    """Mean over pairs of one label of -log(e^s / (e^s + sum over rows of other labels)), s = cos / temperature.

    With ref_emb and ref_labels the pairs are of a row of embeddings and one of ref_emb. Memory: 4 MB of similarities at a time; the library
    keeps a row of N for each pair. Source: arXiv 2002.05709; the library's form with labels.
    """

    takes_references = True

    def __init__(self, temperature: float = 0.07, **others: Any) -> None:
        super().__init__(**others)
        self.temperature = temperature

    def compute(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> Tensor:
        anchors = _unit(embeddings)
        if ref_emb is None or ref_labels is None:
            return pair_info_nce(anchors, labels, temperature=self.temperature)
        return pair_info_nce(
            anchors, labels, _unit(ref_emb), ref_labels.to(labels.device), temperature=self.temperature
        )


def _unit(embeddings: Tensor) -> Tensor:
    wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    return F.normalize(embeddings.to(wide), dim=1)
