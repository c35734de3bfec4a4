"""torchao: quantization-aware training against the float model's logits, symmetric int4, group 32.

torchao leaves the loop to its user; this one is plain: AdamW, linear decay, KL to the float model, every parameter
trained (its recipes do that too: embedding and norms move as well, in float).
"""

from __future__ import annotations

from typing import Any

import torch
from common import BATCH, GROUP, calibration, load_float, measured, parser, save_dense
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import QATConfig
from torchao.quantization.quant_primitives import MappingType


def is_decoder_linear(module: Any, name: str) -> bool:
    """The scope that all tools share."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def train(model: Any, teacher: Any, windows: torch.Tensor, steps: int, learning_rate: float) -> None:
    """KL to the teacher, `BATCH` windows a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        batch = windows[step * BATCH : (step + 1) * BATCH]
        with torch.no_grad():
            target = torch.log_softmax(teacher(input_ids=batch, use_cache=False).logits, -1)
        found = torch.log_softmax(model(input_ids=batch, use_cache=False).logits, -1)
        (target.exp() * (target - found)).sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)


def main() -> None:
    """Prepare, train, convert, read the weights."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--learning-rate", type=float, default=1e-4, help="2e-5 leaves KL 0.080, not 0.049")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    windows = calibration(given.windows, given.steps * BATCH)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP), weight_mapping_type=MappingType.SYMMETRIC
    )
    with measured(given.report, "torchao", tokens=windows.numel()):
        model, teacher = load_float(given.model), load_float(given.model)
        quantize_(model, QATConfig(config, step="prepare"), filter_fn=is_decoder_linear)
        train(model.train(), teacher, windows, given.steps, given.learning_rate)
        quantize_(model.eval(), QATConfig(config, step="convert"), filter_fn=is_decoder_linear)
    replaced = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_proj.weight")}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            replaced[name + ".weight"] = module.weight.dequantize()
    save_dense(given.model, replaced, given.out)


if __name__ == "__main__":
    main()
