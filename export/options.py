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
    """

    context: int = 0
    chunk: int = 128
    logits: Literal["last", "all"] = "last"
    activations: Literal["int8", "float"] = "int8"
