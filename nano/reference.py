"""A reference's next-token distributions in a few bytes a token, and the divergence from them without bias.

llama.cpp keeps 16 bits for every id of the vocabulary at every position. A record here keeps, of one position,

    bits 0-31    log-probability of the right token, float32
    bits 32-63   log Q, the probability of all ids but the first h, float32
    bits 64-71   h
    from bit 72  K ids, b bits each, the h first ones the likeliest
    behind them  K times -log of an id's share, 16 bits, in units of 1/1024 nat

so that perplexity, the likeliest token and the change of the right token's probability stay exact. The h likeliest ids
have their probability; the other n = K - h are drawn from the rest by their probability, one at a random point of each
of n equal parts of it (stratified sampling; Cochran 1977, chapter 5). h is the fewest for which no id left to chance
would weigh more than a drawn one. With Q and P the rest's probability under reference and model, q' and p' the
distributions within it,

    KL(q || p) = sum over the first h of q log(q / p)  +  Q log(Q / P)  +  Q KL(q' || p').

All but the last factor is known. KL(q' || p') is the mean of log(q'/p') over the drawn ids, which is right on average.
Where the two are close, p'/q' - 1 is added: its mean is known to be 0, no term is negative any more, and the noise is
of second order (the estimator k3 of http://joschu.net/blog/kl-approx.html). Which of the two, the known part decides,
never the draw. The error is the standard error of that mean: exact for independent draws, and too large rather than
too small for stratified ones. Rounding shares to 1/1024 nat adds 4e-8 nats to a token's KL.

Legend: T positions, V vocabulary, K ids of a record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nano.bits import MOST_BITS, Bytes, bits_of, read_fields
from nano.divergence import Distributions, Floats, Ids, TokenFigures, distributions
from nano.errors import UnsupportedError
from nano.lm import Logits

RECORD_BYTES = 124
"""With a window's 20 bytes, at most 128 a token for windows of 7 tokens and more."""
CLOSE = 0.2
"""Mean square of log(q / p) over the likeliest ids below which p'/q' - 1 is added: about 0.1 nats of KL."""
_HEADER_BITS, _SHARE_BITS, _UNITS = 72, 16, 1024
_NOTHING = 1e-12
"""Probability of the rest below which there is none."""
_FLOOR = 1e-9
"""Least probability of the rest under the model: what float32's exponentials can tell from nothing."""
_CHUNK = 1 << 21


