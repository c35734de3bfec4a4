"""A model by folder or by hub id, as users of transformers name it."""

from __future__ import annotations

import re
from pathlib import Path

from nano.errors import BadFileError

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """The folder of a model: `name` itself where it is a folder, else the hub's snapshot of that id.

    Args:
        name: a local folder, or a hub id such as "Qwen/Qwen3-0.6B".
        weights: False fetches the configs only.

    Raises:
        BadFileError: neither a folder nor an id that the hub has (or the hub is out of reach).
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() and _begins(folder, b"GGUF"):
        raise BadFileError(
            "GGUF files are not read.",
            found=str(folder),
            expected="a Hugging Face model: config.json, *.safetensors and a tokenizer",
            todo="name the folder or hub id of the float model that it was made from",
        )
    if folder.exists():
        raise BadFileError(
            "A model is a folder; this is a file.",
            found=str(folder),
            todo=f"name the folder that holds it: {folder.parent}",
        )
    if not _HUB_ID.match(name) or name.startswith("."):
        raise BadFileError(
            "There is no such model folder.", found=name, expected="a folder, or a hub id like Qwen/Qwen3-0.6B"
        )
    import huggingface_hub

    wanted = list(_WANTED if weights else ("*.json",))
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client raises kinds of three libraries; to the user they are one
        raise BadFileError(
            "There is no such model folder, and the hub did not give a model of that id.",
            found=f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            todo="check the path; for a gated or private model run `hf auth login` first",
        ) from None


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
