"""Distil by nanokit and by its peers, side by side: tokens per CPU second, memory, and quality at equal time.

    python benchmarks/distillation.py --install --envs ENVS                       # once: the peers' environments
    python benchmarks/distillation.py --teacher stories260K --data tinystories.jsonl --envs ENVS --repeat 3 --write

Cases (choose with --cases):

- windows: a random Llama of 30 M, a student of 5 M, batches of 4 windows of 256 tokens without padding, float32.
- passes: the same, three passes over a text (three epochs are the default of TRL's trainer).
- stories: the same models, whole documents instead of windows: batches of 8, up to 1,024 tokens each, as TRL's trainer
  has them by default. Peers pad, as it does; nanokit packs.
- defaults: the same with three passes, which is that trainer's default too.
- vocabulary: a vocabulary of 131,072, small widths, batches of 2 windows.
- quality: TEACHER, a student of 130,000 parameters, everyone for the same CPU seconds on the same stories. nanokit's
  are of its whole stage: with the cut, from weights cut before, and from random ones. Peers, whose are of the
  training alone, get packed windows, the same peak learning rate and schedule, and the latter two starts. Scored by
  one process on stories that nobody saw.

Each tool runs in a process and an environment of its own, on one thread, one after another, in turns. CPU seconds
(user and system) are of the training alone, models in memory before it; the peak resident size is the process's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.distillation_note import CASES, LABELS, note  # noqa: E402
from benchmarks.environments import TORCH_INDEX, install, interpreter  # noqa: E402
from benchmarks.quantization import environment_of, machine  # noqa: E402
from nano.folder import write_text_atomically  # noqa: E402

TOOLS = {"plain": None, "trl": "trl", "modelopt": "modelopt", "nanokit": None}
"""Each tool's environment; None is the Python that runs this."""

RESULTS = HERE / "distillation.json"


@dataclass(frozen=True)
class Setting:
    """A case of throughput.

    Attributes:
        teacher, student: (D, F, layers, heads) of a random Llama.
        vocab: V.
        batch: sequences a step.
        passes: over the text.
        title: what the note says.
        steps: all of them, of windows; 0 for whole documents.
        length: T.
        documents: how many, of whole ones.
    """

    teacher: tuple[int, int, int, int]
    student: tuple[int, int, int, int]
    vocab: int
    batch: int
    passes: int
    title: str
    steps: int = 0
    length: int = 256
    documents: int = 0


SMALL = ((512, 1472, 9, 8), (256, 704, 6, 4), 512)
WINDOWS = "30 M to 5 M, V 512, batch 4 x 256, float32"
STORIES = "30 M to 5 M, V 512, batch 8 of whole stories up to 1,024 tokens, float32"
SETTINGS = {
    "windows": Setting(*SMALL, 4, passes=1, steps=6, title=f"{WINDOWS}, one pass"),
    "passes": Setting(*SMALL, 4, passes=3, steps=6, title=f"{WINDOWS}, three passes"),
    "stories": Setting(*SMALL, 8, passes=1, length=1024, documents=24, title=f"{STORIES}, one pass"),
    "defaults": Setting(*SMALL, 8, passes=3, length=1024, documents=24, title=f"{STORIES}, three passes"),
    "vocabulary": Setting((128, 384, 2, 2), (64, 192, 2, 2), 131_072, 2, passes=1, steps=3,
                          title="17 M to 8 M, V 131,072, batch 2 x 256, float32"),
}  # fmt: skip
LENGTH = 256


@dataclass(frozen=True)
class Place:
    """Where things lie.

    Attributes:
        work: a folder for what is made.
        envs: the peers' environments.
        teacher: a pretrained HF folder; its tokenizer is everyone's.
        data: documents.
    """

    work: Path
    envs: Path
    teacher: Path
    data: Path


