"""Losses of up-sampled logits of hundreds or thousands of classes: no further from float64 than twice eager PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import pytest
import torch
from on_backends import ALL, run, usable
from problems import BINARY, CROSS

import spcl_fast as sf


class Drawn(NamedTuple):
    classes: int
    draws: int  # one or two of so few pixels may be right in eager by chance
    low: tuple[int, int] = (2, 3)
    size: tuple[int, int] = (5, 7)


DRAWN = {
    "reference": Drawn(4096, 3),
    "cpu": Drawn(4096, 4),
    "cuda": Drawn(2048, 2),
    # the interpreter takes a second per hundred classes and window; a map this wide has many pixels in one window
    "triton": Drawn(200, 1, (1, 31), (1, 61)),
}


class Case(NamedTuple):
    name: str
    op: str = CROSS
    needs: tuple[str, ...] = ()
    settings: dict = {}  # noqa: RUF012
    class_weight: bool = False
    soft: bool = False

    def given(self, drawn: Drawn, seed: int, temperature: float) -> dict:
        classes, _, low, size = drawn
        generator = torch.Generator().manual_seed(seed)
        scale = {0.05: 0.3, 1.0: 2.0, 100.0: 40.0}[temperature]
        given = {
            "logits": scale * torch.randn(1, classes, *low, generator=generator),
            "labels": torch.randint(0, classes, (1, *size), generator=generator),
            "ignore_index": -1,
            "temperature": temperature,
            "reduction": "none",
            **self.settings,
        }
        if self.class_weight:
            given["class_weight"] = 0.5 + torch.rand(classes, generator=generator)
        if self.soft:
            given |= {"labels": torch.rand(1, classes, *low, generator=generator).softmax(1), "size": size}
        return given


CASES = (
    Case("plain"),
    Case("smoothing", CROSS, ("label_smoothing",), {"label_smoothing": 0.1}),
    Case("nothing but smoothing", CROSS, ("label_smoothing",), {"label_smoothing": 1.0}),
    Case("smoothing, weights", CROSS, ("label_smoothing",), {"label_smoothing": 0.1}, class_weight=True),
    Case("probabilities", CROSS, ("probabilities",), soft=True),
    Case("binary", BINARY),
    Case("focal", BINARY, ("focal",), {"gamma": 2.0}),
)
# of the sums of two hundred classes that of the exponentials alone is exact enough in one chain; the others fail here
SLOW = {"triton": ("smoothing", "probabilities", "binary")}


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{case.name}-{backend}")
        for case in CASES
        for backend in usable(case.op, *case.needs, among=ALL, num_classes=4096)
        if case.name in SLOW.get(backend, [case.name])
    ],
)
def test_losses_of_many_classes_are_as_accurate_as_eager(backend, case, temperature):
    drawn = DRAWN[backend]
    rows: dict[str, list[torch.Tensor]] = {"loss": [], "dlogits": []}
    for seed in range(drawn.draws):
        given = case.given(drawn, seed, temperature)
        formula = given | ({"gamma": given.get("gamma", 0.0)} if case.op == BINARY else {})
        got = run(getattr(sf, case.op), given, ["logits"], backend)
        eager = run(oracle.upsampled, formula, ["logits"], dtype=torch.float32)
        truth = run(oracle.upsampled, formula, ["logits"], leaf_dtype=torch.float64)
        for row, g, e, t in zip(rows.values(), got, eager, truth, strict=True):
            row.append(torch.stack([(g - t).square().mean().sqrt(), (e - t).square().mean().sqrt(), t.abs().max()]))
    for name, row in rows.items():
        ours, eager, scale = torch.stack(row).square().mean(0).sqrt().tolist()
        limit = 2 * eager + torch.finfo(torch.float32).eps / 2 * scale
        assert ours <= limit, f"{name}: error {ours:.2e}, eager {eager:.2e}, limit {limit:.2e}, values of {scale:.2e}"


@pytest.mark.parametrize("backend", usable(CROSS, among=("cpu",), num_classes=65536))
def test_a_sum_over_65536_classes_shows_in_no_label_s_own_gradient(backend):
    """The largest error: of the label's gradient alone, which that sum is subtracted from, a mean over all classes shows nothing."""
    drawn, rows = Drawn(65536, 5), []
    for seed in range(drawn.draws):
        given = CASES[0].given(drawn, seed, 0.05)
        got = run(sf.upsampled_cross_entropy, given, ["logits"], backend)[1]
        eager = run(oracle.upsampled, given, ["logits"], dtype=torch.float32)[1]
        truth = run(oracle.upsampled, given, ["logits"], leaf_dtype=torch.float64)[1]
        rows.append(torch.stack([(gradient - truth).abs().max() for gradient in (got, eager)]))
    ours, theirs = torch.stack(rows).square().mean(0).sqrt().tolist()
    assert ours <= 2 * theirs, f"error {ours:.2e}, eager {theirs:.2e}"
