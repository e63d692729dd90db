"""A large image through a net in overlapping windows: their logits are averaged where the net made them, at low resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.schema import EvaluateConfig


@dataclass(frozen=True)
class Windows:
    """Size of a window and step between two, each (width, height) in pixels of the image that the net sees."""

    size: tuple[int, int]
    stride: tuple[int, int]

    def spans(self, image: tuple[int, int], cell: int) -> tuple[list[slice], list[slice]]:
        """Rows and columns of the windows over an image of (height, width) for a net of one logit per `cell` pixels."""
        (width, height), (step_x, step_y) = self.size, self.stride
        return _spans(image[0], height, step_y, cell), _spans(image[1], width, step_x, cell)


def windows_of(settings: EvaluateConfig) -> Windows | None:
    """The windows of evaluate.window, or None: the whole image at once."""
    if settings.window is None:
        return None
    width, height = settings.window
    return Windows((width, height), settings.window_stride or (-(-2 * width // 3), -(-2 * height // 3)))


def _spans(length: int, size: int, stride: int, cell: int) -> list[slice]:
    """Windows along one side. They begin on the net's grid, so that a logit of two windows stands for the same pixels in both.

    Size and stride are rounded down to whole cells, to two and one at least. The last window ends with the image and begins at the first
    cell from which it is no longer than the others.
    """
    if size >= length:
        return [slice(0, length)]
    size, stride = max(size // cell, 2) * cell, max(stride // cell, 1) * cell
    if size >= length:
        return [slice(0, length)]
    last = -(-(length - size) // cell) * cell
    return [slice(start, start + size) for start in range(0, last, stride)] + [slice(last, length)]


def windowed_logits(net: Callable[[Tensor], Tensor], images: Tensor, windows: Windows, cell: int) -> Tensor:
    """[B, 3, H, W] -> logits [B, K, h, w], each the mean over the windows that have it; h, w as of the whole image at once.

    net([B, 3, y, x]) -> logits [B, K, ~y / cell, ~x / cell]. Memory: one window through the net, and the low-resolution logits.
    """
    rows, columns = windows.spans((images.shape[2], images.shape[3]), cell)
    if len(rows) == len(columns) == 1:
        return net(images)
    # the last window of both sides goes first: it says how large the grid is
    corner = net(images[:, :, rows[-1], columns[-1]])
    height, width = rows[-1].start // cell + corner.shape[2], columns[-1].start // cell + corner.shape[3]
    total = torch.zeros(*corner.shape[:2], height, width, dtype=torch.float32, device=corner.device)
    count = total.new_zeros(height, width)
    for y in rows:
        for x in columns:
            is_corner = y is rows[-1] and x is columns[-1]
            logits = corner if is_corner else net(images[:, :, y, x])
            top, left = y.start // cell, x.start // cell
            # a window inside may have a cell more than the image has left: nets pad each window at its end
            logits = logits[:, :, : height - top, : width - left]
            here = slice(top, top + logits.shape[2]), slice(left, left + logits.shape[3])
            total[:, :, here[0], here[1]] += logits
            count[here] += 1
    return total.div_(count)
