"""Class mix: what is pasted, what stays, and that a resumed run pastes the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from spcl_fast.config.load import load_config
from spcl_fast.config.rules import check_config
from spcl_fast.data import Batch, class_mixed, with_class_mix
from spcl_fast.errors import ConfigError

CLASSES = (0, 3, 4, 7, 9)


def batch(seed: int, rows: int = 4) -> Batch:
    numbers = torch.Generator().manual_seed(seed)
    labels = torch.tensor((*CLASSES, 255), dtype=torch.uint8)[
        torch.randint(len(CLASSES) + 1, (rows, 12, 16), generator=numbers)
    ]
    return Batch(torch.rand(rows, 3, 12, 16, generator=numbers), labels, [f"{seed}/{row}" for row in range(rows)])


def test_the_larger_half_of_the_classes_is_pasted_with_pixels_and_labels_and_nothing_else():
    source, target = batch(0), batch(1)
    before = [t.clone() for t in (source.images, source.labels, target.images, target.labels)]
    mixed = class_mixed(source, target, 1.0, np.random.default_rng(5))
    for row in range(4):
        pasted = (mixed.images[row] != target.images[row]).any(0)
        classes = source.labels[row][pasted].unique()
        assert len(classes) == 3 and 255 not in classes
        assert torch.equal(pasted, torch.isin(source.labels[row], classes))  # all of a class, everywhere
        assert torch.equal(mixed.images[row], torch.where(pasted, source.images[row], target.images[row]))
        assert torch.equal(mixed.labels[row], torch.where(pasted, source.labels[row], target.labels[row]))
    assert mixed.names == target.names
    for was, now in zip(before, (source.images, source.labels, target.images, target.labels), strict=True):
        assert torch.equal(was, now)


def test_every_class_is_drawn_as_often_and_images_differ():
    source, target = batch(0, rows=1), batch(1, rows=1)
    rng = np.random.default_rng(0)
    pasted = [class_mixed(source, target, 1.0, rng).images[0, 0] != target.images[0, 0] for _ in range(300)]
    drawn = [frozenset(source.labels[0][where].tolist()) for where in pasted]
    assert len(set(drawn)) == 10  # 3 of 5
    for k in CLASSES:
        assert 150 < sum(k in classes for classes in drawn) < 210  # 180 expected, standard deviation 8.5


def test_probability_is_that_of_an_image():
    source, target = batch(0, rows=200), batch(1, rows=200)
    mixed = class_mixed(source, target, 0.25, np.random.default_rng(1))
    changed = int((mixed.images != target.images).flatten(1).any(1).sum())
    assert 30 < changed < 70  # 50 expected, standard deviation 6.1
    assert torch.equal(class_mixed(source, target, 0.0, np.random.default_rng(1)).images, target.images)


def test_an_unlabelled_source_image_pastes_nothing():
    source, target = batch(0), batch(1)
    source.labels.fill_(255)
    mixed = class_mixed(source, target, 1.0, np.random.default_rng(2))
    assert torch.equal(mixed.images, target.images) and torch.equal(mixed.labels, target.labels)


def test_what_is_pasted_follows_from_seed_iteration_and_rank():
    def pairs(start: int):
        return ((batch(2 * it), batch(2 * it + 1)) for it in itertools.count(start))

    def images(start: int, count: int, **key):
        found = with_class_mix(pairs, 0.7, **key)(start)
        return torch.stack([target.images for _, target in itertools.islice(found, count)])

    whole = images(0, 6, seed=3)
    assert torch.equal(whole[4:], images(4, 2, seed=3))
    assert not torch.equal(whole, images(0, 6, seed=4)) and not torch.equal(whole, images(0, 6, seed=3, rank=1))
    (_, first), (_, second) = itertools.islice(
        with_class_mix(lambda start: itertools.repeat((batch(0), batch(1))), 1.0, seed=3)(0), 2
    )
    assert not torch.equal(first.images, second.images)
    source, _ = next(with_class_mix(pairs, 1.0, seed=3)(0))
    assert torch.equal(source.images, batch(0).images)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"distill.source_weight": "0"}, "distill.source_weight above 0"),
        (
            {"distill.augment.crop": "[160, 120]"},
            r"320,240 \(adapt.augment.crop\) cannot be pasted onto target images of 160,120",
        ),
        ({"distill.class_mix": "1.5"}, "from 0 to 1"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(changes, said):
    given = {"source.root": "a", "target.root": "b", "distill.class_mix": "1", **changes}
    with pytest.raises(ConfigError, match=said):
        check_config(load_config("folders", overrides=list(given.items())))
