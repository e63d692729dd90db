"""SDCA's and ProCA's losses, and the objectives' statistics of raw features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transcription import TEMPERATURES, assert_equals

from spcl_fast.losses import sdca as methods

B, D, H, W, K = 2, 10, 5, 7, 4
FEATURES = torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(0)) * 3 + 1
MEAN = torch.randn(K, D, generator=torch.Generator().manual_seed(1)) * 5
VARIANCE = torch.rand(K, D, generator=torch.Generator().manual_seed(2)) * 9
LABELS = torch.randint(0, K, (B, H, W), generator=torch.Generator().manual_seed(3))
LABELS[:, 0] = 255


def rows(features):
    keep = LABELS != 255
    return F.normalize(features.movedim(1, -1)[keep], dim=1), LABELS[keep]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sdca_has_mean_and_variance_of_unit_length(temperature):
    def plain(features):
        x, y = rows(features)
        v = 0.5 * x.square() @ F.normalize(VARIANCE, dim=1).to(x.dtype).t() / temperature**2
        z = x @ F.normalize(MEAN, dim=1).to(x.dtype).t() / temperature + v
        return F.cross_entropy(z, y) + v.gather(1, y[:, None]).mean()

    assert_equals(
        lambda features: methods.sdca_loss(features, LABELS, MEAN, VARIANCE, temperature=temperature),
        plain,
        features=FEATURES,
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_proca_is_the_cosine_softmax(temperature):
    def plain(features):
        x, y = rows(features)
        return F.cross_entropy(x @ F.normalize(MEAN, dim=1).to(x.dtype).t() / temperature, y)

    assert_equals(
        lambda features: methods.proca_loss(features, LABELS, MEAN, temperature=temperature), plain, features=FEATURES
    )


def test_the_objectives_statistics_are_those_of_raw_features():
    objective = methods.SDCA(K, D, temperature=0.5).update_(FEATURES, LABELS)
    x = [FEATURES.movedim(1, -1)[k == LABELS] for k in range(K)]
    torch.testing.assert_close(objective.prototypes, torch.stack([r.mean(0) for r in x]))
    torch.testing.assert_close(
        objective.variances, torch.stack([r.var(0, unbiased=False) for r in x]), rtol=1e-4, atol=1e-5
    )
    expected = methods.sdca_loss(FEATURES, LABELS, objective.prototypes, objective.variances, temperature=0.5)
    assert torch.equal(objective(FEATURES, LABELS), expected)
