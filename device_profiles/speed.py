"""`forecast`: how many tokens a second a phone will decode, from the bytes that each token has to read.

Decoding one token reads every weight once and does two operations with it, so on a phone the memory bus decides:

    tokens/s = efficiency x bandwidth / bytes a token
    bytes a token = codes and scales of all linears and the head + the cache of the positions in use

The efficiency is not chosen: it is what published measurements of int4 models reached (`PUBLISHED`). Phones whose
cores have int8 dot products form one group and those without another; each group's range is the smallest and the
largest that was published, its middle the mean. `published_error` says how far each measurement lies from the middle
of the others of its group, and a forecast carries that error. Not in it: heat, which slows phones down within minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from device_profiles.footprint import BundleFacts, PlannedRecipe, cache_bytes, planned_parts
from device_profiles.profile import DeviceProfile
from nano.shapes import FULL, ModelShape

_README = "https://github.com/pytorch/executorch/blob/main/examples/models/llama/README.md"


def _llama(d: int, f: int, layers: int, h: int, a: int, tied: bool = True) -> ModelShape:
    return ModelShape("llama", 128256, d, f, layers, h, 8, a, tied, 131072, (FULL,) * layers, None)


@dataclass(frozen=True)
class PublishedSpeed:
    """One published measurement of decoding on a phone's CPU.

    Attributes:
        what: model and form of its weights.
        phone: which phone.
        bandwidth: of its memory, bytes a second.
        int8_products: whether its cores have dotprod or i8mm.
        bytes_per_token: weights that each token reads.
        tokens_per_second: as published.
        source: where.
    """

    what: str
    phone: str
    bandwidth: float
    int8_products: bool
    bytes_per_token: float
    tokens_per_second: float
    source: str

    @property
    def efficiency(self) -> float:
        """The share of the bandwidth that was reached."""
        return self.bytes_per_token * self.tokens_per_second / self.bandwidth


def _weights(shape: ModelShape, group: int, head_bits: int) -> float:
    """Bytes of int4 linears with bfloat16 scales, and of a head of so many bits."""
    parts = planned_parts(shape, PlannedRecipe("executorch", group_size=group))
    return parts["linears"] + shape.vocab_size * shape.hidden_size * (head_bits / 8 + (2 / group if head_bits == 4 else 0))  # noqa: E501  # fmt: skip


_1B, _3B = _weights(_llama(2048, 8192, 16, 32, 64), 32, 8), _weights(_llama(3072, 8192, 28, 24, 128), 32, 8)
_8B = {group: _weights(_llama(4096, 14336, 32, 32, 128, tied=False), group, 4) for group in (128, 256)}
_MIB = 1 << 20
PUBLISHED = (
    PublishedSpeed("Llama 3.2 1B SpinQuant", "OnePlus 12", 76.8e9, True, _1B, 50.2, _README),
    PublishedSpeed("Llama 3.2 1B QAT+LoRA", "OnePlus 12", 76.8e9, True, _1B + (1127 - 1083) * _MIB, 45.8, _README),
    PublishedSpeed("Llama 3.2 3B SpinQuant", "OnePlus 12", 76.8e9, True, _3B, 19.7, _README),
    PublishedSpeed("Llama 3.2 3B QAT+LoRA", "OnePlus 12", 76.8e9, True, _3B + (2529 - 2435) * _MIB, 18.5, _README),
    PublishedSpeed("Llama 3 8B, groups of 128", "OnePlus 12", 76.8e9, True, _8B[128], 10.85, _README),
    PublishedSpeed("Llama 3 8B, groups of 256", "OnePlus 12", 76.8e9, True, _8B[256], 11.02, _README),
    PublishedSpeed(
        "Llama 3.2 1B Q4_K_M (0.81 GB)", "Redmi Note 12", 17e9, False, 0.81e9, 7,
        "https://github.com/Vali-98/ChatterUI/issues/127",
    ),
)  # fmt: skip
"""What is published with the bytes that it needs to be checked. Adapters are counted by the size that they add to the
file (the table's third and fourth rows). The last is llama.cpp, of which all of the file is read for each token."""


@dataclass(frozen=True)
class SpeedForecast:
    """Tokens a second on a phone.

    Attributes:
        low, likely, high: at the smallest, mean and largest efficiency of the published measurements that apply.
        bytes_per_token: what each token reads.
        efficiency: the three efficiencies.
        error: the largest relative error of the likely value over those measurements; None where there is but one.
        measurements: how many apply.
    """

    low: float
    likely: float
    high: float
    bytes_per_token: int
    efficiency: tuple[float, float, float]
    error: float | None
    measurements: int


def forecast(facts: BundleFacts, profile: DeviceProfile) -> SpeedForecast | None:
    """Tokens a second at the facts' context, all of it in use; None where the phone's bandwidth is not known."""
    bandwidth = profile.memory_bandwidth.number
    if bandwidth is None:
        return None
    features = profile.cpu_features.value
    rows = list(PUBLISHED)
    if isinstance(features, tuple):
        has = bool({"dotprod", "i8mm"} & set(features))
        rows = [row for row in PUBLISHED if row.int8_products is has]
    reached = [row.efficiency for row in rows]
    efficiency = (min(reached), fmean(reached), max(reached))
    read = bytes_per_token(facts)
    low, likely, high = (share * bandwidth / read for share in efficiency)
    return SpeedForecast(low, likely, high, read, efficiency, published_error(rows), len(rows))


def bytes_per_token(facts: BundleFacts) -> int:
    """Codes and scales (or a float head), and the cache that attention reads: sliding layers no more than a window."""
    cache = facts.kv_cache_bytes
    if facts.shape.sliding_window:
        slack = cache_bytes(facts.shape, facts.runtime, facts.context, facts.chunk)
        cache = round(cache * cache_bytes(facts.shape, facts.runtime, facts.context, 1) / max(slack, 1))
    return facts.packed_source_bytes + facts.float_head_bytes + cache


def published_error(rows: list[PublishedSpeed] | tuple[PublishedSpeed, ...] = PUBLISHED) -> float | None:
    """The largest relative error when each speed is forecast from the others; None for fewer than two."""
    if len(rows) < 2:
        return None
    return max(abs(from_others(row, rows) / row.tokens_per_second - 1) for row in rows)


def from_others(row: PublishedSpeed, rows: list[PublishedSpeed] | tuple[PublishedSpeed, ...]) -> float:
    """Tokens a second of one measurement, forecast from the mean efficiency of the others."""
    mean = fmean(other.efficiency for other in rows if other is not row)
    return mean * row.bandwidth / row.bytes_per_token
