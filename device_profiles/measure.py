"""`measure_bundle`: load, prefill and decode a bundle in a process of its own under a phone's limits.

A forecast can be wrong; a process that was killed cannot. The process (`worker.py`) is put under a hard cap
(`caps.py`), loads the bundle in its real runtime, takes a prompt of the wanted context and decodes. Two things stand
for the phone:

    the kernel's limit  what a phone lets stay resident (app_memory): clean pages beyond it are evicted and read
                        again, and where nothing can be evicted the process is killed
    a watcher           reads the process's anonymous memory every few milliseconds and kills it past what a phone
                        lets an app write (app_dirty_memory): no Linux limit counts that alone

Both are set over what Python and the runtime's own libraries took before the bundle was opened, which no phone has.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from device_profiles.caps import Cap, open_cap
from device_profiles.footprint import BundleFacts, cache_bytes
from device_profiles.worker import drop_cache, memory, status
from nano.errors import RequestError, UnsupportedError, WorkError

DECODED = 16
TIMEOUT = 3600.0
WATCH_SECONDS, SAMPLE_SECONDS = 0.004, 0.25
PAGING_SHARE = 0.05
"""Of the bytes that are read in place, the share that may come from storage again for a token: more is paging."""

_REFUSED = re.compile("bad.?alloc|cannot allocate|out of memory|not enough memory|new thread", re.IGNORECASE)
"""What libraries say that were refused memory."""

_TIME_OVER = "the clock: its time was over"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Phase:
    """What one phase took.

    Attributes:
        name: "load", "first chunk", "prefill", "unused cache", "decode", and two with the page cache dropped.
        units: tokens of it (1 for those that take none).
        seconds: how long it was; None where the process did not live to its end.
        memory: what the kernel counted at its end, in bytes: rss, pss, clean, dirty, anonymous, swap.
        peak_anonymous: the most anonymous bytes the watcher saw during it.
        bytes_read: from storage.
        major_faults: times that it had to wait for storage.
    """

    name: str
    units: int
    seconds: float | None
    memory: Mapping[str, int]
    peak_anonymous: int
    bytes_read: int = 0
    major_faults: int = 0

    @property
    def per_second(self) -> float:
        """Units a second; 0 where it did not end."""
        return self.units / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Measurement:
    """What happened under the cap.

    Attributes:
        cap: who kept the limit: "cgroup v2", "cgroup v1" or "rlimit".
        limit: bytes that the kernel allowed over `base`; None without one.
        dirty_limit: anonymous bytes that the watcher allowed over `base`; None without one.
        base: anonymous bytes of Python and the libraries before the bundle was opened.
        context: positions asked for.
        prefilled: positions prefilled; the cache of the others was written to as memory of the same size.
        phases: in order.
        died: the phase in which it was killed; None where it lived.
        killer: who killed it, in words; "" where it lived.
        samples: the largest of each of smaps_rollup's figures, sampled all along.
        mapped_bytes: what the bundle has to read in place.
    """

    cap: str
    limit: int | None
    dirty_limit: int | None
    base: int
    context: int
    prefilled: int
    phases: tuple[Phase, ...]
    died: str | None
    killer: str
    samples: Mapping[str, int]
    mapped_bytes: int

    @property
    def peak_dirty(self) -> int:
        """The most anonymous bytes over the base: what `Footprint.dirty` predicts."""
        return max(phase.peak_anonymous for phase in self.phases) - self.base

    @property
    def pages(self) -> bool:
        """Whether weights had to be read from storage again and again: over a first reading, for every token."""
        found = (self.phase(name) for name in ("first chunk", "prefill", "decode"))
        once, each = self.mapped_bytes, PAGING_SHARE * self.mapped_bytes
        return any(phase is not None and phase.bytes_read > once + each * phase.units for phase in found)

    @property
    def fits(self) -> bool:
        """Whether it lived, and decoded from memory."""
        return self.died is None and not self.pages

    def phase(self, name: str) -> Phase | None:
        """One phase by name; None where it was not come to."""
        return next((phase for phase in self.phases if phase.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json` and the manifest."""
        phases = [{**asdict(phase), "units_per_second": phase.per_second} for phase in self.phases]
        mine = {key: value for key, value in asdict(self).items() if key != "phases"}
        return {**mine, "peak_dirty": self.peak_dirty, "pages": self.pages, "fits": self.fits, "phases": phases}


