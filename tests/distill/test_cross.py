"""Students of another tokenizer: which tokens and spans are the same text, the losses over them, whole runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import LargestTensor, metrics, same_bits

from distill import cross_losses
from distill.cross_losses import CrossAnswers, Shared, earlier_positions
from distill.cross_text import LONGEST_SPAN
from distill.cross_vocabulary import match_vocabularies, token_texts
from distill.data import NO_TARGET, Batch, make_batch
from distill.losses import DenseAnswers, Mix, distillation_loss
from distill.options import DistillOptions
from distill.packing import View
from distill.run import run_distill, run_distill_many
from distill.state import StateFolder
from distill.text import Other, Text, load_text
from nano.corpus import read_documents
from nano.errors import RequestError, UnsupportedError
from nano.shapes import read_config
from nano.sources import open_sources
from nano.tokens import TextTokenizer, load_tokenizer

OPTIONS = DistillOptions(steps=30, batch=4, length=64, eval_tokens=512, start="random", curves=False, cross_tokenizer="gold")  # noqa: E501  # fmt: skip
HARD = 'Zoë said: "Hi 😀😀!"\n\nThe 東京 tower\tis so tall. Café 👩‍👩‍👧 é'


def train_tokenizer(folder: Path, texts: list[str], size: int, bos: bool = True) -> Path:
    """A byte-level BPE tokenizer of some texts, with what says that a text begins."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)  # noqa: E501  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>" if bos else None, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.fixture(scope="module")
def text(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.jsonl"
    texts = [str(t)[:600] for t in read_documents([tinystories])[:150]]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, HARD]))
    return path


@pytest.fixture(scope="module")
def student(stories: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An architecture like stories260K's with a tokenizer of its own, and a few rows more than it has ids."""
    folder = train_tokenizer(tmp_path_factory.mktemp("student"), [str(t) for t in read_documents([text])], 600)
    ids = {"vocab_size": 608, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps({**read_config(stories), **ids}))
    return folder


def read_both(ours: Path, theirs: Path, text: Path, **changes: Any) -> tuple[TextTokenizer, TextTokenizer, Text]:
    own, other = load_tokenizer(ours), load_tokenizer(theirs)
    options = replace(OPTIONS, **changes)
    return own, other, load_text(open_sources([text]), own, options, other=Other(other, 512))


def texts_of(tokenizer: TextTokenizer) -> dict[int, bytes]:
    backend = tokenizer.backend
    named = {number: key[1] for key, number in token_texts(tokenizer).items()}
    for token, number in backend.get_vocab(with_added_tokens=True).items():  # "<0x41>" where "A" is a token too
        named.setdefault(number, bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.encode())
    return named


def spans_of(last_S: Any, count_S: Any, target_N: torch.Tensor) -> list[list[int]]:
    targets = target_N.tolist()
    return [targets[last - count + 1 : last + 1] for last, count in zip(last_S, count_S, strict=True)]


def span_texts(batch: Batch, own: TextTokenizer, other: TextTokenizer) -> Iterator[tuple[bytes, bytes]]:
    beside = batch.beside
    assert beside is not None
    ours, theirs = texts_of(own), texts_of(other)
    sides = (
        spans_of(beside.last_S, beside.count_S, batch.target_N),
        spans_of(beside.their_last_S, beside.their_count_S, beside.batch.target_N),
    )
    for a, b in zip(*sides, strict=True):
        yield b"".join(ours[i] for i in a), b"".join(theirs[i] for i in b)


def test_tokens_are_matched_by_their_bytes(stories: Path, student: Path) -> None:
    own, other = load_tokenizer(student), load_tokenizer(stories)
    matched = match_vocabularies(own, other)
    ours, theirs = own.backend.id_to_token, other.backend.id_to_token
    pairs = {(ours(int(a)), theirs(int(b))) for a, b in zip(matched.ours_M, matched.theirs_M, strict=True)}
    assert {("Ġthe", "▁the"), ("Ċ", "<0x0A>"), ("a", "a"), ("<s>", "<s>"), ("Ġ", "▁")} <= pairs
    assert ("A", "A") in pairs  # and not the byte's stand-in <0x41>
    assert len(matched.ours_M) + len(matched.our_rest) == own.size
    assert len(matched.theirs_M) + len(matched.their_rest) == other.size
    texts = [str(t).removeprefix("Ġ").removeprefix("▁") for t, _ in pairs]
    assert len(texts) > 250
    assert len(set(matched.ours_M.tolist())) == len(set(matched.theirs_M.tolist())) == len(pairs)


@pytest.mark.parametrize("length", [24, 64, 200])
def test_spans_are_the_same_text_on_both_sides(length: int, stories: Path, student: Path, text: Path) -> None:
    own, other, read = read_both(student, stories, text, length=length)
    batch = make_batch(read.rows, slice(None))
    beside = batch.beside
    assert beside is not None
    for ours, theirs in span_texts(batch, own, other):
        assert theirs in (ours, b" " + ours)  # SentencePiece writes a space before a text
    assert beside.count_S.sum() > 0.97 * batch.targets
    assert (np.diff(beside.last_S) >= beside.count_S[1:]).all()
    assert int(beside.count_S.max()) > 1 < int(beside.their_count_S.max())
    assert int(beside.count_S.max()) <= LONGEST_SPAN


def test_spans_are_cut_wherever_both_end_a_token(stories: Path, student: Path, tmp_path: Path) -> None:
    """Against the definition: sets of the characters that tokens end at."""
    lines = [HARD, "Once upon a time, Tim saw a wolf.", "ééé 😀 x", "abc", "The end. The end of 東京."] * 5
    path = tmp_path / "hard.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {t}"}) + "\n" for n, t in enumerate(lines)))
    own, other, read = read_both(student, stories, path, batch=1, length=256)
    assert isinstance(read.rows.ids_RT, View)
    total = 0
    for row in range(len(read.rows)):
        batch = make_batch(read.rows, np.array([row]))
        found = list(span_texts(batch, own, other))
        wanted: list[bytes] = []
        starts = np.flatnonzero(batch.ids_BT[0].numpy() == own.bos_id)
        for start in starts:  # every document of these fits one window
            segment = batch.segment_BT[0] == batch.segment_BT[0, start]
            document = own.decode(batch.ids_BT[0][segment].tolist())
            a, b = (t.backend.encode(document, add_special_tokens=False).offsets for t in (own, other))
            common = sorted({0} | ({end for _, end in a} & {end for _, end in b}))
            wanted += [document[i:j].encode() for i, j in itertools.pairwise(common)]
        assert [ours for ours, _ in found] == wanted
        total += len(wanted)
    assert total > 200


