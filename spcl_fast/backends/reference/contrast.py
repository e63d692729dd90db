"""prototype_contrastive_loss and prototype_logits, one image at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Contrast, Gradients, Logits, Saved, SavedLike, Wanted
from . import rows as linear
from .exact import exact, fixed_sum, matmul, wide
from .rows import WideRows
from .targets import Goal, goal_of, is_soft, negative_log_softmax, soft_loss, soft_residual, softmax, targets_of_image


def saves_logits(num_rows: int, dim: int) -> bool:
    return num_rows * 4 <= dim


def saved_like(contrast: Contrast, wanted: Wanted) -> SavedLike:
    return SavedLike(wide(contrast.features.dtype), any(wanted) and saves_logits(*contrast.prototypes.shape[-2:]))


def _with_margin(z: Tensor, rows: WideRows, contrast: Contrast, goal: Goal, b: int) -> Tensor:
    """Logits of the classes [K, P], the label's less the margin."""
    if not contrast.margin:
        return z
    off = (-contrast.margin / rows.temperature) * goal.labelled[b].to(z.dtype)
    return z.scatter_add(0, goal.classes(b)[None], off[None])


def _variance_term(x: Tensor, inv: Tensor, rows: WideRows, index: Tensor) -> Tensor:
    """[P]: that of each pixel's own class."""
    assert rows.variances is not None
    whole = matmul(rows.variances, x.square()) * (0.5 * inv.square() / rows.temperature**2)
    return whole.gather(0, index[None])[0]


def _pixel_losses(z: Tensor, x: Tensor, inv: Tensor, rows: WideRows, contrast: Contrast, goal: Goal, b: int) -> Tensor:
    """[P], before factor and pixel weight."""
    if is_soft(contrast):
        return soft_loss(z, targets_of_image(contrast, goal, b, z.dtype), contrast.class_weight, contrast.loss)
    own = negative_log_softmax(z).gather(0, goal.classes(b)[None])[0]
    if rows.variances is not None and not contrast.positive_variance:
        own = own + _variance_term(x, inv, rows, goal.classes(b))
    return own


