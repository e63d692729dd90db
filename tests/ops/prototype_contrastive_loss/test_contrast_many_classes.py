"""Sums over thousands of classes: no further from float64 than twice eager PyTorch, in value and in every gradient."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from on_backends import ALL, run, usable
from problems import CONTRAST

import spcl_fast as sf

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter
LEAVES = ("features", "prototypes", "bias", "temperature")
NEEDS = ("bias", "dbias", "tensor_temperature", "dtemperature")


class Case(NamedTuple):
    name: str
    needs: tuple[str, ...] = ()
    temperature: float = 0.1
    normalize: bool = True
    images: int = 1  # of several, each has a bias of its own
    soft: str = ""  # "equal", "normalised" or "raw" probabilities
    settings: dict = {}  # noqa: RUF012

    def given(self, classes: int, pixels: int, seed: int) -> dict:
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(self.images, 32, 1, pixels, generator=generator)
        return {
            "features": features if self.normalize else 0.3 * features,
            "prototypes": F.normalize(torch.randn(classes, 32, generator=generator), dim=1),
            "bias": torch.randn(*((self.images,) if self.images > 1 else ()), classes, generator=generator),
            "temperature": torch.tensor(self.temperature),
            "normalize": self.normalize,
            "ignore_index": -1,
            "labels": self.labels(classes, pixels, generator),
            **self.settings,
        }

    def labels(self, classes: int, pixels: int, generator: torch.Generator) -> torch.Tensor:
        if not self.soft:
            return torch.randint(0, classes, (self.images, 1, pixels), generator=generator)
        rows = torch.rand(self.images, classes, 1, pixels, generator=generator)
        return {"equal": torch.full_like(rows, 1 / classes), "normalised": F.normalize(rows, 1, 1), "raw": rows}[
            self.soft
        ]


CASES = (
    Case("plain"),
    Case("cool", temperature=100.0),
    Case("smoothing", ("label_smoothing",), settings={"label_smoothing": 0.1}),
    Case("raw features", ("label_smoothing",), 1.0, False, settings={"label_smoothing": 0.1}),
    Case("nothing but smoothing", ("label_smoothing",), settings={"label_smoothing": 1.0}),
    Case("nothing but smoothing, cool", ("label_smoothing",), 100.0, settings={"label_smoothing": 1.0}),
    Case("equal probabilities", ("probabilities",), soft="equal"),
    Case("probabilities", ("probabilities",), soft="normalised"),
    Case("cool probabilities", ("probabilities",), 100.0, soft="normalised"),
    Case("probabilities of any sum", ("probabilities",), soft="raw"),
    Case("sigmoid", ("sigmoid",), settings={"loss": "sigmoid"}),
)
# classes, pixels, draws: of few draws eager may be right by chance
SIZES = {
    "reference": [(1000, 6, 6)],
    "cpu": [(1000, 60, 6), (8192, 8, 4)],
    "triton": [(600, 4, 4)],
    "cuda": [(1000, 6, 6), (8192, 4, 4)],
}
EACH = [
    pytest.param(backend, size, case, id=f"{case.name}-{size[0]}-{backend}")
    for case in CASES
    for backend in usable(CONTRAST, *NEEDS, *case.needs, among=ALL)
    for size in SIZES[backend]
]


def errors(case: Case, size: tuple[int, int, int], backend: str) -> dict[str, torch.Tensor]:
    """name -> [draws, 3]: rms error of ours and of eager against float64, largest magnitude."""
    classes, pixels, draws = size
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("loss", *LEAVES)}
    for seed in range(draws):
        given = case.given(classes, pixels, seed)
        got = run(sf.prototype_contrastive_loss, given, LEAVES, backend)
        eager = run(oracle.contrast, given, LEAVES, dtype=torch.float32)
        truth = run(oracle.contrast, given, LEAVES, leaf_dtype=torch.float64)
        for name, g, e, t in zip(rows, got, eager, truth, strict=True):
            rows[name].append(
                torch.stack([(g - t).square().mean().sqrt(), (e - t).square().mean().sqrt(), t.abs().max()])
            )
    return {name: torch.stack(row) for name, row in rows.items()}


@pytest.mark.parametrize(("backend", "size", "case"), EACH)
def test_sums_over_many_classes_are_as_accurate_as_eager(backend, size, case):
    for name, rows in errors(case, size, backend).items():
        ours, eager, scale = rows.square().mean(0).sqrt().tolist()
        limit = 2 * eager + torch.finfo(torch.float32).eps / 2 * scale
        assert ours <= limit, f"{name}: error {ours:.2e}, eager {eager:.2e}, limit {limit:.2e}, values of {scale:.2e}"


# as many classes as a tile holds the logits of, and streamed ones
OF_BIASES = [
    pytest.param(backend, size, smoothing, id=f"smoothing {smoothing}-{size[0]}-{backend}")
    for smoothing in (0.0, 0.1)
    for backend in usable(CONTRAST, *NEEDS, *(["label_smoothing"] if smoothing else []), among=("cpu",))
    for size in ((4096, 9, 3), (65536, 3, 2))
]


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("backend", "size", "smoothing"), OF_BIASES)
def test_biases_of_thousands_of_classes_have_gradients_as_accurate_as_eager(
    backend, size, smoothing, images, temperature
):
    """In the mean, which the many small ones make, and in the mean square, which those of the labels make; chance is no excuse."""
    classes, pixels, draws = size
    case = Case("bias", (), temperature, images=images, settings={"label_smoothing": smoothing})
    rows = []
    for seed in range(draws):
        given = case.given(classes, pixels, seed)
        got = run(sf.prototype_contrastive_loss, given, ["bias"], backend)[1]
        eager = run(oracle.contrast, given, ["bias"], dtype=torch.float32)[1]
        truth = run(oracle.contrast, given, ["bias"], leaf_dtype=torch.float64)[1]
        assert got.shape == ((2, classes) if images == 2 else (classes,))
        for gradient in (got, eager):
            error = (gradient - truth).abs()
            rows.append(torch.stack([error.mean(), error.square().mean().sqrt()]))
    ours, theirs = torch.stack(rows).view(draws, 2, 2).mean(0)
    assert (ours <= 2 * theirs).all(), f"errors {ours.tolist()}, of eager {theirs.tolist()}"
