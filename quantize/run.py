"""The quantize stage: a float student in, an int4 folder out, one decoder layer in memory at a time.

Everything that can be checked is checked first. Then each layer is read, its linears are solved in the order in
which data flows (each seeing inputs that the already quantized ones before it produce), packed and written.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nano.errors import RequestError
from nano.exportable import warn_of_export
from nano.families import family_of
from nano.folder import check_output, human_bytes, require_space, staged_folder
from nano.manifest import Manifest, input_entry, library_versions, write_manifest
from nano.progress import console, say, warn
from nano.shapes import ModelShape, read_config
from nano.tokens import FILE as TOKENIZER
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.budget import Choice, Room, bits_record, choose_bits, curve_table, find_room
from quantize.calibrate import Calibration, draw_training_windows, draw_windows, with_noise
from quantize.fold import folded, head_stays_tied, prepared, with_rotation
from quantize.options import END_TO_END, QuantizeOptions
from quantize.produce import Job, write_tensors
from quantize.recipe import (
    Grid,
    QuantRecipe,
    check_grids,
    check_rules,
    default_recipe,
    padding_multiple,
)
from quantize.report import write_report
from quantize.rules import Rule
from quantize.runtimes import check_runtime
from quantize.student import Student

TRAINING_BYTES = 24
"""A parameter's share of memory in training, float32: float original, forward weight, its gradient and u's, and
Adam's two moments."""


def run_quantize(
    student: Path,
    data: Sequence[Path],
    out: Path,
    options: QuantizeOptions,
    force: bool = False,
    recipe: QuantRecipe | None = None,
) -> Manifest:
    """Quantize a float HF folder to an int4 folder with a manifest.

    Args:
        student: a float HF folder.
        data: calibration text; may be empty for methods that read none (rtn).
        out: the folder to make.
        options: see `QuantizeOptions`.
        force: replace `out` where it exists, once the new one is complete.
        recipe: which module gets which grid; by default every decoder linear as the options say.

    Raises:
        RequestError: bad input of any kind; nothing was written.
        WorkError: the calibration text drives the model to numbers that are not finite.
    """
    from quantize.journal import Journal

    check_output(out, force=force, made_from=(student, *data))
    if options.method in ("bnb-nf4", "bnb-int8"):
        from quantize.bnb import quantize_bnb

        return quantize_bnb(student, out, options, force)
    shape, asked = _shape_of(student), options
    options = with_rotation(student, _that_can_run(options, shape, bool(data)))
    own = recipe.rules if recipe else options.rules
    recipe = recipe or default_recipe(options, head_stays_tied(student, options))
    with Student(student, padding_multiple(shape, recipe)) as source:
        model, done = prepared(source, options)
        require_space(out, 3 * model.shape.num_parameters)
        texts, recipe, choice = _texts_and_recipe(student, model, data, recipe, own, options)
        _say_prepared(model, done)
        manifest = Manifest(
            kind="int4",
            inputs={"student": input_entry(student)},
            recipe={**asdict(options), "rules": recipe.describe(), "method": asked.method, "ran": options.method},
            data=texts.record(),
            shape=asdict(model.shape),
        )
        request = {"inputs": manifest.inputs, "recipe": manifest.recipe, "data": manifest.data}
        journal = Journal(out, {**request, "versions": library_versions()})
        grids = recipe.grids(model.shape)
        job = Job(
            model, grids, options, texts.calibration if options.method != "rtn" else None, texts.training, journal
        )
        with journal.kept_if_interrupted(), staged_folder(out, force=force) as folder:
            view, folds = folded(model, grids, options, texts.calibration, journal)
            results = {**write_tensors(replace(job, model=view), folder), **bits_record(model.shape, grids), **folds}
            results.update(choice.as_dict() if choice else {}, **done)
            copy_tokenizer(student, folder)
            manifest = replace(manifest, results=results)
            write_report(folder, manifest, student)
            return write_manifest(folder, manifest)


def _shape_of(student: Path) -> ModelShape:
    """A float model's dimensions; says what export will refuse of it."""
    config = read_config(student)
    shape = ModelShape.from_hf(config)
    warn_of_export(config, family_of(shape.family))
    return shape


def _say_prepared(model: Student, done: Mapping[str, Any]) -> None:
    """What was widened and reordered, and what dead neurons are used for."""
    if model.padding:
        before, after = model.source_shape.intermediate_size, model.shape.intermediate_size
        say(f"the feed-forward width {before} is padded to {after} with zero neurons (exact), so that whole groups fit")
    if split := done.get("neurons_split"):
        say(f"{split} neurons that add nothing hold halves of the weightiest instead (exact)")
    if done.get("channels_sorted"):
        say("channels are sorted so that like weights share a scale (exact; adapters of the float model will not fit)")


