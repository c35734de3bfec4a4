"""Small files of a model folder, read with care: each that is not what its name says is refused by what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nano.errors import BadFileError

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has put in the place of a large one (git-lfs/docs/spec.md)."""

ADAPTER = "adapter_config.json"
"""What peft's `save_pretrained` writes beside an adapter's weights."""


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BadFileError: it cannot be read, is a Git LFS pointer, is not UTF-8 or JSON, is nested too deep, or no object.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadFileError(f"{path.name} is not valid JSON.", found=f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise BadFileError(f"{path.name} is not a JSON object.", found=f"{path}: {type(value).__name__}")
    return value


def refuse_pointer(path: Path) -> None:
    """Refuse what Git LFS left in the place of a file.

    Raises:
        BadFileError: the file is such a pointer.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        begins = file.read(len(POINTER))
    if begins == POINTER:
        raise BadFileError(
            f"{path.name} is a Git LFS pointer, not the file itself.",
            found=f"{path} ({path.stat().st_size} bytes)",
            todo="run `git lfs install && git lfs pull` in the model's repository, or download the file itself",
        )


def refuse_adapter(folder: Path) -> None:
    """Refuse an adapter: what it adds would be left out without a word.

    Raises:
        BadFileError: the folder holds one, alone or beside a model's weights.
    """
    if (folder / ADAPTER).is_file():
        raise BadFileError(
            "This folder holds an adapter (LoRA or alike), which changes another model's weights.",
            found=str(folder / ADAPTER),
            expected="a whole model",
            todo="merge it first (PeftModel.from_pretrained(MODEL, THIS).merge_and_unload().save_pretrained(NEW)), "
            f"or take {ADAPTER} out of the folder, to use the model without it",
        )
