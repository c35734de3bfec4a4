"""Documents from files: plain text, JSON Lines, JSON, parquet, each perhaps gzipped; read as a stream.

The format is decided by content, never by name:
- "PAR1" at the beginning: parquet (the extra `data`);
- the first line is a JSON object: JSON Lines, one document a line;
- the whole is a JSON list of objects: the same;
- anything else that is UTF-8: plain text. A file is one document; one larger than BIG is cut at line ends into
  documents of about PIECE, so that it never lies in memory as a whole.

A record holds a string "text", or a conversation under "messages" or "conversations" (with "tools", if any).
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nano.chat import Chat, parse_chat
from nano.errors import BadFileError, NanokitError, require_module

Document = str | Chat
FIELDS = ("text", "messages", "conversations")
BIG, PIECE = 32 << 20, 1 << 20
WANTED = "UTF-8 text, JSONL, JSON, or parquet"
_PARQUET, _GZIP, _ZSTD = b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def iter_file(path: Path) -> Iterator[Document]:
    """A file's documents, in order; never the whole file in memory.

    Raises:
        BadFileError: missing, empty, not text, or a record that cannot be read (with its line).
        MissingExtraError: parquet without pyarrow.
    """
    if path.exists() and not path.is_file():
        raise BadFileError(
            "Text is read more than once, so it cannot come from a pipe or a device.", found=str(path),
            expected="a file", todo="write what comes from there to a file first",
        )  # fmt: skip
    if not path.is_file():
        raise BadFileError("There is no such text file.", found=str(path), todo="check the path")
    with path.open("rb") as file:
        head = file.read(4)
    if head == _PARQUET:
        found = _parquet(path)
    elif head == _ZSTD:
        raise BadFileError(
            "A data file is zstd-compressed.", found=str(path), expected=WANTED, todo=f"zstd -d {path.name}"
        )
    else:
        found = _text_file(path, compressed=head[:2] == _GZIP)
    empty = True
    for document in found:
        empty = False
        yield document
    if empty:
        raise BadFileError("A data file is empty: it holds no text.", found=str(path), expected=WANTED)


def has_records(path: Path) -> bool:
    """Whether a file holds records (JSONL, JSON, parquet) rather than plain text; False where it is neither."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == _PARQUET:
        return True
    try:
        with _open(path, head[:2] == _GZIP) as file:
            first = file.readline().decode("utf-8-sig").lstrip()
            return _is_object(first) or (
                first.startswith("[") and _list_of_objects(path, head[:2] == _GZIP) is not None
            )
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):
        return False


def record_document(record: Mapping[str, Any], where: str) -> Document | None:
    """What one record holds; None where its text is blank.

    Raises:
        BadFileError: it has neither a text nor a conversation.
    """
    for name in FIELDS[1:]:
        if record.get(name) is not None and not isinstance(record[name], str):
            return parse_chat(record[name], record.get("tools"), where)
    text = record.get("text")
    if not isinstance(text, str):
        raise BadFileError(
            "A record has no text.", found=f"{where}: {', '.join(map(str, record)) or 'no fields'}",
            expected='a string "text", or a list "messages" (or "conversations")',
        )  # fmt: skip
    return text if text.strip() else None


def _text_file(path: Path, compressed: bool) -> Iterator[Document]:
    """Plain text, JSON Lines or a JSON list."""
    try:
        with _open(path, compressed) as file:
            first = b""
            while not first and (line := file.readline(BIG)):
                first = line.removeprefix(b"\xef\xbb\xbf").strip()
        if _is_object(first.decode("utf-8")):
            documents = (record_document(record, where) for where, record in _json_lines(path, compressed))
            yield from (document for document in documents if document is not None)
        elif first.startswith(b"[") and (records := _list_of_objects(path, compressed)) is not None:
            found = (record_document(r, f"{path}, record {i}") for i, r in enumerate(records, 1))
            yield from (document for document in found if document is not None)
        else:
            yield from _plain(path, compressed)
    except UnicodeDecodeError as error:
        raise BadFileError("A data file is not text.", found=f"{path}: {error}", expected=WANTED) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFileError("A data file is broken.", found=f"{path}: {error}", expected="a whole gzip file") from None


def _open(path: Path, compressed: bool) -> BinaryIO:
    return gzip.open(path) if compressed else path.open("rb")  # type: ignore[return-value]


