"""pseudo_label.rectify: ProDA's distances to the class means of the target, against the formula in plain PyTorch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_few_labels import config_of
from tiny_run import save_scenes

from spcl_fast.data import eval_batches, read_label_png
from spcl_fast.method import pseudo_labels
from spcl_fast.method.context import Context
from spcl_fast.method.run import run_stages
from spcl_fast.runs import layout

STAGE = pseudo_labels.FIRST.name
SCALE = 0.7


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return save_scenes(root / "source", "generated_source"), save_scenes(root / "target", "generated_target")


@pytest.fixture(scope="module")
def start(scenes, tmp_path_factory):
    """A run with a net that the labels come from."""
    config = config_of(scenes, tmp_path_factory.mktemp("runs"), **{"source_only.iterations": "12"})
    run_stages(config, ["source_only"])
    return config


def written(config, labelled=None, **changes):
    """Name -> label map, and the record, of the pseudo-label stage done again on the net of that run."""
    target = dataclasses.replace(config.target, labelled=labelled)
    settings = dataclasses.replace(config.pseudo_label, **changes)
    changed = dataclasses.replace(config, target=target, pseudo_label=settings)
    run_stages(changed, [STAGE], redo=[STAGE])
    run = Context(changed).run
    names = Context(changed).domains.unlabelled_target().names
    return {name: read_label_png(run.path(STAGE, f"{name}.png")) for name in names}, run.read_json(
        layout.of_stage(STAGE, layout.THRESHOLDS)
    )


def kept(logits, size, quantile=0.5, cap=0.9):
    """Thresholds [K] and labels of every image, 255 below them: sorts every confidence."""
    maps = [F.interpolate(one, size=size, mode="bilinear", align_corners=True).softmax(1).max(1) for one in logits]
    confidence, labels = (torch.cat([part[i] for part in maps]) for i in (0, 1))
    applied = torch.full((logits[0].shape[1],), cap, dtype=torch.float64)
    for k in labels.unique().tolist():
        values = confidence[labels == k].clamp_max(cap).sort().values
        applied[k] = values[min(round(quantile * len(values)), len(values) - 1)]
    return applied, labels.where(confidence >= applied[labels] - 1e-7, 255)


@torch.no_grad()
def transcribed(config, labelled=()):
    """Name -> label map and thresholds by the formula, in float64."""
    context = Context(config)
    model, size = context.model_of("source_only").eval(), config.target.eval_size[::-1]
    images = list(eval_batches(context.domains.unlabelled_target(), config.target.eval_size, labels=False))
    truth = context.domains.dataset("target", "train")
    pairs = [tuple(part.double() for part in model(image)) for image, _, _ in images]
    names = [name for _, _, name in images]
    known = {name: torch.tensor(np.array(truth.load(i)[1])) for i, name in enumerate(names) if name in labelled}
    _, first = kept([logits for _, logits in pairs], size)
    maps = [known.get(name, labels) for name, labels in zip(names, first, strict=True)]
    grid = pairs[0][0].shape[2:]
    nearest = torch.cat([F.interpolate(one[None, None].float(), size=grid, mode="nearest")[0] for one in maps]).long()
    features = torch.cat([features for features, _ in pairs])
    rows, found = features.movedim(1, -1).flatten(0, 2), nearest.flatten()
    changed = []
    present = [k for k in range(pairs[0][1].shape[1]) if (found == k).any()]
    for own, logits in pairs:
        distance = torch.full_like(logits, -1)
        for k in present:
            distance[:, k] = (own - rows[found == k].mean(0)[None, :, None, None]).norm(dim=1)
        distance = distance.where(distance >= 0, distance.amax(1, keepdim=True))
        changed.append(logits - SCALE * distance)
    applied, labels = kept(changed, size)
    return {name: known.get(name, one).numpy() for name, one in zip(names, labels, strict=True)}, applied


@pytest.mark.parametrize("labelled", [(), ("1", "3")], ids=["no label", "two labels"])
def test_labels_and_thresholds_are_those_of_the_formula(start, labelled):
    got, record = written(start, ",".join(labelled) or None, rectify=SCALE)
    expected, applied = transcribed(start, labelled)
    torch.testing.assert_close(
        torch.tensor(list(record["thresholds"].values())).double(), applied, rtol=1e-4, atol=1e-5
    )
    different = max((got[name] != expected[name]).mean() for name in expected)
    assert different < 2e-3  # pixels at a threshold, or of two classes alike in float32
    plain, _ = written(start, ",".join(labelled) or None)
    assert max((got[name] != plain[name]).mean() for name in got) > 0.02


def test_estimated_at_another_size_the_means_are_of_that_size(start):
    got, _ = written(start, rectify=SCALE, estimate_size=(24, 16))
    other, _ = written(start, rectify=SCALE)
    assert any((got[name] != other[name]).any() for name in got)


def test_a_class_without_a_mean_is_as_far_as_the_farthest():
    features = torch.tensor([[[[3.0]], [[0.0]]]])
    means = torch.tensor([[3.0, 0.0], [float("nan")] * 2, [0.0, 4.0]])
    got = pseudo_labels._rectified(features, torch.zeros(1, 3, 1, 1), means=means, scale=2.0)
    torch.testing.assert_close(got.flatten(), torch.tensor([0.0, -10.0, -10.0]))
    nothing = pseudo_labels._rectified(features, torch.zeros(1, 3, 1, 1), means=means * float("nan"), scale=2.0)
    assert (nothing == 0).all()
