"""compat.sdca: names, files and results of BIT-DA/SDCA and jiangzhengkai/ProCA."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F

from spcl_fast.compat import sdca

N, A, C = 90, 12, 4
FEAT = torch.randn(N, A, generator=torch.Generator().manual_seed(0)) + 1
LABELS = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(1))
LABELS[:9] = 255


def cfg(folder="", resume="", momentum=False):
    space = types.SimpleNamespace
    contrast = space(TAU=0.7, USE_MOMENTUM=momentum, MOMENTUM=0.3)
    return space(
        SOLVER=space(TAU=0.7), INPUT=space(IGNORE_LABEL=255), CV_DIR=str(resume), OUTPUT_DIR=str(folder),
        MODEL=space(NUM_CLASSES=C, NAME="deeplab_resnet101", CONTRAST=contrast),
    )  # fmt: skip


def test_the_losses_are_the_authors_on_rows_and_on_maps():
    mean, covariance = torch.randn(C, A) * 2, torch.rand(C, A) * 3
    x, y = F.normalize(FEAT[9:], dim=1), LABELS[9:]
    v = 0.5 * x.square() @ F.normalize(covariance, dim=1).t() / 0.7**2
    z = x @ F.normalize(mean, dim=1).t() / 0.7
    expected = F.cross_entropy(z + v, y) + v.gather(1, y[:, None]).mean()
    criterion = sdca.PixelContrastiveLoss(cfg())
    torch.testing.assert_close(criterion(Mean=mean, CoVariance=covariance, feat=FEAT, labels=LABELS), expected)
    maps = FEAT.view(1, 9, 10, A).permute(0, 3, 1, 2)
    torch.testing.assert_close(criterion(mean, covariance, maps, LABELS.view(1, 9, 10)), expected)
    got = sdca.PrototypeContrastiveLoss(cfg())(Proto=mean, feat=FEAT, labels=LABELS)
    torch.testing.assert_close(got, F.cross_entropy(z, y))
    with pytest.raises(ValueError, match=r"Mean requires grad.*Mean.detach\(\)"):
        criterion(mean.requires_grad_(), covariance, FEAT, LABELS)


def test_the_estimator_has_the_authors_statistics_and_files(tmp_path):
    estimator = sdca.semantic_dist_estimator(2048, cfg(tmp_path), device="cpu")
    assert estimator.Mean.shape == (C, 2048) and estimator.feature_num == 2048
    estimator = sdca.semantic_dist_estimator(A, cfg(tmp_path), device="cpu")
    for part in (slice(0, 40), slice(40, N)):
        estimator.update(features=FEAT[part], labels=LABELS[part])
    rows = [FEAT[k == LABELS].double() for k in range(C)]
    torch.testing.assert_close(estimator.Mean.double(), torch.stack([r.mean(0) for r in rows]), rtol=1e-5, atol=1e-6)
    covariance = torch.stack([r.var(0, unbiased=False) for r in rows])
    torch.testing.assert_close(estimator.CoVariance.double(), covariance, rtol=1e-4, atol=1e-6)
    assert estimator.Amount.tolist() == [len(r) for r in rows]
    scores = sdca.semantic_dist_estimator(C, cfg(tmp_path), device="cpu")
    scores.update(FEAT[:, :C], LABELS)
    scores.save("out_dist.pth")
    again = sdca.semantic_dist_estimator(C, cfg(tmp_path, resume=tmp_path), device="cpu")
    for name in ("Mean", "CoVariance", "Amount"):
        assert torch.equal(getattr(again, name), getattr(scores, name))
    with pytest.raises(RuntimeError, match="Feature_num not available: 7"):
        sdca.semantic_dist_estimator(7, cfg(tmp_path, resume=tmp_path), device="cpu")


@pytest.mark.parametrize("momentum", [False, True])
def test_procas_estimator_averages_or_moves_and_keeps_an_absent_class(momentum, tmp_path):
    estimator = sdca.prototype_dist_estimator(C, cfg(tmp_path, momentum=momentum), device="cpu")
    proto, amount = torch.zeros(C, C), torch.zeros(C)
    for part in (slice(0, 40), slice(40, N)):
        x, y = FEAT[part, :C], LABELS[part].where(LABELS[part] != 2, 255)
        estimator.update(x, y)
        for k in set(y.tolist()) - {255}:
            rows = x[y == k]
            if momentum:
                proto[k] += 0.3 * (rows.mean(0) - proto[k])
                amount[k] += (y != 255).sum()
            else:
                proto[k] = (proto[k] * amount[k] + rows.sum(0)) / (amount[k] + len(rows))
                amount[k] += len(rows)
    torch.testing.assert_close(estimator.Proto, proto, rtol=1e-5, atol=1e-6)
    assert torch.equal(estimator.Amount, amount)
    estimator.save("prototype_out_dist.pth")
    again = sdca.prototype_dist_estimator(C, cfg(tmp_path, resume=tmp_path), device="cpu")
    assert torch.equal(again.Proto, estimator.Proto) and torch.equal(again.Amount, amount)
    assert set(torch.load(tmp_path / "prototype_out_dist.pth", weights_only=True)) == {"Proto", "Amount"}
