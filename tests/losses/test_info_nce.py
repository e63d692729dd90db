"""InfoNCE against labelled rows, written out with all similarities there; the memory; and ContrastiveSeg as an objective."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transcription import TEMPERATURES, assert_equals

from spcl_fast import catalog
from spcl_fast.config.schema import AdaptConfig
from spcl_fast.estimators import ClassMemory
from spcl_fast.losses import masked_info_nce, prototype_info_nce

A, R, D, K = 14, 37, 8, 4


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(drawn(*shape, seed=seed), dim=-1)


def integers(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def written(anchors, labels, rows, row_labels, temperature, excluded=None):
    """[A] by masks over the whole map, and whether an anchor has a positive."""
    s = anchors @ rows.T / temperature
    takes_part = row_labels != -1
    same = labels[:, None] == row_labels
    negatives = s.masked_fill(same | ~takes_part, -torch.inf).logsumexp(1)
    positive = same & takes_part & (labels != -1)[:, None]
    if excluded is not None:
        positive &= torch.arange(len(rows)) != excluded[:, None]
    log_prob = s - torch.logaddexp(s, negatives[:, None])
    counts = positive.sum(1)
    return -(log_prob.masked_fill(~positive, 0)).sum(1) / counts.clamp(min=1), counts > 0


def written_mean(*given, **more):
    losses, is_there = written(*given, **more)
    return losses[is_there].mean()


@pytest.fixture(params=[1 << 22, 5 * A], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr("spcl_fast.losses.info_nce._BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_each_positive_meets_the_negatives_alone(temperature):
    labels, row_labels = integers(K, A, seed=3), integers(K, R, seed=4)
    labels[:2], row_labels[:3] = -1, -1
    assert_equals(
        lambda a, r: masked_info_nce(a, labels, r, row_labels, temperature=temperature),
        lambda a, r: written_mean(a, labels, r, row_labels, temperature),
        a=unit(A, D, seed=1), r=unit(R, D, seed=2), slack=64,
    )  # fmt: skip


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_anchors_against_themselves_leave_themselves_out(temperature):
    labels, numbers = integers(K, A, seed=3), torch.arange(A)
    assert_equals(
        lambda a: masked_info_nce(a, labels, a, labels, temperature=temperature, excluded=numbers),
        lambda a: written_mean(a, labels, a, labels, temperature, excluded=numbers),
        a=unit(A, D, seed=1), slack=64,
    )  # fmt: skip


@pytest.mark.usefixtures("blocks")
def test_parts_sorted_by_label_and_each_anchors_own_loss():
    labels, sizes = integers(K, A, seed=3), (9, 11, 0, 17)
    rows = unit(R, D, seed=2)
    row_labels = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    assert_equals(
        lambda a, r: masked_info_nce(a, labels, r.split(sizes), row_labels.split(sizes), temperature=0.1, reduction="none"),
        lambda a, r: written(a, labels, r, row_labels, 0.1)[0],
        a=unit(A, D, seed=1), r=rows, slack=64,
    )  # fmt: skip


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_prototype_as_the_one_positive(temperature):
    labels, row_labels = integers(K, A, seed=3), integers(K, R, seed=4)
    labels[:2] = -1

    def plain(a, p, r):
        s = (a @ r.T / temperature).masked_fill(labels[:, None] == row_labels, -torch.inf)
        own = (a * p[labels.clamp(min=0)]).sum(1, keepdim=True) / temperature
        losses = F.cross_entropy(torch.cat([own, s], 1), torch.zeros(A, dtype=torch.int64), reduction="none")
        return losses[labels != -1].mean()

    leaves = {"a": unit(A, D, seed=1), "p": unit(K, D, seed=5), "r": unit(R, D, seed=2)}
    assert_equals(
        lambda a, p, r: prototype_info_nce(a, labels, p, r, row_labels, temperature=temperature),
        plain,
        **leaves,
        slack=64,
    )


def test_without_positives_or_negatives_the_loss_is_0_and_its_gradient_finite():
    a, r = unit(A, D, seed=1).requires_grad_(), unit(R, D, seed=2)
    zeros, ones = torch.zeros(A, dtype=torch.int64), torch.ones(R, dtype=torch.int64)
    for row_labels in (ones, torch.zeros_like(ones), -ones):  # no positive; no negative; nothing
        loss = masked_info_nce(a, zeros, r, row_labels, temperature=0.1)
        assert loss == 0 and not torch.autograd.grad(loss, a)[0].any()


def test_the_map_is_never_there():
    """Eight megabytes of similarities would be; what is saved for the backward is anchors, rows and vectors."""
    saved, a, r = [], unit(500, D, seed=1).requires_grad_(), unit(4000, D, seed=2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_info_nce(a, integers(K, 500), r, integers(K, 4000), temperature=0.1)
    assert max(t.numel() for t in saved) <= r.numel()


def test_what_does_not_fit_is_refused():
    a, r, y, z = unit(A, D), unit(R, D), integers(K, A), integers(K, R)
    with pytest.raises(ValueError, match=r"rows must be \[R, 8\] and row_labels \[R\], got \[37, 7\] and \[37\]"):
        masked_info_nce(a, y, r[:, 1:], z, temperature=0.1)
    with pytest.raises(ValueError, match="as many row_labels as rows, got 1 and 2 parts"):
        masked_info_nce(a, y, [r, r], z, temperature=0.1)
    with pytest.raises(ValueError, match=r"labels must be \[A\] = \[14\], got shape \[13\]"):
        masked_info_nce(a, y[1:], r, z, temperature=0.1)
    with pytest.raises(ValueError, match="temperature"):
        masked_info_nce(a, y, r, z, temperature=0.0)


# ---- the memory and the objective --------------------------------------------------------------------------------------


def test_the_memory_says_which_rows_are_written_and_remembers_the_last():
    memory = ClassMemory(3, D, 4, max_samples=3)
    x, y = drawn(1, D, 1, 5), torch.tensor([[[0, 0, 1, 255, 1]]])
    memory.update_(x, y)
    assert memory.row_labels.tolist() == [0, 0, -1, -1, 1, 1, -1, -1, -1, -1, -1, -1]
    torch.testing.assert_close(memory.queue[1, :2], F.normalize(x[0, :, 0, [2, 4]].T, dim=1))
    torch.testing.assert_close(memory.means[1], memory.queue[1, :2].mean(0))
    memory.update_(-x, torch.zeros_like(y))  # five pixels of class 0: the first, the third and the last
    expected = F.normalize(-x[0, :, 0, [0, 2, 4]].T, dim=1)
    torch.testing.assert_close(memory.queue[0, [2, 3, 0]], expected)
    assert memory.row_labels.tolist()[:4] == [0] * 4 and not memory.means[2].any()
    with pytest.raises(ValueError, match="must have 8 channels"):
        memory.update_(x[:, 1:], y)


def test_adapt_takes_it_by_name():
    objective = catalog.load(catalog.find(catalog.LOSSES, "contrastiveseg").home)(
        K, D, AdaptConfig(contrast_temperature=0.1)
    )
    x, y = drawn(2, D, 5, 7).requires_grad_(), integers(K, 2, 10, 14)
    assert objective(x, y) == 0  # nothing is remembered
    objective.load_(drawn(K, D)).update_(x.detach(), y)
    assert torch.equal(objective.memory.queue_next, objective.memory.written)
    loss = objective(x, y)
    loss.backward()
    small = F.interpolate(y[:, None].double(), (5, 7), mode="nearest")[:, 0].long()
    flat = F.normalize(x.movedim(1, -1).flatten(0, 2), dim=1)
    is_there = objective.memory.row_labels >= 0
    rows, of_rows = objective.memory.rows[is_there], objective.memory.row_labels[is_there]
    torch.testing.assert_close(loss, written_mean(flat, small.flatten(), rows, of_rows, 0.1), rtol=1e-4, atol=1e-5)
    assert objective.prototypes.shape == (K, D) and x.grad.any()
    assert objective(x, torch.full((2, 5, 7), 255)) == 0
    with pytest.raises(ValueError, match=r"expected prototypes \[4, 8\], got \[3, 8\]"):
        objective.load_(drawn(3, D))
