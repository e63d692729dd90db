"""Every loss of the catalog is an Objective: what `adapt` asks of it, whatever its method."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from spcl_fast import catalog
from spcl_fast.config import AdaptConfig

K, D, B, H, W = 4, 8, 2, 6, 10
SETTINGS = dataclasses.replace(AdaptConfig(), contrast_temperature=0.5)
NAMES = catalog.names(catalog.LOSSES)
PART_BY_PART = {"protoseg", "gmmseg", "contrastiveseg"}  # a part is a step of its own, as their docstrings say


def made(name: str, settings: AdaptConfig = SETTINGS):
    torch.manual_seed(0)  # some draw their first rows
    return catalog.load(catalog.find(catalog.LOSSES, name).home)(K, D, settings)


def batch(seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (B, H, W), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, :8] = 255
    return torch.randn(B, D, H, W, generator=generator), labels


def started(name: str, settings: AdaptConfig = SETTINGS):
    prototypes = torch.nn.functional.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(5)), dim=1)
    return made(name, settings).load_(prototypes)


def value(objective, x, labels):
    x = x.clone().requires_grad_()
    loss = objective(x, labels)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_from_prototypes_moves_with_the_source_and_has_a_gradient(name):
    objective = started(name)
    assert objective.prototypes.shape[0] >= K and objective.prototypes.dtype == torch.float32
    before = objective.prototypes.clone()
    for seed in (0, 1):
        objective.update_(*batch(seed))
    assert not torch.equal(objective.prototypes, before)
    loss, grad = value(objective, *batch(2))
    assert loss.shape == () and loss.isfinite() and grad.isfinite().all() and grad.any()
    assert not grad[:, :, :2].any(), "an ignored pixel has a gradient"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PART_BY_PART])
def test_a_batch_in_parts_moves_it_as_the_batch_does(name):
    whole, parts = started(name), started(name)
    x, labels = batch(0)
    whole.update_(x, labels)
    parts.update_in_parts_((x[i : i + 1], labels[i : i + 1]) for i in range(B))
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", NAMES)
def test_its_state_is_all_in_its_state_dict(name):
    objective = started(name).update_(*batch(0))
    other = made(name)
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    for module in (objective, other):
        module.update_(*batch(1))
    (loss, grad), (again, same) = value(objective, *batch(2)), value(other, *batch(2))
    assert torch.equal(loss, again) and torch.equal(grad, same)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_labelled_is_zero_and_moves_nothing(name):
    objective = started(name)
    x, labels = batch(0)
    nothing = torch.full_like(labels, 255)
    before = objective.prototypes.clone()
    objective.update_(x, nothing)
    torch.testing.assert_close(objective.prototypes, before, rtol=0, atol=1e-6)  # some make them unit length again
    loss, grad = value(objective, x, nothing)
    assert loss == 0 and not grad.any()


SETTING_OF = {
    "sepico_dist": {"variance_ratio": 0.3, "contrast_regularizer": 0.5},
    "sepico_bank": {"bank_length": 1, "contrast_regularizer": 0.5},
    "sepico_proto": {"contrast_regularizer": 0.5},
}


@pytest.mark.parametrize(
    ("name", "setting", "changed"),
    [(name, *pair) for name, pairs in SETTING_OF.items() for pair in pairs.items()]
    + [(name, "contrast_temperature", 2.0) for name in NAMES],
)
def test_its_settings_reach_it(name, setting, changed):
    results = []
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, **{setting: changed})):
        objective = started(name, settings)
        for seed in (0, 1):
            objective.update_(*batch(seed))
        results.append(value(objective, *batch(2))[0])
    assert not torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_where_similarities_say_nothing_the_loss_is_that_of_chance(name):
    """At a very high temperature all logits are alike. What is logged would else be above or below 0 for no reason."""
    objective = started(name, dataclasses.replace(SETTINGS, contrast_temperature=1e6))
    objective.update_(*batch(0))
    if objective.chance == 0.0:
        assert name == "contrastiveseg", "the one loss whose number of candidates is the memory's"
        return
    beyond = 0.4 if name == "protoseg" else 1e-4  # 0.1 (1 - cos)^2 of its other loss
    assert objective.chance - 1e-4 <= float(objective(*batch(1))) <= objective.chance + beyond
