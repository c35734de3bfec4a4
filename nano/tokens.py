"""The tokenizer of a model folder: text to ids and back, and which ids begin and end a text.

`tokenizer.json` is read by the `tokenizers` library itself, the same file that goes into every bundle.
Ids that begin and end a text come from the configs beside it, never from a guess.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.chat import ChatTemplate
from nano.errors import BadFileError, RequestError
from nano.model_files import read_json_object, refuse_pointer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE, TEMPLATE = "tokenizer.json", "chat_template.jinja"
FILES = (FILE, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", TEMPLATE)
"""What belongs to a tokenizer and travels with every stage's output, where it exists."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with its special ids.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        bos_id: id that begins a text, or None where the model was trained without one.
        eos_ids: ids that end generation.
        template: how it writes conversations, or None.
    """

    backend: Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    template: ChatTemplate | None = None

    @property
    def size(self) -> int:
        """One more than the largest id it can give."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def text_ids(self) -> list[int]:
        """Every id that stands for text: all but the special ones."""
        special = set(self.special_tokens())
        return sorted(i for token, i in self.backend.get_vocab().items() if token not in special)

    def special_tokens(self) -> tuple[str, ...]:
        """The texts of its special tokens."""
        return tuple(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids added.

        Raises:
            RequestError: the text holds bytes or halves of characters that are no text.
        """
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        except TypeError:  # how tokenizers refuses what UTF-8 cannot write
            raise RequestError(
                "The text is not valid Unicode.", found=ascii(text[:60]), expected="text in UTF-8"
            ) from None

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt: the beginning id where there is one, then the text."""
        ids = self.encode(text)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def decode(self, ids: list[int]) -> str:
        """Text of some ids, special ids left out."""
        return str(self.backend.decode(ids, skip_special_tokens=True))

    def continued(self, prompt: str, new: list[int]) -> str:
        """The prompt and what was added to it: the difference that the new ids make to the decoded text.

        Decoding the new ids alone would lose a leading space, and a decoder made for streaming adds one in front.
        """
        before = self.encode(prompt)
        return prompt + self.decode([*before, *new])[len(self.decode(before)) :]


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> TextTokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: holds tokenizer.json (or another form that transformers can convert) and the configs.
        vocab_size: V of the model it is for; checked where given.

    Raises:
        BadFileError: missing, broken, or it gives ids that the model has no embedding for.
    """
    from tokenizers import Tokenizer

    path = folder / FILE
    refuse_pointer(path)
    if path.is_file():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BadFileError("tokenizer.json cannot be read.", found=f"{path}: {error}") from None
    else:
        backend = _converted(folder)
    special = _read_json(folder / "tokenizer_config.json")
    model = {**_read_json(folder / "config.json"), **_read_json(folder / "generation_config.json")}
    tokenizer = TextTokenizer(
        backend, _bos_id(backend, special, model), _eos_ids(backend, special, model), _template(folder, special)
    )
    if vocab_size is not None and tokenizer.size > vocab_size:
        raise BadFileError(
            "The tokenizer does not match the model.",
            found=f"the tokenizer in {folder} gives ids up to {tokenizer.size - 1}",
            expected=f"ids below the model's vocab_size, {vocab_size}",
            todo="use the tokenizer that the model was trained with",
        )
    return tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put a model folder's tokenizer files into another folder; tokenizer.json is made where it was missing."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / FILE).is_file():
        _converted(source).save(str(target / FILE))


def _converted(folder: Path) -> Tokenizer:
    """A `tokenizers.Tokenizer` from an older form (tokenizer.model, vocab.json), by transformers."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend: Tokenizer = loaded.backend_tokenizer
    except Exception as error:  # transformers raises many kinds; all mean the same here
        raise BadFileError(
            "The model folder has no usable tokenizer.",
            found=f"no {FILE} in {folder}, and transformers makes none of the other files ({type(error).__name__})",
            expected=FILE,
            todo="copy the tokenizer files of the model into the folder",
        ) from None
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _token_id(backend: Tokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(text) if isinstance(text, str) else None


def _template(folder: Path, special: dict[str, Any]) -> ChatTemplate | None:
    """The chat template: a file of its own, or a text or a list of named texts in tokenizer_config.json."""
    source = special.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if (folder / TEMPLATE).is_file():
        source = (folder / TEMPLATE).read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in special.items()}
    return ChatTemplate(source, {k: v for k, v in texts.items() if k.endswith("_token") and isinstance(v, str)})


def _bos_id(backend: Tokenizer, special: dict[str, Any], model: dict[str, Any]) -> int | None:
    """Qwen's config.json names a bos id that its tokenizer never adds, so the tokenizer's word comes first."""
    if special.get("add_bos_token") is False or ("bos_token" in special and special["bos_token"] is None):
        return None
    if "bos_token" in special:
        return _token_id(backend, special["bos_token"])
    found = model.get("bos_token_id")
    return found if isinstance(found, int) else None


def _eos_ids(backend: Tokenizer, special: dict[str, Any], model: dict[str, Any]) -> tuple[int, ...]:
    found = model.get("eos_token_id")
    if found is not None:
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            raise BadFileError(
                "The model's configuration has an unusable value.",
                found=f"eos_token_id = {found!r}",
                expected="a token's id or a list of them, in generation_config.json or config.json",
            )
        return tuple(ids)
    one = _token_id(backend, special.get("eos_token"))
    return () if one is None else (one,)
