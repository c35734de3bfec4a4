"""The budget: a predicted footprint against a phone's limits, and what to change when it does not fit.

Two limits, because phones have two ways of saying no. What the process has written (dirty) cannot be evicted: past
`app_dirty_memory` the system kills the app. What must be resident in all, mapped weights included, can be evicted,
but decoding reads it again for every token: past `app_memory` a phone pages instead of answering. A limit that
nobody publishes is not counted on, and the verdict says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from device_profiles.footprint import BundleFacts, Footprint, at_context, cache_bytes, predict, runtime_constants
from device_profiles.profile import DeviceProfile, decimal_bytes, load_profile, profile_names
from device_profiles.speed import SpeedForecast, forecast
from nano.errors import CheckFailedError, RequestError, UnsupportedError
from nano.solve import NANO


@dataclass(frozen=True)
class Limit:
    """One thing a phone limits.

    Attributes:
        name: the fact of the profile that it comes from.
        about: which bytes it limits, in a few words.
        needed: bytes that the model takes.
        allowed: bytes that the phone gives; None where nobody publishes it.
    """

    name: str
    about: str
    needed: int
    allowed: int | None

    @property
    def fits(self) -> bool | None:
        """None where the limit is not known."""
        return None if self.allowed is None else self.needed <= self.allowed


@dataclass(frozen=True)
class Verdict:
    """Whether a model fits a phone.

    Attributes:
        profile: the phone.
        facts: the model's parts.
        footprint: bytes by cause.
        context: positions that the footprint is for.
        limits: each limit with what is needed and allowed.
        longest_context: the longest that fits; None where not even one position does.
        advice: what to change, each with what it would bring; empty where it fits.
        notes: what must be known besides.
        speed: tokens a second when decoding; None where the phone's memory bandwidth is not known.
    """

    profile: DeviceProfile
    facts: BundleFacts
    footprint: Footprint
    context: int
    limits: tuple[Limit, ...]
    longest_context: int | None
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    speed: SpeedForecast | None = None

    @property
    def fits(self) -> bool:
        """Whether no known limit is exceeded."""
        return all(limit.fits is not False for limit in self.limits)

    @property
    def peak_bytes(self) -> int:
        """Everything resident at the peak."""
        return self.footprint.resident

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "profile": self.profile.name,
            "runtime": self.facts.runtime,
            "context": self.context,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "dirty_bytes": self.footprint.dirty,
            "bytes": self.footprint.by_cause(),
            "file_bytes": self.facts.file_bytes,
            "limits": {x.name: {"needed": x.needed, "allowed": x.allowed, "fits": x.fits} for x in self.limits},
            "longest_context": self.longest_context,
            "advice": list(self.advice),
            "notes": list(self.notes),
            "prediction_error": runtime_constants(self.facts.runtime).error,
            "tokens_per_second": None if self.speed is None else asdict(self.speed),
        }


def judge(facts: BundleFacts, profile: DeviceProfile, context: int) -> Verdict:
    """Hold the facts of a model, written or planned, against a phone.

    Raises:
        UnsupportedError: the phone does not run this runtime.
        RequestError: nobody publishes what an app may hold on this phone.
    """
    runtimes = profile.runtimes.value
    if isinstance(runtimes, tuple) and facts.runtime not in runtimes:
        raise UnsupportedError(
            "This phone does not run this kind of bundle.",
            found=f"a bundle for {facts.runtime}; {profile.name} runs {', '.join(runtimes)}",
            todo="export for another runtime",
        )
    footprint = predict(facts, context)
    limits = _limits(footprint, profile)
    if all(limit.allowed is None for limit in limits):
        raise RequestError(
            "Nobody publishes what one app may hold on this phone, so nothing can be checked.",
            found=f"{profile.name}: app_dirty_memory and app_memory are unknown"
            + (f", of {profile.ram} of RAM" if profile.ram.known else ""),
            todo="take low-end or high-end, or measure and write your own profile file (nanokit profiles show NAME)",
        )
    notes = _notes(facts, footprint, profile)
    at = facts if context == facts.context else at_context(facts, context)
    verdict = Verdict(profile, facts, footprint, context, limits, None, (), notes, forecast(at, profile))
    longest = _longest_context(facts, profile)
    advice = () if verdict.fits else _advice(verdict, longest)
    return replace(verdict, longest_context=longest, advice=advice)


def judge_all(facts: BundleFacts) -> list[Verdict]:
    """Hold a model against every profile that comes with nanokit and publishes a limit."""
    profiles = [load_profile(name) for name in profile_names()]
    known = [p for p in profiles if p.app_memory.known or p.app_dirty_memory.known or p.app_dirty_memory_entitled.known]
    runs = [p for p in known if not isinstance(p.runtimes.value, tuple) or facts.runtime in p.runtimes.value]
    return [judge(facts, profile, facts.context) for profile in runs]


def require_fit(verdict: Verdict) -> None:
    """Raise CheckFailedError, saying by how much and what to change, unless the model fits."""
    over = [limit for limit in verdict.limits if limit.fits is False]
    if not over:
        return
    worst = max(over, key=lambda limit: limit.needed / (limit.allowed or 1))
    allowed = worst.allowed or 0
    raise CheckFailedError(
        f"It does not fit {verdict.profile.name} at context {verdict.context:,}: "
        f"{decimal_bytes(worst.needed - allowed)} too much.",
        found=f"{decimal_bytes(worst.needed)} {worst.about}",
        expected=f"at most {decimal_bytes(allowed)} ({worst.name})",
        todo="; or ".join(verdict.advice) or None,
    )


def _limits(footprint: Footprint, profile: DeviceProfile) -> tuple[Limit, ...]:
    dirty = profile.app_dirty_memory_entitled.number or profile.app_dirty_memory.number
    resident = profile.app_memory.number
    return (
        Limit("app_dirty_memory", "that the app has written", footprint.dirty, None if dirty is None else round(dirty)),
        Limit(
            "app_memory", "that must stay resident", footprint.resident, None if resident is None else round(resident)
        ),
    )


def _notes(facts: BundleFacts, footprint: Footprint, profile: DeviceProfile) -> tuple[str, ...]:
    """What a verdict leaves to be known: entitlement, unknown limits, downloads."""
    notes = []
    plain, pack, app = (profile.app_dirty_memory.number, profile.pack_limit.number, profile.app_limit.number)
    if profile.app_dirty_memory_entitled.known and plain is not None and footprint.dirty > plain:
        notes.append(f"on iOS it needs the increased-memory-limit entitlement: without it {profile.app_dirty_memory}")
    if not facts.tokenizer_bytes:
        notes.append("the tokenizer's memory is not counted: there is no tokenizer.json yet")
    for name in ("app_dirty_memory", "app_memory"):
        if not getattr(profile, name).known:
            notes.append(f"{name} is unknown for this phone and was not checked")
    if app is not None and facts.file_bytes > app:
        notes.append(f"too large for the store ({profile.app_limit} an app): let the app download it itself")
    elif pack is not None and facts.file_bytes > pack:
        notes.append(f"{-(-facts.file_bytes // round(pack))} asset packs in the store ({profile.pack_limit} each)")
    return tuple(notes)


def _fits_at(facts: BundleFacts, profile: DeviceProfile, context: int) -> bool:
    return all(limit.fits is not False for limit in _limits(predict(facts, context), profile))


def _longest_context(facts: BundleFacts, profile: DeviceProfile) -> int | None:
    """The longest context that fits, by bisection: memory never shrinks as the context grows."""
    low, high = 1, facts.shape.max_positions
    if not _fits_at(facts, profile, low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits_at(facts, profile, middle) else (low, middle - 1)
    return low


def _advice(verdict: Verdict, longest: int | None) -> tuple[str, ...]:
    """What would make it fit, from the cheapest change to the dearest."""
    facts, advice = verdict.facts, []
    if longest is not None:
        advice.append(f"use --context {longest}, the longest that fits")
    if facts.kv == "float" and facts.runtime == "executorch":
        small = _with_int8_cache(facts, verdict.context)
        if _fits_at(small, verdict.profile, verdict.context):
            less = decimal_bytes(verdict.footprint.kv_cache - small.kv_cache_bytes)
            advice.append(f"export with --kv-cache int8: the cache takes {less} less, and then it fits")
    if facts.float_head_bytes:
        saved = decimal_bytes(facts.float_head_bytes * 7 / 8)
        advice.append(f"quantize with --embedding int4: the float head alone takes {saved} more")
    shares = [_fitting_share(limit, verdict.footprint) for limit in verdict.limits if limit.fits is False]
    share = min(shares)
    if share > 0:
        parameters = facts.shape.num_parameters * share
        nano = [name for name, size in NANO.items() if size <= parameters]
        such_as = f", such as {nano[-1]}" if nano else ""
        advice.append(f"take a student of at most about {_size(parameters)} parameters at this context{such_as}")
    return tuple(advice)


def _with_int8_cache(facts: BundleFacts, context: int) -> BundleFacts:
    kv = cache_bytes(facts.shape, facts.runtime, context, facts.chunk, "int8")
    return replace(facts, context=context, kv_cache_bytes=kv, kv="int8")


def _fitting_share(limit: Limit, footprint: Footprint) -> float:
    """The share of the weights that would be left if only they shrank."""
    weights = footprint.packed_weights + (footprint.mapped_weights if limit.name == "app_memory" else 0)
    return ((limit.allowed or 0) - (limit.needed - weights)) / weights


def _size(parameters: float) -> str:
    """Two digits, rounded down: 1_840_000_000 gives '1.8B'."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            digits = 10 if parameters < 10 * unit else 1
            return f"{int(parameters / unit * digits) / digits:g}{letter}"
    return f"{parameters:.0f}"
