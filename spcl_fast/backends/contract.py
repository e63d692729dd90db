"""What every backend is asked and what it answers: one struct per problem, from `ops/` down to the kernels.

A backend is a module with the members of `Backend`, in this order. `ops/` checks shapes, dtypes, devices and settings before it makes a
struct, so a backend checks none of them. Symbols: B images, D channels, h w the features' grid, P = h * w pixels, H W the labels' size,
K classes, M rows of prototypes (M = K unless `prototype_class` is given), tau temperature.

Dtypes. Features and logits: float32, bfloat16, float16; float64 on `reference` alone. Every sum is in float32 or wider. "wide" is float64
for float64 features, else float32: losses, denominators and weights are wide. Labels: any integer dtype, read by the nearest rule where H W
is not the features' grid (`backends/labels.py`). A label outside [0, K) that is not ignore_index: on the CPU ValueError with
`bad_label_message`; on a GPU the loss is NaN and `label_flag(device)` holds the largest one. A probability that is negative, NaN or
infinite is a bad label, too (`BAD_PROBABILITY` in the flag). Same inputs, same bits, for any number of threads.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# ---- what a backend is asked for ----------------------------------------------------------------------------------

NEEDS = (
    "variances",
    "per_image_prototypes",  # [B, M, D]
    "bias",
    "tensor_temperature",
    "probabilities",  # labels are [B, K, h, w] floats
    "teacher",  # labels are a Teacher
    "label_smoothing",
    "prototype_class",
    "margin",
    "no_positive_variance",
    "denominator",  # "all" or a tensor
    "sigmoid",
    "dbias",  # the gradient is wanted
    "dtemperature",
    "pixel_weight",  # of class_moments; the losses have always had it
    "focal",  # gamma > 0 of upsampled_binary_cross_entropy
    "int32_labels",  # more than 255 classes in upsampled_prediction
)


class Ask(NamedTuple):
    """What decides whether a backend can do it, and which one is the fastest: never a value, never an exact image size."""

    op: str
    device: torch.device
    dtype: torch.dtype
    num_classes: int  # M for the ops with prototypes
    dim: int
    small: bool = False  # launching takes longer than computing: `measured.is_small`
    # the options in use, of NEEDS; what a backend does not know it answers with a reason
    needs: frozenset[str] = frozenset()


# ---- prototype_contrastive_loss and prototype_logits ----------------------------------------------------------------


class Teacher(NamedTuple):
    """Soft targets that are computed, not stored: t_nk = exp(<f_n, Q_k> / tau + u_n + v_k)."""

    features: Tensor  # [B, E, h, w]
    prototypes: Tensor  # [K, E]
    temperature: float
    u: Tensor  # [B, P] float64: minus a logsumexp of scores that may be in the thousands
    v: Tensor  # [K] wide


class Contrast(NamedTuple):
    """One prototype_contrastive_loss.

    Logit of row m at a pixel with unit feature x^ (x itself with normalize=False), all in float32:
        s_m = <x^, P_m> / tau + 1/2 <x^2, V_m> / tau^2 + b_m
        z_k = s_k, or the pool of s_m over rows with prototype_class[m] = k: logsumexp or max (ties: the lowest row)
    With label y and margin a:  s_y becomes s_y - a / tau, in the softmax, too.
    Loss of a labelled pixel, t = one-hot of y or the given probabilities, e = label_smoothing:
        softmax  -sum_k w_k ((1 - e) t_k + e / K) log softmax(z)_k
        sigmoid  sum_k w_k BCE(z_k, (1 - e) t_k + e / K), BCE(z, t) = log(1 + exp(z)) - t z
        positive_variance=False (labels alone): the numerator's z_y lacks the variance term: w_y (lse(z) - (<x^, P_y> / tau + b_y))
    times pixel_weight. What "mean" divides by is `denominator`, or where that is None the sum of w_y over labelled pixels (probabilities:
    the number of labelled pixels; sigmoid: the number of labelled pixels). A denominator of 0 gives loss 0 and gradient 0.
    A label whose logit is -inf costs inf and, with a class weight of 0, NaN: as in F.cross_entropy. Where targets are smoothed or soft, a
    class with w_k t_k = 0 adds nothing to the softmax loss, whatever its logit. The gradients are finite all the same.
    A pixel whose label is ignore_index, or whose probabilities sum to 0, has loss 0 and gradient exactly 0, whatever its features hold.
    """

    features: Tensor  # [B, D, h, w], any strides
    labels: Tensor | Teacher  # [B, H, W] integers; or [B, K, h, w] floats: probabilities, any strides; or a Teacher
    prototypes: Tensor  # [M, D] or [B, M, D], floating, any strides
    class_weight: Tensor | None  # [K] wide
    pixel_weight: Tensor | None  # [B, h, w] wide
    variances: Tensor | None  # the prototypes' shape
    temperature: float | Tensor  # a [] tensor on the features' device is read there, never synchronised
    normalize: bool
    ignore_index: int
    reduction: str  # "mean" | "sum" | "none"
    bias: Tensor | None = None  # [M] or [B, M], floating
    label_smoothing: float = 0.0
    prototype_class: Tensor | None = None  # [M] int64, each in [0, num_classes)
    pool: str = "logsumexp"  # | "max"
    margin: float = 0.0
    positive_variance: bool = True
    denominator: Tensor | None = None  # [] wide: all pixels, or the caller's
    loss: str = "softmax"  # | "sigmoid"
    classes: int = 0  # K where prototype_class is given

    @property
    def num_classes(self) -> int:
        return self.classes if self.prototype_class is not None else self.prototypes.shape[-2]


class Wanted(NamedTuple):
    """Which gradients; none of them: nothing is saved."""

    features: bool = False
    prototypes: bool = False
    bias: bool = False
    temperature: bool = False


class Saved(NamedTuple):
    """What the backward needs. Shapes and dtypes are those of `saved_like`; what is not there is a tensor of shape [0]."""

    denominator: Tensor  # [] wide: what the sum was divided by; 1 for "sum" and "none"
    lse: Tensor  # [B, P] in SavedLike.lse: logsumexp of z (sigmoid: 0)
    inv_norm: Tensor  # [B, P] wide: 1 / max(|x|, 1e-12), or 1
    logits: Tensor  # [B, M, P] wide: s, before margin and pool; without the bias where a dot product taken from it would lose its digits
    dfeatures: Tensor  # after one pass, where all else is [0]: the features' gradient for an incoming gradient of 1


class SavedLike(NamedTuple):
    """Which parts of Saved a forward fills: known from shapes and dtypes alone, so that a traced graph saves what a run one saves."""

    lse: torch.dtype
    logits: bool = False
    one_pass: bool = False


class Gradients(NamedTuple):
    """A tensor of shape [0] where not wanted."""

    features: Tensor  # the features' shape, dtype and layout
    prototypes: Tensor  # [M, D] or [B, M, D] wide
    bias: Tensor  # [M] or [B, M] wide
    temperature: Tensor  # [] wide


def no_gradients(saved: Saved) -> tuple[Tensor, Tensor]:
    """Of bias and temperature, where neither is wanted."""
    return saved.denominator.new_empty(0), saved.denominator.new_empty(0)


class Logits(NamedTuple):
    """One prototype_logits: z of Contrast, before any label."""

    features: Tensor  # [B, D, h, w], any strides
    prototypes: Tensor  # [M, D] or [B, M, D]
    variances: Tensor | None
    bias: Tensor | None
    temperature: float | Tensor
    normalize: bool
    prototype_class: Tensor | None = None
    pool: str = "logsumexp"
    classes: int = 0

    @property
    def num_classes(self) -> int:
        return self.classes if self.prototype_class is not None else self.prototypes.shape[-2]


class Balance(NamedTuple):
    """One half-step of Sinkhorn: a logsumexp of s_nk = <f_n, Q_k> / tau, K streamed, nothing of [N, K]."""

    features: Tensor  # [N, E]
    prototypes: Tensor  # [K, E]
    temperature: float


# ---- class_moments and move_prototypes ------------------------------------------------------------------------------


class Moments(NamedTuple):
    """One class_moments: sums_k = sum over pixels with label k of w x^, squares_k of w x^2, counts_k their number (weighted: sum of w)."""

    features: Tensor  # [B, D, h, w], any strides
    labels: Tensor  # [B, H, W] integers
    num_classes: int
    normalize: bool
    ignore_index: int
    squares: bool = False
    pixel_weight: Tensor | None = None  # [B, h, w] float32


class Average(NamedTuple):
    """prototype_k <- keep * prototype_k + (1 - keep) * sums_k / counts_k."""

    keep: float
    min_pixels: int  # a class with fewer stays, or is multiplied by keep where decay_absent; so does a class whose sum is not finite
    decay_absent: bool

    def moved(self, prototypes: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
        """The moving average itself: prototypes and sums [K, D], counts [K] -> [K, D]."""
        present = ((counts >= self.min_pixels) & sums.isfinite().all(1))[:, None]
        mean = sums / counts.clamp_min(1)[:, None]
        moved = self.keep * prototypes + (1 - self.keep) * mean
        return torch.where(present, moved, self.keep * prototypes if self.decay_absent else prototypes)


# ---- the up-sampled ops ---------------------------------------------------------------------------------------------


class UpsampledLoss(NamedTuple):
    """One upsampled_cross_entropy or upsampled_binary_cross_entropy: U = F.interpolate(logits, (H, W), bilinear) / tau at each pixel.

    Weights, smoothing, denominator and unlabelled pixels as in Contrast with z = U. gamma > 0 (binary): focal, times (1 - p_t)^gamma.
    A class that is -inf at every corner of a pixel's cell has probability 0 there; finite logits however low give a finite loss.
    """

    logits: Tensor  # [B, K, h, w], any strides
    labels: Tensor  # [B, H, W] integers; or [B, K, g, f] floats: probabilities, up-sampled to `size` by the same rule
    class_weight: Tensor | None  # [K] wide
    pixel_weight: Tensor | None  # [B, H, W] wide
    temperature: float
    align_corners: bool
    ignore_index: int
    reduction: str
    label_smoothing: float = 0.0
    denominator: Tensor | None = None  # [] wide
    gamma: float = 0.0
    size: tuple[int, int] | None = None  # (H, W) with probabilities; None: the labels' own

    @property
    def output_size(self) -> tuple[int, int]:
        height, width = self.size or self.labels.shape[-2:]
        return height, width


class UpsampledClasses(NamedTuple):
    """One upsampled_prediction or upsampled_confusion: the argmax (the first of equals) of the up-sampled logits at each pixel."""

    logits: Tensor  # [B, K, h, w], any strides
    size: tuple[int, int]
    align_corners: bool
    ignore_index: int
    temperature: float = 1.0
    thresholds: Tensor | None = None  # [K] float32; the label is ignore_index unless confidence >= threshold
    labels: Tensor | None = None  # [B, H, W] integers: the rows of the confusion


class Backend(Protocol):
    """The members of a backend's module, in the order in which all of them have them.

    A member whose op `why_not` refuses may raise NotImplementedError; `pick` never lets it be called.
    """

    def why_not(self, ask: Ask) -> str | None:
        """None where the backend can do it, else the reason, for users to read."""
        ...

    def saved_like(self, contrast: Contrast, wanted: Wanted) -> SavedLike:
        """What `contrast_forward` will save; from shapes, dtypes and settings alone (tensors may be fake)."""
        ...

    def contrast_forward(self, contrast: Contrast, wanted: Wanted) -> tuple[Tensor, Saved]:
        """-> loss, [] or for reduction="none" [B, h, w], wide; and what the backward needs: the denominator alone if nothing is wanted."""
        ...

    def contrast_backward(self, grad_loss: Tensor, contrast: Contrast, saved: Saved, wanted: Wanted) -> Gradients:
        """grad_loss: [] or [B, h, w], possibly expanded (stride 0). Never called after one pass."""
        ...

    def contrast_scale(self, dfeatures: Tensor, grad_loss: Tensor) -> None:
        """After one pass: dfeatures *= grad_loss [], in place."""
        ...

    def logits_forward(self, problem: Logits) -> Tensor:
        """-> [B, K, h, w] wide, contiguous."""
        ...

    def logits_backward(self, grad_logits: Tensor, problem: Logits, wanted: Wanted) -> Gradients:
        """grad_logits [B, K, h, w], any strides."""
        ...

    def class_moments(self, problem: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """-> sums [K, D] float32, counts [K] int64 (float32 with pixel_weight), squares [K, D] float32 or [0].
        A pixel that is not finite spoils its own class alone."""
        ...

    def move_prototypes(self, prototypes: Tensor, problem: Moments, average: Average) -> None:
        """Moves prototypes [K, D] float32 contiguous in place."""
        ...

    def upsampled_cross_entropy(self, problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
        """-> loss, [] or [B, H, W], wide; dlogits [B, K, h, w] wide, contiguous, of the reduced loss for an incoming gradient of 1, or [0].
        reduction="none" never needs dlogits."""
        ...

    def upsampled_binary_cross_entropy(self, problem: UpsampledLoss, needs_dlogits: bool) -> tuple[Tensor, Tensor]:
        """As upsampled_cross_entropy."""
        ...

    def upsampled_prediction(self, problem: UpsampledClasses) -> tuple[Tensor, Tensor]:
        """-> labels [B, H, W] uint8 (int32 beyond 255 classes), confidence [B, H, W] float32."""
        ...

    def upsampled_confusion(self, problem: UpsampledClasses) -> Tensor:
        """-> [K, K] int64: row = label, column = prediction; unlabelled pixels are left out."""
        ...

    def balance_rows(self, problem: Balance, v: Tensor) -> Tensor:
        """-> [N] float32, or v's dtype where that is wider and the backend can: logsumexp over k of s_nk + v_k."""
        ...

    def balance_columns(self, problem: Balance, u: Tensor) -> Tensor:
        """-> [K] float32: logsumexp over n of s_nk + u_n."""
        ...