def iter_records(path: Path, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of every record of a JSONL, JSON or parquet file, as it is.

    Args:
        path: the file.
        key: for a JSON object: where its list of records lies.

    Raises:
        BadFileError: none of these forms, or broken.
        MissingExtraError: parquet without pyarrow.
    """
    with path.open("rb") as file:
        head = file.read(4)
    if head == _PARQUET:
        rows = require_module("pyarrow.parquet", "data").read_table(path).to_pylist()
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    compressed = head[:2] == _GZIP
    try:
        if key:
            with _open(path, compressed) as file:
                whole = json.loads(file.read().decode("utf-8-sig"))
            found = whole.get(key) if isinstance(whole, dict) else None
        else:
            found = _list_of_objects(path, compressed)
        if found is None and not key:
            yield from _json_lines(path, compressed)
        elif isinstance(found, list) and all(isinstance(record, dict) for record in found):
            yield from ((f"{path}, record {number}", record) for number, record in enumerate(found, 1))
        else:
            raise BadFileError("A JSON file has no list of records.", found=f"{path}: key {key!r}")
    except (UnicodeDecodeError, json.JSONDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFileError("A data file cannot be read.", found=f"{path}: {error}", expected="JSONL, JSON or parquet") from None  # noqa: E501  # fmt: skip


def _json_lines(path: Path, compressed: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path, compressed) as file:
        for number, line in enumerate(file, 1):
            where, text = f"{path}, line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                record: Any = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise BadFileError("A JSONL file has a broken line.", found=f"{where}: {error}") from None
            if not isinstance(record, dict):
                raise BadFileError("A JSONL line is no object.", found=f"{where}: {text[:60].strip()}")
            _require_whole_characters(text, where, record)
            yield where, record


def _require_whole_characters(text: str, where: str, record: Any) -> None:
    """Refuse half of a character that JSON writes in two halves: no tokenizer takes it.

    Args:
        text: the JSON that was read.
        where: for people.
        record: what was read from it.
    """
    if "\\ud" not in text and "\\uD" not in text:  # both halves are of D800 to DFFF
        return
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadFileError(
            "A record holds half of a character (an unpaired surrogate).",
            found=f"{where}: \\u{ord(error.object[error.start]):04x}",
            todo="take it out, or write \\ufffd in its place",
        ) from None


def _plain(path: Path, compressed: bool) -> Iterator[str]:
    """One document, or pieces of a big file that end at line ends."""
    with _open(path, compressed) as raw:
        stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        text = stream.read(BIG)
        whole = len(text) < BIG
        while text:
            if "\0" in text:
                raise BadFileError("A data file is not text.", found=f"{path} contains NUL bytes", expected=WANTED)
            more = "" if whole else stream.read(BIG)
            cut = text.rfind("\n") + 1 if more else len(text)
            cut = cut or len(text)
            yield from (p for p in ([text] if whole else _at_lines(text[:cut])) if p.strip())
            text = text[cut:] + more


def _at_lines(text: str) -> Iterator[str]:
    """Pieces of about PIECE characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", min(len(text), start + PIECE)) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _list_of_objects(path: Path, compressed: bool) -> list[dict[str, Any]] | None:
    """The records of a JSON list; None where the file is something else."""
    with _open(path, compressed) as file:
        text = file.read().decode("utf-8-sig")
    try:
        loaded = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    _require_whole_characters(text, str(path), loaded)
    whole = isinstance(loaded, list) and loaded and all(isinstance(record, dict) for record in loaded)
    return loaded if whole else None


def _parquet(path: Path) -> Iterator[Document]:
    parquet = require_module("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (*FIELDS, "tools") if name in names]
            if not set(wanted) & set(FIELDS):
                raise BadFileError(
                    "A parquet file has no text.", found=f"{path} with the columns {', '.join(names)}",
                    expected='a column "text", or "messages" (or "conversations")',
                )  # fmt: skip
            row = 0
            for batch in file.iter_batches(batch_size=512, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    if (document := record_document(record, f"{path}, row {row}")) is not None:
                        yield document
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors and OSErrors
        if isinstance(error, NanokitError):
            raise
        raise BadFileError("A parquet file cannot be read.", found=f"{path}: {str(error).splitlines()[0]}") from None
