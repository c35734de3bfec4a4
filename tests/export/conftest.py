"""An int4 folder by plain rounding, for tests of the exporters alone; the quantize stage has its own tests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nano.families import EMBEDDING, HEAD
from nano.tokens import copy_tokenizer, load_tokenizer
from nano.torch_lm import load_float
from quantize.grid import QuantizedTensor, bf16_exact, round_to_codes
from quantize.packed import Int4Checkpoint, quantization_config, write_int4


def rounded(weight_NK: torch.Tensor, group: int, bits: int = 4) -> QuantizedTensor:
    """Round to nearest, the largest weight of a group on the largest code."""
    n = weight_NK.shape[0]
    top = (1 << (bits - 1)) - 1
    scale_NG = bf16_exact(weight_NK.reshape(n, -1, group).abs().amax(-1) / top)
    return QuantizedTensor(round_to_codes(weight_NK.contiguous(), scale_NG, group, bits), scale_NG, group, bits)


def make_int4(
    source: Path, folder: Path, *, group: int = 32, bits: int = 4, embedding: bool = False, keep: tuple[str, ...] = ()
) -> Path:
    """Every linear of an HF folder on the grid; a feed-forward width that is no multiple of the group gains zeros.

    Args:
        source: the float folder.
        folder: where to write.
        group, bits: of the grid.
        embedding: whether the embedding goes on the grid too.
        keep: modules left float.
    """
    folder.mkdir(parents=True)
    state: dict[str, torch.Tensor] = load_float(source).state_dict()
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    pad = -config["intermediate_size"] % group
    config["intermediate_size"] += pad
    tensors: list[tuple[str, torch.Tensor | QuantizedTensor]] = []
    ignore = []
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if config["tie_word_embeddings"] and module == HEAD:
            continue
        if module.endswith(("gate_proj", "up_proj")):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, pad))
        elif module.endswith("down_proj"):
            tensor = torch.nn.functional.pad(tensor, (0, pad))
        on_grid = embedding if module == EMBEDDING else tensor.dim() == 2
        if on_grid and module not in keep:
            tensors.append((name, rounded(tensor.float(), group, bits)))
        else:
            ignore += [module] if tensor.dim() == 2 else []
            tensors.append((name, tensor))
    targets = ["Linear", "Embedding"] if embedding else ["Linear"]
    config["quantization_config"] = quantization_config({(bits, group): targets}, ignore)
    write_int4(folder, config, tensors)
    copy_tokenizer(source, folder)
    return folder


@pytest.fixture(scope="session")
def int4_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`int4_folder(source, **settings)`: see `make_int4`; made once a session for each request."""
    made: dict[str, Path] = {}

    def make(source: Path, **settings: Any) -> Path:
        key = json.dumps([str(source), settings], sort_keys=True)
        if key not in made:
            made[key] = make_int4(source, tmp_path_factory.mktemp("int4") / "int4", **settings)
        return made[key]

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """`exported(int4, **options)`: a .pte bundle and the writer's facts, made once a session for each request."""
    from export.executorch import write_pte
    from export.options import ExportOptions

    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def export(int4: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
        key = f"{int4} {options}"
        if key not in made:
            out = tmp_path_factory.mktemp("pte")
            with Int4Checkpoint(int4) as checkpoint:
                facts = write_pte(checkpoint, out, ExportOptions(**options), load_tokenizer(int4))
            copy_tokenizer(int4, out)
            made[key] = (out, facts)
        return made[key]

    return export


@dataclass(frozen=True)
class Shipped:
    """stories260K as it would ship: int4 by plain rounding, and the bundle of each format, made by the real stages.

    Attributes:
        home: where all lies.
        text: held-out stories, JSONL.
        int4: the int4 folder.
    """

    home: Path
    text: Path
    int4: Path

    def bundle(self, form: str) -> Path:
        """The bundle of a format, "executorch" or "onnx"."""
        return self.home / form


@pytest.fixture(scope="session")
def shipped(stories: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    from export.options import ExportOptions
    from export.run import run_export
    from quantize.options import QuantizeOptions
    from quantize.run import run_quantize

    home = tmp_path_factory.mktemp("shipped")
    text = home / "held_out.jsonl"
    with tinystories.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 24)]
    text.write_text("".join(json.dumps({"text": " ".join(t.split()[:40])}) + "\n" for t in texts))
    run_quantize(stories, [], home / "int4", QuantizeOptions(method="rtn"))
    made = Shipped(home, text, home / "int4")
    for form in ("executorch", "onnx"):
        run_export(made.int4, form, made.bundle(form), ExportOptions(logits="all"))  # type: ignore[arg-type]
    return made