def slow_loss(logits_NV: torch.Tensor, teacher_MU: torch.Tensor, batch: Batch, shared: Any, mix: Mix) -> torch.Tensor:
    """The module's formulas span by span, with probabilities; gradients by autograd."""
    beside = batch.beside
    assert beside is not None
    q_NV, p_MU = (logits_NV / mix.temperature).softmax(-1), (teacher_MU / mix.temperature).softmax(-1)
    b, total = mix.beta, logits_NV.new_zeros(())

    def kl(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * (x / y).log() - x + y).sum()

    def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        size = max(len(x), len(y))
        x, y = (torch.cat([z.sort(descending=True)[0], z.new_zeros(size - len(z))]) for z in (x, y))
        return (x - y).abs().sum()

    places = zip(beside.last_S, beside.count_S, beside.their_last_S, beside.their_count_S, strict=True)
    for last, count, their_last, their_count in places:
        q, p = q_NV[last], p_MU[their_last]
        for n in range(last - count + 1, last):
            q = q * q_NV[n, batch.target_N[n]]
        for n in range(their_last - their_count + 1, their_last):
            p = p * p_MU[n, beside.batch.target_N[n]]
        if shared is None:
            total = total + apart(q, p)
            continue
        x, y = p[shared.theirs_M], q[shared.ours_M]
        m = b * x + (1 - b) * y
        same = {
            "forward": lambda x, y, _m: kl(x, y), "reverse": lambda x, y, _m: kl(y, x),
            "skew": lambda x, _y, m: kl(x, m),
            "skew-reverse": lambda _x, y, m: kl(y, m), "jsd": lambda x, y, m: b * kl(x, m) + (1 - b) * kl(y, m),
        }[mix.kind](x, y, m)  # fmt: skip
        w = len(shared.theirs_M) / teacher_MU.shape[1]
        total = total + w * same + (1 - w) * apart(q[shared.our_rest], p[shared.their_rest])
    has = batch.target_N != NO_TARGET
    ce = torch.nn.functional.cross_entropy(logits_NV[has], batch.target_N[has], reduction="sum")
    return mix.kd_weight * mix.temperature**2 * total + mix.ce_weight * ce


