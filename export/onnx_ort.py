"""ORT format: a bundle's graph and weights as one flatbuffer, model.ort, which minimal builds of ONNX Runtime load.

Written by ONNX Runtime itself from model.onnx, as its own converter does
(https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html), at the "basic" level of graph
optimization, which is the same for every processor. Weights are copied as they stand; a tied head and the embedding,
one region of model.onnx.data, become two. A flatbuffer ends at 2 GiB.

Read back with the bindings of the format's schema (onnxruntime/core/flatbuffers/schema/ort.fbs) that the onnxruntime
package ships.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.onnx_files import DATA, MODEL, ORT_MODEL
from nano.errors import BadFileError, UnsupportedError, WorkError, require_module
from nano.progress import say

LARGEST = (1 << 31) - (16 << 20)
"""Bytes of weights that fit: a flatbuffer's offsets are signed 32-bit numbers; 16 MiB are left for the graph."""
_SCHEMA = "onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession"
_DTYPES = {1: np.float32, 2: np.uint8, 7: np.int64}
"""onnx.TensorProto.DataType of the initializers that we read."""


def check_size(graph: Any) -> None:
    """Refuse a graph whose weights are too many for the format, before a byte is written.

    Raises:
        UnsupportedError: says how many there are.
    """
    size = sum(int(value.const_value.nbytes) for value in graph.initializers.values())
    if size > LARGEST:
        raise UnsupportedError(
            "The model is too large for the ORT format, a flatbuffer.",
            found=f"{size:,} bytes of weights (a tied head counts twice: the format has no shared bytes)",
            expected=f"at most {LARGEST:,}",
            todo="leave --ort out: model.onnx with model.onnx.data has no such limit",
        )


def convert(folder: Path) -> None:
    """Turn a folder's model.onnx and model.onnx.data into model.ort.

    Raises:
        WorkError: ONNX Runtime could not.
    """
    ort = require_module("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / ORT_MODEL)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.disable_prepacking", "1")
    say("write model.ort")
    try:
        ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises bare pybind exceptions of many kinds
        raise WorkError("ONNX Runtime could not write the ORT format.", found=str(error)) from None
    for name in (MODEL, DATA):
        (folder / name).unlink()


@contextmanager
def open_graph(folder: Path) -> Iterator[Any]:
    """The flatbuffer `Graph` of a model.ort, mapped while the block runs.

    Raises:
        BadFileError: missing, truncated, or not of the format.
    """
    schema = require_module(_SCHEMA, "onnx")
    path = folder / ORT_MODEL
    if not path.is_file():
        raise BadFileError("The bundle has no model.", found=f"no {path}", todo="copy the bundle again")
    if path.stat().st_size < 8:
        raise broken(path, "it is too short")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if mapped[4:8] != b"ORTM":
            raise broken(path, f"it begins with {mapped[:8]!r}")
        view = memoryview(mapped)
        try:
            yield schema.InferenceSession.GetRootAs(view, 0).Model().Graph()
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise broken(path, f"{type(error).__name__}: {error}") from None
        except Exception as error:
            if type(error).__module__ == "struct":
                raise broken(path, str(error)) from None
            raise
        finally:
            view.release()


def broken(path: Path, why: str) -> BadFileError:
    """The error for a file that is not whole."""
    found = f"{path}: {why}"
    return BadFileError("The bundle's model is truncated or not of the ORT format.", found=found)


def initializers(graph: Any) -> dict[str, Any]:
    """The graph's flatbuffer tensors by name; every one's bytes lie within the file."""
    found = {}
    for i in range(graph.InitializersLength()):
        tensor = graph.Initializers(i)
        found[tensor.Name().decode()] = tensor
        if tensor.RawDataLength():
            tensor.RawData(tensor.RawDataLength() - 1)  # its last byte: raises where the file ends before it
    return found


def array(tensor: Any) -> npt.NDArray[Any]:
    """A copy of a tensor's contents, in its own shape."""
    shape = [tensor.Dims(i) for i in range(tensor.DimsLength())]
    raw: npt.NDArray[np.uint8] = tensor.RawDataAsNumpy()
    return raw.view(_DTYPES[tensor.DataType()]).reshape(shape).copy()


def attributes(node: Any) -> dict[str, int]:
    """Whole-number attributes of a flatbuffer node."""
    found = (node.Attributes(i) for i in range(node.AttributesLength()))
    return {one.Name().decode(): one.I() for one in found}


def nodes(graph: Any) -> Iterator[Any]:
    """Flatbuffer nodes of a graph."""
    return (graph.Nodes(i) for i in range(graph.NodesLength()))
