"""CPSL (Li et al., arXiv 2203.09744): pixels labelled by optimal transport to prototypes with a known class distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import TeacherTargets, balance_, prototype_contrastive_loss
from .proda import cosine_weights, rectified_labels

__all__ = [
    "cosine_weights",
    "rectified_labels",
    "self_label_loss",
    "self_labels",
]  # rectification: as ProDA's, on cosines


def self_labels(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [K, D]
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    class_share: Tensor | None = None,  # [K], sums to 1
    queue: Tensor | None = None,  # [Q, D], unit features of earlier batches
    backend: str | None = None,
) -> TeacherTargets:
    """Soft labels q_nk = exp(cos(x_n, prototype_k) / epsilon + u_n + v_k): rows sum to 1, columns of batch and queue to (N + Q) share_k.

    features [N, D], prototypes [K, D], class_share [K] which sums to 1, queue [Q, D]: unit features of earlier batches.
    For `prototype_contrastive_loss`; computed where they are used. class_share None: uniform. Constants: no gradient.
    Raises ValueError or TypeError as `balance_`. Memory: O(N + Q + K) and the unit features; the authors' code has [N + Q, K] a few times.
    Source: CPSL, arXiv 2203.09744, class-balanced pixel-level self-labelling.
    """
    unit, rows = F.normalize(features.detach(), dim=1), F.normalize(prototypes.detach(), dim=1)
    seen = unit if queue is None else torch.cat([queue.detach().to(unit.dtype), unit])
    u, v = balance_(seen, rows, temperature=epsilon, iterations=iterations, class_share=class_share, backend=backend)
    return TeacherTargets(unit, rows, epsilon, u[len(seen) - len(unit) :], v)


def self_label_loss(
    features: Tensor,  # [N, D]
    prototypes: Tensor,  # [K, D], learnt
    targets: TeacherTargets,
    *,
    temperature: float = 0.08,
    backend: str | None = None,
) -> Tensor:  # []
    """mean over n of  -sum over k of q_nk log softmax(z)_nk,   z_nk = cos(x_n, prototype_k) / temperature.

    features [N, D], prototypes [K, D] -> [].
    Differentiable once, in `features` and `prototypes` (the authors' features come from the EMA teacher: pass them detached).
    `prototype_contrastive_loss`; raises and allocates as that. Source: CPSL, arXiv 2203.09744.
    """
    return prototype_contrastive_loss(
        features, targets, F.normalize(prototypes, dim=1), temperature=temperature, backend=backend
    )
