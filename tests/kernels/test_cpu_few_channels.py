"""The gradient of features of one to three channels in C++: it is projected by what was computed of it, not by the softmax's slope."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import check, run, usable
from problems import CONTRAST, OPTIONS, problem

import spcl_fast as sf

pytestmark = pytest.mark.skipif("cpu" not in usable(CONTRAST), reason="the C++ backend is not built")
# of eager's error: where D is 1 the gradient is 0, and eager's unit features are exactly 1
LIMIT = {1: 2.0, 2: 1.1}
DRAWS = 4


def drawn(dim: int, classes: int, temperature: float, soft: bool, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (1, 1, 400), generator=generator)
    if soft:
        labels = F.normalize(torch.rand(1, classes, 1, 400, generator=generator) ** 3, 1, 1)
    return {
        "features": torch.randn(1, dim, 1, 400, generator=generator),
        "prototypes": F.normalize(torch.randn(classes, dim, generator=generator), dim=1),
        "labels": labels,
        "temperature": temperature,
        "reduction": "sum",
    }


def relative_error(given: dict) -> float:
    """Ours by eager's. A gradient is as large as its pixel is short: the few that lie next to 0 would be all that counts."""
    got = run(sf.prototype_contrastive_loss, given, ["features"], "cpu")[1]
    eager = run(oracle.contrast, given, ["features"], dtype=torch.float32)[1]
    truth = run(oracle.contrast, given, ["features"], leaf_dtype=torch.float64)[1]
    norm = given["features"].norm(dim=1, keepdim=True)
    ours, theirs = (((gradient - truth) * norm).square().mean().sqrt() for gradient in (got, eager))
    return float(ours / theirs)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize(("classes", "temperature"), [(33, 0.05), (65, 0.1), (65, 1.0), (33, 100.0)])
@pytest.mark.parametrize("dim", LIMIT)
def test_the_gradient_of_few_channels_is_as_accurate_as_eager(dim, classes, temperature, soft):
    ratios = [relative_error(drawn(dim, classes, temperature, soft, seed)) for seed in range(DRAWS)]
    assert sum(ratios) / DRAWS <= LIMIT[dim], ratios


@pytest.mark.parametrize(("dim", "dtype"), [(2, torch.float32), (3, torch.float16), (4, torch.bfloat16)])
@pytest.mark.parametrize("case", [case for case in OPTIONS if case.op == CONTRAST], ids=lambda case: case.name)
def test_every_option_with_few_channels(case, dim, dtype):
    p = problem((2, dim, 5, 13), 40, None, dtype)
    if dim == 3:
        p = p._replace(features=p.features.contiguous(memory_format=torch.channels_last))
    check(CONTRAST, case.given(p), case.leaves, "cpu")


def test_few_channels_of_norm_0_or_nearly_and_what_is_ignored():
    p = problem((1, 2, 5, 13), 7)
    features, labels = p.features.clone(), p.labels.clone()
    features[0, :, 0, 0], features[0, :, 0, 1] = 0.0, 1e-13
    features[0, :, 1, 0], labels[0, 1, 0] = torch.nan, 255
    labels[0, 0, :2] = torch.tensor([1, 2])
    given = {"features": features, "labels": labels, "prototypes": p.prototypes, "temperature": 0.3}
    gradient = run(sf.prototype_contrastive_loss, given, ["features"], "cpu")[1]
    expected = run(
        oracle.contrast, given | {"features": features.nan_to_num()}, ["features"], leaf_dtype=torch.float64
    )[1]
    assert gradient.isfinite().all() and (gradient[0, :, 1, 0] == 0).all()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
