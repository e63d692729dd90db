"""Peak memory of a stage before its first step: the stage's own step on fake tensors, every storage counted. No GPU, nothing allocated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import catalog
from ..config import SAVES_MEMORY, Config, LoopConfig, TrainConfig
from ..data import Batch
from ..method.domains import Domains
from ..method.few_labels import declared
from ..method.nets import Module, Nets
from ..method.parts import Step
from ..method.stage import UntrainedStage
from ..models import SegmentationModel
from ..models.norm import enough_pixels
from ..ops import upsampled_prediction
from ..runs.layout import PHASES
from ..train import memory
from ..train.absorb import AbsorbingSGD
from ..train.device import Precision
from .count import Counted, LiveBytes, cpu_workspace

CATEGORIES = ("weights", "gradients", "optimizer", "data", "activations", "loss", "backward", "workspace")


@dataclasses.dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of one step by category, the peak of each phase, and the floating-point operations of its convolutions."""

    stage: str
    peak_bytes: int
    categories: dict[str, int]
    phases: dict[str, int]
    flops: int
    cuts: tuple[int, ...] = ()  # blocks at which recomputed segments begin
    host_bytes: int = 0  # kept in the host's memory by loop.offload
    floor_bytes: int = 0  # weights, gradients, optimiser: what no smaller image or batch takes away


@dataclasses.dataclass
class CountedStep:
    """What is counted: a step with its batch, and whose state is there before it."""

    model: SegmentationModel
    step: Step
    batch: Any
    modules: list[nn.Module]
    optimizers: list[torch.optim.Optimizer] = dataclasses.field(default_factory=list)
    tensors: list[Tensor] = dataclasses.field(default_factory=list)  # state that is in no module


class PlanNets(Nets):
    """Every stage starts from a new net with random weights: on fake tensors nothing is there."""

    def new(self, *, freeze_bn: bool | None = None, weights: bool = True) -> SegmentationModel:
        return super().new(freeze_bn=freeze_bn, weights=False)

    def place(self, module: Module) -> Module:
        return module  # on the CPU already; `to` refuses fake parameters, and so does `to(memory_format=...)`

    def channels_last(self, net: SegmentationModel) -> SegmentationModel:
        for module in net.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 4:
                    moved = parameter.detach().contiguous(memory_format=torch.channels_last)
                    module._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        return net


def num_classes_of(config: Config) -> int:
    """Without data on the disk where the data set's own list says it; `folders` needs its list of classes."""
    name = config.source.dataset
    known = name in catalog.names(catalog.DATA_SETS) and catalog.find(catalog.DATA_SETS, name).num_classes
    return config.source.num_classes if known else len(Domains(config).classes)


def peak_memory(config: Config, stage: str, *, num_classes: int | None = None) -> PeakMemory:
    """Peak of one step of `stage` with these settings.

    On a CPU (loop.device cpu) with the copies that oneDNN makes inside a convolution; for a GPU what cuDNN takes is not in it, nor the CUDA
    context. torch.compile is not seen: the eager step is counted. Takes seconds. Raises ConfigError and DataError as the stage would.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    num_classes = num_classes_of(config) if num_classes is None else num_classes
    with FakeTensorMode(), enough_pixels(catalog.find(catalog.STAGES, stage).section):
        return peak_of(stage, step_of(config, stage, num_classes), on_cpu=config.loop.device == "cpu")


def can_recompute(config: Config, num_classes: int) -> bool:
    """Whether loop.checkpoint may be on: the net is made of blocks, and is not compiled."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return not config.loop.compile and plan_nets(config, num_classes).new().chain is not None


def peak_of(name: str, work: CountedStep, *, on_cpu: bool) -> PeakMemory:
    """The counted peak of one step, under a name."""
    counted = count_step(work, on_cpu=on_cpu)
    categories = {name: counted.at_peak[name] for name in CATEGORIES if name in counted.at_peak}
    phases = {name: counted.phases[name] for name in PHASES if name in counted.phases}
    cuts = work.model.chain.cuts if work.model.chain is not None else ()
    return PeakMemory(name, counted.peak, categories, phases, counted.flops, cuts, counted.host, _floor(work))


