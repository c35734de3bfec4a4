"""What all tests share: the real data's place, tiny models of every family, and a CLI runner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent


def shared_data(relative: str) -> Path:
    """A file or folder of the real data set; the test is skipped where it is missing.

    It lies in `$NANOKIT_DATA`, or in `../shared/data` beside the checkout.
    """
    root = Path(os.environ.get("NANOKIT_DATA", REPO.parent / "shared" / "data"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"real data missing: {path} (set NANOKIT_DATA to the folder that holds models/ and text/)")
    return path


def pytest_configure() -> None:
    """A shell starts what it puts in the background deaf to Ctrl-C, and processes pass that on to their own."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenised text goes to a folder of the session's own."""
    before = os.environ.get("NANOKIT_CACHE")
    os.environ["NANOKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("NANOKIT_CACHE")
    if before is not None:
        os.environ["NANOKIT_CACHE"] = before


@pytest.fixture(scope="session")
def stories() -> Path:
    """stories260K: a real pretrained Llama with V=512, D=64, F=172, 5 layers, 8 heads, 4 key/value heads."""
    return shared_data("models/stories260K")


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """Real stories, JSONL with a "text" field."""
    return shared_data("text/tinystories.jsonl")


@pytest.fixture(scope="session")
def eval_data() -> Path:
    """Public test sets, as they are on disk: arc_easy.jsonl, bbh/, mbpp.jsonl, ..."""
    return shared_data("eval")


_FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32,
                    "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


def make_tiny_model(folder: Path, family: str, **changes: Any) -> Path:
    """A random two-layer HF model of a family with a byte-level tokenizer, saved in `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
        **_FAMILY_EXTRAS[family], **changes,
    }  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # fresh norms are constant; a real model's are not
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **config changes)`: a random tiny HF folder, made once a session for each request."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = json.dumps([family, changes], sort_keys=True, default=str)
        if key not in made:
            made[key] = make_tiny_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return make


@dataclass(frozen=True)
class Ran:
    """A finished command."""

    status: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.stdout)
        return loaded


@pytest.fixture(scope="session")
def nanokit() -> Callable[..., Ran]:
    """`nanokit("plan", "--teacher", DIR)` runs the real command in a process of its own."""

    def call(*arguments: object, cwd: Path | None = None, timeout: float = 600) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "nano", *map(str, arguments)],
            capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False,
            env={**os.environ, "COLUMNS": "80", "PYTHONWARNINGS": "default"},
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    return call
