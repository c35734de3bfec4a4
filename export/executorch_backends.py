"""Which ExecuTorch delegates a .pte can be written for: a row each.

A backend is a class that turns a decoder's parts into delegates, as `export.executorch_lower.PartLowerer` does for
XNNPACK: made of (shape, chunk), with a method `lower(part, positions)`. What stands between the parts (embedding,
caches, attention) is ExecuTorch's own and the same for all.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nano.errors import UnsupportedError

if TYPE_CHECKING:
    from export.executorch_lower import PartLowerer


@dataclass(frozen=True)
class Backend:
    """One delegate.

    Attributes:
        name: how the runtime registers it; in the manifest.
        lowerer: "module:class" that makes its delegates.
    """

    name: str
    lowerer: str

    def load(self) -> type[PartLowerer]:
        """The class that makes its delegates; imports ExecuTorch."""
        module, name = self.lowerer.split(":")
        loaded: type[PartLowerer] = getattr(importlib.import_module(module), name)
        return loaded


BACKENDS = {"xnnpack": Backend("XnnpackBackend", "export.executorch_lower:PartLowerer")}


def backend_of(name: str) -> Backend:
    """The backend that `--backend` names.

    Raises:
        UnsupportedError: it is not one of ours.
    """
    if name not in BACKENDS:
        raise UnsupportedError(
            "This ExecuTorch backend is not supported.",
            found=f"--backend {name}",
            expected="one of " + ", ".join(BACKENDS),
            todo="xnnpack runs on every phone's CPU",
        )
    return BACKENDS[name]
