"""What a cache keeps of one position: a record of fixed size, bit-packed, so that any window is one contiguous read.

    bits 0-15      the teacher's entropy, float16
    bits 16-23     h, how many ids have a probability of their own
    from bit 24    ids, b bits each, the h first ones first
    from the end   h probabilities in units of 1/4095, 12 bits each, backwards

All ids after the first h share what probability is left, evenly. How many ids fit, k(h), follows from h, the size
of a record and the vocabulary, so it is not stored: with 64 bytes and 262,144 ids (b = 18) 27 where h = 0, 17 where
h = 15.

Legend: N positions, K = k(0) places, H the largest h, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nano.bits import Bytes, bits_of, read_fields

Form = Literal["sampled", "top"]

HEADER_BITS, PROBABILITY_BITS, COUNT_BITS = 24, 12, 8
UNITS = 2**PROBABILITY_BITS - 1


@dataclass(frozen=True)
class RecordLayout:
    """How records of a cache are laid out.

    Attributes:
        form: "sampled" (an unbiased sample) or "top" (the most likely ids, renormalised).
        vocab_size: ids are below this.
        size: bytes of a record.
    """

    form: Form
    vocab_size: int
    size: int

    @property
    def id_bits(self) -> int:
        """b."""
        return max(1, (self.vocab_size - 1).bit_length())

    def places(self, heads: Any) -> Any:
        """k(h): ids that fit beside so many probabilities."""
        return (8 * self.size - HEADER_BITS - PROBABILITY_BITS * heads) // self.id_bits

    @property
    def most_ids(self) -> int:
        """K."""
        return int(self.places(0))

    @property
    def most_heads(self) -> int:
        """H: of a sample the most that leaves one id to share the rest; of "top" all its ids."""
        both = 8 * self.size - HEADER_BITS - (self.id_bits if self.form == "sampled" else 0)
        most: int = min(both // (self.id_bits + PROBABILITY_BITS), 2**COUNT_BITS - 1, self.vocab_size)
        return most


def smallest_record(vocab_size: int) -> int:
    """Bytes below which a record of this vocabulary holds no useful sample: four ids, two with a probability."""
    bits = HEADER_BITS + 4 * max(1, (vocab_size - 1).bit_length()) + 2 * PROBABILITY_BITS
    return -(-bits // 8)


def pack_records(
    layout: RecordLayout,
    entropy_N: npt.NDArray[np.float16],
    heads_N: npt.NDArray[np.int64],
    id_NK: npt.NDArray[np.int64],
    unit_NH: npt.NDArray[np.int64],
) -> Bytes:
    """Records, (N, size).

    Args:
        layout: of the cache.
        entropy_N: the teacher's, in nats.
        heads_N: h, at most H.
        id_NK: ids; what lies beyond k(h) is ignored.
        unit_NH: probabilities of the first h in 1/4095, summing to at most 4095; what lies beyond is ignored.
    """
    bits = np.zeros((len(heads_N), 8 * layout.size), np.uint8)
    bits[:, :16] = bits_of(entropy_N.view(np.uint16), 16)
    bits[:, 16:HEADER_BITS] = bits_of(heads_N, COUNT_BITS)
    held = np.where(np.arange(layout.most_ids) < layout.places(heads_N)[:, None], id_NK, 0)
    stop = HEADER_BITS + layout.most_ids * layout.id_bits
    bits[:, HEADER_BITS:stop] = bits_of(held, layout.id_bits).reshape(len(held), -1)
    own = np.where(np.arange(layout.most_heads) < heads_N[:, None], unit_NH, 0)
    start = 8 * layout.size - PROBABILITY_BITS * layout.most_heads
    bits[:, start:] |= bits_of(own[:, ::-1], PROBABILITY_BITS).reshape(len(own), -1)
    return np.packbits(bits, axis=1, bitorder="little")


def unpack_records(
    layout: RecordLayout, records: Bytes
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(ids (N, K), probabilities (N, K), entropies (N,)); each row sums to 1, unused places have id and weight 0."""
    entropy_N = np.ascontiguousarray(records[:, :2]).view("<f2")[:, 0].astype(np.float32)
    heads_N1 = records[:, 2:3].astype(np.int64)
    place_K = np.arange(layout.most_ids)
    id_NK = read_fields(records, HEADER_BITS + place_K * layout.id_bits, layout.id_bits)
    head_H = np.arange(layout.most_heads)
    unit_NH = read_fields(records, 8 * layout.size - PROBABILITY_BITS * (head_H + 1), PROBABILITY_BITS)
    unit_NH = np.where(head_H < heads_N1, unit_NH, 0)
    used = place_K < layout.places(heads_N1)
    weight_NK = np.zeros(id_NK.shape, np.float32)
    total_N1 = unit_NH.sum(1, keepdims=True)
    if layout.form == "sampled":
        rest_N1 = np.maximum(UNITS - total_N1, 0) / (UNITS * np.maximum(layout.places(heads_N1) - heads_N1, 1))
        weight_NK[:] = rest_N1 * (used & (place_K >= heads_N1))
        scale = np.float32(1 / UNITS)
    else:
        used &= place_K < heads_N1
        scale = 1 / np.maximum(total_N1, 1)
    weight_NK[:, : layout.most_heads] += unit_NH * scale
    return np.where(used, id_NK, 0), weight_NK, entropy_N
