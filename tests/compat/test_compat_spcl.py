"""compat.spcl: what a script of the release can get wrong is named with the shape to use."""

from __future__ import annotations

import pytest
import torch

from spcl_fast.compat.spcl import PixelCLLoss


def test_masks_of_the_image_size_and_prototypes_the_other_way_round_are_refused_by_shape():
    prototypes, features, mask = torch.randn(8, 5), torch.randn(2, 8, 4, 6), torch.zeros(2, 4, 6, dtype=torch.long)
    assert PixelCLLoss()(prototypes, features, mask[:, None], features, mask.flatten()).isfinite()
    with pytest.raises(ValueError, match=r"one label per pixel of its features \[2, 8, 4, 6\], got \[2, 32, 48\]"):
        PixelCLLoss()(prototypes, features, mask, features, torch.zeros(2, 32, 48, dtype=torch.long))
    with pytest.raises(ValueError, match=r"semantic_prototype must be \[D, K\] = \[8, K\] .* got \[5, 8\]"):
        PixelCLLoss()(prototypes.t(), features, mask, features, mask)
