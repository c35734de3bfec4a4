"""nanokit itself, by the function behind `nanokit quantize`; its int4 folder is dequantised by its own code."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import add_facts, measured, parser, save_dense

import quantize.recover
import quantize.rtn
import quantize.sequential  # noqa: F401  (imported here, so that imports count for the process and not for the call)
from quantize.bnb import dense_tensors
from quantize.options import QuantizeOptions
from quantize.packed import Int4Checkpoint
from quantize.run import run_quantize


def options_from(method: str, settings: list[str]) -> QuantizeOptions:
    """The defaults of a method, some of them changed by "name=value"."""
    defaults = QuantizeOptions(method=method)  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        changes[name] = int(value) if value.isdigit() else type(getattr(defaults, name))(value)
    return replace(defaults, **changes)


def main() -> None:
    """Quantize, check that scales are exact bfloat16, dequantise."""
    arguments = parser(__doc__)
    arguments.add_argument("--method", required=True)
    arguments.add_argument("--data", type=Path, nargs="*", default=[])
    arguments.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of nanokit quantize")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    options = options_from(given.method, given.set)
    with tempfile.TemporaryDirectory() as work:
        packed = Path(work) / "int4"
        with measured(given.report, "nanokit"):
            data = run_quantize(given.model, given.data, packed, options).data
        if options.method.startswith("bnb-"):
            add_facts(given.report, tokens=0)
            save_dense(given.model, dict(dense_tensors(packed)), given.out)
            return
        with Int4Checkpoint(packed) as checkpoint:
            scales = [checkpoint.quantized(module).scale_NG for module in checkpoint.modules]
            exact = all(torch.equal(scale, scale.bfloat16().float()) for scale in scales)
            tokens = max(data.get("tokens", 0), data.get("training", {}).get("tokens", 0))
            add_facts(given.report, bf16_scales=exact, tokens=tokens)
            save_dense(given.model, dict(checkpoint.dense_tensors()), given.out)


if __name__ == "__main__":
    main()
