"""File names that came from elsewhere: which of them may be created in a folder.

An artifact's layers name their own files, so a name is an attack surface: absolute paths, `..`, drive letters and
backslashes, control characters, names that one file system tells apart and another does not (`Model.pte` and
`model.pte`, or two Unicode spellings of one name), and a file where another name needs a folder. All are refused,
on every system alike, so that an artifact that can be pulled here can be pulled everywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from nano.errors import BadFileError

MAX_DEPTH = 8
MAX_COMPONENT = 200
"""Bytes in UTF-8; file systems take 255, and a download in progress has a longer name."""
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


def require_safe_names(names: Iterable[str], where: str) -> None:
    """Raise unless all these files may be created side by side under one folder.

    Args:
        names: paths with `/` between folders, as an artifact tells them.
        where: what named them, for the message.

    Raises:
        BadFileError: a name that could leave the folder, or that could hide another.
    """
    seen: dict[str, str] = {}
    for name in names:
        if problem := _problem(name):
            raise _refused(f"{name!r}: {problem}", where)
        folded = _folded(name)
        if folded in seen:
            raise _refused(f"{name!r} and {seen[folded]!r}, one file on some systems", where)
        seen[folded] = name
    for folded, name in seen.items():
        for parent in PurePosixPath(folded).parents:
            if str(parent) in seen:
                raise _refused(f"{seen[str(parent)]!r} as a file, and as the folder of {name!r}", where)


def _problem(name: str) -> str:
    """What is wrong with one name; empty where nothing is."""
    parts = name.split("/")
    if not name or name.startswith("/") or not all(parts):
        return "not a path within a folder"
    if any(part in (".", "..") for part in parts):
        return "steps out of its folder"
    if _FORBIDDEN.search(name) or not name.isprintable():
        return "characters that not every system takes"
    if any(part != part.strip() or part.endswith(".") or _DEVICES.fullmatch(part) for part in parts):
        return "a name that not every system takes"
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "not valid Unicode"
    if len(parts) > MAX_DEPTH or longest > MAX_COMPONENT:
        return f"deeper than {MAX_DEPTH} folders, or a part longer than {MAX_COMPONENT} bytes"
    return ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name).casefold())


def _refused(found: str, where: str) -> BadFileError:
    return BadFileError(
        "The artifact names a file that cannot be created safely; nothing was written.",
        found=f"{found}, in {where}",
        expected="different relative paths below the target folder",
        todo="do not use this artifact; tell whoever published it",
    )
