"""Where text comes from: what stands behind `--data`, as a list of parts that can be read again and again.

| as given | is |
|---|---|
| `FILE` | text, JSONL, JSON or parquet, perhaps gzipped (see `nano.documents`) |
| `FOLDER` | its record files (JSONL, JSON, parquet) where there are any, else its text files; by relative path |
| `FOLDER`, `FOLDER:SPLIT` | a dataset saved by `datasets.save_to_disk`; split "train" where none is named |
| `ORG/NAME`, `ORG/NAME:SPLIT`, `ORG/NAME@CONFIG:SPLIT` | a dataset of the Hugging Face hub |
| any of these with `=WEIGHT` behind it | its share of the training tokens, relative to the other sources' weights |

What exists on disk under the whole name is that, whatever signs its name holds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano.documents import Document, has_records, iter_file, record_document
from nano.errors import BadFileError, RequestError, require_module
from nano.folder import sha256_file

_HUB = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%:-]+))?$")
_FILE_LIKE = (".txt", ".md", ".json", ".jsonl", ".parquet", ".gz", ".zst", ".csv")
_SAVED = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Part:
    """A piece of a source that is read, hashed and tokenised on its own: one file, or one split of a dataset.

    Attributes:
        name: for people.
        read: its documents.
        fingerprint: hex sha256 of its content, read once.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    fingerprint: Callable[[], str]


@dataclass(frozen=True)
class Source:
    """One --data.

    Attributes:
        name: as given, without its weight.
        weight: as given, or None.
        parts: in a fixed order.
    """

    name: str
    weight: float | None
    parts: tuple[Part, ...]

    def fingerprint(self) -> str:
        """Hex sha256 of its content; of a single file that file's own."""
        prints = [part.fingerprint() for part in self.parts]
        return prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()


def open_sources(given: Sequence[str | Path]) -> tuple[Source, ...]:
    """What stands behind each --data.

    Raises:
        RequestError: nothing was given, or some sources have weights and some none.
        BadFileError: there is no such file, folder or dataset.
        MissingExtraError: a dataset without the package `datasets`.
    """
    if not given:
        raise RequestError("This needs text.", expected="--data FILE, a text or JSONL file (may be repeated)")
    split = [_split_weight(str(word)) for word in given]
    bare = [name for name, weight in split if weight is None]
    if bare and len(bare) < len(split):
        raise RequestError(
            "Some sources of text have a weight and some have none.", found=f"no weight: {', '.join(bare)}",
            expected="a weight for each, as in --data stories.jsonl=0.7 chat.jsonl=0.3, or for none",
        )  # fmt: skip
    return tuple(Source(name, weight, _parts(name)) for name, weight in split)


def fingerprints(given: Sequence[str | Path]) -> list[tuple[str, float | None]]:
    """(fingerprint, weight) of each --data: what a result depends on."""
    return [(source.fingerprint(), source.weight) for source in (open_sources(given) if given else ())]


def _split_weight(word: str) -> tuple[str, float | None]:
    """`path=0.7` in two; a path that exists with its sign of equality stays whole."""
    name, sign, weight = word.rpartition("=")
    if not sign or Path(word).expanduser().exists():
        return word, None
    try:
        value = float(weight)
    except ValueError:
        return word, None
    if not (math.isfinite(value) and value > 0):
        raise RequestError("A source's weight is out of range.", found=word, expected="a number above 0")
    return name, value


def _parts(name: str) -> tuple[Part, ...]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _saved(path, None) or _folder(path)
    if path.exists():
        return (_file(path),)
    folder, _, split = name.rpartition(":")
    if folder and Path(folder).expanduser().is_dir() and (found := _saved(Path(folder).expanduser(), split)):
        return found
    match = _HUB.match(name)
    if not match or name.startswith(".") or name.endswith(_FILE_LIKE):
        raise BadFileError("There is no such text file.", found=name, todo="check the path")
    return (_hub(name, match["id"], match["config"], match["split"]),)


