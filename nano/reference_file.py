"""A file of what a reference says of one text: made once, read by every evaluation against it.

    line 1           JSON: what it was made from, how, on what text
    for each window  16 bytes, the hash of its ids; 4 bytes, its predicted tokens; then their records (`nano.reference`)
    last 32 bytes    sha256 of all before

Written and read as a stream, a window at a time. The checksum is verified before anything else is done, and every
window says which ids it is of, so that other text or another tokenizer is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from nano.corpus import Windows
from nano.divergence import Ids, TokenFigures
from nano.errors import BadFileError, NoSpaceError, RequestError
from nano.folder import is_no_space
from nano.lm import LanguageModel, Logits
from nano.manifest import library_versions
from nano.reference import RECORD_BYTES, RecordForm, make_records, stored_figures
from nano.tokens import TextTokenizer

FORMAT, SCHEMA_VERSION = "nanokit reference", 1
_START = b'{"format": "nanokit reference"'
_WINDOW = struct.Struct("<16sI")
_DIGEST = 32
_PIECE = 1 << 20
_TODO = "make it again: nanokit evaluate REFERENCE --data TEXT --save-reference FILE"


@dataclass(frozen=True)
class ReferenceFacts:
    """The first line of the file.

    Attributes:
        model: {"path", "fingerprint", "kind"} of the reference.
        data: {"files": [{"path", "sha256"}], "tokens", "sequence_length"}.
        vocabulary: hash of the tokenizer's, see `vocabulary_hash`.
        vocab_size: columns of its logits.
        length: ids of the longest window that was possible.
        windows, tokens: how many; predicted tokens.
        record_bytes: of a record.
        seed: of the draws.
        command, created, versions: how it came about.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    vocabulary: str
    vocab_size: int
    length: int
    windows: int
    tokens: int
    record_bytes: int = RECORD_BYTES
    seed: int = 0
    command: tuple[str, ...] = ()
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def form(self) -> RecordForm:
        """How its records are laid out."""
        return RecordForm(self.vocab_size, self.record_bytes)


def is_stored(path: Path) -> bool:
    """Whether a path is such a file, by its beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def vocabulary_hash(tokenizer: TextTokenizer) -> str:
    """Of a tokenizer's ids and what they stand for; how they are decoded may differ between a model and its bundle."""
    entries = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def facts_of(
    entry: Mapping[str, Any], data: Mapping[str, Any], model: LanguageModel, windows: Windows, length: int
) -> ReferenceFacts:
    """What a file says of a model that is about to be asked.

    Args:
        entry, data: see `ReferenceFacts`.
        model: the reference.
        windows: of the text.
        length: the longest window that was possible.
    """
    return ReferenceFacts(
        dict(entry), dict(data), vocabulary_hash(model.tokenizer), model.vocab_size, length, len(windows.ids),
        windows.tokens, command=("nanokit", *sys.argv[1:]),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"), versions=library_versions(),
    )  # fmt: skip


class ReferenceWriter:
    """Writes the file beside its place; it gets its name when the block ends well and all windows are there.

    Raises:
        RequestError: the place cannot be written to.
        NoSpaceError: the disk filled up; nothing is left behind.
    """

    def __init__(self, path: Path, facts: ReferenceFacts) -> None:
        self.path, self.facts = path, facts
        self._beside = path.with_name(path.name + ".partial")
        self._digest = hashlib.sha256()
        self._count = 0

    def __enter__(self) -> ReferenceWriter:
        try:
            self._file: IO[bytes] = self._beside.open("wb")
        except OSError as error:
            raise RequestError("The file cannot be written.", found=f"{self.path}: {error.strerror}") from None
        self._write(json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self.facts)}).encode() + b"\n")  # noqa: E501  # fmt: skip
        return self

    def add(self, ids: Ids, logits: Logits) -> None:
        """The next window: its ids (T + 1,) and the reference's logits (T + 1, V)."""
        random = np.random.default_rng([self.facts.seed, self._count])
        records = make_records(self.facts.form, logits[:-1], ids[1:], random)
        self._write(_WINDOW.pack(_window_hash(ids), len(records)) + records.tobytes())
        self._count += 1

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise _full(error, self.path) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:  # noqa: E501  # fmt: skip
        try:
            if kind is None:
                assert self._count == self.facts.windows
                self._file.write(self._digest.digest())
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                self._beside.replace(self.path)
        except OSError as problem:
            raise _full(problem, self.path) from None
        finally:
            self._beside.unlink(missing_ok=True)


