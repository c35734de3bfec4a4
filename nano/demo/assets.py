"""Where the demo's embedded files lie: the teacher's folder and the recipe."""

from __future__ import annotations

from pathlib import Path

from nano.errors import BadFileError

HERE = Path(__file__).resolve().parent


def teacher_folder() -> Path:
    """The shipped teacher, an ordinary HF folder.

    Raises:
        BadFileError: the installation lacks it.
    """
    return _embedded(HERE / "teacher" / "model.safetensors").parent


def recipe_path() -> Path:
    """The recipe that `nanokit demo` builds.

    Raises:
        BadFileError: the installation lacks it.
    """
    return _embedded(HERE / "recipe.toml")


def _embedded(path: Path) -> Path:
    if not path.is_file():
        raise BadFileError(
            "The demo's embedded files are missing from this installation.",
            found=f"no {path}",
            todo="install again: pip install --force-reinstall nanokit",
        )
    return path
