"""Pulls that are interrupted, their rate beside curl's, memory, and `ls` on a large store: the figures of registry.md.

    python benchmarks/registry.py                 # all of it, about ten minutes; writes benchmarks/registry.md
    python benchmarks/registry.py --interrupted 5 --megabytes 50 --largest 200     # a quick look, printed alone

Everything goes through the real command (`python -m nano ...`) and a real registry (Debian's docker-registry). Bytes
are counted by the proxy in front of it, so those that were on their way when a pull was killed count too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from faulty_proxy import Fault, Proxy, faulty
from registry_server import serving

from export.store.artifact import MANIFEST, canonical_json, describe_bundle
from export.store.layout import Layout
from export.store.push import push_bundle
from export.store.reference import parse_reference
from nano.manifest import Manifest, write_manifest

MB = 1_000_000
HERE = Path(__file__).resolve().parent


def make_bundle(folder: Path, megabytes: int) -> Path:
    """A bundle of random bytes: one file of this size, and the small ones that every bundle has."""
    folder.mkdir(parents=True)
    with (folder / "model.pte").open("wb") as out:
        for _ in range(megabytes):
            out.write(os.urandom(MB))
    (folder / "tokenizer.json").write_bytes(os.urandom(MB // 4))
    write_manifest(folder, Manifest(kind="executorch", footprint={"context": 2048}))
    return folder


def command(*arguments: object, **more: Any) -> subprocess.Popen[bytes]:
    """`nanokit ARGUMENTS` in a process of its own."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "NANOKIT_STORE": "/nonexistent"}
    return subprocess.Popen([sys.executable, "-m", "nano", *map(str, arguments)], env=environment, **{**quiet, **more})


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    return subprocess.run(["diff", "-r", one, other], capture_output=True, check=False).returncode == 0


