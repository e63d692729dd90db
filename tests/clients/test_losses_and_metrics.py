"""Losses, metrics and training loops of the real libraries next to ours: run by `make clients`. CI has none of them but torchmetrics; what
they mean is tested there by transcriptions (tests/compat, tests/ops).
"""

from __future__ import annotations

import importlib
import os
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import spcl_fast as sf
from spcl_fast.estimators import PrototypeBank

K = 5


def library(name: str):
    return pytest.importorskip(name, reason=f"needs the real {name}: make clients")


def maps(seed: int = 0, size=(24, 40), low=(6, 10), ignored: int = 255):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, K, *low, generator=generator).requires_grad_()
    labels = torch.randint(0, K, (2, *size), generator=generator)
    labels[:, :3] = ignored
    return logits, labels


def gradient_of(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, leaf)
    return found


def same(ours: torch.Tensor, theirs: torch.Tensor, *leaves: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    for leaf in leaves:
        torch.testing.assert_close(gradient_of(ours, leaf), gradient_of(theirs, leaf), rtol=2e-5, atol=2e-8)


# ---- transformers --------------------------------------------------------------------------------------------------------


def test_segformers_own_loss_is_ours_without_its_up_sampled_logits():
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 48, 64],
        depths=[1] * 4,
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=K,
    )
    net = transformers.SegformerForSemanticSegmentation(config).eval()
    _, labels = maps(size=(64, 96))
    out = net(torch.randn(2, 3, 64, 96), labels=labels)
    ours = sf.upsampled_cross_entropy(out.logits, labels, align_corners=False, ignore_index=255)
    weights = [parameter for parameter in net.parameters() if parameter.requires_grad]
    torch.testing.assert_close(ours, out.loss, rtol=2e-6, atol=0)
    theirs = torch.autograd.grad(out.loss, weights, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(ours, weights, allow_unused=True)
    for a, b in zip(found, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# ---- segmentation_models.pytorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smps_soft_cross_entropy_is_ours_with_all_pixels_in_the_denominator(smoothing):
    smp = library("segmentation_models_pytorch")
    logits, labels = maps()
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    theirs = smp.losses.SoftCrossEntropyLoss(smooth_factor=smoothing, ignore_index=255)(up, labels)
    ours = sf.upsampled_cross_entropy(
        logits, labels, label_smoothing=smoothing, denominator="all", ignore_index=255, align_corners=True
    )
    same(ours, theirs, logits)


def test_smps_focal_loss_is_ours_summed_over_labelled_pixels_times_classes():
    """Theirs is a mean over the labelled pixels of each class, then over the classes."""
    smp = library("segmentation_models_pytorch")
    logits, labels = maps()
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    theirs = smp.losses.FocalLoss(mode="multiclass", gamma=2.0, ignore_index=255)(up, labels)
    ours = sf.upsampled_binary_cross_entropy(
        logits, labels, gamma=2.0, reduction="sum", align_corners=True, ignore_index=255
    )
    same(ours / ((labels != 255).sum() * K), theirs, logits)


def test_smps_iou_is_that_of_our_confusion_matrix():
    smp = library("segmentation_models_pytorch")
    logits, labels = maps(ignored=0)
    confusion = sf.upsampled_confusion(logits.detach(), labels)
    predicted = F.interpolate(logits.detach(), labels.shape[1:], mode="bilinear", align_corners=True).argmax(1)
    stats = smp.metrics.get_stats(predicted, labels, mode="multiclass", num_classes=K)
    theirs = smp.metrics.iou_score(*(each.sum(0, keepdim=True) for each in stats), reduction="none")[0]
    hits = confusion.diag().float()
    torch.testing.assert_close(hits / (confusion.sum(0) + confusion.sum(1) - hits), theirs.float())


def test_a_unet_of_smp_learns_with_both_losses():
    smp = library("segmentation_models_pytorch")
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, classes=K, decoder_channels=(64, 32, 32, 16, 16)).train()
    features = {}
    net.decoder.register_forward_hook(lambda module, inputs, output: features.update(map=output))
    bank = PrototypeBank(K, 16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    _, labels = maps(size=(64, 64))
    images = labels.clamp(max=K)[:, None].expand(-1, 3, -1, -1).float() / K
    losses = []
    for _ in range(12):
        logits = net(images)
        bank.update_(features["map"].detach(), labels)
        loss = sf.upsampled_cross_entropy(logits, labels) + 0.1 * sf.prototype_contrastive_loss(
            features["map"], labels, bank.prototypes, temperature=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# ---- mmsegmentation --------------------------------------------------------------------------------------------------------


def mmseg_cross_entropy():
    """Its file alone: the package imports compiled ops of mmcv, which mmcv-lite has not."""
    folder = os.path.dirname(str(library("mmseg").__file__))
    for name, place in (("mmseg.models", "models"), ("mmseg.models.losses", "models/losses")):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(folder, place)]
        sys.modules.setdefault(name, package)
    return importlib.import_module("mmseg.models.losses.cross_entropy_loss").CrossEntropyLoss


@pytest.mark.parametrize("avg_non_ignore", [False, True])
@pytest.mark.parametrize("class_weight", [None, [1.0, 0.5, 2.0, 0.1, 3.0]])
def test_mmsegs_cross_entropy_is_ours(avg_non_ignore, class_weight):
    from spcl_fast.compat.mmseg import CrossEntropyLoss

    settings = {"class_weight": class_weight, "avg_non_ignore": avg_non_ignore, "loss_weight": 0.4}
    # with class weights theirs raises IndexError at an ignored label that is no class
    logits, labels = maps(ignored=255 if class_weight is None else 3)
    ignored = 255 if class_weight is None else 3
    up = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    theirs = mmseg_cross_entropy()(**settings)(up, labels, ignore_index=ignored)
    same(CrossEntropyLoss(**settings)(logits, labels, ignore_index=ignored), theirs, logits)


# ---- pytorch-metric-learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("NormalizedSoftmaxLoss", {"num_classes": K, "embedding_size": 8, "temperature": 0.1}),
        ("CosFaceLoss", {"num_classes": K, "embedding_size": 8}),
        ("ProxyNCALoss", {"num_classes": K, "embedding_size": 8}),
        ("NTXentLoss", {}),
    ],
)
def test_losses_of_pytorch_metric_learning_are_ours_with_their_weights(name, settings):
    theirs_of = library("pytorch_metric_learning.losses")
    from spcl_fast.compat import pytorch_metric_learning as ours_of

    torch.manual_seed(0)
    theirs, ours = getattr(theirs_of, name)(**settings), getattr(ours_of, name)(**settings)
    ours.load_state_dict(theirs.state_dict())
    x, labels = torch.randn(60, 8, requires_grad=True), torch.randint(0, K, (60,))
    a, b = ours(x, labels), theirs(x, labels)
    torch.testing.assert_close(a, b, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(gradient_of(a, x), gradient_of(b, x), rtol=5e-5, atol=1e-7)


# ---- torchmetrics, cityscapesScripts -------------------------------------------------------------------------------------------


def test_torchmetrics_confusion_matrix_is_ours():
    metrics = library("torchmetrics.classification")
    logits, labels = maps()
    up = F.interpolate(logits.detach(), labels.shape[1:], mode="bilinear", align_corners=True)
    theirs = metrics.MulticlassConfusionMatrix(K, ignore_index=255)(up, labels)
    assert torch.equal(sf.upsampled_confusion(logits.detach(), labels), theirs)
    iou = metrics.MulticlassJaccardIndex(K, ignore_index=255, average=None)(up, labels)
    confusion = theirs.float()
    hits = confusion.diag()
    torch.testing.assert_close(hits / (confusion.sum(0) + confusion.sum(1) - hits), iou)


def test_cityscapes_own_evaluation_has_our_ious(tmp_path):
    """Its pixels without a class count where they are predicted as none, which a net of 19 classes never does."""
    evaluation = library("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    from spcl_fast.data.classes import CITYSCAPES_19, CITYSCAPES_IDS_19
    from spcl_fast.train.evaluate import Scores

    rng = np.random.default_rng(0)
    to_id = {train: own for own, train in CITYSCAPES_IDS_19.items()}
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    predictions, truths = [], []
    for number in range(3):
        truth = rng.integers(0, 34, (20, 30))  # ids, those without a class among them
        logits = torch.from_numpy(rng.standard_normal((1, 19, 5, 8))).float()
        predicted = sf.upsampled_prediction(logits, (20, 30)).labels[0].numpy()
        train = np.full(truth.shape, 255)
        for own, k in CITYSCAPES_IDS_19.items():
            train[truth == own] = k
        confusion += sf.upsampled_confusion(logits, torch.from_numpy(train)[None])
        ids = np.vectorize(to_id.get)(predicted)
        for paths, array, name in ((predictions, ids, "predicted"), (truths, truth, "truth")):
            paths.append(str(tmp_path / f"{name}_{number}.png"))
            Image.fromarray(array.astype(np.uint8)).save(paths[-1])
    args = evaluation.args
    args.quiet, args.JSONOutput, args.evalInstLevelScore, args.evalPixelAccuracy = True, False, False, False
    scores = evaluation.evaluateImgLists(predictions, truths, args)["classScores"]
    for name, ours in Scores(CITYSCAPES_19, confusion.numpy()).iou.items():
        assert 100 * scores[name] == pytest.approx(ours, abs=1e-6), name


# ---- Lightning, Accelerate -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, K, 1)
        self.bank = PrototypeBank(K, 16)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        features = self.body(images).relu()
        self.bank.update_(features.detach(), labels)
        contrast = sf.prototype_contrastive_loss(features, labels, self.bank.prototypes, temperature=0.1)
        return sf.upsampled_cross_entropy(self.head(features), labels) + 0.1 * contrast


def examples(count: int = 4):
    _, labels = maps(size=(16, 24))
    return [(torch.rand(3, 16, 24), labels[i % 2]) for i in range(count)]


def test_lightning_trains_and_keeps_the_prototypes_in_its_checkpoint(tmp_path):
    lightning = library("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return self.net.loss(*batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, torch.utils.data.DataLoader(examples(), batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt")
    assert module.net.bank.prototypes.abs().sum() > 0
    assert torch.equal(again.net.bank.prototypes.cpu(), module.net.bank.prototypes.cpu())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_with_the_losses(precision):
    accelerate = library("accelerate")
    torch.manual_seed(0)
    accelerate.state.AcceleratorState._reset_state(True)  # or its precision is that of the first Accelerator
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    net = Net()
    before = net.body.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer, loader = accelerator.prepare(net, optimizer, torch.utils.data.DataLoader(examples(), batch_size=2))
    for images, labels in loader:
        with accelerator.autocast():
            loss = accelerator.unwrap_model(net).loss(images, labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
    assert not torch.equal(before, accelerator.unwrap_model(net).body.weight)
    assert accelerator.unwrap_model(net).bank.prototypes.dtype == torch.float32
