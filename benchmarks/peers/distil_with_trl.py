"""TRL: `trl.experimental.gkd.GKDTrainer`, off-policy (lmbda 0), forward KL (beta 0), float32."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from distil_common import Meter, documents, load_float, padded, read_job
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What its loss asks for; a prompt of one token, so that all others count."""
    ids_BT, real_BT = padded([torch.tensor(feature["input_ids"]) for feature in features])
    return {
        "input_ids": ids_BT, "attention_mask": real_BT.long(), "labels": ids_BT.masked_fill(~real_BT, -100),
        "prompts": ids_BT[:, :1], "prompt_attention_mask": real_BT[:, :1].long(),
    }  # fmt: skip


def main() -> None:
    """Train by its trainer; save the student if asked."""
    job, report = read_job(__doc__)
    texts = documents(job)
    job = job.over(len(texts))
    meter, waiting = Meter("trl", report), list[int]()

    class Counting(TrainerCallback):
        """Counts tokens, and stops when the time is over; the trainer collates a batch ahead of its step."""

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            meter.count(waiting.pop(0))
            control.should_training_stop = control.should_training_stop or meter.done(job) >= 1

    def counted(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(features)
        waiting.append(int(batch["attention_mask"].sum()))
        return batch

    student = load_float(job.student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=job.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: meter.rate(job) if hasattr(meter, "begun") else 1e-3
    )
    with tempfile.TemporaryDirectory() as place:
        config = GKDConfig(
            output_dir=place, max_steps=job.steps or 10**6, per_device_train_batch_size=job.batch, lmbda=0.0, beta=0.0,
            temperature=1.0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_steps=10**6, dataloader_pin_memory=False, max_length=job.length,
            disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = GKDTrainer(
            model=student, teacher_model=load_float(job.teacher), args=config, data_collator=counted,
            train_dataset=Dataset.from_list([{"input_ids": ids.tolist()} for ids in texts]),
            processing_class=AutoTokenizer.from_pretrained(job.student, local_files_only=True),
            callbacks=[Counting()], optimizers=(optimizer, schedule),
        )  # fmt: skip
        with meter.measured():
            trainer.train()
    if job.save:
        student.save_pretrained(job.save)


if __name__ == "__main__":
    main()
