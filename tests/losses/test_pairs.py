"""pair_info_nce against the sum over every pair, written out."""

from __future__ import annotations

import pytest
import torch
from transcription import TEMPERATURES, assert_equals

from spcl_fast.losses import pairs as module
from spcl_fast.losses.pairs import pair_info_nce

N, R, D = 17, 23, 6
ANCHORS, ROWS = (torch.randn(n, D, generator=torch.Generator().manual_seed(n)) for n in (N, R))
LABELS, ROW_LABELS = (torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(n + 1)) for n in (N, R))
LABELS[3] = 9  # without a positive


def plain(anchors, labels, rows, row_labels, temperature, is_self):
    s, terms = anchors @ rows.t() / temperature, []
    for n in range(len(anchors)):
        others = s[n][row_labels != labels[n]]
        for p in range(len(rows)):
            if row_labels[p] == labels[n] and not (is_self and n == p):
                terms.append(torch.cat([s[n, p : p + 1], others]).logsumexp(0) - s[n, p])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("at_once", [1 << 20, 3 * R])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_pairs_with_rows(temperature, at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    assert_equals(
        lambda anchors, rows: pair_info_nce(anchors, LABELS, rows, ROW_LABELS, temperature=temperature),
        lambda anchors, rows: plain(anchors, LABELS, rows, ROW_LABELS, temperature, False),
        anchors=ANCHORS, rows=ROWS,
    )  # fmt: skip


@pytest.mark.parametrize("at_once", [1 << 20, 3 * N])
def test_pairs_of_a_batch_leave_out_each_row_itself(at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    assert_equals(
        lambda anchors: pair_info_nce(anchors, LABELS, temperature=0.5),
        lambda anchors: plain(anchors, LABELS, anchors, LABELS, 0.5, True),
        anchors=ANCHORS,
    )


@pytest.mark.parametrize(
    "labels", [torch.zeros(N, dtype=torch.long), torch.arange(N)], ids=["no negative", "no positive"]
)
def test_without_a_pair_or_a_negative_it_is_zero(labels):
    x = ANCHORS.clone().requires_grad_()
    loss = pair_info_nce(x, labels, temperature=0.5)
    loss.backward()
    assert loss == 0 and not x.grad.any()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="belong together"):
        pair_info_nce(ANCHORS, LABELS, ROWS, temperature=1.0)
    with pytest.raises(ValueError, match="expected anchors"):
        pair_info_nce(ANCHORS, LABELS, ROWS, LABELS, temperature=1.0)
