"""Quantize one model by nanokit and by its peers, side by side, and print one table.

    python benchmarks/quantization.py --install --envs ENVS                       # once: the peers' environments
    python benchmarks/quantization.py MODEL --calibration TEXT --held-out stories=TEXT --held-out wiki=TEXT \\
        --ours rtn gptq best recover --envs ENVS --repeat 3 --write

Scope, the same for all: every decoder linear, symmetric int4, group 32, embedding and head in float. The float model
is widened first (zero neurons, exact) where 32 does not divide its feed-forward width, and everyone gets that model.
Each tool runs in a process and an environment of its own, one after another; what it made is dequantised to float32
and all are scored by one process (benchmarks/scorer.py). Peers draw on the same calibration windows: random, each
with the beginning id in front; nanokit draws its own from the same text.

CPU seconds are user + system. "call" is from a float folder on disk to the tool's finished result; "process" adds
the imports. Peak RSS is the process's until then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, get_args

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.environments import TORCH_INDEX, install, interpreter  # noqa: E402
from benchmarks.scorer import named_file  # noqa: E402
from nano.folder import write_text_atomically  # noqa: E402
from quantize.options import Method  # noqa: E402

GROUP = 32
WINDOWS, LENGTH = 800, 256
"""Windows drawn for the peers: 128 for those that calibrate, 8 for each training step of torchao's."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: what selects it.
        label: what the table says.
        script: its runner in benchmarks/peers.
        arguments: the runner's own arguments.
        environment: a key of `environments.PACKAGES`, or None for the Python that runs this.
    """

    name: str
    label: str
    script: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None


PEERS = (
    Entry("absmax", "round-to-nearest, absmax", "with_absmax.py"),
    Entry("gptqmodel-gptq", "gptqmodel GPTQ + MSE", "with_gptqmodel.py", ("--method", "gptq"), "gptqmodel"),
    Entry("gptqmodel-gptaq", "gptqmodel GPTAQ + MSE", "with_gptqmodel.py", ("--method", "gptaq"), "gptqmodel"),
    Entry("llm-compressor", "llm-compressor AWQ + GPTQ, MSE scales", "with_llmcompressor.py", (), "llm-compressor"),
    Entry("torchao-qat", "torchao QAT, 100 steps", "with_torchao.py", ("--steps", "100"), "torchao"),
    Entry("auto-round-200", "auto-round, 200 iterations", "with_autoround.py", ("--iterations", "200"), "auto-round"),
)
LONG = Entry(
    "auto-round-1000", "auto-round, 1,000 iterations", "with_autoround.py", ("--iterations", "1000"), "auto-round"
)


@dataclass
class Row:
    """A method and what came of it.

    Attributes:
        method: what ran.
        status: "" where all went well, else why there are no figures.
        reports: what the runner measured, one a repeat.
        digests: sha256 of the dequantised weights, one a repeat.
        quality: the scorer's answer.
    """

    method: Entry
    status: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=dict)

    def median(self, figure: str) -> float:
        """The median over repeats of a figure of the report."""
        return statistics.median(report[figure] for report in self.reports)


def our_method(text: str, calibration: Path) -> Entry:
    """A row of ours: "best", or "best:steps=150,seed=1" with options of nanokit quantize changed."""
    name, _, changes = text.partition(":")
    data = () if name == "rtn" else ("--data", str(calibration))
    settings = ("--set", *changes.split(",")) if changes else ()
    label = f"nanokit {name}" + (f" ({changes.replace(',', ', ')})" if changes else "")
    return Entry(text, label, "with_nanokit.py", ("--method", name, *data, *settings))


def write_float(model: Path, out: Path) -> None:
    """The float model that everyone gets: one float32 folder, its feed-forward width a multiple of the group."""
    from nano.checkpoint import CheckpointWriter
    from nano.families import weight_shapes
    from nano.tokens import copy_tokenizer
    from quantize.student import Student

    out.mkdir(parents=True)
    with Student(model, GROUP) as student:
        with CheckpointWriter(out) as writer:
            for name in weight_shapes(student.shape):
                writer.add(name, student.tensor(name).float())
        config = {**student.config, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(model, out)


def draw_windows(model: Path, text: Path, count: int, length: int, seed: int = 0) -> Any:
    """Windows (count, length) of token ids from random places of a text, the beginning id first."""
    import torch

    from nano.corpus import read_documents
    from nano.tokens import load_tokenizer

    tokenizer = load_tokenizer(model)
    ids = torch.tensor(tokenizer.encode("\n".join(read_documents([text]))))
    if len(ids) <= length:
        raise SystemExit(f"{text} holds {len(ids)} tokens; one window needs {length}")
    starts = torch.randint(0, len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    head = torch.tensor([1 if tokenizer.bos_id is None else tokenizer.bos_id])
    return torch.stack([torch.cat([head, ids[start : start + length - 1]]) for start in starts]).numpy()


def environment_of(threads: int) -> dict[str, str]:
    """Environment variables of every run: this many threads, that sleep when they wait; no network, no GPU."""
    counted = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {
        **os.environ, **counted, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip


def run(row: Row, work: Path, envs: Path, threads: int) -> None:
    """Run a row's method once more; figures and failures go into the row."""
    method = row.method
    python = Path(sys.executable) if method.environment is None else interpreter(envs, method.environment)
    if python is None:
        row.status = "not installed"
        return
    name = method.name.translate(str.maketrans(":=,", "---"))
    out, report, log = work / name, work / f"{name}.json", work / f"{name}.log"
    shutil.rmtree(out, ignore_errors=True)
    report.unlink(missing_ok=True)
    command = [
        str(python), str(HERE / "peers" / method.script), "--model", str(work / "float"), "--windows",
        str(work / "windows.npy"), "--out", str(out), "--report", str(report), "--threads", str(threads),
        *method.arguments,
    ]  # fmt: skip
    variables = environment_of(threads)
    if method.environment is None:
        variables["PYTHONPATH"] = str(HERE.parent)
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, env=variables, cwd=work, stdout=stream, stderr=stream, check=False)
    if done.returncode or not (out / "model.safetensors").is_file():
        words = log.read_text(encoding="utf-8", errors="replace").strip() or "no output"
        print(f"{method.label} failed:\n{words[-2000:]}", file=sys.stderr)
        row.status = f"failed: {words.splitlines()[-1][:160]}"
        return
    row.reports.append(json.loads(report.read_text(encoding="utf-8")))
    row.digests.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    row.quality = {"folder": str(out)}


