"""Formats by content: what people have on disk, read as a stream, and every broken form named."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import nano.documents as documents
from nano.chat import Chat
from nano.corpus import describe_data, read_documents
from nano.errors import BadFileError, MissingExtraError, NanokitError, RequestError
from nano.sources import open_sources

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
RECORDS: list[dict[str, Any]] = [{"text": "one"}, {"text": "two\nlines"}, {"text": "größer 猫"}]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    lines = write_lines(tmp_path / "a", RECORDS)
    (tmp_path / "b").write_text(json.dumps(RECORDS, indent=1))
    (tmp_path / "c").write_bytes(gzip.compress(lines.read_bytes()))
    parquet.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "d")
    (tmp_path / "e").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes())
    expected = [r["text"] for r in RECORDS]
    for name in "abcde":
        assert read_documents([tmp_path / name]) == expected, name
        assert documents.has_records(tmp_path / name)


def test_conversations_in_both_spellings(tmp_path: Path) -> None:
    shared = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Me."},
    ]
    path = write_lines(tmp_path / "chat", [{"messages": CHAT}, {"conversations": shared}, {"text": "plain"}])
    one, two, three = read_documents([path])
    assert one == Chat(tuple(CHAT))
    assert isinstance(two, Chat)
    assert [m["role"] for m in two.messages] == ["system", "user", "assistant"]
    assert two.messages[1:] == one.messages
    assert three == "plain"


def test_a_big_text_file_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BIG", 1 << 16)
    monkeypatch.setattr(documents, "PIECE", 1 << 12)
    path = tmp_path / "big"
    path.write_text("".join(f"line {i} of a big file\n" for i in range(200_000)))
    size = path.stat().st_size
    tracemalloc.start()
    digest = []
    for piece in documents.iter_file(path):
        assert isinstance(piece, str)
        assert piece.endswith("\n")
        digest.append((len(piece), piece[:20]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(n for n, _ in digest) == size
    assert max(n for n, _ in digest) < 2 * (1 << 12)
    assert peak < size / 5
    assert "".join(p for p in documents.iter_file(path) if isinstance(p, str)) == path.read_text()


def test_a_big_text_file_without_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BIG", 1000)
    monkeypatch.setattr(documents, "PIECE", 100)
    (tmp_path / "big").write_text("ä" * 3500)
    assert "".join(map(str, documents.iter_file(tmp_path / "big"))) == "ä" * 3500


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PAR1 but no parquet at all", "parquet file cannot be read"),
        (gzip.compress(b"text " * 1000, mtime=0)[:-20], "broken"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b'{"messages": []}\n', "no answer"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', "no answer"),
        (b'{"messages": [3]}\n', "line 1"),
        (b'{"messages": [{"speaker": "x"}]}\n', "speaker"),
        (b'{"text": "ok"}\n[1]\n', "line is no object"),
        (b'{"text": "ok"}\n\xff\n', "not text"),
        (b'{"text": "ok"}\n{"text": "cut \\ud83d here"}\n', r"half of a character.*\n.*line 2: .ud83d"),
        (b'[{"text": "cut \\ud83d"}]', "half of a character"),
        (b'{"text": "ok"}\n' + b"[" * 100_000 + b"\n", "line 2"),
        (b'[{"text": "ok"}, {"story": 1}]', "record 2"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    if content.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(BadFileError, match=says) as error:
        read_documents([tmp_path / "data"])
    assert "data" in str(error.value)


def test_a_folder_gives_its_records_or_its_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("never")
    (tmp_path / "README.md").write_text("# not data")
    assert read_documents([tmp_path]) == ["# not data"]
    write_lines(tmp_path / "sub" / "two.jsonl", [{"text": "2"}])
    write_lines(tmp_path / "one", [{"text": "1"}])
    assert read_documents([tmp_path]) == ["1", "2"]
    before = describe_data([tmp_path], tokens=0)["files"][0]["sha256"]
    write_lines(tmp_path / "one", [{"text": "3"}])
    assert describe_data([tmp_path], tokens=0)["files"][0]["sha256"] != before


def test_weights_and_names_with_signs(tmp_path: Path) -> None:
    odd = tmp_path / "a=0.5"
    odd.write_text("odd")
    (tmp_path / "b").write_text("b")
    assert [(s.name, s.weight) for s in open_sources([odd])] == [(str(odd), None)]
    assert [s.weight for s in open_sources([f"{odd}=2", f"{tmp_path / 'b'}=0.25"])] == [2.0, 0.25]
    with pytest.raises(RequestError, match="have none"):
        open_sources([f"{odd}=2", tmp_path / "b"])
    with pytest.raises(RequestError, match="out of range"):
        open_sources([f"{tmp_path / 'b'}=-1"])


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1] * 3 + CHAT}])
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:1])}
    )
    both.save_to_disk(str(tmp_path / "both"))
    assert [len(d.messages) for d in read_documents([tmp_path / "one"]) if isinstance(d, Chat)] == [2, 5]
    assert read_documents([tmp_path / "both"]) == [r["text"] for r in RECORDS]
    assert read_documents([f"{tmp_path / 'both'}:test"]) == ["one"]
    with pytest.raises(BadFileError, match="no such split"):
        read_documents([f"{tmp_path / 'both'}:dev"])
    a, b = (describe_data([f"{tmp_path / 'both'}:{s}"], tokens=0)["files"][0]["sha256"] for s in ("train", "test"))
    assert a != b


def test_a_dataset_id_goes_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **settings: Any) -> Any:
        asked.append((arguments, settings))
        if arguments[0] == "who/nothing":
            raise FileNotFoundError("no such dataset")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert len(read_documents(["org/name", "org/name@main"])) == 6
    assert asked == [(("org/name", None), {"split": None}), (("org/name", "main"), {"split": None})]
    with pytest.raises(BadFileError, match="did not give a dataset"):
        read_documents(["who/nothing"])
    with pytest.raises(BadFileError, match="no such text file"):
        read_documents(["data/train.jsonl"])


@pytest.mark.parametrize("module", ["pyarrow.parquet", "datasets"])
def test_a_missing_extra_names_itself(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [m for m in sys.modules if m.split(".")[0] == module.split(".")[0]]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    (tmp_path / "x").write_bytes(b"PAR1....PAR1")
    with pytest.raises(NanokitError) as error:
        read_documents([tmp_path / "x" if module.startswith("pyarrow") else "org/name"])
    assert isinstance(error.value, MissingExtraError)
    assert "nanokit[data]" in str(error.value)


def test_a_pipe_is_refused_as_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFileError, match="pipe or a device"):
        read_documents([tmp_path / "pipe"])
    (tmp_path / "whole.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00 and \\\\ud83d as it is written"}')
    assert read_documents([tmp_path / "whole.jsonl"]) == ["\U0001f600 and \\ud83d as it is written"]
