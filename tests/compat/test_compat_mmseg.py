"""compat.mmseg: CrossEntropyLoss with mmsegmentation's denominators, written out here in plain PyTorch."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spcl_fast.compat import mmseg

N, C, H, W = 2, 5, 12, 15
SMALL = torch.randn(N, C, 5, 6, generator=torch.Generator().manual_seed(0))
LABEL = torch.randint(0, C, (N, H, W), generator=torch.Generator().manual_seed(1))
LABEL[:, :3] = 255
WEIGHT = torch.rand(N, H, W, generator=torch.Generator().manual_seed(2))
CLASS_WEIGHT = [0.5, 1.0, 2.0, 0.3, 1.2]


def scores(small, align_corners=False):
    return F.interpolate(small, (H, W), mode="bilinear", align_corners=align_corners)


def reduced(loss, weight, reduction, avg_factor, counted):
    loss = loss if weight is None else loss * weight
    if reduction != "mean":
        return loss if reduction == "none" else loss.sum()
    return loss.sum() / (avg_factor if avg_factor is not None else counted)


def plain(small, class_weight=None, weight=None, reduction="mean", avg_factor=None, avg_non_ignore=False):
    class_weight = None if class_weight is None else torch.tensor(class_weight)
    loss = F.cross_entropy(scores(small), LABEL, weight=class_weight, ignore_index=255, reduction="none")
    return reduced(loss, weight, reduction, avg_factor, (LABEL != 255).sum() if avg_non_ignore else LABEL.numel())


def plain_binary(small, class_weight=None, weight=None, reduction="mean", avg_factor=None, avg_non_ignore=False):
    valid = (LABEL != 255)[:, None].expand(N, C, H, W).float()
    target = F.one_hot(LABEL.where(LABEL != 255, 0), C).permute(0, 3, 1, 2) * valid
    loss = F.binary_cross_entropy_with_logits(scores(small), target, reduction="none")
    weight = valid if weight is None else weight[:, None] * valid
    return reduced(loss, weight, reduction, avg_factor, valid.sum() if avg_non_ignore else loss.numel())


CASES = [
    ({}, {}),
    ({"avg_non_ignore": True}, {}),
    ({"class_weight": CLASS_WEIGHT}, {"weight": WEIGHT}),
    ({"class_weight": CLASS_WEIGHT, "avg_non_ignore": True}, {}),
    ({}, {"avg_factor": 33.0}),
    ({"reduction": "sum"}, {"weight": WEIGHT}),
    ({"reduction": "none"}, {"weight": WEIGHT}),
    ({"avg_non_ignore": True}, {"reduction_override": "none"}),
]


def check(formula, options, call, small=SMALL, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        criterion = mmseg.CrossEntropyLoss(loss_weight=0.7, **options, **more)
    given = options | call
    given["reduction"] = given.pop("reduction_override", given.get("reduction", "mean"))
    found = []
    for function in (
        lambda x: criterion(x, LABEL, ignore_index=255, **call),
        lambda x: 0.7 * formula(x, **given),
    ):
        x = small.clone().requires_grad_()
        value = function(x)
        value.backward(torch.linspace(1, 2, value.numel()).view(value.shape))
        found.append((value.detach(), x.grad))
    for ours, own in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "call"), CASES)
def test_softmax_with_each_denominator(options, call):
    check(plain, options, call)


@pytest.mark.parametrize(("options", "call"), [case for case in CASES if "class_weight" not in case[0]])
def test_sigmoid_with_each_denominator(options, call):
    check(plain_binary, options, call, use_sigmoid=True)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("ignored", [255, 2])
def test_a_mean_with_class_weights_divides_by_them_as_from_mmsegmentation_1_2_on(avg_non_ignore, ignored):
    """An ignored label that is a class counts in its denominator unless avg_non_ignore; one that is none would be an IndexError there."""
    table = torch.tensor(CLASS_WEIGHT)
    label = LABEL.where(LABEL != 255, ignored)
    counted = table[label.where(label < C, 0)].where(label < C, 0.0)
    if avg_non_ignore:
        counted = counted.where(label != ignored, 0.0)
    found = []
    for name in ("ours", "theirs"):
        x = SMALL.clone().requires_grad_()
        if name == "ours":
            criterion = mmseg.CrossEntropyLoss(
                class_weight=CLASS_WEIGHT, avg_non_ignore=avg_non_ignore, average_by_class_weight=True
            )
            value = criterion(x, label, weight=WEIGHT, ignore_index=ignored)
        else:
            loss = F.cross_entropy(scores(x), label, weight=table, ignore_index=ignored, reduction="none")
            value = (loss * WEIGHT).sum() / counted.sum()
        value.backward()
        found.append((value.detach(), x.grad))
    for ours, own in zip(*found, strict=True):
        torch.testing.assert_close(ours, own, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("version", "by_class_weight"),
    [("1.2.2", True), ("1.1.2", False), ("0.30.0", False), ("2.0.0rc1", True), (None, False)],
)
def test_the_default_is_that_of_the_mmsegmentation_that_is_installed(monkeypatch, version, by_class_weight):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    mmseg.averages_by_class_weight.cache_clear()
    try:
        assert mmseg.averages_by_class_weight() == by_class_weight
    finally:
        mmseg.averages_by_class_weight.cache_clear()


def test_scores_of_the_labels_size_and_rows_are_taken_as_mmsegmentation_passes_them():
    small = scores(SMALL)
    torch.testing.assert_close(
        mmseg.cross_entropy(small, LABEL, ignore_index=255), mmseg.cross_entropy(SMALL, LABEL, ignore_index=255)
    )
    rows, labels = torch.randn(7, C), torch.tensor([0, 1, 2, 3, 4, 255, 0])
    own = F.cross_entropy(rows, labels, ignore_index=255, reduction="none")
    torch.testing.assert_close(mmseg.cross_entropy(rows, labels, ignore_index=255), own.mean())
    torch.testing.assert_close(mmseg.cross_entropy(rows, labels, ignore_index=255, reduction="none"), own)
    binary = F.binary_cross_entropy_with_logits(rows[:5], torch.eye(5), pos_weight=torch.tensor(CLASS_WEIGHT))
    got = mmseg.binary_cross_entropy(rows[:5], labels[:5], class_weight=torch.tensor(CLASS_WEIGHT))
    torch.testing.assert_close(got, binary)


def test_one_channel_has_labels_0_and_1():
    small, label = SMALL[:, :1], (LABEL % 2).where(LABEL != 255, 255)
    loss = F.binary_cross_entropy_with_logits(scores(small), (label == 1).float()[:, None], reduction="none")
    expected = (loss * (label != 255)[:, None]).mean()
    torch.testing.assert_close(mmseg.binary_cross_entropy(small, label, ignore_index=255), expected)


def test_mask_cross_entropy_is_that_of_the_labels_channel():
    pred, target, label = torch.randn(3, C, 4, 4), torch.rand(3, 4, 4), torch.tensor([0, 2, 4])
    expected = F.binary_cross_entropy_with_logits(pred[torch.arange(3), label], target)[None]
    torch.testing.assert_close(
        mmseg.CrossEntropyLoss(use_mask=True, avg_non_ignore=True)(pred, target, label), expected
    )


def test_the_default_denominator_is_warned_of_and_the_name_is_there():
    with pytest.warns(UserWarning, match="divides by all pixels"):
        assert mmseg.CrossEntropyLoss().loss_name == "loss_ce"
    defaults = {name: p.default for name, p in inspect.signature(mmseg.CrossEntropyLoss).parameters.items()}
    assert defaults == {
        "use_sigmoid": False, "use_mask": False, "reduction": "mean", "class_weight": None, "loss_weight": 1.0,
        "loss_name": "loss_ce", "avg_non_ignore": False, "align_corners": False, "average_by_class_weight": None,
    }  # fmt: skip
    assert inspect.signature(mmseg.CrossEntropyLoss.forward).parameters["ignore_index"].default == -100


def test_class_weights_are_read_from_files_that_run_nothing(tmp_path):
    np.save(tmp_path / "w.npy", np.array(CLASS_WEIGHT))
    (tmp_path / "w.json").write_text(json.dumps(CLASS_WEIGHT))
    assert (
        mmseg.get_class_weight(str(tmp_path / "w.npy"))
        == CLASS_WEIGHT
        == mmseg.get_class_weight(str(tmp_path / "w.json"))
    )
    with pytest.raises(ValueError, match=r"must be a .npy or .json file"):
        mmseg.get_class_weight(str(tmp_path / "w.pkl"))


def test_what_means_nothing_together_is_refused():
    with pytest.raises(ValueError, match="two losses"):
        mmseg.CrossEntropyLoss(use_sigmoid=True, use_mask=True)
    with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
        mmseg.cross_entropy(SMALL, LABEL, reduction="sum", avg_factor=3, ignore_index=255)
    with pytest.raises(ValueError, match="reduction_override"):
        mmseg.CrossEntropyLoss(avg_non_ignore=True)(SMALL, LABEL, reduction_override="average", ignore_index=255)


def test_nothing_labelled_is_zero():
    nothing = torch.full_like(LABEL, 255)
    for options in ({}, {"avg_non_ignore": True}):
        assert mmseg.cross_entropy(SMALL, nothing, ignore_index=255, **options) == 0
        assert mmseg.binary_cross_entropy(SMALL, nothing, ignore_index=255, **options) == 0
