"""`DeviceProfile`: what a phone can hold, every fact with its unit, source and date, read from TOML.

A profile is a file of facts, not of opinions: a number stands with the page it was read on, and what nobody
publishes is `"unknown"`, which no check counts on. One file a device, in this folder; users bring their own by path.

    name = "low-end"
    title = "..."
    os = "android"                   # "android", "ios" or "any"
    composed_of = ["...", "..."]     # only where a profile stands for several phones
    how = "..."                      # how the facts of several phones became one

    [app_dirty_memory]
    value = 2.1                      # a number, a text, a list of texts, or "unknown"
    unit = "GB"
    source = "https://..."
    date = "2024-11-16"              # when the source said so, or was read where it bears no date
    note = "..."                     # optional
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from nano.errors import BadFileError, RequestError
from nano.toml import read_toml

HOME = Path(__file__).resolve().parent
UNKNOWN = "unknown"
OPERATING_SYSTEMS = ("android", "ios", "any")

BYTES: Mapping[str, int] = MappingProxyType(
    {"MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "KiB": 1 << 10}
)
_UNITS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "bytes": BYTES,
        "rate": {"GB/s": 1e9, "MB/s": 1e6},
        "count": {"cores": 1},
        "texts": {"names": 1},
        "text": {"version": 1},
    }
)


@dataclass(frozen=True)
class Fact:
    """One thing that is known about a phone, or known to be unpublished.

    Attributes:
        value: a number in `unit`, a text, several texts, or None where nobody publishes it.
        unit: as the source gives it: "GB" (10^9 bytes), "GiB" (2^30), "GB/s", "cores", "names", "version".
        source: the page, datasheet or thread.
        date: when the source said so, or was read where it bears no date; ISO 8601.
        note: what must be known to read the number right.
        scale: how many bytes (or bytes a second) one unit is.
    """

    value: float | str | tuple[str, ...] | None = None
    unit: str = ""
    source: str = ""
    date: str = ""
    note: str = ""
    scale: float = 1

    @property
    def known(self) -> bool:
        """Whether anybody publishes it."""
        return self.value is not None

    @property
    def number(self) -> float | None:
        """The value in bytes (or bytes a second, or cores); None where it is unknown or no number."""
        return self.value * self.scale if isinstance(self.value, (int, float)) else None

    def __str__(self) -> str:
        if self.value is None:
            return UNKNOWN
        if isinstance(self.value, tuple):
            return ", ".join(self.value) or "none"
        return self.value if isinstance(self.value, str) else f"{self.value:,g} {self.unit}"


_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "ram": "bytes",
        "app_dirty_memory": "bytes",
        "app_dirty_memory_entitled": "bytes",
        "memory_limiter": "bytes",
        "app_memory": "bytes",
        "storage": "bytes",
        "pack_limit": "bytes",
        "app_limit": "bytes",
        "memory_bandwidth": "rate",
        "cpu_cores": "count",
        "cpu_features": "texts",
        "runtimes": "texts",
        "quantization": "texts",
        "os_version": "text",
    }
)


@dataclass(frozen=True)
class DeviceProfile:
    """What a phone, or a class of phones, can hold.

    Attributes:
        name: as the command line names it.
        title: one line for people.
        os: "android", "ios" or "any".
        composed_of: the phones it stands for, where it stands for several.
        how: how their facts became one.
        path: the file it was read from.
        ram: memory built in.
        app_dirty_memory: what one foreground app may hold in pages that it has written (heap, packed weights,
            KV cache); past it the system kills the app. iOS counts just these ("footprint").
        app_dirty_memory_entitled: the same with iOS's increased-memory-limit entitlement.
        memory_limiter: what Android 17's memory limiter lets a visible app hold (memory.high of its cgroup) before it
            evicts the app's file pages and swaps out its anonymous ones. Makers set it and publish it for no phone.
        app_memory: what one foreground app may keep resident in all, mapped files included; past it the
            system pages the weights back in for every token, or kills.
        storage: built in, smallest model sold.
        pack_limit: largest download of one asset pack in the store.
        app_limit: largest app in the store, packs included.
        memory_bandwidth: peak of the memory bus.
        cpu_cores: how many, all kinds together.
        cpu_features: instructions that int8 kernels use ("dotprod", "i8mm"); an empty list where it is known to have
            none.
        runtimes: which of "executorch" and "onnx" run on it.
        quantization: weight forms that they take there.
        os_version: what the facts hold for.
    """

    name: str
    title: str
    os: Literal["android", "ios", "any"]
    composed_of: tuple[str, ...] = ()
    how: str = ""
    path: Path = Path()
    ram: Fact = Fact()
    app_dirty_memory: Fact = Fact()
    app_dirty_memory_entitled: Fact = Fact()
    memory_limiter: Fact = Fact()
    app_memory: Fact = Fact()
    storage: Fact = Fact()
    pack_limit: Fact = Fact()
    app_limit: Fact = Fact()
    memory_bandwidth: Fact = Fact()
    cpu_cores: Fact = Fact()
    cpu_features: Fact = Fact()
    runtimes: Fact = Fact()
    quantization: Fact = Fact()
    os_version: Fact = Fact()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; a fact that nobody publishes has the value "unknown"."""
        head = {"title": self.title, "os": self.os, "composed_of": list(self.composed_of), "how": self.how}
        facts = {
            name: {
                "value": fact.value if fact.known else UNKNOWN,
                "unit": fact.unit,
                "source": fact.source,
                "date": fact.date,
                "note": fact.note,
            }
            for name, fact in self.facts().items()
        }
        return {**head, **facts}

    def facts(self) -> dict[str, Fact]:
        """All facts by name, unknown ones too, in the order in which people read them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in _KINDS}


def decimal_bytes(count: float) -> str:
    """Bytes for people in powers of 1,000, as phones are sold and profiles are written: '1.34 GB'."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}" if unit == "GB" else f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def profile_names() -> list[str]:
    """Names of the profiles that come with nanokit."""
    return sorted(path.stem for path in HOME.glob("*.toml") if not path.name.startswith("_"))


