"""compat.protoseg: a net with the authors' attributes, next to the same forward with every map written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from configer import Configer
from torch import nn

from spcl_fast.compat.protoseg import PPC, PPD, PixelPrototypeCELoss, PrototypeLearning, RowLogits, distributed_sinkhorn

B, K, M, D = 2, 4, 3, 8  # with D = 24 the map of 12 rows is smaller than two gradients
WEIGHT = [0.8, 1.2, 1.0, 0.9]


def configer(**protoseg):
    given = {"loss_ppc_weight": 0.01, "loss_ppd_weight": 0.001, "use_rmi": False} | protoseg
    return Configer(protoseg=given, loss={"params": {"ce_weight": WEIGHT, "ce_ignore_index": -1}})


class Net(PrototypeLearning, nn.Module):
    assignment = "argmax"

    def __init__(self, dim=D):
        super().__init__()
        self.gamma, self.num_prototype, self.num_classes = 0.9, M, K
        self.use_prototype = self.update_prototype = True
        self.feat_norm, self.mask_norm = nn.LayerNorm(dim), nn.LayerNorm(K)
        self.prototypes = nn.Parameter(torch.randn(K, M, dim, generator=torch.Generator().manual_seed(0)))
        self.calls = 0

    def forward(self, c, gt_semantic_seg=None, pretrain_prototype=False):
        return self.segment_by_prototypes(c, gt_semantic_seg, pretrain_prototype)


class WrittenOut(Net):
    """Every map of [N, K M] there, and a loop over classes."""

    def segment_by_prototypes(self, c, gt_semantic_seg=None, pretrain_prototype=False):
        x = F.normalize(self.feat_norm(c.permute(0, 2, 3, 1).reshape(-1, c.shape[1])), dim=-1)
        p = F.normalize(self.prototypes.detach(), dim=-1)
        scores = torch.einsum("nd,kmd->nkm", x, p)
        seg = self.mask_norm(scores.amax(2)).view(B, *c.shape[2:], K).permute(0, 3, 1, 2)
        if gt_semantic_seg is None or pretrain_prototype:
            return seg
        gt = F.interpolate(gt_semantic_seg.float(), size=c.shape[2:], mode="nearest").view(-1)
        right, moved, target = gt == seg.argmax(1).view(-1), p.clone(), gt.clone()
        for k in range(K):
            own = gt == k
            if not own.any():
                continue
            plan = (scores[own, k].detach() / 0.05).exp()
            for _ in range(3):
                plan = plan / plan.sum(0, keepdim=True)
                plan = plan / plan.sum(1, keepdim=True)
            index = plan.argmax(1)
            counted = F.one_hot(index, M) * right[own][:, None]
            mean, is_there = F.normalize(counted.float().T @ x[own].detach(), dim=1), counted.sum(0) > 0
            moved[k, is_there] = (self.gamma * moved[k] + (1 - self.gamma) * mean)[is_there]
            target[own] = (k * M + index).float()
        self.prototypes = nn.Parameter(F.normalize(moved, dim=-1), requires_grad=False)
        return {"seg": seg, "logits": scores.flatten(1), "target": target}


class Loss(nn.Module):
    def forward(self, preds, target):
        up = F.interpolate(preds["seg"], target.shape[1:], mode="bilinear", align_corners=True)
        kept = preds["target"] != -1
        own = preds["logits"][kept].gather(1, preds["target"][kept].long()[:, None])
        ppc = F.cross_entropy(preds["logits"], preds["target"].long(), ignore_index=-1)
        ppd = (1 - own).square().mean()
        return F.cross_entropy(up, target, torch.tensor(WEIGHT), ignore_index=-1) + 0.01 * ppc + 0.001 * ppd


def batch(seed, dim=D):
    generator = torch.Generator().manual_seed(seed)
    gt = torch.randint(-1, K, (B, 20, 24), generator=generator)
    return torch.randn(B, dim, 10, 12, generator=generator).requires_grad_(), gt


@pytest.mark.parametrize("dim", [D, 24])
def test_three_steps_are_those_of_the_net_written_out(dim):
    ours, theirs, loss = Net(dim), WrittenOut(dim), PixelPrototypeCELoss(configer())
    for seed in range(3):
        c, gt = batch(seed, dim)
        found, expected = ours(c, gt[:, None]), theirs(c, gt[:, None])
        assert isinstance(found["logits"], RowLogits) == (dim == D)
        assert torch.equal(found["target"], expected["target"]) and found["target"].dtype == torch.float32
        torch.testing.assert_close(found["seg"], expected["seg"], rtol=1e-4, atol=1e-5)
        logits = found["logits"].dense() if dim == D else found["logits"]
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-6)
        value, true = loss(found, gt), Loss()(expected, gt)
        torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(value, c)[0], torch.autograd.grad(true, c)[0], rtol=1e-3, atol=1e-7
        )
        torch.testing.assert_close(ours.prototypes, theirs.prototypes, rtol=1e-5, atol=1e-6)


class OwnNorm(nn.LayerNorm):
    """A norm of the net's own: not stood in for."""


