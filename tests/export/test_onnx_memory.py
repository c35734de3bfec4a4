"""What a loaded ONNX bundle keeps of its file: pages that are given back, and what must not be."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from export.bench_worker import memory
from export.onnx_files import DATA
from export.onnx_runtime import give_back_pages, open_onnx
from export.options import ExportOptions
from export.run import run_export

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@linux
def test_read_pages_go_and_written_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * (1 << 15))  # 8 MiB
    with path.open("rb") as file:
        read = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        written = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert read[:: mmap.PAGESIZE] == bytes(2048)
    written[5] = 77
    before = memory()
    give_back_pages(path)
    after = memory()
    assert before is not None
    assert after is not None
    assert before["rss"] - after["rss"] > 6 << 20
    assert read[1000:1256] == bytes(np.roll(np.arange(256, dtype=np.uint8), -1000 % 256).tobytes())
    assert written[:8] == bytes([0, 1, 2, 3, 4, 77, 6, 7])


def test_a_model_runs_the_same_after_its_pages_went(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_export(int4_folder(tiny_model("gemma3_text"), embedding=True), "onnx", out, ExportOptions(context=64, chunk=8))
    model = open_onnx(out)
    first = model.prefill(list(range(3, 40)))
    give_back_pages(out / DATA)
    assert np.array_equal(first, model.prefill(list(range(3, 40))))
