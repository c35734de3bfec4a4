"""The process that runs generated code; started by `nano.tasks.sandbox` as a script, with a job as JSON on stdin.

Standard library only. What code is likely to import is imported before rights are dropped, since the interpreter's
own files may not be readable afterwards.
"""

import ctypes
import json
import os
import resource
import sys
from typing import Any

COMMON = (
    "_strptime", "abc", "array", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "itertools", "math", "numbers", "operator", "pathlib",
    "queue", "random", "re", "statistics", "string", "textwrap", "time", "typing", "unicodedata",
)  # fmt: skip
NOBODY = 65534
NEW_USER, NEW_NET = 0x10000000, 0x40000000  # linux/sched.h
NO_NEW_PRIVILEGES, DEATH_SIGNAL = 38, 1  # linux/prctl.h
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
           "os.putenv", "pty.", "ctypes.", "shutil.", "resource.", "signal.", "sys.addaudithook", "gc.get_objects",
           "os.chown", "os.chmod", "os.setxattr", "fcntl.", "mmap.")  # fmt: skip
PATHS = {"open": 1, "os.remove": 1, "os.rename": 2, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
         "os.truncate": 1, "os.utime": 1, "os.listdir": 1, "os.scandir": 1, "os.chdir": 1}  # fmt: skip
"""Events that name files, and how many of their arguments are paths."""


def leave_network() -> None:
    """A network of its own, with nothing in it, where the kernel allows that."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(DEATH_SIGNAL, 9, 0, 0, 0)
    libc.unshare(NEW_NET if os.geteuid() == 0 else NEW_USER | NEW_NET)


def limit(job: dict[str, Any]) -> None:
    """Limits that hold for whatever follows."""
    wanted = {
        resource.RLIMIT_CPU: job["seconds"], resource.RLIMIT_AS: job["memory_bytes"], resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: job["file_bytes"], resource.RLIMIT_NOFILE: job["open_files"], resource.RLIMIT_NPROC: 0,
    }  # fmt: skip
    for which, most in wanted.items():
        try:
            resource.setrlimit(which, (most, most))
        except (ValueError, OSError):  # macOS knows no limit of the address space
            continue
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def guard(folder: str) -> None:
    """Refuse files outside the folder, but for reading what Python itself is made of, and everything in REFUSED."""
    inside, own = os.path.realpath(folder) + os.sep, [os.path.realpath(p) + os.sep for p in sys.path if p]
    realpath, fsdecode = os.path.realpath, os.fsdecode

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        for path in arguments[: PATHS.get(event, 0)]:
            if isinstance(path, int) or path is None:
                continue
            whole = realpath(fsdecode(path)) + os.sep
            reads = event in ("os.listdir", "os.scandir") or (event == "open" and not arguments[2] & WRITING)
            if not whole.startswith(inside) and not (reads and whole.startswith(tuple(own))):
                raise PermissionError(f"{event} outside the folder is not allowed here: {path}")

    sys.addaudithook(watch)


def main() -> None:
    """Read the job, give up rights, run code and tests, say the secret."""
    job = json.loads(sys.stdin.read())
    for name in COMMON:
        __import__(name)
    said = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    leave_network()
    limit(job)
    guard(os.getcwd())
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(job["code"], "<answer>", "exec"), space)
        for test in job["tests"]:
            exec(compile(test, "<test>", "exec"), space)
    except BaseException as error:
        os.write(said, f"{type(error).__name__}: {error}".encode()[:400])
        os._exit(1)
    os.write(said, job["secret"].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
