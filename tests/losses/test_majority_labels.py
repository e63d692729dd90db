"""majority_labels against counts over a one-hot map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spcl_fast.ops import majority_labels

K = 6


def plain(labels, scale, min_ratio, ignore_index=255):
    one_hot = F.one_hot(labels.long().where(labels != ignore_index, K), K + 1).permute(0, 3, 1, 2).float()
    share, found = F.avg_pool2d(one_hot, scale).max(1)
    return found.where((found != K) & (share >= min_ratio), ignore_index)


def labels(seed=0, ignore_index=255, blocks=7):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, K, (2, blocks, blocks + 2), generator=generator)
    fine = coarse.repeat_interleave(5, 1).repeat_interleave(5, 2)
    return fine.where(torch.rand(fine.shape, generator=generator) > 0.15, ignore_index)


@pytest.mark.parametrize("min_ratio", [0.0, 0.3, 0.5, 0.51, 0.75, 1.0])
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_cells_have_the_class_that_fills_them(scale, min_ratio):
    assert torch.equal(
        majority_labels(labels(), scale, num_classes=K, min_ratio=min_ratio), plain(labels(), scale, min_ratio)
    )


def test_of_equally_frequent_classes_the_lowest_wins_and_any_class_beats_the_ignored():
    cells = torch.tensor([[[3, 1, 255, 2], [1, 3, 2, 255]]])
    assert majority_labels(cells, 2, num_classes=K, min_ratio=0.5).tolist() == [[[1, 2]]]
    assert majority_labels(
        cells.where(cells != 255, -1), 2, num_classes=K, min_ratio=0.5, ignore_index=-1
    ).tolist() == [[[1, 2]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_any_integer_dtype_and_many_classes(dtype):
    found = majority_labels(labels().to(dtype), 4, num_classes=300 if dtype != torch.uint8 else K)
    assert found.dtype == torch.int64 and torch.equal(found, plain(labels(), 4, 0.75))


def test_a_label_that_is_none_is_an_error_that_names_its_pixel():
    bad = labels()
    bad[1, 3, 4] = K
    with pytest.raises(ValueError, match=rf"{K}.*\(1, 3, 4\)|\(1, 3, 4\).*{K}|image 1"):
        majority_labels(bad, 4, num_classes=K)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="scale must be an int of at least 1"):
        majority_labels(labels(), 0, num_classes=K)
    with pytest.raises(ValueError, match="must hold a cell of 64 x 64"):
        majority_labels(labels(), 64, num_classes=K)
    with pytest.raises(ValueError, match="min_ratio"):
        majority_labels(labels(), 2, num_classes=K, min_ratio=75)


def test_the_op_passes_its_checks():
    torch.library.opcheck(torch.ops.spcl_fast.majority_labels.default, (labels(), 4, K, 0.75, 255))
