"""What decides, besides its weights, the last bits of what a bundle computes: who made it, what runs it, and where.

Phone runtimes quantize activations as they run, so float32's last bit decides some codes. A runtime picks its kernels
by the processor's instruction sets; with the same graph, runtime and instruction sets it gives the same numbers
bit for bit, whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

from nano.manifest import Manifest

_PACKAGES = {"executorch": "executorch", "onnx": "onnxruntime"}
_MAKERS = ("nanokit", "torch", "executorch", "torchao", "onnx")
"""Whose versions may change the graph that a bundle holds."""
CPUINFO = Path("/proc/cpuinfo")


def runtime_of(manifest: Manifest) -> dict[str, str]:
    """Who made a bundle, what runs it here, and on what machine; nothing for what torch runs."""
    package = _PACKAGES.get(manifest.kind)
    if package is None:
        return {}
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return {}
    made = [f"{name} {manifest.versions[name]}" for name in _MAKERS if name in manifest.versions]
    options = [f"{name}={v}" for name, v in sorted(manifest.recipe.items()) if isinstance(v, str | int)]
    return {"made_by": ", ".join([*made, *options]), "run_by": f"{package} {version}", "machine": machine()}


def machine() -> str:
    """Processor and instruction sets, alike on machines that compute alike."""
    found = {"model name": platform.processor(), "flags": "", "Features": ""}
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in found:
                found[name.strip()] = value.strip()
    sets = " ".join(sorted((found["flags"] or found["Features"]).split()))
    return f"{platform.system()} {platform.machine()}, {found['model name'] or 'unnamed'}, instruction sets {hashlib.sha256(sets.encode()).hexdigest()[:8]}"  # noqa: E501  # fmt: skip
