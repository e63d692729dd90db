"""compat.contrastiveseg next to the authors' formulas with every map there, on the same drawn anchors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from configer import Configer

from spcl_fast.compat.contrastiveseg import (
    ContrastAuxCELoss,
    ContrastCELoss,
    MemContrastCELoss,
    MemoryUpdate,
    PixelContrastLoss,
)

B, D, K, GRID, LARGE = 2, 8, 4, (10, 12), (20, 24)
WEIGHT = [0.8, 1.2, 1.0, 0.9]


def configer(**contrast):
    given = {"temperature": 0.1, "base_temperature": 0.07, "max_samples": 60, "max_views": 5, "loss_weight": 0.5}
    return Configer(
        contrast=given | {"use_rmi": False, "use_lovasz": False} | contrast,
        loss={"params": {"ce_weight": WEIGHT, "ce_ignore_index": -1}},
        network={"loss_weights": {"seg_loss": 1.0, "aux_loss": 0.4}},
    )


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    feats = F.normalize(torch.randn(B, D, *GRID, generator=generator), dim=1).requires_grad_()
    labels = torch.randint(-1, K, (B, *LARGE), generator=generator)
    return feats, labels, torch.randn(B, K, *GRID, generator=generator)


def written_out(feats, labels, predict, queue=None, max_samples=60, max_views=5):
    """Sampling in the order of the authors' draws, then masks over [anchors, rows]."""
    y = F.interpolate(labels[:, None].float(), GRID, mode="nearest").long().flatten(1)
    x, predict = feats.flatten(2).transpose(1, 2), predict.flatten(1)
    groups = [(b, c) for b in range(B) for c in y[b].unique().tolist() if c != -1 and (y[b] == c).sum() > max_views]
    views = min(max_samples // len(groups), max_views)
    anchors = []
    for b, c in groups:
        hard = ((y[b] == c) & (predict[b] != c)).nonzero()[:, 0]
        easy = ((y[b] == c) & (predict[b] == c)).nonzero()[:, 0]
        if len(hard) >= views / 2 and len(easy) >= views / 2:
            few = views // 2
        elif len(hard) >= views / 2:
            few = views - len(easy)
        else:
            few = len(hard)
        hard, easy = hard[torch.randperm(len(hard))[:few]], easy[torch.randperm(len(easy))[: views - few]]
        anchors.append(x[b, torch.cat([hard, easy])])
    own = torch.tensor([c for _, c in groups]).repeat(views)
    anchors = torch.stack(anchors).transpose(0, 1).reshape(-1, D)
    rows, of_rows = anchors, own
    if queue is not None:
        rows = torch.cat([*queue[1:], torch.zeros_like(queue[0])])
        of_rows = torch.cat(
            [torch.arange(1, K).repeat_interleave(queue.shape[1]), torch.zeros(queue.shape[1], dtype=torch.int64)]
        )
    s = anchors @ rows.T / 0.1
    same = own[:, None] == of_rows
    negatives = (s.exp() * ~same).sum(1, keepdim=True)
    positive = same & (torch.arange(len(rows)) != torch.arange(len(anchors))[:, None])
    log_prob = s - (s.exp() + negatives).log()
    return -(0.1 / 0.07) * ((positive * log_prob).sum(1) / positive.sum(1)).mean()


def both(ours, theirs, feats, seed=0):
    """Values and gradients with the same random numbers."""
    found = []
    for loss in (ours, theirs):
        torch.manual_seed(seed)
        value = loss()
        found.append((value, *torch.autograd.grad(value, feats)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def memory():
    return F.normalize(torch.randn(2, K, 15, D, generator=torch.Generator().manual_seed(9)), dim=-1)


@pytest.mark.parametrize("with_memory", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_contrast_is_that_of_the_authors_on_the_same_anchors(seed, with_memory):
    feats, labels, logits = batch(seed)
    queue = torch.cat(tuple(memory()), 1) if with_memory else None
    criterion = PixelContrastLoss(configer())
    both(
        lambda: criterion(feats, labels, logits.argmax(1), queue),
        lambda: written_out(feats, labels, logits.argmax(1), queue),
        feats,
    )


def cross_entropy(seg, target):
    up = F.interpolate(seg, target.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(up, target, torch.tensor(WEIGHT), ignore_index=-1)


def test_the_whole_losses_add_segmentation_and_contrast():
    feats, labels, logits = batch()
    preds = {"seg": logits, "embed": feats, "seg_aux": logits * 0.5 + 1}
    seg, aux = cross_entropy(preds["seg"], labels), cross_entropy(preds["seg_aux"], labels)
    contrast = lambda queue=None: 0.5 * written_out(feats, labels, logits.argmax(1), queue)  # noqa: E731
    both(lambda: ContrastCELoss(configer())(preds, labels, with_embed=True), lambda: seg + contrast(), feats)
    both(
        lambda: ContrastAuxCELoss(configer())(preds, labels, with_embed=True),
        lambda: seg + 0.4 * aux + contrast(),
        feats,
    )
    queues = dict(zip(("segment_queue", "pixel_queue"), memory(), strict=True))
    both(lambda: MemContrastCELoss(configer())(preds | queues, labels, with_embed=True),
         lambda: seg + contrast(torch.cat(tuple(memory()), 1)), feats)  # fmt: skip
    torch.testing.assert_close(MemContrastCELoss(configer())(preds, labels, with_embed=True), seg, rtol=1e-5, atol=1e-6)


def test_before_the_warm_up_ends_the_projection_takes_part_with_gradient_0():
    feats, labels, logits = batch()
    loss = ContrastCELoss(configer())({"seg": logits, "embed": feats}, labels)
    torch.testing.assert_close(loss, cross_entropy(logits, labels), rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(loss, feats)[0].any()


def test_a_batch_without_enough_pixels_of_any_class_gives_0():
    feats, labels, logits = batch()
    criterion = PixelContrastLoss(configer(max_views=1000))
    assert criterion(feats, labels, logits.argmax(1)) == 0
    few = PixelContrastLoss(configer(max_samples=2))
    assert few(feats, labels, logits.argmax(1)) == 0  # fewer samples than groups


def test_a_loss_that_is_not_here_has_to_be_given():
    with pytest.raises(ValueError, match="MemContrastCELoss: contrast.use_lovasz is set; pass seg_criterion="):
        MemContrastCELoss(configer(use_lovasz=True))
    feats, labels, logits = batch()
    given = ContrastCELoss(configer(use_rmi=True), seg_criterion=lambda pred, target: pred.mean())
    up = F.interpolate(logits, LARGE, mode="bilinear", align_corners=True)
    torch.testing.assert_close(given({"seg": logits, "embed": feats}, labels), up.mean())
    with pytest.raises(TypeError, match="ContrastAuxCELoss: give the configer"):
        ContrastAuxCELoss()


class Trainer(MemoryUpdate):
    network_stride, memory_size, pixel_update_freq = 2, 6, 3


def test_the_memory_moves_with_the_quirks_of_the_authors():
    keys = torch.randn(1, D, *GRID, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, *LARGE, dtype=torch.int64)
    labels[:, :, 20:] = 2  # at the right edge: none of the first pixels of the map is of class 2
    labels[:, 0, 0] = -1
    queues = [
        torch.zeros(K, 6, D),
        torch.zeros(K, dtype=torch.int64),
        torch.zeros(K, 6, D),
        torch.zeros(K, dtype=torch.int64),
    ]
    torch.manual_seed(0)
    Trainer()._dequeue_and_enqueue(keys, labels, *queues)
    segment, segment_at, pixel, pixel_at = queues
    is_two = (labels[:, ::2, ::2] == 2).flatten()
    torch.testing.assert_close(segment[2, 0], F.normalize(keys.flatten(2)[0][:, is_two].mean(1), dim=0))
    torch.manual_seed(0)
    drawn = torch.randperm(int(is_two.sum()))[:3]
    torch.testing.assert_close(pixel[2, :3], F.normalize(keys.flatten(2)[0][:, drawn].T, dim=1))
    assert segment_at.tolist() == [0, 0, 1, 0] and pixel_at.tolist() == [
        0,
        0,
        1,
        0,
    ]  # by one, though three were written
    assert not segment[[0, 1, 3]].any() and not pixel[[0, 1, 3]].any()  # class 0 never
    pixel_at[2] = 4
    Trainer()._dequeue_and_enqueue(keys, labels, *queues)
    assert pixel_at[2] == 0 and pixel[2, 3:].any(1).all()  # the last three, and from the start