@exact
def contrast_forward(contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
    c, features, save = contrast, contrast.features, any(wanted)
    dtype, (batch, _, height, width) = wide(features.dtype), features.shape
    goal = goal_of(c, dtype)
    all_rows = linear.rows_of(c, dtype)
    num_rows = c.prototypes.shape[-2]
    nll = features.new_zeros(batch, height * width, dtype=dtype)
    lse, inv = torch.zeros_like(nll), torch.zeros_like(nll)
    logits = nll.new_zeros((batch, num_rows, height * width) if saved_like(c, wanted).logits else 0)
    for b in range(batch):
        x, rows = features[b].flatten(1).to(dtype), all_rows.image(b)
        inv[b] = linear.inverse_norm(x, c.normalize)
        s = linear.row_logits(x, inv[b], rows)
        if logits.numel():
            logits[b] = s
        z = _with_margin(linear.pooled(s, rows), rows, c, goal, b)
        if c.loss == "softmax":
            lse[b] = z.logsumexp(0)
        nll[b] = _pixel_losses(z, x, inv[b], rows, c, goal, b).where(goal.labelled[b], 0)
    loss, denominator = reduced(nll, goal, c)
    if c.reduction == "none":
        loss = loss.view(batch, height, width)
    if not save:
        lse, inv, logits = nll.new_empty(0), nll.new_empty(0), nll.new_empty(0)
    return loss, Saved(denominator, lse, inv, logits, features.new_empty(0))


def reduced(nll: Tensor, goal: Goal, contrast: Contrast) -> tuple[Tensor, Tensor]:
    """-> loss ([B, P] for "none"), denominator []."""
    c, dtype = contrast, nll.dtype
    weighted = nll * goal.factor
    if c.pixel_weight is not None:
        weighted = weighted * c.pixel_weight.flatten(1).to(dtype)
    weighted = weighted.where(goal.labelled, 0)
    denominator = nll.new_ones(())
    if c.reduction == "mean":
        denominator = fixed_sum(goal.counted).to(dtype) if c.denominator is None else c.denominator.to(dtype, copy=True)
    if c.reduction == "none":
        loss = weighted
    else:
        loss = (fixed_sum(weighted) / torch.where(denominator == 0, 1, denominator)).to(dtype)
        loss = torch.where(denominator == 0, 0, loss)
    return loss if goal.any_bad is None else torch.where(goal.any_bad, torch.nan, loss), denominator


@exact
def contrast_backward(grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
    c, features = contrast, contrast.features
    dtype = wide(features.dtype)
    goal = goal_of(c, dtype, check=False)
    all_rows = linear.rows_of(c, dtype)
    scale = goal.factor
    if c.pixel_weight is not None:
        scale = (scale * c.pixel_weight.flatten(1).to(dtype)).where(goal.labelled, 0)
    scale = scale * (grad_loss.flatten(1) if c.reduction == "none" else grad_loss).to(dtype)
    scale = torch.where(saved.denominator == 0, 0, scale / saved.denominator)
    gradients = empty_gradients(features, all_rows, wanted)
    for b in range(features.shape[0]):
        x, rows, inv, labelled = (
            features[b].flatten(1).to(dtype),
            all_rows.image(b),
            saved.inv_norm[b],
            goal.labelled[b],
        )
        s = saved.logits[b] if saved.logits.numel() else linear.row_logits(x, inv, rows)
        z = linear.pooled(s, rows)
        dz, dz_variances = _residuals(_with_margin(z, rows, c, goal, b), c, goal, b)
        dz = (dz * scale[b]).where(labelled, 0)
        ds = linear.unpooled(dz, s, z, rows).where(labelled, 0)  # shares of logits that are no numbers are none
        ds_variances = ds if dz_variances is None else (dz_variances * scale[b]).where(labelled, 0)
        add_gradients(gradients, b, linear.row_gradients(x, inv, ds, ds_variances, labelled, rows, wanted))
        if wanted.temperature and c.margin:
            own = dz.gather(0, goal.classes(b)[None])[0].where(labelled, 0)
            gradients.temperature.add_(fixed_sum(own) * c.margin / rows.temperature**2)
    return gradients


def _residuals(z: Tensor, contrast: Contrast, goal: Goal, b: int) -> tuple[Tensor, Tensor | None]:
    """The gradients in the classes' logits [K, P] and, where it is another, in their variance terms."""
    c = contrast
    if is_soft(c):
        return soft_residual(z, targets_of_image(c, goal, b, z.dtype), c.class_weight, c.loss), None
    weight = softmax(z)
    others = weight.clone() if c.variances is not None and not c.positive_variance else None
    weight.scatter_add_(0, goal.classes(b)[None], weight.new_full((1, 1), -1.0).expand(1, weight.shape[1]))
    return weight, others


def contrast_scale(dfeatures: Tensor, grad_loss: Tensor) -> None:
    dfeatures.mul_(grad_loss)


# ---- gradients, image after image -------------------------------------------------------------------------------------


def empty_gradients(features: Tensor, rows: WideRows, wanted: Wanted) -> Gradients:
    def zeros(shape, needed: bool) -> Tensor:
        return rows.prototypes.new_zeros(shape if needed else 0)

    return Gradients(
        torch.empty_like(features) if wanted.features else features.new_empty(0),
        zeros(rows.prototypes.shape, wanted.prototypes),
        zeros(0 if rows.bias is None else rows.bias.shape, wanted.bias),
        zeros((), wanted.temperature),
    )


def add_gradients(total: Gradients, b: int, image: linear.RowGradients) -> None:
    """Add those of image b."""
    if image.features is not None:
        total.features[b].copy_(image.features.view(total.features.shape[1:]))
    if image.prototypes is not None:
        (total.prototypes if total.prototypes.dim() == 2 else total.prototypes[b]).add_(image.prototypes)
    if image.bias is not None:
        (total.bias if total.bias.dim() == 1 else total.bias[b]).add_(image.bias)
    if image.temperature is not None:
        total.temperature.add_(image.temperature)


# ---- prototype_logits ---------------------------------------------------------------------------------------------


@exact
def logits_forward(problem: Logits) -> Tensor:
    features = problem.features
    dtype, (batch, _, height, width) = wide(features.dtype), features.shape
    all_rows = linear.rows_of(problem, dtype)
    out = features.new_empty((batch, problem.num_classes, height, width), dtype=dtype)
    for b in range(batch):
        x, rows = features[b].flatten(1).to(dtype), all_rows.image(b)
        s = linear.row_logits(x, linear.inverse_norm(x, problem.normalize), rows)
        out[b] = linear.pooled(s, rows).view(problem.num_classes, height, width)
    return out


@exact
def logits_backward(grad_logits: Tensor, problem: Logits, wanted: Wanted) -> Gradients:
    features = problem.features
    dtype = wide(features.dtype)
    all_rows = linear.rows_of(problem, dtype)
    gradients = empty_gradients(features, all_rows, wanted)
    for b in range(features.shape[0]):
        x, rows = features[b].flatten(1).to(dtype), all_rows.image(b)
        inv = linear.inverse_norm(x, problem.normalize)
        ds = grad_logits[b].flatten(1).to(dtype)
        if rows.prototype_class is not None:
            s = linear.row_logits(x, inv, rows)
            ds = linear.unpooled(ds, s, linear.pooled(s, rows), rows)
        add_gradients(gradients, b, linear.row_gradients(x, inv, ds, ds, None, rows, wanted))
    return gradients
