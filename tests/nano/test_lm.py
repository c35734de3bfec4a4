"""Any stage's model through one protocol: the HF folder, and how others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nano.errors import BadFileError, RequestError
from nano.families import FAMILIES
from nano.lm import generate, open_model, stage_of


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_the_whole_window(family: str, tiny_model: Callable[..., Path]) -> None:
    model = open_model(tiny_model(family))
    ids = np.random.default_rng(0).integers(3, 320, size=40)
    whole = model.logits([ids])[0]
    steps = [model.prefill(ids[:30].tolist())] + [model.decode(int(i)) for i in ids[30:]]
    np.testing.assert_allclose(np.stack(steps), whole[29:], rtol=1e-4, atol=1e-4)


def test_windows_of_unequal_length_do_not_disturb_each_other(tiny_model: Callable[..., Path]) -> None:
    model = open_model(tiny_model("gemma3_text"))
    rng = np.random.default_rng(1)
    windows = [rng.integers(3, 320, size=n) for n in (40, 9, 25)]
    together = model.logits(windows)
    for window, logits in zip(windows, together, strict=True):
        assert logits.shape == (len(window), 320)
        np.testing.assert_allclose(logits, model.logits([window])[0], rtol=1e-4, atol=1e-4)


def test_greedy_text_equals_transformers_generate(stories: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = open_model(stories)
    prompt = "Once upon a time"
    ours = generate(model, prompt, 40)
    peer = AutoModelForCausalLM.from_pretrained(stories, local_files_only=True)
    ids = torch.tensor([model.tokenizer.prompt(prompt)])
    theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert ours == theirs[0, ids.shape[1] :].tolist()
    assert model.tokenizer.decode(ours).startswith(", there was a little girl")


def test_sampling_depends_on_the_seed(stories: Path) -> None:
    model = open_model(stories)
    a, b, c = (generate(model, "One day", 20, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert a == b != c


def test_generation_stops_at_the_context(tiny_model: Callable[..., Path]) -> None:
    model = open_model(tiny_model("llama", max_position_embeddings=24))
    assert len(generate(model, "0123456789", 100)) <= 24 - 11
    with pytest.raises(RequestError, match="too long"):
        generate(model, "x" * 30, 5)


def test_activations_are_for_int4_folders(stories: Path) -> None:
    with pytest.raises(RequestError, match="Only an int4 folder"):
        open_model(stories, activations="int8-xnnpack")


def test_a_foreign_quantization_is_refused(stories: Path, tmp_path: Path) -> None:
    config = json.loads((stories / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BadFileError, match="'gptq'"):
        stage_of(tmp_path)
