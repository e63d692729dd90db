"""Labels at any size and of any integer dtype: the index rule, the range check, and the flag that a GPU sets instead of raising."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_NO_BAD_LABEL = torch.iinfo(torch.int64).min
BAD_PROBABILITY = torch.iinfo(torch.int64).max  # in the flag: a soft label that is negative, NaN or infinite
_HUGE_LABEL = BAD_PROBABILITY - 1  # in the flag: a uint64 label that int64 does not hold


def nearest_index(size: int, out: int, device: torch.device) -> Tensor:
    """[out] int64: the source index that F.interpolate(mode="nearest") reads for each output index; the same float32 arithmetic.

    Made on `device`: a copy from the host would wait for the GPU.
    """
    here = {"dtype": torch.float32, "device": device}
    scale = torch.full((), size, **here) / torch.full((), out, **here)
    return (torch.arange(out, **here) * scale).floor().long().clamp_(max=size - 1)


def resize_nearest(labels: Tensor, *size: int) -> Tensor:
    """[B, H, W] -> [B, *size] by the nearest rule, for any number of dimensions; the input itself where the sizes agree."""
    given = labels.shape[-len(size) :]
    if given == size:
        return labels
    index = [nearest_index(*pair, labels.device) for pair in zip(given, size, strict=True)]
    index = [axis.view(-1, *[1] * (len(size) - 1 - place)) for place, axis in enumerate(index)]
    return labels[(..., *index)]


def as_int64(labels: Tensor) -> Tensor:
    """Labels of any integer dtype; a uint64 one that int64 does not hold is no class and no ignore_index, so not the -1 of a cast."""
    if labels.dtype != torch.uint64:
        return labels.long()
    values = labels.view(torch.int64)
    return values.where(values >= 0, _HUGE_LABEL)


@functools.cache
def label_flag(device: torch.device) -> Tensor:
    """[] int64 on `device`: the largest bad label seen since the last `check_labels`, or the smallest int64."""
    return torch.full((), _NO_BAD_LABEL, dtype=torch.int64, device=device)


def check_range(
    labels: Tensor, num_classes: int, ignore_index: int, given: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which labels count, and on a GPU whether any is bad.

    labels: [B, H, W] int64; given: the labels that they were read from, of any size and dtype. Returns the mask of labelled pixels and,
    on a GPU, a [] bool tensor (the caller turns its loss into NaN). On the CPU a label outside [0, num_classes) that is not ignore_index
    raises ValueError with its value and first pixel.
    """
    labelled = labels != ignore_index
    bad = labelled & ((labels < 0) | (labels >= num_classes))
    if labels.device.type != "cpu":
        any_bad = bad.any()
        worst = torch.where(bad, labels, _NO_BAD_LABEL).amax() if labels.numel() else label_flag(labels.device)
        label_flag(labels.device).copy_(torch.maximum(label_flag(labels.device), worst))
        return labelled & ~bad, any_bad
    if bad.any():
        b, i, j = (int(v) for v in bad.nonzero()[0])
        given = labels if given is None else given
        rows, columns = (
            nearest_index(*pair, labels.device) for pair in zip(given.shape[1:], labels.shape[1:], strict=True)
        )
        pixel = (b, int(rows[i]), int(columns[j]))
        raise ValueError(bad_label_message(int(given[pixel].item()), pixel, num_classes, ignore_index))
    return labelled, None


def refuse_bad_labels(labels: object, grid: Sequence[int], num_classes: int, ignore_index: int) -> None:
    """What a kernel for GPUs that runs on the CPU does not see: ValueError for the first bad label or probability read on `grid`.

    Nothing on a GPU, where this would wait for it.
    """
    if not isinstance(labels, Tensor) or labels.device.type != "cpu":
        return
    if labels.is_floating_point():
        check_probabilities(labels)
    else:
        check_range(as_int64(resize_nearest(labels, *grid)), num_classes, ignore_index, labels)


def check_probabilities(probabilities: Tensor) -> Tensor | None:
    """probabilities [B, K, h, w], each finite and at least 0. On a GPU whether any is not, [] bool; on the CPU ValueError for the first."""
    bad = ~(probabilities >= 0) | probabilities.isinf()
    any_bad = bad.any()
    if probabilities.device.type != "cpu":
        flag = label_flag(probabilities.device)
        flag.copy_(torch.where(any_bad, BAD_PROBABILITY, flag))
        return any_bad
    if any_bad:
        b, i, j, k = (int(v) for v in bad.movedim(1, -1).nonzero()[0])
        raise ValueError(bad_probability_message(float(probabilities[b, k, i, j]), (b, i, j), k))
    return None


def bad_probability_message(value: float, pixel: tuple[int, int, int], k: int) -> str:
    """One wording for every backend."""
    return (
        f"probability {value} of class {k} at pixel (image {pixel[0]}, row {pixel[1]}, column {pixel[2]}) is not a finite number of at "
        "least 0; soft labels are probabilities, not logits"
    )


def bad_label_message(value: int, pixel: tuple[int, int, int], num_classes: int, ignore_index: int) -> str:
    """One wording for every backend."""
    return (
        f"label {value} at pixel (image {pixel[0]}, row {pixel[1]}, column {pixel[2]}) is outside [0, {num_classes}) and is not "
        f"ignore_index={ignore_index}; map unknown classes to ignore_index before the loss"
    )


def check_labels() -> None:
    """Raise ValueError if an op has met a bad label on a GPU since the last call. One host sync; call it where you log.

    On the CPU the ops raise by themselves.
    """
    if not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        flag = label_flag(torch.device("cuda", index))
        value = int(flag)
        if value != _NO_BAD_LABEL:
            flag.fill_(_NO_BAD_LABEL)
            if value == BAD_PROBABILITY:
                raise ValueError(
                    f"a soft label on cuda:{index} is negative, NaN or infinite: the loss of that step is NaN; give probabilities"
                )
            named = "of 2**63 or more" if value == _HUGE_LABEL else str(value)
            raise ValueError(
                f"label {named} on cuda:{index} is outside [0, num_classes) and is not ignore_index: the loss of that step is NaN; "
                "map unknown classes to ignore_index before the loss"
            )
