"""Keeps ExecuTorch's and torchao's chatter off the user's screen and out of `--json`'s stdout.

`nano.quiet` raises loggers' thresholds; that does not reach what C++ writes to the files 1 and 2 (stats of the LLM
runner on stdout among it), nor what pybind writes to `sys.stderr`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def silenced(*, our_words: bool = False) -> Iterator[None]:
    """Keep the toolchain's chatter off the screen: Python's logging and warnings, and what C++ writes.

    Args:
        our_words: keep Python's own `sys.stdout` and `sys.stderr` going to where they went, so that our progress is
            seen. ExecuTorch's runtime writes there too, so it is for exporting, not for running.
    """
    threshold = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, threshold)
        logging.disable(logging.ERROR)
        for name, number in (("stdout", 1), ("stderr", 2)):
            stack.enter_context(_redirected(name, number, our_words))
        yield


@contextlib.contextmanager
def _redirected(name: str, number: int, our_words: bool) -> Iterator[None]:
    """Point a file number at a scratch file, and `sys.NAME` at it or at a copy of where it went."""
    stream: TextIO = getattr(sys, name)
    stream.flush()
    kept = os.dup(number)
    with tempfile.TemporaryFile() as sink:
        if not our_words:
            ours: TextIO = os.fdopen(os.dup(sink.fileno()), "w")
        elif _writes_to(stream, number):
            ours = os.fdopen(os.dup(kept), "w", buffering=1, encoding=stream.encoding, errors="backslashreplace")
        else:
            ours = stream
        try:
            os.dup2(sink.fileno(), number)
            setattr(sys, name, ours)
            yield
        finally:
            setattr(sys, name, stream)
            if ours is not stream:
                ours.close()
            ctypes.CDLL(None).fflush(None)  # what C buffered belongs to the scratch file
            os.dup2(kept, number)
            os.close(kept)


def _writes_to(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):  # pytest and notebooks put streams there that have no number
        return False
