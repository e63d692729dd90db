"""The losses and the memory of tfzhou/ContrastiveSeg (arXiv 2101.11939): the authors' names, signatures, defaults and return values.

    from spcl_fast.compat.contrastiveseg import ContrastAuxCELoss, ContrastCELoss, MemContrastCELoss  # in lib/loss/loss_manager.py

Anchors are drawn as in the authors' code, with the same calls of torch.randperm: the same seed gives the same anchors.

Quirks of the authors' code that are kept. With a memory: row number i of the memory is no positive of anchor number i, as if the anchors
were the rows; class 0 is left out of the memory, and as many rows of zeros with label 0 take part instead. In `_dequeue_and_enqueue`: class
0 is never written; the pixels that are written are drawn from the FIRST pixels of the map, whatever their label; the pointer moves on by
one where several are written. Labels are read at every network_stride-th pixel there.
Different: an anchor without a positive is left out of the mean, and a batch without a class that has enough pixels gives 0 (theirs: NaN
and an error); [anchors, rows] similarities are there block by block; where with_embed is False no anchor is drawn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..losses.info_nce import masked_info_nce


def _ignore_index(configer: Any) -> int:
    params = configer.get("loss", "params") if configer.exists("loss", "params") else {}
    return params.get("ce_ignore_index", -1)


class PixelContrastLoss(nn.Module):
    """loss_contrast.PixelContrastLoss and loss_contrast_mem.PixelContrastLoss.

    forward(feats [B, D, h, w], labels [B, H, W], predict [B, h, w], queue=None) -> []. queue [K, rows, D], unit rows: the contrast is
    against it; or a tuple of such queues, as if they were concatenated along their rows. None: against the anchors themselves.
    Memory: O(anchors D) and blocks of 16 MB.
    """

    def __init__(self, configer) -> None:
        super().__init__()
        self.configer = configer
        self.temperature = configer.get("contrast", "temperature")
        self.base_temperature = configer.get("contrast", "base_temperature")
        self.ignore_label = _ignore_index(configer)
        self.max_samples = configer.get("contrast", "max_samples")
        self.max_views = configer.get("contrast", "max_views")

    def forward(
        self, feats: Tensor, labels: Tensor | None = None, predict: Tensor | None = None, queue: Tensor | tuple[Tensor, ...] | None = None
    ) -> Tensor:  # fmt: skip
        assert labels is not None and predict is not None, "PixelContrastLoss: give labels and predict"
        on_grid = ops.labels_on(labels, feats.shape[2:]).long().flatten(1)
        image, pixel, classes, views = self._hard_anchors(on_grid, predict.flatten(1))
        if not len(classes):
            return feats.sum() * 0.0
        width = feats.shape[3]
        anchors = feats[image, :, pixel // width, pixel % width]  # views of a class lie `len(classes)` apart
        own = classes.repeat(views)
        numbers = torch.arange(len(own), device=own.device)
        rows, row_labels = (
            (anchors, own) if queue is None else _memory_rows(queue if isinstance(queue, tuple) else (queue,))
        )
        loss = masked_info_nce(anchors, own, rows, row_labels, temperature=self.temperature, excluded=numbers)
        return self.temperature / self.base_temperature * loss

    def _hard_anchors(self, labels: Tensor, predict: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """labels and predict [B, h w] -> image and pixel of each anchor [views classes], class of each group [classes], views."""
        kept = []
        for image, own in enumerate(labels):
            found, counts = own.unique(return_counts=True)
            kept += [
                (image, c)
                for c, n in zip(found.tolist(), counts.tolist(), strict=True)
                if c != self.ignore_label and n > self.max_views
            ]
        views = min(self.max_samples // len(kept), self.max_views) if kept else 0
        if not views:
            nothing = labels.new_empty(0)
            return nothing, nothing, nothing, 0
        chosen = [self._views_of(labels[image] == c, predict[image] == c, views) for image, c in kept]
        images = torch.tensor([image for image, _ in kept], device=labels.device)
        classes = torch.tensor([c for _, c in kept], device=labels.device)
        return images.repeat(views), torch.stack(chosen, 1).flatten(), classes, views

    @staticmethod
    def _views_of(is_class: Tensor, is_predicted: Tensor, views: int) -> Tensor:
        """Half of them pixels that are predicted wrong, as far as there are, then pixels that are predicted right; [views]."""
        hard, easy = (which.nonzero()[:, 0] for which in (is_class & ~is_predicted, is_class & is_predicted))
        many_hard, many_easy = len(hard) >= views / 2, len(easy) >= views / 2
        if many_hard and many_easy:
            keep_hard = views // 2
        else:
            keep_hard = views - len(easy) if many_hard else len(hard)
        hard = hard[torch.randperm(len(hard))[:keep_hard]]
        easy = easy[torch.randperm(len(easy))[: views - keep_hard]]
        return torch.cat([hard, easy])


def _memory_rows(queues: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The memory in the authors' order, without a copy: classes from 1 on, then rows of zeros for class 0."""
    first = queues[0]
    rows = [queue[c] for c in range(1, len(first)) for queue in queues]
    labels = [torch.full((queue.shape[1],), c, device=queue.device) for c in range(1, len(first)) for queue in queues]
    count = sum(queue.shape[1] for queue in queues)
    zeros = first.new_zeros(1, first.shape[2]).expand(count, -1)
    return [*rows, zeros], [
        *labels,
        labels[0].new_zeros(count) if labels else torch.zeros(count, dtype=torch.int64, device=first.device),
    ]


