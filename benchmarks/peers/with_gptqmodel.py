"""GPTQModel: GPTQ or GPTAQ with its search of the scale (`mse`), symmetric int4, group 32."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 refuses to start where it counts one worker
import torch
from common import BATCH, GROUP, calibration, dequantise_gptq, measured, parser, save_dense
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig


def main() -> None:
    """Quantize, save in GPTQ's format, read that."""
    arguments = parser(__doc__)
    arguments.add_argument("--method", choices=("gptq", "gptaq"), default="gptq")
    arguments.add_argument("--mse", type=float, default=2.4, help="the norm's power; 2.4 is GPTQModel's own example")
    arguments.add_argument("--samples", type=int, default=128)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    windows = calibration(given.windows, given.samples)
    settings = {"gptaq": GPTAQConfig()} if given.method == "gptaq" else {}
    config = QuantizeConfig(
        bits=4, group_size=GROUP, sym=True, desc_act=False, mse=given.mse, device="cpu", offload_to_disk=False,
        **settings,
    )  # fmt: skip
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    with tempfile.TemporaryDirectory() as packed:
        with measured(given.report, "gptqmodel", tokens=windows.numel()):
            model = GPTQModel.load(str(given.model), config, dtype=torch.float32)
            model.quantize(rows, batch_size=BATCH, backend=BACKEND.TORCH)
            model.save(packed)
        save_dense(given.model, dequantise_gptq(Path(packed)), given.out)


if __name__ == "__main__":
    main()
