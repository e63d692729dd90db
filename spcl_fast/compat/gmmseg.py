"""The Gaussian mixture head of leonnnop/GMMSeg (arXiv 2210.02025) for a head of mmsegmentation that has the authors' attributes.

    from spcl_fast.compat.gmmseg import GMMSegForward

    class SegformerGMMSegHead(GMMSegForward, GMMSegHead):  # the rest of the authors' class as it is

Or, to change one import alone: `MultivariateNormalDiag` with a `log_prob` that never makes the [N, R, D] differences.

Quirks of the authors' code that are kept: the component contrast ignores target 255, so with more than 255 components (ADE20K: 750) the
pixels of component 255 do not count; densities are divided by the largest one of the class in absolute value before Sinkhorn; a class is
refitted from its memory even where none of its pixels was predicted right, and the memory starts as random directions.
Different: the densities of `forward` are `LogDensities`, computed inside the loss; a batch without a label gives 0 instead of NaN;
pixels that are not finite are left out; parameters are moved in place; torch.distributed need not be initialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..estimators.assignment import NONE, ClassRows, LabelledGrid, balanced_assignment
from ..estimators.mixture import component_assignment, fitted, gaussian_rows, moved_gaussians
from ..estimators.ring import enqueue_, over_ranks
from ..losses.gmmseg import gmm_class_logits

IGNORE = 255


class LogDensities(NamedTuple):
    """Log densities [N, K M] of components, not computed yet."""

    features: Tensor  # [N, D], of unit length
    rows: ClassRows

    def dense(self) -> Tensor:
        """The map itself, for code of your own that reads it."""
        prototypes, variances, bias = self.rows
        return ops.prototype_logits(
            self.features, prototypes, temperature=1.0, normalize=False, variances=variances, bias=bias
        )

    def cross_entropy(self, target: Tensor, ignore_index: int = IGNORE) -> Tensor:
        """F.cross_entropy(self.dense(), target, ignore_index=...)."""
        prototypes, variances, bias = self.rows
        return ops.prototype_contrastive_loss(
            self.features, target, prototypes, temperature=1.0, normalize=False, variances=variances, bias=bias,
            ignore_index=ignore_index,
        )  # fmt: skip


class GMMSegForward:
    """Mixed in before the authors' GMMSegHead, whose attributes it reads: means, diagonal, queue, queue_ptr, feat_norm, mask_norm, ..."""

    num_classes: int
    num_components: int
    max_sample_size: int
    update_GMM_interval: int
    gamma_mean: float
    gamma_cov: float
    means: nn.Parameter  # [K, M, D]
    diagonal: nn.Parameter  # [K, M, D], standard deviations
    queue: Tensor  # [K M, D, mem_size]
    queue_ptr: Tensor
    iteration_counter: Tensor
    feat_norm: nn.Module
    mask_norm: nn.Module
    base_feature_transform: Callable[..., Tensor]
    losses: Callable[..., dict[str, Tensor]]

    def forward(self, inputs, gt_semantic_seg: Tensor | None = None, train_cfg=None, test_cfg=None) -> Any:
        """-> class logits [B, K, h, w]; with gt_semantic_seg [B, 1, H, W] also LogDensities and the component of each pixel [N] float."""
        base_feature = self.base_feature_transform(inputs)
        batch, _, height, width = base_feature.shape
        _c = F.normalize(self.feat_norm(base_feature.movedim(1, -1).flatten(0, 2)), dim=-1)
        with torch.no_grad():
            self.means.copy_(F.normalize(self.means, dim=-1))
        best = gmm_class_logits(_c, self.means, self.diagonal, normalize=False)
        out_seg = self.mask_norm(best).view(batch, height, width, -1).movedim(-1, 1)
        if gt_semantic_seg is None:
            return out_seg
        gt_seg = F.interpolate(gt_semantic_seg.float(), size=(height, width), mode="nearest").view(-1)
        densities = LogDensities(_c, gaussian_rows(self.means, self.diagonal))
        return out_seg, densities, self._learn(densities, gt_seg, out_seg)

    def forward_train(self, inputs, img_metas, gt_semantic_seg: Tensor, train_cfg) -> dict[str, Tensor]:
        seg_logits, densities, contrast_target = self.forward(
            inputs, gt_semantic_seg=gt_semantic_seg, train_cfg=train_cfg
        )
        losses = self.losses(seg_logits, gt_semantic_seg)
        if train_cfg["contrast_loss"] is True:
            losses["loss_contrast"] = (
                densities.cross_entropy(contrast_target.long()) * train_cfg["contrast_loss_weight"]
            )
        self.iteration_counter += 1
        return losses

    @torch.no_grad()
    def _learn(self, densities: LogDensities, gt_seg: Tensor, out_seg: Tensor) -> Tensor:
        """The authors' online_contrast, memory update and EM step -> contrast_target [N] float."""
        labels = gt_seg.long()
        own = labels.masked_fill((labels < 0) | (labels >= self.num_classes), NONE).view(1, -1, 1)
        given = LabelledGrid(densities.features.detach().t()[None, :, :, None], own, (len(labels),))
        found = component_assignment(given, densities.rows, self.num_classes, self.num_components, normalize=False)
        rows = found.rows()
        is_right = out_seg.argmax(1).view(own.shape) == own
        counted = rows.masked_fill(~is_right, NONE)
        queue = self.queue.transpose(1, 2)  # the authors keep [K M, D, memory]
        samples = self.max_sample_size if self.max_sample_size != -1 else queue.shape[1]
        features, counted, present = (over_ranks(value) for value in (given.features, counted, own))
        enqueue_(queue, self.queue_ptr, features, counted, samples, normalize=False)
        if self.iteration_counter % self.update_GMM_interval == 0:  # waits for the device, as the authors' does
            self._refit(queue, present)
        is_unlabelled = (rows.flatten() == NONE) & (own.flatten() != NONE)  # not finite
        target = torch.where(own.flatten() != NONE, rows.flatten().to(gt_seg.dtype), gt_seg)
        return target.masked_fill(is_unlabelled, IGNORE).float()

    def _refit(self, queue: Tensor, labels: Tensor) -> None:
        is_there = torch.zeros(self.num_classes + 1, dtype=torch.bool, device=labels.device)
        is_there[labels.flatten().masked_fill(labels.flatten() == NONE, self.num_classes)] = True
        of_rows = is_there[:-1].repeat_interleave(self.num_components)
        means, scales = moved_gaussians(
            self.means.detach(), self.diagonal.detach(), fitted(queue), of_rows, (self.gamma_mean, self.gamma_cov)
        )
        self.means.copy_(means)
        self.diagonal.copy_(scales)