@dataclass
class _Watched:
    """What the watcher writes while the process lives."""

    phase: str = "load"
    peaks: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    killed: str = ""


def measure_bundle(
    bundle: Path,
    facts: BundleFacts,
    *,
    resident: int | None,
    dirty: int | None,
    tokens: int | None = None,
    decode: int = DECODED,
    timeout: float = TIMEOUT,
    allow_groups: bool = True,
    say: Say = lambda _: None,
) -> Measurement:
    """Run a bundle under a phone's limits.

    Args:
        bundle: the folder that nanokit export wrote.
        facts: its facts, for the context it is measured at.
        resident: bytes that may stay resident over the base; None for no such limit.
        dirty: bytes that may be written over the base; None for no such limit.
        tokens: positions to prefill; the whole context but what decoding needs where None. For the rest of the cache
            memory of the same size is written.
        decode: tokens to decode.
        timeout: seconds after which it is killed: a process that pages may take days.
        allow_groups: False to use rlimit even where control groups may be used.
        say: takes a line for people now and then.

    Raises:
        RequestError: more tokens than the context holds.
        UnsupportedError: not Linux.
        WorkError: the process failed for another reason than memory, or its time was over and it did not page.
    """
    if sys.platform != "linux":
        raise UnsupportedError("Memory is measured on Linux only.", found=sys.platform, todo="leave --measure out")
    room = facts.context - _tail(decode)
    if room < 1 or (tokens is not None and not 1 <= tokens <= room):
        raise RequestError(
            "The context cannot hold the measurement.",
            found=f"{tokens or 1} tokens to prefill and {_tail(decode)} to decode",
            expected=f"{facts.context} positions in all",
            todo="--measure-tokens",
        )
    prefilled = tokens or room
    request = {
        "bundle": str(bundle.resolve()),
        "runtime": facts.runtime,
        "tokens": prefilled,
        "decode": decode,
        "chunk": facts.chunk,
        "ballast": unused_cache(facts, prefilled),
    }
    with contextlib.suppress(OSError):
        drop_cache(bundle)  # else its pages may be counted for whoever read them first
    command = [sys.executable, "-m", "device_profiles.worker", json.dumps(request)]
    pipe = subprocess.PIPE
    with open_cap(allow_groups) as cap, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:  # noqa: E501  # fmt: skip
        try:
            return _watch(process, cap, facts, (resident, dirty, timeout), prefilled, say)
        finally:
            process.kill()


def unused_cache(facts: BundleFacts, prefilled: int) -> int:
    """Bytes of the cache that a shorter prompt leaves untouched. ExecuTorch writes all of its memory when it loads."""
    if facts.runtime == "executorch" or prefilled >= facts.context - _tail(DECODED):
        return 0
    return facts.kv_cache_bytes - cache_bytes(facts.shape, facts.runtime, prefilled, facts.chunk)


