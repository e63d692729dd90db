"""Losses against a teacher's soft assignments: DINO, iBOT, SwAV, CAPI. Both sides have the last layer."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.family.authors import Authors, Nothing, OneProcess
from benchmarks.family.case import Case, drawn, generator, gradients, unit
from spcl_fast import losses

VIEWS, CROPS = 10, 8  # DINO: 2 global and 8 local; SwAV: 2 and 6


def _loss_class(authors: Authors, repository: str, file: str, name: str):
    unused = ("PIL", "torchvision", "utils", "vision_transformer", "models", "models.head", "loader", "tensorboardX")
    module = authors.load(repository, file, dict.fromkeys((*unused, "evaluation.unsupervised.unsup_cls")))
    module.dist = OneProcess
    return getattr(module, name)


# ---- DINO -------------------------------------------------------------------------------------------------------------


def _dino_problem(images: int, num_prototypes: int, dim: int) -> SimpleNamespace:
    return SimpleNamespace(
        student=unit(VIEWS * images, dim).requires_grad_(),
        teacher=unit(2 * images, dim, seed=1),
        weight=unit(num_prototypes, dim, seed=2).requires_grad_(),
        teacher_weight=unit(num_prototypes, dim, seed=3),
    )


def _dino_authors(authors: Authors, given: SimpleNamespace):
    kind = _loss_class(authors, "dino", "main_dino.py", "DINOLoss")
    criterion = kind(len(given.weight), VIEWS, 0.04, 0.04, 0, 1)

    def step():
        with torch.no_grad():
            teacher = given.teacher @ given.teacher_weight.t()
        loss = criterion(given.student @ given.weight.t(), teacher, 0)
        return gradients(loss, student=given.student, weight=given.weight) | {"centre": criterion.center[0]}

    return step


def _dino_ours(given: SimpleNamespace):
    criterion = losses.DINOLoss(len(given.weight))

    def step():
        views = given.student.chunk(VIEWS), given.teacher.chunk(2)
        loss = criterion(*views, given.weight, given.teacher_weight, 0.04)
        return gradients(loss, student=given.student, weight=given.weight) | {"centre": criterion.centre.centre}

    return step


# ---- iBOT -------------------------------------------------------------------------------------------------------------


def _ibot_problem(images: int, side: int, num_prototypes: int, dim: int) -> SimpleNamespace:
    """Two global views; a fifth of the tokens is masked."""
    tokens = side * side
    return SimpleNamespace(
        student=unit(2 * images, tokens, dim).requires_grad_(),
        teacher=unit(2 * images, tokens, dim, seed=1),
        masks=torch.rand(2 * images, side, side, generator=generator(4)) < 0.2,
        weight=unit(num_prototypes, dim, seed=2).requires_grad_(),
        teacher_weight=unit(num_prototypes, dim, seed=3),
    )


def _ibot_authors(authors: Authors, given: SimpleNamespace):
    kind = _loss_class(authors, "ibot", "main_ibot.py", "iBOTLoss")
    classes = len(given.weight)
    criterion = kind(4, classes, 2, 0, 0.04, 0.04, 0.04, 0.04, 0, 1)
    cls = torch.zeros(len(given.student), 4)  # the class tokens' part is DINO's; of four classes it costs nothing

    def step():
        with torch.no_grad():
            teacher = given.teacher @ given.teacher_weight.t()
        student = given.student @ given.weight.t()
        found = criterion((cls, student), (cls, teacher), None, given.masks.chunk(2), 0)
        return gradients(found["patch"], student=given.student, weight=given.weight) | {
            "centre": criterion.center2[0, 0]
        }

    return step


def _ibot_ours(given: SimpleNamespace):
    criterion = losses.IBOTPatchLoss(len(given.weight))

    def step():
        views = given.student.chunk(2), given.teacher.chunk(2), [mask.flatten(1) for mask in given.masks.chunk(2)]
        loss = criterion(*views, given.weight, given.teacher_weight, 0.04)
        return gradients(loss, student=given.student, weight=given.weight) | {"centre": criterion.centre.centre}

    return step


# ---- SwAV -------------------------------------------------------------------------------------------------------------


def _swav_problem(images: int, num_prototypes: int, dim: int) -> SimpleNamespace:
    weight = nn.Parameter(unit(num_prototypes, dim, seed=2))
    return SimpleNamespace(features=unit(CROPS * images, dim).requires_grad_(), weight=weight, images=images)


def _swav_authors(authors: Authors, given: SimpleNamespace):
    """Their loss is written into the training loop: `train` runs it for one batch, on a net that is its last layer."""
    unused = dict.fromkeys(("apex", "apex.parallel.LARC", "src.utils", "src.multicropdataset", "src.resnet50"))
    module = authors.load("swav", "main_swav.py", unused)
    module.dist = OneProcess
    module.args = SimpleNamespace(
        crops_for_assign=(0, 1), nmb_crops=(2, 6), temperature=0.1, epsilon=0.05, sinkhorn_iterations=3, world_size=1,
        use_fp16=False, freeze_prototypes_niters=0, rank=1,
    )  # fmt: skip
    seen: dict[str, float] = {}
    module.AverageMeter = lambda: SimpleNamespace(update=lambda value, n=1: seen.update(last=value), avg=0)
    heads = nn.Linear(*reversed(given.weight.shape), bias=False)
    heads.weight = given.weight

    class Net(nn.Module):
        def forward(self, inputs):
            return given.features, heads(given.features)

    net = Net()
    net.module = SimpleNamespace(prototypes=heads)
    inputs = [torch.empty(given.images)]
    meters = {"update": lambda value, n: seen.update(loss=value)}

    def step():
        given.features.grad = given.weight.grad = None
        order = iter((Nothing(), Nothing(), SimpleNamespace(**meters, avg=0)))  # times, times, losses
        module.AverageMeter = lambda: next(order)
        module.train(
            [inputs], net, SimpleNamespace(param_groups=[], zero_grad=lambda: None, step=lambda: None), 0, [0], None
        )
        found = {"features": given.features.grad, "weight": given.weight.grad, "loss": torch.tensor(seen["loss"])}
        given.features.grad = given.weight.grad = None
        return found

    return step


def _swav_ours(given: SimpleNamespace):
    criterion = losses.SwAVLoss()

    def step():
        with torch.no_grad():
            given.weight.copy_(F.normalize(given.weight, dim=1))
        loss = criterion(given.features.chunk(CROPS), given.weight)
        return gradients(loss, features=given.features, weight=given.weight)

    return step


# ---- CAPI -------------------------------------------------------------------------------------------------------------


def _capi_problem(positions: int, images: int, num_prototypes: int, dim: int) -> SimpleNamespace:
    return SimpleNamespace(
        x=drawn(positions, images, dim),
        weight=drawn(num_prototypes, dim, seed=1),
        bias=0.1 * drawn(num_prototypes, seed=2),
    )


def _capi_step(head: nn.Module, given: SimpleNamespace):
    with torch.no_grad():
        head.layer.weight.copy_(given.weight)
        head.layer.bias.copy_(given.bias)

    def step():
        _, loss = head(given.x)
        return gradients(loss, weight=head.layer.weight, bias=head.layer.bias)

    return step


def _capi_authors(authors: Authors, given: SimpleNamespace):
    unused = dict.fromkeys(("jaxtyping", "omegaconf", "utils"))
    kind = authors.load("capi", "model.py", unused).OnlineClustering
    head = kind(given.x.shape[2], len(given.weight), bias=True, n_sk_iter=3, target_temp=0.06, pred_temp=0.12)
    return _capi_step(head, given)


def _capi_ours(given: SimpleNamespace):
    return _capi_step(losses.CAPIClustering(given.x.shape[2], len(given.weight)), given)


CASES = (
    Case(
        "dino", "dino", "DINO: 64 images, 2 + 8 views, K 65 536, bottleneck 256",
        {"images": 64, "num_prototypes": 65536, "dim": 256}, {"images": 2, "num_prototypes": 50, "dim": 8}, _dino_problem,
        _dino_authors, _dino_ours, theirs_gb=2.0,
    ),
    Case(
        "ibot", "ibot", "iBOT, patches: 2 x 8 images of 14x14 tokens, K 8192, bottleneck 256",
        {"images": 8, "side": 14, "num_prototypes": 8192, "dim": 256},
        {"images": 2, "side": 3, "num_prototypes": 50, "dim": 8}, _ibot_problem, _ibot_authors, _ibot_ours, theirs_gb=2.0,
    ),
    Case(
        "swav", "swav", "SwAV: 128 images, 2 + 6 crops, K 3000, D 128",
        {"images": 128, "num_prototypes": 3000, "dim": 128}, {"images": 8, "num_prototypes": 20, "dim": 8}, _swav_problem,
        _swav_authors, _swav_ours,
    ),
    Case(
        "capi", "capi", "CAPI, clustering: 196 positions of 64 images, K 4096, D 384",
        {"positions": 196, "images": 64, "num_prototypes": 4096, "dim": 384},
        {"positions": 3, "images": 8, "num_prototypes": 20, "dim": 8}, _capi_problem, _capi_authors, _capi_ours,
    ),
)  # fmt: skip
