"""Each pixel against every row of its class's bank and the mean rows of the others, tile by tile: no [N, M] similarities are kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import checks, dispatched

_TILE = 64  # pixels of one class
_AT_ONCE = 1 << 20  # similarities that are alive: 4 MB


class Bank(NamedTuple):
    rows: Tensor  # [K, M, D]
    is_there: Tensor  # [K, M] bool

    def means(self) -> Tensor:
        """[K, D], 0 for a class without a row."""
        rows = self.rows.where(self.is_there[..., None], 0)
        return rows.sum(1) / self.is_there.sum(1).clamp_min(1)[:, None]


class _Tiles(NamedTuple):
    of_class: Tensor  # [T]
    pixel: Tensor  # [T, _TILE]: index into [B, h, w]
    used: Tensor  # [T, _TILE] bool


def bank_contrast(
    features: Tensor, labels: Tensor, bank: Bank, temperature: float, *, normalize: bool, ignore_index: int
) -> Tensor:
    """features [B, D, h, w], labels [B, h, w] in [0, K) or ignore_index -> loss of each pixel [B, h, w], 0 where ignored.

        loss = mean over rows m of the pixel's class of  log(1 + exp(n - s_m)),   n = log sum over c != y of exp(<x, mean of bank_c> / t)

    The sum is over classes with rows; a pixel whose class has none counts as ignored. float32 inside (float64 for float64 features).
    """
    wide = checks.wide(features)
    bank = Bank(bank.rows.detach().to(wide), bank.is_there)
    valid = (labels != ignore_index) & (labels >= 0) & (labels < len(bank.rows))
    at = labels.long().where(valid, 0)
    valid = valid & bank.is_there.any(1)[at]
    classes = at.where(valid, len(bank.rows))
    return _recorded(features, classes, bank.rows, bank.is_there, float(temperature), normalize)


class _BankContrast:
    @staticmethod
    def compute(features, classes, rows, is_there, temperature, normalize):
        bank, tiles = Bank(rows, is_there), _tiles_of(classes.flatten(), len(rows))
        means, loss = bank.means(), rows.new_zeros(classes.numel())
        for part in _groups(tiles, rows.shape[1]):
            x, _, _ = _pixels(features, part, normalize)
            nll, _, _ = _block(x, part, bank, means, temperature)
            loss.index_put_((part.pixel,), nll.where(part.used, 0), accumulate=True)  # unused places add 0
        return loss.view(classes.shape)

    @staticmethod
    def keep(ctx, inputs, output):
        *tensors, ctx.temperature, ctx.normalize = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        features, classes, rows, is_there = ctx.saved_tensors
        bank, tiles = Bank(rows, is_there), _tiles_of(classes.flatten(), len(rows))
        means, grad = bank.means(), grad.flatten()
        found = torch.zeros_like(features)
        for part in _groups(tiles, rows.shape[1]):
            x, norm, place = _pixels(features, part, ctx.normalize)
            _, to_positives, to_negatives = _block(x, part, bank, means, ctx.temperature)
            dx = to_negatives @ means - torch.bmm(to_positives, rows[part.of_class])
            dx = dx * (grad[part.pixel] * part.used)[..., None] / ctx.temperature
            if ctx.normalize:
                inward = (x * dx).sum(-1, keepdim=True).where(norm > 1e-12, 0)
                dx = (dx - x * inward) / norm.clamp_min(1e-12)
            batch, row, column = place
            found.index_put_((batch[..., None], _channels(features), row[..., None], column[..., None]),
                             dx.to(found.dtype), accumulate=True)  # fmt: skip
        return found, None, None, None, None, None


_recorded = dispatched.recorded_once(_BankContrast, "bank_cl")


def _channels(features: Tensor) -> Tensor:
    return torch.arange(features.shape[1], device=features.device)


def _block(x: Tensor, part: _Tiles, bank: Bank, means: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [T, _TILE] of pixels x [T, _TILE, D]; the weights of positive rows [.., M] and of class means [.., K] in its gradient."""
    there = bank.is_there[part.of_class][:, None]
    share = there.to(x.dtype) / there.sum(-1, keepdim=True).clamp_min(1)
    positive = torch.bmm(x, bank.rows[part.of_class].transpose(1, 2)) / temperature
    negative = x @ means.t() / temperature
    classes = torch.arange(len(means), device=x.device)
    masked = (classes == part.of_class[:, None]) | ~bank.is_there.any(1)
    negative = negative.masked_fill(masked[:, None], -torch.inf)
    level = negative.logsumexp(-1, keepdim=True)
    excess = level - positive
    nll = (torch.logaddexp(excess, excess.new_zeros(())) * share).sum(-1)
    to_positives = excess.sigmoid() * share
    others = (negative - level).exp().where(level > -torch.inf, 0)  # one class alone has no others
    return nll, to_positives, others * to_positives.sum(-1, keepdim=True)


def _pixels(features: Tensor, part: _Tiles, normalize: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(Unit) pixels [T, _TILE, D], their norms [T, _TILE, 1], and where they are."""
    height, width = features.shape[2:]
    batch, rest = part.pixel // (height * width), part.pixel % (height * width)
    place = batch, rest // width, rest % width
    x = features[place[0], :, place[1], place[2]].to(checks.wide(features))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (F.normalize(x, dim=-1) if normalize else x), norm, place


def _groups(tiles: _Tiles, length: int) -> list[_Tiles]:
    at_once = max(1, _AT_ONCE // (_TILE * length))
    return [_Tiles(*parts) for parts in zip(*(tensor.split(at_once) for tensor in tiles), strict=True)]


def _tiles_of(classes: Tensor, num_classes: int) -> _Tiles:
    """Pixels sorted by class [N] (num_classes: ignored) in tiles of one class each: as many as there may be, so nothing waits for a GPU."""
    pixels = classes.numel()
    order = classes.argsort(stable=True)
    ordered, names = classes[order], torch.arange(num_classes, device=classes.device)
    start, end = torch.searchsorted(ordered, names), torch.searchsorted(ordered, names, right=True)
    tiles = (end - start + _TILE - 1) // _TILE
    last = tiles.cumsum(0)
    number = torch.arange(pixels // _TILE + num_classes, device=classes.device)
    found = torch.searchsorted(last, number, right=True)
    of_class = found.clamp_max(num_classes - 1)
    first = start[of_class] + (number - (last - tiles)[of_class]) * _TILE
    position = first[:, None] + torch.arange(_TILE, device=classes.device)
    used = (position < end[of_class][:, None]) & (found < num_classes)[:, None]
    return _Tiles(of_class, order[position.clamp(0, max(pixels - 1, 0))] if pixels else position.clamp(0, 0), used)
