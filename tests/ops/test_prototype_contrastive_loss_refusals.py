"""What prototype_contrastive_loss refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

import spcl_fast as sf


def problem():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 16, 7, 9, generator=generator)
    labels = torch.randint(0, 5, (2, 15, 23), generator=generator)
    return features, labels, torch.randn(5, 16, generator=generator)


def test_double_backward_is_refused_in_words():
    features, labels, prototypes = problem()
    features.requires_grad_()
    (grad,) = torch.autograd.grad(
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0), features, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"features": torch.zeros(16)},
            ValueError,
            r"features must be \[B, D, h, w\], \[N, D\], \[B, D, L\] or \[B, D, T, h, w\], got shape \[16\]",
        ),
        ({"features": torch.zeros(2, 16, 7, 9, dtype=torch.int32)}, TypeError, "features must be float32"),
        ({"labels": torch.zeros(2, 7, 9)}, TypeError, "labels must have an integer dtype, got torch.float32"),
        ({"features": torch.zeros(2, 16, 7)}, ValueError, "labels must be one dimension less than the features"),
        (
            {"labels": torch.zeros(2, 7, 9, dtype=torch.complex64)},
            TypeError,
            "labels must have an integer dtype, got torch.complex64",
        ),
        ({"labels": torch.zeros(3, 7, 9, dtype=torch.long)}, ValueError, "must agree in their first dimension"),
        ({"labels": torch.zeros(2, 63, dtype=torch.long)}, ValueError, r"labels must be \[B, H, W\]"),
        ({"prototypes": torch.zeros(16, 5)}, ValueError, "with the features' D"),
        ({"prototypes": torch.zeros(0, 16)}, ValueError, "at least one row"),
        ({"temperature": 0.0}, ValueError, "finite and above 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "finite and above 0"),
        ({"reduction": "avg"}, ValueError, "'mean', 'sum' or 'none', got 'avg'"),
        (
            {"class_weight": torch.ones(4)},
            ValueError,
            r"class_weight must have one weight per class, got shape \[4\], expected \[5\]",
        ),
        ({"pixel_weight": torch.ones(2, 7, 8)}, ValueError, "pixel_weight must have one weight per pixel"),
        ({"pixel_weight": torch.ones(2, 7, 9, requires_grad=True)}, ValueError, r"pass pixel_weight.detach\(\)"),
        ({"variances": torch.ones(5, 15)}, ValueError, "variances must have the prototypes' shape"),
        ({"ignore_index": 2.0}, TypeError, "ignore_index must be an int"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index must fit 64 bits"),
        ({"normalize": "yes"}, TypeError, "normalize must be True or False, got 'yes'"),
        (
            {"labels": torch.zeros(2, 7, 9, dtype=torch.long).to_sparse()},
            TypeError,
            "labels must be a dense tensor, got layout sparse_coo",
        ),
        ({"features": torch.zeros(2, 16, 7, 9).to_sparse()}, TypeError, "features must be a dense tensor"),
        ({"backend": 3}, TypeError, "backend must be a name or None, got int"),
        ({"backend": "cudnn"}, ValueError, "unknown backend 'cudnn'"),
        ({"backend": "cuda"}, RuntimeError, "'cuda' was asked for and cannot be used"),
        (
            {"labels": torch.zeros(2, 7, 9, dtype=torch.long, device="meta")},
            ValueError,
            "labels is on meta and features on cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change, error, text):
    features, labels, prototypes = problem()
    arguments = {"features": features, "labels": labels, "prototypes": prototypes, "temperature": 1.0} | change
    with pytest.raises(error, match=text):
        sf.prototype_contrastive_loss(**arguments)


def test_environment_names_the_backend(monkeypatch):
    features, labels, prototypes = problem()
    monkeypatch.setenv("SPCL_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' was asked for"):
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0)
    assert sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0, backend="reference").isfinite()
