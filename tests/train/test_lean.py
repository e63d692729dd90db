"""The memory settings of the loop: whatever is recomputed, offloaded, divided or absorbed, the step is the plain one."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from benchmarks.peers.released import released_step, unfold_batch_norm
from spcl_fast.config import AdaptConfig, DistillConfig, LoopConfig, SourceConfig, WarmupConfig
from spcl_fast.data import Batch
from spcl_fast.errors import ConfigError
from spcl_fast.losses import spcl
from spcl_fast.method.adapt import AdaptStep
from spcl_fast.method.distill import distill_step
from spcl_fast.method.supervised import supervised_step
from spcl_fast.method.warmup import warmup_step
from spcl_fast.models import Discriminator, SegmentationModel, build_model, wrap_model
from spcl_fast.ops import labels_on
from spcl_fast.train import lean
from spcl_fast.train.absorb import AbsorbingSGD
from spcl_fast.train.device import Precision
from spcl_fast.train.lean import best_cuts, block_bytes, lean_model
from spcl_fast.train.meter import Meter, Weighted

CPU = torch.device("cpu")
NETS = ("deeplab_v2_resnet18", "lite0", "tiny")
TRAIN = AdaptConfig(contrast_temperature=0.1, lr=0.01, head_multiplier=2.0)


def batch(seed: int, count: int = 2, size=(32, 48), ignored: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count, *size), generator=generator, dtype=torch.uint8)
    if ignored:  # parts of a batch with unequally many labelled pixels: a mean of means is not the mean
        labels[0, : size[0] // 2] = 255
    return Batch(torch.rand(count, 3, *size, generator=generator), labels, [f"{seed}_{i}" for i in range(count)])


def net_of(name: str, **loop):
    torch.manual_seed(0)
    model = build_model(name, 4, feature_dim=16).train()
    settings = LoopConfig(**{key: value for key, value in loop.items() if key != "offload"})
    net = lean_model(model, settings, Precision(CPU, settings.precision), [(2, 3, 32, 48)])
    net.offload = loop.get("offload", False)
    return net


def bank_of(model: SegmentationModel, train: AdaptConfig = TRAIN) -> spcl.SPCLObjective:
    bank = spcl.objective(4, model.channels, train)
    bank.load_(torch.randn(4, model.channels, generator=torch.Generator().manual_seed(5)))
    return bank


def flat(values) -> dict[str, torch.Tensor]:
    """What a step returned, the weight of a weighted value under its own name."""
    weighted = {key: value for key, value in values.items() if isinstance(value, Weighted)}
    weights = {f"{key}.weight": value.weight for key, value in weighted.items()}
    return {**values, **{key: value.value for key, value in weighted.items()}, **weights}


def adapted(name: str, absorb: bool = False, steps: int = 1, size=(32, 48), **loop):
    """State after adapt steps, momentum too."""
    net = net_of(name, **loop)
    bank = bank_of(net.model)
    make = AbsorbingSGD if absorb else torch.optim.SGD
    optimizer = make(net.model.parameter_groups(0.01, 2.0), lr=0.01, momentum=0.9, weight_decay=0.1)
    step = AdaptStep(
        net, bank, TRAIN, torch.tensor([1.0, 2.0, 0.5, 1.0]), loop.get("accumulate", 1), lambda it: it == 0
    )
    values = {}
    for it in range(steps):
        values = step((batch(2 * it, size=size), batch(2 * it + 1, size=size)), it)
        optimizer.step()
        optimizer.zero_grad()
    state = {f"model.{key}": value for key, value in net.model.state_dict().items()} | {"bank": bank.prototypes}
    own = dict(net.model.named_parameters())
    state |= {
        f"momentum.{key}": optimizer.state[p]["momentum_buffer"] for key, p in own.items() if p in optimizer.state
    }
    return state, flat(values)


def assert_close(got, expected, rtol=1e-4, share=1e-4):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        scale = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(
            got[key], value, rtol=rtol, atol=max(1e-9, share * scale), msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.fixture(scope="module")
def plain():
    return {name: adapted(name, steps=2) for name in NETS}


# --- what must not change a bit ---


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "loop", [{"checkpoint": "stage"}, {"checkpoint": "block"}, {"checkpoint": "auto"}, {"offload": True}], ids=str
)
def test_recomputation_and_offload_change_no_bit(plain, name, loop, monkeypatch):
    monkeypatch.setattr(lean, "_OFFLOADED_BYTES", 0)  # at this size nothing would go
    state, values = adapted(name, steps=2, **loop)
    assert all(torch.equal(state[key], value) for key, value in plain[name][0].items())
    assert all(torch.equal(values[key], value) for key, value in plain[name][1].items())


def test_blocks_of_vgg_are_its_layers():
    chain = build_model("deeplab_v2_vgg16", 4).chain
    images = expected = torch.rand(1, 3, 16, 16)
    for layer in chain:
        expected = layer(expected)
    assert torch.equal(chain(images), expected) and all(0 < cut < len(chain.blocks()) for cut in chain.stages())


def test_recomputation_really_recomputes(monkeypatch):
    net = net_of("deeplab_v2_resnet18", checkpoint="block")
    calls = []
    for layer in (net.model.chain.layer1[0], net.model.chain.layer4[-1]):
        layer.register_forward_pre_hook(
            lambda module, *_: calls.append(module)
        )  # a recomputation stops where it has all
    net.features(torch.rand(1, 3, 32, 32)).sum().backward()
    first, last = net.model.chain.layer1[0], net.model.chain.layer4[-1]
    assert calls.count(first) == 2 and calls.count(last) == 1, (
        "the last segment is alive when the backward begins: once is enough"
    )
    calls.clear()
    with torch.no_grad():
        net.features(torch.rand(1, 3, 32, 32))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["deeplab_v2_resnet18", "lite0"])
def test_running_statistics_move_once_though_the_forward_runs_twice(name):
    states = []
    for checkpoint in ("none", "block"):
        torch.manual_seed(0)
        model = build_model(name, 4, feature_dim=16, freeze_bn=False).train()
        net = lean_model(model, LoopConfig(checkpoint=checkpoint), Precision(CPU), [(2, 3, 32, 48)])
        distill_step(net, DistillConfig(), None)(batch(0), 0)
        states.append(model.state_dict() | {f"grad.{k}": p.grad for k, p in model.named_parameters()})
    moved = [key for key in states[0] if "running_mean" in key]
    assert moved and all(states[0][key].abs().max() > 0 for key in moved)
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


# --- what must not change beyond rounding ---


@pytest.mark.parametrize("name", ["deeplab_v2_resnet18", "lite0"])
@pytest.mark.parametrize("absorb, accumulate, checkpoint", [(True, 1, "none"), (False, 2, "none"), (True, 2, "auto")])
def test_absorbed_gradients_and_parts_of_a_batch_are_the_plain_step(plain, name, absorb, accumulate, checkpoint):
    state, values = adapted(name, absorb, steps=2, accumulate=accumulate, checkpoint=checkpoint)
    assert_close(state, plain[name][0])
    for key in ("segmentation", "source_excess", "target_excess"):
        torch.testing.assert_close(values[key], plain[name][1][key], rtol=1e-5, atol=1e-5)
    for key in ("source_excess.weight", "target_excess.weight", "source_agreement.weight"):
        assert torch.equal(values[key], plain[name][1][key]), key


@pytest.mark.parametrize("checkpoint, absorb, accumulate", [("none", False, 1), ("auto", True, 2)])
def test_the_lean_step_is_the_released_one(checkpoint, absorb, accumulate):
    """Both domains' graphs, up-sampled logits, two backwards through the source, plain SGD."""
    train = dataclasses.replace(TRAIN, contrast_temperature=1.0)
    torch.manual_seed(0)
    theirs = build_model("deeplab_v2_resnet18", 4).train()
    unfold_batch_norm(theirs)
    torch.manual_seed(0)
    ours = build_model("deeplab_v2_resnet18", 4).train()
    bank = bank_of(ours, dataclasses.replace(train, absent="decay"))
    prototypes = bank.prototypes.T.clone()
    step_of_theirs = released_step(theirs, prototypes, train)
    net = lean_model(ours, LoopConfig(checkpoint=checkpoint), Precision(CPU), [(2 // accumulate, 3, 32, 48)])
    step_of_ours = AdaptStep(net, bank, train, None, accumulate)
    optimizers = [
        torch.optim.SGD(theirs.parameter_groups(0.01, 2.0), lr=0.01, momentum=0.9, weight_decay=0.1),
        (AbsorbingSGD if absorb else torch.optim.SGD)(
            ours.parameter_groups(0.01, 2.0), lr=0.01, momentum=0.9, weight_decay=0.1
        ),
    ]
    for it in range(2):
        for step, optimizer in zip((step_of_theirs, step_of_ours), optimizers, strict=True):
            step((batch(2 * it), batch(2 * it + 1)), it)
            optimizer.step()
            optimizer.zero_grad()
    assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), share=1e-3)
    torch.testing.assert_close(bank.prototypes.T, prototypes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["supervised", "distill", "warmup"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole_one(stage):
    gradients, values = [], []
    for accumulate in (1, 2, 4):
        net = net_of("tiny")
        torch.manual_seed(1)
        discriminator = Discriminator(4, width=4)
        weight = torch.tensor([1.0, 3.0, 0.5, 1.0])
        source, target = batch(0, 4), batch(1, 4)
        if stage == "warmup":
            step, given = (
                warmup_step(net, discriminator, WarmupConfig(adversarial_weight=0.1), weight, accumulate),
                (source, target),
            )
        elif stage == "distill":
            step, given = distill_step(net, DistillConfig(source_weight=0.5), weight, accumulate), (source, target)
        else:
            step, given = supervised_step(net, SourceConfig(), weight, accumulate), source
        values.append(step(given, 0))
        gradients.append(
            {k: p.grad for m in (net.model, discriminator) for k, p in m.named_parameters() if p.grad is not None}
        )
    for i in (1, 2):
        assert_close(gradients[i], gradients[0])
        torch.testing.assert_close(values[i], values[0], rtol=1e-5, atol=1e-6)


def test_a_part_without_a_label_counts_for_nothing():
    source = batch(0, 2)
    source.labels[0] = 255
    results = []
    for accumulate in (1, 2):
        net = net_of("tiny")
        supervised_step(net, SourceConfig(), None, accumulate)(source, 0)
        results.append({k: p.grad for k, p in net.model.named_parameters()})
    assert_close(results[1], results[0])


def test_no_gradient_is_alive_after_an_absorbed_backward():
    net = net_of("tiny")
    optimizer = AbsorbingSGD(net.model.parameter_groups(0.01, 1.0), lr=0.01, momentum=0.9)
    before = {k: p.detach().clone() for k, p in net.model.named_parameters()}
    supervised_step(net, SourceConfig(), None)(batch(0), 0)
    assert all(p.grad is None for p in net.model.parameters())
    assert all(torch.equal(p, before[k]) for k, p in net.model.named_parameters()), "weights move in step(), not before"
    optimizer.step()
    assert any(not torch.equal(p, before[k]) for k, p in net.model.named_parameters())


def test_absorbing_sgd_saves_the_state_of_sgd():
    """A run may go on without it: same state dict, same next step."""
    nets = [net_of("tiny") for _ in range(2)]
    optimizers = [
        make(net.model.parameter_groups(0.01, 1.0), lr=0.01, momentum=0.9, weight_decay=0.1)
        for make, net in zip((AbsorbingSGD, torch.optim.SGD), nets, strict=True)
    ]
    supervised_step(nets[0], SourceConfig(), None)(batch(0), 0)
    optimizers[0].step()
    nets[1].model.load_state_dict(nets[0].model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers, strict=True):
        supervised_step(net, SourceConfig(), None)(batch(1), 1)
        optimizer.step()
    assert_close(dict(nets[0].model.named_parameters()), dict(nets[1].model.named_parameters()))


# --- bf16 ---


def test_bf16_keeps_no_cast_of_the_weights_and_recomputation_repeats_its_bits():
    plain, recomputed = (adapted("deeplab_v2_resnet18", precision="bf16", checkpoint=c)[0] for c in ("none", "block"))
    assert all(torch.equal(recomputed[key], value) for key, value in plain.items())
    net = net_of("deeplab_v2_resnet18", precision="bf16")
    sizes = {p.shape for p in net.model.feature_extractor.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append((tuple(t.shape), t.dtype)), t)[1], lambda t: t
    ):
        net.features(torch.rand(1, 3, 32, 32))
    assert not [s for s, dtype in saved if torch.Size(s) in sizes and dtype == torch.bfloat16]
    assert any(dtype == torch.bfloat16 for _, dtype in saved)


# --- where to cut ---


def all_cuts(count: int):
    for flags in itertools.product((False, True), repeat=count - 1):
        yield tuple(i for i, flag in enumerate(flags, 1) if flag)


def peak_of(blocks, cuts):
    bounds, held, peak = (0, *cuts, len(blocks)), 0, 0
    for begin, end in itertools.pairwise(bounds):
        held += blocks[begin][0]
        peak = max(peak, held + sum(kept for _, kept in blocks[begin:end]))
    return peak


def test_best_cuts_are_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        blocks = [tuple(row) for row in torch.randint(1, 60, (9, 2), generator=generator).tolist()]
        assert peak_of(blocks, best_cuts(blocks)) == min(peak_of(blocks, cuts) for cuts in all_cuts(9))


def test_bytes_of_blocks_are_those_that_a_real_forward_keeps():
    torch.manual_seed(0)
    model = build_model("deeplab_v2_resnet18", 4).train()
    predicted = block_bytes(model, Precision(CPU), (2, 3, 32, 48))
    assert len(predicted) == len(model.chain.blocks()) and predicted[0][0] == 2 * 3 * 32 * 48 * 4
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    images = torch.rand(2, 3, 32, 48)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.chain(images)
    kept = sum(nbytes for pointer, (nbytes, _) in storages.items() if pointer not in own and nbytes > 64 * 2048)
    assert sum(kept for _, kept in predicted) >= kept > 0


# --- refusals ---


def test_a_net_without_blocks_refuses_to_recompute():
    class Plain(nn.Module):
        stride, channels = 1, 3

        def features(self, images):
            return images

    with pytest.raises(ConfigError, match="custom is not made of blocks.*use none"):
        lean_model(wrap_model(Plain(), 4), LoopConfig(checkpoint="auto"), Precision(CPU), [(1, 3, 8, 8)])


def test_offload_on_the_cpu_is_refused():
    with pytest.raises(ConfigError, match="loop.offload: the net is on cpu, whose memory is the host's already"):
        lean_model(build_model("tiny", 4), LoopConfig(offload=True), Precision(CPU), [(1, 3, 32, 32)])


def test_compile_is_of_the_body_and_changes_no_key(monkeypatch):
    """With a backend that runs the traced graph as it is: the frozen convolutions must trace without a break."""
    import functools

    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager", fullgraph=True)
    )
    plain, compiled = net_of("deeplab_v2_resnet18"), net_of("deeplab_v2_resnet18", compile=True)
    results = []
    for net in (plain, compiled):
        net.features(batch(0).images).square().mean().backward()
        results.append({key: p.grad for key, p in net.model.named_parameters() if p.grad is not None})
    assert compiled.model.feature_extractor._compiled_call_impl is not None
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["supervised", "distill", "warmup"])
def test_a_step_without_a_label_adds_no_0_to_the_loss_that_is_shown(name):
    net, source, target = net_of("tiny"), batch(0), batch(1)
    step, given, shown = {
        "supervised": (supervised_step(net, SourceConfig(), None), lambda s, t: s, "segmentation"),
        "distill": (distill_step(net, DistillConfig(), None), lambda s, t: s, "distillation"),
        "warmup": (
            warmup_step(net, Discriminator(4, width=4), WarmupConfig(), None),
            lambda s, t: (s, t),
            "segmentation",
        ),
    }[name]
    void, meter = dataclasses.replace(source, labels=torch.full_like(source.labels, 255)), Meter()
    meter.add(step(given(source, target), 0), 0)
    alone = meter.read().values[shown]
    meter.add(step(given(void, target), 1), 1)
    assert meter.read().values[shown] == pytest.approx(alone) and alone > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_where_no_pixel_counts_no_contrast_is_reported(accumulate):
    net = net_of("tiny")
    step = AdaptStep(net, bank_of(net.model), TRAIN, None, accumulate)
    source, target = batch(0), batch(1)
    void = dataclasses.replace(source, labels=torch.full_like(source.labels, 255))
    meter = Meter()
    meter.add(step((void, target), 0), 0)
    found = meter.read().values
    assert not {"source_excess", "source_agreement", "segmentation"} & {*found} and "target_excess" in found
    meter.reset()
    meter.add(step((source, dataclasses.replace(target, labels=void.labels)), 1), 1)
    found = meter.read().values
    assert "target_excess" not in found and 0 < found["source_agreement"] < 1
    with torch.no_grad():
        predicted, labels = net(source.images)[1].argmax(1), labels_on(source.labels, net.grid(source.images))
    known = labels != 255
    assert found["source_agreement"] == pytest.approx((predicted == labels)[known].double().mean().item())
