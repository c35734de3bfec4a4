"""The files of an ONNX bundle: their names, how a session should run them, and whether they are whole.

Free of torch, so that opening a bundle costs what the runtime costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nano.errors import BadFileError, require_module

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
ORT_MODEL = "model.ort"
SESSION_OPTIONS = {"session.intra_op.allow_spinning": "0"}
"""Idle threads sleep. Two spinning threads decode at half the speed where a core is shared (0.4B, 2 busy cores:
10.2 tokens/s spinning, 18.2 not), and on a phone they drain the battery."""


def model_path(folder: Path) -> Path:
    """The model file that a bundle's genai_config.json names: model.onnx, or model.ort.

    Raises:
        BadFileError: no such configuration, or one that names another file.
    """
    path = folder / CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
    except OSError:
        raise BadFileError(
            "The bundle has no configuration.", found=f"no {path}", todo="copy the bundle again"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise BadFileError("The bundle's configuration is broken.", found=str(path), todo="copy it again") from None
    if name not in (MODEL, ORT_MODEL):
        raise BadFileError(
            "The bundle's configuration names a model that is not ours.",
            found=f"{name!r} in {path}",
            expected=f"{MODEL} or {ORT_MODEL}",
        )
    return folder / str(name)


def load_graph(folder: Path) -> Any:
    """The `onnx_ir.Graph` of a bundle; weights stay in their file.

    Raises:
        BadFileError: missing, or not an ONNX model.
        MissingExtraError: onnx is not installed.
    """
    ir = require_module("onnx_ir", "onnx")
    path = folder / MODEL
    if not path.is_file():
        raise BadFileError("The bundle has no model.", found=f"no {path}", todo="copy the bundle again")
    try:
        return ir.load(path).graph
    except Exception as error:  # protobuf and onnx_ir raise many kinds; all mean the same here
        raise BadFileError("The bundle's model is truncated or not ONNX.", found=f"{path}: {error}") from None


def check_files(folder: Path) -> None:
    """The model file is what it should be, and every tensor lies within it or within the data file that it names.

    Raises:
        BadFileError: a file is missing, truncated, or not ONNX.
    """
    if model_path(folder).name == ORT_MODEL:
        from export import onnx_ort

        with onnx_ort.open_graph(folder) as graph:
            onnx_ort.initializers(graph)
        return
    ir = require_module("onnx_ir", "onnx")
    for value in load_graph(folder).initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        path = Path(tensor.path)
        size = path.stat().st_size if path.is_file() else 0
        if size < tensor.offset + tensor.length:
            raise BadFileError(
                "The bundle's weights are truncated." if size else "The bundle's weights are missing.",
                found=f"{path}: {size} bytes" if size else f"no {path}",
                expected=f"at least {tensor.offset + tensor.length} bytes for '{value.name}'",
                todo="copy the bundle again",
            )
