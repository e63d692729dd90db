"""The losses in other people's code: checkpointing, torch.func, compiled and exported training modules, models of other dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from on_backends import usable
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import spcl_fast as sf

torch.manual_seed(0)
FEATURES, LABELS, PROTOTYPES = torch.randn(2, 8, 5, 5), torch.randint(0, 4, (2, 5, 5)), torch.randn(4, 8)
LOGITS, PREDICTIONS = torch.randn(2, 4, 5, 5), torch.randint(0, 4, (2, 5, 5))
BACKENDS = usable("prototype_contrastive_loss")


def contrast(features, backend=None, labels=LABELS, **settings):
    return sf.prototype_contrastive_loss(features, labels, PROTOTYPES, temperature=0.1, backend=backend, **settings)


def entropy(logits, backend=None, labels=LABELS):
    return sf.upsampled_cross_entropy(logits, labels, backend=backend)


def binary(logits, backend=None):
    return sf.upsampled_binary_cross_entropy(logits, LABELS, backend=backend)


def logits_squared(features, backend=None):
    return sf.prototype_logits(features, PROTOTYPES, temperature=0.5, backend=backend).square().mean()


LOSSES = [(contrast, FEATURES), (entropy, LOGITS), (binary, LOGITS), (logits_squared, FEATURES)]


def gradient(loss, values, backend):
    leaf = values.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, backend), leaf)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("loss", "values"), LOSSES)
def test_first_derivatives_by_torch_func(loss, values, backend):
    expected = gradient(loss, values, backend)
    assert torch.equal(grad(lambda x: loss(x, backend))(values), expected)
    value, pull = vjp(lambda x: loss(x, backend), values)
    assert torch.equal(pull(torch.ones_like(value))[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("loss", "values"), [(contrast, FEATURES), (entropy, LOGITS)])
def test_gradients_of_each_sample(loss, values, backend):
    got = vmap(grad(lambda x, y: loss(x[None], backend, y[None])))(values, LABELS)
    for one, x, y in zip(got, values, LABELS, strict=True):
        leaf = x[None].clone().requires_grad_()
        loss(leaf, backend, y[None]).backward()
        assert torch.equal(one, leaf.grad[0])
    assert vmap(lambda x, y: loss(x[None], backend, y[None]))(values, LABELS).shape == (2,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_models_parameters(backend):
    head = torch.nn.Conv2d(8, 8, 1)
    got = grad(lambda p: contrast(functional_call(head, p, (FEATURES,)), backend))(dict(head.named_parameters()))
    contrast(head(FEATURES), backend).backward()
    assert all(torch.equal(got[name], parameter.grad) for name, parameter in head.named_parameters())


@pytest.mark.parametrize(("loss", "values"), LOSSES)
def test_forward_mode_and_second_derivatives_are_refused_with_a_reason(loss, values):
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        jvp(loss, (values,), (values,))
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"), forward_ad.dual_level():
        loss(forward_ad.make_dual(values, values))
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda x: grad(loss)(x).sum())(values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("loss", "values"), LOSSES)
def test_checkpointing_reads_what_was_saved_once(loss, values, backend):
    leaf = values.clone().requires_grad_()
    checkpoint(lambda x: loss(x * 1.0, backend), leaf, use_reentrant=False).backward()
    assert torch.equal(leaf.grad, gradient(loss, values, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bank_that_moves_between_loss_and_backward_leaves_the_graph_its_prototypes(backend):
    bank = sf.PrototypeBank(4, 8, backend=backend).load_(PROTOTYPES)
    leaf = FEATURES.clone().requires_grad_()
    first = sf.prototype_contrastive_loss(leaf, LABELS, bank.prototypes, temperature=0.1, backend=backend)
    bank.update_(FEATURES, LABELS)
    second = sf.prototype_contrastive_loss(leaf, LABELS, bank.prototypes, temperature=0.1, backend=backend)
    bank.update_(FEATURES, LABELS, PREDICTIONS)
    assert second != first
    first.backward()
    assert torch.equal(leaf.grad, gradient(contrast, FEATURES, backend))


class Training(torch.nn.Module):
    """A head, a bank that follows the agreeing pixels, and the loss before or after the move."""

    def __init__(self, loss_first: bool = False) -> None:
        super().__init__()
        self.head, self.bank, self.loss_first = (
            torch.nn.Conv2d(8, 8, 1),
            sf.PrototypeBank(4, 8).load_(PROTOTYPES),
            loss_first,
        )

    def forward(self, x, labels, predictions):
        features = self.head(x)
        loss = sf.prototype_contrastive_loss(features, labels, self.bank.prototypes, temperature=0.1)
        self.bank.update_(features.detach(), labels, predictions)
        if self.loss_first:
            return loss
        return sf.prototype_contrastive_loss(features, labels, self.bank.prototypes, temperature=0.1)


@pytest.mark.parametrize("loss_first", [True, False])
def test_a_training_module_with_a_bank_compiles_in_one_graph(loss_first):
    torch._dynamo.reset()
    eager = Training(loss_first)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        losses = eager(FEATURES, LABELS, PREDICTIONS), compiled(FEATURES, LABELS, PREDICTIONS)
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses) and torch.equal(eager.bank.prototypes, module.bank.prototypes)
    assert torch.equal(eager.head.weight.grad, module.head.weight.grad)


def test_a_training_module_with_a_bank_compiles_under_autocast_and_with_compiled_autograd():
    torch._dynamo.reset()
    module = Training()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(FEATURES, LABELS, PREDICTIONS).backward()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        compiled(FEATURES, LABELS, PREDICTIONS).backward()
    assert module.head.weight.grad.isfinite().all()


def test_a_training_module_with_a_bank_is_exported_and_moves_its_bank():
    module = Training(loss_first=True)
    eager = copy.deepcopy(module)
    exported = torch.export.export(module, (FEATURES, LABELS, PREDICTIONS)).module()
    for _ in range(2):
        torch.testing.assert_close(exported(FEATURES, LABELS, PREDICTIONS), eager(FEATURES, LABELS, PREDICTIONS))
    torch.testing.assert_close(dict(exported.named_buffers())["bank.prototypes"], eager.bank.prototypes)


# ---------------------------------------------------------------------------------------------- the bank and the thresholds


def test_an_overflow_leaves_a_prototype_alone():
    bank = sf.PrototypeBank(4, 8).update_(FEATURES, LABELS)
    before, bad = bank.prototypes.clone(), FEATURES.clone()
    bad[0, 0, 0, 0] = torch.inf
    bank.update_(bad, LABELS)
    hit = int(LABELS[0, 0, 0])
    others = [k for k in range(4) if k != hit]
    assert torch.equal(bank.prototypes[hit], before[hit]) and bank.prototypes.isfinite().all()
    assert not torch.equal(bank.prototypes[others], before[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_do_not_vanish_in_a_model_of_half_floats(dtype):
    banks = [torch.nn.Sequential(sf.PrototypeBank(2, 4, keep=0.999)) for _ in range(2)]
    banks[1].to(dtype)
    ones, labels = torch.ones(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)
    for _ in range(300):
        banks[0][0].update_(ones, labels)
        banks[1][0].update_(ones.to(dtype), labels)
    torch.testing.assert_close(banks[1][0].prototypes, banks[0][0].prototypes)


def test_thresholds_are_in_the_state_dict(tmp_path):
    kept, resumed = sf.PseudoLabelThresholds(4), sf.PseudoLabelThresholds(4)
    kept.update(sf.upsampled_prediction(LOGITS, (20, 20)))
    torch.save(kept.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (kept.thresholds() < 0.9).any() and torch.equal(resumed.thresholds(), kept.thresholds())
    for thresholds in (kept, resumed):
        thresholds.update(sf.upsampled_prediction(LOGITS * 1.5, (20, 20)))
    assert torch.equal(resumed.thresholds(), kept.thresholds()) and torch.equal(resumed.counts(), kept.counts())
    with pytest.raises(ValueError, match="that of 4 classes, expected 3"):
        sf.PseudoLabelThresholds(3).load_state_dict(kept.state_dict())


# ---------------------------------------------------------------------------------------------- what F.cross_entropy takes


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_true_and_false_are_classes(backend):
    mask = LABELS > 1
    settings = {"temperature": 0.1, "backend": backend}
    got = sf.prototype_contrastive_loss(FEATURES, mask, PROTOTYPES[:2], **settings)
    assert got == sf.prototype_contrastive_loss(FEATURES, mask.long(), PROTOTYPES[:2], **settings)
    assert torch.equal(
        sf.class_moments(FEATURES, mask, 2, backend=backend).counts, torch.bincount(mask.flatten().long())
    )
    assert entropy(LOGITS[:, :2], backend, mask) == entropy(LOGITS[:, :2], backend, mask.long())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_and_videos(backend):
    video, labels = torch.randn(2, 8, 3, 4, 5, requires_grad=True), torch.randint(0, 4, (2, 3, 4, 5))
    flat, flat_labels = video.movedim(1, -1).flatten(0, 3), labels.flatten()
    torch.testing.assert_close(contrast(video, backend, labels), contrast(flat, backend, flat_labels))
    assert torch.autograd.grad(contrast(video, backend, labels), video)[0].shape == video.shape
    map_ = contrast(video, backend, labels, reduction="none")
    torch.testing.assert_close(map_, contrast(flat, backend, flat_labels, reduction="none").view(2, 3, 4, 5))
    finer = F.interpolate(labels[:, None].float(), (6, 8, 10), mode="nearest")[:, 0].long()
    torch.testing.assert_close(contrast(video, backend, finer), contrast(video, backend, labels))
    assert sf.class_moments(video, labels, 4, backend=backend).counts.sum() == labels.numel()
    line = video[:, :, 0, 0]
    torch.testing.assert_close(
        contrast(line, backend, labels[:, 0, 0]), contrast(line[:, :, None], backend, labels[:, :1, 0])
    )
    bank = sf.PrototypeBank(4, 8, backend=backend).update_(video.detach(), labels, labels)
    torch.testing.assert_close(bank.prototypes, sf.PrototypeBank(4, 8).update_(flat.detach(), flat_labels).prototypes)


@pytest.mark.parametrize("backend", usable("class_moments", "pixel_weight"))
def test_weighted_moments_are_weighted_sums(backend):
    weight = torch.rand(2, 5, 5)
    got = sf.class_moments(FEATURES, LABELS, 4, squares=True, pixel_weight=weight, backend=backend)
    rows, w = F.normalize(FEATURES.double(), dim=1).permute(0, 2, 3, 1).flatten(0, 2), weight.double().flatten()
    one_hot = F.one_hot(LABELS.flatten(), 4).double().T * w
    assert got.counts.dtype == torch.float32
    for value, truth in zip(got, (one_hot @ rows, one_hot.sum(1), one_hot @ rows.square()), strict=True):
        torch.testing.assert_close(value, truth.float(), rtol=1e-5, atol=1e-6)


def test_the_modules_take_what_the_functions_take():
    scale = torch.nn.Parameter(torch.tensor(0.2))
    loss = sf.PrototypeContrastiveLoss(scale, class_weight=torch.rand(4), label_smoothing=0.1, denominator="all")
    assert dict(loss.named_parameters()).keys() == {"temperature"} and not loss.state_dict().keys() - {"temperature"}
    got = loss(FEATURES, LABELS, PROTOTYPES, bias=torch.ones(4))
    got.backward()
    settings = {"class_weight": loss.class_weight, "label_smoothing": 0.1, "denominator": "all", "bias": torch.ones(4)}
    assert got == sf.prototype_contrastive_loss(FEATURES, LABELS, PROTOTYPES, temperature=0.2, **settings)
    assert scale.grad != 0 and "label_smoothing=0.1" in repr(loss)
    soft = sf.UpsampledCrossEntropyLoss(label_smoothing=0.1)(LOGITS, LOGITS.softmax(1), size=(9, 9))
    assert soft == sf.upsampled_cross_entropy(LOGITS, LOGITS.softmax(1), label_smoothing=0.1, size=(9, 9))
