"""Peak memory of a stage before its first step: the stage's own step on fake tensors, every storage counted. No GPU, nothing allocated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AugmentConfig, Config, TrainConfig
from ..config.rules import DRIVING, TRAINED
from ..data import Batch
from ..data.augment import output_size
from ..estimators.bank import PrototypeBank
from ..method.context import Context
from ..method.released import released_step, unfold_batch_norm
from ..method.steps import Step, adapt_step, distill_step, supervised_step, warmup_step
from ..models import Discriminator, SegmentationModel, build_model
from ..ops import upsampled_prediction
from ..runs.layout import PHASES
from ..train import memory
from ..train.absorb import AbsorbingSGD
from ..train.lean import LeanModel
from .count import Counted, LiveBytes, cpu_workspace

CATEGORIES = ("weights", "gradients", "optimizer", "data", "activations", "loss", "backward", "workspace")


_PLAIN = {"precision": "fp32", "checkpoint": "none", "offload": False, "accumulate": 1, "absorb_gradients": False}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of one step by category, the peak of each phase, and the floating-point operations of its convolutions."""

    stage: str
    loop: str  # ours | released
    peak_bytes: int
    categories: dict[str, int]
    phases: dict[str, int]
    flops: int
    cuts: tuple[int, ...] = ()  # blocks at which recomputed segments begin
    host_bytes: int = 0  # kept in the host's memory by loop.offload
    floor_bytes: int = 0  # weights, gradients, optimiser: what no smaller image or batch takes away


@dataclasses.dataclass
class Work:
    """What is counted: a step with its batch, and whose state is there before it."""

    model: SegmentationModel
    step: Step
    batch: Any
    optimizers: list[torch.optim.Optimizer] = dataclasses.field(default_factory=list)
    modules: list[nn.Module] = dataclasses.field(default_factory=list)
    tensors: list[Tensor] = dataclasses.field(default_factory=list)


def num_classes_of(config: Config) -> int:
    """Without data on the disk for the driving data sets and the generated ones; `folders` needs its list of classes."""
    return config.source.num_classes if config.source.dataset in DRIVING else len(Context(config).classes)


def predict(config: Config, stage: str, *, released: bool = False, num_classes: int | None = None) -> Prediction:
    """Peak of one step of `stage` with these settings.

    On a CPU (loop.device cpu) with the copies that oneDNN makes inside a convolution; for a GPU what cuDNN takes is not in it, nor the CUDA
    context. torch.compile is not seen: the eager step is counted. Takes seconds. Raises ConfigError and DataError as the stage would.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    num_classes = num_classes_of(config) if num_classes is None else num_classes
    with FakeTensorMode():
        work = released_work(config, num_classes) if released else work_of(config, stage, num_classes)
        counted = count_step(work, on_cpu=config.loop.device == "cpu")
    return _prediction(stage, "released" if released else "ours", counted, work)


def saved_bytes(config: Config, stage: str, peak_bytes: int, *, num_classes: int) -> dict[str, int]:
    """What the peak would rise by without each of the settings that save memory and are on; together they do not save the sum."""
    on = [name for name, plain in _PLAIN.items() if getattr(config.loop, name) != plain]
    without = {
        name: dataclasses.replace(config, loop=dataclasses.replace(config.loop, **{name: _PLAIN[name]})) for name in on
    }
    return {
        name: predict(changed, stage, num_classes=num_classes).peak_bytes - peak_bytes
        for name, changed in without.items()
    }


def count_step(work: Work, *, on_cpu: bool) -> Counted:
    """One step of `work` with every byte counted, on fake tensors or on real ones, which move by a first step and then by this one."""
    live = LiveBytes(cpu_workspace if on_cpu else None)
    with memory.recording(live), live, _gradients_held(live, work):
        _hold_state(live, work)
        live.start()
        work.step(work.batch, 0)
        for optimizer in work.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.result


def _prediction(stage: str, loop: str, counted: Counted, work: Work) -> Prediction:
    categories = {name: counted.at_peak[name] for name in CATEGORIES if name in counted.at_peak}
    phases = {name: counted.phases[name] for name in PHASES if name in counted.phases}
    cuts = work.model.chain.cuts if work.model.chain is not None else ()
    return Prediction(stage, loop, counted.peak, categories, phases, counted.flops, cuts, counted.host, _floor(work))


def _floor(work: Work) -> int:
    fixed = {
        id(t): t.nbytes for module in (work.model, *work.modules) for t in (*module.parameters(), *module.buffers())
    }
    gradients = 0
    for optimizer in work.optimizers:
        own = [parameter.nbytes for group in optimizer.param_groups for parameter in group["params"]]
        gradients += max(own) if isinstance(optimizer, AbsorbingSGD) else sum(own)
        fixed |= {
            id(t): t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        }
    return sum(fixed.values()) + gradients


def _hold_state(live: LiveBytes, work: Work) -> None:
    """Weights, buffers, the optimisers' state as after a first step, and the batch."""
    for module in (work.model, *work.modules):
        live.hold(module.parameters(), "weights")
        live.hold(module.buffers(), "weights")
    live.hold(work.tensors, "weights")
    for domain in work.batch if isinstance(work.batch, tuple) else (work.batch,):
        live.hold((domain.images, domain.labels), "data")
    prepare(work)
    for optimizer in work.optimizers:
        live.hold(
            (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)),
            "optimizer",
        )


