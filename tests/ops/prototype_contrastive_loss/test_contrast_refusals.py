"""What prototype_contrastive_loss refuses, and with which text."""

from __future__ import annotations

import pytest
import torch
from problems import problem

import spcl_fast as sf


def test_a_second_derivative_is_refused_with_a_reason():
    features, labels, prototypes = problem((2, 16, 7, 9), size=(15, 23))[:3]
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
def test_arguments_that_do_not_fit_are_refused_by_name(change, error, text):
    features, labels, prototypes = problem((2, 16, 7, 9), size=(15, 23))[:3]
    arguments = {"features": features, "labels": labels, "prototypes": prototypes, "temperature": 1.0} | change
    with pytest.raises(error, match=text):
        sf.prototype_contrastive_loss(**arguments)


def test_environment_names_the_backend(monkeypatch):
    features, labels, prototypes = problem((2, 16, 7, 9), size=(15, 23))[:3]
    monkeypatch.setenv("SPCL_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' was asked for"):
        sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0)
    assert sf.prototype_contrastive_loss(features, labels, prototypes, temperature=1.0, backend="reference").isfinite()


_ROWS = {"prototypes": torch.ones(7, 16), "prototype_class": torch.tensor([0, 1, 2, 3, 4, 0, 4])}
_SOFT = {"labels": torch.ones(2, 5, 5, 7)}


@pytest.mark.parametrize(("change", "error", "text"), [
    (_SOFT | {"prototypes": torch.ones(5, 16), "prototype_class": torch.arange(5)}, ValueError,
     "probabilities as labels and prototype_class"),
    (_SOFT | {"margin": 0.2}, ValueError, "probabilities as labels and margin"),
    (_SOFT | {"positive_variance": False}, ValueError, "probabilities as labels and positive_variance=False"),
    (_SOFT | {"labels": torch.ones(2, 4, 5, 7)}, ValueError, r"must have shape \[2, 5, 5, 7\], got \[2, 4, 5, 7\]"),
    ({"labels": -torch.ones(2, 5, 5, 7)}, ValueError, r"probability -1.0 of class 0 at pixel \(image 0, row 0, column 0\)"),
    ({"labels": torch.ones(2, 5, 5, 7).fill_(torch.nan)}, ValueError, "probability nan of class 0"),
    ({"labels": torch.ones(2, 5, 5, 7).fill_(torch.inf)}, ValueError, "probability inf of class 0"),
    (_SOFT | {"labels": torch.ones(2, 5, 5, 7, requires_grad=True)}, ValueError, r"pass labels.detach\(\)"),
    ({"positive_variance": False, "label_smoothing": 0.1}, ValueError, "positive_variance=False and label_smoothing"),
    ({"positive_variance": False, "loss": "sigmoid"}, ValueError, "positive_variance=False and loss='sigmoid'"),
    (_ROWS | {"positive_variance": False}, ValueError, "positive_variance=False and prototype_class"),
    ({"positive_variance": False}, ValueError, "positive_variance=False and variances=None"),
    (_SOFT | {"ignore_index": 3}, ValueError, "probabilities as labels and ignore_index=3"),
    ({"labels": problem().teacher, "ignore_index": 0}, ValueError, "TeacherTargets and ignore_index=0"),
    ({"denominator": "all", "reduction": "sum"}, ValueError, "denominator=all and reduction='sum'"),
    ({"denominator": torch.tensor(1.0), "reduction": "none"}, ValueError, "denominator=a tensor and reduction='none'"),
    ({"denominator": "pixels"}, ValueError, "denominator must be 'labelled' or 'all', got 'pixels'"),
    ({"denominator": torch.ones(2)}, ValueError, r"denominator must be a tensor of shape \[\]"),
    ({"pool": "max"}, ValueError, "pool='max' needs prototype_class"),
    ({"num_classes": 7}, ValueError, "num_classes=7 needs prototype_class"),
    (_ROWS | {"num_classes": 4}, ValueError, "num_classes=4, but prototype_class goes up to 4"),
    (_ROWS | {"prototype_class": torch.zeros(6, dtype=torch.long)}, ValueError, "one class for each of the 7 rows"),
    (_ROWS | {"prototype_class": torch.arange(7) - 1}, ValueError, "at least 0, got -1"),
    (_ROWS | {"pool": "mean"}, ValueError, "pool must be 'logsumexp' or 'max', got 'mean'"),
    ({"loss": "hinge"}, ValueError, "loss must be 'softmax' or 'sigmoid', got 'hinge'"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"margin": float("inf")}, ValueError, "margin must be finite"),
    ({"bias": torch.ones(4)}, ValueError, "bias must have one value for each of the 5 rows"),
    ({"bias": torch.ones(3, 5)}, ValueError, "bias must hold one set for each of 2 images"),
    ({"prototypes": torch.ones(3, 5, 16)}, ValueError, "prototypes must hold one set for each of 2 images"),
    ({"temperature": torch.ones(1)}, TypeError, r"a floating-point tensor of shape \[\]"),
    ({"temperature": torch.tensor(1)}, TypeError, "torch.int64"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "finite and above 0, got -1.0"),
    ({"temperature": torch.tensor(0.0, requires_grad=True)}, ValueError, "finite and above 0, got 0.0"),
    ({"temperature": torch.tensor(float("nan"))}, ValueError, "finite and above 0, got nan"),
    ({"positive_variance": 1}, TypeError, "positive_variance must be True or False"),
    ({"features": torch.ones(6, 16), "labels": torch.zeros(6, dtype=torch.long), "prototypes": torch.ones(6, 5, 16)}, ValueError,
     r"features \[N, D\] cannot be used together"),
])  # fmt: skip
def test_options_that_mean_nothing_together_are_refused_by_name(change, error, text):
    p = problem()
    given = {
        "features": p.features,
        "labels": p.labels,
        "prototypes": p.prototypes,
        "temperature": 1.0,
    }
    with pytest.raises(error, match=text):
        sf.prototype_contrastive_loss(**given | change)


def test_probabilities_take_the_defaults_of_ignore_index_here_and_in_torch():
    p = problem()
    values = [
        sf.prototype_contrastive_loss(p.features, p.probabilities, p.prototypes, temperature=1.0, ignore_index=index)
        for index in (255, -100)
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize("soft", ["probabilities", "teacher"])
@pytest.mark.parametrize("classes_per_row", ["as many", "fewer"])
def test_soft_labels_of_pooled_rows_are_refused_by_name_whatever_their_number_of_classes(soft, classes_per_row):
    p = problem()
    words = "TeacherTargets" if soft == "teacher" else "probabilities as labels"
    of_row = torch.arange(5) if classes_per_row == "as many" else torch.tensor([0, 0, 1, 1, 2])
    with pytest.raises(ValueError, match=f"{words} and prototype_class cannot be used together"):
        sf.prototype_contrastive_loss(
            p.features, getattr(p, soft), p.prototypes, temperature=1.0, prototype_class=of_row
        )
