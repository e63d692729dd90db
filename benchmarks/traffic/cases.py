"""What is counted: ops, shapes, types and layouts. Few pixels, but the channels and classes of the shapes that figures are quoted on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import spcl_fast as sf
from benchmarks.peers import formulas
from benchmarks.problems import contrast_problem, upsampling_problem

# channels and classes of a shape of benchmarks.shapes; a map of few pixels whose rows are aligned to a sector, and one whose are not
SIZES = {"A": (2048, 19), "B": (256, 19), "C": (512, 150), "D": (256, 1900)}
GRIDS = {"even": (16, 16), "odd": (19, 29), "channels_last": (16, 16)}
UPSAMPLED = {"U1": (19, (12, 18), (96, 144)), "U2": (19, (16, 24), (64, 96)), "U3": (150, (8, 10), (32, 40))}
# how far bfloat16 goes: Triton's interpreter multiplies it wrongly, and float16 moves as many bytes
HALF = {"triton": torch.float16, "cuda": torch.bfloat16}


class Case(NamedTuple):
    op: str
    shape: str
    dtype: str  # "float32" or "half"
    layout: str
    learned: bool = False  # are the prototypes learned, too? SPCL's are not

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}, {self.dtype}, {self.layout}" + (
            ", learned prototypes" if self.learned else ""
        )


class Run(NamedTuple):
    """One case, ready to be called."""

    source: Tensor  # whose bytes are the unit: features, or what the up-sampled map would have
    unit_bytes: int
    forward: Callable[[], Tensor]
    wanted: tuple[Tensor, ...]  # whose gradients the backward forms; () has none

    def backward(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, self.wanted, torch.ones_like(value)) if self.wanted else ()


CASES = (
    *(
        Case("prototype_contrastive_loss", shape, dtype, layout)
        for shape in SIZES for dtype in ("float32", "half") for layout in GRIDS
        if layout == "even" or shape in "AB"
    ),
    *(
        Case("prototype_contrastive_loss", shape, dtype, "even", learned=True)
        for shape in SIZES for dtype in ("float32", "half")
    ),
    *(
        Case(op, shape, dtype, layout)
        for op in ("class_moments",) for shape in "ABC" for dtype in ("float32", "half") for layout in GRIDS
        if layout == "even" or shape in "AB"
    ),
    *(
        Case(op, shape, "float32", "even")
        for op in ("upsampled_cross_entropy", "upsampled_prediction", "upsampled_confusion") for shape in UPSAMPLED
    ),
)  # fmt: skip


def _features(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dim, classes = SIZES[case.shape]
    features, labels, prototypes = contrast_problem((1, dim, *GRIDS[case.layout]), classes, dtype)
    if case.layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)
    return features, labels, prototypes


def prepared(case: Case, backend: str) -> Run:
    """backend: one of GPU_BACKENDS, or a formula of `PEERS`."""
    dtype = torch.float32 if case.dtype == "float32" else HALF.get(backend, torch.bfloat16)
    if case.shape in UPSAMPLED:
        return _upsampled(case, backend, dtype)
    features, labels, prototypes = _features(case, dtype)
    unit = features.numel() * features.element_size()
    if case.op == "class_moments":
        classes = len(prototypes)
        forward = (
            PEERS[case.op][backend](features, labels, classes)
            if backend in PEERS[case.op]
            else lambda: sf.class_moments(features, labels, classes, normalize=True, backend=backend)[0]
        )
        return Run(features, unit, forward, ())
    leaves = (features.requires_grad_(), *((prototypes.requires_grad_(),) if case.learned else ()))
    if backend in PEERS[case.op]:
        forward = PEERS[case.op][backend](features, labels, prototypes)
    else:

        def forward() -> Tensor:
            return sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.1, backend=backend)

    return Run(features, unit, forward, leaves)


def _upsampled(case: Case, backend: str, dtype: torch.dtype) -> Run:
    classes, low, high = UPSAMPLED[case.shape]
    logits, labels = upsampling_problem((1, classes, *low), high, dtype)
    unit = classes * high[0] * high[1] * logits.element_size()
    if backend in PEERS[case.op]:
        forward = PEERS[case.op][backend](logits, labels)
    else:
        settings = {"align_corners": True, "backend": backend}
        forward = {
            "upsampled_cross_entropy": lambda: sf.upsampled_cross_entropy(logits, labels, **settings),
            "upsampled_prediction": lambda: sf.upsampled_prediction(logits, high, **settings).labels,
            "upsampled_confusion": lambda: sf.upsampled_confusion(logits, labels, **settings),
        }[case.op]
    wanted = (logits.requires_grad_(),) if case.op == "upsampled_cross_entropy" else ()
    return Run(logits, unit, forward, wanted)


def _confusion(logits: Tensor, labels: Tensor) -> Tensor:
    found = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True).argmax(1)
    kept, classes = labels != 255, logits.shape[1]
    return torch.bincount(labels[kept].long() * classes + found[kept], minlength=classes**2)


# op -> name of a formula -> call with the problem's tensors -> the call that is counted
PEERS: dict[str, dict[str, Callable[..., Callable[[], Tensor]]]] = {
    "prototype_contrastive_loss": {
        "released": lambda *problem: lambda: formulas.released_contrast(*problem, 0.1),
        "eager": lambda *problem: lambda: formulas.channel_first_contrast(*problem, 0.1),
    },
    "class_moments": {
        "released": lambda *problem: lambda: formulas.released_prototypes(*problem),
        "eager": lambda *problem: lambda: formulas.one_hot_sums(*problem),
    },
    "upsampled_cross_entropy": {"eager": lambda *problem: lambda: formulas.interpolate_cross_entropy(*problem, 1.0)},
    "upsampled_prediction": {
        "eager": lambda logits, labels: lambda: formulas.interpolate_prediction(logits, labels.shape[1:])[0]
    },
    "upsampled_confusion": {"eager": lambda *problem: lambda: _confusion(*problem)},
}
