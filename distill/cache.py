"""A teacher's answers on disk: made once, read by any number of students.

A cache is a folder of shards, each `shard-N.bin` (records of one size, `distill.records`) with `shard-N.index` (which
windows they belong to), and `cache.json`, which names the shards that are whole with their sha256. A shard is written
under another name, flushed and renamed, then cache.json is replaced: a kill loses at most the shard under way, and
the same command goes on behind the last whole one. More text is added in the same way.

Answers are found by what a window says: a key is a hash of its ids and of where a loss is taken, so the same text
finds them whatever its order, packing or batch. Every window carries a checksum that each read verifies.

Legend: W windows, N positions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill.data import Rows
from distill.packing import PAD
from distill.records import RecordLayout
from nano.bits import Bytes
from nano.errors import BadFileError, RequestError
from nano.folder import sha256_file, write_text_atomically

NAME, SCHEMA_VERSION = "cache.json", 1
ROWS_AT_ONCE = 256
INDEX = np.dtype([("high", "<u8"), ("low", "<u8"), ("count", "<u4"), ("crc", "<u4")])
"""A window: its key in two halves, its records, and their crc32."""


@dataclass(frozen=True)
class CacheFacts:
    """What the records of a cache depend on.

    Attributes:
        teacher: fingerprint of its folder.
        tokenizer: hash of its vocabulary.
        vocab_size: ids that it gives.
        form, bytes_per_token: of the records.
        temperature: divides the teacher's logits.
        precision: of the teacher's arithmetic.
        seed: of the samples.
    """

    teacher: str
    tokenizer: str
    vocab_size: int
    form: str
    bytes_per_token: int
    temperature: float
    precision: str
    seed: int

    @property
    def layout(self) -> RecordLayout:
        """Of the records."""
        return RecordLayout("top" if self.form == "top" else "sampled", self.vocab_size, self.bytes_per_token)


def window_key(ids: npt.NDArray[Any], learn: npt.NDArray[np.bool_]) -> bytes:
    """16 bytes that stand for a window: its ids, and which of them a loss is taken at."""
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=16)
    digest.update(b"all" if learn.all() else np.packbits(learn).tobytes())
    return digest.digest()


def windows_of(
    ids_BT: npt.NDArray[Any], segment_BT: npt.NDArray[Any], learn_BT: npt.NDArray[np.bool_]
) -> Iterator[tuple[bytes, int]]:
    """(key, positions with a loss) of every window of some rows, in the order of positions."""
    for ids_T, segment_T, learn_T in zip(ids_BT, segment_BT, learn_BT, strict=True):
        borders = np.flatnonzero(np.diff(segment_T, prepend=PAD - 1, append=PAD - 1))
        for start, stop in itertools.pairwise(borders):
            if segment_T[start] != PAD:
                learn = learn_T[start:stop]
                yield window_key(ids_T[start:stop], learn), int(learn.sum())


class Cache:
    """A cache folder, opened for reading or for more.

    Raises:
        BadFileError: it is no cache, or a file of it is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        written = _read(folder)
        self.facts = CacheFacts(**written["facts"])
        self.made: Mapping[str, Any] = written["made"]
        self.shards: list[dict[str, Any]] = written["shards"]
        self._index = [self._read_index(number) for number in range(len(self.shards))]
        self._records: dict[int, Bytes] = {}
        self._sort()

    @property
    def tokens(self) -> int:
        """Positions it answers."""
        return sum(int(shard["tokens"]) for shard in self.shards)

    @property
    def size(self) -> int:
        """Bytes of all shards and their indexes."""
        return sum(int(s["tokens"]) * self.facts.bytes_per_token + int(s["windows"]) * INDEX.itemsize for s in self.shards)  # noqa: E501  # fmt: skip

    def _read_index(self, number: int) -> npt.NDArray[Any]:
        shard = self.shards[number]
        for name, size, sha256 in (
            (f"{shard['name']}.bin", int(shard["tokens"]) * self.facts.bytes_per_token, None),
            (f"{shard['name']}.index", int(shard["windows"]) * INDEX.itemsize, shard["index_sha256"]),
        ):
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size or (sha256 and sha256_file(path) != sha256):
                raise _broken(path, f"{found} bytes" if found is not None else "nothing", f"{size} bytes")
        return np.fromfile(self.folder / f"{shard['name']}.index", INDEX)

    def _sort(self) -> None:
        """One table of all windows, by the upper half of their keys."""
        empty = np.zeros(0, INDEX)
        table = np.concatenate([empty, *self._index])
        shard = np.concatenate([np.zeros(0, np.int64), *(np.full(len(x), i) for i, x in enumerate(self._index))])
        first = np.concatenate([np.zeros(0, np.int64), *(np.cumsum(x["count"]) - x["count"] for x in self._index)])
        order = np.argsort(table["high"], kind="stable")
        self._table, self._shard, self._first = table[order], shard[order], first[order]

    def find(self, key: bytes) -> int | None:
        """A window's place in the table, or None."""
        high, low = np.frombuffer(key, "<u8")
        at = int(np.searchsorted(self._table["high"], high))
        while at < len(self._table) and self._table["high"][at] == high:
            if self._table["low"][at] == low:
                return at
            at += 1
        return None

    def read(self, at: int) -> Bytes:
        """(count, bytes) records of the window at a place.

        Raises:
            BadFileError: the file was changed or damaged.
        """
        shard, start, count = int(self._shard[at]), int(self._first[at]), int(self._table["count"][at])
        if shard not in self._records:
            path = self.folder / f"{self.shards[shard]['name']}.bin"
            shape = (int(self.shards[shard]["tokens"]), self.facts.bytes_per_token)
            self._records[shard] = np.memmap(path, np.uint8, mode="r", shape=shape)
        records = self._records[shard][start : start + count]
        if zlib.crc32(records.tobytes()) != int(self._table["crc"][at]):
            path = self.folder / f"{self.shards[shard]['name']}.bin"
            raise _broken(path, f"another checksum at records {start} to {start + count}", "what was written")
        return records

    def add(self, windows: Sequence[tuple[bytes, Bytes]]) -> None:
        """One more shard, whole or not there: (key, records) of each of its windows.

        Raises:
            OSError: the disk is full; the shards before are still there.
        """
        name = f"shard-{len(self.shards):05d}"
        index = np.zeros(len(windows), INDEX)
        index["high"], index["low"] = np.frombuffer(b"".join(key for key, _ in windows), "<u8").reshape(-1, 2).T
        index["count"] = [len(records) for _, records in windows]
        index["crc"] = [zlib.crc32(records.tobytes()) for _, records in windows]
        data = b"".join(records.tobytes() for _, records in windows)
        _write_flushed(self.folder / f"{name}.bin", data)
        _write_flushed(self.folder / f"{name}.index", index.tobytes())
        self.shards.append({
            "name": name, "tokens": int(index["count"].sum()), "windows": len(windows),
            "sha256": hashlib.sha256(data).hexdigest(), "index_sha256": hashlib.sha256(index.tobytes()).hexdigest(),
        })  # fmt: skip
        write_cache_json(self.folder, self.facts, self.made, self.shards)
        self._index.append(index)
        self._sort()


