"""The loss and the prototype learning of tfzhou/ProtoSeg (arXiv 2203.15102): the authors' names, signatures, defaults and return values.

    from spcl_fast.compat.protoseg import PixelPrototypeCELoss, PrototypeLearning

    class HRNet_W48_Proto(PrototypeLearning, nn.Module):  # and the end of its forward, from `_c = rearrange(...)` on, is
        return self.segment_by_prototypes(self.proj_head(c), gt_semantic_seg, pretrain_prototype)

Quirks of the authors' code that are kept: an update counts a pixel to a row that is SAMPLED from softmax(assignment probabilities), though
the losses use the likeliest row; Sinkhorn is per rank, whatever its name says; all labelled pixels get a row, only those that are
predicted right move a prototype.
Different: `logits` in what the net returns are `RowLogits`, computed inside the losses and never stored, unless 2 K M <= D, where the
map is smaller than a gradient of the features; a batch without a label gives 0
instead of NaN; the prototypes stay one parameter, moved in place, which never requires grad; the sample draws other random numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..estimators.assignment import NONE, ClassRows, LabelledGrid, balanced_assignment, own_scores
from ..estimators.clusters import moved_rows, sampled_index
from ..losses import layer_norm, protoseg


class RowLogits(NamedTuple):
    """features @ prototypes.T, [N, K M], not computed yet."""

    features: Tensor  # [N, D], of unit length
    prototypes: Tensor  # [K M, D]

    def dense(self) -> Tensor:
        """The map itself, for code of your own that reads it."""
        return self.features @ self.prototypes.t()


def _ignore_index(configer: Any) -> int:
    params = configer.get("loss", "params") if configer.exists("loss", "params") else {}
    return params.get("ce_ignore_index", -1)


class PPC(nn.Module):
    """loss_proto.PPC: cross-entropy over all rows, temperature 1.

    forward(contrast_logits [N, K M] or RowLogits, contrast_target [N]) -> [].
    """

    def __init__(self, configer) -> None:
        super().__init__()
        self.configer = configer
        self.ignore_label = _ignore_index(configer)

    def forward(self, contrast_logits: Tensor | RowLogits, contrast_target: Tensor) -> Tensor:
        target = contrast_target.long()
        if isinstance(contrast_logits, RowLogits):
            return protoseg.pixel_prototype_contrast(
                contrast_logits.features, target, contrast_logits.prototypes, normalize=False, ignore_index=self.ignore_label
            )  # fmt: skip
        total = F.cross_entropy(contrast_logits, target, ignore_index=self.ignore_label, reduction="sum")
        return total / (target != self.ignore_label).sum().clamp_min(1)


class PPD(nn.Module):
    """loss_proto.PPD: mean of (1 - logit of the own row)^2. forward as of `PPC`."""

    def __init__(self, configer) -> None:
        super().__init__()
        self.configer = configer
        self.ignore_label = _ignore_index(configer)

    def forward(self, contrast_logits: Tensor | RowLogits, contrast_target: Tensor) -> Tensor:
        target = contrast_target.long()
        if isinstance(contrast_logits, RowLogits):
            return protoseg.pixel_prototype_distance(
                contrast_logits.features, target, contrast_logits.prototypes, normalize=False, ignore_index=self.ignore_label
            )  # fmt: skip
        kept = target != self.ignore_label
        own = contrast_logits.gather(1, target.where(kept, 0)[:, None])[:, 0]
        return torch.where(kept, (1 - own).square(), 0).sum() / kept.sum().clamp_min(1)


class PixelPrototypeCELoss(nn.Module):
    """loss_proto.PixelPrototypeCELoss. forward(preds, target [B, H, W]) -> []: preds are logits [B, K, h, w], or the net's
    {"seg", "logits", "target"}. The cross-entropy of the up-sampled logits (align_corners=True, ce_weight) is one op.

    seg_criterion  where protoseg.use_rmi is set: the authors' FSAuxRMILoss(configer=configer), which is not part of this package.
    """

    ce_weight: Tensor | None

    def __init__(self, configer=None, seg_criterion: nn.Module | None = None) -> None:
        super().__init__()
        if configer is None:
            raise TypeError("PixelPrototypeCELoss: give the configer; it holds the losses' weights")
        self.configer = configer
        self.loss_ppc_weight = configer.get("protoseg", "loss_ppc_weight")
        self.loss_ppd_weight = configer.get("protoseg", "loss_ppd_weight")
        self.use_rmi = configer.get("protoseg", "use_rmi")
        if self.use_rmi and seg_criterion is None:
            raise ValueError(
                "PixelPrototypeCELoss: protoseg.use_rmi is set; pass seg_criterion=FSAuxRMILoss(configer=configer) of the authors' code"
            )
        self.seg_criterion = seg_criterion
        params = configer.get("loss", "params") if configer.exists("loss", "params") else {}
        weight = params.get("ce_weight")
        self.register_buffer("ce_weight", None if weight is None else torch.tensor(weight), persistent=False)
        self.ignore_index = _ignore_index(configer)
        self.ppc_criterion, self.ppd_criterion = PPC(configer), PPD(configer)

    def forward(self, preds: Tensor | dict[str, Any], target: Tensor) -> Tensor:
        if not isinstance(preds, dict):
            return self._segmentation(preds, target)
        contrast = preds["logits"], preds["target"]
        pull = self.loss_ppc_weight * self.ppc_criterion(*contrast) + self.loss_ppd_weight * self.ppd_criterion(
            *contrast
        )
        return self._segmentation(preds["seg"], target) + pull

    def _segmentation(self, seg: Tensor, target: Tensor) -> Tensor:
        if self.seg_criterion is not None:
            return self.seg_criterion(F.interpolate(seg, target.shape[1:], mode="bilinear", align_corners=True), target)
        return ops.upsampled_cross_entropy(
            seg, target, align_corners=True, ignore_index=self.ignore_index, class_weight=self.ce_weight
        )


@torch.no_grad()
def distributed_sinkhorn(out: Tensor, sinkhorn_iterations: int = 3, epsilon: float = 0.05) -> tuple[Tensor, Tensor]:
    """sinkhorn.distributed_sinkhorn: out [n, M] of one class -> sampled one-hot [n, M], likeliest column [n] int64. No rank is asked."""
    scores = out.detach().t()[None, :, :, None]
    labels = torch.zeros(1, len(out), 1, dtype=torch.int64, device=out.device)
    found = balanced_assignment(scores, labels, 1, epsilon=epsilon, iterations=sinkhorn_iterations).probabilities
    sampled = F.one_hot(sampled_index(found).flatten(), out.shape[1])
    return sampled.to(out.dtype), found.argmax(1).flatten()


class PrototypeLearning:
    """For a net that has the authors' attributes: prototypes [K, M, D], feat_norm, mask_norm, gamma, num_prototype, num_classes,
    use_prototype, update_prototype."""

    num_classes: int
    num_prototype: int
    gamma: float
    use_prototype: bool
    update_prototype: bool
    prototypes: nn.Parameter
    feat_norm: nn.Module
    mask_norm: nn.Module
    assignment: str = "gumbel"  # "argmax": the likeliest row moves, too, and nothing is drawn

    def segment_by_prototypes(
        self, c: Tensor, gt_semantic_seg: Tensor | None = None, pretrain_prototype: bool = False
    ) -> Tensor | dict[str, Any]:
        """What HRNet_W48_Proto.forward does with the projected features c [B, D, h, w]: class logits [B, K, h, w], and in training
        {"seg", "logits", "target"}. gt_semantic_seg [B, 1, H, W]."""
        batch, dim, height, width = c.shape
        with torch.no_grad():
            self.prototypes.requires_grad_(False).copy_(F.normalize(self.prototypes, dim=-1))
        rows = self.prototypes.detach().flatten(0, 1).clone()
        keeps_scores = 2 * len(rows) <= dim  # the map is smaller than the gradients that it spares
        if keeps_scores and layer_norm.is_plain(self.feat_norm, dim):
            pixels = _Normed(c, self.feat_norm, rows)
        else:
            _c = F.normalize(self.feat_norm(c.movedim(1, -1).flatten(0, 2)), dim=-1)
            pixels = _Unit(_c, rows, keeps_scores)
        best = pixels.best(self.num_classes)
        out_seg = self.mask_norm(best).view(batch, height, width, -1).movedim(-1, 1)
        if pretrain_prototype or not self.use_prototype or gt_semantic_seg is None:
            return out_seg
        gt_seg = F.interpolate(gt_semantic_seg.float(), size=(height, width), mode="nearest").view(-1)
        target = self._learn(pixels, out_seg, gt_seg)
        return {"seg": out_seg, "logits": pixels.logits(), "target": target}

    def prototype_learning(
        self, _c: Tensor, out_seg: Tensor, gt_seg: Tensor, masks: Tensor | None = None
    ) -> tuple[RowLogits, Tensor]:
        """_c [N, D] of unit length, out_seg [B, K, h, w], gt_seg [N] -> RowLogits, rows [N] (a label that is no class is kept).

        masks is taken and not read: the scores against a pixel's own class are computed here.
        """
        pixels = _Unit(_c, self.prototypes.detach().flatten(0, 1).clone(), keeps_scores=False)
        return pixels.row_logits(), self._learn(pixels, out_seg, gt_seg)

    @torch.no_grad()
    def _learn(self, pixels: _Unit | _Normed, out_seg: Tensor, gt_seg: Tensor) -> Tensor:
        """Assign, move the prototypes -> contrast_target [N]."""
        labels = gt_seg.long()
        own = labels.masked_fill((labels < 0) | (labels >= self.num_classes), NONE)
        found = balanced_assignment(pixels.own_scores(own, self.num_prototype), own.view(1, -1, 1), self.num_classes)
        likeliest = found.rows()
        if self.update_prototype:
            moving = likeliest if self.assignment == "argmax" else found.rows(sampled_index(found.probabilities))
            is_right = out_seg.argmax(1).flatten() == own
            moments = pixels.moments(moving.flatten().masked_fill(~is_right, NONE))
            moved = moved_rows(pixels.rows, moments.sums, moments.counts, self.gamma)
            self.prototypes.copy_(moved.view(self.prototypes.shape))
        return torch.where(likeliest.flatten() != NONE, likeliest.flatten().to(gt_seg.dtype), gt_seg).float()


class _Pixels:
    """What the head asks of its features, with rows [K M, D] as they are before they move."""

    rows: Tensor
    scores: Tensor | None  # [N, K M], where they are stored

    def logits(self) -> Tensor | RowLogits:
        assert self.scores is not None
        return self.scores

    def best(self, num_classes: int) -> Tensor:
        """[N, K]: the best row of each class."""
        assert self.scores is not None
        return self.scores.view(len(self.scores), num_classes, -1).amax(2)

    def own_scores(self, labels: Tensor, per_class: int) -> Tensor:
        """[1, M, N, 1]: against the rows of each pixel's class; labels [N], NONE where there is none."""
        assert self.scores is not None
        by_class = self.scores.detach().view(len(labels), -1, per_class)
        chosen = labels.clamp_min(0)[:, None, None].expand(-1, 1, per_class)
        return by_class.gather(1, chosen).permute(1, 2, 0)[..., None]


