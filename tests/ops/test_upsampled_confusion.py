"""upsampled_confusion on every backend that has it, against the argmax of F.interpolate and a count; and predictions of many classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import ALL, check_ops, usable

import spcl_fast as sf

OP = "upsampled_confusion"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def problem(low=(5, 7), high=(33, 50), num_classes=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, num_classes, *low, generator=generator)).to(dtype)
    labels = torch.randint(0, num_classes, (2, *high), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -7
    return logits, labels


def counted(logits, labels, align_corners):
    """The matrix in float64, and how many pixels have two best logits closer than 1e-5: they may go either way."""
    up = F.interpolate(logits.double(), labels.shape[1:], mode="bilinear", align_corners=align_corners)
    labelled, classes = labels != -7, logits.shape[1]
    pair = labels[labelled] * classes + up.argmax(1)[labelled]
    top = up.topk(2, 1).values if classes > 1 else torch.zeros(1, 2, 1, 1)
    return torch.bincount(pair, minlength=classes**2).view(classes, classes), int((top[:, 0] - top[:, 1] < 1e-5).sum())


@pytest.mark.parametrize("backend", usable(OP, among=ALL))
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "classes"),
    [((5, 7), (33, 50), 5), ((6, 5), (6, 5), 19), ((7, 9), (4, 3), 3), ((2, 3), (9, 8), 300)],
)
def test_it_is_argmax_and_a_count(backend, align_corners, low, high, classes):
    logits, labels = problem(low, high, classes)
    got = sf.upsampled_confusion(logits, labels, align_corners=align_corners, ignore_index=-7, backend=backend)
    expected, close = counted(logits, labels, align_corners)
    assert got.dtype == torch.int64 and got.sum() == (labels != -7).sum()
    assert (got - expected).abs().sum() <= 2 * close and torch.equal(got.sum(1), expected.sum(1))


@pytest.mark.parametrize("backend", usable(OP, among=ALL))
def test_half_floats_bools_and_nothing_labelled(backend):
    logits, labels = problem(num_classes=2, dtype=torch.float16)
    got = sf.upsampled_confusion(logits, labels == 1, ignore_index=-7, backend=backend)
    assert got.sum() == labels.numel() and got[1].sum() == (labels == 1).sum()
    assert sf.upsampled_confusion(logits, torch.full_like(labels, 255), backend=backend).sum() == 0
    assert sf.upsampled_confusion(logits[:0], labels[:0], backend=backend).sum() == 0


@pytest.mark.parametrize("backend", usable(OP, among=ALL))
def test_opcheck_compile_and_export(backend):
    torch._dynamo.reset()
    logits, labels = problem()

    def confusion(logits, labels):
        return sf.upsampled_confusion(logits, labels, ignore_index=-7, backend=backend)

    check_ops(lambda: confusion(logits, labels), "test_schema", "test_faketensor")
    eager = confusion(logits, labels)
    assert torch.equal(torch.compile(confusion, fullgraph=True, backend="aot_eager")(logits, labels), eager)

    class Module(torch.nn.Module):
        def forward(self, logits, labels):
            return confusion(logits, labels)

    assert torch.equal(torch.export.export(Module(), (logits, labels)).module()(logits, labels), eager)


@pytest.mark.parametrize("backend", usable(OP))
def test_a_label_that_is_none_is_named(backend):
    logits, labels = problem()
    labels[1, 2, 3] = 5
    with pytest.raises(ValueError, match=r"label 5 at pixel \(image 1, row 2, column 3\) is outside \[0, 5\)"):
        sf.upsampled_confusion(logits, labels, ignore_index=-7, backend=backend)


@pytest.mark.parametrize("backend", usable("upsampled_prediction", "int32_labels", among=ALL))
def test_predictions_of_more_than_255_classes_are_int32(backend):
    logits, _ = problem((2, 3), (9, 8), 300)
    up = F.interpolate(logits, (9, 8), mode="bilinear", align_corners=True).softmax(1).max(1)
    thresholds = torch.full((300,), float(up.values.median()) + 1e-5)
    got = sf.upsampled_prediction(logits, (9, 8), thresholds=thresholds, ignore_index=-1, backend=backend)
    assert got.labels.dtype == torch.int32 and (up.indices > 255).any()
    assert torch.equal(got.labels, up.indices.where(up.values >= thresholds[0], -1).int())
    assert sf.upsampled_prediction(logits[:, :255], (9, 8), backend=backend).labels.dtype == torch.uint8
