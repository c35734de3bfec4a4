"""What every runner shares: its arguments, its meter, and the float32 folder that the scorer reads.

A runner is started by benchmarks/quantization.py in the environment of one tool:

    python with_TOOL.py --model FLOAT --windows WINDOWS.npy --out DENSE --report REPORT.json [options of its own]

It quantizes the float HF folder MODEL, writes the result dequantised to float32 as an HF folder DENSE, and leaves
its CPU seconds, wall seconds and memory in REPORT. Nothing of nanokit is imported here, so that it runs in any
environment with torch, transformers and safetensors.

Legend: N output channels, K input channels, G groups.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GROUP = 32
BATCH = 8
"""Windows in a batch, for tools that ask."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every runner takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", type=Path, required=True)
    made.add_argument("--windows", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--report", type=Path, required=True)
    made.add_argument("--threads", type=int, default=1)
    return made


def calibration(path: Path, count: int) -> torch.Tensor:
    """The first `count` windows of token ids, (count, T): the same for every tool."""
    return torch.from_numpy(np.load(path)[:count])


def load_float(folder: Path) -> Any:
    """The transformers model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).eval()


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_bytes() -> int:
    """The largest resident size of this process or of any of its children so far."""
    per = 1 if sys.platform == "darwin" else 1024
    return per * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@contextmanager
def measured(report: Path, tool: str, **facts: Any) -> Iterator[None]:
    """Measure the block, from a float folder on disk to the tool's own finished result, and write the report.

    The figures of the process run from its start to the block's end: imports count, dequantising for the scorer
    does not.
    """
    cpu, wall = cpu_seconds(), time.perf_counter()
    yield
    found = {
        "tool": f"{tool} {metadata.version(tool)}",
        "torch": torch.__version__,
        "call_cpu": cpu_seconds() - cpu,
        "call_wall": time.perf_counter() - wall,
        "process_cpu": cpu_seconds(),
        "peak_bytes": peak_bytes(),
        **facts,
    }
    report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def add_facts(report: Path, **facts: Any) -> None:
    """Put more into a report that `measured` wrote."""
    found = json.loads(report.read_text(encoding="utf-8"))
    report.write_text(json.dumps({**found, **facts}, indent=2) + "\n", encoding="utf-8")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors folder, however deep it lies."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def save_dense(source: Path, replaced: Mapping[str, torch.Tensor], out: Path) -> None:
    """Copy a float folder with some tensors replaced, all in float32; a head that differs from its embedding is untied.

    Raises:
        ValueError: a replacement that the source has no place for, or none at all.
    """
    tensors = {name: tensor.float() for name, tensor in tensors_of(source).items()}
    table = replaced.get(EMBEDDING, tensors[EMBEDDING]).float()
    untied = HEAD not in tensors and HEAD in replaced and not torch.equal(replaced[HEAD].float(), table)
    for name, tensor in replaced.items():
        if name == HEAD and name not in tensors:
            continue
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} has no place in {source}")
        tensors[name] = tensor.detach().float().contiguous()
    if not replaced:
        raise ValueError("the tool quantized nothing")
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(("model", "manifest")):
            shutil.copyfile(path, out / path.name)
    if untied:
        tensors[HEAD] = replaced[HEAD].detach().float().contiguous()
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def dequantise_gptq(folder: Path) -> dict[str, torch.Tensor]:
    """Weights (N, K) of a GPTQ-format checkpoint with 4-bit codes.

    `qweight` holds eight codes of one input channel column in an int32, lowest bits first; `qzeros` likewise holds
    zero points minus one (the format's first version); `g_idx` names each input channel's group.
    """
    stored, found = tensors_of(folder), {}
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    for name in stored:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        words, zeros, scale_GN = stored[name], stored[module + ".qzeros"], stored[module + ".scales"].float()
        codes_KN = ((words[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, words.shape[1])
        zero_GN = ((zeros[:, :, None] >> shifts) & 15).reshape(zeros.shape[0], -1)[:, : scale_GN.shape[1]] + 1
        each = codes_KN.shape[0] // scale_GN.shape[0]
        groups = stored.get(module + ".g_idx", torch.arange(codes_KN.shape[0]) // each).long()
        found[module + ".weight"] = ((codes_KN - zero_GN[groups]).float() * scale_GN[groups]).T.contiguous()
    return found
