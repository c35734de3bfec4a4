"""Run generated Python against its tests in a process that can do little.

The process (`nano/tasks/sandbox_child.py`, which imports nothing of ours) has its own session, an empty environment, a
temporary folder that goes away with it, and no network where the kernel lets it leave ours. It is limited in CPU time,
memory, file size, open files and processes, and is killed with everything it started when its time is over. Python's
audit hooks refuse files outside its folder, other processes, sockets and ctypes; started by root it becomes "nobody".

This keeps what a model writes by accident from doing harm. It is no wall against code written to break out of Python:
for models that are not trusted, run the whole evaluation in a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nano.errors import UnsupportedError

CHILD = Path(__file__).with_name("sandbox_child.py")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use.

    Attributes:
        seconds: CPU time.
        wall_seconds: time by the clock, which a busy machine stretches.
        memory_bytes: address space.
        file_bytes: the largest file that it may write, in its own folder.
        open_files: at a time.
    """

    seconds: int = 10
    wall_seconds: float = 40.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    open_files: int = 32


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Attributes:
        passed: whether every test passed.
        reason: why not: the exception, "out of time", "killed by SIGXCPU", ...; "" where it passed.
    """

    passed: bool
    reason: str = ""


def passes(said: str, tests: Sequence[str]) -> bool:
    """Whether the code in an answer passes its tests."""
    return run_python(code_of(said), tests).passed


def code_of(said: str) -> str:
    """The first fenced block of an answer, else all of it."""
    fenced = _FENCE.search(said)
    return fenced.group(1) if fenced else said


def run_python(code: str, tests: Sequence[str], limits: SandboxLimits | None = None) -> Ran:
    """Run code, then each test in the same namespace.

    Only a secret that the child sends back once all tests are through counts as passing, so that code which leaves
    early does not.

    Raises:
        UnsupportedError: not on Linux or macOS.
    """
    if os.name != "posix":
        raise UnsupportedError("Code can be run on Linux and macOS only.", found=sys.platform)
    limits = limits or SandboxLimits()
    secret = secrets.token_hex(16)
    job = json.dumps({"code": code, "tests": list(tests), "secret": secret, **asdict(limits)})
    with tempfile.TemporaryDirectory(prefix="nanokit-code-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777)  # started by root, the child is somebody else
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)], cwd=folder, env={"HOME": folder, "TMPDIR": folder},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(job.encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Ran(False, "out of time")
        finally:
            _end(process)
    lines = out.decode("utf-8", "replace").splitlines()
    if lines and lines[-1] == secret:
        return Ran(True)
    if process.returncode < 0:
        return Ran(False, f"killed by {signal.Signals(-process.returncode).name}")
    return Ran(False, lines[-1][:200] if lines else "left before its tests were through")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
