"""LinearHead and CosineHead against BatchNorm, convolution, interpolation and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transcription import assert_equals

from spcl_fast.losses import CosineHead, LinearHead

B, D, K = 2, 6, 4


def features(seed=0, shift=0.5):
    return torch.randn(B, D, 5, 7, generator=torch.Generator().manual_seed(seed)) + shift


def labels():
    found = torch.randint(0, K, (B, 17, 19), generator=torch.Generator().manual_seed(1))
    found[:, :3] = 255
    return found


def seeded(head):
    """A head whose parameters and statistics are no special values."""
    generator = torch.Generator().manual_seed(2)
    for value in (*head.parameters(), *head.buffers()):
        if value.is_floating_point() and value.dim():
            value.data = torch.rand(value.shape, generator=generator) + 0.3
    return head


def called(head, x, parameters):
    return torch.func.functional_call(
        head.to(x.dtype), {name.replace("__", "."): p for name, p in parameters.items()}, (x,)
    )


def leaves_of(head):
    return {name.replace(".", "__"): p.detach() for name, p in head.named_parameters()}


def normed(x, parameters, head):
    """nn.BatchNorm2d in training, written out; statistics are left alone."""
    if head.bn is None:
        return x
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    if not head.training:
        mean, variance = (s.to(x.dtype)[:, None, None] for s in (head.bn.running_mean, head.bn.running_var))
    unit = (x - mean) / (variance + head.bn.eps).sqrt()
    return unit * parameters["bn__weight"][:, None, None] + parameters["bn__bias"][:, None, None]


def cross_entropy(logits):
    up = F.interpolate(logits, labels().shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(up, labels(), ignore_index=255)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_head_is_batch_norm_and_a_1x1_convolution(bias, batch_norm, training):
    head = seeded(LinearHead(D, K, bias=bias, batch_norm=batch_norm)).train(training)

    def plain(x, **p):
        return F.conv2d(normed(x, p, head), p["weight"][:, :, None, None], p.get("bias"))

    assert_equals(lambda x, **p: called(head, x, p), plain, x=features(), **leaves_of(head), slack=64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_a_cosine_head_is_scale_times_the_cosine(scale, batch_norm, training):
    head = seeded(CosineHead(D, K, scale=scale, batch_norm=batch_norm)).train(training)

    def plain(x, **p):
        unit = F.normalize(normed(x, p, head), dim=1)
        return p["log_scale"].exp() * torch.einsum("bdhw,kd->bkhw", unit, F.normalize(p["weight"], dim=1))

    assert head.log_scale.exp().item() == pytest.approx(scale)
    assert_equals(lambda x, **p: called(head, x, p), plain, x=features(), **leaves_of(head), slack=64)


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_the_loss_is_the_cross_entropy_of_the_up_sampled_logits(kind):
    head = seeded(kind(D, K, batch_norm=True))
    x = features()
    expected = cross_entropy(head(x))
    got = head.loss(x, labels(), align_corners=False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(expected, tuple(head.parameters()))
    for ours, true in zip(torch.autograd.grad(got, tuple(head.parameters())), theirs, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("rows", [True, False])
def test_the_running_statistics_are_those_of_batch_norm(momentum, rows):
    head, bn = LinearHead(D, K, batch_norm=True), nn.BatchNorm2d(D, momentum=momentum)
    head.bn.momentum = momentum
    for seed in range(3):
        x = features(seed)
        bn(x)
        head(x.movedim(1, -1).flatten(0, 2) if rows else x)
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(head.bn.state_dict()[name], value)


def test_frozen_features_keep_nothing_of_their_size_for_the_backward():
    saved = []
    head, x = LinearHead(64, 3, batch_norm=True), torch.randn(1, 64, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        head.loss(x, torch.randint(0, 3, (1, 32, 32))).backward()
    big = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert big <= {x.data_ptr()}


def test_weights_of_a_dinov2_head_load():
    norm, conv = nn.BatchNorm2d(D), nn.Conv2d(D, K, 1)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 1)
    head = LinearHead(D, K, batch_norm=True).eval()
    state = {f"bn.{name}": value for name, value in norm.state_dict().items()}
    head.load_state_dict(state | {"weight": conv.weight[:, :, 0, 0], "bias": conv.bias})
    torch.testing.assert_close(head(features()), conv(norm.eval()(features())), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused_with_the_expected_shape():
    with pytest.raises(
        ValueError, match=r"LinearHead: features must be \[B, 6, h, w\] or \[N, 6\], got shape \[2, 5, 3, 3\]"
    ):
        LinearHead(D, K)(torch.randn(2, 5, 3, 3))
    with pytest.raises(ValueError, match="CosineHead: scale must be a finite number above 0, got 0"):
        CosineHead(D, K, scale=0)
    with pytest.raises(ValueError, match="dim and num_classes must be at least 1, got 0 and 4"):
        LinearHead(0, K)
    with pytest.raises(ValueError, match="more than one pixel in training"):
        LinearHead(D, K, batch_norm=True)(torch.randn(1, D))
