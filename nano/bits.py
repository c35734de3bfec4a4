"""Numbers of a few bits each, packed into records of whole bytes.

Legend: N records, K numbers of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
MOST_BITS = 25
"""Widest number that `read_fields` reads: its bits and up to seven before them lie in four bytes."""


def bits_of(values: npt.NDArray[Any], count: int) -> Bytes:
    """The lowest `count` bits of each value along a new last axis, the lowest first."""
    shifted = values[..., None].astype(np.int64) >> np.arange(count)
    return (shifted & 1).astype(np.uint8)


def read_fields(records: Bytes, at_K: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Numbers of `count` bits, (N, K), that begin at some bits of each record of (N, size) bytes."""
    padded = np.pad(records, ((0, 0), (0, 4)))
    window = np.ascontiguousarray(padded[:, (at_K >> 3)[:, None] + np.arange(4)])
    fields: npt.NDArray[np.int64] = (window.view("<u4")[..., 0].astype(np.int64) >> (at_K & 7)) & ((1 << count) - 1)
    return fields
