"""The bench: what its figures are made of, a real run of each runtime, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_profiles.check import bundle_facts
from export.bench import as_dict, bytes_a_token, measure, rows, run_bench, summarise
from export.bench_worker import read
from export.options import ExportOptions
from export.run import run_export
from nano.errors import BadFileError, RequestError, WorkError
from nano.manifest import read_manifest


@pytest.fixture(scope="module")
def bundle(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """`bundle(format, family)`: made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(format: Any, family: str) -> Path:
        pytest.importorskip("onnxruntime" if format == "onnx" else "executorch")
        if (format, family) not in made:
            out = tmp_path_factory.mktemp("bench") / "bundle"
            run_export(
                int4_folder(tiny_model(family), embedding=True), format, out, ExportOptions(context=128, chunk=8)
            )
            made[format, family] = out
        return made[format, family]

    return make


def test_medians_and_memory_are_told_from_the_runs() -> None:
    def run(seconds: float, load_rss: int) -> dict[str, Any]:
        phases = {
            "load": {"rss": load_rss, "clean": 7, "dirty": load_rss - 7},
            "prefill": {"rss": 500, "clean": 100, "dirty": 400},
            "decode": {"rss": 450, "clean": 50, "dirty": 400},
        }
        return {"load_seconds": 1.0, "prefill_seconds": 2.0, "decode_seconds": [seconds, 3 * seconds],
                "decode_cpu_seconds": 8 * seconds, "baseline": 10, "peak": 600, "phases": phases}  # fmt: skip

    found = summarise([run(0.5, 300), run(0.25, 200), run(1.0, 100)], prompt=64)
    assert found["prefill"].median == 32
    assert (found["decoding"].least, found["decoding"].median, found["decoding"].most) == (0.5, 1, 2)
    assert found["cpu_token"].median == 2
    assert (found["loaded"].median, found["peak"].median, found["baseline"].median) == (200, 600, 10)
    assert (found["clean"].median, found["dirty"].median) == (100, 400)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_bytes_a_token_are_those_of_the_files_weights_and_the_filled_cache(
    family: str, bundle: Callable[[str, str], Path]
) -> None:
    folder = bundle("onnx", family)
    manifest, position = read_manifest(folder), 40
    facts = bundle_facts(folder)
    linear = {"llama": 2 * (12288 + 18432), "gemma3_text": 2 * (64 * 128 * 2 + 64 * 64 * 2 + 18432)}[family]
    grid = linear + 320 * 64  # the tied head
    norms = {"llama": 5 * 64, "gemma3_text": 9 * 64 + 2 * 2 * 32}[family]
    seen = {"llama": 40 + 40, "gemma3_text": 16 + 40}[family]
    width = {"llama": 16, "gemma3_text": 32}[family]
    expected = grid // 2 + 4 * grid // 32 + 4 * norms + seen * 2 * 2 * width * 4
    assert bytes_a_token(facts, manifest.footprint, position) == expected


@pytest.mark.parametrize("format", ["onnx", "executorch"])
def test_a_real_run(format: str, bundle: Callable[[str, str], Path], nanokit: Callable[..., Any]) -> None:
    folder = bundle(format, "llama")
    before = read_manifest(folder)
    ran = nanokit("bench", folder, "--threads", "1", "--context", "20", "--decode", "3", "--repeat", "1", "--json",
                  "--record")  # fmt: skip
    assert ran.status == 0, ran.stderr
    found = ran.json()
    assert (found["threads"], found["prompt"], found["decode"], found["repeat"]) == (1, 20, 3, 1)
    assert found["prefill"]["median"] == pytest.approx(20 / found["first_token"]["median"])
    limit = found["decoding"]["median"] * found["token_bytes"] / found["read_rate"]["most"]
    assert found["limit_fraction"]["median"] == pytest.approx(limit)
    assert 0 < found["loaded"]["median"] <= found["peak"]["median"] < 200 << 20
    after = read_manifest(folder)
    assert after.results["bench"] == {key: value for key, value in found.items() if key != "bundle"}
    assert after.files == before.files
    assert {k: v for k, v in after.results.items() if k != "bench"} == before.results


def test_the_table_fits_a_terminal(bundle: Callable[[str, str], Path], nanokit: Callable[..., Any]) -> None:
    ran = nanokit("bench", bundle("onnx", "llama"), "--context", "16", "--decode", "2", "--repeat", "1")
    assert ran.status == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("of the limit" in line and "%" in line for line in lines)
    assert not any("e+" in line for line in lines), "figures as people read them"


def test_memory_is_read_at_a_rate_that_memory_has() -> None:
    found = read(2)
    assert found["bytes"] >= 256 << 20
    assert 0.5e9 < found["bytes_per_second"] < 1e12
    assert found["bytes_per_second"] == max(found["passes"])


def test_refusals(bundle: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = bundle("onnx", "llama")
    with pytest.raises(RequestError, match="does not fit"):
        run_bench(folder, prompt=120, decode=9)
    with pytest.raises(RequestError, match="--repeat"):
        run_bench(folder, repeat=0)
    with pytest.raises(BadFileError, match="no such folder"):
        run_bench(tmp_path / "none")
    with pytest.raises(WorkError, match="ModuleNotFoundError"):
        measure({"task": "run", "loader": "export.nowhere:load", "threads": 1})


def test_a_default_prompt_is_cut_to_the_context(bundle: Callable[[str, str], Path]) -> None:
    found = run_bench(bundle("onnx", "llama"), threads=1, decode=4, repeat=1)
    assert found.prompt == 124
    assert json.loads(json.dumps(as_dict(found)))["prompt"] == 124
    assert all(len(row) == 3 for row in rows(found))
