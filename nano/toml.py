"""A TOML file that a user wrote, read with errors that name it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nano.errors import BadFileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path, what: str, todo: str = "check the path") -> dict[str, Any]:
    """The file's tables.

    Args:
        path: the file.
        what: it is for people: "recipe", "file of rules".
        todo: what helps where it is missing.

    Raises:
        BadFileError: missing, unreadable, or not TOML.
    """
    if not path.exists():
        raise BadFileError(f"There is no such {what}.", found=str(path), todo=todo)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadFileError(f"The {what} is not valid TOML.", found=f"{path}: {error}") from None
    except OSError as error:
        raise BadFileError(f"The {what} cannot be read.", found=f"{path}: {error.strerror}") from None
