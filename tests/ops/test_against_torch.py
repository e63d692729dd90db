"""Where torch has the same loss, ours is that loss: its own sample inputs of cross_entropy, and linear_cross_entropy."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, run, usable

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
CROSS, CONTRAST = "upsampled_cross_entropy", "prototype_contrastive_loss"
REDUCTIONS = ("mean", "sum", "none")


class Sample(NamedTuple):
    name: str
    needs: tuple[str, ...]
    shape: tuple[int, ...]
    soft: bool
    kwargs: dict


def samples() -> list[Sample]:
    """Those of torch.testing._internal's sample_inputs_cross_entropy (whose import needs a package that users do not have) with each
    smoothing; [N, K] as [N, K, 1, 1], three dimensions of pixels as two."""
    shape = (2, 3, 1, 1)
    cases = [
        *((pixels, {}) for pixels in (shape, (2, 3, 1, 2), (2, 3, 2, 3))),
        *((shape, {"reduction": reduction}) for reduction in REDUCTIONS),
        *((shape, {"weight": True, "reduction": reduction}) for reduction in REDUCTIONS),
        (shape, {"ignore_index": 1}),
    ]
    chosen = []
    for (pixels, kwargs), soft, smoothing in itertools.product(cases, (False, True), (0.0, 0.1)):
        if soft and "ignore_index" in kwargs:
            continue  # not supported for probabilities
        needs = (*(("probabilities",) if soft else ()), *(("label_smoothing",) if smoothing else ()))
        name = f"{pixels}, {'probabilities' if soft else 'labels'}, {kwargs}, smoothing {smoothing}"
        chosen.append(Sample(name, needs, pixels, soft, kwargs | {"label_smoothing": smoothing}))
    return chosen


def given(sample: Sample):
    """What torch's function takes; make_tensor's values are uniform in [-9, 9], targets in [0, 1) without summing to 1."""
    make = torch.testing.make_tensor
    torch.manual_seed(0)
    kwargs = dict(sample.kwargs)
    weight = make((sample.shape[1],), dtype=torch.float32, device="cpu") if kwargs.pop("weight", False) else None
    values = make(sample.shape, dtype=torch.float32, device="cpu")
    target = make(sample.shape, low=0, high=1, dtype=torch.float32, device="cpu")
    if not sample.soft:
        target = make((sample.shape[0], *sample.shape[2:]), low=0, high=sample.shape[1], dtype=torch.long, device="cpu")
        if (target == kwargs.get("ignore_index", -100)).all():
            target[0] = 0
    return values, target, weight, kwargs


def torchs(logits, labels, class_weight=None, ignore_index=-100, **kwargs):
    target = labels.to(logits.dtype) if labels.is_floating_point() else labels
    weight = None if class_weight is None else class_weight.to(logits.dtype)
    kwargs |= {} if labels.is_floating_point() else {"ignore_index": ignore_index}
    return F.cross_entropy(logits, target, weight=weight, **kwargs)


def compare(ours, theirs, tensors: dict, leaves: list[str], backend: str, **kwargs) -> None:
    got = run(ours, tensors, leaves, backend, **kwargs)
    eager = run(theirs, tensors, leaves, **kwargs)
    truth = run(theirs, tensors, leaves, leaf_dtype=torch.float64, **kwargs)
    for g, e, t in zip(got, eager, truth, strict=True):
        # of one pixel p - 1 may cancel to almost nothing: its digits are those of 1, or of 1 / pixels
        whole = 1.0 if kwargs.get("reduction") in ("sum", "none") else 1.0 / len(tensors["labels"])
        oracle.assert_as_accurate(g, e, t, slack=16 * max(1.0, whole / t.abs().max().item()))


@pytest.mark.parametrize("backend", usable(CROSS, among=ALL))
def test_upsampled_cross_entropy_at_equal_size_is_cross_entropy_on_torchs_own_samples(backend):
    for sample in samples():
        if backend not in usable(CROSS, *sample.needs, among=ALL):
            assert sample.needs and backend == "cuda"
            continue
        logits, labels, weight, kwargs = given(sample)
        tensors = {"logits": logits, "labels": labels, "class_weight": weight}
        compare(sf.upsampled_cross_entropy, torchs, tensors, ["logits"], backend, **{"ignore_index": -100} | kwargs)


def linear(features, prototypes, labels, bias=None, class_weight=None, ignore_index=-100, **kwargs):
    """torch's own op; before torch 2.12 the two that it is made of."""
    soft, dtype = labels.is_floating_point(), features.dtype
    target = labels.to(dtype) if soft else labels
    weight = None if class_weight is None else class_weight.to(dtype)
    kwargs |= {} if soft else {"ignore_index": ignore_index}
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(features, prototypes, target, linear_bias=bias, weight=weight, **kwargs)
    return F.cross_entropy(F.linear(features, prototypes, bias), target, weight=weight, **kwargs)


def ours_linear(**kwargs):
    return sf.prototype_contrastive_loss(**kwargs, normalize=False, temperature=1.0)


LINEAR = [
    (reduction, smoothing, soft, biased, weighted)
    for reduction in REDUCTIONS
    for smoothing in (0.0, 0.1)
    for soft in (False, True)
    for biased in (False, True)
    for weighted in (False, True)
]


@pytest.mark.parametrize("backend", usable(CONTRAST, "bias", "dbias", among=ALL))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_linear_head_is_linear_cross_entropy_in_value_and_all_gradients(backend, reduction):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "features": torch.randn(11, 20, generator=generator),
        "prototypes": torch.randn(5, 20, generator=generator) / 4,
        "bias": torch.randn(5, generator=generator),
        "class_weight": torch.rand(5, generator=generator) + 0.1,
    }
    labels = torch.randint(0, 5, (11,), generator=generator)
    labels[3] = -100
    probabilities = torch.randn(11, 5, generator=generator).softmax(1)
    for of, smoothing, soft, biased, weighted in LINEAR:
        needs = (*(("probabilities",) if soft else ()), *(("label_smoothing",) if smoothing else ()))
        if of != reduction or backend not in usable(CONTRAST, "bias", "dbias", *needs, among=ALL):
            continue
        chosen = tensors | {"labels": probabilities if soft else labels}
        chosen = {k: v for k, v in chosen.items() if (biased or k != "bias") and (weighted or k != "class_weight")}
        leaves = ["features", "prototypes", *(["bias"] if biased else [])]
        compare(
            ours_linear,
            linear,
            chosen,
            leaves,
            backend,
            reduction=reduction,
            label_smoothing=smoothing,
            ignore_index=-100,
        )
