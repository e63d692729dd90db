"""compat.gmmseg: a head with the authors' attributes, next to the same steps written out with loops and every map there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spcl_fast.compat.gmmseg import GMMSegForward, LogDensities, MultivariateNormalDiag, distributed_sinkhorn_wograd

B, K, M, D, MEMORY, SAMPLES = 2, 4, 3, 8, 30, 5
TRAIN = {"contrast_loss": True, "contrast_loss_weight": 0.01}


class Base(nn.Module):
    """The attributes of the authors' GMMSegHead."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_classes, self.num_components, self.max_sample_size, self.update_GMM_interval = K, M, SAMPLES, 2
        self.gamma_mean, self.gamma_cov = 0.9, 0.0
        self.feat_norm, self.mask_norm = nn.LayerNorm(D), nn.LayerNorm(K)
        self.means = nn.Parameter(torch.randn(K, M, D, generator=generator), requires_grad=False)
        self.diagonal = nn.Parameter(torch.ones(K, M, D), requires_grad=False)
        self.iteration_counter = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("queue", F.normalize(torch.randn(K * M, D, MEMORY, generator=generator), dim=-2))
        self.register_buffer("queue_ptr", torch.zeros(K * M, dtype=torch.long))

    def base_feature_transform(self, inputs):
        return inputs

    def losses(self, seg_logits, gt):
        up = F.interpolate(seg_logits, gt.shape[2:], mode="bilinear", align_corners=False)
        return {"loss_ce": F.cross_entropy(up, gt[:, 0], ignore_index=255)}


class Ours(GMMSegForward, Base):
    pass


class WrittenOut(Base):
    def densities(self, x):
        mean, scale = self.means.flatten(0, 1), self.diagonal.flatten(0, 1)
        squares = ((x[:, None] - mean) / scale).square().sum(-1)
        return -0.5 * (squares + D * math.log(2 * math.pi)) - scale.log().sum(-1)

    def forward_train(self, inputs, img_metas, gt, train_cfg):
        x = F.normalize(self.feat_norm(inputs.permute(0, 2, 3, 1).reshape(-1, D)), dim=-1)
        self.means.data = F.normalize(self.means, dim=-1)
        z = self.densities(x)
        seg = self.mask_norm(z.view(-1, K, M).amax(2)).view(B, *inputs.shape[2:], K).permute(0, 3, 1, 2)
        y = F.interpolate(gt.float(), inputs.shape[2:], mode="nearest").view(-1)
        right, target = y == seg.argmax(1).view(-1), y.clone()
        for k in range(K):
            own = (y == k).nonzero()[:, 0]
            if not len(own):
                continue
            plan = z.detach().view(-1, K, M)[own, k]
            plan = (plan / plan.abs().max() / 0.05).exp()
            for _ in range(3):
                plan = plan / plan.sum(0, keepdim=True)
                plan = plan / plan.sum(1, keepdim=True)
            index = plan.argmax(1)
            target[own] = (k * M + index).float()
            for m in range(M):
                self.remember(k * M + m, x.detach()[own[(index == m) & right[own]]])
        if self.iteration_counter % self.update_GMM_interval == 0:
            self.refit([k for k in range(K) if (y == k).any()])
        found = self.losses(seg, gt)
        found["loss_contrast"] = F.cross_entropy(z, target.long(), ignore_index=255) * train_cfg["contrast_loss_weight"]
        self.iteration_counter += 1
        return found

    def remember(self, row, values):
        if len(values) > SAMPLES:
            values = values[torch.linspace(0, len(values) - 1, SAMPLES, dtype=torch.int64)]
        for value in values:
            self.queue[row, :, self.queue_ptr[row]] = value
            self.queue_ptr[row] = (self.queue_ptr[row] + 1) % MEMORY

    def refit(self, classes):
        self.means.data, self.diagonal.data = (
            self.means.data.clone(),
            self.diagonal.data.clone(),
        )  # the graph keeps its own
        for k in classes:
            for m in range(M):
                own = self.queue[k * M + m].T
                direction = F.normalize(own.sum(0), dim=0)
                self.means.data[k, m] = 0.9 * self.means.data[k, m] + 0.1 * direction
                self.diagonal.data[k, m] = ((own - direction).square().mean(0) + 1e-2).sqrt()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    gt = torch.randint(0, K, (B, 1, 20, 24), generator=generator)
    gt[:, :, :3] = 255
    return torch.randn(B, D, 10, 12, generator=generator).requires_grad_(), gt


def test_four_steps_are_those_of_the_head_written_out():
    ours, theirs = Ours(), WrittenOut()
    for seed in range(4):
        x, gt = batch(seed)
        found, expected = (head.forward_train(x, None, gt, TRAIN) for head in (ours, theirs))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
            grads = [torch.autograd.grad(losses[name], x, retain_graph=True)[0] for losses in (found, expected)]
            torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-7)
        for name in ("means", "diagonal", "queue", "queue_ptr", "iteration_counter"):
            torch.testing.assert_close(getattr(ours, name).data, getattr(theirs, name).data, rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_logits_alone_and_learns_nothing():
    head, (x, gt) = Ours(), batch(0)
    before = head.queue.clone()
    assert head(x).shape == (B, K, 10, 12) and torch.equal(head.queue, before)
    seg, densities, target = head(x, gt_semantic_seg=gt)
    assert isinstance(densities, LogDensities) and target.shape == (B * 120,)
    expected = F.cross_entropy(densities.dense(), target.long(), ignore_index=255)
    torch.testing.assert_close(densities.cross_entropy(target.long()), expected, rtol=1e-5, atol=1e-6)


def test_pixels_of_component_255_do_not_count_as_in_the_authors_code():
    x = F.normalize(torch.randn(6, D), dim=1)
    rows = MultivariateNormalDiag(torch.randn(300, D), torch.rand(300, D) + 0.5)
    densities = LogDensities(x, rows_of(rows))
    target = torch.tensor([255, 3, 255, 299, 254, 256])
    expected = F.cross_entropy(densities.dense(), target, ignore_index=255)
    torch.testing.assert_close(densities.cross_entropy(target), expected, rtol=1e-5, atol=1e-5)


def rows_of(distribution):
    from spcl_fast.estimators.mixture import gaussian_rows

    return gaussian_rows(distribution.loc, distribution.scale_diag)


def test_log_prob_is_that_of_independent_normals_in_value_and_gradient():
    loc, scale = torch.randn(6, D), torch.rand(6, D) + 0.2
    value = torch.randn(20, 1, D, requires_grad=True)
    found = MultivariateNormalDiag(loc, scale).log_prob(value)
    expected = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1).log_prob(value)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    weight = torch.randn(20, 6)
    grads = [torch.autograd.grad((z * weight).sum(), value)[0] for z in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"value must be \[N, 1, 8\], got \[20, 8\]"):
        MultivariateNormalDiag(loc, scale).log_prob(value[:, 0])
    with pytest.raises(ValueError, match=r"must both be \[R, D\]"):
        MultivariateNormalDiag(loc, scale[:2])


def test_sinkhorn_of_one_class_gives_its_likeliest_columns():
    out = torch.rand(50, M, generator=torch.Generator().manual_seed(0)) * -1
    plan = (out / 0.05).exp()
    for _ in range(3):
        plan = plan / plan.sum(0, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    one_hot, index = distributed_sinkhorn_wograd(out)
    assert torch.equal(index, plan.argmax(1)) and torch.equal(one_hot, F.one_hot(index, M).float())
