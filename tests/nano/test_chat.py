"""Conversations through templates of the kinds that real models have, and the answer's tokens in them.

The templates here are written for these tests after the behaviour of real ones. Where TRL is installed, its
collection of real templates is read too: each beside a version with generation marks, which says what is right.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nano.chat import Chat, ChatTemplate, render_chat
from nano.errors import BadFileError, RequestError

TALK = Chat(
    (
        {"role": "user", "content": "Hello,  who are you?"},
        {"role": "assistant", "content": "I am a cat."},
        {"role": "user", "content": "Really?\n"},
        {"role": "assistant", "content": "Yes.\n\nReally."},
    ),
    where="test, line 1",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
THINKING = CHATML.replace(
    "m['content'] +", "('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '') + m['content'] +"
)
OPENS_A_THOUGHT = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
DATED = "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


def answers(source: str, chat: Chat = TALK) -> list[list[str]]:
    found = render_chat(chat, ChatTemplate(source, {"bos_token": "<s>"}), ["<|im_end|>", "<s>"])
    return [[r.text[a:b] for a, b in r.answers] for r in found]


def test_a_plain_template_by_prefixes_equals_a_marked_one() -> None:
    assert answers(CHATML) == answers(MARKED) == [["I am a cat.<|im_end|>", "Yes.\n\nReally.<|im_end|>"]]
    plain, marked = (render_chat(TALK, ChatTemplate(s, {}), ["<|im_end|>"]) for s in (CHATML, MARKED))
    assert plain == marked


def test_the_text_is_transformers_own() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    for source in (CHATML, THINKING):
        expected = peer.apply_chat_template(list(TALK.messages), chat_template=source, tokenize=False)
        assert render_chat(TALK, ChatTemplate(source, {}), ["<|im_end|>"])[-1].text == expected


def test_earlier_turns_written_otherwise_become_texts_of_their_own() -> None:
    """As Qwen3: each answer stands as the model gives it, after the history as the model sees it."""
    thought = "<think>\n\n</think>\n\n"
    assert answers(THINKING) == [[thought + "I am a cat.<|im_end|>"], [thought + "Yes.\n\nReally.<|im_end|>"]]
    last = render_chat(TALK, ChatTemplate(THINKING, {}), ["<|im_end|>"])[-1]
    assert last.text.count("<think>") == 1


def test_a_prompt_that_opens_a_thought() -> None:
    assert answers(OPENS_A_THOUGHT) == answers(CHATML)


def test_the_date_is_always_the_same() -> None:
    found = render_chat(TALK, ChatTemplate(DATED, {"bos_token": "<s>"}), ["<|im_end|>"])
    assert found[0].text.startswith("<s>Today is 26 Jul 2024.\n<|im_start|>user")


def test_what_cannot_be_rendered_is_named() -> None:
    twice = Chat((TALK.messages[0], *TALK.messages), where="talk.jsonl, line 7")
    with pytest.raises(BadFileError, match="must alternate") as error:
        answers(ALTERNATING, twice)
    assert "talk.jsonl, line 7" in str(error.value)
    with pytest.raises(RequestError, match="no chat template"):
        render_chat(TALK, None)
    with pytest.raises(BadFileError, match="test"):
        render_chat(TALK, ChatTemplate("{% for", {}))


def real_templates() -> list[str]:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "chat_templates"
    return sorted(p.name.removesuffix("_training.jinja") for p in folder.glob("*_training.jinja"))


@pytest.mark.skipif(not real_templates(), reason="trl, which has a collection of real templates, is not installed")
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "phi3", "lfm2"])
def test_real_templates(name: str) -> None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    special = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"]
    tokens = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}

    def said(file: str) -> list[str]:
        template = ChatTemplate((folder / file).read_text(encoding="utf-8"), tokens)
        return [r.text[a:b].strip() for r in render_chat(TALK, template, special) for a, b in r.answers]

    marked = [text for text in said(f"{name}_training.jinja") if "I am" in text or "Yes" in text]
    ours = [text.removesuffix("<|endoftext|>").strip() for text in said(f"{name}.jinja")]
    assert ours == marked
    assert len(ours) == 2
