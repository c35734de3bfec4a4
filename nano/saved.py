"""Small JSON files that say their own format: how a baseline and a scorecard are opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nano.errors import BadFileError


def read_saved(path: Path, noun: str, format: str, version: int, todo: str) -> dict[str, Any]:
    """The object of a JSON file with `"format": format` and `"schema_version": version`, without these two.

    Args:
        path: the file.
        noun: what it should be, for people.
        format: what it must call itself.
        version: of its schema.
        todo: how such a file is made.

    Raises:
        BadFileError: not JSON, not of that format, or of another schema.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFileError(f"The {noun} cannot be read.", found=f"{path}: {error}", todo=todo) from None
    if not isinstance(raw, dict) or raw.get("format") != format or raw.get("schema_version") != version:
        raise BadFileError(
            f"This file is no {noun} that this nanokit knows.", found=str(path),
            expected=f'JSON with "format": "{format}" and "schema_version": {version}', todo=todo,
        )  # fmt: skip
    return {key: value for key, value in raw.items() if key not in ("format", "schema_version")}
