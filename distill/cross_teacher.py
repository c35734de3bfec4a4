"""A teacher whose tokenizer is not its students': it reads the same text in its own tokens (`distill.cross_text`).

Legend: S spans, E the teacher's hidden width, U its vocabulary, V the student's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from distill.cross_losses import CrossAnswers, Shared, earlier_positions
from distill.cross_text import Beside
from distill.cross_vocabulary import match_vocabularies
from distill.data import NO_TARGET, Batch
from distill.losses import Comparison, DenseAnswers, Mix, chunk_length
from distill.models import head_weight, hidden_states
from distill.options import DistillOptions, Divergence
from distill.teacher import LiveTeacher
from nano.progress import say
from nano.shapes import ModelShape
from nano.tokens import TextTokenizer


@dataclass(frozen=True)
class CrossTeacher:
    """A live teacher of another tokenizer.

    Attributes:
        live: the teacher.
        shared: tokens that both vocabularies have; None for a loss that sorts all of them.
        theirs_V: for each of the student's ids the teacher's id of the same text; -1 where it has none.
        vocab: the teacher's ids that its tokenizer gives.
        kind, beta, temperature, dtype: of the loss, as in `distill.losses.Mix`.
    """

    live: LiveTeacher
    shared: Shared | None
    theirs_V: torch.Tensor
    vocab: int
    kind: Divergence
    beta: float
    temperature: float
    dtype: torch.dtype

    @property
    def model(self) -> Any:
        """The teacher's model."""
        return self.live.model

    @property
    def shape(self) -> ModelShape:
        """Its dimensions."""
        return self.live.shape

    def answers(self, batch: Batch) -> CrossAnswers:
        """See `distill.teacher.Teacher.answers`."""
        assert batch.beside is not None
        dense = self.live.answers(batch.beside.batch)
        with torch.inference_mode():
            log_c_S = self._log_c(dense, batch.beside)
        return CrossAnswers(dense, batch.beside, log_c_S, self.shared, self.vocab)

    def _log_c(self, dense: DenseAnswers, beside: Beside) -> torch.Tensor:
        """log-probability of each span's tokens before the last."""
        target_M, device = beside.batch.target_N, dense.hidden_NE.device
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        places = earlier_positions(beside.their_last_S, beside.their_count_S - 1)
        earlier, owner = (torch.from_numpy(each).to(device) for each in places)
        log_c_S = torch.zeros(len(beside), dtype=wide, device=device)
        head_UE = dense.head_VE[: self.vocab].to(self.dtype)
        size = chunk_length(self.vocab)
        for start in range(0, len(earlier), size):
            at, of = earlier[start : start + size], owner[start : start + size]
            log_p_CU = F.log_softmax(F.linear(dense.hidden_NE[at].to(self.dtype), head_UE).to(wide) / self.temperature, -1)  # noqa: E501  # fmt: skip
            log_c_S.index_add_(0, of, log_p_CU.gather(1, target_M[at].unsqueeze(1)).squeeze(1))
        return log_c_S

    def compare(self, student: Any, shape: ModelShape, batches: list[Batch], vocab: int | None = None) -> Comparison:
        """How a student compares with this teacher on held-out text, at temperature 1 in float32.

        The teacher's cross-entropy is of the spans that both have whole, by the student's tokens in them, so that it
        stands beside the student's own. The same top token is asked for at the spans' last tokens.
        """
        plain = replace(self, temperature=1.0, dtype=torch.float32)
        parts = []
        with torch.inference_mode():
            for batch in batches:
                hidden_ND = hidden_states(student, shape, batch).float()
                parts.append(_compared(plain.answers(batch), hidden_ND, head_weight(student)[:vocab].float(), batch, plain))  # noqa: E501  # fmt: skip
        ce, teacher_ce, loss, same, tokens, within, spans = np.sum(parts, axis=0).tolist()
        return Comparison(ce, teacher_ce / max(within, 1) * tokens, loss, int(same), int(tokens), int(spans))


def _compared(
    answers: CrossAnswers, hidden_ND: torch.Tensor, head_VD: torch.Tensor, batch: Batch, teacher: CrossTeacher
) -> tuple[float, ...]:
    """Sums over a batch: cross-entropy, the teacher's, the loss, same tokens; tokens, those in spans, spans."""
    beside, mix = answers.beside, Mix(1.0, 0.0, kind=teacher.kind, beta=teacher.beta)
    ce = teacher_ce = loss = 0.0
    same = 0
    for at in answers.slices(len(batch.target_N), len(head_VD)):
        logits_CV = F.linear(hidden_ND[at], head_VD)
        which = answers.spans(at)
        last_S = torch.from_numpy(beside.last_S[which]).to(logits_CV.device) - at.start
        likely_S = teacher.theirs_V[logits_CV[last_S].argmax(-1)]
        log_p_SU = answers.log_p(which, torch.float32)
        their_target_S = beside.batch.target_N[torch.from_numpy(beside.their_last_S[which]).to(logits_CV.device)]
        teacher_ce -= float(log_p_SU.gather(1, their_target_S.unsqueeze(1)).sum())
        same += int((likely_S == log_p_SU.argmax(-1)).sum())
        total, chunk_ce, _ = answers.chunk(at, logits_CV, batch.target_N[at], mix)
        ce, loss = ce + float(chunk_ce), loss + float(total)
    tokens = int((batch.target_N != NO_TARGET).sum())
    return ce, teacher_ce, loss, same, tokens, int(beside.count_S.sum()), len(beside)


def cross_teacher(
    live: LiveTeacher, tokenizers: tuple[TextTokenizer, TextTokenizer], options: DistillOptions, device: str
) -> CrossTeacher:
    """A live teacher for students of another tokenizer.

    Args:
        live: the teacher.
        tokenizers: the students' and the teacher's.
        options: of the loss.
        device: where it lies.
    """
    ours, theirs = tokenizers
    matched = match_vocabularies(ours, theirs)
    theirs_V = torch.full((ours.size,), -1)
    theirs_V[torch.from_numpy(matched.ours_M)] = torch.from_numpy(matched.theirs_M)
    tensors = (torch.from_numpy(ids).to(device) for ids in (matched.ours_M, matched.theirs_M, matched.our_rest, matched.their_rest))  # noqa: E501  # fmt: skip
    shared = Shared(*tensors) if options.cross_tokenizer == "gold" else None
    say(f"tokenizers: {len(matched.ours_M):,} tokens in both, of the student's {ours.size:,} and the teacher's {theirs.size:,}")  # noqa: E501  # fmt: skip
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    return CrossTeacher(
        live, shared, theirs_V.to(device), theirs.size, options.divergence, options.mixture, options.temperature, dtype
    )
