"""Calls without end take no memory: the resident set of the process stays where it is."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spcl_fast as sf

STATUS = Path("/proc/self/statm")
PAGE_BYTES = 4096
LIMIT_BYTES = 1 << 20  # of growth over all calls
CLASSES, DIM = 5, 8


def resident_bytes() -> int:
    gc.collect()
    return int(STATUS.read_text().split()[1]) * PAGE_BYTES


def calls() -> dict[str, Callable[[], object]]:
    """One call of every op, forwards and backwards where it has one, on small tensors."""
    torch.manual_seed(0)
    features = torch.randn(2, DIM, 6, 7, requires_grad=True)
    logits = torch.randn(2, CLASSES, 6, 7, requires_grad=True)
    labels = torch.randint(0, CLASSES, (2, 12, 14), dtype=torch.uint8)
    prototypes = torch.randn(CLASSES, DIM, requires_grad=True)
    bank = sf.PrototypeBank(CLASSES, DIM)
    plain_features, plain_logits = features.detach(), logits.detach()

    def contrast() -> None:
        loss = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1)
        torch.autograd.grad(loss, (features, prototypes))

    def cross_entropy() -> None:
        torch.autograd.grad(sf.upsampled_cross_entropy(logits, labels), logits)

    def refused() -> None:
        with pytest.raises(ValueError, match="is outside"):
            sf.class_moments(plain_features, labels + CLASSES, CLASSES)

    return {
        "prototype_contrastive_loss": contrast,
        "upsampled_cross_entropy": cross_entropy,
        "class_moments": lambda: sf.class_moments(plain_features, labels, CLASSES, squares=True),
        "upsampled_prediction": lambda: sf.upsampled_prediction(plain_logits, (12, 14)),
        "PrototypeBank.update_": lambda: bank.update_(plain_features, labels),
        "an error": refused,
    }


WINDOWS = 4


def growth_bytes(call: Callable[[], object], count: int) -> int:
    """Growth over `count` calls, from the window of them that grew least: what is loaded or cached once is no leak."""
    for _ in range(300):
        call()
    grown = []
    for _ in range(WINDOWS):
        before = resident_bytes()
        for _ in range(count // WINDOWS):
            call()
        grown.append(resident_bytes() - before)
    return WINDOWS * min(grown)


def test_a_leak_of_a_page_is_seen():
    kept: list[mmap.mmap] = []  # pages of their own: a byte array may find room that earlier tests left

    def leak() -> None:
        kept.append(mmap.mmap(-1, mmap.PAGESIZE))
        kept[-1].write(b"x")

    assert growth_bytes(leak, 1000) > LIMIT_BYTES


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc to see the resident set")
@pytest.mark.parametrize("name", calls())
def test_a_thousand_calls_grow_no_memory(name):
    assert growth_bytes(calls()[name], 1000) <= LIMIT_BYTES


@pytest.mark.soak
@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc to see the resident set")
@pytest.mark.parametrize("name", calls())
def test_ten_thousand_calls_grow_no_memory(name):
    assert growth_bytes(calls()[name], 10_000) <= LIMIT_BYTES
