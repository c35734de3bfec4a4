"""One hierarchy of errors; each says what was wrong, what was found, what was expected and what to do.

    NanokitError                 exit status 3: it failed while working
    ├── CheckFailedError         exit status 1: a check or a gate said no
    ├── RequestError             exit status 2: the request was wrong; nothing was done
    │   ├── BadFileError         a file is missing, truncated, or not what it should be
    │   ├── UnsupportedError     a family, option or combination that we do not support
    │   ├── OutputExistsError    the output is already there and --force was not given
    │   ├── NotFoundError        a store has no such name, tag or file
    │   └── MissingExtraError    an optional dependency is not installed
    └── WorkError                exit status 3
        ├── NoSpaceError         the disk is full
        ├── BrokenTransferError  a transfer stopped halfway; the next attempt may go on from there
        └── PeerLostError        another process of a run on several devices is gone

Code raises these and nothing else for what a user can cause. `nano.cli.main` prints them and exits with
their status; a library caller catches `NanokitError`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import ClassVar


class NanokitError(Exception):
    """Base of all errors that nanokit raises on purpose.

    Args:
        problem: what went wrong, one sentence.
        found: what was there.
        expected: what should have been there.
        todo: what the user can do about it.
    """

    exit_status: ClassVar[int] = 3

    def __init__(
        self, problem: str, *, found: str | None = None, expected: str | None = None, todo: str | None = None
    ) -> None:
        self.problem = problem
        self.found = found
        self.expected = expected
        self.todo = todo
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.problem]
        if self.found is not None:
            lines.append(f"  found:    {self.found}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.todo is not None:
            lines.append(f"  to do:    {self.todo}")
        return "\n".join(lines)


class CheckFailedError(NanokitError):
    """A budget check or an accuracy gate said no."""

    exit_status = 1


class RequestError(NanokitError):
    """The request itself was wrong; nothing was done."""

    exit_status = 2


class BadFileError(RequestError):
    """A file or folder is missing, truncated, or not what it should be."""


class UnsupportedError(RequestError):
    """A family, option or combination of options that nanokit does not support."""


class OutputExistsError(RequestError):
    """The output is already there; nanokit replaces nothing without --force."""


class NotFoundError(RequestError):
    """A store has no such name, tag or file."""


class MissingExtraError(RequestError):
    """An optional dependency is not installed."""


class WorkError(NanokitError):
    """The request was right, but the work failed."""


class NoSpaceError(WorkError):
    """The disk is full, or too small for what is about to be written."""


class BrokenTransferError(WorkError):
    """A transfer stopped halfway and may go on from there.

    Attributes:
        wait: seconds that the other side asked for before the next attempt; 0 where it did not.
    """

    def __init__(self, problem: str, *, wait: float = 0.0, **said: str | None) -> None:
        self.wait = wait
        super().__init__(problem, **said)


class PeerLostError(WorkError):
    """Another process of the run is gone; raised where this process has to say so for the first one."""


def require_module(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted name to import, for instance "onnxruntime".
        extra: the extra of nanokit that installs it, for instance "onnx".

    Raises:
        MissingExtraError: it is not installed; the message carries the exact pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"This needs the Python package '{module.split('.')[0]}', which is not installed.",
            todo=f"pip install 'nanokit[{extra}]'",
        ) from None
