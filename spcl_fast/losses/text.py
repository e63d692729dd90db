"""TextHead: pixels against text embeddings, as DenseCLIP (arXiv 2112.01518) and tqdm (arXiv 2407.09033) segment."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


class TextHead(nn.Module):
    """score_k = cos(x, text_k);  loss = cross-entropy of the up-sampled score / temperature.

    forward(features [B, D, h, w], text [K, D] or of each image [B, K, D]) -> score [B, K, h, w] float32, without the temperature, as the
    authors concatenate it to their features. loss(score, labels [B, H, W], **options of upsampled_cross_entropy) -> [].
    Differentiable in features and text. Memory: the scores; neither normalised features nor up-sampled scores.

    Quirks of the authors' code, kept as defaults: the mean is over ALL pixels (denominator="all", mmsegmentation's), and the scores are
    up-sampled with align_corners=False.
    Source: arXiv 2112.01518, `DenseCLIP.after_extract_feat` and `_identity_head_forward_train` of raoyongming/DenseCLIP (temperature 0.07).
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        align_corners: bool = False,
        ignore_index: int = 255,
        denominator: str = "all",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"TextHead: temperature must be above 0, got {temperature}")
        self.temperature, self.align_corners, self.ignore_index = temperature, align_corners, ignore_index
        self.denominator, self.backend = denominator, backend

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        return ops.prototype_logits(features, F.normalize(text, dim=-1), temperature=1.0, backend=self.backend)

    def loss(self, score: Tensor, labels: Tensor, **options: Any) -> Tensor:
        settings = {
            "temperature": self.temperature, "align_corners": self.align_corners, "ignore_index": self.ignore_index,
            "denominator": self.denominator, "backend": self.backend,
        }  # fmt: skip
        return ops.upsampled_cross_entropy(score, labels, **settings | options)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, align_corners={self.align_corners}, denominator={self.denominator!r}"