def _file(path: Path) -> Part:
    return Part(str(path), lambda: iter_file(path), functools.cache(lambda: sha256_file(path)))


def _folder(path: Path) -> tuple[Part, ...]:
    """A folder's files: those with records, and where there is none, all; hidden files and folders never."""
    inside = sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix())
    visible = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    files = [p for p in visible if p.is_file() and p.stat().st_size]
    if not files:
        raise BadFileError("A data folder holds no files.", found=str(path), expected="text, JSONL or parquet files")
    return tuple(_file(p) for p in [p for p in files if has_records(p)] or files)


def _saved(path: Path, split: str | None) -> tuple[Part, ...]:
    """The dataset that `save_to_disk` wrote; nothing where the folder is something else."""
    if not any((path / name).is_file() for name in _SAVED) or not any(path.rglob("*.arrow")):
        return ()
    return (_dataset_part(str(path), _load_saved(path, split), split or ""),)


def _load_saved(path: Path, split: str | None) -> Any:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds; all mean the same here
        raise BadFileError("A saved dataset cannot be read.", found=f"{path}: {_first_line(error)}") from None
    return _choose(str(path), loaded, split)


def dataset_rows(name: str) -> Any:
    """The rows of a dataset, named as for --data: a folder of save_to_disk, or the hub's ORG/NAME@CONFIG:SPLIT.

    Raises:
        BadFileError: there is no such dataset or split.
        MissingExtraError: without the package `datasets`.
    """
    for folder, split in ((name, None), name.rpartition(":")[::2]):
        if folder and Path(folder).expanduser().is_dir():
            return _load_saved(Path(folder).expanduser(), split)
    match = _HUB.match(name)
    if not match:
        raise BadFileError("There is no such dataset.", found=name, expected="a folder, or ORG/NAME@CONFIG:SPLIT")
    return _load_hub(name, match["id"], match["config"], match["split"])


def _hub(name: str, hub_id: str, config: str | None, split: str | None) -> Part:
    return _dataset_part(name, _load_hub(name, hub_id, config, split), split or "")


def _load_hub(name: str, hub_id: str, config: str | None, split: str | None) -> Any:
    """A dataset of the hub, fetched (or found in the library's cache) now."""
    datasets = _datasets()
    try:
        loaded = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:
        raise BadFileError(
            "There is no such file or folder, and the hub did not give a dataset of that id.",
            found=f"{name}: {type(error).__name__}: {_first_line(error)}",
            expected="a path, or ORG/NAME, ORG/NAME:SPLIT, ORG/NAME@CONFIG:SPLIT",
            todo="check the path; for a gated or private dataset run `hf auth login` first",
        ) from None
    return _choose(name, loaded, split)


def _datasets() -> Any:
    datasets = require_module("datasets", "data")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _choose(name: str, loaded: Any, split: str | None) -> Any:
    """One split of what was loaded: the named one, "train", or the only one."""
    if not isinstance(loaded, dict):
        return loaded
    wanted = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if wanted not in loaded:
        raise BadFileError(
            "The dataset has no such split." if split else "The dataset has several splits.",
            found=f"{name} with {', '.join(loaded)}", todo=f"name one: {name.split(':')[0]}:{next(iter(loaded))}",
        )  # fmt: skip
    return loaded[wanted]


def _dataset_part(name: str, dataset: Any, split: str) -> Part:
    def read() -> Iterator[Document]:
        for row, record in enumerate(dataset, 1):
            if (document := record_document(record, f"{name}, row {row}")) is not None:
                yield document

    def fingerprint() -> str:
        """Of the Arrow files that hold it; of its rows where it lies in memory."""
        files = [sha256_file(Path(entry["filename"])) for entry in dataset.cache_files]
        if not files:
            files = [json.dumps(record, sort_keys=True, default=str) for record in dataset]
        return hashlib.sha256(json.dumps([split, len(dataset), files]).encode()).hexdigest()

    return Part(name, read, functools.cache(fingerprint))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
