"""Memory of a loaded .pte as a phone would have it.

The Python wheel's loader locks what it maps (mlock), so the whole embedding table stays resident though a text reads a
few rows of it. Android's loader does not (executorch#18398), nor does iOS's; here the pages are let go again.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_MADV_DONTNEED = 4
"""Of Linux (sys/mman.h): pages of a file mapping are dropped and read again when touched."""


def unlock(path: Path) -> int:
    """Unlock the pages of a mapped file and let them go; does nothing elsewhere than on Linux.

    Returns:
        Bytes of the mappings.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    unlocked = 0
    wanted = str(path.resolve())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == wanted and "w" not in fields[1]:
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            place, size = ctypes.c_void_p(start), ctypes.c_size_t(stop - start)
            if libc.munlock(place, size) == 0 and libc.madvise(place, size, _MADV_DONTNEED) == 0:
                unlocked += stop - start
    return unlocked
