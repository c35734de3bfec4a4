"""Our bundles beside other runtimes' and exporters' artifacts of the same int4 folder: speed and memory.

    python benchmarks/runtimes.py INT4 --work DIR --threads 1
    python benchmarks/runtimes.py INT4 --work DIR --runtime executorch --runtime llama.cpp --write

A row of `RUNTIMES` makes its artifact in the work folder, where it is found again, and names the loader that
`export.bench_worker` measures, in a process of its own for each repeat: prompt, greedy decoding, memory over what was
resident before loading. Rows take turns, so that other work on the machine meets all of them.

- executorch: `nanokit export --format executorch`.
- onnx: `nanokit export --format onnx` in a plain session; onnx in genai: the same bundle in onnxruntime-genai.
- genai builder: onnxruntime-genai's own exporter (benchmarks/runtimes_genai.py), run by onnxruntime-genai.
- llama.cpp: a GGUF with the very same codes as Q4_0 (benchmarks/runtimes_gguf.py), run by llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from export.bench import Spread, machine, summarise  # noqa: E402
from nano.folder import human_bytes, write_text_atomically  # noqa: E402
from nano.shapes import ModelShape, read_config  # noqa: E402

CONTEXT, CHUNK = 2048, 128
REPORT = HERE / "runtimes.md"
LLAMA_PYTHON = Path(os.environ.get("LLAMA_PYTHON", sys.executable))
"""An interpreter that has llama-cpp-python and numpy; nothing else is imported there."""


@dataclass(frozen=True)
class Runtime:
    """One row.

    Attributes:
        make: (int4 folder, where to write, a folder): the artifact.
        loader: "module:function" for `export.bench_worker`.
        python: the interpreter that has the runtime.
    """

    make: Callable[[Path, Path], None]
    loader: str
    python: Path = Path(sys.executable)


def make_bundle(format: str) -> Callable[[Path, Path], None]:
    """Our exporter."""

    def make(int4: Path, out: Path) -> None:
        from export.options import ExportOptions
        from export.run import run_export

        run_export(int4, format, out, ExportOptions(context=CONTEXT, chunk=CHUNK))  # type: ignore[arg-type]

    return make


def make_genai(int4: Path, out: Path) -> None:
    """What onnxruntime-genai's own builder makes of the same weights."""
    from runtimes_genai import build

    build(int4, out)


def make_gguf(int4: Path, out: Path) -> None:
    """A GGUF of the same codes."""
    from runtimes_gguf import write_gguf

    out.mkdir()
    write_gguf(int4, out / "model.gguf")


RUNTIMES = {
    "onnx": Runtime(make_bundle("onnx"), "export.bench:prepare_onnx"),
    "onnx in genai": Runtime(make_bundle("onnx"), "runtimes_genai:prepare"),
    "genai builder": Runtime(make_genai, "runtimes_genai:prepare"),
    "executorch": Runtime(make_bundle("executorch"), "export.bench:prepare_executorch"),
    "llama.cpp": Runtime(make_gguf, "runtimes_gguf:prepare", LLAMA_PYTHON),
}


def main() -> None:
    """Make what is missing, measure in turns, print and, with --write, keep the table."""
    given = _arguments()
    shape = ModelShape.from_hf(read_config(given.int4))
    names = given.runtime or list(RUNTIMES)
    given.work.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        if not (given.work / name).exists():
            print(f"making {name}", file=sys.stderr, flush=True)
            RUNTIMES[name].make(given.int4, given.work / name)
    for _ in range(given.repeats):
        for name in names:
            runs[name].append(measure(name, given, shape.vocab_size))
            print(name, json.dumps(runs[name][-1]), file=sys.stderr, flush=True)
    lines = table(runs, given, shape)
    print("\n".join(lines))
    if given.write:
        kept = REPORT.read_text(encoding="utf-8") if REPORT.exists() else _HEADER
        write_text_atomically(REPORT, kept.rstrip() + "\n\n" + "\n".join(lines) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("int4", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where artifacts are made and found again")
    parser.add_argument("--runtime", action="append", choices=list(RUNTIMES), help="rows; all where left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=CHUNK)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--label", default="", help="what the table is called")
    parser.add_argument("--write", action="store_true", help=f"append the table to {REPORT.name}")
    return parser.parse_args()


def measure(name: str, given: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """One run in a process of its own."""
    row = RUNTIMES[name]
    request = {"task": "run", "loader": row.loader, "folder": str(given.work / name), "threads": given.threads,
               "prompt": given.prompt, "decode": given.decode, "vocabulary": vocabulary}  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": str(given.threads),
                   "NANOKIT_THREADS": str(given.threads)}  # fmt: skip
    command = [str(row.python), "-m", "export.bench_worker", json.dumps(request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(runs: dict[str, list[dict[str, Any]]], given: argparse.Namespace, shape: ModelShape) -> list[str]:
    """The table's lines: medians over the repeats, and the best decoding."""
    label = given.label or f"{shape.family}, {shape.num_parameters / 1e9:.2f} B parameters"
    lines = [
        f"## {label}: {date.today().isoformat()}",
        "",
        f"{machine()}; {given.threads} thread(s), prompt {given.prompt}, {given.decode} tokens decoded, medians of "
        f"{given.repeats} processes. Memory is over what was resident before loading.",
        "",
        "| runtime | prefill tokens/s | decode tokens/s | best | CPU s a token | load s | file | after load | peak |"
        " clean | dirty |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        one = summarise(found, given.prompt)
        size = sum(path.stat().st_size for path in (given.work / name).glob("model.*"))
        memory = [_bytes(one[key], size) for key in ("loaded", "peak", "clean", "dirty")]
        speed = f"{one['prefill'].median:.1f} | {one['decoding'].median:.2f} | {one['decoding'].most:.2f}"
        rest = [f"{one['cpu_token'].median:.3f}", f"{one['load'].median:.1f}", human_bytes(size), *memory]
        lines.append(f"| {name} | {speed} | " + " | ".join(rest) + " |")
    return lines


def _bytes(spread: Spread | None, size: int) -> str:
    return "" if spread is None else f"{human_bytes(int(spread.median))} ({spread.median / size:.2f})"


_HEADER = """# Runtimes side by side

Made by `benchmarks/runtimes.py`: artifacts of one int4 folder of random weights, each repeat in a process of its own.
In brackets: as a share of the file."""


if __name__ == "__main__":
    main()
