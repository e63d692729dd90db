"""compat.torch against torch's two calls."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from spcl_fast.compat.torch import CrossEntropyLossOfUpsampled, cross_entropy_of_upsampled

N, C = 2, 5
INPUT = torch.randn(N, C, 4, 6, generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(0, C, (N, 13, 17), generator=torch.Generator().manual_seed(1))
SOFT = torch.rand(N, C, 13, 17, generator=torch.Generator().manual_seed(2)).softmax(1)
WEIGHT = torch.rand(C, generator=torch.Generator().manual_seed(3)) + 0.1
IGNORED = TARGET.clone()
IGNORED[:, :4] = -100


def two_calls(input, target, size=None, align_corners=None, **options):
    size = target.shape[-2:] if size is None else size
    return F.cross_entropy(F.interpolate(input, size, mode="bilinear", align_corners=align_corners), target, **options)


@pytest.mark.parametrize("align_corners", [None, False, True])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        (TARGET, {}),
        (IGNORED, {}),
        (IGNORED, {"weight": WEIGHT, "label_smoothing": 0.2}),
        (IGNORED, {"weight": WEIGHT, "reduction": "none"}),
        (IGNORED, {"reduction": "sum"}),
        (TARGET, {"ignore_index": 3}),
        (SOFT, {}),
        (SOFT, {"weight": WEIGHT, "label_smoothing": 0.1}),
        (SOFT, {"reduction": "none"}),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_it_equals_the_two_calls(target, options, align_corners):
    found = []
    for function in (cross_entropy_of_upsampled, two_calls):
        x = INPUT.clone().requires_grad_()
        value = function(x, target, align_corners=align_corners, **options)
        value.backward(torch.linspace(1, 2, value.numel()).view(value.shape))
        found.append((value.detach(), x.grad))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2e-5, atol=1e-6)


def test_the_module_is_the_function_and_its_weight_moves_with_it():
    module = CrossEntropyLossOfUpsampled(WEIGHT, label_smoothing=0.1)
    torch.testing.assert_close(module(INPUT, IGNORED), two_calls(INPUT, IGNORED, weight=WEIGHT, label_smoothing=0.1))
    assert "weight" in dict(module.named_buffers())


def test_the_arguments_are_torchs():
    ours, torchs = (inspect.signature(f).parameters for f in (cross_entropy_of_upsampled, F.cross_entropy))
    for name in ("input", "target", "weight", "ignore_index", "reduction", "label_smoothing"):
        assert ours[name].default == torchs[name].default


def test_nothing_labelled_is_zero_and_a_size_that_the_target_has_not_is_named():
    assert cross_entropy_of_upsampled(INPUT, torch.full_like(TARGET, -100)) == 0
    with pytest.raises(ValueError, match=r"size \(3, 4\) is not that of the target, \[13, 17\]"):
        cross_entropy_of_upsampled(INPUT, TARGET, size=(3, 4))
