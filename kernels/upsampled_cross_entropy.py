"""upsampled_cross_entropy and its gradient: cross-entropy of bilinearly up-sampled logits, which never exist.

A program is one warp; it owns 31 x `bands` low-resolution nodes of one image plus a halo of one cell on the left and above. Per window
of pixels it walks the classes twice: once for the sum of exponentials, once for the gradient, whose four corner sums stay in registers; it
then adds them to its own nodes, in a fixed order: gather, no atomics, deterministic. The corner nodes bound every logit of their cell
(bilinear is convex): no pass for the maximum, except where that bound is so far off that exponentials would underflow.
Floor: 2 exponentials per pixel and class (1 without gradient) on 16 units a SM and clock; bytes: labels as they are, low-resolution
logits, dlogits. Extra memory: the gradient, 8 bytes a program.
Shapes: logits [B, K, h, w] any strides; label [B, H, W] any strides and integer dtype; dlogits [B, K, h, w] float32 contiguous.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .cells import (
    CELLS,
    LAUNCH,
    axis_scale,
    flat,
    grid_of,
    in_cell,
    interpolate,
    load_corners,
    logits_map,
    place_of,
    rows_of,
    tiling_of,
    window_of,
    window_sizes,
)
from .operands import Labels, LossPointers, Map, Weights, labels_at, weights_of
from .pixels import INTERPRETED, classify, on_device_of, power_of_two, read_weights, reduce_partial
from .windows import (
    LOWEST,
    Band,
    Image,
    Scaling,
    Soft,
    Terms,
    UpsampledTarget,
    add_to_nodes,
    bounds_of,
    is_masked,
    largest_of,
)
from .windows_of_targets import target_window

_LOG2E = 1.4426950408889634
_SAFE_BITS = tl.constexpr(64.0)  # a bound this far above the true maximum still leaves float32's whole mantissa


@triton.jit
def label_weight_kernel(labels, weights, partial_ptr, size, K, BLOCK: tl.constexpr):
    """partial [2, programs]: 0, and the sum of the class weights of a program's pixels: the mean's denominator. Reads the labels once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    image = labels.height * labels.width
    b = offs // image
    pixel = (offs - b * image).to(tl.int32)
    i = pixel // labels.width
    j = pixel - i * labels.width
    ptrs = labels.ptr + b * labels.stride_b + i.to(tl.int64) * labels.stride_h + j.to(tl.int64) * labels.stride_w
    cls, bad = classify(tl.load(ptrs, mask=mask, other=0), labels, mask, K)
    class_weight, _ = read_weights(weights, cls, offs)
    poison = tl.where(bad, float("nan"), 0.0)
    tl.store(partial_ptr + tl.program_id(0), 0.0)
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(class_weight + poison, 0))


@triton.jit
def _sum_and_label(
    ptr, bound, cls, at, terms, y, x, LOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr
):
    """log2 of the sum over the classes of 2**((z - bound) factor), given a bound of z; and the loss, by the label's z (a gather of it would
    need 64-bit addresses). The bound is taken off before the scaling: z may be as low as floats go. The two are never added up: at a low
    temperature what float32 rounds off the logsumexp would be seen in every p. LOW: some may be -inf; then a label's loss is inf, and NaN
    where all classes are."""
    total = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    z_label = tl.zeros([ROWS, COLS, CELLS], tl.float32)
    for k in range(0, terms.K):
        a, b, c, d = load_corners(ptr, at)
        z = interpolate(a, b, c, d, y, x)
        total += tl.exp2((z - bound) * terms.scaling.factor)
        if LOW:
            z = tl.where(is_masked(ptr, at, y, x), -float("inf"), z)
        z_label = tl.where(cls == k, z, z_label)
        ptr += terms.stride_k
    if LOW:
        total = tl.where((z_label == -float("inf")) & (bound < LOWEST), float("nan"), total)
    bits = tl.log2(total)
    nats = (bound - z_label) * terms.scaling.inv_temperature + bits * 0.6931471805599453
    return bits, nats


