"""The C++ kernels of prototype_contrastive_loss where classes are streamed, and what they save for the backward."""

from __future__ import annotations

import oracle
import pytest
import torch
from on_backends import asked, run
from oracle import assert_as_accurate
from problems import CONTRAST, OPTIONS, named, problem

import spcl_fast as sf
from spcl_fast.backends import cpu
from spcl_fast.backends.contract import Contrast, Wanted

REASON = cpu.why_not(asked(CONTRAST))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ALL = Wanted(True, True, True, True)
STREAMED = (
    "bias, weights", "smoothing, bias, sum", "prototypes per image", "teacher, bias, weights", "margin, weights, temperature",
    "bias per image", "smoothing, map",
)  # fmt: skip


def as_contrast(given: dict) -> Contrast:
    """The struct that the op makes of these arguments."""
    labels = given["labels"].resolved() if isinstance(given["labels"], sf.TeacherTargets) else given["labels"]
    plain = {
        "class_weight": None,
        "pixel_weight": None,
        "variances": None,
        "normalize": True,
        "ignore_index": 255,
        "reduction": "mean",
    }
    return Contrast(**plain | given | {"labels": labels})


@pytest.mark.parametrize("size", [(2, 24, 7, 13, 5), (1, 160, 5, 13, 19)])
@pytest.mark.parametrize("name", ["plain", "bias, weights", "smoothing", "variances", "teacher", "sigmoid"])
def test_what_is_saved_is_what_saved_like_says(name, size):
    *shape, num_classes = size
    (case,) = named(OPTIONS, name)
    c = as_contrast(case.given(problem(shape, num_classes)))
    for wanted in (ALL._replace(bias=c.bias is not None), Wanted(features=True), Wanted()):
        _, saved = cpu.contrast_forward(c, wanted)
        if any(wanted):
            like = cpu.saved_like(c, wanted)
            assert saved.lse.dtype == like.lse and bool(saved.logits.numel()) == like.logits
        else:
            assert not saved.lse.numel() and not saved.logits.numel()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_classes_are_as_accurate_as_eager(name, reduction):
    (case,) = named(OPTIONS, name)
    p = problem((2, 70, 5, 14), 4100, temperature=0.1)
    given = case.given(p) | {"reduction": reduction}
    given["temperature"] = given["temperature"] if "temperature" in case.leaves else 0.1
    assert cpu.saved_like(as_contrast(given), ALL._replace(bias="bias" in given)).lse == torch.float64
    got = run(sf.prototype_contrastive_loss, given, case.leaves, "cpu")
    eager = run(oracle.contrast, given, case.leaves, dtype=torch.float32)
    truth = run(oracle.contrast, given, case.leaves, leaf_dtype=torch.float64)
    for leaf, g, e, t in zip(("loss", *case.leaves), got, eager, truth, strict=True):
        if leaf == "temperature":
            assert abs(g - t) <= 2e-5 * abs(t)
        else:
            assert_as_accurate(g, e, t)


def test_streaming_and_tiles_agree():
    p = problem((1, 40, 9, 20), 4096, temperature=0.07)
    given = {
        "features": p.features,
        "labels": p.labels,
        "prototypes": p.prototypes,
        "temperature": p.temperature,
        "bias": p.bias,
    }
    given |= {"class_weight": p.class_weight, "pixel_weight": p.pixel_weight}
    more = given | {  # one class more, of probability 0, and the classes are streamed
        "prototypes": torch.cat([p.prototypes, torch.zeros(1, 40)]), "bias": torch.cat([p.bias, torch.tensor([-torch.inf])]),
        "class_weight": torch.cat([p.class_weight, torch.zeros(1)]),
    }  # fmt: skip
    assert cpu.saved_like(as_contrast(more), ALL).lse != cpu.saved_like(as_contrast(given), ALL).lse
    leaves = ("features", "prototypes", "bias", "temperature")
    results = (run(sf.prototype_contrastive_loss, each, leaves, "cpu") for each in (given, more))
    for index, (tiled, streamed) in enumerate(zip(*results, strict=True)):
        streamed = streamed[:4096] if index in (2, 3) else streamed
        assert torch.allclose(tiled, streamed, rtol=1e-4, atol=1e-6 * tiled.abs().max().item())


def test_a_bad_label_is_reported_where_classes_are_streamed():
    p = problem((1, 8, 7, 13), 4200)
    p.labels[0, 2, 6] = 4200
    with pytest.raises(ValueError, match=r"label 4200 at pixel \(image 0, row 2, column 6\)"):
        sf.prototype_contrastive_loss(p.features, p.labels, p.prototypes, temperature=0.3, bias=p.bias, backend="cpu")