def _full(error: OSError, path: Path) -> Exception:
    if is_no_space(error):
        return NoSpaceError("The disk is full; nothing was left behind.", found=str(error), todo=f"free some space under {path.parent}")  # noqa: E501  # fmt: skip
    return RequestError("The file cannot be written.", found=f"{path}: {error.strerror}")


class StoredReference:
    """A file, opened for one evaluation; windows are asked for in the order in which they were written.

    Raises:
        BadFileError: not such a file, of another schema, truncated or changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _verify(path)
        self.facts = read_facts(path)
        self._file = path.open("rb")
        self._file.readline()
        self._left = self.facts.windows

    def figures(self, ids: Ids, logits: Logits) -> TokenFigures:
        """The figures of the next window of a model.

        Raises:
            RequestError: the window is not the one that was kept.
        """
        digest, count = _WINDOW.unpack(self._file.read(_WINDOW.size)) if self._left else (b"", 0)
        if digest != _window_hash(ids) or count != len(ids) - 1:
            raise RequestError(
                "The stored reference is of other token ids.",
                found=f"window {self.facts.windows - self._left + 1} of {self.facts.windows} differs",
                expected=f"the text, --tokens and --sequence-length of {self.path}, and its tokenizer", todo=_TODO,
            )  # fmt: skip
        self._left -= 1
        size = self.facts.record_bytes
        records = np.frombuffer(self._file.read(count * size), np.uint8).reshape(count, size)
        return stored_figures(self.facts.form, records, ids, logits)

    def check_text(self, files: Sequence[Mapping[str, Any]], tokens: int, sequence_length: int) -> None:
        """Refuse other text, or other windows of it, before a model is opened.

        Raises:
            RequestError: says what differs.
        """
        data = self.facts.data
        ours = [entry["sha256"] for entry in files]
        if ours != [entry["sha256"] for entry in data["files"]]:
            raise RequestError(
                "The text is not the one that the stored reference is of.", found=_named(files),
                expected=_named(data["files"]), todo=f"give the same text, or {_TODO}",
            )  # fmt: skip
        for name, asked in (("tokens", tokens), ("sequence_length", sequence_length)):
            if asked != data[name]:
                raise RequestError(
                    f"The stored reference was made with another --{name.replace('_', '-')}.", found=str(asked),
                    expected=str(data[name]), todo=f"--{name.replace('_', '-')} {data[name]}",
                )  # fmt: skip

    def has_vocabulary_of(self, model: LanguageModel) -> bool:
        """Whether a model's ids are those of the reference, and it has logits for all of them."""
        return vocabulary_hash(model.tokenizer) == self.facts.vocabulary and model.vocab_size >= self.facts.vocab_size

    def check_context(self, model: LanguageModel) -> None:
        """Raise RequestError when a model's context is shorter than the windows."""
        if model.context < self.facts.length:
            raise RequestError(
                "The model's context is shorter than the stored reference's windows.", found=str(model.context),
                expected=f"at least {self.facts.length}",
                todo=f"make the reference with --sequence-length {model.context}",
            )  # fmt: skip

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _named(files: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{entry['path']} (sha256 {entry['sha256'][:12]})" for entry in files)


def _window_hash(ids: Ids) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i4").tobytes(), digest_size=16).digest()


def _verify(path: Path) -> None:
    """The checksum, and that the file has the length that its first line promises."""
    if not is_stored(path):
        raise BadFileError("This is not a stored reference.", found=str(path), todo=_TODO)
    digest, left = hashlib.sha256(), path.stat().st_size - _DIGEST
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
        whole = left == 0 and file.read() == digest.digest()
    if not whole:
        raise BadFileError("The stored reference is truncated or damaged.", found=f"{path}: its checksum does not match", todo=_TODO)  # noqa: E501  # fmt: skip


def read_facts(path: Path) -> ReferenceFacts:
    """The first line of a file whose checksum is right, or was.

    Raises:
        BadFileError: it is of another schema.
    """
    with path.open("rb") as file:
        raw = json.loads(file.readline())
    if raw.pop("schema_version", None) != SCHEMA_VERSION or raw.pop("format") != FORMAT:
        raise BadFileError(
            "The stored reference is of a form that this nanokit does not know.", found=str(path),
            expected=f"schema_version {SCHEMA_VERSION}", todo=_TODO,
        )  # fmt: skip
    return replace(ReferenceFacts(**raw), command=tuple(raw["command"]))
