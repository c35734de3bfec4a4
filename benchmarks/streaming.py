"""What quantizing a full-size student takes: peak memory and time a layer, on random weights of the true shape.

    python benchmarks/streaming.py --data TEXT                                # nano-2, two layers of rtn and of gptq
    python benchmarks/streaming.py --data TEXT --method gptq --layers 36      # to the end
    python benchmarks/streaming.py --data TEXT --student nano-1 --write       # result into benchmarks/streaming.md

The student is written layer by layer (bfloat16, normal weights of width D^-0.5), with a small tokenizer: the model
never sees most of its vocabulary, but every matrix has its true size. `nanokit quantize` then runs as a process of its
own; its peak resident memory is read from /proc/PID/status (VmHWM: anonymous and mapped file pages together), its
layers' times from the files that its journal keeps. After `--layers` layers it is stopped, and the total is
extrapolated from the layers that were seen: all layers of a Nano shape have the same matrices.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from nano.folder import human_bytes, write_text_atomically  # noqa: E402
from nano.solve import canonical_config, canonical_shape  # noqa: E402

SAMPLE_SECONDS = 0.2


@dataclass(frozen=True)
class Streamed:
    """One method's run.

    Attributes:
        method: of nanokit quantize.
        parameters: of the student.
        layers, of_layers: how many were run, and how many there are.
        first_seconds: until the first layer was finished, with everything before it.
        layer_seconds: median of the layers after it; of all where there is one only.
        cpu_seconds: user + system, until the end or the stop.
        peak_bytes: VmHWM.
        anonymous_bytes: the largest RssAnon seen.
        total_seconds: measured where all layers ran, else first + (layers - 1) x layer_seconds.
    """

    method: str
    parameters: int
    layers: int
    of_layers: int
    first_seconds: float
    layer_seconds: float
    cpu_seconds: float
    peak_bytes: int
    anonymous_bytes: int
    total_seconds: float


def write_student(folder: Path, size: str, tokenizer: Path) -> None:
    """A random student of a canonical shape, bfloat16, one tensor in memory at a time."""
    import torch

    from nano.checkpoint import CheckpointWriter
    from nano.families import weight_shapes

    shape = canonical_shape(size)
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder) as writer:
        for name, dimensions in weight_shapes(shape).items():
            if len(dimensions) == 1:
                tensor = torch.zeros(dimensions)  # Gemma's norms are 1 + w
            else:
                tensor = torch.empty(dimensions, dtype=torch.bfloat16)
                tensor.normal_(0, dimensions[1] ** -0.5, generator=random)
            writer.add(name, tensor.bfloat16())
    (folder / "config.json").write_text(json.dumps(canonical_config(size)), encoding="utf-8")
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)


def run_method(student: Path, data: Path, out: Path, method: str, layers: int, extra: list[str]) -> Streamed:
    """Quantize until some layers are finished, watching the process."""
    shape = canonical_shape(student.name)
    work = out.with_name(out.name + ".work")
    command = [sys.executable, "-m", "nano", "quantize", str(student), "--data", str(data), "--out", str(out)]
    start, seen, peak, anonymous = time.monotonic(), list[float](), 0, 0
    with subprocess.Popen([*command, "--method", method, *extra], start_new_session=True) as process:
        try:
            while process.poll() is None:
                usage = memory_of(process.pid)
                peak, anonymous = max(peak, usage["VmHWM"]), max(anonymous, usage["RssAnon"])
                cpu = cpu_of(process.pid)
                finished = len(list(work.glob("layer-*.safetensors")))
                seen += [time.monotonic() - start] * (finished - len(seen))
                if len(seen) >= layers < shape.num_layers:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(SAMPLE_SECONDS)
        except BaseException:
            process.kill()
            raise
    total = time.monotonic() - start
    if len(seen) < layers and process.returncode:
        raise SystemExit(f"nanokit quantize --method {method} ended with {process.returncode}")
    gaps = [b - a for a, b in itertools.pairwise(seen)]
    each = statistics.median(gaps) if gaps else seen[0]
    whole = total if layers >= shape.num_layers else seen[0] + (shape.num_layers - 1) * each
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    return Streamed(
        method, shape.num_parameters, len(seen), shape.num_layers, seen[0], each, cpu, peak, anonymous, whole
    )


def memory_of(pid: int) -> dict[str, int]:
    """Bytes from /proc/PID/status; zeros once the process is gone."""
    found = {"VmHWM": 0, "RssAnon": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key in found:
                found[key] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return found
    return found


def cpu_of(pid: int) -> float:
    """User and system seconds of a process so far; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def table(rows: list[Streamed], arguments: argparse.Namespace) -> str:
    """The result as Markdown."""
    lines = [
        f"# Quantizing {arguments.student}, {date.today()}",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads; "
        f"{arguments.samples} windows of {arguments.length} tokens. Command: "
        f"`python benchmarks/streaming.py {' '.join(sys.argv[1:])}`.",
        "",
        "| method | layers run | first layer | each layer | whole model | CPU s | peak RSS | of it anonymous |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole = f"{row.total_seconds / 60:.1f} min" + ("" if row.layers == row.of_layers else " (extrapolated)")
        lines.append(
            f"| {row.method} | {row.layers} of {row.of_layers} | {row.first_seconds:.1f} s | {row.layer_seconds:.1f} s "
            f"| {whole} | {row.cpu_seconds:.0f} | {human_bytes(row.peak_bytes)} | {human_bytes(row.anonymous_bytes)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the student, run the methods, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="calibration text")
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder with a small tokenizer (default: nanokit's demo teacher)"
    )
    parser.add_argument("--student", default="nano-2", choices=("nano-1", "nano-2"))
    parser.add_argument("--method", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--layers", type=int, default=2, help="how many to run before the process is stopped")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where the student lies or is to be made (nano-2: 6.5 GB)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/streaming.md and .json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    tokenizer = arguments.tokenizer or HERE.parent / "nano" / "demo" / "teacher"
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.folder or Path(temporary)
        student = base / arguments.student
        if not student.exists():
            write_student(student, arguments.student, tokenizer)
        rows = []
        for method in arguments.method:
            extra = [] if method == "rtn" else [f"--samples={arguments.samples}", f"--length={arguments.length}"]
            rows.append(run_method(student, arguments.data, base / "out", method, arguments.layers, extra))
    text = table(rows, arguments)
    sys.stdout.write(text)
    if arguments.write:
        write_text_atomically(HERE / "streaming.md", text)
        write_text_atomically(HERE / "streaming.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