def interrupted(proxy: Proxy, bundle: Path, work: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Pulls interrupted at random bytes, by turns killed with SIGKILL and cut off by the network; then once more."""
    size = sum(path.stat().st_size for path in bundle.iterdir())
    chance, rows = random.Random(seed), []
    for number in range(count):
        out = work / f"out{number}"
        at = chance.randrange(size)
        killed = number % 2 == 0
        proxy.blob_bytes, started = 0, time.monotonic()
        proxy.faults[:] = [] if killed else [Fault("sha256:", cut=at, times=1)]
        first = command("pull", f"{proxy.host}/team/big:1", "--out", out)
        while killed and first.poll() is None and proxy.blob_bytes < at:
            time.sleep(0.002)
        if killed and first.poll() is None:
            first.send_signal(signal.SIGKILL)
        first.wait()
        half = out.exists()
        kept = sum(p.stat().st_size for p in out.with_name(out.name + ".partial").glob("*")) if not half else size
        again = command("pull", f"{proxy.host}/team/big:1", "--out", out).wait()
        good = again == 0 and same(bundle, out)
        rows.append({"how": "SIGKILL" if killed else "network", "at": at / size, "kept": kept / size, "ok": good,
                     "ratio": proxy.blob_bytes / size, "seconds": time.monotonic() - started})  # fmt: skip
        shutil.rmtree(out)
        print(f"{number + 1}/{count}  {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def rates(host: str, bundle: Path, work: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds for the same blob, by turns: curl, a pull of that file after imports, and the whole command."""
    artifact, _ = describe_bundle(bundle)
    digest = next(file.blob.digest for file in artifact.files if file.path == "model.pte")
    script = (
        "import sys, time; from pathlib import Path; from export.store.pull import *; "
        "from export.store.reference import parse_reference; import oras.provider, export.store.registry\n"
        "start = time.perf_counter()\n"
        "pull_artifact(parse_reference(sys.argv[1]), Path(sys.argv[2]), PullOptions(files=('model.pte',)))\n"
        "print(time.perf_counter() - start)"
    )
    url, reference, out = f"http://{host}/v2/team/big/blobs/{digest}", f"{host}/team/big:1", work / "pulled"
    found: dict[str, list[float]] = {"curl": [], "pull": [], "whole command": []}
    for _ in range(repeats):
        curl = ["curl", "-sS", "-o", work / "curl", "-w", "%{time_total}", url]
        found["curl"].append(float(subprocess.run(curl, capture_output=True, check=True).stdout))
        ours = [sys.executable, "-c", script, reference, str(out)]
        done = subprocess.run(
            ours, capture_output=True, check=True, env={**os.environ, "NANOKIT_STORE": "/nonexistent"}
        )
        found["pull"].append(float(done.stdout))
        shutil.rmtree(out)
        started = time.perf_counter()
        assert command("pull", reference, "--out", out, "--file", "model.pte").wait() == 0
        found["whole command"].append(time.perf_counter() - started)
        shutil.rmtree(out)
    return found


def used(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """The most memory (RSS, bytes) and the processor time (user and system, seconds) that a command took."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, process.args
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def processor(host: str, bundle: Path, work: Path, repeats: int) -> dict[str, float]:
    """Median processor seconds of each step: what is left of the comparison on a machine that others use too."""
    artifact, _ = describe_bundle(bundle)
    digest = next(file.blob.digest for file in artifact.files if file.path == "model.pte")
    reference, out = f"{host}/team/big:1", work / "pulled"
    curl = ["curl", "-sS", "-o", str(work / "curl"), f"http://{host}/v2/team/big/blobs/{digest}"]
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        found.setdefault("curl", []).append(used(subprocess.Popen(curl))[1])
        pull = command("pull", reference, "--out", out, "--file", "model.pte")
        found.setdefault("nanokit pull", []).append(used(pull)[1])
        shutil.rmtree(out)
        found.setdefault("nanokit inspect: the same without the file", []).append(
            used(command("inspect", reference))[1]
        )
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def memory(host: str, work: Path, sizes: list[int]) -> list[tuple[int, int, int]]:
    """Peak RSS of push and pull, for bundles of several sizes."""
    rows = []
    for megabytes in sizes:
        bundle, out = make_bundle(work / f"size{megabytes}", megabytes), work / "sized"
        reference = f"{host}/team/size{megabytes}:1"
        rows.append(
            (megabytes, used(command("push", bundle, reference))[0], used(command("pull", reference, "--out", out))[0])
        )
        shutil.rmtree(bundle)
        shutil.rmtree(out)
    return rows


def fill(store: Path, bundle: Path, count: int) -> None:
    """A layout folder of this many artifacts: real manifests, each another one."""
    push_bundle(bundle, parse_reference(f"oci:{store}:team/nano:0"))
    layout = Layout(store)
    artifact, _ = describe_bundle(bundle)
    document = json.loads(artifact.payload)
    raw = []
    for number in range(count):
        document["annotations"]["io.github.nanokit.student"] = f"student-{number}"
        payload = canonical_json(document)
        layout.put_manifest(f"team/nano-{number % 20}", payload, MANIFEST, f"1.{number}")
        raw.append(payload)


def list_seconds(store: Path) -> list[tuple[float, float]]:
    """Seconds of `nanokit ls` on it, and its processor seconds; the interpreter's start included."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        _, processor_seconds = used(command("ls", "--store", store))
        found.append((time.perf_counter() - started, processor_seconds))
    return found


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder for all of it, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="nanokit-registry-") as folder:
        yield Path(folder)


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows, megabytes, timed = figures["interrupted"], figures["megabytes"], figures["seconds"]
    lines = [
        "# Push and pull, measured", "",
        f"`python benchmarks/registry.py`; docker-registry {_version()} on loopback, {os.cpu_count()} cores, load",
        f"average {figures['load'][0]:.1f} at the start and {figures['load'][1]:.1f} at the end: others used them.", "",
        f"## {len(rows)} pulls of {megabytes} MB, each interrupted at a random byte", "",
        "| interrupted by | pulls | whole after one retry | bytes moved in all, median | worst |",
        "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for how in ("SIGKILL", "network"):
        mine = [row for row in rows if row["how"] == how]
        ratios = [row["ratio"] for row in mine]
        good = sum(row["ok"] for row in mine)
        if mine:
            lines.append(f"| {how} | {len(mine)} | {good} | {statistics.median(ratios):.3f} | {max(ratios):.3f} |")
    lines += ["", "Bytes as a share of the bundle's, counted by a proxy in front of the registry.", "",
              f"## One {megabytes} MB file", "", "| | median | best |", "|---|--:|--:|"]  # fmt: skip
    for name, seconds in timed.items():
        median, best = megabytes / statistics.median(seconds), megabytes / min(seconds)
        lines.append(f"| {name} | {median:.0f} MB/s | {best:.0f} MB/s |")
    medians = statistics.median(timed["curl"]) / statistics.median(timed["pull"])
    best = min(timed["curl"]) / min(timed["pull"])
    lines += ["", f"pull / curl: {medians:.2f} of the medians, {best:.2f} of the best. A pull checks sha256, curl does",
              "not; the whole command has Python's start in it.", "",
              "| | processor seconds |", "|---|--:|"]  # fmt: skip
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in figures["processor"].items()]
    lines += ["", "## Peak memory (RSS)", "", "| bundle | push | pull |", "|--:|--:|--:|"]
    lines += [f"| {size:,} MB | {up / MB:.0f} MB | {down / MB:.0f} MB |" for size, up, down in figures["memory"]]
    elapsed, busy = (statistics.median(column) for column in zip(*figures["ls"], strict=True))
    lines += ["", f"## `nanokit ls` on {figures['artifacts']:,} artifacts", "",
              f"{elapsed:.2f} s, {busy:.2f} s of them processor time; Python's start included.", ""]  # fmt: skip
    return "\n".join(lines)


def _version() -> str:
    from registry_server import find_registry

    return subprocess.run([find_registry(), "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


def main() -> None:
    """Measure, print, and write registry.md where nothing was shortened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupted", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--largest", type=int, default=2000)
    parser.add_argument("--artifacts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with workplace() as work, serving(work / "registry") as host:
        bundle = make_bundle(work / "bundle", arguments.megabytes)
        push_bundle(bundle, parse_reference(f"{host}/team/big:1"))
        figures: dict[str, Any] = {"megabytes": arguments.megabytes, "artifacts": arguments.artifacts}
        figures["seconds"] = rates(host, bundle, work, 7)
        figures["processor"] = processor(host, bundle, work, 3)
        figures["memory"] = memory(host, work, sorted({20, arguments.megabytes, arguments.largest}))
        fill(work / "store", make_bundle(work / "small", 1), arguments.artifacts)
        figures["ls"] = list_seconds(work / "store")
        with faulty(host) as proxy:
            figures["interrupted"] = interrupted(proxy, bundle, work, arguments.interrupted, arguments.seed)
    text = report({**figures, "load": (load, os.getloadavg()[0])})
    print(text)
    if (arguments.interrupted, arguments.megabytes, arguments.largest, arguments.artifacts) == (50, 200, 2000, 1000):
        (HERE / "registry.md").write_text(text)


if __name__ == "__main__":
    main()
