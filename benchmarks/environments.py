"""The virtual environments in which the peers of the comparing benchmarks run: one each, with a CPU-only torch.

Versions are those that the runners in benchmarks/peers were written against.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
"""The local version keeps pip from the CUDA build and its gigabytes of libraries."""

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

PACKAGES = {
    "torchao": ("torchao==0.18.0", "transformers==5.23.0", "accelerate>=1.10"),
    "auto-round": ("auto-round==0.16.1",),
    "llm-compressor": ("llmcompressor==0.14.*",),
    "gptqmodel": ("gptqmodel==7.6.0",),
    "trl": ("trl==1.16.*", "transformers==5.23.0", "accelerate>=1.10", "datasets>=4"),
    "modelopt": ("nvidia-modelopt==0.47.*", "transformers==5.23.0", "accelerate>=1.10", "requests"),
}
"""What each environment holds besides torch."""

READY = "ready"
"""A file in an environment whose installation ended well."""


def interpreter(folder: Path, name: str) -> Path | None:
    """An environment's Python, or None where it is not installed."""
    python = folder / name / "bin" / "python"
    return python if python.is_file() and (folder / name / READY).is_file() else None


def install(folder: Path, names: list[str], index: str = TORCH_INDEX) -> None:
    """Make the environments that are not there, one after another.

    Raises:
        SystemExit: pip failed; its last words are shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n", encoding="utf-8")
    extra = ["--extra-index-url", index] if index else []
    for name in names:
        if interpreter(folder, name):
            continue
        print(f"installing {name} in {folder / name}", file=sys.stderr)
        place = folder / name
        _call([sys.executable, "-m", "venv", str(place)])
        python = str(place / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        _call([*pip, *extra, "setuptools<81", "wheel", TORCH])  # first: some tools' builds look for it
        _call([*pip, *PACKAGES[name]])
        (place / READY).write_text("\n".join((TORCH, *PACKAGES[name])) + "\n", encoding="utf-8")


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
