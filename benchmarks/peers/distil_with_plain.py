"""A plain torch loop: forward KL over whole logits, or cross-entropy alone; what a careful user writes in an hour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from distil_common import Meter, load_float, read_job, train


def main() -> None:
    """Train; save the student if asked."""
    job, report = read_job(__doc__)
    teacher = load_float(job.teacher).eval() if job.loss == "kd" else None
    student = load_float(job.student).train()

    def loss_of(ids_BT: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        mask = None if bool(real_BT.all()) else real_BT.long()
        z_NV = student(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits[:, :-1][real_BT[:, 1:]]
        if teacher is None:
            return F.cross_entropy(z_NV, ids_BT[:, 1:][real_BT[:, 1:]])
        with torch.no_grad():
            t_NV = teacher(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits[:, :-1][real_BT[:, 1:]]
        return F.kl_div(z_NV.log_softmax(-1), t_NV.log_softmax(-1), reduction="batchmean", log_target=True)

    train(job, Meter("torch", report), list(student.parameters()), loss_of)
    if job.save:
        student.save_pretrained(job.save)


if __name__ == "__main__":
    main()
