"""The online stage: a teacher that follows the net, class mix and masked consistency, against plain transcriptions."""

from __future__ import annotations

import copy
import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from tiny_run import tiny_config

from spcl_fast.config import OnlineConfig
from spcl_fast.config.rules import check_config
from spcl_fast.data import Batch
from spcl_fast.data.classes import IGNORE
from spcl_fast.errors import ConfigError, Interrupted
from spcl_fast.method.anchor import Anchor
from spcl_fast.method.context import Context
from spcl_fast.method.online import OnlineStep, drawn_classes, follow_, kept_patches, strong_colours
from spcl_fast.method.run import run_stages
from spcl_fast.models import build_model
from spcl_fast.models.encoder_map import EncoderMap
from spcl_fast.report import write_report
from spcl_fast.train.device import Precision
from spcl_fast.train.lean import LeanModel

K = 4


def net_of(seed: int = 0, feature_dim: int | None = 8):
    torch.manual_seed(seed)
    return build_model(
        "tiny", K, weights=None, body_only=False, feature_dim=feature_dim, freeze_bn=True, frozen_bn_eps=1e-5
    ).double()


def batch_of(seed: int, count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 32, 48, generator=generator).double()
    labels = torch.randint(0, K, (count, 32, 48), generator=generator).to(torch.uint8)
    labels[:, :3] = IGNORE
    return Batch(images, labels, [str(i) for i in range(count)])


def step_of(model, teacher, train, accumulate=1) -> OnlineStep:
    return OnlineStep(LeanModel(model, Precision(torch.device("cpu"), "fp32")), teacher, train, None, accumulate)


def plain(model, teacher, source: Batch, target: Batch, train: OnlineConfig) -> dict[str, torch.Tensor]:
    """The three losses by F.interpolate, F.cross_entropy and loops; the random draws are the step's own functions, in its order."""

    def upsampled(net, images):
        return F.interpolate(net(images)[1], images.shape[2:], mode="bilinear", align_corners=True)

    with torch.no_grad():
        confidence, labels = upsampled(teacher, target.images).softmax(1).max(1)
    quality = (confidence >= train.confidence).double().mean()
    found = {
        "segmentation": F.cross_entropy(upsampled(model, source.images), source.labels.long(), ignore_index=IGNORE)
    }
    pasted = drawn_classes(source.labels)
    images = strong_colours(torch.where(pasted[:, None], source.images, target.images), train.mix_jitter)
    mixed = torch.where(pasted, source.labels.long(), labels)
    losses = F.cross_entropy(upsampled(model, images), mixed, reduction="none")
    found["mixed"] = (losses * torch.where(pasted, 1.0, quality)).mean()
    kept = kept_patches(target.images, train.mask_ratio, train.mask_block)
    found["masked"] = quality * F.cross_entropy(upsampled(model, target.images * kept), labels)
    return found | {"sure_share": quality}


