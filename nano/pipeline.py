"""`nanokit build`: a recipe's stages in order, each skipped where nothing it depends on has changed.

A stage's key is a hash of its name, its options, its inputs' fingerprints and nanokit's version. It is kept in
`build.json` beside the outputs; a stage runs again when its key differs or its output is not whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano.capabilities import Task
from nano.errors import CheckFailedError, NanokitError, RequestError
from nano.folder import human_bytes, write_text_atomically
from nano.hub import resolve_model
from nano.ladder import Ladder, Rung, agreement, draw_ladder, ladder_table
from nano.manifest import NAME as MANIFEST
from nano.manifest import add_results, fingerprint, has_manifest, read_manifest
from nano.progress import emit_json, say, show
from nano.recipe import BUILTIN_TEACHER, BUILTIN_TEXT, Recipe, StudentWish, read_recipe
from nano.scorecard_file import Asked, SavedCard, card_of, read_card, record_card, with_teacher, write_card
from nano.sources import fingerprints
from nano.version import __version__

STATE = "build.json"
PICTURE = "ladder.png"


@dataclass
class Build:
    """One run of a recipe: where it writes, and which keys its outputs have."""

    recipe: Recipe
    out: Path
    rebuild: bool
    keys: dict[str, Any]
    ran: int = 0
    skipped: int = 0

    def stage(self, name: str, target: Path, inputs: dict[str, Any], make: Callable[[], Any]) -> None:
        """Make `target` unless it is whole and was made from the same inputs."""
        self.stages(name, {target: inputs}, lambda _targets: make())

    def stages(self, name: str, inputs: Mapping[Path, Any], make: Callable[[list[Path]], Any]) -> None:
        """Make in one go those targets that are not whole, or were made from other inputs."""
        labels = {target: target.relative_to(self.out).as_posix() for target in inputs}
        keys = {target: _key(name, its) for target, its in inputs.items()}
        wanted = [t for t in inputs if self.rebuild or self.keys.get(labels[t]) != keys[t] or not is_whole(t)]
        for target in inputs:
            if target not in wanted:
                say(f"── {labels[target]}: unchanged")
        self.skipped += len(inputs) - len(wanted)
        if not wanted:
            return
        together = ", ".join(labels[target] for target in wanted)
        say(f"── {together}")
        for target in wanted:
            self.keys.pop(labels[target], None)
        start = time.monotonic()
        make(wanted)
        self.ran += len(wanted)
        self.keys.update({labels[target]: keys[target] for target in wanted})
        write_text_atomically(self.out / STATE, json.dumps(self.keys, indent=2) + "\n")
        say(f"   {together}: {time.monotonic() - start:.0f} s")


def _key(name: str, inputs: Mapping[str, Any]) -> str:
    """A hash of all that a stage's output depends on."""
    described = json.dumps({"stage": name, "version": __version__, **inputs}, sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def is_whole(target: Path) -> bool:
    """Whether a stage's output is there: every file of its manifest, of its recorded size (or the JSON file)."""
    if target.suffix == ".json":
        return target.is_file()
    if not (target / MANIFEST).is_file():
        return False
    files = read_manifest(target).files.items()
    return all((target / n).is_file() and (target / n).stat().st_size == entry["bytes"] for n, entry in files)


def run_recipe(path: Path, *, out: Path | None, rebuild: bool, json_mode: bool) -> int:
    """Build a recipe and print what was made and where.

    Returns:
        The exit status: 1 when a bundle does not fit its phone, else 0.

    Raises:
        RequestError: the recipe, or the folder to build in, cannot be used.
    """
    start = time.monotonic()
    recipe = read_recipe(path)
    quiz = _quiz(recipe)
    build = _open_build(recipe, out or Path(recipe.out or f"{recipe.name}-out"), rebuild)
    teacher, data, heldout = _inputs(recipe, build.out)
    _distill_all(build, teacher, data)
    if quiz:
        quiz = dataclasses.replace(quiz, teacher=_carded(build, build.out / "scorecard-teacher.json", teacher, quiz))
    rows, rungs = [], []
    for wish in recipe.students:
        for row, card in _build_student(build, wish, teacher, data, heldout, quiz):
            rows.append(row)
            rungs += [Rung(wish.name, row["stage"], card.card.capabilities)] if card else []
    ladder = Ladder(quiz.teacher.card.capabilities, tuple(rungs)) if quiz and quiz.teacher else None
    if ladder:
        draw_ladder(ladder, build.out / PICTURE)
    seconds = time.monotonic() - start
    samples = _sample(recipe, build.out)
    if json_mode:
        counts = {"ran": build.ran, "skipped": build.skipped, "seconds": seconds}
        drawn = {"ladder": ladder.as_dict()} if ladder else {}
        emit_json(
            {"recipe": recipe.name, "out": str(build.out), **counts, "artifacts": rows, **drawn, "sample": samples}
        )
    else:
        _print(recipe, build.out, rows, samples, ladder)
        say(f"{build.ran} stages run, {build.skipped} unchanged, {seconds:.0f} s; everything is in {build.out}/")
    return 0 if all(row.get("fits") is not False for row in rows) else CheckFailedError.exit_status


def _open_build(recipe: Recipe, out: Path, rebuild: bool) -> Build:
    """The folder to build in: ours from an earlier run, or a new one; never somebody else's."""
    state = out / STATE
    if out.exists() and not state.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(
            "The output folder exists and is not an earlier build.",
            found=str(out),
            expected=f"an empty or absent folder, or one with {STATE}",
            todo="choose another --out",
        )
    keys: dict[str, Any] = {}
    if state.is_file():
        try:
            keys = dict(json.loads(state.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            say(f"{state} cannot be read: everything is made again")
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(state, json.dumps(keys, indent=2) + "\n")
    return Build(recipe, out, rebuild, keys)


def _inputs(recipe: Recipe, out: Path) -> tuple[Path, list[Path], list[Path]]:
    """Teacher, training text, held-out text."""
    if recipe.teacher == BUILTIN_TEACHER:
        teacher: Path = _door("nano.demo.assets:teacher_folder")()
    else:
        teacher = resolve_model(recipe.teacher)
    if recipe.data == (BUILTIN_TEXT,):
        texts = _door("nano.demo.text:write_demo_text")(out / "text")
        return teacher, [texts["train"]], [texts["heldout"]]
    return teacher, [Path(p) for p in recipe.data], [Path(p) for p in recipe.heldout]


def _door(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _distill_all(build: Build, teacher: Path, data: list[Path]) -> None:
    """All students whose inputs changed, in one pass of the teacher."""
    recipe = build.recipe
    sizes = {build.out / w.name / "student": w.size for w in recipe.students if w.size != "teacher"}
    common = {"teacher": fingerprint(teacher), "data": fingerprints(data), "options": recipe.distill}

    def make(students: list[Path]) -> None:
        wanted = [(sizes[student], student) for student in students]
        _door("distill.run:run_distill_many")(teacher, wanted, data, recipe.distill, force=True, resume=None)

    build.stages("distill", {student: {**common, "size": size} for student, size in sizes.items()}, make)


def _build_student(
    build: Build, wish: StudentWish, teacher: Path, data: list[Path], heldout: list[Path], quiz: Quiz | None
) -> list[tuple[dict[str, Any], SavedCard | None]]:
    """A distilled student all the way; a row for each of its artifacts, with its scorecard."""
    recipe, home = build.recipe, build.out / wish.name
    home.mkdir(exist_ok=True)
    data_hashes = fingerprints(data)
    student = teacher if wish.size == "teacher" else home / "student"
    int4 = home / "int4"
    inputs = {"student": fingerprint(student), "data": data_hashes, "options": recipe.quantize}
    quantize = _door("quantize.run:run_quantize")

    def judged(stage: str, model: Path) -> tuple[dict[str, Any], SavedCard | None]:
        row = _evaluated(build, wish, home, stage, model, teacher, heldout)
        card = _carded(build, home / f"scorecard-{stage}.json", model, quiz) if quiz else None
        return {**row, **(card.scores if card else {})}, card

    # A stage is judged before the next is made of it: the next one's manifest repeats its scores.
    rows = [judged("student", student)]
    build.stage("quantize", int4, inputs, lambda: quantize(student, data, int4, recipe.quantize, force=True))
    rows.append(judged("int4", int4))
    for format in recipe.formats:
        bundle = home / format
        inputs = {"int4": fingerprint(int4), "options": recipe.export, "heldout": fingerprints(heldout)}
        _export_stage(build, format, bundle, int4, inputs, heldout)
        row, card = judged(format, bundle)
        rows.append(({**row, **_checked(bundle, wish.profile), "report": _reported(bundle)}, card))
    return rows


def _export_stage(
    build: Build, format: str, bundle: Path, int4: Path, inputs: dict[str, Any], heldout: list[Path]
) -> None:
    export = _door("export.run:run_export")
    build.stage(
        format, bundle, inputs, lambda: export(int4, format, bundle, build.recipe.export, data=heldout, force=True)
    )


def _evaluated(
    build: Build, wish: StudentWish, home: Path, stage: str, model: Path, teacher: Path, heldout: list[Path]
) -> dict[str, Any]:
    """A model's scores against the teacher, from disk where nothing changed, and in its manifest where it has one."""
    from nano.evaluate import EvaluateOptions, measure_folders
    from nano.report.measure import describe_divergence

    options = EvaluateOptions(build.recipe.evaluate.tokens, build.recipe.evaluate.sequence_length)
    target = home / f"scores-{stage}.json"

    def make() -> None:
        measured = measure_folders(model, heldout, teacher, options)
        found = {**measured.scores.as_dict(), "divergence": describe_divergence(measured, teacher, heldout, options)}
        write_text_atomically(target, json.dumps(found, indent=2) + "\n")

    settings = dataclasses.asdict(build.recipe.evaluate)
    inputs = {"model": fingerprint(model), "teacher": fingerprint(teacher), "options": settings}
    build.stage("evaluate", target, {**inputs, "heldout": fingerprints(heldout)}, make)
    scores = json.loads(target.read_text(encoding="utf-8"))
    divergence = scores.pop("divergence", None)
    if divergence and has_manifest(model) and read_manifest(model).results.get("divergence") != divergence:
        add_results(model, {"divergence": divergence})
    # Without the manifest, which grows as figures are added to it.
    size = sum(p.stat().st_size for p in model.rglob("*") if p.is_file() and p.name != MANIFEST)
    row = {"student": wish.name, "stage": stage, "path": str(model), "bytes": size, **scores}
    if has_manifest(model):
        row["parity"] = read_manifest(model).results.get("parity")
    return row


@dataclass(frozen=True)
class Quiz:
    """What every model is asked.

    Attributes:
        asked: as it was named.
        tasks: the questions.
        teacher: the teacher's scorecard; None before it was asked.
    """

    asked: Asked
    tasks: tuple[Task, ...]
    teacher: SavedCard | None = None


def _quiz(recipe: Recipe) -> Quiz | None:
    """The recipe's questions, where it has any; loaded before any work."""
    if not recipe.tasks:
        return None
    options = recipe.evaluate
    asked = Asked(recipe.tasks, Path(options.task_data) if options.task_data else None, options.questions)
    return Quiz(asked, asked.load())


def _carded(build: Build, target: Path, model: Path, quiz: Quiz) -> SavedCard:
    """A model's scorecard, from disk where nothing changed, and in its manifest where it has one."""

    def against_teacher(card: SavedCard) -> SavedCard:
        return with_teacher(card, quiz.teacher) if quiz.teacher else card

    hashes = {task.name: [question.hash for question in task.questions] for task in quiz.tasks}
    theirs = quiz.teacher.model["fingerprint"] if quiz.teacher else None
    build.stage(
        "ask", target, {"model": fingerprint(model), "questions": hashes, "teacher": theirs},
        lambda: write_card(target, against_teacher(card_of(model, quiz.asked, quiz.tasks))),
    )  # fmt: skip
    card = against_teacher(read_card(target))
    if has_manifest(model) and read_manifest(model).results.get("scorecard") != card.as_dict():
        record_card(model, card)
    return card


def _checked(bundle: Path, profile: str | None) -> dict[str, Any]:
    """A bundle's memory verdict on the phone it is for."""
    if profile is None:
        return {}
    verdict = _door("device_profiles.check:check_bundle")(bundle, profile)
    return {"profile": profile, "fits": verdict.fits, "peak_bytes": verdict.peak_bytes}


def _sample(recipe: Recipe, out: Path) -> dict[str, str]:
    """What each artifact of the last student says to the recipe's prompt."""
    from nano.lm import generate, open_model

    texts = {}
    for wish in recipe.students:
        for format in recipe.formats:
            model = open_model(out / wish.name / format)
            try:
                ids = generate(model, recipe.prompt, 40)
                texts[f"{wish.name}/{format}"] = model.tokenizer.continued(recipe.prompt, ids)
            except NanokitError as error:
                texts[f"{wish.name}/{format}"] = f"({error.problem})"
            finally:
                model.close()
    return texts


def _reported(bundle: Path) -> str:
    """The page about a bundle, beside it; its files were hashed when they were written."""
    from nano.report.run import run_report

    page = bundle.with_suffix(".html")
    run_report(bundle, page, hashed=False, force=True)
    return str(page)


def _print(
    recipe: Recipe, out: Path, rows: list[dict[str, Any]], samples: dict[str, str], ladder: Ladder | None
) -> None:
    from rich.table import Table

    table = Table(title=f"{recipe.name}: what was made, in {out}/", title_justify="left")
    for heading in ("folder", "size", "perplexity", "KL to teacher", "same top", "phone"):
        table.add_column(heading, justify="left" if heading in ("folder", "phone") else "right")
    for row in rows:
        phone = f"{row['profile']}: {'fits' if row['fits'] else 'TOO BIG'}" if "profile" in row else ""
        figures = (f"{row['perplexity']:.3f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}")
        table.add_row(f"{row['student']}/{row['stage']}", human_bytes(row["bytes"]), *figures, phone)
    table.caption = f"perplexity of the teacher: {rows[0]['reference_perplexity']:.3f}"
    show(table)
    if ladder:
        show(ladder_table(ladder))
        say(f"{agreement(ladder)}; the ladder is drawn in {out / PICTURE}")
    pages = [str(Path(row["report"]).relative_to(out)) for row in rows if "report" in row]
    say(f"a page about each bundle, in {out}/: {', '.join(pages)}")
    for name, text in samples.items():
        say(f"{name} says: {text}")