@triton.jit
def plain_window(
    image, terms, bounds, at, band, columns, r0, c0, grid, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One window of pixels of each lane's cell -> its loss and class weight, summed; and its part of the gradient, added to memory."""
    top, gap = bounds
    labels = terms.target.labels
    i, j, y, x = window_of(r0, c0, band.index, columns, grid, ALIGN, ROWS, COLS)
    inside = in_cell(i, j, band.row_end, columns)
    mask = flat(inside)
    # within an image 32 bits do, and spare registers
    value = tl.load(image.labels + flat(i * labels.stride_h + j * labels.stride_w), mask=mask, other=0)
    cls, bad = classify(value, labels, mask, terms.K)
    pixel = flat(i * grid.W + j)
    class_weight, pixel_weight = read_weights(Weights(terms.weights.class_ptr, image.pixel_weight), cls, pixel)
    mine = flat(inside & band.mine[None, None, :])
    poison = tl.where(bad, float("nan"), 0.0)
    weight_sum = tl.sum(tl.where(mine, class_weight + poison, 0.0), 0)
    weight = tl.reshape(class_weight * pixel_weight, [ROWS, COLS, CELLS])
    cls = tl.reshape(cls, [ROWS, COLS, CELLS])

    if gap * terms.scaling.factor > _SAFE_BITS:
        bound = largest_of(image.logits, at, terms.K, terms.stride_k, y, x, ROWS, COLS, CELLS)
        bits, nats = _sum_and_label(image.logits, bound, cls, at, terms, y, x, True, ROWS, COLS, CELLS)
    else:
        bound = tl.zeros([ROWS, COLS, CELLS], tl.float32) + top[None, None, :]
        bits, nats = _sum_and_label(image.logits, top[None, None, :], cls, at, terms, y, x, False, ROWS, COLS, CELLS)
    loss = flat(tl.where(cls >= 0, weight * nats, 0.0)) + poison
    loss_sum = tl.sum(tl.where(mine, loss, 0.0), 0)
    if image.loss is not None:
        tl.store(image.loss + pixel, loss, mask=mine)
    if image.dlogits is not None:
        scale = weight * terms.gradient_scale
        column = tl.sum(x, 0)  # x itself: its first dimension is 1
        ptr = image.logits
        for k in range(0, terms.K):
            a, b, c, d = load_corners(ptr, at)
            p = tl.exp2((interpolate(a, b, c, d, y, x) - bound) * terms.scaling.factor - bits)
            g = tl.where(cls >= 0, tl.where(cls == k, p - 1.0, p) * scale, 0.0)
            add_to_nodes(image.dlogits, g, k, y, column, columns, band, grid, CELLS)
            ptr += terms.stride_k
    return loss_sum, weight_sum


@triton.jit
def _window(
    image, terms, bounds, at, band, columns, r0, c0, grid, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    if terms.target.plain is not None:
        loss, weight = plain_window(image, terms, bounds, at, band, columns, r0, c0, grid, ALIGN, ROWS, COLS, CELLS)
    else:
        loss, weight = target_window(image, terms, bounds, at, band, columns, r0, c0, grid, ALIGN, ROWS, COLS, CELLS)
    return loss, weight


@triton.jit
def upsampled_loss_kernel(
    logits, target, weights, scaling, loss, dlogits_ptr, K, grid, tiling, ALIGN: tl.constexpr, HALO: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAIL_ROWS: tl.constexpr, TAIL: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """HALO 1: with gradient, the program owns nodes; 0: without, it owns cells."""
    place = place_of(logits, grid, tiling, ALIGN, HALO, CELLS)
    b, columns, widest, first = place.image, place.columns, place.widest, place.first
    lane = tl.arange(0, CELLS)
    rest = widest % COLS
    full = widest - rest + tl.where(rest > TAIL, COLS, 0)  # what windows of COLS cover; a narrower one takes the rest
    owned = (lane >= HALO) | (place.tile == 0)
    owned_node = (lane >= HALO) & (columns.cells < grid.w)
    logits_ptr = logits.ptr + b * logits.stride_b
    label_ptr = None
    soft_ptr = None
    any_ptr = None
    if target.labels is not None:
        label_ptr = target.labels.ptr + b * target.labels.stride_b
    if target.soft is not None:
        soft_ptr = target.soft.map.ptr + b * target.soft.map.stride_b
        any_ptr = target.soft.any.ptr + b * target.soft.any.stride_b
    pixel_weight_ptr = weights.pixel_ptr
    if pixel_weight_ptr is not None:
        pixel_weight_ptr += b * grid.H * grid.W
    loss_ptr = loss.map_ptr
    if loss_ptr is not None:
        loss_ptr += b * grid.H * grid.W
    if dlogits_ptr is not None:
        dlogits_ptr += b * K * grid.h * grid.w
    image = Image(logits_ptr, label_ptr, soft_ptr, any_ptr, pixel_weight_ptr, loss_ptr, dlogits_ptr)
    gradient_scale = scaling.inv_temperature
    if scaling.denominator is not None:
        denominator = tl.load(scaling.denominator)
        gradient_scale *= tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))
    terms = Terms(target, weights, scaling, gradient_scale, K, logits.stride_d)
    loss_sum = 0.0
    weight_sum = 0.0
    for index in range(first, first + tiling.bands + HALO):
        row_start, row_end, at = rows_of(index, logits, grid, place, ALIGN)
        if (row_start < row_end) & (widest > 0) & (index < grid.h):
            # the halo's loss is another program's; so are the nodes outside
            mine = owned & ((index >= first + HALO) | (place.strip == 0))
            add_top = (index > first) & (index >= 0)
            add_bottom = (index + 1 < grid.h) & (index + 1 <= first + tiling.bands)
            band = Band(index, row_end, mine, owned_node, add_top, add_bottom)
            bounds = bounds_of(logits_ptr, at, K, logits.stride_d, CELLS)
            for r0 in range(row_start, row_end, ROWS):
                for c0 in range(0, full, COLS):
                    window_loss, window_weight = _window(
                        image, terms, bounds, at, band, columns, r0, c0, grid, ALIGN, ROWS, COLS, CELLS
                    )
                    loss_sum += window_loss
                    weight_sum += window_weight
            if TAIL > 0:  # a window of no pixels must not even be compiled
                if full < widest:
                    for r0 in range(row_start, row_end, TAIL_ROWS):
                        window_loss, window_weight = _window(
                            image, terms, bounds, at, band, columns, r0, full, grid, ALIGN, TAIL_ROWS, TAIL, CELLS
                        )
                        loss_sum += window_loss
                        weight_sum += window_weight
    if loss_ptr is None:
        tl.store(loss.partial_ptr + tl.program_id(0), loss_sum)
        tl.store(loss.partial_ptr + tl.num_programs(0) + tl.program_id(0), weight_sum)


def _denominator(labels: Labels, weights: Weights, num_classes: int) -> torch.Tensor:
    """[] float32: the mean's denominator, before the loss is known: the gradient is formed already divided."""
    size = labels.ptr.numel()
    block = 256 if INTERPRETED else 4096
    programs = triton.cdiv(size, block)
    partial = torch.empty(2, programs, dtype=torch.float32, device=labels.ptr.device)
    denominator = torch.empty(2, dtype=torch.float32, device=labels.ptr.device)
    label_weight_kernel[(programs,)](labels, weights, partial, size, num_classes, block)
    reduce_partial(partial, denominator[1:], denominator, "mean")
    return denominator[0]


def upsampled_cross_entropy(problem, needs_dlogits: bool, flag: Tensor, bad_probability: int) -> tuple[Tensor, Tensor]:
    """-> loss; dlogits [B, K, h, w] float32 of the reduced loss for an incoming gradient of 1, or [0]. problem: as `UpsampledLoss`."""
    return upsampled_loss(problem, needs_dlogits, flag, bad_probability, binary=False)


def upsampled_binary_cross_entropy(
    problem, needs_dlogits: bool, flag: Tensor, bad_probability: int
) -> tuple[Tensor, Tensor]:
    """As `upsampled_cross_entropy`, with a sigmoid for each class; focal where gamma > 0."""
    return upsampled_loss(problem, needs_dlogits, flag, bad_probability, binary=True)


def upsampled_loss(
    problem, needs_dlogits: bool, flag: Tensor, bad_probability: int, *, binary: bool
) -> tuple[Tensor, Tensor]:
    logits, (height, width) = problem.logits, problem.output_size
    batch, _, h, w = logits.shape
    none = problem.reduction == "none"
    loss = torch.empty((batch, height, width) if none else (), dtype=torch.float32, device=logits.device)
    dlogits = torch.zeros(logits.shape if needs_dlogits else 0, dtype=torch.float32, device=logits.device)
    if loss.numel() * batch * height * width == 0:
        return loss.zero_(), dlogits
    bad = _bad_probabilities(problem.labels, flag, bad_probability)
    target = _target_of(problem, flag, binary)
    with on_device_of(logits):
        divided_by = None
        if problem.reduction == "mean":
            divided_by = problem.denominator
            if divided_by is None and (needs_dlogits or target.soft is not None):
                divided_by = _denominator_of(problem, target)
        partial = _launch(problem, target, divided_by, loss if none else None, dlogits if needs_dlogits else None)
        if partial is not None:
            reduce_partial(partial, loss, torch.empty_like(loss), problem.reduction, divided_by)
    return loss if bad is None else torch.where(bad, torch.nan, loss), dlogits


def _launch(problem, target: UpsampledTarget, divided_by, loss_map, dlogits):
    """-> partial sums [2, programs], or None where a map is asked for."""
    logits, align = problem.logits, problem.align_corners
    batch, num_classes, *low = logits.shape
    halo = int(dlogits is not None)
    tiling = tiling_of(batch, low, halo)
    programs = batch * tiling.strips * tiling.tiles
    rows, cols, tail = window_sizes(tuple(low), problem.output_size, align)
    tail_rows = min(8, power_of_two(-(-problem.output_size[0] // low[0]))) if tail else 1
    if target.plain is None:
        rows, tail_rows = max(1, rows // 2), max(1, tail_rows // 2)  # more of a pixel is in registers
    partial = None if loss_map is not None else torch.empty(2, programs, dtype=torch.float32, device=logits.device)
    factor = _LOG2E / problem.temperature
    upsampled_loss_kernel[(programs,)](
        logits_map(logits), target, weights_of(problem.class_weight, problem.pixel_weight),
        Scaling(factor, 1 / problem.temperature, divided_by if dlogits is not None else None), LossPointers(loss_map, partial), dlogits,
        num_classes, grid_of(tuple(low), problem.output_size, align), tiling, align, halo, rows, cols, tail_rows, tail, CELLS, **LAUNCH,
    )  # fmt: skip
    return partial


def _target_of(problem, flag: Tensor, binary: bool) -> UpsampledTarget:
    labels, smoothing = problem.labels, problem.label_smoothing
    terms = (1 - smoothing, smoothing / problem.logits.shape[1])
    hard = 1 if not smoothing and not labels.is_floating_point() else None
    kind = (None if binary else hard, 1 if binary else None, hard, problem.gamma or None)
    height, width = problem.output_size
    if labels.is_floating_point():
        grid = labels.shape[2:]
        scales = (axis_scale(*pair, problem.align_corners) for pair in zip(grid, (height, width), strict=True))
        there = (labels != 0).any(1, keepdim=True).float()
        soft = Soft(Map(labels, *labels.stride()), Map(there, *there.stride()), *grid, *scales)
        return UpsampledTarget(None, soft, *terms, *kind)
    if (height - 1) * labels.stride(1) + (width - 1) * labels.stride(2) >= 2**31:
        labels = labels.contiguous()  # a view so wide that an image's offsets pass 32 bits
    return UpsampledTarget(labels_at(labels, flag, height, width, problem.ignore_index), None, *terms, *kind)


def _denominator_of(problem, target: UpsampledTarget) -> Tensor:
    """[] float32: what a mean is divided by, before the loss is known."""
    if target.labels is not None:
        weights = weights_of(None if target.binary is not None else problem.class_weight, None)
        return _denominator(target.labels, weights, problem.logits.shape[1])
    assert target.soft is not None
    there = F.interpolate(
        target.soft.any.ptr, problem.output_size, mode="bilinear", align_corners=problem.align_corners
    )
    return (there > 0).sum(dtype=torch.float32)


def _bad_probabilities(labels: Tensor, flag: Tensor, bad_probability: int) -> Tensor | None:
    """[] bool: whether one is negative, NaN or infinite; raises the flag. None for labels that are integers."""
    if not labels.is_floating_point():
        return None
    bad = ~((labels >= 0) & (labels < torch.inf)).all()
    flag.copy_(torch.where(bad, bad_probability, flag))
    return bad
