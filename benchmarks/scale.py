"""Memory, speed and days of distilling Nano-2 from a 12B teacher on N GPUs, from formulas; and the formulas checked.

    python benchmarks/scale.py                 the tables of docs/scale.md
    python benchmarks/scale.py --check         its checks: FLOPs and saved bytes counted on fake tensors (no memory),
                                               and what each of 1, 2 and 3 gloo processes really holds

docs/scale.md names every assumption. Legend: P, Q parameters of student and teacher, D and E their widths, L student's
layers, V vocabulary, N GPUs, T tokens of a sequence, m tokens of a pass on one GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from distill.losses import CHUNK_ELEMENTS
from distill.speed import PEAK_BF16, training_flops
from nano.shapes import ModelShape
from nano.solve import solve_student

GIB = 1 << 30
GEMMA_12B: dict[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_size": 3840, "intermediate_size": 15_360,
    "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "sliding_window": 1024, "max_position_embeddings": 131_072, "tie_word_embeddings": True,
}  # fmt: skip
"""text_config of google/gemma-3-12b-pt."""

STATE_BYTES = 16
"""A student's weight, gradient and two AdamW moments, float32."""


@dataclass(frozen=True)
class Setting:
    """What the tables assume.

    Attributes:
        length: tokens of a sequence.
        rows: sequences in a pass on one GPU.
        tokens: to train on.
        peak: dense bfloat16 operations a second of a GPU (H100 SXM).
        mfu: share of it that all arithmetic together reaches.
        inside, across: bytes a second a GPU receives within a host of 8 (NVLink 4, half of 900 GB/s) and between
            hosts (one 400 Gb/s link a GPU).
    """

    length: int = 2048
    rows: int = 4
    tokens: float = 94e9
    peak: float = PEAK_BF16["H100"]
    mfu: float = 0.40
    inside: float = 450e9
    across: float = 50e9


def layer_parameters(shape: ModelShape) -> int:
    """Of one decoder layer."""
    return (shape.num_parameters - shape.embedding_parameters - shape.hidden_size) // shape.num_layers


def root_parameters(shape: ModelShape) -> int:
    """Of embedding, head and last norm, which FSDP2 gathers together."""
    return shape.embedding_parameters + shape.hidden_size


def saved_per_token(shape: ModelShape) -> int:
    """Bytes that one layer keeps for the backward pass of one token, bf16 autocast over a float32 stream."""
    per_d, per_f, per_q, per_kv = GEMMA_SAVED
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return per_d * shape.hidden_size + per_f * shape.intermediate_size + per_q * heads + per_kv * kv


GEMMA_SAVED = (42, 8, 16, 8)
"""Multiples of D, F, query and key/value widths: differences between fake-tensor counts of a Gemma 3 layer with one
of them doubled (D 1024, F 4096, 8 and 4 heads of 128); `--check` holds them against Nano-2's own shape."""


def memory(student: ModelShape, teacher: ModelShape, gpus: int, how: str, setting: Setting) -> dict[str, float]:
    """Bytes on each GPU, by cause; `how` is the teacher: "bf16" (sharded), "nf4" (whole on each), "cache" (none)."""
    m, sharded = setting.rows * setting.length, gpus > 1
    root, layer = root_parameters(student), layer_parameters(student)
    found = {"student": STATE_BYTES * student.num_parameters / gpus}
    if how == "bf16":
        found["teacher"] = 2 * teacher.num_parameters / gpus
    elif how == "nf4":  # a scale of 4 bytes for 64 weights; embedding and norms stay in bf16
        others = teacher.num_parameters - teacher.linear_parameters
        found["teacher"] = (0.5 + 4 / 64) * teacher.linear_parameters + 2 * others
    else:
        found["teacher"] = 0.0
    gathered = 0.0
    if sharded:  # two layers (one in use, one on its way), weight and gradient; embedding and head, weight and gradient
        gathered = 2 * (4 + 4) * layer + 2 * layer + (4 + 4) * root  # and the layer's copy in bf16
        if how == "bf16":
            gathered += 2 * (root_parameters(teacher) + 2 * layer_parameters(teacher))
    found["gathered"] = gathered
    found["head's gradient"] = 4.0 * student.vocab_size * student.hidden_size
    kept = 4 * student.hidden_size * student.num_layers + saved_per_token(student)
    found["activations"] = float(m * kept)
    found["loss"] = 6 * 4.0 * CHUNK_ELEMENTS + 4 * m * (2 * student.hidden_size + teacher.hidden_size)
    return found