@dataclass(frozen=True)
class Texts:
    """Windows of a run.

    Attributes:
        calibration: for solving, folding and the budget, or None where nothing reads text.
        training: for the methods that train end to end, or None.
    """

    calibration: Calibration | None
    training: Calibration | None

    def record(self) -> dict[str, Any]:
        """What a manifest says of them."""
        record = {**self.calibration.record} if self.calibration else {}
        return {**record, "training": self.training.record} if self.training else record


def _texts_and_recipe(
    student: Path,
    model: Student,
    data: Sequence[Path],
    recipe: QuantRecipe,
    own: tuple[Rule, ...],
    options: QuantizeOptions,
) -> tuple[Texts, QuantRecipe, Choice | None]:
    """The windows that a run needs, and its recipe once a budget is spent (with what was chosen, else None).

    Raises:
        RequestError: a grid that does not fit, no text where it is needed, or a budget that cannot be met.
    """
    grids = _checked_grids(model.shape, recipe, own, options)
    tokenizer = load_tokenizer(student, model.shape.vocab_size)
    room = find_room(model.shape, grids, options, _tokenizer_bytes(student))
    text = _calibration(data, tokenizer, options, model) if options.reads_text or room else None
    training = None
    if options.method in END_TO_END:
        training = draw_training_windows(data, tokenizer, options, model.shape.max_positions)
    choice = _spend(room, model, recipe, text, options)
    return Texts(text, training), choice.recipe if choice else recipe, choice


def _spend(
    room: Room | None, model: Student, recipe: QuantRecipe, text: Calibration | None, options: QuantizeOptions
) -> Choice | None:
    """Decide which linears get 8 bits, where a budget was given, and show the curve."""
    import torch

    if room is None:
        return None
    assert text is not None
    windows = [torch.from_numpy(window) for window in text.windows.ids]
    choice = choose_bits(model, recipe, room, windows, options.seed)
    console().print(curve_table(choice))
    return choice


def _tokenizer_bytes(folder: Path) -> int:
    path = folder / TOKENIZER
    return path.stat().st_size if path.is_file() else 0


def _that_can_run(options: QuantizeOptions, shape: ModelShape, has_data: bool) -> QuantizeOptions:
    """The options with a method that this machine and this request allow.

    The solving methods need one layer's memory, training end to end all of the model's: best then tunes layer by
    layer. Without text fast is rtn.

    Raises:
        RequestError: recover does not fit in memory; says how much is needed and what to do.
    """
    if options.method == "fast" and not has_data:
        say("fast without --data is rtn: each weight to its nearest code")
        return replace(options, method="rtn")
    if options.method == "awq":
        return replace(options, method="rtn", awq=True)
    needed, free = TRAINING_BYTES * shape.num_parameters, _free_memory()
    if options.method not in END_TO_END or needed <= free:
        return options
    if options.method == "best":
        warn(
            f"training the whole model takes about {human_bytes(needed)} and {human_bytes(free)} are there: "
            f"best tunes it layer by layer instead"
        )
        return replace(options, method="tune")
    raise RequestError(
        "This machine's memory cannot hold the training of a model of this size.",
        found=f"{human_bytes(free)}",
        expected=f"about {human_bytes(needed)} ({TRAINING_BYTES} bytes a parameter)",
        todo="use --method tune, which trains one layer at a time, or a machine with more memory",
    )


def _free_memory() -> int:
    """Bytes of the memory that training would use: the GPU's where there is one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _checked_grids(
    shape: ModelShape, recipe: QuantRecipe, own: tuple[Rule, ...], options: QuantizeOptions
) -> dict[str, Grid]:
    """The grid of every module on one, if they fit the widths and the runtime asked for.

    Raises:
        RequestError: they do not, or a rule matches nothing.
    """
    grids = recipe.grids(shape)
    check_grids(shape, grids)
    check_runtime(shape, {n: (g.bits, g.group_size, g.symmetric) for n, g in grids.items()}, options.runtime)
    for words in check_rules(shape, recipe, own):
        warn(words)
    return grids


def _calibration(data: Sequence[Path], tokenizer: Any, options: QuantizeOptions, model: Student) -> Calibration:
    if not data:
        raise RequestError(
            f"{_who_reads(options)} needs calibration text.",
            expected="--data FILE, a text or JSONL file like what the model will be used on (may be repeated)",
            todo="give --data" + ("" if options.method == "rtn" else ", or use --method rtn, which reads none"),
        )
    from quantize.suitability import examine_and_warn

    drawn = draw_windows(data, tokenizer, options, model.shape.max_positions)
    checked = examine_and_warn(model, tokenizer, drawn.windows)
    return replace(with_noise(drawn, options), record={**drawn.record, "checked": checked})


def _who_reads(options: QuantizeOptions) -> str:
    """The option that makes calibration text necessary."""
    if options.method != "rtn":
        return f"--method {options.method}"
    if options.awq or options.rotation in ("heads", "learned"):
        return "--awq" if options.awq else f"--rotation {options.rotation}"
    return "--bits-budget" if options.bits_budget else "--profile"