def forecast(config: Config, stage: str, num_classes: int) -> dict[str, Any]:
    """What a run keeps as a stage's plan.json: its predicted peak, and what each setting that saves memory saves of it."""
    peak = peak_memory(config, stage, num_classes=num_classes).peak_bytes
    return {"peak_bytes": peak, "saved_bytes": saved_bytes(config, stage, peak, num_classes=num_classes)}


def saved_bytes(config: Config, stage: str, peak_bytes: int, *, num_classes: int) -> dict[str, int]:
    """What the peak would rise by without each of the settings that save memory and are on; together they do not save the sum."""
    off = {name: getattr(LoopConfig(), name) for name in SAVES_MEMORY}
    without = {
        name: dataclasses.replace(config, loop=dataclasses.replace(config.loop, **{name: value}))
        for name, value in off.items()
        if getattr(config.loop, name) != value
    }
    return {
        name: peak_memory(changed, stage, num_classes=num_classes).peak_bytes - peak_bytes
        for name, changed in without.items()
    }


# ---- counting --------------------------------------------------------------------------------------------------------


def count_step(work: CountedStep, *, on_cpu: bool) -> Counted:
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


def _floor(work: CountedStep) -> int:
    fixed = {id(t): t.nbytes for module in work.modules for t in (*module.parameters(), *module.buffers())}
    gradients = 0
    for optimizer in work.optimizers:
        own = [parameter.nbytes for group in optimizer.param_groups for parameter in group["params"]]
        gradients += max(own) if isinstance(optimizer, AbsorbingSGD) else sum(own)
        fixed |= {
            id(t): t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        }
    return sum(fixed.values()) + gradients


def _hold_state(live: LiveBytes, work: CountedStep) -> None:
    """Weights, buffers, the optimisers' state as after a first step, and the batch."""
    for module in work.modules:
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


def prepare(work: CountedStep) -> None:
    """Give the optimisers the state that they have after their first step."""
    for optimizer in work.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _gradients_held(live: LiveBytes, work: CountedStep) -> Iterator[None]:
    """Inside, gradients become a category of their own as soon as a parameter has one."""

    def hold(parameter: Tensor) -> None:
        if parameter.grad is not None:  # a hook before this one may have taken it
            live.hold([parameter.grad], "gradients")

    parameters = [p for module in work.modules for p in module.parameters() if p.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(hold) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- what a stage does -----------------------------------------------------------------------------------------------


def plan_nets(config: Config, num_classes: int) -> PlanNets:
    """Nets on the CPU, where fake tensors are."""
    loop = dataclasses.replace(config.loop, device="cpu", offload=False, compile=False)
    device = torch.device("cpu")
    return PlanNets(dataclasses.replace(config, loop=loop), num_classes, device, Precision(device, loop.precision))


def step_of(config: Config, stage: str, num_classes: int) -> CountedStep:
    """One step of a stage as it is declared; of a stage that trains nothing the forward of one image and its prediction."""
    row, nets = catalog.find(catalog.STAGES, stage), plan_nets(config, num_classes)
    if row.net is None:
        untrained: UntrainedStage = catalog.load(row.home)
        return _prediction_step(nets, *untrained.sees(config))
    trained = declared(row, config)
    train: TrainConfig = getattr(config, row.section)
    trainee = trained.build(nets.config, nets)
    trainee.net.model.train()
    trainee.net.offload = config.loop.offload
    batches = tuple(batch_of(feed.size(config), train.batch_size) for feed in trained.feeds(config))
    return CountedStep(
        trainee.net.model,
        trainee.step,
        batches[0] if len(batches) == 1 else batches,
        [*trainee.modules.values()],
        [*trainee.optimizers.values()],
    )


def _prediction_step(nets: Nets, width: int, height: int) -> CountedStep:
    model = nets.start().eval()

    @torch.no_grad()
    def step(batch: Batch, it: int) -> dict[str, Tensor]:
        with nets.precision.autocast(), memory.phase("forward"):
            _, logits = model(batch.images)
        with memory.phase("loss"):
            upsampled_prediction(logits, (height, width))
        return {}

    return CountedStep(model, step, batch_of((width, height), 1), [model])


def batch_of(size: tuple[int, int], count: int) -> Batch:
    """A batch that holds nothing in particular. size: width and height."""
    width, height = size
    images, labels = torch.empty(count, 3, height, width), torch.empty(count, height, width, dtype=torch.uint8)
    return Batch(images, labels, [""] * count)