def between(teacher, images) -> float:
    """A confidence that about half of the pixels reach, with none near it: float32 and float64 agree on which."""
    with torch.no_grad():
        logits = F.interpolate(teacher(images)[1], images.shape[2:], mode="bilinear", align_corners=True)
    found = logits.softmax(1).amax(1).flatten().sort().values
    middle = found[len(found) // 4 : 3 * len(found) // 4]
    widest = int(middle.diff().argmax())
    return float(middle[widest : widest + 2].mean())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_is_its_formula_with_all_gradients(accumulate):
    model, teacher = net_of(), net_of(1)
    source, target = batch_of(0), batch_of(1)
    sure = between(teacher, target.images)
    train = OnlineConfig(confidence=sure, mask_block=8, temperature=1.0, mix_weight=0.7, masked_weight=0.4)
    other = copy.deepcopy(model)
    torch.manual_seed(7)
    values = step_of(model, teacher, train, accumulate)((source, target), 0)
    torch.manual_seed(7)
    expected = plain(other, teacher, source, target, train)
    assert 0.2 < expected["sure_share"] < 0.8
    (expected["segmentation"] + 0.7 * expected["mixed"] + 0.4 * expected["masked"]).backward()
    for name, value in expected.items():
        got = values[name]
        got = got if isinstance(got, torch.Tensor) else got.value
        torch.testing.assert_close(got.double(), value.detach().double(), rtol=2e-5, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=2e-6, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("feature_dim", [8, None])
def test_the_distance_to_the_frozen_encoder_is_its_formula_with_all_gradients(accumulate, feature_dim):
    """Of the map that goes into the head, over counted cells of the whole batch; without a head, of the features."""
    model, teacher, encoder = (
        net_of(feature_dim=feature_dim),
        net_of(1, feature_dim=feature_dim),
        net_of(2, feature_dim=feature_dim),
    )
    source, target = batch_of(0), batch_of(1)
    source.labels[:, 8:, :32], source.labels[1, 8:, 16:] = 2, 1
    counted = torch.tensor([True, False, True, False])
    train = OnlineConfig(mix_weight=0, masked_weight=0, temperature=1.0)
    others = copy.deepcopy(model), copy.deepcopy(encoder)
    precision = Precision(torch.device("cpu"), "fp32")
    anchor = Anchor(encoder.eval(), EncoderMap(encoder), EncoderMap(model), counted, 0.3, precision)
    values = OnlineStep(LeanModel(model, precision), teacher, train, None, accumulate, anchor=anchor)(
        (source, target), 0
    )

    def encoded(net, images):
        seen = []
        handle = net.feature_extractor.head.register_forward_pre_hook(lambda _, given: seen.append(given[-1]))
        logits = net(images)[1]
        handle.remove()
        return seen[0], F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=True)

    own, logits = encoded(others[0], source.images)
    with torch.no_grad():
        frozen, _ = encoded(others[1], source.images)
    scale = 32 // own.shape[2]
    shares = torch.stack([(source.labels == k).double() for k in range(K)], 1)
    shares = F.avg_pool2d(shares, scale)
    cells = ((shares >= 0.75) & counted[:, None, None]).any(1)
    assert 0 < cells.sum() < cells.numel()
    distance = (own - frozen).norm(dim=1)[cells].mean()
    (F.cross_entropy(logits, source.labels.long(), ignore_index=IGNORE) + 0.3 * distance).backward()
    torch.testing.assert_close(values["feature_distance"].value.double(), distance.detach(), rtol=1e-6, atol=0)
    for (name, a), b in zip(model.named_parameters(), others[0].parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=2e-6, msg=name)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_distance_needs_a_pretrained_encoder_and_classes_that_are_there(tmp_path):
    run_stages(tiny_config(tmp_path), ["source_only", "online"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("feature_distance" in line for line in lines)  # nothing to stay near to
    weights = max((tmp_path / "run" / "source_only" / "checkpoints").glob("*/model.safetensors"))
    near = {"model.weights": str(weights), "model.body_only": "true"}
    run_stages(tiny_config(tmp_path, "near", **near), ["source_only", "online"])
    lines = [json.loads(line) for line in (tmp_path / "near" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("feature_distance", -1) >= 0 for line in lines if line.get("stage") == "online")
    wrong = tiny_config(tmp_path, "wrong", **near, **{"online.feature_distance_classes": "car,trian"})
    with pytest.raises(
        ConfigError, match="online.feature_distance_classes: no class is called 'trian'; there are .*car"
    ):
        run_stages(wrong, ["source_only", "online"])
    assert not (tmp_path / "wrong" / "source_only").exists()  # before the first step


def test_the_teacher_is_a_mean_that_moves_faster_at_first():
    teacher, model = net_of(0), net_of(1)
    before = [p.clone() for p in teacher.parameters()]
    follow_(teacher, model, 0.9, 1)
    for old, own, other in zip(before, teacher.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, 0.5 * old + 0.5 * other)
    before = [p.clone() for p in teacher.parameters()]
    follow_(teacher, model, 0.9, 1000)
    for old, own, other in zip(before, teacher.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, 0.9 * old + 0.1 * other)


def test_half_of_each_images_classes_are_drawn_and_no_unlabelled_pixel():
    labels = torch.full((4, 6, 10), IGNORE, dtype=torch.uint8)
    for row, classes in enumerate([(), (3,), (0, 2), (0, 1, 2, 3, 200)]):
        for column, k in enumerate(classes):
            labels[row, :, column] = k
    seen: list[set[tuple[int, ...]]] = [set() for _ in range(4)]
    for seed in range(60):
        torch.manual_seed(seed)
        pasted = drawn_classes(labels)
        assert not pasted[labels == IGNORE].any()
        for row in range(4):
            drawn = labels[row][pasted[row]].unique().tolist()
            assert all(pasted[row][labels[row] == k].all() for k in drawn)  # a class as a whole
            seen[row].add(tuple(drawn))
    assert seen[0] == {()} and seen[1] == {(3,)} and seen[2] == {(0,), (2,)}
    assert {len(drawn) for drawn in seen[3]} == {3} and len(seen[3]) == 10  # all of 5 over 3


def test_patches_are_taken_away_as_a_whole_and_as_often_as_asked():
    images = torch.ones(8, 3, 50, 70)
    torch.manual_seed(0)
    kept = kept_patches(images, 0.7, 16)
    assert kept.shape == (8, 1, 50, 70)
    patches = kept[:, :, ::16, ::16]
    whole = patches.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :50, :70]
    assert torch.equal(whole, kept)
    assert abs(patches.mean().item() - 0.3) < 0.1
    assert kept_patches(images, 0.0, 16).all() and not kept_patches(images, 1.0, 16).any()


def test_strong_colours_keep_the_range_and_change_each_image_by_itself():
    images = torch.rand(3, 3, 8, 8)
    torch.manual_seed(0)
    changed = strong_colours(images, 0.5)
    assert changed.min() >= 0 and changed.max() <= 1 and not torch.equal(changed, images)
    same = strong_colours(images[:1].expand(3, -1, -1, -1), 0.5)
    assert not torch.allclose(same[0], same[1])
    assert strong_colours(images, 0.0) is images


def test_pictures_that_cannot_be_pasted_are_refused_before_anything_is_read(tmp_path):
    config = tiny_config(tmp_path, **{"online.augment.crop": "32,32"})
    with pytest.raises(ConfigError, match="online.mix_weight: source images of 32,32"):
        check_config(config, ("online",))


def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, monkeypatch):
    few = {"online.iterations": "4"}
    whole, cut = tiny_config(tmp_path, "whole", **few), tiny_config(tmp_path, "cut", **few)
    run_stages(whole, ["source_only", "online"])
    run_stages(cut, ["source_only"])
    plainly = OnlineStep.__call__

    def signal_arrives(self, batch, it):
        if it == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plainly(self, batch, it)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(OnlineStep, "__call__", signal_arrives)
        run_stages(cut, ["online"])
    run_stages(cut, ["online"])
    a, b = (Context(config).checkpoint("online").tensors for config in (whole, cut))
    assert set(a) == set(b) and {key.split("/")[0] for key in a} >= {"model", "teacher"}
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["online"]["miou"] is not None


def test_the_report_of_a_run_without_prototypes_has_pictures_and_misses_nothing_of_them(tmp_path):
    config = tiny_config(tmp_path)
    run_stages(config, ["source_only", "control", "online"])
    page = write_report(tmp_path / "run").read_text()
    assert "final net, online self-training" in page and "No pictures were saved" not in page
    for jargon in ("no adapted net yet", "no sample of features", "every pixel was given a pseudo-label"):
        assert jargon not in page
