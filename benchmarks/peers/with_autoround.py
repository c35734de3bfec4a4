"""AutoRound: learned rounding and clipping per block by signed gradient descent, symmetric int4, group 32."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from common import BATCH, GROUP, calibration, dequantise_gptq, load_float, load_tokenizer, measured, parser, save_dense


class Rows(torch.utils.data.Dataset):
    """Calibration windows as AutoRound's loader wants them."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "attention_mask": torch.ones_like(self.windows[index])}


def main() -> None:
    """Quantize, save in GPTQ's format, read that."""
    arguments = parser(__doc__)
    arguments.add_argument("--iterations", type=int, default=200)
    arguments.add_argument("--samples", type=int, default=128)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    windows = calibration(given.windows, given.samples)
    loader = torch.utils.data.DataLoader(Rows(windows), batch_size=BATCH)
    with tempfile.TemporaryDirectory() as packed:
        with measured(given.report, "auto-round", tokens=windows.numel()):
            tool = AutoRound(
                load_float(given.model), load_tokenizer(given.model), scheme="W4A16", bits=4, group_size=GROUP,
                sym=True, dataset=loader, iters=given.iterations, seqlen=windows.shape[1], nsamples=len(windows),
                batch_size=BATCH, device_map="cpu", enable_torch_compile=False, amp=False,
            )  # fmt: skip
            tool.quantize_and_save(packed, format="auto_gptq")
        save_dense(given.model, dequantise_gptq(Path(packed)), given.out)


if __name__ == "__main__":
    main()