def answers_of(hidden_ME: torch.Tensor, head_UE: torch.Tensor, batch: Batch, shared: Shared | None, t: float) -> CrossAnswers:  # noqa: E501  # fmt: skip
    beside = batch.beside
    assert beside is not None
    log_p_MU = (hidden_ME @ head_UE.T / t).log_softmax(-1)
    earlier, owner = earlier_positions(beside.their_last_S, beside.their_count_S - 1)
    log_c_S = torch.zeros(len(beside), dtype=hidden_ME.dtype)
    for at, span in zip(earlier, owner, strict=True):
        log_c_S[span] += log_p_MU[at, beside.batch.target_N[at]]
    return CrossAnswers(DenseAnswers(hidden_ME, head_UE), beside, log_c_S, shared, len(head_UE))


@pytest.mark.parametrize(
    ("cross", "kind", "beta", "temperature"),
    [("uld", "forward", 0.5, 1.0), ("uld", "forward", 0.5, 2.0), ("gold", "forward", 0.5, 1.0),
     ("gold", "reverse", 0.5, 1.0), ("gold", "jsd", 0.3, 1.0), ("gold", "skew", 0.1, 2.0),
     ("gold", "skew-reverse", 0.2, 1.0)],
)  # fmt: skip
def test_losses_and_gradients_are_the_formulas(
    cross: str, kind: Any, beta: float, temperature: float, stories: Path, student: Path, text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own, other, read = read_both(student, stories, text, length=32)
    batch = make_batch(read.rows, slice(0, 3))
    assert batch.beside is not None
    torch.manual_seed(0)
    hidden, head = torch.randn(len(batch.target_N), 12).double(), torch.randn(own.size, 12).double()
    theirs, their_head = torch.randn(len(batch.beside.batch.target_N), 9).double(), torch.randn(other.size, 9).double()
    matched = match_vocabularies(own, other)
    shared = Shared(*map(torch.from_numpy, vars(matched).values())) if cross == "gold" else None
    mix = Mix(0.7 / len(batch.beside), 0.3 / batch.targets, temperature, torch.float64, kind, beta)
    inputs = [x.clone().requires_grad_() for x in (hidden, head)]
    slow = slow_loss(inputs[0] @ inputs[1].T, theirs @ their_head.T, batch, shared, mix)
    wanted = torch.autograd.grad(slow, inputs)
    answers = answers_of(theirs, their_head, batch, shared, temperature)
    for elements in (cross_losses.CHUNK_ELEMENTS, 1):  # one chunk, and the smallest: spans are never cut
        monkeypatch.setattr(cross_losses, "CHUNK_ELEMENTS", elements)
        chunks = list(answers.slices(len(batch.target_N), own.size))
        assert len(chunks) == 1 if elements > 1 else len(chunks) > 4
        assert sum(answers.spans(at).stop - answers.spans(at).start for at in chunks) == len(batch.beside)
        inputs = [x.clone().requires_grad_() for x in (hidden, head)]
        loss, _sums = distillation_loss(inputs[0], inputs[1], answers, batch.target_N, mix)
        assert loss.item() == pytest.approx(slow.item(), rel=1e-12)
        for found, slowly in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
            torch.testing.assert_close(found, slowly, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("cross", ["uld", "gold"])
def test_full_logits_never_exist(
    cross: str, stories: Path, student: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other, read = read_both(student, stories, text)
    batch = make_batch(read.rows, slice(0, 24))
    beside = batch.beside
    assert beside is not None
    monkeypatch.setattr(cross_losses, "CHUNK_ELEMENTS", 40 * own.size)
    hidden, head = torch.randn(len(batch.target_N), 8, requires_grad=True), torch.randn(own.size, 8, requires_grad=True)
    matched = match_vocabularies(own, other)
    shared = Shared(*map(torch.from_numpy, vars(matched).values())) if cross == "gold" else None
    answers = answers_of(torch.randn(len(beside.batch.target_N), 8), torch.randn(other.size, 8), batch, shared, 1.0)
    with LargestTensor() as seen:
        loss, _ = distillation_loss(hidden, head, answers, batch.target_N, Mix(0.1, 0.1))
        loss.backward()  # type: ignore[no-untyped-call]
    assert len(batch.target_N) > 1200
    assert seen.elements <= (40 + LONGEST_SPAN) * own.size


@pytest.mark.parametrize("cross", ["uld", "gold"])
def test_a_document_costs_what_trl_says(cross: str, student: Path, text: Path, tmp_path: Path) -> None:
    trainer = pytest.importorskip("trl.experimental.gold.gold_trainer", reason="TRL is not installed")
    teacher = train_tokenizer(tmp_path / "teacher", [str(t) for t in read_documents([text])][:20], 320)
    own, other, read = read_both(student, teacher, text, length=256, batch=1)
    batch = make_batch(read.rows, np.array([0]))
    beside = batch.beside
    assert beside is not None
    assert int(batch.segment_BT.max()) == 0  # one document: TRL knows rows only
    torch.manual_seed(0)
    hidden, head = torch.randn(len(batch.target_N), 12), torch.randn(own.size, 12)
    theirs, their_head = torch.randn(len(beside.batch.target_N), 9), torch.randn(other.size, 9)
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=True,
        uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=cross == "gold", beta=0.5,
    )  # fmt: skip
    names = [SimpleNamespace(get_vocab=t.backend.get_vocab) for t in (own, other)]

    def given(tokenizer: TextTokenizer, ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids_T = ids_T[ids_T.tolist().index(tokenizer.bos_id) :]
        written, ends = texts_of(tokenizer), [0]
        for i in ids_T[1:].tolist():
            ends.append(ends[-1] + len(written[i]))
        offsets = torch.tensor([(0, 0), *itertools.pairwise(ends)])
        labels = ids_T.clone()
        labels[0] = -100
        return ids_T[None], labels[None], offsets[None]

    ids, labels, offsets = given(own, batch.ids_BT[0][batch.real_N])
    their_ids, their_labels, their_offsets = given(other, beside.batch.ids_BT[0][beside.batch.real_N])
    wanted = trainer.ULDLoss(config, *names)(
        (hidden @ head.T)[None], (theirs @ their_head.T)[None], labels, their_labels, ids, their_ids, offsets,
        their_offsets,
    )  # fmt: skip
    matched = match_vocabularies(own, other)
    shared = Shared(*map(torch.from_numpy, vars(matched).values())) if cross == "gold" else None
    mix = Mix(1 / len(beside), 0.0, kind="jsd", beta=0.5)
    loss, _ = distillation_loss(hidden, head, answers_of(theirs, their_head, batch, shared, 1.0), batch.target_N, mix)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("cross", ["uld", "gold"])
def test_a_student_of_another_tokenizer_is_trained(
    cross: Any, stories: Path, student: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    kd = {"uld": 0.2, "gold": 0.8}[cross]  # from scratch, sorted probabilities alone say nothing of which token
    options = replace(OPTIONS, steps=16, cross_tokenizer=cross, kd=kd, eval_every=12, keep="best")
    made = run_distill(stories, str(student), [text], tmp_path / "s", options)
    held = made.results["held_out"]
    assert held["trained"][cross] < held["start"][cross]
    assert held["trained"]["cross_entropy"] < held["start"]["cross_entropy"] - 0.3
    assert "kl" not in held["trained"]
    lines = metrics(tmp_path / "s")
    assert lines[-1][cross] < lines[0][cross]
    assert cross in lines[11]["held_out"]
    assert {"uld": "ULD distance", "gold": "GOLD loss"}[cross] in (tmp_path / "s" / "report.html").read_text()
    assert f"{cross.upper()} {held['start'][cross]:.4f}" in capsys.readouterr().err
    assert load_tokenizer(tmp_path / "s").encode("Once upon") == load_tokenizer(student).encode("Once upon")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "s", local_files_only=True).config.vocab_size == 608


def test_an_interrupted_run_ends_with_the_same_bits(
    stories: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, steps=4, length=32, eval_tokens=128, save_every=1)
    real = StateFolder.note

    def note(state: StateFolder, record: dict[str, Any]) -> None:
        real(state, record)
        if record["step"] == 2:
            raise KeyboardInterrupt

    run_distill(stories, str(student), [text], tmp_path / "whole", options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StateFolder, "note", note)
        run_distill(stories, str(student), [text], tmp_path / "s", options)
    assert not (tmp_path / "s").exists()
    run_distill(stories, str(student), [text], tmp_path / "s", options, resume=True)
    assert same_bits(tmp_path / "s", tmp_path / "whole")
    assert metrics(tmp_path / "s") == metrics(tmp_path / "whole")


def test_the_teachers_loss_is_said_by_the_students_tokens(stories: Path, student: Path, text: Path, tmp_path: Path) -> None:  # noqa: E501  # fmt: skip
    """Held-out figures against transformers: nats of the same text, over the student's tokens."""
    from transformers import AutoModelForCausalLM

    options = replace(OPTIONS, steps=0, eval_tokens=4096)
    made = run_distill(stories, str(student), [text], tmp_path / "s", options)
    _own, other, read = read_both(student, stories, text, eval_tokens=4096)
    batch = make_batch(read.held_out, slice(None))
    beside = batch.beside
    assert beside is not None
    model = AutoModelForCausalLM.from_pretrained(stories, local_files_only=True).eval()
    nats, row = 0.0, beside.batch
    places = {p for last, n in zip(beside.their_last_S, beside.their_count_S, strict=True) for p in range(last - n + 1, last + 1)}  # noqa: E501  # fmt: skip
    flat_ids, flat_segments = row.ids_BT.flatten()[row.real_N], row.segment_BT.flatten()[row.real_N]
    starts = [0, *(np.flatnonzero(flat_ids.numpy() == other.bos_id)[1:].tolist()), len(flat_ids)]
    for start, stop in itertools.pairwise(starts):
        assert len(set(flat_segments[start:stop].tolist())) == 1
        ids = flat_ids[start:stop]
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].log_softmax(-1)
        nats -= sum(float(log_p[n, ids[n + 1]]) for n in range(len(ids) - 1) if start + n in places)
    per_token = nats / int(beside.count_S.sum())
    assert made.results["held_out"]["teacher"]["cross_entropy"] == pytest.approx(per_token, rel=1e-4)
    assert per_token < 3 < math.log(600)


def test_what_does_not_go_with_another_tokenizer_is_refused(
    stories: Path, student: Path, text: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    out = tmp_path / "s"
    with pytest.raises(UnsupportedError, match="--cross-tokenizer gold"):
        run_distill(stories, str(student), [text], out, replace(OPTIONS, cross_tokenizer="none"))
    with pytest.raises(RequestError, match="one tokenizer"):
        run_distill(stories, str(stories), [text], out, OPTIONS)
    with pytest.raises(RequestError, match="--student FOLDER"):
        run_distill(stories, "150k", [text], out, OPTIONS)
    with pytest.raises(UnsupportedError, match="2 tokenizers"):
        pair = [(str(student), out), (str(tiny_model("llama")), tmp_path / "t")]
        run_distill_many(stories, pair, [text], OPTIONS)
    for changes, words in (
        ({"on_policy": 0.5}, "--on-policy"), ({"match": 1.0}, "--match"),
        ({"cross_tokenizer": "uld", "divergence": "jsd"}, "--divergence jsd"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            replace(OPTIONS, **changes)
    chats = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there, my friend"}]
    chats.write_text("".join(json.dumps({"messages": [*turns, {"role": "user", "content": str(n)}, turns[1]]}) + "\n" for n in range(40)))  # noqa: E501  # fmt: skip
    talking = tmp_path / "talking"
    talking.mkdir()
    for file in student.iterdir():
        (talking / file.name).write_bytes(file.read_bytes())
    (talking / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    with pytest.raises(UnsupportedError, match="Conversations"):
        run_distill(stories, str(talking), [chats], out, OPTIONS)
    assert not out.exists()