def flops(student: ModelShape, teacher: ModelShape, how: str, setting: Setting) -> float:
    """Operations on a token: the student's forward, backward and recomputed forward, the teacher's forward."""
    ours = training_flops(student, setting.length) * (1 + 1 / 3)
    return ours + (training_flops(teacher, setting.length) / 3 if how != "cache" else 0)


def received(student: ModelShape, teacher: ModelShape, gpus: int, how: str) -> float:
    """Bytes that a GPU receives in a step of one pass: weights gathered twice, gradients reduced, in float32."""
    others = (gpus - 1) / gpus
    ours = (4 + 4 + 4) * student.num_parameters * others
    again = 4 * root_parameters(student) * others  # is kept from forward to backward
    theirs = 2 * (teacher.num_parameters - root_parameters(teacher)) * others if how == "bf16" else 0.0
    return ours - again + theirs


def speed(student: ModelShape, teacher: ModelShape, gpus: int, how: str, setting: Setting) -> dict[str, float]:
    """Seconds of a step of one pass a GPU, what bounds it, tokens a second, and days for all tokens."""
    m = setting.rows * setting.length
    compute = m * flops(student, teacher, how, setting) / (setting.peak * setting.mfu)
    wire = setting.inside if gpus <= 8 else setting.across
    moving = received(student, teacher, gpus, how) / wire if gpus > 1 else 0.0
    rate = gpus * m / max(compute, moving)
    return {"compute": compute, "moving": moving, "rate": rate, "days": setting.tokens / rate / 86400}


