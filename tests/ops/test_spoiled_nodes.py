"""Nodes that are NaN or infinite: which pixels of the up-sampled ops they reach is F.interpolate's rule, on every backend.

A pixel of the cell [c, c + 1] is reached by each of the cell's nodes, also by one of weight 0; an axis that keeps its size is not
interpolated. -inf of weight 0 alone does not count: F.interpolate has NaN there, and a masked class would spoil its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, call, run, usable
from problems import BINARY, CONFUSION, CROSS, PREDICTION, problem
from torch import Tensor

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
INF, NAN = torch.inf, torch.nan
CLASSES, LOW = 4, (5, 6)
SIZES = [  # pixels that lie on nodes, on some or on none; of one axis or both; equal sizes; fewer pixels than nodes
    ((9, 11), True), ((13, 16), True), ((5, 11), True), ((9, 6), True), ((5, 6), True), ((3, 3), True), ((7, 9), True),
    ((15, 18), False), ((10, 12), False), ((5, 6), False), ((5, 12), False), ((3, 2), False),
]  # fmt: skip
NODES = {  # of the second image: class, row, column, value
    "nan": [(2, 2, 3, NAN)],
    "nan in the first and last node": [(1, 0, 0, NAN), (3, 4, 5, NAN)],
    "inf": [(2, 2, 3, INF)],
    "inf next to inf": [(2, 2, 3, INF), (2, 2, 4, INF), (2, 3, 3, INF)],
    "inf of two classes": [(3, 2, 3, INF), (1, 2, 2, INF)],
    "inf, and NaN of a later class": [(1, 2, 3, INF), (3, 2, 3, NAN)],
    "NaN, and inf of a later class": [(1, 2, 3, NAN), (3, 2, 3, INF)],
    "NaN next to -inf": [(2, 2, 3, NAN), (2, 2, 4, -INF), (2, 1, 3, -INF)],
    "inf next to -inf": [(2, 2, 3, INF), (2, 2, 2, -INF)],
    "-inf": [(2, 2, 3, -INF), (2, 2, 4, -INF)],
}


class Case(NamedTuple):
    logits: Tensor
    labels: Tensor
    z: Tensor  # [B, K, H, W] float64: F.interpolate, a masked class finite; NaN and inf where a node is
    masked: Tensor  # [B, K, H, W]: classes with a part of -inf

    @property
    def spoiled(self) -> Tensor:
        """[B, K, H, W]"""
        return self.z.isnan() | (self.z == INF)

    @property
    def predicted(self) -> Tensor:
        """[B, H, W]: the first of the spoiled classes, and else of the largest."""
        low = torch.where(self.masked, -1e30, self.z)
        return low.where(~self.spoiled, 1e30).argmax(1)


def case_of(name: str, size: tuple[int, int], align_corners: bool) -> Case:
    drawn = problem((2, 1, *LOW), CLASSES, size, scale=1.0)
    logits = drawn.logits.clone()
    for k, i, j, value in NODES[name]:
        logits[1, k, i, j] = value

    def up(nodes):
        return F.interpolate(nodes.double(), size, mode="bilinear", align_corners=align_corners)

    return Case(logits, drawn.labels, up(logits.where(logits != -INF, 0.0)), up((logits == -INF).double()) > 1e-9)


SLOW_SIZES = (((9, 11), True), ((5, 11), True), ((10, 12), False), ((3, 2), False))  # for Triton's interpreter
SLOW_NODES = ("nan", "nan in the first and last node", "inf, and NaN of a later class", "NaN next to -inf", "-inf")


def on_each_case(*ops: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("op", "backend", "name", "size", "align_corners"),
        [
            pytest.param(op, backend, name, *size, id=f"{op}-{name}-{size[0]}-{size[1]}-{backend}")
            for op in ops
            for backend in usable(op, among=ALL)
            for size in (SLOW_SIZES if backend == "triton" else SIZES)
            for name in (SLOW_NODES if backend == "triton" else NODES)
        ],
    )


@on_each_case(PREDICTION)
def test_prediction_is_nan_where_interpolation_is(op, backend, name, size, align_corners):
    case = case_of(name, size, align_corners)
    got = call(getattr(sf, op), backend, logits=case.logits, size=size, align_corners=align_corners)
    assert torch.equal(got.confidence.isnan(), case.spoiled.any(1))
    assert torch.equal(got.labels.long(), case.predicted)


@on_each_case(CONFUSION)
def test_confusion_counts_the_class_that_is_nan(op, backend, name, size, align_corners):
    case = case_of(name, size, align_corners)
    given = {"logits": case.logits, "labels": case.labels, "align_corners": align_corners}
    there = case.labels != 255
    pair = (case.labels.long() * CLASSES + case.predicted)[there]
    expected = torch.bincount(pair, minlength=CLASSES**2).view(CLASSES, CLASSES)
    assert torch.equal(call(getattr(sf, op), backend, **given), expected)


def losses(case: Case, op: str) -> Tensor:
    """[B, H, W], of spoiled pixels something that is not finite."""
    z, labels = case.z.masked_fill(case.masked & ~case.spoiled, -INF), case.labels.long()
    if op == CROSS:
        return F.cross_entropy(z, labels, ignore_index=255, reduction="none")
    there = labels != 255
    target = F.one_hot(labels.where(there, 0), CLASSES).movedim(3, 1).double()
    of_class = F.softplus(z) - torch.where(target == 0, 0, z)
    return of_class.sum(1).where(there, 0)


@on_each_case(CROSS, BINARY)
def test_losses_are_nan_where_interpolation_is(op, backend, name, size, align_corners):
    """What a sigmoid's loss near an infinite node is depends on how its pixel is interpolated; no more is said of it."""
    case = case_of(name, size, align_corners)
    given = {"logits": case.logits, "labels": case.labels}
    settings = {"align_corners": align_corners, "reduction": "none"}
    got, dlogits = run(getattr(sf, op), given, ["logits"], backend, **settings)
    spoiled = case.spoiled.any(1) & (case.labels != 255)
    certain = spoiled if op == CROSS else case.z.isnan().any(1) & spoiled & ~(case.z == INF).any(1)
    has_inf = INF in [value for *_, value in NODES[name]]
    assert got[certain].isnan().all() or (op == BINARY and has_inf)
    torch.testing.assert_close(got[~spoiled].double(), losses(case, op)[~spoiled], rtol=1e-4, atol=1e-5)
    assert dlogits[0].isfinite().all()
    if has_inf:
        return
    reached = nodes_reached(case, op, size, align_corners)
    if size[0] != LOW[0] and size[1] != LOW[1]:
        assert torch.equal(dlogits.isnan(), reached)
    else:  # kernels that own cells may spoil the next node, too
        near = F.max_pool2d(reached.double(), 3, 1, 1) > 0
        assert not (reached & ~dlogits.isnan()).any() and not (dlogits.isnan() & ~near).any()


def nodes_reached(case: Case, op: str, size: tuple[int, int], align_corners: bool) -> Tensor:
    """[B, K, h, w]: where the gradient of F.interpolate is NaN if that of its spoiled pixels is."""
    of_class = case.spoiled if op == BINARY else case.spoiled.any(1, keepdim=True).expand_as(case.spoiled)
    dz = torch.where(of_class & (case.labels != 255)[:, None], NAN, 1.0).double()
    nodes = torch.zeros(*case.logits.shape, dtype=torch.float64, requires_grad=True)
    up = F.interpolate(nodes, size, mode="bilinear", align_corners=align_corners)
    return torch.autograd.grad(up, nodes, dz)[0].isnan()