def load_profile(name: str) -> DeviceProfile:
    """A profile by name, or from the user's own TOML file by path.

    Raises:
        RequestError: neither a known name nor a file.
        BadFileError: the file is not TOML, or a fact in it is not usable; says which and why.
    """
    if name in profile_names():
        return read_profile(HOME / f"{name}.toml")
    path = Path(name).expanduser()
    if path.is_file():
        return read_profile(path)
    near = difflib.get_close_matches(name.lower(), profile_names(), n=1, cutoff=0.4)
    is_path = path.suffix == ".toml" or "/" in name
    raise RequestError(
        "There is no such profile file." if is_path else "There is no such device profile.",
        found=name,
        expected=f"one of {', '.join(profile_names())}, or the path of a TOML file",
        todo=f"did you mean '{near[0]}'?" if near and not is_path else "see: nanokit profiles",
    )


def read_profile(path: Path) -> DeviceProfile:
    """One profile file, every fact checked.

    Raises:
        BadFileError: not TOML, a key that is not known, a wrong unit or type, a source or date that is missing.
    """
    raw = read_toml(path, "profile")
    texts = {"name": path.stem, "title": path.stem, "os": "any", "how": ""}
    _check_keys(path, "", raw, (*texts, "composed_of", *_KINDS))
    for key in texts:
        texts[key] = raw.get(key, texts[key])
        if not isinstance(texts[key], str):
            raise _wrong(path, key, f"{texts[key]!r}", "a text")
    if texts["os"] not in OPERATING_SYSTEMS:
        raise _wrong(path, "os", repr(texts["os"]), f"one of {', '.join(OPERATING_SYSTEMS)}")
    composed_of = raw.get("composed_of", [])
    if not _is_texts(composed_of, least=0):
        raise _wrong(path, "composed_of", repr(composed_of), "a list of texts")
    facts = {name: _fact(path, name, raw[name]) for name in _KINDS if name in raw}
    os: Literal["android", "ios", "any"] = texts["os"]  # type: ignore[assignment]
    return DeviceProfile(texts["name"], texts["title"], os, tuple(composed_of), texts["how"], path, **facts)


def _fact(path: Path, name: str, raw: Any) -> Fact:
    """One fact from its table: known keys, right type, right unit, a source and a date."""
    if not isinstance(raw, dict):
        raise _wrong(path, name, repr(raw), 'a table: value, unit, source, date (value = "unknown" where unpublished)')
    _check_keys(path, f"[{name}] ", raw, ("value", "unit", "source", "date", "note"))
    kind, value, unit = _KINDS[name], raw.get("value"), raw.get("unit", "")
    source, note = raw.get("source", ""), raw.get("note", "")
    if not isinstance(source, str) or not isinstance(note, str) or not isinstance(unit, str):
        raise _wrong(path, name, f"source {source!r}, unit {unit!r}, note {note!r}", "texts")
    if value == UNKNOWN:
        return Fact(source=source, note=note)
    _check_value(path, name, kind, value)
    if unit not in _UNITS[kind]:
        raise _wrong(path, name, f"unit {unit!r}", f"unit one of {', '.join(_UNITS[kind])}")
    if not source.strip():
        raise _wrong(path, name, "a value without a source", "source = the page, datasheet or thread it was read on")
    when = raw.get("date")
    try:
        when = when if isinstance(when, date) else date.fromisoformat(when or "")
    except (ValueError, TypeError):
        raise _wrong(path, name, f"date {when!r}", "date = when the source said so, like 2026-03-27") from None
    return Fact(
        tuple(value) if isinstance(value, list) else value, unit, source, when.isoformat(), note, _UNITS[kind][unit]
    )


def _check_value(path: Path, name: str, kind: str, value: Any) -> None:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in ("bytes", "rate", "count") and not (numeric and 0 < value < float("inf")):
        raise _wrong(path, name, f"value {value!r}", f'a positive number in {", ".join(_UNITS[kind])}, or "{UNKNOWN}"')
    if kind == "texts" and not _is_texts(value, least=0 if name == "cpu_features" else 1):
        raise _wrong(path, name, f"value {value!r}", f'a list of texts, or "{UNKNOWN}"')
    if kind == "text" and not isinstance(value, str):
        raise _wrong(path, name, f"value {value!r}", f'a text, or "{UNKNOWN}"')


def _is_texts(value: Any, least: int) -> bool:
    return isinstance(value, list) and len(value) >= least and all(isinstance(item, str) for item in value)


def _check_keys(path: Path, where: str, raw: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
            raise BadFileError("The profile has a key that is not known.", found=f"{path}: {where}{key}", todo=hint)


def _wrong(path: Path, name: str, found: str, expected: str) -> BadFileError:
    return BadFileError("A fact of the profile is not usable.", found=f"{path}: {name}: {found}", expected=expected)