def _tail(decode: int) -> int:
    """Positions that are decoded in all: with a warm page cache, with one dropped once, and with one dropped always."""
    return decode + 1 + max(decode // 4, 1)


def _watch(
    process: subprocess.Popen[str],
    cap: Cap,
    facts: BundleFacts,
    limits: tuple[int | None, int | None, float],
    prefilled: int,
    say: Say,
) -> Measurement:
    resident, dirty, timeout = limits
    assert process.stderr is not None
    cap.hold(process.pid)
    errors: list[str] = []
    drain = threading.Thread(target=lambda stream=process.stderr: errors.append(stream.read()), daemon=True)
    drain.start()
    _send(process, "")
    ready = _events(process)
    first = next(ready, None)
    if first is None or first["event"] != "ready":
        raise _failed(first, errors, drain)
    base = int(first["memory"]["anonymous"])
    allowed = resident if resident is not None else (None if dirty is None else dirty + facts.mapped_bytes)
    if allowed is not None:
        cap.limit(max(base, cap.anonymous()) + allowed)
    data = None
    if cap.group is None and (resident or dirty):
        data = int(first["data"]) + min(x for x in (resident, dirty) if x is not None)
    watched, over = _Watched(), threading.Event()
    until = time.monotonic() + timeout
    watcher = threading.Thread(target=_sample, args=(process, watched, base, dirty, until, over), daemon=True)
    watcher.start()
    _send(process, json.dumps({"data": data}))
    phases, last = _follow(ready, watched, say)
    process.wait()
    over.set()
    watcher.join()
    killer = "" if last is not None and last["event"] == "done" else _killer(process, cap, watched, last)
    died = watched.phase if killer else None
    if died is not None:
        phases.append(Phase(died, 0, None, {}, watched.peaks.get(died, base)))
    elif last is None or last["event"] != "done":
        raise _failed(last, errors, drain)
    measured = Measurement(
        cap=cap.kind,
        limit=None if data is None and cap.group is None else allowed,
        dirty_limit=dirty,
        base=base,
        context=facts.context,
        prefilled=prefilled,
        phases=tuple(phases),
        died=died,
        killer=killer,
        samples=watched.samples,
        mapped_bytes=facts.mapped_bytes,
    )
    if watched.killed == _TIME_OVER and not measured.pages:
        raise _too_long(timeout, died)
    return measured


def _send(process: subprocess.Popen[str], line: str) -> None:
    """A line for the process; one that is dead already does not hear it."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the process tells, until it ends; a line cut short by its death is its last."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _follow(events: Iterator[dict[str, Any]], watched: _Watched, say: Say) -> tuple[list[Phase], dict[str, Any] | None]:
    """The phases that ended, and the last event; the forecast of the long ones comes from the first chunk."""
    phases: list[Phase] = []
    units, last = 1, None
    for event in events:
        last = event
        if event["event"] == "begin":
            watched.phase, units = event["phase"], int(event["units"])
            if event["phase"] == "prefill" and phases:
                seconds = units / max(phases[-1].per_second, 1e-9)
                say(f"prefilling {units:,} positions: about {seconds:,.0f} s")
        elif event["event"] == "end":
            name, now = event["phase"], event["memory"]
            peak = max(watched.peaks.get(name, 0), int(now["anonymous"]))
            phases.append(Phase(name, units, event["seconds"], now, peak, event["bytes_read"], event["major_faults"]))
            for key, value in now.items():
                watched.samples[key] = max(watched.samples.get(key, 0), value)
    return phases, last


def _sample(
    process: subprocess.Popen[str],
    watched: _Watched,
    base: int,
    dirty: int | None,
    until: float,
    over: threading.Event,
) -> None:
    """Watch the process's memory until it ends; kill it past what may be written, or past its time."""
    next_rollup = 0.0
    while not over.wait(WATCH_SECONDS):
        try:
            anonymous = status(process.pid)["RssAnon"]
            if time.monotonic() >= next_rollup:
                for key, value in memory(process.pid).items():
                    watched.samples[key] = max(watched.samples.get(key, 0), value)
                next_rollup = time.monotonic() + SAMPLE_SECONDS
        except (OSError, KeyError, ValueError):  # it has ended
            return
        watched.peaks[watched.phase] = max(watched.peaks.get(watched.phase, 0), anonymous)
        if dirty is not None and anonymous - base > dirty:
            watched.killed = "the watcher: it wrote more than the phone lets an app write"
        elif time.monotonic() > until:
            watched.killed = _TIME_OVER
        if watched.killed:
            process.kill()
            return


def _killer(process: subprocess.Popen[str], cap: Cap, watched: _Watched, last: Mapping[str, Any] | None) -> str:
    """Who killed the process for its memory, in words; "" where nobody did."""
    if watched.killed:
        return watched.killed
    if cap.killed():
        return f"the kernel ({cap.kind}): nothing was left to evict"
    if last is not None and (last["event"] == "refused" or _REFUSED.search(str(last.get("message", "")))):
        return "RLIMIT_DATA: it was refused memory"
    if cap.group is None and process.returncode not in (0, None):
        return f"RLIMIT_DATA: it ended with status {process.returncode} when it was refused memory"
    return ""


def _too_long(timeout: float, died: str | None) -> WorkError:
    return WorkError(
        "The measurement took too long; whether it fits is not known.",
        found=f"{timeout / 60:.0f} minutes, in the phase '{died}'",
        todo="give it longer with --measure-minutes, or fewer positions with --measure-tokens",
    )


def _failed(last: Mapping[str, Any] | None, errors: list[str], drain: threading.Thread) -> WorkError:
    drain.join(1)
    said = "".join(errors).strip().splitlines()
    told = last.get("message") if last else None
    return WorkError(
        "The measured process failed, and not for want of memory.",
        found=str(told or (said[-1] if said else "it ended without a word")),
        todo="try the bundle with nanokit generate",
    )
