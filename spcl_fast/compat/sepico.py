"""SePiCo's losses and estimator (BIT-DA/SePiCo), same names and signatures: change the import, keep the training script.

    from spcl_fast.compat.sepico import ContrastiveLoss, ProtoEstimator, contrast_preparations

Stands for mmseg/models/losses/contrastive_loss.py and mmseg/models/utils/proto_estimator.py. Different from them, everywhere:
* features are not normalised here, as in the authors' code, whose projection head has done it; pass unit features;
* a batch in which nothing is labelled gives 0 that is still connected to the features;
* assertions are ValueErrors that say what to do, and features need not require grad;
* everything stays on the device of the features: nothing calls `.cuda()`.
Registry: `LOSSES.register_module(force=True)(ContrastiveLoss)` after the import.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..estimators import MeanBank
from ..estimators import ProtoEstimator as Statistics
from ..losses import sepico
from ..ops import labels_on, majority_labels
from .mmseg import get_class_weight

_OVERRIDES = (None, "none", "mean", "sum")


def downscale_label_ratio(
    gt: Tensor, scale_factor: int, min_ratio: float, n_classes: int, ignore_index: int = 255
) -> Tensor:
    """gt [B, 1, H, W] -> [B, 1, H // scale_factor, W // scale_factor]: the class of most of each cell, else ignore_index."""
    if scale_factor < 1:
        raise ValueError(f"downscale_label_ratio: scale_factor must be at least 1, got {scale_factor}")
    if scale_factor == 1:
        return gt.clone()
    found = majority_labels(
        gt[:, 0], scale_factor, num_classes=n_classes, min_ratio=min_ratio, ignore_index=ignore_index
    )
    return found[:, None]


def contrast_preparations(
    feat: Tensor, mask: Tensor, use_avg_pool: bool, scale_min_ratio: float, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """feat [B, A, h, w], mask [B, 1, H, W] -> the labelled pixels' features [N, A] and labels [N].

    For scripts that call it themselves: it copies the features. The losses below and `ProtoEstimator.update_map` do without.
    """
    labels = _labels_of(feat, mask, use_avg_pool, scale_min_ratio, num_classes, ignore_index).flatten()
    labelled = labels != ignore_index
    return feat.permute(0, 2, 3, 1).reshape(-1, feat.shape[1])[labelled], labels[labelled]


def _labels_of(
    feat: Tensor, mask: Tensor, use_avg_pool: bool, min_ratio: float, num_classes: int, ignore: int
) -> Tensor:
    """[B, h, w]. The authors' scale is that of the widths."""
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ValueError(f"sepico: mask must be [B, 1, H, W], got shape {list(mask.shape)}")
    if mask.is_floating_point():
        mask = mask.long()
    if not use_avg_pool:
        return labels_on(mask[:, 0], feat.shape[2:]).long()
    scale = mask.shape[-1] // feat.shape[-1]
    labels = downscale_label_ratio(mask, scale, min_ratio, num_classes, ignore)[:, 0].long()
    if labels.shape[1:] != feat.shape[2:]:
        raise ValueError(
            f"sepico: labels {list(mask.shape[2:])} at 1/{scale} are {list(labels.shape[1:])}, the features {list(feat.shape[2:])}; "
            "pad the image to a multiple of the stride, or set use_avg_pool=False"
        )
    return labels


def proto_reg(
    feat: Tensor, mean: Tensor | None = None, contrast_temp: float = 100.0, contrast_norm: float | None = None, **kwargs
) -> Tensor:
    """feat [N, A] of labelled pixels, mean [C, A]: sum of the log softmax of the mean feature's scores, over contrast_norm."""
    mean = _needed("proto_reg", "mean", mean)
    if contrast_norm is None:
        raise ValueError("proto_reg: contrast_norm is missing; the loss itself passes num_classes * log(num_classes)")
    everything = torch.zeros(len(feat), dtype=torch.uint8, device=feat.device)
    found = sepico.proto_reg(feat, everything, mean, temperature=contrast_temp, normalize=False)
    return found * (sepico.reg_norm(len(mean)) / contrast_norm)


def proto_contrastive(
    feat: Any, mask: Tensor, mean: Any = None, index: int = -1, contrast_temp: float = 100.0, use_avg_pool: bool = True,
    scale_min_ratio: float = 0.75, num_classes: int = 19, weight: Tensor | None = None, class_weight: Tensor | None = None,
    reduction: str = "mean", avg_factor: float | None = None, reg_weight: float = 0, ignore_index: int = 255, **kwargs,
) -> Tensor:  # fmt: skip
    """ProtoCL. feat [B, A, h, w] (a list of them and index >= 0: its entry), mask [B, 1, H, W], mean [C, A].

    Quirks kept: "mean" divides by the number of labelled pixels whatever their class weights; `weight` and the result of
    reduction="none" are [N] of the labelled pixels alone; regularisation is added to the reduced loss.
    """
    feat, mean = _entry(feat, index), _entry(mean, index)
    mean = _needed("proto_contrastive", "mean", mean)
    labels = _labels_of(feat, mask, use_avg_pool, scale_min_ratio, num_classes, ignore_index)
    given = {"temperature": contrast_temp, "normalize": False, "ignore_index": ignore_index}
    loss = _reduced(
        lambda **options: sepico.proto_cl(feat, labels, mean, class_weight=class_weight, **given, **options),
        labels != ignore_index, weight, reduction, avg_factor,
    )  # fmt: skip
    return loss + reg_weight * sepico.proto_reg(feat, labels, mean, **given) if reg_weight > 0 else loss


def dist_contrastive(
    feat: Any, mask: Tensor, mean: Any = None, covariance: Any = None, ratio: float = 1.0, index: int = -1,
    contrast_temp: float = 100.0, use_avg_pool: bool = True, scale_min_ratio: float = 0.75, num_classes: int = 19,
    weight: Tensor | None = None, class_weight: Tensor | None = None, reduction: str = "mean", avg_factor: float | None = None,
    reg_weight: float = 0, ignore_index: int = 255, **kwargs,
) -> Tensor:  # fmt: skip
    """DistCL. As `proto_contrastive`, with covariance [C, A] (its diagonal). Quirk kept: class weights multiply the softmax part alone."""
    feat, mean, covariance = _entry(feat, index), _entry(mean, index), _entry(covariance, index)
    mean, covariance = _needed("dist_contrastive", "mean", mean), _needed("dist_contrastive", "covariance", covariance)
    labels = _labels_of(feat, mask, use_avg_pool, scale_min_ratio, num_classes, ignore_index)
    given = {"temperature": contrast_temp, "normalize": False, "ignore_index": ignore_index}
    more = {"ratio": ratio, "class_weight": class_weight}
    loss = _reduced(
        lambda **options: sepico.dist_cl(feat, labels, mean, covariance, **more, **given, **options),
        labels != ignore_index, weight, reduction, avg_factor,
    )  # fmt: skip
    return loss + reg_weight * sepico.proto_reg(feat, labels, mean, **given) if reg_weight > 0 else loss


def bank_contrastive(
    feat: Any, mask: Tensor, bank: Any = None, mean: Any = None, index: int = -1, contrast_temp: float = 100.0,
    use_avg_pool: bool = True, scale_min_ratio: float = 0.75, num_classes: int = 19, weight: Tensor | None = None,
    reduction: str = "mean", avg_factor: float | None = None, reg_weight: float = 0, ignore_index: int = 255, **kwargs,
) -> Tensor:  # fmt: skip
    """BankCL. bank: `ProtoEstimator.MemoryBank`, or one deque of [1, A] rows per class as the authors keep them.

    Quirks kept: class weights are taken and not used; `weight` and the result of reduction="none" are sorted by class. Different: any
    temperature is finite (the authors exponentiate similarities as they are).
    """
    feat, mean, bank = _entry(feat, index), _entry(mean, index), _entry(bank, index)
    if bank is None:
        raise ValueError("bank_contrastive: bank is missing; pass the estimator's MemoryBank")
    labels = _labels_of(feat, mask, use_avg_pool, scale_min_ratio, num_classes, ignore_index)
    given = {"temperature": contrast_temp, "normalize": False, "ignore_index": ignore_index}
    rows, is_there = _rows_of(bank, feat)
    loss = _reduced(
        lambda **options: sepico.bank_cl(feat, labels, rows, is_there, **given, **options),
        labels != ignore_index, weight, reduction, avg_factor, order=labels,
    )  # fmt: skip
    if reg_weight > 0:
        loss = loss + reg_weight * sepico.proto_reg(feat, labels, _needed("bank_contrastive", "mean", mean), **given)
    return loss


def _entry(values: Any, index: int) -> Any:
    return (
        values[index] if index >= 0 and values is not None and not isinstance(values, (Tensor, MemoryBank)) else values
    )


def _needed(where: str, name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"{where}: {name} is missing; pass that of the estimator")
    if value.requires_grad:
        raise ValueError(f"{where}: {name} requires grad, but is a constant of the loss; pass {name}.detach()")
    return value


def _reduced(
    loss: Any, labelled: Tensor, weight: Tensor | None, reduction: str, avg_factor: Any, order: Tensor | None = None
) -> Tensor:
    """mmseg's weight_reduce_loss over the labelled pixels: what is [N] there is a map here. order: labels by which [N] is sorted."""
    if avg_factor is not None and reduction == "sum":
        raise ValueError('sepico: avg_factor cannot be used with reduction="sum"')
    pixel_weight = None
    if weight is not None:
        pixel_weight = torch.zeros(labelled.shape, dtype=torch.float32, device=labelled.device)
        pixel_weight[labelled] = _sorted_back(weight.float(), labelled, order)
    if reduction == "none":
        found = loss(reduction="none", pixel_weight=pixel_weight)[labelled]
        return found if order is None else found[order[labelled].argsort(stable=True)]
    if reduction == "mean" and avg_factor is not None:
        return loss(reduction="sum", pixel_weight=pixel_weight) / avg_factor
    return loss(reduction=reduction, pixel_weight=pixel_weight)


def _sorted_back(weight: Tensor, labelled: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return weight
    found = torch.empty_like(weight)
    found[order[labelled].argsort(stable=True)] = weight
    return found


class ContrastiveLoss(nn.Module):
    """The module of the authors' auxiliary head, same arguments, defaults and return value.

    feat [B, A, h, w], mask [B, 1, H, W] integer labels, mean and covariance [C, A].
    forward(feat, mask, weight, avg_factor, reduction_override, **kwargs with mean, covariance, bank, ratio) -> loss_weight * loss; a list
    of feats gives the sum over its entries. Quirk kept: reg_relative_weight counts only with use_reg=True.
    """

    def __init__(
        self, use_dist: bool = False, use_bank: bool = False, use_reg: bool = False, use_avg_pool: bool = True,
        scale_min_ratio: float = 0.75, num_classes: int | None = None, contrast_temp: float = 100.0, reduction: str = "mean",
        class_weight: Any = None, loss_weight: Any = 1.0, reg_relative_weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_dist and use_bank:
            raise ValueError("ContrastiveLoss: use_dist and use_bank are two losses; set one of them")
        if num_classes is None:
            raise ValueError(
                "ContrastiveLoss: num_classes is missing; pass num_classes=19 (Cityscapes) or your number of classes"
            )
        self.use_dist, self.use_bank, self.use_reg = use_dist, use_bank, use_reg
        self.use_avg_pool, self.scale_min_ratio = use_avg_pool, scale_min_ratio
        self.contrast_temp, self.num_classes, self.reduction = contrast_temp, num_classes, reduction
        self.loss_weight, self.reg_weight = loss_weight, reg_relative_weight
        self.class_weight = get_class_weight(class_weight)
        self.contrast_criterion = dist_contrastive if use_dist else bank_contrastive if use_bank else proto_contrastive

    def forward(self, feat, mask, weight=None, avg_factor=None, reduction_override=None, **kwargs) -> Any:
        if reduction_override not in _OVERRIDES:
            raise ValueError(
                f"ContrastiveLoss: reduction_override must be one of {_OVERRIDES}, got {reduction_override!r}"
            )
        first = feat[0] if isinstance(feat, list) else feat
        class_weight = None if self.class_weight is None else first.new_tensor(self.class_weight, dtype=torch.float32)
        given = {
            "weight": weight, "contrast_temp": self.contrast_temp, "use_avg_pool": self.use_avg_pool,
            "scale_min_ratio": self.scale_min_ratio, "num_classes": self.num_classes, "class_weight": class_weight,
            "reduction": reduction_override or self.reduction, "avg_factor": avg_factor,
            "reg_weight": self.reg_weight if self.use_reg else 0, **kwargs,
        }  # fmt: skip
        if not isinstance(feat, list):
            return self.loss_weight * self.contrast_criterion(feat, mask, **given)
        if not isinstance(self.loss_weight, list):
            self.loss_weight = [self.loss_weight] * len(feat)
        losses = [
            scale * self.contrast_criterion(feat, mask, index=index, **given)
            for index, scale in enumerate(self.loss_weight[: len(feat)])
        ]
        return torch.stack(losses).sum(0)


class MemoryBank(Sequence):
    """`ProtoEstimator.MemoryBank`: indexed by class it is the authors' deque of rows [1, A]; the losses read the tensor behind it."""

    def __init__(self, rows: MeanBank) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.rows.shape[0]

    def __getitem__(self, index: int) -> deque:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not -len(self) <= index < len(self):
            raise IndexError(f"MemoryBank: there is no class {index} of {len(self)}")
        return deque(self.rows.of_class(index).split(1), maxlen=self.rows.rows.shape[1])

    def __iter__(self) -> Iterator[deque]:
        return (self[index] for index in range(len(self)))


def _rows_of(bank: Any, feat: Tensor) -> tuple[Tensor, Tensor]:
    """[C, M, A] and [C, M] bool, from our bank or from deques of rows."""
    if isinstance(bank, MemoryBank):
        return bank.rows.rows, bank.rows.is_there()
    classes = [torch.cat(list(rows), 0) for rows in bank]
    longest = max(len(rows) for rows in classes)
    padded = torch.zeros(len(classes), longest, classes[0].shape[1], dtype=classes[0].dtype, device=feat.device)
    for index, rows in enumerate(classes):
        padded[index, : len(rows)] = rows
    lengths = torch.tensor([len(rows) for rows in classes], device=feat.device)
    return padded, torch.arange(longest, device=feat.device) < lengths[:, None]


class ProtoEstimator:
    """Cumulative mean `Ave`, diagonal covariance `CoVariance` [C, A] and pixel count `Amount` [C] of each class, and the `MemoryBank`.

    Quirks kept: the bank starts with one row of zeros per class, which negatives and positives see until `memory_length` rows have
    pushed it out; memory_length=0 is an empty bank. Different: statistics are float64 inside, so they go on moving after 10^7 pixels
    (a float32 `Amount` stops at 1.7e7); `resume` starts a bank from the resumed means, where the authors' estimator has none and fails
    at its first update; `device` (None: CUDA where there is one, as the authors').
    Memory: [C, A] sums. The authors' update makes three tensors [N, C, A]: 2.2 GB each for 14 400 pixels, 19 classes, 2048 channels.
    """

    def __init__(
        self, dim: int, class_num: int, memory_length: int = 100, resume: str = "", *, device: Any = None
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dim, self.class_num = dim, class_num
        self._statistics = Statistics(class_num, dim, normalize=False).to(device)
        self._bank = MeanBank(class_num, dim, memory_length, normalize=False).to(device) if memory_length else None
        if resume:
            saved = torch.load(resume, map_location=device, weights_only=True)
            self._statistics.load_(saved["Ave"], saved["CoVariance"], saved["Amount"])
        if self._bank is not None:
            self._bank.load_(self._statistics.prototypes)
        self.MemoryBank: Any = [deque(maxlen=0)] * class_num if self._bank is None else MemoryBank(self._bank)

    @property
    def Ave(self) -> Tensor:
        return self._statistics.prototypes

    @property
    def CoVariance(self) -> Tensor:
        return self._statistics.variances

    @property
    def Amount(self) -> Tensor:
        return self._statistics.amount.float()

    def update_proto(self, features: Tensor, labels: Tensor) -> None:
        """features [N, A] and labels [N] of labelled pixels, as `contrast_preparations` gives; 255 is ignored, which theirs does not."""
        self.update_map(features, labels.view(-1))

    def update_map(self, features: Tensor, labels: Tensor) -> None:
        """features [B, A, h, w] and labels [B, H, W] of any size, 255 ignored: the same without a copy of the features."""
        batch = self._statistics.moments(features, labels)
        self._statistics.merge_(batch)
        if self._bank is not None:
            self._bank.append_(batch.sums, batch.counts)

    def save_proto(self, path: str) -> None:
        """A file that either estimator resumes from."""
        torch.save({"CoVariance": self.CoVariance.cpu(), "Ave": self.Ave.cpu(), "Amount": self.Amount.cpu()}, path)
