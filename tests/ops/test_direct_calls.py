"""Small calls go past torch's dispatcher; whoever watches it still sees every op, and the results are the same bits."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import spcl_fast as sf
from spcl_fast import ops
from spcl_fast.ops import dispatched


def inputs(device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "features": torch.randn(2, 16, 5, 7, generator=generator),
        "labels": torch.randint(0, 5, (2, 5, 7), generator=generator),
        "prototypes": torch.randn(5, 16, generator=generator),
        "logits": torch.randn(2, 5, 3, 4, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def contrast(features, labels, prototypes, logits):
    features = features.detach().requires_grad_()
    loss = sf.prototype_contrastive_loss(features, labels, prototypes, temperature=0.3)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


def cross_entropy(features, labels, prototypes, logits):
    logits = logits.detach().requires_grad_()
    loss = sf.upsampled_cross_entropy(logits, labels)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def moments(features, labels, prototypes, logits):
    return sf.class_moments(features, labels, 5)[:2]


def prediction(features, labels, prototypes, logits):
    return sf.upsampled_prediction(logits, (6, 8))


CALLS = {  # and the ops that they are
    contrast: {"prototype_contrastive_forward", "prototype_contrastive_backward"},
    cross_entropy: {"upsampled_cross_entropy", "upsampled_cross_entropy_gradient"},
    moments: {"class_moments"},
    prediction: {"upsampled_prediction"},
}


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "spcl_fast":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", CALLS)
def test_the_results_are_the_dispatchers_bit_by_bit(call, monkeypatch):
    direct = call(**inputs())
    monkeypatch.setattr(dispatched, "_is_watched", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(direct, call(**inputs()), strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_a_mode_and_a_profiler_see_the_ops(call):
    with Seen() as seen:
        call(**inputs())
    assert seen.names == CALLS[call]
    with torch.profiler.profile() as profile:
        call(**inputs())
    names = {event.key.removeprefix("spcl_fast::") for event in profile.key_averages()}
    assert names >= CALLS[call]


@pytest.mark.parametrize("call", CALLS)
def test_tensors_that_hold_no_values_are_never_computed_with(call):
    assert all(result.is_meta for result in call(**inputs("meta")))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in inputs().items()}
    assert all(isinstance(result, FakeTensor) for result in call(**fake))
    with torch.device("meta"):  # the default for what is made here, not for the ops
        assert not any(result.is_meta for result in call(**inputs_on_cpu()))


def inputs_on_cpu() -> dict[str, torch.Tensor]:
    with torch.device("cpu"):
        return inputs()


@pytest.mark.parametrize("call", CALLS)
def test_a_kind_of_tensor_with_rules_of_its_own_is_asked(call):
    class Logged(torch.Tensor):
        asked: set[str] = set()

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.asked.add(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    given = inputs()
    first = "features" if call in (contrast, moments) else "logits"
    call(**given | {first: given[first].as_subclass(Logged)})
    assert any(CALLS[call] & set(name.split(".")) for name in Logged.asked), sorted(Logged.asked)


def test_autograd_is_told_that_prototypes_moved():
    given = inputs()
    prototypes, other = given["prototypes"], torch.ones(5, 16, requires_grad=True)
    product = (prototypes * other).sum()
    ops.move_prototypes_(prototypes, given["features"], given["labels"], keep=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