class MultivariateNormalDiag:
    """mmseg.utils.distributions.MultivariateNormalDiag(loc [R, D], scale_diag [R, D]): its log_prob, for values [N, 1, D].

    loc and scale_diag are constants; differentiable in the values. Memory: the result, where the authors' makes [N, R, D] several times.
    """

    def __init__(self, loc: Tensor, scale_diag: Tensor, validate_args: bool | None = None) -> None:
        if loc.dim() != 2 or loc.shape != scale_diag.shape:
            raise ValueError(
                f"MultivariateNormalDiag: loc and scale_diag must both be [R, D], got {list(loc.shape)} and {list(scale_diag.shape)}"
            )
        self.loc, self.scale_diag = loc, scale_diag

    mean = property(lambda self: self.loc)
    variance = property(lambda self: self.scale_diag.square())

    def log_prob(self, value: Tensor) -> Tensor:
        """value [N, 1, D] -> [N, R]."""
        if value.dim() != 3 or value.shape[1] != 1 or value.shape[2] != self.loc.shape[1]:
            raise ValueError(
                f"MultivariateNormalDiag: value must be [N, 1, {self.loc.shape[1]}], got {list(value.shape)}"
            )
        return LogDensities(value[:, 0], gaussian_rows(self.loc, self.scale_diag)).dense()


@torch.no_grad()
def distributed_sinkhorn_wograd(
    out: Tensor, sinkhorn_iterations: int = 3, epsilon: float = 0.05
) -> tuple[Tensor, Tensor]:
    """utils.GMMSeg.distributed_sinkhorn_wograd: out [n, M] of one class -> one-hot [n, M] float and index [n] of the likeliest column."""
    labels = torch.zeros(1, len(out), 1, dtype=torch.int64, device=out.device)
    found = balanced_assignment(out.t()[None, :, :, None], labels, 1, epsilon=epsilon, iterations=sinkhorn_iterations)
    index = found.probabilities.argmax(1).flatten()
    return F.one_hot(index, out.shape[1]).float(), index
