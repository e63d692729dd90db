"""Losses of labelled pixels against class statistics: SePiCo, SDCA, ProCA, and their estimators."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.family.authors import Authors
from benchmarks.family.case import Case, Goal, drawn, generator, gradients, unit
from benchmarks.problems import IGNORE, blocks_of_labels
from spcl_fast.compat import sdca, sepico

CLASSES = 19
PIXELS = {"batch": 2, "dim": 512, "height": 80, "width": 80, "scale": 8}
FEW = {"batch": 1, "dim": 16, "height": 8, "width": 8, "scale": 8}
WIDE, NARROW = {"pixels": 14400, "dim": 2048}, {"pixels": 500, "dim": 16}
# the estimator's own goal; theirs makes [N, C, A] tensors of 2.2 GB
ESTIMATOR = Goal(10, 50, either=False)


def cfg() -> SimpleNamespace:
    contrast = SimpleNamespace(TAU=1.0, USE_MOMENTUM=False, MOMENTUM=0.0)
    model = SimpleNamespace(NUM_CLASSES=CLASSES, NAME="deeplab_resnet101", CONTRAST=contrast)
    return SimpleNamespace(
        MODEL=model, INPUT=SimpleNamespace(IGNORE_LABEL=IGNORE), SOLVER=SimpleNamespace(TAU=1.0), CV_DIR=""
    )


# ---- SePiCo -----------------------------------------------------------------------------------------------------------


def maps(batch: int, dim: int, height: int, width: int, scale: int) -> SimpleNamespace:
    """Unit features, labels of the image's size in blocks that straddle the features' cells, class means and variances, a bank."""
    features = F.normalize(drawn(batch, dim, height, width), dim=1).requires_grad_()
    labels = blocks_of_labels(batch, height, width, CLASSES, generator(), torch.int64)
    labels = labels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).roll(3, 2)
    bank = unit(CLASSES, 200, dim, seed=3)
    return SimpleNamespace(
        features=features,
        mask=labels[:, None],
        mean=unit(CLASSES, dim, seed=1),
        covariance=drawn(CLASSES, dim, seed=2).square() / dim,
        bank=[list(rows.split(1)) for rows in bank],
    )


def _sepico_loss(module, given: SimpleNamespace, use: str):
    criterion = module.ContrastiveLoss(
        use_dist=use == "dist", use_bank=use == "bank", use_reg=True, num_classes=CLASSES
    )
    statistics = {"mean": given.mean, "covariance": given.covariance, "bank": given.bank}

    def step():
        return gradients(criterion(given.features, given.mask, **statistics), features=given.features)

    return step


def _sepico_module(authors: Authors):
    utils = authors.load(
        "SePiCo", "mmseg/models/losses/utils.py", {"mmcv": None}, as_module="mmseg.models.losses.utils"
    )
    imports = {"mmseg.models.losses.utils": utils, "mmseg.models.builder": None}
    return authors.load(
        "SePiCo", "mmseg/models/losses/contrastive_loss.py", imports, as_module="mmseg.models.losses.contrastive_loss"
    )


def _sepico_case(use: str, title: str) -> Case:
    return Case(
        f"sepico-{use}", "SePiCo", f"SePiCo, {title}: 2 images, D 512, 80x80 of 640x640, K 19", PIXELS, FEW, maps,
        lambda authors, given: _sepico_loss(_sepico_module(authors), given, use),
        lambda given: _sepico_loss(sepico, given, use), theirs_gb=1.5,
    )  # fmt: skip


# ---- estimators -------------------------------------------------------------------------------------------------------


def rows(pixels: int, dim: int) -> SimpleNamespace:
    labels = torch.randint(0, CLASSES, (pixels,), generator=generator(1))
    return SimpleNamespace(features=drawn(pixels, dim).requires_grad_(), labels=labels, dim=dim)


def _estimator(made, update: str, names: dict[str, str], given: SimpleNamespace):
    def step():
        getattr(made, update)(given.features.detach(), given.labels)
        return {name: getattr(made, attribute) for name, attribute in names.items()}

    return step


def _statistics(mean: str, covariance: str | None = None) -> dict[str, str]:
    return {"mean": mean, "amount": "Amount"} | ({"covariance": covariance} if covariance else {})


def _sepico_estimator(module, given: SimpleNamespace):
    made = module.ProtoEstimator(given.dim, CLASSES)
    return _estimator(made, "update_proto", _statistics("Ave", "CoVariance"), given)


def _sdca_estimator(made_by, given: SimpleNamespace):
    return _estimator(made_by(given.dim, cfg()), "update", _statistics("Mean", "CoVariance"), given)


def _proca_estimator(made_by, given: SimpleNamespace):
    return _estimator(made_by(given.dim, cfg()), "update", _statistics("Proto"), given)


# ---- SDCA and ProCA ---------------------------------------------------------------------------------------------------


def _with_statistics(pixels: int, dim: int) -> SimpleNamespace:
    given = rows(pixels, dim)
    given.labels[torch.rand(pixels, generator=generator(2)) < 0.1] = IGNORE
    given.mean, given.covariance = drawn(CLASSES, dim, seed=3), drawn(CLASSES, dim, seed=4).square()
    return given


def _sdca_loss(made_by, given: SimpleNamespace):
    criterion = made_by(cfg())
    return lambda: gradients(
        criterion(given.mean, given.covariance, given.features, given.labels), features=given.features
    )


def _proca_loss(made_by, given: SimpleNamespace):
    criterion = made_by(cfg())
    return lambda: gradients(criterion(given.mean, given.features, given.labels), features=given.features)


def _utils(repository: str, file: str, name: str):
    return lambda authors: getattr(authors.load(repository, f"core/utils/{file}.py"), name)


def _rows_case(name: str, repository: str, words: str, problem, build, file: str, theirs: str, **more) -> Case:
    load = _utils(repository, file, theirs)
    return Case(
        name, repository, f"{words}: N 14 400, D 2048, K 19", WIDE, NARROW, problem,
        lambda authors, given: build(load(authors), given), lambda given: build(getattr(sdca, theirs), given), **more,
    )  # fmt: skip


CASES = (
    _sepico_case("proto", "ProtoCL"),
    _sepico_case("dist", "DistCL"),
    _sepico_case("bank", "BankCL, bank of 200 rows per class"),
    Case(
        "sepico-estimator", "SePiCo", "SePiCo, estimator: N 14 400, D 2048, K 19", WIDE, NARROW, rows,
        lambda authors, given: _sepico_estimator(authors.load("SePiCo", "mmseg/models/utils/proto_estimator.py"), given),
        lambda given: _sepico_estimator(sepico, given), ESTIMATOR, theirs_gb=10.5,
    ),
    _rows_case("sdca", "SDCA", "SDCA", _with_statistics, _sdca_loss, "loss", "PixelContrastiveLoss"),
    _rows_case(
        "sdca-estimator", "SDCA", "SDCA, estimator", rows, _sdca_estimator, "semantic_dist_estimator",
        "semantic_dist_estimator", goal=ESTIMATOR, theirs_gb=10.5,
    ),
    _rows_case("proca", "ProCA", "ProCA", _with_statistics, _proca_loss, "loss", "PrototypeContrastiveLoss"),
    _rows_case(
        "proca-estimator", "ProCA", "ProCA, estimator", rows, _proca_estimator, "prototype_dist_estimator",
        "prototype_dist_estimator", goal=ESTIMATOR, theirs_gb=8.0,
    ),
)  # fmt: skip