def run_tool(place: Place, tool: str, script: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run a runner; its report, or None where it failed (its last words are shown)."""
    environment = TOOLS[tool]
    python = Path(sys.executable) if environment is None else interpreter(place.envs, environment)
    if python is None:
        print(f"{LABELS[tool]}: not installed", file=sys.stderr)
        return None
    report = place.work / "report.json"
    report.unlink(missing_ok=True)
    command = [str(python), str(HERE / "peers" / script), *arguments, "--report", str(report)]
    variables = environment_of(1)
    if environment is None:
        variables |= {"PYTHONPATH": str(HERE.parent), "NANOKIT_CACHE": str(place.work / "cache")}
    done = subprocess.run(command, env=variables, cwd=place.work, capture_output=True, text=True, check=False)
    if done.returncode or not report.is_file():
        print(f"{LABELS[tool]} failed:\n{(done.stdout + done.stderr)[-3000:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    rate = found["tokens"] / found["cpu_seconds"]
    print(f"{LABELS[tool]}: {rate:,.0f} tokens per CPU second, {found['peak_bytes'] / 1e6:,.0f} MB", file=sys.stderr)
    return found


def run_job(place: Place, tool: str, **job: Any) -> dict[str, Any] | None:
    """A job of `benchmarks/peers/distil_common.py`."""
    path = place.work / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return run_tool(place, tool, f"distil_with_{tool}.py", ["--job", str(path)])


def make_random(place: Place, name: str, dims: tuple[int, int, int, int], vocab: int, seed: int) -> Path:
    """A random Llama with the pretrained teacher's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nano.tokens import copy_tokenizer

    width, inner, layers, heads = dims
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    folder = place.work / name
    LlamaForCausalLM(config).save_pretrained(folder)
    copy_tokenizer(place.teacher, folder)
    return folder


def tokenised(place: Place, documents: Sequence[Any]) -> Any:
    """All documents' ids one behind another, each with the beginning id in front."""
    import numpy as np

    from nano.corpus import encode_document
    from nano.tokens import load_tokenizer

    tokenizer = load_tokenizer(place.teacher)
    return np.concatenate([np.concatenate(encode_document(text, tokenizer)) for text in documents]).astype(np.int32)


def write_windows(ids: Any, count: int, out: Path) -> Path:
    """The first `count` windows of LENGTH ids, as runners read them."""
    import numpy as np

    if len(ids) < count * LENGTH:
        raise SystemExit(f"the text holds {len(ids):,} tokens; {count * LENGTH:,} are needed")
    np.savez(out, ids=ids[: count * LENGTH], sizes=np.full(count, LENGTH))
    return out


def write_documents(place: Place, documents: Sequence[Any], length: int) -> Path:
    """Whole documents, cut off at `length` ids."""
    import numpy as np

    texts = [tokenised(place, [text])[:length] for text in documents]
    out = place.work / "text.npz"
    np.savez(out, ids=np.concatenate(texts), sizes=np.array([len(ids) for ids in texts]))
    return out


def measure_throughput(place: Place, case: str, repeat: int, tools: Sequence[str]) -> dict[str, Any]:
    """Tokens per CPU second and memory of each tool; medians, and of each turn the ratio to nanokit's."""
    from nano.corpus import read_documents

    setting = SETTINGS[case]
    teacher = make_random(place, "teacher", setting.teacher, setting.vocab, 0)
    student = make_random(place, "student", setting.student, setting.vocab, 1)
    if setting.documents:
        text = write_documents(place, read_documents([place.data])[: setting.documents], setting.length)
    else:
        ids = tokenised(place, read_documents([place.data])[:400])
        text = write_windows(ids, setting.steps * setting.batch // setting.passes, place.work / "text.npz")
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    for _ in range(repeat):
        for tool in tools:
            found = run_job(
                place, tool, teacher=str(teacher), student=str(student), text=str(text), steps=setting.steps,
                seconds=0, batch=setting.batch, length=setting.length, rate=1e-3,
                passes=setting.passes if setting.documents else 0,
            )  # fmt: skip
            if found:
                runs[tool].append({**found, "rate": found["tokens"] / found["cpu_seconds"]})
    return {"title": setting.title, "runs": {tool: found for tool, found in runs.items() if found}}


def split_stories(place: Place) -> tuple[Path, Any, Path]:
    """Nine tenths of the documents to train on (as a file, and as ids), the rest to measure on."""
    from nano.corpus import read_documents

    texts = read_documents([place.data])
    border = len(texts) * 9 // 10
    files = []
    for name, part in (("train", texts[:border]), ("held", texts[border:])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        files.append(place.work / f"{name}.jsonl")
        files[-1].write_text("".join(lines), encoding="utf-8")
    return files[0], tokenised(place, texts[:border]), files[1]


def measure_quality(
    place: Place, seconds: float, size: str, tools: Sequence[str], starts: Sequence[str]
) -> dict[str, Any]:
    """Everyone's student after the same CPU seconds."""
    from distill.options import DistillOptions
    from nano.shapes import ModelShape, read_config

    train, ids, held = split_stories(place)
    text = write_windows(ids, len(ids) // LENGTH, place.work / "text.npz")
    rows: list[dict[str, Any]] = []

    def stage(start: str, steps: int, name: str) -> dict[str, Any] | None:
        """`start` "cut" goes on from weights that were cut before, as peers do."""
        out = place.work / name
        shutil.rmtree(out, ignore_errors=True)
        student, begun = (str(place.work / "pruned"), "pruned") if start == "cut" else (size, start)
        given = ["--teacher", str(place.teacher), "--student", student, "--data", str(train), "--out", str(out)]
        return run_tool(place, "nanokit", "distil_stage_nanokit.py", [*given, "--start", begun, "--steps", str(steps)])

    stage("pruned", 0, "pruned")  # tokenises the text: nobody's time
    fixed = {start: stage(start, 0, start) for start in ("pruned", "random")} | {"cut": stage("cut", 0, "some")}
    some = stage("cut", 40, "some")
    for start, untrained in fixed.items():
        if not (untrained and some and fixed["cut"]):
            raise SystemExit("nanokit failed")
        step = (some["cpu_seconds"] - fixed["cut"]["cpu_seconds"]) / 40
        steps = max(1, round((seconds - untrained["cpu_seconds"]) / step))
        found = stage(start, steps, f"nanokit-{start}")
        rows.append({"tool": "nanokit", "start": start, "loss": "", **(found or {}), "folder": f"nanokit-{start}"})
    shape = ModelShape.from_hf(read_config(place.work / "pruned"))
    rate, batch = DistillOptions().peak_rate(shape.hidden_size), DistillOptions().batch
    others = [(tool, start, "kd") for tool in tools if tool in ("trl", "modelopt") for start in starts]
    for tool, start, loss in [*others, ("plain", "random", "ce")]:
        folder = f"{tool}-{start}-{loss}"
        found = run_job(
            place, tool, teacher=str(place.teacher), student=str(place.work / start), text=str(text), steps=0,
            seconds=seconds, batch=batch, length=LENGTH, rate=rate, loss=loss, save=str(place.work / folder),
        )  # fmt: skip
        if found:
            rows.append({"tool": tool, "start": start, "loss": loss, **found, "folder": folder})
    for row in rows:
        row.update(score(place, place.work / row.pop("folder"), held))
        print(json.dumps(row), file=sys.stderr, flush=True)
    title = f"{place.teacher.name} to {shape.num_parameters:,} parameters, {seconds:g} CPU seconds each"
    return {"title": title, "rate": rate, "rows": rows, "floor": {s: score(place, place.work / s, held) for s in ("pruned", "random")}}  # noqa: E501  # fmt: skip


def score(place: Place, student: Path, held: Path, tokens: int = 32768) -> dict[str, float]:
    """Held-out figures of a student, by nanokit's own comparison."""
    from distill.data import batches, pack
    from distill.teacher import open_teacher
    from nano.corpus import cut_windows, read_documents
    from nano.shapes import ModelShape, read_config
    from nano.tokens import load_tokenizer
    from nano.torch_lm import load_float

    import torch  # isort: skip

    shape = ModelShape.from_hf(read_config(place.teacher))
    windows = cut_windows(read_documents([held]), load_tokenizer(place.teacher), LENGTH)
    rows = pack(windows, LENGTH)
    count = min(len(rows), tokens // LENGTH)
    teacher = open_teacher(place.teacher, shape, "float32", "cpu")
    model = load_float(student, torch.float32).eval()
    texts = [batch for batch, _ in zip(batches(rows, 16), range(-(-count // 16)), strict=False)]
    found = teacher.compare(model, ModelShape.from_hf(read_config(student)), texts)
    return {
        "cross_entropy": found.ce / found.tokens, "kl": found.kl / found.tokens, "top1": found.same / found.tokens,
        "teacher_cross_entropy": found.teacher_ce / found.tokens, "held_out_tokens": found.tokens,
    }  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a pretrained HF folder; its tokenizer is everyone's")
    parser.add_argument("--data", type=Path, help="documents, such as stories in JSONL")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--envs", type=Path, default=Path(tempfile.gettempdir()) / "peers", help="environments' folder")
    parser.add_argument("--install", action="store_true", help="make the environments that are not there")
    parser.add_argument("--torch-index", default=TORCH_INDEX, help="where pip finds CPU-only torch; '' nowhere else")
    parser.add_argument("--repeat", type=int, default=1, help="turns of each case of throughput")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training in quality")
    parser.add_argument("--size", default="130k", help="of the student in quality")
    parser.add_argument(
        "--starts", nargs="+", choices=["pruned", "random"], default=["pruned", "random"], help="of peers in quality"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/distillation.json and .md")
    return parser


def main() -> None:
    """Install, run, print."""
    parser = arguments()
    given = parser.parse_args()
    if given.install:
        install(given.envs, sorted({env for tool in given.tools if (env := TOOLS[tool])}), given.torch_index)
    if given.teacher is None or given.data is None:
        if not given.install:
            parser.error("give --teacher DIR and --data FILE, or --install")
        return
    for path in (given.teacher / "config.json", given.data):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for case in given.cases:
        turns = 1 if case == "quality" else given.repeat
        command = " ".join(["python", "benchmarks/distillation.py", *sys.argv[1:]])
        facts = {"date": date.today().isoformat(), "machine": machine(), "repeat": turns, "command": command}
        with tempfile.TemporaryDirectory() as work:
            place = Place(Path(work), given.envs.resolve(), given.teacher.resolve(), given.data.resolve())
            if case == "quality":
                found = measure_quality(place, given.seconds, given.size, given.tools, given.starts)
            else:
                found = measure_throughput(place, case, given.repeat, given.tools)
        kept[case] = {**found, **facts}
        if given.write:
            write_text_atomically(RESULTS, json.dumps(kept, indent=1) + "\n")
        print(note({case: kept[case]}))
        if given.write:
            write_text_atomically(HERE / "distillation.md", note(kept))


if __name__ == "__main__":
    main()
