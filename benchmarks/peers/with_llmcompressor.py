"""llm-compressor: AWQ's scales folded in, then GPTQ in static activation order; symmetric int4, group 32."""

from __future__ import annotations

from unittest import mock

import torch
from common import BATCH, GROUP, calibration, load_float, load_tokenizer, measured, parser, save_dense
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.modifiers.transform.awq import AWQModifier


def main() -> None:
    """Quantize in memory, then read weights and norms."""
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=128)
    arguments.add_argument("--observer", default="memoryless_mse", help="how scales are chosen")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    windows = calibration(given.windows, given.samples)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    grid = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP, observer=given.observer
    )
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=grid)}
    recipe = [AWQModifier(), GPTQModifier(actorder="static", config_groups=scheme, ignore=["lm_head"])]
    # 0.14 pins memory without asking whether there is an accelerator to pin it for, which fails on a CPU
    unpinned = mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    with measured(given.report, "llmcompressor", tokens=windows.numel()), unpinned:
        model = load_float(given.model)
        oneshot(
            model=model, tokenizer=load_tokenizer(given.model), recipe=recipe, dataset=Dataset.from_list(rows),
            num_calibration_samples=len(rows), max_seq_length=windows.shape[1], batch_size=BATCH,
            shuffle_calibration_samples=False,
        )  # fmt: skip
    replaced = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("norm.weight")}
    with torch.no_grad():
        for name, module in model.named_modules():
            used = getattr(module, "quantization_scheme", None)
            if used is not None and used.weights is not None:
                zero = getattr(module, "weight_zero_point", None)
                replaced[name + ".weight"] = fake_quantize(module.weight, module.weight_scale, zero, used.weights)
    save_dense(given.model, replaced, given.out)


if __name__ == "__main__":
    main()
