"""The teacher's cache: unbiased samples, exact records, and folders that survive kills and refuse what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import some_stories

from distill.cache import Cache
from distill.caching import CachedTeacher, run_cache_teacher
from distill.data import NO_TARGET
from distill.losses import DenseAnswers, Mix, distillation_loss
from distill.options import CacheOptions, DistillOptions
from distill.records import UNITS, Form, RecordLayout, pack_records, smallest_record, unpack_records
from distill.run import run_distill
from distill.sampling import SparseAnswers, make_records
from nano.checkpoint import Checkpoint
from nano.cli import run as cli
from nano.errors import BadFileError, NoSpaceError, OutputExistsError, RequestError
from nano.manifest import read_manifest

QUICK = DistillOptions(steps=8, batch=4, length=64, eval_tokens=1024, calibration_tokens=512)
KEEP = CacheOptions(length=64, batch=8)


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_stories(tmp_path_factory.mktemp("text"), tinystories, 60)


@pytest.fixture(scope="module")
def cache(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "c"
    run_cache_teacher(stories, [text], out, KEEP)
    return out


def contents(folder: Path) -> dict[bytes, bytes]:
    """Every window's records by key."""
    opened = Cache(folder)
    keys = [row["high"].tobytes() + row["low"].tobytes() for row in opened._table]
    return {key: opened.read(at).tobytes() for at, key in enumerate(keys)}


