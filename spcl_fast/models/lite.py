"""EfficientNet-Lite0, Lite1 and Lite2 as segmentation nets: features at stride 8 from the published ImageNet encoders.

Encoder: stem and inverted bottlenecks (ReLU6, no squeeze-excite, TensorFlow's SAME padding) down to stride 16: of Lite0 the first 11 of
16, of Lite1 and Lite2 the first 15 of 21; module names as in the published weights. Lite0's last five blocks, dilated to stay at stride
16, doubled the time of a training step and lost 4 to 7 points of mIoU from rendered to real streets (200 iterations, two seeds), so those
of no variant are built. Head: the stride-16 map, up-sampled, plus
the stride-8 skip, each projected to D channels; GroupNorm, ReLU and a 3x3 convolution give the features.

Source: Tan, Le, EfficientNet (arXiv 1905.11946), and its "lite" variant among the TensorFlow TPU models.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import NetSettings, SegmentationModel, linear_classifier
from .chain import Block, Chain, run_blocks
from .head import JoinedMaps, SkipHead
from .norm import FrozenBatchNorm2d, batch_norm, conv_norm, init_convs

BATCH_NORM_EPS = 1e-3  # the published BatchNorm's
# The published input is (value in 0..255 - 127) / 128.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3


class LiteTable(NamedTuple):
    """One of the published encoders, as far as it is built."""

    blocks: tuple[
        tuple[int, int, int, int, int, int], ...
    ]  # kernel, stride, expansion, input and output channels, repeats
    published: int  # blocks in the published weights

    @property
    def built(self) -> int:
        return len(self.outputs)

    @property
    def outputs(self) -> list[int]:
        """Output channels of every block."""
        return [channels for *_, channels, repeats in self.blocks for _ in range(repeats)]

    @property
    def skip_block(self) -> int:
        """The last block at stride 8."""
        return sum(entry[-1] for entry in self.blocks[:3]) - 1

    @property
    def unused(self) -> tuple[str, ...]:
        """Parts of the published encoder that the net does not build: what goes to stride 32, and the convolution before the pooling."""
        return (*(f"_blocks.{index}." for index in range(self.built, self.published)), "_conv_head.", "_bn1.", "_fc.")


TABLES = {
    "lite0": LiteTable(
        ((3, 1, 1, 32, 16, 1), (3, 2, 6, 16, 24, 2), (5, 2, 6, 24, 40, 2), (3, 2, 6, 40, 80, 3), (5, 1, 6, 80, 112, 3)),
        16,
    ),
    "lite1": LiteTable(
        ((3, 1, 1, 32, 16, 1), (3, 2, 6, 16, 24, 3), (5, 2, 6, 24, 40, 3), (3, 2, 6, 40, 80, 4), (5, 1, 6, 80, 112, 4)),
        21,
    ),
    "lite2": LiteTable(
        ((3, 1, 1, 32, 16, 1), (3, 2, 6, 16, 24, 3), (5, 2, 6, 24, 48, 3), (3, 2, 6, 48, 88, 4), (5, 1, 6, 88, 120, 4)),
        21,
    ),
}


def which_lite(state: Mapping[str, Tensor]) -> str | None:
    """The encoder whose weights these are, by the output channels of its first blocks; None for another one's."""
    first = [f"_blocks.{index}._project_conv.weight" for index in range(5)]
    if not all(key in state and state[key].dim() == 4 for key in first):
        return None
    given = [state[key].shape[0] for key in first]
    return next((name for name, table in TABLES.items() if given == table.outputs[: len(first)]), None)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: output ceil(size / stride), the odd pixel of padding at the bottom and right."""

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x with the odd pixel of padding, and the padding that is left to the convolution."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        # Not negative, as no stride is larger than its kernel. Rounded up by an addition: ONNX divides negative sizes towards 0.
        total = [((size + stride - 1) // stride - 1) * stride + kernel - size for size in x.shape[-2:]]
        padding = (total[0] // 2, total[1] // 2)
        any_size = (
            stride > 1 and torch.compiler.is_exporting()
        )  # odd and even ones; a branch would be exported for one of them
        if any_size or total[0] % 2 or total[1] % 2:
            x = F.pad(x, (padding[1], total[1] - padding[1], padding[0], total[0] - padding[0]))
            padding = (0, 0)
        return x, padding

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = self.pad(x)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


def relu6_(x: Tensor) -> Tensor:
    """min(max(x, 0), 6) in place. Keeps only its output, which the next convolution keeps anyway; torch's own keeps a copy of x, too."""
    return F.relu6(x) if torch.compiler.is_compiling() else _ReLU6.apply(x)


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.clamp_(0, 6)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, out, 0, 6)


class InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; added to its input where the shapes agree."""

    def __init__(self, kernel: int, stride: int, expand: int, inputs: int, outputs: int, frozen: bool) -> None:
        super().__init__()
        inner = inputs * expand
        if expand != 1:
            self._expand_conv = SameConv2d(inputs, inner, 1, bias=False)
            self._bn0 = batch_norm(inner, frozen=frozen, eps=BATCH_NORM_EPS)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = batch_norm(inner, frozen=frozen, eps=BATCH_NORM_EPS)
        self._project_conv = SameConv2d(inner, outputs, 1, bias=False)
        self._bn2 = batch_norm(outputs, frozen=frozen, eps=BATCH_NORM_EPS)
        self.expands = expand != 1
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = relu6_(conv_norm(self._expand_conv, self._bn0, x)) if self.expands else x
        inner = relu6_(conv_norm(self._depthwise_conv, self._bn1, inner))
        out = conv_norm(self._project_conv, self._bn2, inner)
        return out + x if self.residual else out


class LiteEncoder(nn.Module):
    """[B, 3, H, W] -> (skip [B, C, H/8, W/8], deep [B, C', H/16, W/16]), sizes rounded up; the blocks pass on (deep, skip)."""

    def __init__(self, table: LiteTable, frozen: bool) -> None:
        super().__init__()
        self.table = table
        self.skip_channels, self.deep_channels = table.blocks[2][4], table.blocks[4][4]
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = batch_norm(32, frozen=frozen, eps=BATCH_NORM_EPS)
        self._blocks = nn.ModuleList()
        for kernel, stride, expand, inputs, outputs, repeats in table.blocks:
            self._blocks.append(InvertedBottleneck(kernel, stride, expand, inputs, outputs, frozen))
            self._blocks.extend(
                InvertedBottleneck(kernel, 1, expand, outputs, outputs, frozen) for _ in range(repeats - 1)
            )
        init_convs(self)
        # the projection is linear: half the variance of one before a ReLU; residual sums must not grow
        for block in (block for block in self._blocks if isinstance(block, InvertedBottleneck)):
            nn.init.kaiming_normal_(block._project_conv.weight, mode="fan_in", nonlinearity="linear")
            if block.residual and isinstance(block._bn2, FrozenBatchNorm2d):
                block._bn2.weight.fill_(0.5)

    def blocks(self) -> list[Block]:
        """Stem and blocks; after the last one at stride 8 they carry the skip along."""
        at = self.table.skip_block + 1
        before, after = self._blocks[:at], self._blocks[at:]
        return [self.stem, *before, *(functools.partial(_beside, block) for block in after)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        deep, skip = run_blocks(self.blocks(), (x,))
        return skip, deep

    def stem(self, x: Tensor) -> Tensor:
        return relu6_(conv_norm(self._conv_stem, self._bn0, x))


def _beside(block: nn.Module, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return block(x), x if skip is None else skip


class LiteFeatures(Chain):
    def __init__(self, table: LiteTable, feature_dim: int | None, frozen: bool) -> None:
        super().__init__()
        self.encoder = LiteEncoder(table, frozen)
        widths = self.encoder.skip_channels, self.encoder.deep_channels
        self.head = JoinedMaps() if feature_dim is None else SkipHead(*widths, feature_dim)
        self.channels = sum(widths) if feature_dim is None else feature_dim

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type == "cpu"
        ):  # oneDNN's depthwise convolutions: a training step takes two thirds of the time in this layout
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)

    def blocks(self) -> list[Block]:
        return [*self.encoder.blocks(), lambda deep, skip: self.head(skip, deep)]

    def stages(self) -> tuple[int, ...]:
        # the first block of each entry of the table, after the stem
        return tuple(1 + sum(entry[-1] for entry in self.encoder.table.blocks[:i]) for i in range(5))


def _lite(name: str, num_classes: int, settings: NetSettings) -> SegmentationModel:
    body = LiteFeatures(TABLES[name], settings.feature_dim, settings.freeze_bn)
    return SegmentationModel(
        name,
        body,
        linear_classifier(body.channels, num_classes),
        stride=8,
        channels=body.channels,
        num_classes=num_classes,
        mean=MEAN,
        std=STD,
        head="head",
    )


def lite0(num_classes: int, settings: NetSettings) -> SegmentationModel:
    return _lite("lite0", num_classes, settings)


def lite1(num_classes: int, settings: NetSettings) -> SegmentationModel:
    return _lite("lite1", num_classes, settings)


def lite2(num_classes: int, settings: NetSettings) -> SegmentationModel:
    return _lite("lite2", num_classes, settings)