@dataclass(frozen=True)
class RecordForm:
    """How records are laid out.

    Attributes:
        vocab_size: V.
        size: bytes of a record.
    """

    vocab_size: int
    size: int = RECORD_BYTES

    @property
    def id_bits(self) -> int:
        """b."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def places(self) -> int:
        """K."""
        return min((8 * self.size - _HEADER_BITS) // (self.id_bits + _SHARE_BITS), 255)


def make_records(form: RecordForm, logits_TV: Logits, target_T: Ids, random: np.random.Generator) -> Bytes:
    """(T, size) records of the reference's logits.

    Args:
        form: the layout.
        logits_TV: of the reference; the first `vocab_size` columns count.
        target_T: the right tokens.
        random: draws the ids.

    Raises:
        UnsupportedError: the vocabulary is larger than 33 million.
    """
    if form.id_bits > MOST_BITS:
        raise UnsupportedError("The vocabulary is too large to be kept.", found=f"{form.vocab_size:,} ids")
    step = max(1, _CHUNK // form.vocab_size)
    rows = [slice(start, start + step) for start in range(0, len(target_T), step)]
    return np.concatenate([_pack(form, logits_TV[at, : form.vocab_size], target_T[at], random) for at in rows])


def _pack(form: RecordForm, logits_TV: Logits, target_T: Ids, random: np.random.Generator) -> Bytes:
    count, places = len(target_T), form.places
    right_T, log_rest_T = np.empty(count), np.empty(count)
    heads_T = np.zeros(count, np.int64)
    id_TK, unit_TK = np.zeros((count, places), np.int64), np.zeros((count, places), np.int64)
    for t, logits_V in enumerate(logits_TV):
        log_q_V = logits_V - logits_V.max().astype(np.float64)
        q_V = np.exp(log_q_V)
        total = q_V.sum()
        q_V /= total
        heads, drawn, log_rest = _chosen(logits_V, q_V, places, random)
        ids = np.concatenate([heads, drawn])
        log_parts = np.repeat([np.log1p(-np.exp(log_rest)), log_rest], [len(heads), len(drawn)])
        share = log_q_V[ids] - np.log(total) - log_parts
        right_T[t] = log_q_V[target_T[t]] - np.log(total)
        heads_T[t], log_rest_T[t], id_TK[t, : len(ids)] = len(heads), log_rest, ids
        unit_TK[t, : len(ids)] = np.clip(np.rint(share * -_UNITS), 0, 2**_SHARE_BITS - 1)
    bits = np.zeros((count, 8 * form.size), np.uint8)
    known = np.stack([right_T, log_rest_T], 1).astype("<f4").view(np.uint8)
    bits[:, :64] = np.unpackbits(known, axis=1, bitorder="little")
    bits[:, 64:_HEADER_BITS] = bits_of(heads_T, 8)
    middle = _HEADER_BITS + places * form.id_bits
    bits[:, _HEADER_BITS:middle] = bits_of(id_TK, form.id_bits).reshape(count, -1)
    bits[:, middle : middle + places * _SHARE_BITS] = bits_of(unit_TK, _SHARE_BITS).reshape(count, -1)
    return np.packbits(bits, axis=1, bitorder="little")


def _chosen(logits_V: Logits, q_V: Floats, places: int, random: np.random.Generator) -> tuple[Ids, Ids, float]:
    """(the likeliest ids, the drawn ones, log Q) of one position; `q_V` is overwritten."""
    none = np.zeros(0, np.int64)
    if len(q_V) <= places:
        return np.argsort(-logits_V, kind="stable"), none, -np.inf
    most = places - 2
    top = np.argpartition(logits_V, len(q_V) - most - 1)[-most - 1 :]
    top = top[np.lexsort((top, -logits_V[top]))]
    rest = 1 - np.cumsum(q_V[top])  # behind 1, 2, ... ids
    left = np.arange(places - 1, places - 1 - most, -1)  # draws that 1, 2, ... heads leave
    enough = np.flatnonzero(q_V[top[1:]] * left <= rest[:-1])
    heads = top[: enough[0] + 1 if len(enough) else most]
    q_V[heads] = 0
    sum_V = np.cumsum(q_V, out=q_V)
    total = sum_V[-1]
    if total < _NOTHING:
        return heads, none, -np.inf
    n = places - len(heads)
    points = (np.arange(n) + random.random(n)) / n * total
    last = int(np.searchsorted(sum_V, total))  # the last id that has any
    return heads, np.minimum(np.searchsorted(sum_V, points, side="right"), last), float(np.log(total))


def stored_figures(form: RecordForm, records: Bytes, ids: Ids, logits: Logits) -> TokenFigures:
    """The figures of one window against what was kept of the reference.

    Args:
        form: the layout.
        records: (T, size) of the window.
        ids: (T + 1,) token ids; row t of the logits predicts id t + 1.
        logits: (T + 1, V') of the model, V' at least V.
    """
    target, places = ids[1:], form.places
    ours = distributions(logits[:-1])
    common = ours if logits.shape[-1] == form.vocab_size else distributions(logits[:-1, : form.vocab_size])
    known = np.ascontiguousarray(records[:, :8]).view("<f4").astype(np.float64)
    heads_T1 = records[:, 8:9].astype(np.int64)
    place_K = np.arange(places)
    id_TK = read_fields(records, _HEADER_BITS + place_K * form.id_bits, form.id_bits)
    start = _HEADER_BITS + places * form.id_bits
    share_TK = read_fields(records, start + place_K * _SHARE_BITS, _SHARE_BITS) / -_UNITS
    kl, variance = _estimate(common, id_TK, share_TK, place_K < heads_T1, known[:, 1])
    theirs = id_TK[:, 0]
    return TokenFigures(
        ours.nll(target), ours.top_T == target, ours.confidence_T, -known[:, 0], theirs == target, kl,
        common.top_T == theirs, ours.top_T, theirs, variance,
    )  # fmt: skip


def _estimate(
    ours: Distributions, id_TK: Ids, share_TK: Floats, is_head_TK: npt.NDArray[np.bool_], log_rest_T: Floats
) -> tuple[Floats, Floats]:
    """(KL, the variance of its estimate) of each position."""
    log_p_TK = ours.log_ratios(id_TK) - ours.log_total_T[:, None]
    rest_T = np.exp(log_rest_T)
    q_TK = np.where(is_head_TK, np.exp(share_TK), 0.0)
    q_TK *= ((1 - rest_T) / q_TK.sum(-1))[:, None]
    ratio_TK = np.log(q_TK, where=is_head_TK, out=np.zeros_like(q_TK)) - log_p_TK
    known_T = (q_TK * ratio_TK).sum(-1)
    is_close_T = (q_TK * ratio_TK**2).sum(-1) < CLOSE * q_TK.sum(-1)
    p_rest_T = np.maximum(1 - np.where(is_head_TK, np.exp(log_p_TK), 0.0).sum(-1), _FLOOR)
    has_T = np.isfinite(log_rest_T)
    log_rest_T = np.where(has_T, log_rest_T, 0.0)
    known_T += np.where(has_T, rest_T * (log_rest_T - np.log(p_rest_T)), 0.0)
    is_drawn_TK = ~is_head_TK & has_T[:, None]
    u_TK = np.where(is_drawn_TK, log_p_TK - np.log(p_rest_T)[:, None] - share_TK, 0.0)
    term_TK = np.where(is_close_T[:, None], np.expm1(np.minimum(u_TK, 700.0)) - u_TK, -u_TK)
    n_T = np.maximum(is_drawn_TK.sum(-1), 2)
    mean_T = term_TK.sum(-1) / n_T
    spread_T = (np.where(is_drawn_TK, term_TK - mean_T[:, None], 0.0) ** 2).sum(-1) / (n_T - 1)
    kl_T: Floats = known_T + rest_T * mean_T
    return kl_T, rest_T**2 * spread_T / n_T