class _ContrastLoss(nn.Module):
    """The cross-entropy of up-sampled logits (align_corners=True, ce_weight), and loss_weight times the contrast."""

    ce_weight: Tensor | None
    names: tuple[str, ...] = ("use_rmi",)  # settings that ask for a segmentation loss of the authors

    def __init__(self, configer=None, seg_criterion: nn.Module | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if configer is None:
            raise TypeError(f"{name}: give the configer; it holds the loss's settings")
        self.configer = configer
        self.ignore_index = _ignore_index(configer)
        self.loss_weight = configer.get("contrast", "loss_weight")
        asked = [other for other in self.names if configer.get("contrast", other)]
        if asked and seg_criterion is None:
            raise ValueError(
                f"{name}: contrast.{asked[0]} is set; pass seg_criterion=, the authors' loss, which is not part of this package"
            )
        self.seg_criterion = seg_criterion
        params = configer.get("loss", "params") if configer.exists("loss", "params") else {}
        weight = params.get("ce_weight")
        self.register_buffer("ce_weight", None if weight is None else torch.tensor(weight), persistent=False)
        self.contrast_criterion = PixelContrastLoss(configer)

    def _cross_entropy(self, seg: Tensor, target: Tensor) -> Tensor:
        return ops.upsampled_cross_entropy(
            seg, target, align_corners=True, ignore_index=self.ignore_index, class_weight=self.ce_weight
        )

    def _segmentation(self, preds: dict[str, Tensor], target: Tensor, *names: str) -> Tensor:
        if self.seg_criterion is not None:
            up = [F.interpolate(preds[name], target.shape[1:], mode="bilinear", align_corners=True) for name in names]
            return self.seg_criterion(up if len(up) > 1 else up[0], target)
        if len(names) == 1:
            return self._cross_entropy(preds[names[0]], target)
        weights = self.configer.get("network", "loss_weights")
        aux, seg = (self._cross_entropy(preds[name], target) for name in names)
        return weights["seg_loss"] * seg + weights["aux_loss"] * aux

    def _with_contrast(
        self, loss: Tensor, preds: dict[str, Any], target: Tensor, with_embed: bool, queue=None
    ) -> Tensor:
        if with_embed is not True:
            return loss + 0 * preds["embed"].sum()  # the projection takes part in the graph of every rank
        return loss + self.loss_weight * self.contrast_criterion(preds["embed"], target, preds["seg"].argmax(1), queue)


class ContrastCELoss(_ContrastLoss):
    """loss_contrast.ContrastCELoss. forward(preds {"seg", "embed"}, target [B, H, W], with_embed=False) -> []."""

    def forward(self, preds: dict[str, Any], target: Tensor, with_embed: bool = False) -> Tensor:
        return self._with_contrast(self._segmentation(preds, target, "seg"), preds, target, with_embed)


class ContrastAuxCELoss(_ContrastLoss):
    """loss_contrast.ContrastAuxCELoss. forward(preds {"seg", "seg_aux", "embed"}, target, with_embed=False) -> []."""

    def forward(self, preds: dict[str, Any], target: Tensor, with_embed: bool = False) -> Tensor:
        return self._with_contrast(self._segmentation(preds, target, "seg_aux", "seg"), preds, target, with_embed)


class MemContrastCELoss(_ContrastLoss):
    """loss_contrast_mem.ContrastCELoss. forward(preds {"seg", "embed", "segment_queue", "pixel_queue"}, target, with_embed=False) -> [].

    Without both queues there is no contrast.
    """

    names = ("use_rmi", "use_lovasz")

    def forward(self, preds: dict[str, Any], target: Tensor, with_embed: bool = False) -> Tensor:
        loss = self._segmentation(preds, target, "seg")
        queues = preds.get("segment_queue"), preds.get("pixel_queue")
        if queues[0] is None or queues[1] is None:
            return loss
        return self._with_contrast(loss, preds, target, with_embed, queues)


class MemoryUpdate:
    """Mixed into the authors' Trainer: its `_dequeue_and_enqueue`. Reads network_stride, memory_size and pixel_update_freq."""

    network_stride: int
    memory_size: int
    pixel_update_freq: int

    @torch.no_grad()
    def _dequeue_and_enqueue(
        self, keys: Tensor, labels: Tensor, segment_queue: Tensor, segment_queue_ptr: Tensor, pixel_queue: Tensor,
        pixel_queue_ptr: Tensor,
    ) -> None:  # fmt: skip
        """keys [B, D, h, w], labels [B, H, W]; queues [K, memory_size, D] and pointers [K] are moved in place."""
        labels = labels[:, :: self.network_stride, :: self.network_stride]
        for values, own in zip(keys.flatten(2), labels.flatten(1), strict=True):
            for c in [c for c in own.unique().tolist() if c > 0]:
                pixels = (own == c).nonzero()[:, 0]
                at = int(segment_queue_ptr[c])
                segment_queue[c, at] = F.normalize(values[:, pixels].mean(1), dim=0)
                segment_queue_ptr[c] = (at + 1) % self.memory_size
                drawn = torch.randperm(len(pixels))[: self.pixel_update_freq]  # of the first pixels of the map
                rows, at = F.normalize(values[:, drawn].t(), dim=1), int(pixel_queue_ptr[c])
                if at + len(rows) >= self.memory_size:
                    pixel_queue[c, -len(rows) :] = rows
                    pixel_queue_ptr[c] = 0
                else:
                    pixel_queue[c, at : at + len(rows)] = rows
                    pixel_queue_ptr[c] = (at + 1) % self.memory_size
