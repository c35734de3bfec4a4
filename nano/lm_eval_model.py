"""Any stage's model in lm-evaluation-harness: `--model nanokit --model_args path=FOLDER`.

Importing this module registers the model with lm-eval (`register_model`, its own means for models that live
elsewhere). lm-eval looks for models in its own list and in what was imported, not in entry points, so its plain
command line cannot find this one: `nanokit lm-eval ARGUMENTS` imports it and runs lm-eval's command line with those
arguments.

Texts become ids, are cut and are scored as in lm-eval's backend for transformers (lm_eval/models/huggingface.py), so
a float folder gives the same numbers there and here, and a bundle's differ by what quantization did to the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.models  # noqa: F401  # lm-eval fills its list only while it is empty: its own models come first
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from nano.errors import BadFileError, RequestError
from nano.hub import resolve_model
from nano.lm import Activations, open_model
from nano.progress import track, warn
from nano.tasks.answering import before_stop, greedy_ids, likelihoods_of_ids

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256
"""Longest answer where a task does not say, as in lm-eval's backend for transformers."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that lm-eval's tasks have for it, the first that is there counts."""


@register_model("nanokit")
class NanokitLM(TemplateLM):  # type: ignore[misc]
    """An HF float folder, an int4 folder, a .pte bundle or an ONNX bundle, run by its own runtime on the CPU.

    Args:
        path: the folder.
        activations: for an int4 folder: "float", or "int8-xnnpack" or "int8-ort" to simulate a phone runtime.
        max_length: the context, where it should be shorter than the model's.
        add_bos_token: whether texts begin with the beginning id; where it is not given, the tokenizer decides.
        batch_size, max_batch_size, device: lm-eval passes them, a default device too. They change nothing: batches are
            chosen by the tokens they hold, and everything runs on the CPU.
    """

    def __init__(
        self,
        path: str,
        activations: Activations = "float",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        folder = resolve_model(str(path))
        self.tokenizer = _tokenizer(folder)
        self._model = open_model(folder, activations=activations)
        self._name, self._add_bos = str(path), add_bos_token
        self.max_length = min(int(max_length or self._model.context), self._model.context)
        # the tokenizer in a bundle for ExecuTorch leaves a text's added leading space to the reader
        self._leading_space = self.tokenizer.decode(self.tokenizer.encode("a", add_special_tokens=False)) == " a"

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        ends = (self.tokenizer.eos_token_id, *self._model.tokenizer.eos_ids)
        found = next((i for i in ends if i is not None), None)
        if found is None:
            raise BadFileError("The tokenizer names no token that ends a text.", found=self._name)
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without a context: the beginning id, or where there is none the end's."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps answers under."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_others: Any) -> list[int]:
        """Ids of a text. Special ids are added as the tokenizer does, but never a second beginning."""
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add = False
        return list(self.tokenizer.encode(string) if add is None else self.tokenizer.encode(string, add_special_tokens=add))  # noqa: E501  # fmt: skip

    def tok_decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special ones left out."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return text[1:] if self._leading_space and text.startswith(" ") else text

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_others: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether each id was the likeliest) of each request's last ids after its first ones."""
        asked = []
        for _texts, context, ids in requests:
            if len(ids) > self.max_length:
                raise RequestError(
                    "An answer to score is longer than the model's context.",
                    found=f"{len(ids)} tokens", expected=f"at most {self.max_length}",
                )  # fmt: skip
            kept = [*context, *ids][-(self.max_length + 1) :]
            asked.append((kept[: -len(ids)], ids, len(context) + len(ids) - len(kept)))
        _say_cut([cut for _context, _ids, cut in asked])
        with track("loglikelihood", len(asked), "requests") as progress:
            found = likelihoods_of_ids(self._model, asked, progress.advance)
        answers = [(one.total, one.greedy) for one in found]
        for (texts, _context, _ids), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each in windows as long as the context that do not overlap."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            mine = [(None, *utils.make_disjoint_window(window)) for window in cut]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each prompt, up to a stop text, an end id or so many tokens.

        Raises:
            RequestError: a task asks for sampling or beams.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        with track("generate", len(requests), "requests") as progress:
            for numbers in groups.values():
                limit, stop = _greedy_settings(requests[numbers[0]].args[1])
                prompts = [requests[number].args[0] for number in numbers]
                for number, text in zip(numbers, self._answers(prompts, limit, stop, progress.advance), strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _answers(self, prompts: Sequence[str], limit: int, stop: Sequence[str], done: Any) -> list[str]:
        room = self.max_length - limit
        if room < 1:
            raise RequestError(
                "The model's context has no room for the answer.", found=f"max_gen_toks {limit}",
                expected=f"less than the context, {self.max_length}", todo="--gen_kwargs max_gen_toks=N",
            )  # fmt: skip
        whole = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt in prompts]
        asked = [ids[-room:] for ids in whole]
        _say_cut([len(ids) - len(kept) for ids, kept in zip(whole, asked, strict=True)])
        ends = {self.eot_token_id, *self._model.tokenizer.eos_ids}

        def ended(_number: int, new: list[int]) -> bool:
            end = new[-1] in ends or len(new) == limit
            end = end or (bool(stop) and any(word in self.tok_decode(new) for word in stop))
            if end:
                done(1)
            return end

        found = greedy_ids(self._model, asked, limit, ended)
        return [before_stop(self.tok_decode(new[:-1] if new[-1] in ends else new), stop) for new in found]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's own template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer as transformers loads it, which is the one that lm-eval's own backend uses."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadFileError(
            "transformers cannot load this folder's tokenizer.", found=f"{folder}: {str(error).splitlines()[0]}"
        ) from None


def _greedy_settings(asked: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """(most new tokens, stop texts) of a task's generation settings.

    Raises:
        RequestError: they ask for something other than greedy text.
    """
    left = dict(asked)
    until = left.pop("until", None) or []
    lengths = [left.pop(name, None) for name in _LENGTHS]
    limit = next((int(length) for length in lengths if length is not None), MAX_GEN_TOKS)
    samples = left.pop("do_sample", None)
    # a temperature says nothing where do_sample is false, which is what many tasks write
    warm = float(left.pop("temperature", 0.0) or 0.0) > 0 and samples is not False
    others = sorted(name for name, value in left.items() if (name, value) not in (("top_p", 1.0), ("num_beams", 1)))
    if samples or warm or (others and samples is not False):
        raise RequestError(
            "nanokit's models answer greedily.", found=f"generation settings {asked}",
            expected="until and max_gen_toks alone", todo="--gen_kwargs do_sample=false,temperature=0",
        )  # fmt: skip
    return limit, tuple(word for word in ([until] if isinstance(until, str) else until) if word)


def _say_cut(cut: Sequence[int]) -> None:
    count = sum(ids > 0 for ids in cut)
    if count:
        warn(f"{count} of {len(cut)} texts do not fit the context: cut at their beginning, up to {max(cut)} tokens")