@pytest.mark.parametrize("kind", [nn.LayerNorm, OwnNorm])
def test_another_norm_gives_the_same_step(kind):
    ours, theirs, loss = Net(24), WrittenOut(24), PixelPrototypeCELoss(configer())
    ours.feat_norm = kind(24)
    with torch.no_grad():
        for net in (ours, theirs):
            net.feat_norm.weight.copy_(torch.linspace(0.5, 1.5, 24))
            net.feat_norm.bias.copy_(torch.linspace(-1, 1, 24))
    c, gt = batch(0, 24)
    value, true = loss(ours(c, gt[:, None]), gt), Loss()(theirs(c, gt[:, None]), gt)
    for net, found in ((ours, value), (theirs, true)):
        found.backward()
        net.got = c.grad, net.feat_norm.weight.grad, net.feat_norm.bias.grad
        c.grad = None
    for one, other in zip(ours.got, theirs.got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(ours.prototypes, theirs.prototypes, rtol=1e-5, atol=1e-6)


def test_dense_logits_of_code_that_was_not_changed_give_the_same_losses():
    c, gt = batch(0)
    found = Net()(c, gt[:, None])
    for kind in (PPC, PPD):
        criterion = kind(configer())
        lean = criterion(found["logits"], found["target"])
        torch.testing.assert_close(lean, criterion(found["logits"].dense(), found["target"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dim", [D, 24])
def test_a_batch_without_a_label_learns_nothing_and_its_contrast_is_0(dim):
    net, (c, _) = Net(dim), batch(0, dim)
    found = net(c, torch.full((B, 1, 20, 24), -1))
    assert PPC(configer())(found["logits"], found["target"]) == 0
    assert PPD(configer())(found["logits"], found["target"]) == 0
    assert torch.equal(found["target"], torch.full((B * 120,), -1.0))


def test_without_labels_or_in_pretraining_it_is_the_logits_alone():
    net, (c, gt) = Net(), batch(0)
    before = F.normalize(net.prototypes.detach(), dim=-1)
    for seg in (net(c), net(c, gt[:, None], pretrain_prototype=True)):
        assert seg.shape == (B, K, 10, 12)
    torch.testing.assert_close(net.prototypes.detach(), before)
    assert PixelPrototypeCELoss(configer())(net(c), gt).isfinite()


def test_sinkhorn_of_one_class_gives_its_likeliest_columns_and_a_sample():
    out = torch.rand(50, M, generator=torch.Generator().manual_seed(0))
    plan = (out / 0.05).exp()
    for _ in range(3):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    sampled, index = distributed_sinkhorn(out)
    assert torch.equal(index, plan.argmax(1))
    assert torch.equal(sampled.sum(1), torch.ones(50)) and sampled.dtype == out.dtype


def test_the_rmi_loss_has_to_be_given():
    with pytest.raises(ValueError, match="pass seg_criterion=FSAuxRMILoss"):
        PixelPrototypeCELoss(configer(use_rmi=True))
    given = PixelPrototypeCELoss(configer(use_rmi=True), seg_criterion=lambda pred, target: pred.sum())
    assert given(torch.ones(1, K, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)) == K * 16
    with pytest.raises(TypeError, match="give the configer"):
        PixelPrototypeCELoss()