def tables(setting: Setting) -> None:
    """Print them as Markdown."""
    teacher = ModelShape.from_hf(GEMMA_12B)
    student = solve_student(teacher, "nano-2")
    print(f"Student {student.num_parameters:,}, teacher {teacher.num_parameters:,} parameters; "
          f"{setting.rows} x {setting.length} tokens a pass and GPU\n")  # fmt: skip
    causes = "student | teacher | gathered | head's gradient | activations | loss"
    print(f"| teacher | GPUs | {causes} | GiB a GPU | compute s | moving s | tokens/s | days |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for how in ("bf16", "nf4", "cache"):
        for gpus in (1, 8, 64):
            held, pace = memory(student, teacher, gpus, how, setting), speed(student, teacher, gpus, how, setting)
            parts = " | ".join(f"{x / GIB:.1f}" for x in held.values())
            timing = f"{pace['compute']:.2f} | {pace['moving']:.2f} | {pace['rate']:,.0f} | {pace['days']:,.1f}"
            print(f"| {how} | {gpus} | {parts} | **{sum(held.values()) / GIB:.1f}** | {timing} |")


def count_on_fake_tensors(config: dict[str, Any], length: int) -> dict[str, float]:
    """Operations and saved bytes of a forward and backward pass, with no memory used.

    Returns:
        "linears" and "attention": operations a token; "saved": bytes a token that autograd keeps, weights apart;
        "saved_recomputing": the same with each layer recomputed.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from distill.models import new_model
    from distill.optimizer import prepare_model
    from distill.options import DistillOptions

    def passes(model: Any) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            ids = torch.zeros(1, length, dtype=torch.long)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        (hidden @ model.lm_head.weight.T).sum().backward()

    found: dict[str, float] = {}
    for name, recompute in (("saved", False), ("saved_recomputing", True)):
        with FakeTensorMode():
            model = new_model(config)
            prepare_model(model, DistillOptions(recompute=recompute))
            weights = {tuple(sorted(p.shape)) for p in model.parameters()}
            kept: dict[int, int] = {}

            def keep(x: torch.Tensor, kept: dict[int, int] = kept, weights: set[Any] = weights) -> torch.Tensor:
                if tuple(sorted(x.shape)) not in weights:  # neither a weight nor its copy in bfloat16
                    kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                passes(model)
        found[name] = sum(kept.values()) / length
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), counter:  # of the fused kernel nothing is counted on a CPU
        passes(new_model(config))
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    return {**found, "linears": (counter.get_total_flops() - attention) / length, "attention": attention / length}


def held_by_ranks(config: dict[str, Any]) -> None:
    """Start 1, 2 and 3 processes and print what each holds, beside 16 P / N."""
    for count in (1, 2, 3):
        env = {**os.environ, "SCALE_CONFIG": json.dumps(config), "OMP_NUM_THREADS": "1"}
        call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), __file__, "--rank"]
        done = subprocess.run(call, env=env, capture_output=True, text=True, check=True)
        print("\n".join(line for line in done.stdout.splitlines() if line.startswith("rank")))


def rank() -> None:
    """One of those processes: a student with its moments after a step, sharded as training shards it."""
    import torch

    from distill.models import new_model
    from distill.optimizer import make_optimizer
    from distill.options import DistillOptions
    from distill.parallel import joined
    from distill.sharded import shard

    config = json.loads(os.environ["SCALE_CONFIG"])
    shape = ModelShape.from_hf(config)
    with joined() as world:
        model = new_model(config) if world.first else None
        if world.mesh is not None:
            model = shard(model, shape, world, "cpu").model
        assert model is not None
        optimizer = make_optimizer(list(model.parameters()), DistillOptions())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

        def local(x: torch.Tensor) -> int:
            own = x.to_local() if hasattr(x, "to_local") else x
            return int(own.numel() * own.element_size())

        weights = sum(local(p) for p in model.parameters())
        moments = sum(local(x) for s in optimizer.state.values() for n, x in s.items() if n != "step")
        gradients = sum(local(p.grad) for p in model.parameters() if p.grad is not None)
        expected = STATE_BYTES * shape.num_parameters / world.size
        total = weights + gradients + moments
        for line in world.gathered(
            f"rank {world.rank} of {world.size}: weights {weights:,}, gradients {gradients:,}, moments {moments:,} "
            f"bytes; together {total / expected - 1:+.2%} of 16 P / N"
        ):
            if world.first:
                print(line)


def check() -> None:
    """Print what was counted beside what the formulas say."""
    teacher = ModelShape.from_hf(GEMMA_12B)
    student = solve_student(teacher, "nano-2")
    config = {**student.to_hf(GEMMA_12B), "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    short = ModelShape.from_hf(config)
    length = 1536
    counted = count_on_fake_tensors(config, length)
    deeper = count_on_fake_tensors({**config, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, length)
    attention = 6 * length * short.num_layers * short.num_heads * short.head_dim
    print(f"two layers of Nano-2 ({short.num_parameters:,} parameters), one sequence of {length}, a token:")
    linears = training_flops(short, length) - attention
    print(f"  linears and head: {counted['linears']:.6g} operations; formula {linears:.6g}")
    print(f"  attention: {counted['attention']:.6g} (the whole square); formula {attention:.6g} (half)")
    per_layer = (deeper["saved"] - counted["saved"]) / 2
    print(f"  saved a layer: {per_layer:,.0f} bytes; formula {saved_per_token(short):,}")
    per_recomputed = (deeper["saved_recomputing"] - counted["saved_recomputing"]) / 2
    print(f"  saved a layer that is recomputed: {per_recomputed:,.0f} bytes; formula {4 * short.hidden_size:,}")
    held_by_ranks({**config, "hidden_size": 256, "intermediate_size": 1000, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 5000})  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank:
        rank()
    elif chosen.check:
        check()
    else:
        tables(Setting())
