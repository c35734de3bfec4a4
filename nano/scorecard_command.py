"""What `nanokit evaluate --tasks` does and shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nano.ci import check_report
from nano.evaluate import simulation_for
from nano.progress import emit_json, say, show
from nano.scorecard_file import (
    Asked,
    SavedCard,
    answers_as_dict,
    card_of,
    check_asked,
    check_recordable,
    read_card,
    record_card,
    with_teacher,
    write_card,
)

if TYPE_CHECKING:
    from rich.table import Table


def split_names(given: Sequence[str]) -> tuple[str, ...]:
    """Names that may be given one by one or with commas between them."""
    return tuple(name.strip() for word in given for name in word.split(",") if name.strip())


def evaluate_tasks(
    folder: Path, asked: Asked, *, reference: Path | None, activations: str, save: Path | None, record: bool, json: bool
) -> int:
    """Ask a model the tasks, show its scorecard, and keep it where that was asked for.

    Args:
        folder: the model.
        asked: which tasks.
        reference: the teacher, a saved scorecard or a model: scores are shown as shares of its scores too.
        activations: of an int4 folder, see `nano.evaluate.simulation_for`.
        save: a JSON file to write.
        record: whether the scores go into the folder's manifest.json.
        json: whether to print JSON instead of a table.

    Raises:
        RequestError: a task or an option that cannot be; before anything is run where that can be known.
        BadFileError: a folder or file cannot be used.
    """
    if save is not None:
        check_report(save)
    if record:
        check_recordable(folder)
    teacher = read_card(reference) if reference is not None and reference.is_file() else None
    tasks = asked.load()
    if teacher is not None:
        check_asked(teacher, tasks)
    model = None if teacher is not None or reference is None else reference
    ours, theirs = simulation_for(activations, folder, model)
    if model is not None:
        teacher = card_of(model, asked, tasks, theirs)
    saved = card_of(folder, asked, tasks, ours)
    if teacher is not None:
        saved = with_teacher(saved, teacher)
    if save is not None:
        write_card(save, saved)
        say(f"saved {save}: {saved.size} questions")
    if record:
        record_card(folder, saved)
    if json:
        emit_json({"model": str(folder), "activations": ours, **saved.as_dict(), "answers": answers_as_dict(saved)})
    else:
        show(table_of(saved))
    return 0


def table_of(saved: SavedCard) -> Table:
    """Scores by capability, its tasks below it."""
    from rich.table import Table

    shares = bool(saved.card.of_teacher)
    table = Table(
        "capability", "score", "questions", *(["of the teacher's"] if shares else []), title=saved.model["path"]
    )
    for name, score in saved.card.capabilities.items():
        share = "" if score.of_teacher is None else f"{score.of_teacher:.1%}"
        table.add_row(name, _score(score.score, score.error), f"{score.questions:,}", *([share] if shares else []))
        for task_name, task in saved.card.tasks.items():
            if task.capability == name:
                cut = f" ({task.cut} cut)" if task.cut else ""
                table.add_row(f"  {task_name}, {task.metric}", _score(task.score, task.error), f"{task.questions:,}{cut}", style="dim")  # noqa: E501  # fmt: skip
    scores = [score.score for score in saved.card.capabilities.values()]
    if len(scores) > 1:
        table.add_row("mean of the capabilities", f"{sum(scores) / len(scores):.1%}", f"{saved.size:,}")
    return table


def _score(score: float, error: float | None) -> str:
    return f"{score:.1%}" if error is None else f"{score:.1%} ± {error:.1%}"
