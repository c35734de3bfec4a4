"""Which rows a step sees: functions of the step's number and the seed alone, so that any step can be taken up again.

numpy's PCG64 draws the shuffles: the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MIX_BLOCK = 1000
"""Rows over which every source has exactly its share: weights are kept to a thousandth."""

Array = npt.NDArray[Any]


def row_order(count: int, batch: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """Which rows step `step` (from 0) sees: a fresh shuffle every epoch, a function of its arguments alone."""
    return _nth(count, np.arange(step * batch, (step + 1) * batch), (seed,))


def mixed_order(mix: Sequence[tuple[int, float]], batch: int, step: int, seed: int) -> npt.NDArray[np.int64]:
    """Which rows a step sees where sources have weights; each source is shuffled anew in every epoch of its own.

    In every MIX_BLOCK rows each source has its share, spread evenly: the first rows of a run are mixed as all are.

    Args:
        mix: (rows, weight) of each source.
    """
    quota = _quota([weight for _, weight in mix])
    first = np.concatenate([[0], np.cumsum([count for count, _ in mix])])
    chosen = np.empty(batch, np.int64)
    for i, at in enumerate(range(step * batch, (step + 1) * batch)):
        block, place = divmod(at, MIX_BLOCK)
        pattern = _pattern(tuple(quota), seed, block)
        source = int(pattern[place])
        nth = block * quota[source] + int((pattern[:place] == source).sum())
        chosen[i] = first[source] + _nth(mix[source][0], np.array([nth]), (seed, source + 1))[0]
    return chosen


def _nth(count: int, wanted: Array, seed: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Elements of an endless sequence: shuffles of range(count), one behind another."""
    epochs = wanted // count
    chosen = [_shuffle(count, (*seed, int(e)))[wanted[epochs == e] % count] for e in np.unique(epochs)]
    return np.concatenate(chosen).astype(np.int64)


@functools.lru_cache(maxsize=8)
def _shuffle(count: int, seed: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)


def _quota(weights: Sequence[float]) -> list[int]:
    """Rows of each source in MIX_BLOCK, by largest remainder; at least one."""
    exact = np.array(weights) / sum(weights) * MIX_BLOCK
    quota = np.maximum(1, np.floor(exact)).astype(int)
    for i in np.argsort(-(exact - np.floor(exact)), kind="stable")[: max(0, MIX_BLOCK - quota.sum())]:
        quota[i] += 1
    quota[np.argmax(quota)] += MIX_BLOCK - quota.sum()
    return [int(q) for q in quota]


@functools.lru_cache(maxsize=4)
def _pattern(quota: tuple[int, ...], seed: int, block: int) -> Array:
    """The source of each place of a block: evenly spread, with a shift of chance."""
    chance = np.random.default_rng((seed, len(quota), block))
    places = [(np.arange(count) + chance.random(count)) / count for count in quota]
    sources = np.repeat(np.arange(len(quota)), quota)
    return np.asarray(sources[np.argsort(np.concatenate(places), kind="stable")])
