"""Plain round-to-nearest: scale = largest |weight| of a group / 7.5, as torchao's symmetric int4 has it."""

from __future__ import annotations

import torch
from common import GROUP, load_float, measured, parser, save_dense


def main() -> None:
    """Round every decoder linear."""
    given = parser(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    replaced = {}
    with measured(given.report, "torch", tokens=0), torch.no_grad():
        model = load_float(given.model)
        for name, weight_NK in model.named_parameters():
            if name.endswith("_proj.weight"):
                grouped = weight_NK.reshape(weight_NK.shape[0], -1, GROUP)
                scale = grouped.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps) / 7.5
                replaced[name] = ((grouped / scale).round().clamp(-8, 7) * scale).reshape(weight_NK.shape)
    save_dense(given.model, replaced, given.out)


if __name__ == "__main__":
    main()
