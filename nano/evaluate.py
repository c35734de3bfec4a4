"""Evaluate any stage's model on text, alone or against a reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano.baseline import Baseline, units_of
from nano.corpus import Ids, Windows, cut_windows, describe_data, read_documents
from nano.divergence import TokenFigures
from nano.errors import RequestError
from nano.lm import Activations, LanguageModel, open_model, stage_of
from nano.machine import runtime_of
from nano.manifest import fingerprint, has_manifest, read_manifest
from nano.metrics import Meter, Scores
from nano.progress import track
from nano.reference_file import ReferenceWriter, StoredReference, facts_of, is_stored, read_facts
from nano.tokens import TextTokenizer

BATCH = 16
BATCH_BYTES = 256 << 20
"""Most bytes of logits that are held at a time, of the model and of the reference each; a window always fits."""
SIMULATIONS: dict[str, Activations] = {"executorch": "int8-xnnpack", "onnx": "int8-ort"}
"""How torch simulates the int8 activations of each kind of bundle."""


def simulation_for(requested: str, model: Path, reference: Path | None) -> tuple[Activations, Activations]:
    """Which activations the model and the reference are opened with.

    "int8" applies to the int4 folder among the two (the model first) and follows the runtime of the bundle it is
    compared with, XNNPACK's where there is none.

    Raises:
        RequestError: neither is an int4 folder.
    """
    if requested == "float":
        return "float", "float"
    stages = (stage_of(model), None if reference is None else stage_of(reference))
    if "int4" not in stages:
        raise RequestError(
            "--activations is about int4 folders, and none is named.",
            found=" and ".join(f"'{stage}'" for stage in stages if stage),
            todo="leave it out, or name the int4 folder as MODEL or --reference",
        )
    chosen: Activations = {"int8-xnnpack": "int8-xnnpack", "int8-ort": "int8-ort"}.get(requested, "int8-xnnpack")  # type: ignore[assignment]
    if requested == "int8":
        chosen = next((SIMULATIONS[stage] for stage in stages if stage in SIMULATIONS), chosen)
    return (chosen, "float") if stages[0] == "int4" else ("float", chosen)


def score(model: LanguageModel, windows: Windows, reference: LanguageModel | None = None) -> Scores:
    """Figures of a model over token windows, with progress."""
    return measure(model, windows, reference).scores()


def measure(
    model: LanguageModel,
    windows: Windows,
    reference: LanguageModel | StoredReference | None = None,
    keep: ReferenceWriter | None = None,
) -> Meter:
    """A meter that took every window, with progress.

    Args:
        model: what is measured.
        windows: of text.
        reference: another model, or what was kept of one.
        keep: takes what the model says, for others to be measured against.
    """
    meter = Meter()
    with track("evaluate", windows.tokens, "tokens") as progress:
        for batch in _batches(windows, model.vocab_size):
            ours = model.logits(batch)
            if isinstance(reference, StoredReference):
                for ids, one in zip(batch, ours, strict=True):
                    meter.take(reference.figures(ids, one))
            else:
                theirs: Sequence[Any] = [None] * len(batch) if reference is None else reference.logits(batch)
                for ids, one, other in zip(batch, ours, theirs, strict=True):
                    meter.add(ids, one, other)
            if keep is not None:
                for ids, one in zip(batch, ours, strict=True):
                    keep.add(ids, one)
            progress.advance(sum(len(ids) - 1 for ids in batch), note=f"perplexity {meter.perplexity:.3f}")
    return meter


def _batches(windows: Windows, vocab_size: int) -> Iterator[tuple[Ids, ...]]:
    """Windows in order, a few at a time."""
    longest = max(len(ids) for ids in windows.ids)
    size = min(BATCH, max(1, BATCH_BYTES // (4 * longest * vocab_size)))
    return (windows.ids[start : start + size] for start in range(0, len(windows.ids), size))


@dataclass(frozen=True)
class EvaluateOptions:
    """On how much text, and how.

    Attributes:
        tokens: predicted tokens at most.
        sequence_length: longest window.
        activations: see `simulation_for`.
    """

    tokens: int = 8192
    sequence_length: int = 256
    activations: str = "float"


def evaluate_by_document(
    model_folder: Path,
    data: Sequence[Path],
    reference_folder: Path | None,
    options: EvaluateOptions,
    keep: Path | None = None,
) -> tuple[Scores, Baseline]:
    """The scores, and what a gate needs of them: each document's, and what all was measured on, by hash.

    See `measure_folders`.

    Raises:
        RequestError: the two have different vocabularies.
        BadFileError: a folder or the text cannot be used.
    """
    found = measure_folders(model_folder, data, reference_folder, options, keep)
    text = describe_data(data, tokens=options.tokens)["files"]
    return found.scores, Baseline(
        model=model_entry(model_folder),
        data=_data_entry(text, options),
        units=units_of(found.windows, found.figures, found.tokenizer),
        reference=None if reference_folder is None else _reference_entry(reference_folder),
        activations=options.activations,
        scores=found.scores.as_dict(),
    )


def model_entry(folder: Path) -> dict[str, Any]:
    """How a record names a model that was measured; of a bundle also what decides its last bits (`nano.machine`)."""
    entry: dict[str, Any] = {"path": str(folder), "fingerprint": fingerprint(folder), "kind": stage_of(folder)}
    runtime = runtime_of(read_manifest(folder)) if has_manifest(folder) else {}
    return {**entry, "runtime": runtime} if runtime else entry


def _reference_entry(reference: Path) -> dict[str, Any]:
    """How a record names a reference: the model itself, whether it was run or kept."""
    return {**read_facts(reference).model, "stored": str(reference)} if is_stored(reference) else model_entry(reference)


@dataclass(frozen=True)
class Measured:
    """What a model said of some text.

    Attributes:
        scores: over all of it.
        windows: the token windows.
        figures: of each window, token by token.
        tokenizer: that read the text.
    """

    scores: Scores
    windows: Windows
    figures: tuple[TokenFigures, ...]
    tokenizer: TextTokenizer


def measure_folders(
    model_folder: Path,
    data: Sequence[Path],
    reference: Path | None,
    options: EvaluateOptions,
    keep: Path | None = None,
) -> Measured:
    """Open a model (and a reference), cut windows from text that both can hold, and measure every token.

    Args:
        model_folder: what is measured.
        data: the text.
        reference: another model, or a file that was kept of one (`nano.reference_file`).
        options: on how much of it, and how.
        keep: where to keep what the model says, for others to be measured against.

    Raises:
        RequestError: the two have different vocabularies.
        BadFileError: a folder or the text cannot be used.
    """
    documents = read_documents(data)
    files = describe_data(data, tokens=options.tokens)["files"]
    stored = StoredReference(reference) if reference is not None and is_stored(reference) else None
    with contextlib.ExitStack() as stack:
        if stored is not None:
            stack.callback(stored.close)
            stored.check_text(files, options.tokens, options.sequence_length)
        live = None if stored is not None else reference
        ours, theirs = simulation_for(options.activations, model_folder, live)
        model = open_model(model_folder, activations=ours)
        stack.callback(model.close)
        limit = min(model.context, options.sequence_length)
        against: LanguageModel | StoredReference | None = stored
        if stored is not None:
            check_stored(model, stored)
            limit = stored.facts.length
        elif live is not None:
            other = open_model(live, activations=theirs)
            stack.callback(other.close)
            check_same_vocabulary(model, other)
            against, limit = other, min(limit, other.context)
        windows = cut_windows(documents, model.tokenizer, limit, max_tokens=options.tokens)
        writer = None
        if keep is not None:
            facts = facts_of(model_entry(model_folder), _data_entry(files, options), model, windows, limit)
            writer = stack.enter_context(ReferenceWriter(keep, facts))
        meter = measure(model, windows, against, writer)
        return Measured(meter.scores(), windows, tuple(meter.windows), model.tokenizer)


def _data_entry(files: Sequence[Any], options: EvaluateOptions) -> dict[str, Any]:
    return {"files": files, "tokens": options.tokens, "sequence_length": options.sequence_length}


class OtherVocabularyError(RequestError):
    """Two models' tokenizers give different ids."""


def check_same_vocabulary(model: LanguageModel, reference: LanguageModel) -> None:
    """Raise RequestError when two models' tokenizers give different ids; padded embeddings do not matter."""
    ours = model.tokenizer.backend.get_vocab(with_added_tokens=True)
    theirs = reference.tokenizer.backend.get_vocab(with_added_tokens=True)
    if ours != theirs:
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        raise OtherVocabularyError(
            "The model and the reference have different vocabularies, so their logits cannot be compared.",
            found=f"{len(ours)} and {len(theirs)} tokens; {len(differing)} differ, the first is {differing[0]!r}",
            todo="name a reference of the same teacher",
        )


def check_stored(model: LanguageModel, stored: StoredReference) -> None:
    """Raise RequestError when a stored reference cannot be compared with a model."""
    if not stored.has_vocabulary_of(model):
        raise OtherVocabularyError(
            "The model and the stored reference have different vocabularies, so they cannot be compared.",
            found=f"{model.vocab_size} logits",
            expected=f"the {stored.facts.vocab_size} of {stored.facts.model['path']}",
            todo="name a reference of the same teacher",
        )  # fmt: skip
    stored.check_context(model)
