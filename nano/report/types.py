"""What a report holds: scores, divergences, flips and all the rest of a page, as plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nano.divergence import Figure
from nano.history import Step
from nano.integrity import Fault
from nano.manifest import Manifest


@dataclass(frozen=True)
class Score:
    """A capability's score; see `nano.scorecard.CapabilityScore`."""

    score: float
    error: float | None = None
    questions: int = 0
    of_teacher: float | None = None


@dataclass(frozen=True)
class Card:
    """One stage's scorecard.

    Attributes:
        kind: of its manifest; "" for the teacher.
        stage: its label.
        capabilities: capability to score.
        asked: what tells its questions from others.
        derived: whether it is the teacher's, reckoned from the shares that were recorded elsewhere.
    """

    kind: str
    stage: str
    capabilities: Mapping[str, Score]
    asked: str = ""
    derived: bool = False


@dataclass(frozen=True)
class AnswerFlip:
    """A question that the teacher answers rightly and the model does not."""

    task: str
    label: str
    expected: str
    said: str


@dataclass(frozen=True)
class AnswerFlips:
    """Questions that only the teacher (`lost`) or only the model (`gained`) answers rightly; the worst of the lost."""

    lost: int
    gained: int
    worst: tuple[AnswerFlip, ...]


@dataclass(frozen=True)
class Flip:
    """A token that the reference has right and the model wrong.

    Attributes:
        before: the text before it.
        right, said: the right token, and the model's most likely one.
        reference_p, right_p, said_p: probability of the right token in the reference and in the model, and of what the
            model says.
    """

    before: str
    right: str
    said: str
    reference_p: float
    right_p: float
    said_p: float


@dataclass(frozen=True)
class Divergence:
    """What `nano.report.measure` recorded of one stage.

    Attributes:
        kind: of its manifest.
        stage: its label.
        reference: what it was held against: its folder's name.
        reference_fingerprint: hex sha256.
        tokens: predicted.
        files: of the text: (path, sha256).
        measured: when.
        figures: by the names of `nano.divergence`.
        lost, gained: tokens that only the reference, or only the model, has right.
        flips: the worst of those that were lost.
    """

    kind: str
    stage: str
    reference: str
    reference_fingerprint: str
    tokens: int
    files: tuple[tuple[str, str], ...]
    measured: str
    figures: Mapping[str, Figure]
    lost: int = 0
    gained: int = 0
    flips: tuple[Flip, ...] = ()


@dataclass(frozen=True)
class Lived:
    """What `nanokit check --measure` recorded for a phone.

    Attributes:
        profile, context: what it was measured for.
        fits: whether it lived and decoded from memory.
        peak_dirty: bytes that it had written at most.
        prediction_error: of the forecast of that, a fraction; None where it was not lived to see.
        died: the phase in which it was killed; "" where it lived.
        tokens_per_second: of decoding, on the machine that measured; None where not recorded.
        machine, when: where and when.
    """

    profile: str
    context: int
    fits: bool
    peak_dirty: int | None
    prediction_error: float | None
    died: str
    tokens_per_second: float | None
    machine: str
    when: str


@dataclass(frozen=True)
class Phone:
    """A model against one phone.

    Attributes:
        name, title: of the profile.
        fits: by the measurement at this context where there is one, else by the forecast.
        limits: limit to {"needed", "allowed", "fits"}; empty where the phone is known by a measurement alone.
        longest_context: the longest that fits; None where not even one position does.
        advice, notes: in words.
        speed: tokens a second as forecast, see `device_profiles.speed.SpeedForecast`; None where it is not known.
        measured: what happened under the phone's limits; None where it was not run.
    """

    name: str
    title: str
    fits: bool
    limits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    longest_context: int | None = None
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    speed: Mapping[str, Any] | None = None
    measured: Lived | None = None


@dataclass(frozen=True)
class Phones:
    """A model against all of them.

    Attributes:
        runtime, context: what the footprint is for.
        planned: whether there is no bundle yet.
        causes: bytes by cause.
        dirty, resident: their sums: written, and everything.
        error: of the forecast, the largest over the measured bundles; a fraction.
        phones: against each profile whose limits are known.
        unjudged: profiles that could not be judged, with why.
        speeds: phone to forecast where the bandwidth is known, though no limit is.
    """

    runtime: str
    context: int
    planned: bool
    causes: Mapping[str, int]
    dirty: int
    resident: int
    error: float
    phones: tuple[Phone, ...]
    unjudged: Mapping[str, str] = field(default_factory=dict)
    speeds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        title: the model and what it is.
        folder: as it was named.
        kind: of the manifest.
        fingerprint: of the folder.
        steps: its history, the furthest ancestor first, the folder itself last.
        parameters, teacher_parameters: how many; 0 where not known.
        cards: scorecards, in the order of the steps; all were asked the same questions.
        others: stages that were asked other questions.
        answers: questions that flipped against the teacher; None where that is not recorded.
        divergences: recorded ones, likewise.
        layers: an int4 manifest with the linears' errors; None where none is known.
        phones: memory and speed; None where `no_phones` says why.
        bench: `nanokit bench --record`'s figures.
        exact, parity: of an export.
        files: name to (bytes, sha256).
        hashed: whether their hashes were computed.
        faults: files that are not what the manifest says.
        unlisted: files that it does not name.
        warnings: what a release should not overlook, in words.
    """

    title: str
    folder: str
    kind: str
    fingerprint: str
    steps: tuple[Step, ...]
    parameters: int
    teacher_parameters: int
    cards: tuple[Card, ...]
    others: tuple[str, ...]
    answers: AnswerFlips | None
    divergences: tuple[Divergence, ...]
    layers: Manifest | None
    phones: Phones | None
    no_phones: str
    bench: Mapping[str, Any]
    exact: Mapping[str, Any]
    parity: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    hashed: bool
    faults: tuple[Fault, ...]
    unlisted: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def own(self) -> Step:
        """The folder itself."""
        return self.steps[-1]

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(size for size, _sha256 in self.files.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        plain = asdict(replace(self, steps=(), layers=None))
        del plain["steps"]
        history = [{**asdict(step.ancestor), "created": step.created, "command": list(step.command),
                    "versions": dict(step.versions), "data": dict(step.data)} for step in self.steps]  # fmt: skip
        errors = self.layers.results if self.layers else {}
        return {**plain, "bytes": self.bytes, "history": history, "relative_error": errors.get("relative_error", {})}
