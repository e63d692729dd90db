"""upsampled_confusion on every backend that has it, against the argmax of F.interpolate and a count."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, NO_BAD_LABEL, ON_GPU, call, check_ops, flag, home, on_each_dtype, usable
from problems import CONFUSION, CROSS, problem
from shapes import SHAPES, Shape, on_each_shape

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EVERY = usable(CONFUSION, among=ALL)
SHAPES_OF_CONFUSION = (
    *(shape for shape in SHAPES[CROSS] if shape.num_classes < 255),
    Shape("many pixels", (2, 19, 16, 24), 19, (64, 90), too_slow=("triton",)),
    Shape("one class more than a byte can say", (1, 256, 1, 2), 256, (2, 3)),
    Shape("more classes than a byte can say", (2, 300, 2, 3), 300, (9, 8), too_slow=("triton",)),
)


def confusion(backend: str, logits, labels, **settings):
    return call(sf.upsampled_confusion, backend, logits=logits, labels=labels, **settings)


@pytest.mark.parametrize(("backend", "shape"), on_each_shape(CONFUSION, shapes=SHAPES_OF_CONFUSION))
def test_it_is_argmax_and_a_count(backend, shape):
    p, classes = shape.problem(), shape.num_classes
    labels = p.labels.where(p.labels != 255, -7)
    for align_corners in (True, False):
        truth = oracle.prediction(p.logits, shape.size, align_corners=align_corners)
        clear = truth["margin"] > 1e-5 * truth["confidence"]  # which of two equal ones is the largest is rounding
        if classes == 1:
            clear = torch.ones_like(clear)
        counted = labels.where(clear, -7)
        got = confusion(backend, p.logits, counted, align_corners=align_corners, ignore_index=-7)
        pair = (counted * classes + truth["labels"])[counted != -7]
        assert got.dtype == torch.int64
        assert torch.equal(got, torch.bincount(pair, minlength=classes**2).view(classes, classes))
        whole = confusion(backend, p.logits, labels, align_corners=align_corners, ignore_index=-7)
        assert torch.equal(whole.sum(1), torch.bincount(labels[labels != -7], minlength=classes))
        assert clear.double().mean() > 0.9


@pytest.mark.parametrize(("backend", "dtype"), on_each_dtype(CONFUSION))
def test_half_floats_bools_and_nothing_labelled(backend, dtype):
    p = problem((2, 1, 5, 7), 2, (33, 50), dtype)
    got = confusion(backend, p.logits, p.labels == 1, ignore_index=-7)
    assert got.sum() == p.labels.numel() and got[1].sum() == (p.labels == 1).sum()
    assert confusion(backend, p.logits, torch.full_like(p.labels, 255)).sum() == 0
    assert confusion(backend, p.logits[:0], p.labels[:0]).sum() == 0


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -2.4e38])
@pytest.mark.parametrize("size", [(9, 11), (20, 31)])
@pytest.mark.parametrize("backend", EVERY)
def test_a_masked_class_is_never_counted(backend, size, low):
    p = problem((2, 1, 9, 11), 7, size)
    p.logits[:, 0] = low
    counts = confusion(backend, p.logits, p.labels)
    assert counts[:, 0].sum() == 0 and counts.sum() == (p.labels != 255).sum()


@pytest.mark.parametrize("backend", EVERY)
def test_confusion_opcheck_compile_and_export(backend):
    torch._dynamo.reset()
    p = problem((2, 1, 5, 7), 5, (13, 20))
    logits, labels = p.logits.to(home(backend)), p.labels.to(home(backend))

    def counted(logits, labels):
        return sf.upsampled_confusion(logits, labels, backend=backend)

    check_ops(lambda: counted(logits, labels), "test_schema", "test_faketensor")
    eager = counted(logits, labels)
    assert torch.equal(torch.compile(counted, fullgraph=True, backend="aot_eager")(logits, labels), eager)

    class Module(torch.nn.Module):
        def forward(self, logits, labels):
            return counted(logits, labels)

    assert torch.equal(torch.export.export(Module(), (logits, labels)).module()(logits, labels), eager)


@pytest.mark.parametrize("num_classes", [2, 5, 300])
@pytest.mark.parametrize("backend", usable(CONFUSION))
def test_a_label_that_is_none_is_named(backend, num_classes):
    p = problem((2, 1, 5, 7), num_classes, (33, 50))
    p.labels[1, 2, 3] = num_classes
    text = rf"label {num_classes} at pixel \(image 1, row 2, column 3\) is outside \[0, {num_classes}\)"
    with pytest.raises(ValueError, match=text):
        confusion(backend, p.logits, p.labels)


@pytest.mark.parametrize("backend", usable(CONFUSION, among=ON_GPU))
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_label_that_is_none_is_left_out_and_raises_the_flag(backend):
    p = problem((2, 1, 3, 4), 5, (9, 11))
    p.labels[0, 0, 0] = 77
    flag(backend).fill_(NO_BAD_LABEL)
    got = confusion(backend, p.logits, p.labels)
    assert got.sum() == ((p.labels != 255) & (p.labels != 77)).sum() and flag(backend) == 77
    flag(backend).fill_(NO_BAD_LABEL)


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (3, 4)])
@pytest.mark.parametrize("size", [(4, 5), (7, 9), (9, 13), (2, 3)])
@pytest.mark.parametrize("backend", EVERY)
def test_a_nan_logit_is_the_largest_as_in_argmax(backend, size, place):
    p = problem((2, 1, 4, 5), 6, size, ignored=0.0)
    p.logits[0, [3, 5], place[0], place[1]] = torch.nan  # argmax has the first of them
    p.logits[1, 2] = -torch.inf
    for align_corners in (True, False):
        certain, reached = oracle.nan_pixels(p.logits, size, align_corners=align_corners)
        masked = p.logits.nan_to_num(1e30, neginf=-1e30)
        truth = F.interpolate(masked, size, mode="bilinear", align_corners=align_corners).argmax(1)
        labels = p.labels.where(certain | ~reached, 255)
        pair = (labels * 6 + truth)[labels != 255]
        got = confusion(backend, p.logits, labels, align_corners=align_corners)
        assert torch.equal(got, torch.bincount(pair, minlength=36).view(6, 6))
        assert size == (2, 3) or got[:, 3].sum() > 0
