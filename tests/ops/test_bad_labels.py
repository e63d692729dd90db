"""A label that is no class, on the CPU: every op with labels names it and its pixel, whichever backend computes it."""

from __future__ import annotations

import pytest
import torch
from on_backends import ALL, ON_CPU, asked, usable

import spcl_fast as sf
from spcl_fast import backends, ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
# "cuda" has no CPU tensors, but in the emulator, which is to be as on a GPU
BACKENDS = ON_CPU + (("triton",) if backends.why_not("triton", asked("class_moments")) is None else ())

FEATURES, LOGITS, PROTOTYPES = torch.ones(2, 24, 6, 8), torch.ones(2, 5, 3, 4), torch.eye(5, 24)
OPS = {
    "prototype_contrastive_loss": lambda labels, **k: sf.prototype_contrastive_loss(
        FEATURES, labels, PROTOTYPES, temperature=1.0, **k
    ),
    "class_moments": lambda labels, **k: sf.class_moments(FEATURES, labels, 5, **k),
    "move_prototypes": lambda labels, **k: ops.move_prototypes_(PROTOTYPES.clone(), FEATURES, labels, keep=0.5, **k),
    "upsampled_cross_entropy": lambda labels, **k: sf.upsampled_cross_entropy(LOGITS, labels, **k),
    "upsampled_binary_cross_entropy": lambda labels, **k: sf.upsampled_binary_cross_entropy(LOGITS, labels, **k),
    "upsampled_confusion": lambda labels, **k: sf.upsampled_confusion(LOGITS, labels, **k),
}


def put(labels: torch.Tensor, value: int, *pixels: tuple[int, int, int]) -> None:
    bits = (
        labels.view(torch.int64) if labels.dtype == torch.uint64 else labels
    )  # torch takes no Python int beyond int64
    for pixel in pixels:
        bits[pixel] = value if value < 2**63 else value - 2**64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(5, torch.uint8), (-2, torch.int8), (2**40 + 1, torch.int64), (2**64 - 1, torch.uint64), (2**63, torch.uint64)],
)
def test_it_is_named_with_its_value_and_first_pixel(op, backend, value, dtype):
    labels = torch.zeros(2, 12, 16, dtype=dtype)
    put(labels, value, (1, 4, 6), (1, 10, 2))
    with pytest.raises(ValueError, match=rf"label {value} at pixel \(image 1, row 4, column 6\)"):
        OPS[op](labels, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_the_largest_uint64_is_not_an_ignore_index_of_minus_one(op, backend):
    labels = torch.zeros(2, 12, 16, dtype=torch.uint64)
    put(labels, 2**64 - 1, (1, 4, 6))
    with pytest.raises(ValueError, match=rf"label {2**64 - 1} at pixel \(image 1, row 4, column 6\)"):
        OPS[op](labels, backend=backend, ignore_index=-1)


@pytest.mark.parametrize("value", [2**64 - 1, 9])
def test_labels_that_are_compared_with_a_prediction_are_named_too(value):
    labels = torch.zeros(1, 3, 3, dtype=torch.uint64)
    put(labels, value, (0, 1, 2))
    with pytest.raises(ValueError, match=f"label {value} at pixel"):
        sf.agreement_labels(labels, torch.zeros(1, 3, 3, dtype=torch.long), num_classes=5)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in usable("upsampled_cross_entropy", among=ALL)])
@pytest.mark.parametrize("value", [-0.25, torch.nan, torch.inf])
def test_a_probability_that_is_none_is_named(backend, value):
    for loss, labels in (
        (OPS["upsampled_cross_entropy"], torch.full((2, 5, 3, 4), 0.2)),
        (OPS["prototype_contrastive_loss"], torch.full((2, 5, 6, 8), 0.2)),
    ):
        labels[1, 2, 2, 3] = value
        with pytest.raises(ValueError, match=rf"probability {value} of class 2 at pixel \(image 1, row 2, column 3\)"):
            loss(labels, backend=backend)
