"""compat.pytorch_metric_learning: losses written out as the library defines them, names of parameters and defaults."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from transcription import assert_equals

from spcl_fast.compat import pytorch_metric_learning as pml

N, D, K = 21, 8, 6
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(1))


def seeded(criterion):
    for parameter in criterion.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return criterion


def cosines(x, rows):
    return F.normalize(x, dim=1) @ F.normalize(rows, dim=1).t()


def normalized_softmax(x, rows):
    return F.cross_entropy(cosines(x, rows) / 0.05, Y)


def cosface(x, rows):
    return F.cross_entropy(64 * (cosines(x, rows) - 0.35 * F.one_hot(Y, K).to(x.dtype)), Y)


def proxy_nca(x, rows):
    distance = torch.cdist(F.normalize(x, dim=1), F.normalize(rows, dim=1)).square()
    return -(-3 * distance).softmax(1).gather(1, Y[:, None]).log().mean()


CASES = {
    "NormalizedSoftmaxLoss": (lambda: pml.NormalizedSoftmaxLoss(K, D), normalized_softmax, "W"),
    "CosFaceLoss": (lambda: pml.CosFaceLoss(K, D), cosface, "W"),
    "ProxyNCALoss": (lambda: pml.ProxyNCALoss(num_classes=K, embedding_size=D, softmax_scale=3), proxy_nca, "proxies"),
}


@pytest.mark.parametrize(("make", "plain", "name"), CASES.values(), ids=CASES)
def test_value_and_both_gradients(make, plain, name):
    criterion = seeded(make())
    assert list(criterion.state_dict()) == [name]
    weight = getattr(criterion, name).detach()
    rows = weight.t() if name == "W" else weight
    assert rows.shape == (K, D)

    def ours(x, rows):
        given = {name: rows.t() if name == "W" else rows}
        return torch.func.functional_call(criterion, given, (x, Y))

    assert_equals(ours, plain, x=X, rows=rows, slack=64)


def test_ntxent_is_the_mean_over_pairs_with_and_without_references():
    x = F.normalize(X, dim=1)
    ref, ref_labels = torch.randn(11, D), torch.arange(11) % K
    for rows, labels, is_self in ((x, Y, True), (F.normalize(ref, dim=1), ref_labels, False)):
        s, terms = x @ rows.t() / 0.07, []
        for n in range(N):
            for p in range(len(rows)):
                if labels[p] == Y[n] and not (is_self and n == p):
                    terms.append(-(s[n, p].exp() / (s[n, p].exp() + s[n][labels != Y[n]].exp().sum())).log())
        given = () if is_self else (None, ref, ref_labels)
        torch.testing.assert_close(pml.NTXentLoss()(X, Y, *given), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_defaults_and_logits_are_the_librarys():
    def defaults(loss):
        given = inspect.signature(loss).parameters
        return {name: p.default for name, p in given.items() if p.default is not inspect.Parameter.empty}

    assert defaults(pml.NormalizedSoftmaxLoss) == {"temperature": 0.05}
    assert defaults(pml.CosFaceLoss) == {"margin": 0.35, "scale": 64}
    assert defaults(pml.ProxyNCALoss) == {"softmax_scale": 1} and defaults(pml.NTXentLoss) == {"temperature": 0.07}
    assert list(inspect.signature(pml.NTXentLoss.forward).parameters)[1:] == [
        "embeddings",
        "labels",
        "indices_tuple",
        "ref_emb",
        "ref_labels",
    ]
    criterion = seeded(pml.CosFaceLoss(K, D))
    torch.testing.assert_close(criterion.get_logits(X), 64 * cosines(X, criterion.W.t()))
    criterion = seeded(pml.ProxyNCALoss(K, D))
    torch.testing.assert_close(criterion.get_logits(X), 2 - 2 * cosines(X, criterion.proxies))


def test_half_embeddings_give_a_float32_loss():
    for criterion in (pml.NTXentLoss(), seeded(pml.CosFaceLoss(K, D))):
        x = X.bfloat16().requires_grad_()
        loss = criterion(x, Y)
        loss.backward()
        assert loss.dtype == torch.float32 and x.grad.isfinite().all()


def test_what_is_not_done_here_points_to_the_library():
    with pytest.raises(ValueError, match="distance, reducer is not taken here; use pytorch_metric_learning.losses"):
        pml.NTXentLoss(reducer=None, distance=None)
    with pytest.raises(ValueError, match="no indices_tuple"):
        pml.NTXentLoss()(X, Y, (Y, Y, Y))
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        pml.CosFaceLoss(K, D)(X, Y, None, X, Y)
    with pytest.raises(ValueError, match=r"embeddings must be \[N, D\] and labels \[N\]"):
        pml.CosFaceLoss(K, D)(X, Y[:3])
