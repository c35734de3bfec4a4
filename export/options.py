"""Options of the export stage, written once: the command line and a recipe's [export] table mean the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExportOptions:
    """How an int4 checkpoint becomes a phone artifact.

    Attributes:
        context: positions the KV cache holds; 0 means the model's own limit, at most 2,048.
        chunk: the longest prompt piece one call takes (prefill runs in such chunks).
        logits: "last" gives logits of a call's last position (what phones need), "all" of every position.
        activations: "int8" runs the int4 linears on int8 activations as phones do, "float" keeps them float
            (ONNX only: XNNPACK's 4-bit kernel always takes int8).
        kv_cache: "int8" keeps keys and values of each position and head as int8 with a scale and a zero point, about
            a quarter of "float"; what it costs in accuracy is in the parity report (ExecuTorch only).
        ort: write one file in ORT format, model.ort, which minimal builds of ONNX Runtime load (ONNX only, to 2 GiB).
        backend: ExecuTorch's delegate; "xnnpack" runs on every phone's CPU (ExecuTorch only).
    """

    context: int = 0
    chunk: int = 128
    logits: Literal["last", "all"] = "last"
    activations: Literal["int8", "float"] = "int8"
    kv_cache: Literal["float", "int8"] = "float"
    backend: str = "xnnpack"
    ort: bool = False