def prepare(work: Work) -> None:
    """Give the optimisers the state that they have after their first step."""
    for optimizer in work.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _gradients_held(live: LiveBytes, work: Work) -> Iterator[None]:
    """Inside, gradients become a category of their own as soon as a parameter has one."""

    def hold(parameter: Tensor) -> None:
        if parameter.grad is not None:  # a hook before this one may have taken it
            live.hold([parameter.grad], "gradients")

    parameters = [parameter for module in (work.model, *work.modules) for parameter in module.parameters()]
    hooks = [parameter.register_post_accumulate_grad_hook(hold) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- the stages ----------------------------------------------------------------------------------------------------------------------


def work_of(config: Config, stage: str, num_classes: int) -> Work:
    context = Context(
        dataclasses.replace(config, loop=dataclasses.replace(config.loop, device="cpu", offload=False, compile=False))
    )
    if stage not in TRAINED:
        return _inference(config, stage, _model(config, num_classes), context)
    train: TrainConfig = getattr(config, stage)
    model = _model(config, num_classes, freeze_bn=train.freeze_bn if stage == "distill" else None).train()
    if config.loop.channels_last:
        _to_channels_last(model)
    domains = _domains(config, stage)
    shapes = [context.image_shape(train, side, augment) for side, augment in domains]
    batches = tuple(_batch(config, side, augment, train.batch_size) for side, augment in domains)
    net = context.lean(model, shapes)
    net.offload = config.loop.offload
    work = Work(
        model, lambda batch, it: {}, batches if len(batches) > 1 else batches[0], [context.optimizer(model, train)]
    )
    work.step = _step(config, stage, net, num_classes, work)
    return work


def _step(config: Config, stage: str, net: LeanModel, num_classes: int, work: Work) -> Step:
    """The stage's step; what else it needs is added to `work`."""
    train, accumulate = getattr(config, stage), config.loop.accumulate
    weight = torch.ones(num_classes) if train.class_weight_power else None
    if stage == "warmup":
        discriminator = Discriminator(num_classes)
        work.modules.append(discriminator)
        work.optimizers.append(torch.optim.Adam(discriminator.parameters(), lr=train.discriminator_lr))
        return warmup_step(net, discriminator, train, weight, accumulate)
    if stage == "adapt":
        bank = PrototypeBank(num_classes, net.model.channels, min_pixels=train.min_pixels, normalize=train.normalize)
        work.modules.append(bank)
        return adapt_step(net, bank, train, weight, accumulate)
    make = distill_step if stage == "distill" else supervised_step
    return make(net, train, weight, accumulate)


def _domains(config: Config, stage: str) -> list[tuple[str, AugmentConfig]]:
    """(side, augmentation) of every batch that a step takes, in its order."""
    train = getattr(config, stage)
    if stage == "warmup":
        return [("source", train.augment), ("target", train.augment)]
    if stage == "adapt":
        return [("source", train.augment), ("target", train.target_augment)]
    if stage == "distill":
        return [("source", config.adapt.augment)] * bool(train.source_weight) + [("target", train.augment)]
    return [("target" if stage == "oracle" else "source", train.augment)]


def _inference(config: Config, stage: str, model: SegmentationModel, context: Context) -> Work:
    """`prototypes`, `pseudo_labels`: one image forward, its prediction at the size of use."""
    side = "source" if stage == "prototypes" else "target"
    width, height = config.source.size if side == "source" else config.target.eval_size
    images = torch.empty(1, 3, height, width)

    @torch.no_grad()
    def step(batch: Batch, it: int) -> dict[str, Tensor]:
        with context.precision.autocast(), memory.phase("forward"):
            _, logits = model(batch.images)
        with memory.phase("loss"):
            upsampled_prediction(logits, (height, width))
        return {}

    return Work(model.eval(), step, Batch(images, torch.empty(1, height, width, dtype=torch.uint8), [""]))


def released_work(config: Config, num_classes: int) -> Work:
    """The released loop at the same sizes: float32, no setting of ours."""
    train, model = config.adapt, _model(config, num_classes).train()
    unfold_batch_norm(model)
    if model.chain is not None:
        model.chain.cuts = ()
    batch = tuple(_batch(config, side, augment, train.batch_size) for side, augment in _domains(config, "adapt"))
    prototypes = torch.zeros(model.channels, num_classes)
    groups = model.parameter_groups(train.lr, train.head_multiplier)
    optimizer = torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    return Work(model, released_step(model, prototypes, train), batch, [optimizer], tensors=[prototypes])


def _to_channels_last(model: nn.Module) -> None:
    """`model.to(memory_format=...)`, which refuses fake parameters."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 4:
                module._parameters[name] = nn.Parameter(
                    parameter.detach().contiguous(memory_format=torch.channels_last)
                )


def _model(config: Config, num_classes: int, freeze_bn: bool | None = None) -> SegmentationModel:
    model = config.model
    freeze = model.freeze_bn if freeze_bn is None else freeze_bn
    return build_model(
        model.name, num_classes, feature_dim=model.feature_dim, freeze_bn=freeze, frozen_bn_eps=model.frozen_bn_eps
    )


def _batch(config: Config, side: str, augment: AugmentConfig, count: int) -> Batch:
    width, height = output_size(augment, getattr(config, side).size)
    return Batch(
        torch.empty(count, 3, height, width), torch.empty(count, height, width, dtype=torch.uint8), [""] * count
    )