@pytest.mark.parametrize(("vocab", "size"), [(512, 60), (262_144, 60), (512, 12), (3, 20), (65_536, 200)])
@pytest.mark.parametrize("form", ["sampled", "top"])
def test_records_hold_what_was_put_in(vocab: int, size: int, form: Form) -> None:
    layout, random = RecordLayout(form, vocab, size), np.random.default_rng(1)
    n = 64
    heads = random.integers(0, layout.most_heads + 1, n) if form == "sampled" else np.full(n, layout.most_heads)
    ids = random.integers(0, vocab, (n, layout.most_ids))
    units = random.integers(0, UNITS // max(1, layout.most_heads) + 1, (n, layout.most_heads))
    units[:, 0] += 1  # "top" has at least one probability
    entropy = random.random(n).astype(np.float16)
    records = pack_records(layout, entropy, heads, ids, units)
    assert records.shape == (n, size)
    found_ids, weights, found_entropy = unpack_records(layout, records)
    np.testing.assert_array_equal(found_entropy, entropy.astype(np.float32))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    for row in range(n):
        h, k = int(heads[row]), int(layout.places(heads[row]))
        used = h if form == "top" else k
        assert found_ids[row, :used].tolist() == ids[row, :used].tolist()
        own = units[row, :h] / (UNITS if form == "sampled" else units[row, :h].sum())
        np.testing.assert_allclose(weights[row, :h], own, rtol=1e-5)
        if form == "sampled":
            np.testing.assert_allclose(weights[row, h:k], max(0.0, 1 - own.sum()) / (k - h), rtol=1e-3, atol=1e-6)
        assert not weights[row, used:].any()


def test_the_default_fits_its_budget() -> None:
    """At most 64 bytes a token with the index's 24 bytes a window; 262,144 ids."""
    layout = RecordLayout("sampled", 262_144, CacheOptions().bytes_per_token)
    assert CacheOptions().bytes_per_token + 24 / 8 <= 64  # windows of eight tokens, the shortest
    assert layout.most_ids == 25
    assert layout.places(layout.most_heads) > layout.most_heads >= 14
    assert smallest_record(262_144) == 15


def spread_out(layout: RecordLayout, records: Any) -> torch.Tensor:
    """Records as whole distributions, (N, V)."""
    ids, weights, _ = unpack_records(layout, records)
    dense = torch.zeros(len(ids), layout.vocab_size, dtype=torch.float64)
    return dense.scatter_add_(1, torch.from_numpy(ids), torch.from_numpy(weights).double())


@pytest.mark.parametrize("scale", [0.1, 1.5, 6.0, 40.0])
def test_samples_are_unbiased_and_top_k_is_not(scale: float) -> None:
    """The mean of 6,000 samples against the distribution, in standard errors."""
    vocab, count = 97, 6000
    layout = RecordLayout("sampled", vocab, 16)
    g = torch.Generator().manual_seed(3)
    logits_V = scale * torch.randn(vocab, generator=g)
    logits = logits_V.expand(count, vocab)
    p = logits_V.double().softmax(0)
    dense = spread_out(layout, make_records(layout, logits, torch.rand(count, 2, generator=g, dtype=torch.float64)))
    torch.testing.assert_close(dense.sum(1), torch.ones(count, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    error = (dense.mean(0) - p).abs()
    assert bool((error < 5 * dense.std(0) / count**0.5 + 5e-5).all())  # some are too rare to be drawn at all
    assert (dense > 0).sum(1).max() <= layout.most_ids
    top = replace(layout, form="top")
    kept = spread_out(top, make_records(top, logits[:1], torch.zeros(1, 2, dtype=torch.float64)))[0]
    assert float((kept - p).abs().sum()) > (0.2 if scale < 2 else 0)
    assert kept.argsort(descending=True)[: top.most_heads].tolist() == p.argsort(descending=True)[: top.most_heads].tolist() or scale > 2  # noqa: E501  # fmt: skip


def test_systematic_samples_vary_less_than_independent_draws() -> None:
    """Summed variance against that of as many independent draws with weights 1/k, the form of arXiv 2503.16870."""
    vocab, count = 200, 3000
    layout = RecordLayout("sampled", vocab, 24)
    g = torch.Generator().manual_seed(4)
    logits = (2.5 * torch.randn(vocab, generator=g)).expand(count, vocab)
    dense = spread_out(layout, make_records(layout, logits, torch.rand(count, 2, generator=g, dtype=torch.float64)))
    p = logits[0].double().softmax(0)
    independent = (p * (1 - p) / layout.most_ids).sum()
    assert float(dense.var(0).sum()) < 0.5 * float(independent)


@pytest.mark.parametrize("mix", [Mix(0.02, 0.01), Mix(0.02, 0.0), Mix(0.01, 0.02, 2.0)], ids=str)
def test_the_sparse_loss_is_its_definition(mix: Mix) -> None:
    mix, n, v, d, k = replace(mix, dtype=torch.float64), 40, 61, 8, 6
    g = torch.Generator().manual_seed(2)
    hidden, head = (torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((n, d), (v, d)))
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)])
    weights = torch.rand(n, k, generator=g, dtype=torch.float64).softmax(1)
    entropy = torch.rand(n, generator=g, dtype=torch.float64)
    target = torch.randint(0, v, (n,), generator=g)
    target[::5] = NO_TARGET
    loss, sums = distillation_loss(hidden, head, SparseAnswers(ids, weights, entropy), target, mix)
    ours = torch.autograd.grad(loss, (hidden, head))
    z = hidden @ head.T
    cross = -(weights * F.log_softmax(z / mix.temperature, -1).gather(1, ids)).sum() - entropy.sum()
    ce = F.cross_entropy(z, target, ignore_index=NO_TARGET, reduction="sum")
    expected = mix.kd_weight * mix.temperature**2 * cross + mix.ce_weight * ce
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert float(sums.kl) == pytest.approx(cross.item(), rel=1e-10)
    for a, b in zip(ours, torch.autograd.grad(expected, (hidden, head)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_of_samples_are_right_on_average() -> None:
    n, v, d = 3000, 80, 6
    g = torch.Generator().manual_seed(8)
    hidden, head = torch.randn(1, d, generator=g).expand(n, d), torch.randn(v, d, generator=g).requires_grad_()
    teacher_hidden, teacher_head = torch.randn(1, 9, generator=g).expand(n, 9), torch.randn(v, 9, generator=g)
    layout, target, mix = RecordLayout("sampled", v, 16), torch.full((n,), NO_TARGET), Mix(1 / n, 0.0)
    draws = torch.rand(n, 2, generator=g, dtype=torch.float64)
    records = make_records(layout, teacher_hidden @ teacher_head.T, draws)
    sparse = SparseAnswers(*(torch.from_numpy(part) for part in unpack_records(layout, records)))
    losses = [distillation_loss(hidden, head, a, target, mix) for a in (sparse, DenseAnswers(teacher_hidden, teacher_head))]  # noqa: E501  # fmt: skip
    one, whole = (torch.autograd.grad(loss, head)[0] for loss, _ in losses)
    assert float((one - whole).norm() / whole.norm()) < 0.03
    assert float(losses[0][1].kl) == pytest.approx(float(losses[1][1].kl), rel=0.02)


def test_a_student_from_the_cache_is_the_live_teachers(cache: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    live = run_distill(stories, "150k", [text], tmp_path / "live", QUICK).results["held_out"]["trained"]
    manifest = run_distill(stories, "150k", [text], tmp_path / "cached", QUICK, teacher_cache=cache)
    cached = manifest.results["held_out"]["trained"]
    assert cached["cross_entropy"] == pytest.approx(live["cross_entropy"], rel=0.01)
    assert cached["kl"] == pytest.approx(live["kl"], rel=0.01)
    assert cached["kl"] != live["kl"]
    assert manifest.inputs["teacher_cache"]["bytes_per_token"] == 60
    noted = [[json.loads(x)["kl"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("live", "cached")]  # noqa: E501  # fmt: skip
    np.testing.assert_allclose(noted[1], noted[0], rtol=0.03)  # the divergence itself, not its cross-entropy


def test_the_teacher_does_not_run_while_a_student_is_trained(
    cache: Path, stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr("distill.teacher.LiveTeacher.answers", never)
    run_distill(stories, "150k", [text], tmp_path / "s", QUICK, teacher_cache=cache)
    assert "teacher_cache" in read_manifest(tmp_path / "s").inputs


def test_more_text_is_added_and_nothing_twice(stories: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text("".join(line + "\n" for line in text.read_text().splitlines()[:30]))
    first = run_cache_teacher(stories, [half], tmp_path / "c", KEEP)
    assert 0 < first.tokens < Cache(cache).tokens
    second = run_cache_teacher(stories, [text], tmp_path / "c", KEEP)
    assert second.tokens > 0
    assert len(second.cache.made["text"]) == 2
    third = run_cache_teacher(stories, [text], tmp_path / "c", KEEP)
    assert third.tokens == 0
    grown, whole = contents(tmp_path / "c"), contents(cache)
    assert whole.keys() <= grown.keys()
    layout = Cache(cache).facts.layout
    for key, records in whole.items():  # packing moves a window within a batch, and so its last bits
        ours, theirs = (unpack_records(layout, np.frombuffer(r, np.uint8).reshape(-1, 60)) for r in (grown[key], records))  # noqa: E501  # fmt: skip
        np.testing.assert_allclose(ours[2], theirs[2], atol=4e-3)


def test_a_killed_cache_goes_on(stories: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    command = [sys.executable, "-m", "nano", "cache-teacher", stories, "--data", text, "--out", out, "--json",
               "--length", 64, "--batch", 8, "--shard-tokens", 2000]  # fmt: skip
    words = [str(word) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not (out / "shard-00002.bin").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    before = Cache(out).tokens
    assert 2 * 2000 <= before < Cache(cache).tokens
    (out / "shard-00099.bin.partial").write_bytes(b"half a shard")
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    record = json.loads(done.stdout)
    assert record["tokens"] == Cache(cache).tokens == before + record["added_tokens"]
    assert contents(out).keys() == contents(cache).keys()


def test_a_full_disk_keeps_the_shards_before(
    stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import distill.cache as module

    real, calls = module._write_flushed, []

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(path, data)

    with monkeypatch.context() as patch, pytest.raises(NoSpaceError, match="kept"):
        patch.setattr(module, "_write_flushed", full)
        run_cache_teacher(stories, [text], tmp_path / "c", replace(KEEP, shard_tokens=2000))
    assert 2000 <= Cache(tmp_path / "c").tokens < 4000
    assert run_cache_teacher(stories, [text], tmp_path / "c", replace(KEEP, shard_tokens=2000)).tokens > 0


def test_damage_is_found(cache: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    for name, harm, words in (
        (
            "shard-00000.bin",
            lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
            "checksum",
        ),
        ("shard-00000.bin", lambda b: b[:-7], "bytes"),
        ("shard-00000.index", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "not what was written"),
        ("cache.json", lambda b: b[:-20], "not of a form"),
        ("cache.json", None, "not a teacher's cache"),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(cache, copy)
        if harm:
            (copy / name).write_bytes(harm((copy / name).read_bytes()))
        else:
            (copy / name).unlink()
        with pytest.raises(BadFileError, match=words):
            run_distill(stories, "150k", [text], tmp_path / "s", replace(QUICK, steps=120), force=True, teacher_cache=copy)  # noqa: E501  # fmt: skip
        assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 48}, "windows are missing"),
        ({"seed": 5}, "windows are missing"),
        ({"temperature": 2.0}, "another temperature"),
        ({"divergence": "reverse"}, "--divergence reverse"),
        ({"on_policy": 0.5, "prompt": 8}, "--on-policy 0.5"),
        ({"match": 0.1}, "--match 0.1"),
    ],
)
def test_a_run_that_the_cache_does_not_fit(
    change: dict[str, Any], words: str, cache: Path, stories: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=words):
        run_distill(stories, "150k", [text], tmp_path / "s", replace(QUICK, **change), teacher_cache=cache)
    assert not list(tmp_path.iterdir())


def test_another_teacher_is_named(cache: Path, stories: Path, text: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(stories, teacher)
    from safetensors.torch import load_file, save_file

    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match="another teacher"):
        run_distill(teacher, "150k", [text], tmp_path / "s", QUICK, teacher_cache=cache)
    with pytest.raises(RequestError, match="another teacher"):
        run_cache_teacher(teacher, [text], cache, KEEP)
    with pytest.raises(RequestError, match="another bytes per token"):
        run_cache_teacher(stories, [text], cache, replace(KEEP, bytes_per_token=32))


def test_what_lies_at_the_output_is_not_lost(
    stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious").write_text("x")
    with pytest.raises(OutputExistsError):
        run_cache_teacher(stories, [text], tmp_path / "c", KEEP)

    def fail(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(NoSpaceError):
        patch.setattr("distill.cache._write_flushed", fail)
        run_cache_teacher(stories, [text], tmp_path / "c", KEEP, force=True)
    assert (tmp_path / "c" / "precious").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    words = ["cache-teacher", str(stories), "--data", str(text), "--out", str(tmp_path / "d"), "--bytes-per-token", "8"]
    assert cli(words) == 2
    assert "too small for this vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_run_from_the_cache_resumes_bit_for_bit(
    cache: Path, stories: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_state: Any, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    options = replace(QUICK, save_every=2)
    run_distill(stories, "150k", [text], tmp_path / "whole", options, teacher_cache=cache)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distill.state.StateFolder.note", stop)
        run_distill(stories, "150k", [text], tmp_path / "cut", options, teacher_cache=cache)
    with pytest.raises(RequestError, match="teacher_cache changed"):
        run_distill(stories, "150k", [text], tmp_path / "cut", options, resume=True)
    run_distill(stories, "150k", [text], tmp_path / "cut", options, resume=True, teacher_cache=cache)
    with Checkpoint(tmp_path / "whole") as whole, Checkpoint(tmp_path / "cut") as cut:
        assert all(torch.equal(whole.tensor(name), cut.tensor(name)) for name in whole.names())


def test_answers_come_in_the_batchs_order(cache: Path, stories: Path, text: Path) -> None:
    """The cached teacher's answers, position by position, are the sample of the live one's distribution there."""
    from distill.data import make_batch
    from distill.teacher import open_teacher
    from distill.text import load_text
    from nano.shapes import ModelShape, read_config
    from nano.sources import open_sources
    from nano.tokens import load_tokenizer

    rows = load_text(open_sources([text]), load_tokenizer(stories), KEEP.run_options()).rows
    batch = make_batch(rows, np.arange(len(rows) - 6, len(rows)))
    live = open_teacher(stories, ModelShape.from_hf(read_config(stories)), "float32", "cpu").answers(batch)
    p = F.softmax(live.hidden_NE.double() @ live.head_VE.double().T, -1)
    kept = CachedTeacher(Cache(cache)).answers(batch)
    dense = torch.zeros_like(p).scatter_add_(1, kept.id_NK, kept.weight_NK.double())
    assert float((dense - p).abs().sum(1).max()) < 0.7
    assert float((dense - p).abs().sum(1).mean()) < 0.12
    torch.testing.assert_close(kept.entropy_N.double(), -(p * p.log()).sum(1), atol=4e-3, rtol=2e-3)
