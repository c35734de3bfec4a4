"""Text tokenised once: memory-mapped shards in a cache that is addressed by content.

Each part of a source (a file, a split) has a folder of its own, named by a hash of its content, of the tokenizer and
of the rules here. What is kept is tokens and where documents begin, so another --length, --seed or --batch
reads the same folder; a second run tokenises nothing. A folder is written beside its place and renamed when it
is whole; its index holds the sha256 of every file, checked on opening, and a folder that fails is made anew.

A shard: `N-ids.npy` (uint16 or uint32), `N-documents.npy` (one record a document), where it holds conversations
`N-answer.npy` (bool, what the assistant wrote), and where asked for `N-ends.npy` (uint32, where tokens end).
Memory: one shard while writing, none while reading.

The tokenizer's own threads (one a core) do the work; TOKENIZERS_PARALLELISM=false keeps it to one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nano.chat import Chat, render_chat
from nano.documents import Document
from nano.errors import BadFileError, NoSpaceError, RequestError
from nano.folder import is_no_space, sha256_file
from nano.progress import Track, track, warn
from nano.sources import Part, Source
from nano.tokens import TextTokenizer

FORMAT = 1
"""Raised when the same text would be stored otherwise."""

SHARD_TOKENS = 1 << 25
"""64 to 128 MiB of ids: what lies in memory while a shard is written."""

BATCH_CHARACTERS = 1 << 21
"""Handed to the tokenizer at once: enough work for its threads; about 100 MB of its results."""

FEW_DOCUMENTS = 20
LONGEST = 1 << 20
DOCUMENT = np.dtype([("length", "<u4"), ("chat", "?"), ("digest", "<u8")])
INDEX = "index.json"

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """Consecutive documents of one part.

    Attributes:
        ids: all their ids, one after another, without beginning ids where the document is a text.
        documents: for each its length in ids, whether it is a conversation, and a hash of its content.
        answer: bool for each id, what the assistant wrote; None where no document is a conversation.
        ends: the character of its document that each id ends at; None where that was not asked for.
    """

    ids: Ids
    documents: npt.NDArray[Any]
    answer: npt.NDArray[np.bool_] | None
    ends: npt.NDArray[np.uint32] | None = None


def cache_folder() -> Path:
    """$NANOKIT_CACHE, or nanokit/ in $XDG_CACHE_HOME or ~/.cache; may be deleted at any time."""
    if named := os.environ.get("NANOKIT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanokit"


def tokenize_sources(
    sources: Sequence[Source], tokenizer: TextTokenizer, cache: Path, *, ends: bool = False
) -> list[list[Shard]]:
    """The shards of each source, from the cache where they are there; with `ends`, of tokens too.

    Fewer than FEW_DOCUMENTS documents in all (a book, a text file) are cut at blank lines, line ends or spaces,
    so that some can be held out.

    Raises:
        BadFileError and its kinds: the text cannot be read.
        NoSpaceError: the cache's disk is full.
        RequestError: the cache cannot be written to.
    """
    cut = _are_few(sources)
    rules = json.dumps([FORMAT, _tokenizer_hash(tokenizer), SHARD_TOKENS, cut, *(["ends"] if ends else [])])
    wanted = [[(part, _key(part, rules)) for part in source.parts] for source in sources]
    have = {key: _open(cache / key) for part_keys in wanted for _, key in part_keys}
    missing = {key: part for part_keys in wanted for part, key in part_keys if have[key] is None}
    if missing:
        with track("tokenise", len(missing), "parts") as progress:
            for key, part in missing.items():
                _write(cache, key, _encoded(_documents(part, cut), tokenizer, ends), tokenizer, progress)
                have[key] = _open(cache / key)
                progress.advance()
    return [[shard for _, key in part_keys for shard in have[key] or ()] for part_keys in wanted]


def _are_few(sources: Sequence[Source]) -> bool:
    parts = [part for source in sources for part in source.parts]
    if len(parts) >= FEW_DOCUMENTS:
        return False
    first = itertools.islice(itertools.chain.from_iterable(part.read() for part in parts), FEW_DOCUMENTS)
    return sum(1 for _ in first) < FEW_DOCUMENTS


def _tokenizer_hash(tokenizer: TextTokenizer) -> str:
    template = [] if tokenizer.template is None else [tokenizer.template.source, dict(tokenizer.template.tokens)]
    return hashlib.sha256(json.dumps([tokenizer.backend.to_str(), template]).encode()).hexdigest()


def _key(part: Part, rules: str) -> str:
    return "tokens-" + hashlib.sha256(f"{rules}{part.fingerprint()}".encode()).hexdigest()[:40]


def _open(folder: Path) -> tuple[Shard, ...] | None:
    """A whole folder's shards; None where there is none, or it is damaged."""
    if not (folder / INDEX).is_file():
        return None
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        for name, digest in index["files"].items():
            if sha256_file(folder / name) != digest:
                raise ValueError(f"{name} is not what was written")
        return tuple(_open_shard(folder, number) for number in range(index["shards"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"cached tokens are damaged and are made anew ({folder}: {error})")
        return None


def _open_shard(folder: Path, number: int) -> Shard:
    def load(name: str) -> Any:
        path = folder / f"{number:06}-{name}.npy"
        return np.load(path, mmap_mode="r") if path.is_file() else None

    return Shard(load("ids"), load("documents"), load("answer"), load("ends"))


def _write(cache: Path, key: str, found: Iterator[_Encoded], tokenizer: TextTokenizer, progress: Track) -> None:
    """Tokenise a part into `cache/key`; nothing is left of it where that fails."""
    partial = cache / f"{key}.{socket.gethostname()}.{os.getpid()}.partial"
    try:
        _drop_abandoned(cache, key)
        partial.mkdir(parents=True)
        _write_shards(partial, found, tokenizer, progress)
        shutil.rmtree(cache / key, ignore_errors=True)
        with contextlib.suppress(FileExistsError):  # another run made the same meanwhile
            partial.rename(cache / key)
    except OSError as error:
        if is_no_space(error):
            raise NoSpaceError(
                "The disk is full: the text's tokens could not be kept.", found=f"{cache}: {error}",
                todo="free some space, or set NANOKIT_CACHE to a folder on another disk",
            ) from None  # fmt: skip
        if isinstance(error, PermissionError) or not cache.is_dir():
            raise RequestError(
                "The folder for tokenised text cannot be written to.", found=f"{cache}: {error}",
                todo="set NANOKIT_CACHE to a folder of yours",
            ) from None  # fmt: skip
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _drop_abandoned(cache: Path, key: str) -> None:
    """What killed runs on this machine left of this part."""
    for left in cache.glob(f"{key}.{socket.gethostname()}.*.partial"):
        process = int(left.suffixes[-2].lstrip("."))
        if process != os.getpid() and not Path(f"/proc/{process}").exists() and Path("/proc").exists():
            shutil.rmtree(left, ignore_errors=True)


def _documents(part: Part, cut: bool) -> Iterator[Document]:
    """A part's documents, long ones in pieces."""
    whole = part.read()
    if cut:
        found = list(whole)
        for separator in ("\n\n", "\n", " "):
            if len(found) >= FEW_DOCUMENTS:
                break
            found = [p for d in found for p in ([d] if isinstance(d, Chat) else _blocks(d, separator))]
        whole = iter(found)
    for document in whole:
        if isinstance(document, str) and len(document) > LONGEST:
            yield from (document[at : at + LONGEST] for at in range(0, len(document), LONGEST))
        else:
            yield document


def _blocks(text: str, separator: str) -> list[str]:
    """A text cut at separators into at most 200 blocks of about one length."""
    parts = text.split(separator)
    wanted = max(1, len(text) // 200)
    blocks, current = [], ""
    for part in parts:
        current = f"{current}{separator}{part}" if current else part
        if len(current) >= wanted:
            blocks.append(current)
            current = ""
    return [block for block in (*blocks, current) if block.strip()]


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    chat: bool
    digest: int
    answer: list[bool] | None
    ends: list[int] | None


def _encoded(documents: Iterable[Document], tokenizer: TextTokenizer, ends: bool) -> Iterator[_Encoded]:
    """Documents in order, as ids; a conversation may give several."""
    special, size = tokenizer.special_tokens(), 0
    waiting: list[tuple[str, int, Any]] = []
    for document in documents:
        if isinstance(document, str):
            waiting.append((document, _digest(document), None))
            size += len(document)
        else:
            digest = _digest(document.as_text())
            for rendered in render_chat(document, tokenizer.template, special):
                waiting.append((rendered.text, digest, rendered.answers))
                size += len(rendered.text)
        if size >= BATCH_CHARACTERS:
            yield from _encode(waiting, tokenizer, ends)
            waiting, size = [], 0
    yield from _encode(waiting, tokenizer, ends)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _encode(waiting: Sequence[tuple[str, int, Any]], tokenizer: TextTokenizer, ends: bool) -> Iterator[_Encoded]:
    backend = tokenizer.backend
    chats = any(answers is not None for _, _, answers in waiting)
    encode = backend.encode_batch if chats or ends else backend.encode_batch_fast  # the latter gives no offsets
    found = encode([text for text, _, _ in waiting], add_special_tokens=False)
    for (_, digest, answers), encoding in zip(waiting, found, strict=True):
        stops = [stop for _, stop in encoding.offsets] if ends else None
        if answers is None:
            yield _Encoded(encoding.ids, False, digest, None, stops)
            continue
        said = [any(start <= at < stop for start, stop in answers) for at, _ in encoding.offsets]
        if any(said):
            yield _Encoded(encoding.ids, True, digest, said, stops)


def _write_shards(folder: Path, found: Iterator[_Encoded], tokenizer: TextTokenizer, progress: Track) -> None:
    """All shards, then the index."""
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    number = total = 0
    done = False
    while not done:
        ids: list[Ids] = []
        documents: list[tuple[int, bool, int]] = []
        answers: list[npt.NDArray[np.bool_]] = []
        ends: list[Ids] = []
        size, chats = 0, False
        for document in found:
            ids.append(np.asarray(document.ids, dtype))
            documents.append((len(document.ids), document.chat, document.digest))
            answers.append(np.full(len(document.ids), True) if document.answer is None else np.asarray(document.answer))
            if document.ends is not None:
                ends.append(np.asarray(document.ends, np.uint32))
            size, chats = size + len(document.ids), chats or document.chat
            if len(documents) % 1000 == 0:
                progress.advance(0, f"{total + size:,} tokens")
            if size >= SHARD_TOKENS:
                break
        else:
            done = True
        if documents:
            _save_shard(folder, number, ids, documents, answers if chats else [], ends)
            number, total = number + 1, total + size
    if not total:
        raise BadFileError("The text gives no tokens.", found=f"{number} documents", todo="give more text")
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    (folder / INDEX).write_text(json.dumps({"shards": number, "tokens": total, "files": files}), encoding="utf-8")


def _save_shard(folder: Path, number: int, ids: Any, documents: Any, answers: Any, ends: Any) -> None:
    _save(folder / f"{number:06}-ids.npy", np.concatenate(ids))
    _save(folder / f"{number:06}-documents.npy", np.array(documents, DOCUMENT))
    if answers:
        _save(folder / f"{number:06}-answer.npy", np.concatenate(answers))
    if ends:
        _save(folder / f"{number:06}-ends.npy", np.concatenate(ends))


def _save(path: Path, array: Ids) -> None:
    """As numpy.save, whose error on a full disk does not say that the disk is full."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.view(np.uint8).data)