def write_cache_json(
    folder: Path, facts: CacheFacts, made: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]
) -> None:
    """Replace cache.json.

    Args:
        folder: of the cache.
        facts: what its records depend on.
        made: how it came about, for people.
        shards: name, tokens, windows and hashes of each that is whole.
    """
    written = {"schema_version": SCHEMA_VERSION, "facts": vars(facts), "made": made, "shards": shards}
    write_text_atomically(folder / NAME, json.dumps(written, indent=1, default=str) + "\n")


def is_cache(folder: Path) -> bool:
    """Whether a folder is one, whole or under way."""
    return (folder / NAME).is_file()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.is_file():
        raise BadFileError(
            "This is not a teacher's cache.",
            found=f"no {NAME} in {folder}",
            expected="the output of nanokit cache-teacher",
        )  # fmt: skip
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if written["schema_version"] != SCHEMA_VERSION or not isinstance(written["shards"], list):
            raise ValueError(f"schema_version {written['schema_version']!r}")
        CacheFacts(**written["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadFileError(
            f"{NAME} is not of a form that this nanokit knows.", found=f"{path}: {error}", todo="make the cache again"
        ) from None
    return dict(written)


def _write_flushed(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".partial")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _broken(path: Path, found: str, expected: str) -> BadFileError:
    return BadFileError(
        "A file of the teacher's cache is not what was written.",
        found=f"{found} in {path}",
        expected=expected,
        todo="copy the cache again, or make it anew (nanokit cache-teacher --force)",
    )


def missing_windows(cache: Cache, rows: Rows, which: npt.NDArray[np.int64]) -> tuple[int, int]:
    """(windows of some rows that a cache does not answer, all windows of them)."""
    missing = total = 0
    for start in range(0, len(which), ROWS_AT_ONCE):
        for key, count in row_windows(rows, np.sort(which[start : start + ROWS_AT_ONCE])):
            total += 1
            missing += count > 0 and cache.find(key) is None
    return missing, total


def row_windows(rows: Rows, which: npt.NDArray[np.int64]) -> Iterator[tuple[bytes, int]]:
    """`windows_of` some rows."""
    ids_BT, segment_BT = rows.ids_RT[which], rows.segment_RT[which]
    return windows_of(ids_BT, segment_BT, segment_BT != PAD if rows.learn_RT is None else rows.learn_RT[which])


def check_facts(cache: Cache, wanted: Mapping[str, Any], problem: str, made: str, todo: str) -> None:
    """Refuse a cache that was made otherwise.

    Args:
        cache: opened.
        wanted: its facts as they should be, by name.
        problem: with a place for the fact's name.
        made: added to what was found.
        todo: what helps.

    Raises:
        RequestError: names the first fact that differs.
    """
    for name, ours in wanted.items():
        theirs = getattr(cache.facts, name)
        if ours != theirs:
            raise RequestError(
                problem.format(name.replace("_", " ")),
                found=f"{theirs} in {cache.folder}{made}", expected=str(ours), todo=todo,
            )  # fmt: skip


def check_cache(
    cache: Cache, teacher: str, tokenizer: str, temperature: float, rows: Rows, which: npt.NDArray[np.int64]
) -> None:
    """Refuse a cache that is not of this teacher, tokenizer, temperature or text.

    Args:
        cache: opened.
        teacher: fingerprint of the run's.
        tokenizer: hash of its vocabulary.
        temperature: the run's.
        rows: the training text.
        which: rows that the run will see.

    Raises:
        RequestError: names what differs.
    """
    check_facts(
        cache,
        {"teacher": teacher, "tokenizer": tokenizer, "temperature": temperature},
        "The cache holds the answers of another {}.",
        f" (made from {cache.made.get('teacher')})",
        "make a cache for this run: nanokit cache-teacher",
    )
    missing, total = missing_windows(cache, rows, which)
    if missing:
        raise RequestError(
            "The cache does not hold all of the text.",
            found=f"{missing:,} of {total:,} windows are missing in {cache.folder}, which was made from "
            f"{'; '.join(cache.made.get('text', ()))}",
            expected="the same --data, --length, --held-out and --seed",
            todo="nanokit cache-teacher with this run's text and the same --out adds what is missing",
        )
