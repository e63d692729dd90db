"""Which image comes at which position of a training run: pure functions of (seed, position), so that a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import DataError

Order = Callable[[int], int]  # position -> image index

_SHUFFLE, _BALANCE = 1, 2  # streams of random numbers; augmentation has 3
BLOCK = 3000  # draws after which the statistics of balanced sampling start anew, as in the released code


def generator(*key: int) -> np.random.Generator:
    """Independent random numbers for every key of non-negative integers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class ShuffledOrder:
    """Every image once per epoch, each epoch in its own order."""

    def __init__(self, length: int, seed: int):
        if length == 0:
            raise DataError("the data set holds no images, so there is nothing to train on.")
        self._length, self._seed = length, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self._length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, generator(self._seed, _SHUFFLE, epoch).permutation(self._length)
        return int(self._order[place])


class BalancedOrder:
    """Rare classes more often: draw a class with p ~ 1 / ln(1.01 + share), then the next image that holds it.

    share: how much of all class occurrences in the images drawn so far in this block of 3000 is of that class. Source: released SPCL code,
    `core/datasets/gta5.py`; there a class with one file crashes, here it works, and a class without any is never drawn.
    """

    def __init__(self, presence: np.ndarray, seed: int):
        """presence: bool [images, K], which image holds which class."""
        if not presence.any():
            raise DataError(
                "no training image holds any class, so class-balanced sampling has nothing to draw from. "
                "Check the labels with `spcl-fast check-data`."
            )
        self._presence, self._seed = presence, seed
        self._block, self._order = -1, np.empty(0, np.int64)

    def __call__(self, position: int) -> int:
        block, place = divmod(position, BLOCK)
        if block != self._block:
            self._block, self._order = block, self._draw(block)
        return int(self._order[place])

    def _draw(self, block: int) -> np.ndarray:
        rng = generator(self._seed, _BALANCE, block)
        files = [rng.permutation(np.flatnonzero(column)) for column in self._presence.T]
        occurs = np.array([len(f) > 0 for f in files])
        uniform = rng.random(BLOCK)
        drawn_of = np.zeros(len(files))  # occurrences of each class in the images drawn so far
        next_file = np.zeros(len(files), np.int64)
        order = np.empty(BLOCK, np.int64)
        for place in range(BLOCK):
            share = drawn_of / max(drawn_of.sum(), 1)
            cumulated = np.cumsum(occurs / np.log(1.01 + share))
            chosen = int(np.searchsorted(cumulated, uniform[place] * cumulated[-1], side="right"))
            order[place] = files[chosen][next_file[chosen] % len(files[chosen])]
            next_file[chosen] += 1
            drawn_of += self._presence[order[place]]
        return order
