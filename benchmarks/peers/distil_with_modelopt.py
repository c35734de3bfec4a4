"""NVIDIA ModelOpt: `modelopt.torch.distill` with its logits loss (forward KL), in a loop of the user's own."""

from __future__ import annotations

from typing import Any

import modelopt.torch.distill as mtd
import torch
from distil_common import Meter, load_float, read_job, train


class ShiftedLogits(mtd.LogitsDistillationLoss):
    """Its loss over positions that have a next token; those are set before each step."""

    where_BT: torch.Tensor

    def forward(self, student_out: Any, teacher_out: Any) -> torch.Tensor:
        """ModelOpt hands over the two models' outputs."""
        ours, theirs = (getattr(out, "logits", out)[:, :-1][self.where_BT] for out in (student_out, teacher_out))
        loss: torch.Tensor = super().forward(ours, theirs)
        return loss


def main() -> None:
    """Convert, train, save the student if asked."""
    job, report = read_job(__doc__)
    criterion = ShiftedLogits()
    settings = {"teacher_model": load_float(job.teacher), "criterion": criterion}
    model = mtd.convert(load_float(job.student).train(), mode=[("kd_loss", settings)])

    def loss_of(ids_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        criterion.where_BT = real_BT[:, 1:]
        model(input_ids=ids_BT, attention_mask=None if bool(real_BT.all()) else real_BT.long(), use_cache=False)
        loss: torch.Tensor = model.compute_kd_loss()
        return loss

    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(job, Meter("nvidia-modelopt", report), own, loss_of)
    if job.save:
        mtd.export(model).save_pretrained(job.save)


if __name__ == "__main__":
    main()