def score_all(rows: Sequence[Row], work: Path, texts: Mapping[str, Path], tokens: int, threads: int) -> None:
    """One process scores every folder; its answers go into the rows."""
    folders = [row.quality["folder"] for row in rows if row.quality]
    if not folders:
        return
    named = [word for name, path in texts.items() for word in ("--text", f"{name}={path.resolve()}")]
    command = [
        sys.executable, str(HERE / "scorer.py"), "--reference", str(work / "float"), *named, "--tokens", str(tokens),
        "--length", str(LENGTH), "--threads", str(threads), "--json", str(work / "scores.json"), *folders,
    ]  # fmt: skip
    variables = {**environment_of(threads), "PYTHONPATH": str(HERE.parent)}
    subprocess.run(command, env=variables, check=True)
    found = json.loads((work / "scores.json").read_text(encoding="utf-8"))
    for row in rows:
        if row.quality:
            row.quality.update(found[row.quality["folder"]])


def table(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """The results as a Markdown table, aligned for a terminal too."""
    figures = [f"{text} {figure}" for text in texts for figure in ("KL", "perplexity", "top-1")]
    costs = ["CPU s, call", "CPU s, process", "wall s, call", "peak RSS MB", "text tokens", "besides linears"]
    cells = [["method", *figures, *costs], *([row.method.label, *_cells(row, texts)] for row in rows)]
    widths = [max(len(line[i]) for line in cells if i < len(line)) for i in range(len(cells[0]))]

    def joined(line: Sequence[str]) -> str:
        padded = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([joined(cells[0]), rule, *map(joined, cells[1:])])


def _cells(row: Row, texts: Sequence[str]) -> list[str]:
    if row.status:
        return [row.status.split(":")[0], *[""] * (3 * len(texts) + 5)]
    found = []
    for text in texts:
        score = row.quality["scores"][text]
        found += [f"{score['kl']:.4f}", f"{score['perplexity']:.3f}", f"{score['top1']:.2%}"]
    times = [f"{row.median(figure):.1f}" for figure in ("call_cpu", "process_cpu", "call_wall")]
    memory, tokens = f"{row.median('peak_bytes') / 1e6:,.0f}", f"{row.reports[0]['tokens']:,}"
    return [*found, *times, memory, tokens, ", ".join(row.quality["also_changed"]) or "nothing"]


def notes(rows: Sequence[Row], texts: Sequence[str]) -> list[str]:
    """What the table cannot hold: float perplexity, scope, scales, repeats, failures."""
    done = [row for row in rows if not row.status]
    lines = []
    for text in texts:
        if done:
            score = done[0].quality["scores"][text]
            lines.append(f"{text}: {score['tokens']:,} tokens, float perplexity {score['reference_perplexity']:.3f}")
    for row in done:
        quality, label = row.quality, row.method.label
        if quality["linears_changed"] != quality["linears"] or quality["levels"] > 16:
            changed = f"{quality['linears_changed']} of {quality['linears']} linears changed"
            lines.append(f"NOT THE SAME SCOPE: {label}: {changed}, up to {quality['levels']} levels in a group")
        if row.reports[0].get("bf16_scales") is False:
            lines.append(f"{label}: SCALES ARE NOT EXACT bfloat16")
        if len(set(row.digests)) > 1:
            lines.append(f"{label}: {len(set(row.digests))} different results in {len(row.digests)} runs")
    ours = [row.method.label for row in done if row.reports[0].get("bf16_scales")]
    if ours:
        lines.append(f"every scale is exactly a bfloat16: {', '.join(ours)}; peers keep float scales")
    return [*lines, *(f"{row.method.label}: {row.status}" for row in rows if row.status)]


def machine() -> dict[str, Any]:
    """Where this ran."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = round(os.getloadavg()[0], 1)
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9), "system": platform.platform(), "load": load}  # noqa: E501  # fmt: skip


def write_results(rows: Sequence[Row], texts: Sequence[str], facts: dict[str, Any]) -> None:
    """benchmarks/quantization.json and .md: figures, date, machine, versions, command."""
    kept = [{**asdict(row), "quality": {k: v for k, v in row.quality.items() if k != "folder"}} for row in rows]
    whole = json.dumps({**facts, "rows": kept}, indent=2) + "\n"
    write_text_atomically(HERE / "quantization.json", whole)
    where, reports = facts["machine"], [row.reports[0] for row in rows if row.reports]
    versions = sorted({report["tool"] for report in reports} | {f"torch {report['torch']}" for report in reports})
    lines = [
        "# Int4 by nanokit and by its peers",
        "",
        f"{facts['date']}, {where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB, load {where['load']} "
        f"at the start; {facts['threads']} thread(s), medians of {facts['repeat']} run(s).",
        "",
        table(rows, texts),
        "",
        *(f"- {line}" for line in notes(rows, texts)),
        f"- {', '.join(versions)}; Python {platform.python_version()}",
        "",
        "```",
        facts["command"],
        "```",
        "",
    ]
    write_text_atomically(HERE / "quantization.md", "\n".join(lines))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a float HF folder")
    parser.add_argument("--calibration", type=Path, help="text or JSONL")
    parser.add_argument("--held-out", type=named_file, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--ours", nargs="*", default=["rtn", "gptq", "best"], metavar="METHOD[:OPTION=VALUE,...]")
    parser.add_argument("--peers", nargs="*", choices=[p.name for p in (*PEERS, LONG)], default=[p.name for p in PEERS])
    parser.add_argument("--long", action="store_true", help="auto-round with 1,000 iterations too")
    parser.add_argument("--envs", type=Path, default=Path(tempfile.gettempdir()) / "peers", help="environments' folder")
    parser.add_argument(
        "--install", action="store_true", help="make the environments that --peers need and are not there"
    )
    parser.add_argument(
        "--torch-index", default=TORCH_INDEX, help="where pip finds CPU-only torch; '' for nowhere else"
    )
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens of each text, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; time and memory are medians")
    parser.add_argument("--work", type=Path, help="keep results and logs in this folder, which must not exist")
    parser.add_argument("--write", action="store_true", help="write benchmarks/quantization.json and .md")
    return parser


def check(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what cannot work before anything runs."""
    if not (given.calibration and given.held_out):
        parser.error("a model needs --calibration FILE and --held-out NAME=FILE")
    for path in (given.model / "config.json", given.calibration, *(path for _, path in given.held_out)):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    known = get_args(Method)
    if unknown := [text for text in given.ours if text.partition(":")[0] not in known]:
        parser.error(f"nanokit has no method '{unknown[0]}'; it has {', '.join(known)}")
    if given.work and given.work.exists():
        parser.error(f"{given.work} exists already")


def main() -> None:
    """Install, run, score, print."""
    parser = arguments()
    given = parser.parse_args()
    chosen = [p for p in (*PEERS, LONG) if p.name in given.peers or (given.long and p is LONG)]
    if given.install:
        install(given.envs, sorted({p.environment for p in chosen if p.environment}), given.torch_index)
    if given.model is None:
        if not given.install:
            parser.error("name a model, or --install")
        return
    check(given, parser)
    texts = dict(given.held_out)
    rows = [Row(m) for m in (*chosen, *(our_method(text, given.calibration.resolve()) for text in given.ours))]
    facts = {"date": date.today().isoformat(), "machine": machine(), "threads": given.threads, "repeat": given.repeat,
             "command": " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work.resolve() if given.work else Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        write_float(given.model, work / "float")
        import numpy as np

        np.save(work / "windows.npy", draw_windows(work / "float", given.calibration, WINDOWS, LENGTH))
        for turn in range(given.repeat):
            for row in rows:
                if not row.status:
                    print(f"run {turn + 1} of {given.repeat}: {row.method.label}", file=sys.stderr, flush=True)
                    run(row, work, given.envs.resolve(), given.threads)
        for row in rows:
            row.quality = {} if row.status else row.quality
        score_all(rows, work, texts, given.tokens, given.threads)
    print(table(rows, list(texts)))
    print("\n".join(notes(rows, list(texts))))
    if given.write:
        write_results(rows, list(texts), facts)


if __name__ == "__main__":
    main()
