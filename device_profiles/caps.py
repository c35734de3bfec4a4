"""A hard limit on one process's memory, kept by the kernel where it may be: what a phone does, on this machine.

Three ways, the first that this machine allows, and every report says which:

    cgroup v2   memory.max of a group of its own; the kernel evicts clean pages and kills at the limit
    cgroup v1   memory.limit_in_bytes, the same
    rlimit      RLIMIT_DATA refuses further private memory; clean pages are neither counted nor evicted

The group is made below the one that this process is in (in v2, where that one may hold no processes of its own
besides, in the nearest one above that takes it), and removed afterwards. Sources: the kernel's
admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; getrlimit(2).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["cgroup v2", "cgroup v1", "rlimit"]
_FILES = {"cgroup v2": ("memory.max", "memory.events"), "cgroup v1": ("memory.limit_in_bytes", "memory.oom_control")}
_V1_SWAP = "memory.memsw.limit_in_bytes"
_V2_SWAP = "memory.swap.max"
REMOVE_SECONDS = 5.0


@dataclass(frozen=True)
class Cap:
    """A limit that a process can be put under.

    Attributes:
        kind: who keeps it.
        group: the control group's folder; None where the kernel gives us none.
    """

    kind: Kind
    group: Path | None = None

    def hold(self, pid: int) -> None:
        """Put a process under it. Pages that it has already are not moved, so do it first of all."""
        if self.group is not None:
            (self.group / "cgroup.procs").write_text(str(pid))

    def limit(self, count: int) -> None:
        """Set the limit in bytes; clean pages beyond it are evicted at once. No swap: phones have none to speak of."""
        if self.group is None:
            return
        name, _ = _FILES[self.kind]
        (self.group / name).write_text(str(count))
        with contextlib.suppress(OSError):  # kernels without swap accounting do not have it
            swap, value = (_V2_SWAP, "0") if self.kind == "cgroup v2" else (_V1_SWAP, str(count))
            (self.group / swap).write_text(value)

    def killed(self) -> bool:
        """Whether the kernel has killed a process for exceeding the limit."""
        if self.group is None:
            return False
        _, name = _FILES[self.kind]
        counts = dict(line.split() for line in (self.group / name).read_text().splitlines())
        return int(counts.get("oom_kill", 0)) > 0

    def anonymous(self) -> int:
        """Bytes of the group that cannot be evicted: anonymous memory and what the kernel keeps for it."""
        if self.group is None:
            return 0
        stat = dict(line.split() for line in (self.group / "memory.stat").read_text().splitlines())
        if self.kind == "cgroup v2":
            return int(stat["anon"]) + int(stat.get("kernel", 0))
        kernel = self.group / "memory.kmem.usage_in_bytes"
        return int(stat["rss"]) + (int(kernel.read_text()) if kernel.exists() else 0)


@contextlib.contextmanager
def open_cap(allow_groups: bool = True) -> Iterator[Cap]:
    """A limit for one process, gone when the block ends.

    Args:
        allow_groups: False to do without control groups.
    """
    for kind, parent in _parents() if allow_groups else ():
        group = parent / f"nanokit-{os.getpid()}-{time.monotonic_ns()}"
        if not _usable(kind, group):
            continue
        try:
            yield Cap(kind, group)
        finally:
            _remove(group)
        return
    yield Cap("rlimit")


def _parents() -> list[tuple[Kind, Path]]:
    """Folders in which a group of our own may be made, best first."""
    try:
        mounts = [line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines()]
        ours = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found: list[tuple[Kind, Path]] = []
    for place, system, options in mounts:
        root = Path(place)
        if system == "cgroup2" and "memory" in _controllers(root):
            own = root / next((path.lstrip("/") for number, _, path in ours if number == "0"), "")
            found += [("cgroup v2", p) for p in (own, *own.parents) if p.is_relative_to(root)]
        if system == "cgroup" and "memory" in options.split(","):
            path = next((path for _, names, path in ours if "memory" in names.split(",")), "")
            own = root / path.lstrip("/")
            found.append(("cgroup v1", own if own.is_dir() else root))
    return sorted(found, key=lambda pair: pair[0] != "cgroup v2")


def _controllers(root: Path) -> list[str]:
    try:
        return (root / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _usable(kind: Kind, group: Path) -> bool:
    """Make the group; whether it has a limit and takes a process (one that does nothing, to try)."""
    try:
        group.mkdir()
    except OSError:
        return False
    limit = group / _FILES[kind][0]
    with contextlib.suppress(OSError), subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        if os.access(limit, os.W_OK):
            (group / "cgroup.procs").write_text(str(child.pid))
            return True
    _remove(group)
    return False


def _remove(group: Path) -> None:
    """Remove the group; its last process may need a moment to be gone."""
    until = time.monotonic() + REMOVE_SECONDS
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > until:
                return
            time.sleep(0.01)
