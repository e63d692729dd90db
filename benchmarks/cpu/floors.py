"""The problems of the CPU benchmarks, and what the machine can at best do on them, measured in the same run."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from benchmarks import shapes
from benchmarks.cpu.timing import best_ms
from benchmarks.problems import contrast_problem, upsampling_problem

THREADS = int(os.environ.get("SPCL_FAST_BENCH_THREADS", "2"))


@dataclass(frozen=True)
class Problem:
    name: str
    features: torch.Tensor
    labels: torch.Tensor
    prototypes: torch.Tensor

    @property
    def num_classes(self) -> int:
        return len(self.prototypes)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip("BDhwK", shapes.CONTRAST[self.name], strict=True))


@dataclass(frozen=True)
class UpsampledProblem:
    name: str
    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def sizes(self) -> dict[str, int]:
        low, size = shapes.UPSAMPLED[self.name]
        return dict(zip("BKhwHW", (*low, *size), strict=True))


@functools.lru_cache(maxsize=1)
def make_problem(name: str) -> Problem:
    *shape, num_classes = shapes.CONTRAST[name]
    batch, dim, height, width = shape
    features, labels, prototypes = contrast_problem((batch, dim, height, width), num_classes)
    return Problem(name, features.requires_grad_(), labels, prototypes)


@functools.lru_cache(maxsize=1)
def make_upsampled_problem(name: str) -> UpsampledProblem:
    logits, labels = upsampling_problem(*shapes.UPSAMPLED[name])
    return UpsampledProblem(name, logits.requires_grad_(), labels)


@functools.lru_cache(maxsize=1)
def exp_ms(name: str) -> float:
    """One torch.exp over a map as large as the up-sampled logits, into a map that is there already."""
    (batch, num_classes, *_), size = shapes.UPSAMPLED[name]
    full = torch.randn(batch, num_classes, *size, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(full)
    return best_ms(lambda: torch.exp(full, out=out))


@functools.lru_cache(maxsize=1)
def floors_ms(name: str) -> dict[str, float]:
    """A copy of the features (2 S of traffic, buffers warm), and the two matrix products of the loss by torch.mm."""
    problem = make_problem(name)
    features, prototypes = problem.features.detach(), problem.prototypes
    target, weight = torch.empty_like(features), torch.rand(problem.num_classes, features[0, 0].numel())
    logits, gradient = torch.empty_like(weight), torch.empty_like(features[0]).flatten(1)

    def products() -> None:
        for image in features:
            torch.mm(prototypes, image.flatten(1), out=logits)
            torch.mm(prototypes.t(), weight, out=gradient)

    return {"copy": best_ms(lambda: target.copy_(features)), "products": best_ms(products)}