class _Normed(_Pixels):
    """Of a net whose feat_norm is a LayerNorm: neither its result nor the unit features are there."""

    def __init__(self, c: Tensor, norm: nn.LayerNorm, rows: Tensor) -> None:
        self.c, self.norm, self.rows = c, norm, rows
        self.scores = layer_norm.layer_normed_scores(c, norm, rows)

    def moments(self, labels: Tensor) -> ops.ClassMoments:
        """class_moments of the unit features; labels [N]."""
        batch, _, height, width = self.c.shape
        of_pixels = labels.view(batch, height, width)
        return layer_norm.layer_normed_moments(self.c.detach(), self.norm, of_pixels, len(self.rows))


class _Unit(_Pixels):
    """Of unit features [N, D]."""

    def __init__(self, features: Tensor, rows: Tensor, keeps_scores: bool) -> None:
        self.features, self.rows = features, rows
        self.scores = ops.prototype_logits(features, rows, temperature=1.0, normalize=False) if keeps_scores else None

    def logits(self) -> Tensor | RowLogits:
        return self.row_logits() if self.scores is None else self.scores

    def row_logits(self) -> RowLogits:
        return RowLogits(self.features, self.rows)

    def best(self, num_classes: int) -> Tensor:
        if self.scores is not None:
            return super().best(num_classes)
        prototypes = self.rows.view(num_classes, -1, self.rows.shape[1])
        return protoseg.prototype_class_logits(self.features, prototypes, normalize=False)

    def own_scores(self, labels: Tensor, per_class: int) -> Tensor:
        if self.scores is not None:
            return super().own_scores(labels, per_class)
        given = LabelledGrid(self.features.detach().t()[None, :, :, None], labels.view(1, -1, 1), (len(labels),))
        return own_scores(given, ClassRows(self.rows), per_class, normalize=False)

    def moments(self, labels: Tensor) -> ops.ClassMoments:
        return ops.class_moments(self.features.detach(), labels, len(self.rows), normalize=False, ignore_index=NONE)
