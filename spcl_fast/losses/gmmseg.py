"""GMMSeg (Liang et al., arXiv 2210.02025): pixels against M diagonal Gaussians per class.

    l_r = log N(u; mean_r, diag(scale_r^2)) = <u, mean_r/scale_r^2> - 1/2 <u^2, 1/scale_r^2> + b_r,  u = x/|x|,  r over K M rows
    class logit z_k = max_m l_km / temperature;  loss = mean over labelled pixels of -log softmax(z)[label]
    component contrast = mean over labelled pixels of -log softmax(l / temperature)[row],  row: `GaussianMixture.assign`

The authors train by the cross-entropy of LayerNorm(z) (over classes), plus 0.01 times the component contrast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..estimators.assignment import NONE, ClassRows, row_classes
from ..estimators.mixture import GaussianMixture, gaussian_rows


def gmm_class_logits(
    features: Tensor, means: Tensor, scales: Tensor, *, temperature: float = 1.0, normalize: bool = True
) -> Tensor:
    """z_k = max over m of log N(x/|x|; means_km, diag(scales_km^2)) / temperature. features [B, D, h, w] or [N, D];
    means and scales (standard deviations) [K, M, D], constants -> [B, K, h, w] or [N, K] float32.

    Differentiable in features. Memory: the logits; neither [N, K M] densities nor the authors' [N, K M, D] differences.
    Source: GMMSeg, arXiv 2210.02025; its code trains by the cross-entropy of LayerNorm(z) over classes.
    """
    return ops.prototype_logits(
        features, **_tempered(gaussian_rows(means, scales), temperature), normalize=normalize, **_pooled(means)
    )


def gmm_loss(
    features: Tensor, labels: Tensor, means: Tensor, scales: Tensor, *, temperature: float = 1.0, normalize: bool = True,
    ignore_index: int = 255,
) -> Tensor:  # fmt: skip
    """mean over labelled pixels of -log softmax(z)[label],  z = `gmm_class_logits`, whose arguments these are.

    labels [B, H, W] of any size or [N], classes -> []. Memory: 8 bytes per pixel and the gradient. Source: GMMSeg, arXiv 2210.02025.
    """
    rows = _tempered(gaussian_rows(means, scales), temperature)
    return ops.prototype_contrastive_loss(
        features, labels, **rows, normalize=normalize, ignore_index=ignore_index, **_pooled(means)
    )


def gmm_component_contrast(
    features: Tensor, row_labels: Tensor, means: Tensor, scales: Tensor, *, temperature: float = 1.0, normalize: bool = True,
    ignore_index: int = NONE,
) -> Tensor:  # fmt: skip
    """mean over labelled pixels of -log softmax(l / temperature)[row],  l the log densities of all K M components.

    row_labels [B, h, w] or [N]: rows k M + m as `GaussianMixture.assign` gives them, -1 where there is none -> [].
    Everything else as in `gmm_class_logits`. Source: GMMSeg, arXiv 2210.02025 (weight 0.01).
    """
    rows = _tempered(gaussian_rows(means, scales), temperature)
    return ops.prototype_contrastive_loss(features, row_labels, **rows, normalize=normalize, ignore_index=ignore_index)


def _tempered(rows: ClassRows, temperature: float) -> dict[str, Any]:
    """All of a log density is divided by the temperature; the ops divide the quadratic term by its square and the bias by nothing."""
    assert rows.variances is not None and rows.bias is not None
    return {
        "prototypes": rows.prototypes,
        "variances": rows.variances * temperature,
        "bias": rows.bias / temperature,
        "temperature": temperature,
    }


def _pooled(means: Tensor) -> dict[str, Any]:
    if means.dim() != 3:
        raise ValueError(
            f"means and scales must be [K, M, D], M components for each of K classes, got {list(means.shape)}"
        )
    num_classes, components, _ = means.shape
    return {
        "prototype_class": row_classes(num_classes, components, means),
        "num_classes": num_classes,
        "pool": "max",
    }


class GMMSegObjective(nn.Module):
    """gmm_loss of a domain's pixels against a mixture that is fitted to the source."""

    def __init__(self, mixture: GaussianMixture, temperature: float) -> None:
        super().__init__()
        self.mixture = mixture
        self.temperature = temperature

    @property
    def prototypes(self) -> Tensor:
        """[K, D]: the mean of each class's component means."""
        return self.mixture.means.mean(1)

    @property
    def chance(self) -> float:
        return math.log(len(self.mixture.means))

    def update_(self, features: Tensor, labels: Tensor) -> GMMSegObjective:
        self.mixture.update_(features, labels)
        return self

    def update_in_parts_(self, parts: Iterable[tuple[Tensor, Tensor]]) -> GMMSegObjective:
        """Part by part: each is a step of its own."""
        for features, labels in parts:
            self.update_(features, labels)
        return self

    def load_(self, prototypes: Tensor) -> GMMSegObjective:
        self.mixture.load_(prototypes)
        return self

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        mixture = self.mixture
        return gmm_loss(
            features, labels, mixture.means, mixture.scales, temperature=self.temperature, normalize=mixture.normalize
        )


def objective(num_classes: int, dim: int, settings: Any) -> GMMSegObjective:
    """settings: those of the stage `adapt`; `keep` is the share of the old mean and of the old scale. Without a memory."""
    mixture = GaussianMixture(num_classes, dim, keep=(settings.keep, settings.keep), normalize=settings.normalize)
    return GMMSegObjective(mixture, settings.contrast_temperature)
