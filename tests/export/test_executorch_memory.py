"""What a .pte costs: one table, int8 caches, nothing that is not packed, nothing locked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("executorch")

from export.executorch import check_executorch
from export.executorch_file import MODEL
from export.executorch_lower import load_toolchain
from export.executorch_model import Cache, CachePlan, Decoder, int8_rows
from export.executorch_readback import named_filters, open_pte, read_codes
from export.executorch_runtime import open_executorch
from export.executorch_tie import share_table
from export.options import ExportOptions
from nano.errors import UnsupportedError, WorkError
from quantize.lm import open_int4_model
from quantize.packed import Int4Checkpoint


def test_a_tied_table_is_once_in_the_file(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any]
) -> None:
    """The bytes that XNNPACK packs for the head are those that the embedding looks up; nothing else is lost."""
    int4 = int4_folder(tiny_model("llama"), embedding=True)
    folder, facts = exported(int4, context=96, chunk=8)
    with Int4Checkpoint(int4) as checkpoint, open_pte(folder) as pte:
        codes = checkpoint.words("model.embed_tokens", 0, 320).view(torch.uint8).numpy().tobytes()
        table, head = pte.table(), dict(named_filters(pte))["lm_head"]
        assert table is not None
        assert (folder / MODEL).read_bytes().count(codes) == 1
        assert pte.shares_table(head.codes, table)
        assert pte.named(head.codes) == codes
    assert share_table(folder) == 0, "done already"
    assert facts["delegation"]["int4_bytes_per_weight"] == 0.5625


def test_a_head_of_its_own_keeps_its_codes(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any]
) -> None:
    int4 = int4_folder(tiny_model("llama", tie_word_embeddings=False), embedding=True)
    folder, _facts = exported(int4, context=96, chunk=8)
    assert share_table(folder) == 0
    with Int4Checkpoint(int4) as checkpoint:
        found = dict(read_codes(folder))
        for name in ("model.embed_tokens", "lm_head"):
            assert torch.equal(found[name].codes_NK, checkpoint.quantized(name).codes_NK)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_an_int8_cache(
    family: str, tiny_model: Callable[..., Path], int4_folder: Callable[..., Path],
    exported: Callable[..., Any],
) -> None:  # fmt: skip
    """About a quarter of the bytes, and an error that its rounding explains; rings too."""
    int4 = int4_folder(tiny_model(family), embedding=True)
    folder, facts = exported(int4, logits="all", chunk=24, kv_cache="int8")
    with Int4Checkpoint(int4) as checkpoint:
        shape = checkpoint.shape
        plan = CachePlan.of(shape, 256, 24)
    slots = sum(plan.slots(kind) for kind in shape.layer_types)
    assert facts["footprint"]["kv_cache_bytes"] == 2 * slots * 2 * (shape.head_dim + 5)
    assert facts["footprint"]["kv_cache_dtype"] == "int8"
    text = np.random.default_rng(0).integers(3, 320, 90)
    expected = open_int4_model(int4, "int8-xnnpack").logits([text])[0]
    found = open_executorch(folder).logits([text])[0]
    assert 1e-3 < float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) < 0.05


def test_attention_over_an_int8_cache_is_attention_over_its_values() -> None:
    """The operator against torch on what the codes stand for: grouped heads, with and without a mask."""
    load_toolchain()
    torch.manual_seed(1)
    heads, kv_heads, width, slots, start, length = 8, 2, 32, 40, 17, 5
    keys, values = (Cache(slots, kv_heads, width, int8=True) for _ in range(2))
    for cache in (keys, values):
        cache.write(torch.randn(1, slots, kv_heads, width), 0, None)
    q_1THA = torch.randn(1, length, heads, width)
    decoder = SimpleNamespace(plan=SimpleNamespace(int8=True), attention_scale=0.2)
    q, k, v = (
        ((codes.float() - zero.float()) * scale).transpose(1, 2)
        for codes, scale, zero in (int8_rows(q_1THA), *((c.held, c.scale, c.zero) for c in (keys, values)))
    )
    assert 1e-3 < float((q.transpose(1, 2) - q_1THA).norm() / q_1THA.norm()) < 1e-2
    positions = torch.arange(slots)
    causal = positions <= start + torch.arange(length)[:, None]
    for seen_TS in (causal, causal & (positions > start - 4)):
        mask_TS = None if seen_TS is causal else torch.where(seen_TS, 0.0, float("-inf"))
        found = Decoder._attend(decoder, q_1THA, (keys, values), start, mask_TS)  # type: ignore[arg-type]
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), seen_TS, scale=0.2
        ).transpose(1, 2)
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_what_the_facts_refuse() -> None:
    from export.executorch_facts import require_small

    require_small(5625, 10_000, 0)
    with pytest.raises(WorkError, match=r"0\.625 bytes a weight"):
        require_small(6250, 10_000, 0)
    with pytest.raises(WorkError, match="3 tensors"):
        require_small(5625, 10_000, 3)


def test_other_backends_are_refused(tiny_model: Callable[..., Path], int4_folder: Callable[..., Path]) -> None:
    options = ExportOptions(backend="coreml")
    with (
        Int4Checkpoint(int4_folder(tiny_model("llama"), embedding=True)) as checkpoint,
        pytest.raises(UnsupportedError, match=r"--backend coreml[\s\S]*one of xnnpack"),
    ):
        check_executorch(checkpoint, options)


def test_the_runtime_is_loaded_without_the_compiler_and_locks_nothing(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any]
) -> None:
    """A process of its own: 130 MB of compiler stay out, and no page of the file is locked."""
    folder, _facts = exported(int4_folder(tiny_model("llama"), embedding=True), context=96, chunk=8)
    program = (
        "import sys, pathlib; from export.executorch_runtime import open_executorch;"
        f"open_executorch(pathlib.Path({str(folder)!r})).decode(5);"
        "print('torchao' in sys.modules, 'executorch.exir' in sys.modules,"
        "*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmLck')))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == ["False", "False", "0"]
