"""The same inputs give the same bits, again and again, with any number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import on_backends
import pytest
import torch
from on_backends import usable
from torch import Tensor

import spcl_fast as sf

CLASSES, DIM = 19, 24
Results = tuple[Tensor, ...]


def contrast(dtype: torch.dtype, channels_last: bool) -> Results:
    features = torch.randn(2, DIM, 17, 23).to(dtype)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    features.requires_grad_()
    prototypes = torch.randn(CLASSES, DIM, requires_grad=True)
    loss = sf.prototype_contrastive_loss(features, labels_of(33, 47), prototypes, temperature=0.1)
    return (loss.detach(), *torch.autograd.grad(loss, (features, prototypes)))


def moments(dtype: torch.dtype, channels_last: bool) -> Results:
    features = torch.randn(2, DIM, 17, 23).to(dtype)
    features = features.to(memory_format=torch.channels_last) if channels_last else features
    found = sf.class_moments(features, labels_of(17, 23), CLASSES, squares=True)
    assert found.squares is not None
    return found.sums, found.counts, found.squares


def cross_entropy(dtype: torch.dtype, channels_last: bool) -> Results:
    logits = torch.randn(2, CLASSES, 9, 13).to(dtype)
    logits = (logits.to(memory_format=torch.channels_last) if channels_last else logits).requires_grad_()
    loss = sf.upsampled_cross_entropy(logits, labels_of(66, 91))
    return (loss.detach(), *torch.autograd.grad(loss, logits))


def labels_of(height: int, width: int) -> Tensor:
    labels = torch.randint(0, CLASSES, (2, height, width))
    return labels.masked_fill(torch.rand(labels.shape) < 0.2, 255)


OPS: tuple[Callable[[torch.dtype, bool], Results], ...] = (contrast, moments, cross_entropy)
CONFIGURATIONS = [
    pytest.param(op, dtype, last, id=f"{op.__name__}-{str(dtype).removeprefix('torch.')}-{'last' if last else 'first'}")
    for op, dtype, last in itertools.product(OPS, (torch.float32, torch.bfloat16), (False, True))
]
assert len(CONFIGURATIONS) == 12


def assert_same_bits(op: Callable[[torch.dtype, bool], Results], dtype: torch.dtype, last: bool, repeats: int) -> None:
    before, first = torch.get_num_threads(), None
    try:
        for repeat in range(repeats):
            torch.set_num_threads((1, 2, 4)[repeat % 3])
            torch.manual_seed(0)
            found = op(dtype, last)
            first = found if first is None else first
            assert all(map(torch.equal, found, first)), f"repeat {repeat}, {torch.get_num_threads()} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("op", "dtype", "last"), CONFIGURATIONS)
def test_thirty_repeats_on_1_2_and_4_threads_are_the_same_bits(op, dtype, last):
    assert_same_bits(op, dtype, last, 30)


@pytest.mark.soak
@pytest.mark.parametrize(("op", "dtype", "last"), CONFIGURATIONS)
def test_a_thousand_repeats_on_1_2_and_4_threads_are_the_same_bits(op, dtype, last):
    assert_same_bits(op, dtype, last, 1000)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("backend", usable("upsampled_binary_cross_entropy", "focal"))
def test_sigmoids_of_many_pixels_have_the_same_bits_on_any_number_of_threads(backend, gamma):
    """So many that threads share the elementwise work: some of torch's functions have other bits where a thread's share ends."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, CLASSES, 33, 47, requires_grad=True), labels_of(66, 94)

    def computed() -> Results:
        loss = sf.upsampled_binary_cross_entropy(logits, labels, gamma=gamma, backend=backend)
        return (loss.detach(), *torch.autograd.grad(loss, logits))

    on_backends.assert_same_bits(backend, computed)


@pytest.mark.parametrize("backend", usable("prototype_contrastive_loss", "sigmoid", "probabilities"))
def test_sigmoids_of_many_soft_labels_have_the_same_bits_on_any_number_of_threads(backend):
    torch.manual_seed(0)
    features, prototypes = torch.randn(1, 8, 66, 47, requires_grad=True), torch.randn(CLASSES, 8, requires_grad=True)
    soft = torch.rand(1, CLASSES, 66, 47)

    def computed() -> Results:
        loss = sf.prototype_contrastive_loss(
            features, soft, prototypes, temperature=0.5, loss="sigmoid", backend=backend
        )
        return (loss.detach(), *torch.autograd.grad(loss, (features, prototypes)))

    on_backends.assert_same_bits(backend, computed)
