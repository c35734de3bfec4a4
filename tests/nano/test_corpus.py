"""Text files as people really have them, and windows that cover every token once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nano.corpus import MIN_WINDOW, cut_windows, read_documents, sample_windows
from nano.errors import BadFileError, RequestError
from nano.tokens import load_tokenizer


def test_format_is_decided_by_content_not_by_name(tmp_path: Path) -> None:
    odd = tmp_path / "stories.txt"
    odd.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    plain = tmp_path / "notes.jsonl"
    plain.write_text("[1] is a reference.\nAnd this is plain text.\n")
    assert read_documents([odd, plain]) == ["one", "two", "[1] is a reference.\nAnd this is plain text.\n"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"  \n \n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is not text"),
        (b"abc\x00def", "NUL"),
        (b'{"text": "ok"}\n{"text": \n', "line 2"),
        (b'{"text": "ok"}\n{"story": "x"}\n', "line 2"),
        (b'{"text": 3}\n', "line 1"),
        (b'{"text": "  "}\n', "holds no text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(BadFileError, match=says):
        read_documents([path])


def test_missing_file_and_no_file() -> None:
    with pytest.raises(BadFileError, match="no such text file"):
        read_documents([Path("/nowhere/text")])
    with pytest.raises(RequestError, match="needs text"):
        read_documents([])


def test_windows_cover_each_document_in_order_and_never_cross(stories: Path, tinystories: Path) -> None:
    tokenizer = load_tokenizer(stories, 512)
    documents = [json.loads(line)["text"] for line in tinystories.read_text().splitlines()[:5]]
    windows = cut_windows(documents, tokenizer, 64)
    rebuilt = [i for w in windows.ids for i in w[1:]]
    expected: list[int] = []
    for document in documents:
        ids = tokenizer.encode(document)
        tail = len(ids) % 63
        expected += ids if tail + 1 >= MIN_WINDOW or tail == 0 else ids[:-tail]
    assert rebuilt == expected
    assert all(w[0] == tokenizer.bos_id and len(w) <= 64 for w in windows.ids)
    assert windows.tokens == len(expected)


def test_max_tokens_is_exact(stories: Path, tinystories: Path) -> None:
    tokenizer = load_tokenizer(stories, 512)
    assert cut_windows(read_documents([tinystories]), tokenizer, 128, max_tokens=1000).tokens == 1000


def test_calibration_windows_depend_on_the_seed_alone(stories: Path, tinystories: Path) -> None:
    tokenizer = load_tokenizer(stories, 512)
    documents = read_documents([tinystories])
    one, same, other = (sample_windows(documents, tokenizer, 128, 16, seed) for seed in (0, 0, 1))
    assert [w.tolist() for w in one.ids] == [w.tolist() for w in same.ids]
    assert [w.tolist() for w in one.ids] != [w.tolist() for w in other.ids]
    assert len(one.ids) == 16


def test_text_too_short_for_a_window(stories: Path) -> None:
    with pytest.raises(RequestError, match="too short"):
        cut_windows(["a"], load_tokenizer(stories), 64)
