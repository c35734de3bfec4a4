"""nanokit's own loop (`distill.train`) on the same text, packed as its stage packs it, its state kept as always."""

from __future__ import annotations

import tempfile
from pathlib import Path

from distil_common import Meter, documents, read_job

from distill.data import pack
from distill.models import load_weights, new_model
from distill.options import DistillOptions
from distill.remembered import remembering
from distill.state import StateFolder
from distill.teacher import open_teacher
from distill.train import Pupil, Training, train
from nano.checkpoint import Checkpoint
from nano.corpus import Windows
from nano.families import weight_shapes
from nano.shapes import ModelShape, read_config


def main() -> None:
    """Pack, train."""
    job, report = read_job(__doc__)
    texts = documents(job)
    config, folder = read_config(Path(job.student)), Path(job.student)
    shape, teacher_shape = ModelShape.from_hf(config), ModelShape.from_hf(read_config(Path(job.teacher)))
    student = new_model(config)
    with Checkpoint(folder) as checkpoint:
        load_weights(student, {name: checkpoint.tensor(name) for name in weight_shapes(shape)})
    teacher = open_teacher(Path(job.teacher), teacher_shape, DistillOptions().teacher_precision, "cpu")
    meter = Meter("nanokit", report)
    with tempfile.TemporaryDirectory() as place, meter.measured():
        rows = pack(Windows(tuple(ids.numpy() for ids in texts)), job.length)
        job = job.over(len(rows))
        options = DistillOptions(
            steps=job.steps, batch=job.batch, length=job.length, learning_rate=job.rate, kd=1.0, curves=False
        )
        state = StateFolder(Path(place) / "state")
        state.start()
        pupil = Pupil(student, shape, state, {}, lambda _: {})
        remembered = remembering(teacher, rows, options, state.folder, "cpu")
        train(Training((pupil,), remembered, rows, options, "cpu"))
        meter.tokens, meter.steps = pupil.facts["tokens"], job.steps


if __name__ == "__main__":
    main()
