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
from ..losses import protoseg


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
        batch, _, height, width = c.shape
        _c = F.normalize(self.feat_norm(c.movedim(1, -1).flatten(0, 2)), dim=-1)
        with torch.no_grad():
            self.prototypes.requires_grad_(False).copy_(F.normalize(self.prototypes, dim=-1))
        rows, scores = self.prototypes.detach().flatten(0, 1).clone(), None
        if 2 * len(rows) <= c.shape[1]:  # the map is smaller than the gradients that it spares
            scores = ops.prototype_logits(_c, rows, temperature=1.0, normalize=False)
            best = scores.view(len(_c), self.num_classes, -1).amax(2)
        else:
            best = protoseg.prototype_class_logits(_c, rows.view(self.prototypes.shape), normalize=False)
        out_seg = self.mask_norm(best).view(batch, height, width, -1).movedim(-1, 1)
        if pretrain_prototype or not self.use_prototype or gt_semantic_seg is None:
            return out_seg
        gt_seg = F.interpolate(gt_semantic_seg.float(), size=(height, width), mode="nearest").view(-1)
        target = self._learn(_c, rows, out_seg, gt_seg, scores)
        return {"seg": out_seg, "logits": RowLogits(_c, rows) if scores is None else scores, "target": target}

    def prototype_learning(
        self, _c: Tensor, out_seg: Tensor, gt_seg: Tensor, masks: Tensor | None = None
    ) -> tuple[RowLogits, Tensor]:
        """_c [N, D] of unit length, out_seg [B, K, h, w], gt_seg [N] -> RowLogits, rows [N] (a label that is no class is kept).

        masks is taken and not read: the scores against a pixel's own class are computed here.
        """
        rows = self.prototypes.detach().flatten(0, 1).clone()
        return RowLogits(_c, rows), self._learn(_c, rows, out_seg, gt_seg, None)

    @torch.no_grad()
    def _learn(self, _c: Tensor, rows: Tensor, out_seg: Tensor, gt_seg: Tensor, scores: Tensor | None) -> Tensor:
        """Assign, move the prototypes -> contrast_target [N]. scores [N, K M] where they are there."""
        labels = gt_seg.long()
        own = labels.masked_fill((labels < 0) | (labels >= self.num_classes), NONE).view(1, -1, 1)
        given = LabelledGrid(_c.detach().t()[None, :, :, None], own, (len(labels),))
        if scores is None:
            of_class = own_scores(given, ClassRows(rows), self.num_prototype, normalize=False)
        else:
            by_class = scores.detach().view(len(labels), self.num_classes, -1)
            chosen = own.view(-1, 1, 1).clamp_min(0).expand(-1, 1, by_class.shape[2])
            of_class = by_class.gather(1, chosen).permute(1, 2, 0)[..., None]
        found = balanced_assignment(of_class, own, self.num_classes)
        likeliest = found.rows()
        if self.update_prototype:
            moving = likeliest if self.assignment == "argmax" else found.rows(sampled_index(found.probabilities))
            self._move(given, rows, moving, out_seg)
        return torch.where(likeliest.flatten() != NONE, likeliest.flatten().to(gt_seg.dtype), gt_seg).float()

    def _move(self, given: LabelledGrid, old: Tensor, rows: Tensor, out_seg: Tensor) -> None:
        is_right = out_seg.argmax(1).view(rows.shape) == given.labels
        moments = ops.class_moments(
            given.features, rows.masked_fill(~is_right, NONE), len(old), normalize=False, ignore_index=NONE
        )
        moved = moved_rows(old, moments.sums, moments.counts, self.gamma)
        self.prototypes.copy_(moved.view(self.prototypes.shape))
