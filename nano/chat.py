"""Conversations as a model's tokenizer writes them, and which part of that text the assistant wrote.

The template is the model folder's own, rendered by transformers. What the assistant wrote is known from the
template's `{% generation %}` marks where it has them. Where it has none, from prefixes: a turn's answer is what
`messages[:i + 1]` adds to `messages[:i]` and the generation prompt, up to and with the token that ends the turn;
the line break that templates write behind that token is no model's to say. A template may write an earlier
turn differently from the last one (Qwen3 drops its thinking): then no one text holds every answer as the
model gives it, and each answer becomes a text of its own, with the history as the model sees it at that turn.

Templates may ask for today's date (Llama 3.2 does). They get DATE, so that equal data gives equal tokens on every
day. transformers hands no function to a template, so DATE is a macro in front of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nano.errors import BadFileError, RequestError

DATE = {"%d": "26", "%-d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%A": "Friday", "%a": "Fri",
        "%y": "24", "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM"}  # fmt: skip
"""Noon of the day that Llama 3.1's template writes where none is given, by the codes of strftime."""

_CODES = "".join(f" | replace('{code}', '{value}')" for code, value in DATE.items())
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_CODES} }}}}{{% endmacro %}}"

Span = tuple[int, int]
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        messages: each with "role" and "content".
        tools: functions that the template is told of.
        where: the file and line it came from, for messages about it.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = field(default="", compare=False)

    def as_text(self) -> str:
        """Canonical JSON: equal conversations give equal texts."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template.

    Attributes:
        source: Jinja.
        tokens: what it may call bos_token, eos_token, ...
    """

    source: str
    tokens: Mapping[str, str]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: special tokens included.
        answers: character ranges that the assistant wrote.
    """

    text: str
    answers: tuple[Span, ...]


def parse_chat(messages: Any, tools: Any, where: str) -> Chat:
    """A record's conversation, in the form of OpenAI ("role", "content") or of ShareGPT ("from", "value").

    Raises:
        BadFileError: it has neither form, or the assistant says nothing.
    """
    turns: list[dict[str, Any]] = []
    for message in messages if isinstance(messages, (list, tuple)) else [None]:
        if not isinstance(message, Mapping):
            raise _bad(where, f"a message is {type(message).__name__}")
        turn = {k: v for k, v in message.items() if v is not None}
        if "from" in turn and "value" in turn:
            role = str(turn.pop("from"))
            turn = {"role": _ROLES.get(role, role), "content": turn.pop("value"), **turn}
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content", ""), (str, list)):
            raise _bad(where, f"a message with {', '.join(sorted(map(str, message))) or 'nothing'}")
        turns.append(turn)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadFileError("A conversation has no answer.", found=where, expected='a message of role "assistant"')
    return Chat(tuple(turns), tuple(tools or ()), where)


def _bad(where: str, found: str) -> BadFileError:
    return BadFileError(
        "A conversation cannot be read.",
        found=f"{where}: {found}",
        expected='a list of {"role": "user" or "assistant" or "system", "content": text}',
    )


def render_chat(chat: Chat, template: ChatTemplate | None, special: Sequence[str] = ()) -> tuple[Rendered, ...]:
    """A conversation as the model sees it: one text, or one for each answer where the template needs it.

    Args:
        chat: what was said.
        template: of the model's tokenizer.
        special: its special tokens; what follows the last of them in an answer is left out if it is blank.

    Raises:
        RequestError: the tokenizer has no template.
        BadFileError: the template refuses the conversation.
    """
    if template is None:
        raise RequestError(
            "The data holds conversations, and the model's tokenizer has no chat template.",
            found=chat.where,
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            todo='use the instruction-tuned model\'s tokenizer, or give text ("text") instead',
        )
    if "{%" in template.source and "endgeneration" in template.source:
        text, spans = _render(template, chat, len(chat.messages), marks=True)
        return (Rendered(text, tuple(spans)),)
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant" and i > 0]
    if not turns:
        raise BadFileError("A conversation begins and ends with the assistant.", found=chat.where,
                           expected="a message of another role before an answer")  # fmt: skip
    singles = [_last_answer(template, chat, i, special) for i in turns]
    whole = singles[-1].text
    if all(whole.startswith(single.text[: single.answers[0][1]]) for single in singles):
        return (Rendered(whole, tuple(single.answers[0] for single in singles)),)
    return tuple(singles)


def _last_answer(template: ChatTemplate, chat: Chat, turn: int, special: Sequence[str]) -> Rendered:
    """The conversation up to an answer, and where that answer lies in it."""
    prompt, _ = _render(template, chat, turn, prompt=True)
    text, _ = _render(template, chat, turn + 1)
    start = len(prompt)
    if not text.startswith(prompt):  # a prompt that opens a thought, which a finished answer does not show
        start = _common(prompt, text)
        history, _ = _render(template, chat, turn)
        if start <= _common(history, text):
            raise BadFileError(
                "The chat template writes an answer so that its beginning cannot be told.",
                found=f"{chat.where}, message {turn + 1}",
                todo="use a template with {% generation %} marks",
            )
    body = text.rstrip()
    end = len(body) if len(body) > start and any(body.endswith(token) for token in special) else len(text)
    return Rendered(text, ((start, end),))


def _common(a: str, b: str) -> int:
    """How many characters two texts share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _render(
    template: ChatTemplate, chat: Chat, count: int, *, prompt: bool = False, marks: bool = False
) -> tuple[str, list[Span]]:
    """The first `count` messages, and the ranges that the template marks as generated."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[list(chat.messages[:count])],
            tools=list(chat.tools) or None,
            chat_template=(_CLOCK if "strftime_now" in template.source else "") + template.source,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **template.tokens,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadFileError(
            "The chat template refuses a conversation.", found=f"{chat.where}: {str(error).splitlines()[0]}",
            todo="leave it out, or bring its messages into the form that the model's template takes",
        ) from None  # fmt: skip
    return texts[0], list(spans[0]) if marks else []
