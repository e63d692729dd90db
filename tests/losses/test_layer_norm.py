"""Scores of layer-normed unit features, block by block, next to the same with every map written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transcription import assert_equals

from spcl_fast.losses import layer_norm

B, D, H, W, R = 2, 6, 5, 7, 4


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normed(x, weight, bias):
    return F.normalize(F.layer_norm(x.movedim(1, -1).flatten(0, 2), (x.shape[1],), weight, bias, 1e-5), dim=1)


@pytest.mark.parametrize("block", [1, 2 * D * W, 1 << 19])
def test_scores_and_gradients_are_those_of_the_maps_written_out(block, monkeypatch):
    monkeypatch.setattr(layer_norm, "_BLOCK", block)
    rows = drawn(R, D, seed=1)

    def ours(x, weight, bias):
        norm = SimpleNamespace(weight=weight, bias=bias, eps=1e-5)
        return layer_norm.layer_normed_scores(x, norm, rows.to(x.dtype))

    leaves = {"x": 3 + 2 * drawn(B, D, H, W), "weight": 1 + drawn(D, seed=2) / 4, "bias": drawn(D, seed=3)}
    assert_equals(ours, lambda x, weight, bias: normed(x, weight, bias) @ rows.to(x.dtype).T, **leaves)


def test_features_that_lie_channels_last_give_the_same():
    norm, x, rows = nn.LayerNorm(D), drawn(B, D, H, W), drawn(R, D, seed=1)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        scores = layer_norm.layer_normed_scores(leaf, norm, rows)
        found.append((scores.detach(), *torch.autograd.grad(scores.square().sum(), (leaf, *norm.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_pixel_without_a_length_has_scores_of_0_and_a_finite_gradient():
    norm, x = nn.LayerNorm(D), drawn(1, D, 2, 2)
    x[:, :, 0, 0] = 5.0  # normed to 0; the bias is 0
    x.requires_grad_()
    scores = layer_norm.layer_normed_scores(x, norm, drawn(R, D, seed=1))
    assert not scores[0].any() and scores[1:].all()
    scores.sum().backward()
    assert x.grad.isfinite().all() and norm.weight.grad.isfinite().all()


@pytest.mark.parametrize("block", [1, 1 << 19])
def test_moments_are_sums_of_the_unit_features_of_each_label(block, monkeypatch):
    monkeypatch.setattr(layer_norm, "_BLOCK", block)
    norm, x = nn.LayerNorm(D), drawn(B, D, H, W)
    with torch.no_grad():
        norm.weight.mul_(1 + drawn(D, seed=2) / 4)
    labels = torch.randint(-1, R, (B, H, W), generator=torch.Generator().manual_seed(3))
    found = layer_norm.layer_normed_moments(x, norm, labels, R)
    unit, own = normed(x, norm.weight, norm.bias), labels.flatten()
    for label in range(R):
        torch.testing.assert_close(found.sums[label], unit[own == label].sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.counts, torch.bincount(own[own >= 0], minlength=R))


def test_half_features_get_half_gradients_of_scores_in_float32():
    x = drawn(B, D, H, W).half().requires_grad_()
    scores = layer_norm.layer_normed_scores(x, nn.LayerNorm(D), drawn(R, D, seed=1))
    scores.sum().backward()
    assert scores.dtype == torch.float32 and x.grad.dtype == torch.float16


def test_only_a_layer_norm_over_the_channels_is_stood_in_for():
    assert layer_norm.is_plain(nn.LayerNorm(D), D)
    other = type("Other", (nn.LayerNorm,), {})
    for norm in (nn.LayerNorm(D + 1), nn.LayerNorm(D, bias=False), nn.Identity(), other(D)):
        assert not layer_norm.is_plain(norm, D)
    assert not layer_norm.is_plain(nn.LayerNorm(D, elementwise_affine=False), D)
