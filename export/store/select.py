"""Which artifact a pull means: the one named, or the best of a name that passed on a phone.

Best of those that pass: the highest mean score of its scorecard, then the most parameters, then the newest. An artifact
without a scorecard stands behind those that have one.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.store.artifact import Artifact, parse_artifact
from export.store.backend import Store, read_artifact
from export.store.reference import Reference
from export.store.transfer import in_parallel
from nano.errors import BadFileError, CheckFailedError, NotFoundError, RequestError
from nano.folder import human_bytes

SIGNATURE_SUFFIX = ".sig"
_ASKED_AT_ONCE = 8
_SHOWN = 8


@dataclass(frozen=True)
class Tagged:
    """An artifact and a tag that names it."""

    reference: Reference
    artifact: Artifact


def artifacts_of(store: Store, reference: Reference) -> list[Tagged]:
    """All model artifacts of a name, by tag; signatures and other kinds of artifact are passed over.

    Raises:
        NotFoundError: nothing has that name.
    """
    tags = [tag for tag in store.tags(reference.name) if not tag.endswith(SIGNATURE_SUFFIX)]
    found: dict[str, Tagged] = {}

    def read(tag: str) -> None:
        try:
            payload = store.read_manifest(reference.name, tag)
            found[tag] = Tagged(reference.at(tag), parse_artifact(payload, str(reference.at(tag))))
        except (BadFileError, NotFoundError):  # another kind of artifact, or gone since the tags were listed
            return

    in_parallel(read, tags, _ASKED_AT_ONCE)
    return [found[tag] for tag in tags if tag in found]


def choose(store: Store, reference: Reference, profile: str = "", format: str = "") -> Tagged:
    """The artifact that a reference means.

    Args:
        store: where it is.
        reference: with a tag or a digest that one artifact; without, and with a profile or a format, the best of all.
        profile: a device profile, by name or file, whose measured verdict has to be a pass; "" asks for none.
        format: "executorch" or "onnx"; "" takes either.

    Raises:
        NotFoundError: there is none.
        CheckFailedError: none passed on that phone; the message says why for each.
        RequestError: it has another format.
    """
    profile = _profile_name(profile)
    if reference.tag or reference.digest or not (profile or format):
        candidates = [Tagged(reference, read_artifact(store, reference))]
    else:
        candidates = artifacts_of(store, reference)
    fitting = [one for one in candidates if not format or one.artifact.facts.format == format]
    if not fitting:
        raise RequestError(
            f"There is no {format or 'model'} artifact of that name.",
            found=", ".join(f"{c.reference}: {c.artifact.facts.format}" for c in candidates[:_SHOWN]) or "none at all",
            todo=f"nanokit tags {reference.at()}",
        )
    passing = [one for one in fitting if not profile or _passes(one.artifact, profile)]
    if not passing:
        raise _none_passes(fitting, profile)
    return max(passing, key=_rank)


def _profile_name(profile: str) -> str:
    """What verdicts are recorded under: a profile's name, also where its file was given."""
    if profile.endswith(".toml"):
        from device_profiles.profile import load_profile

        return load_profile(profile).name
    return profile


def _passes(artifact: Artifact, profile: str) -> bool:
    verdict = artifact.facts.verdicts.get(profile)
    return verdict is not None and verdict.passed


def _rank(one: Tagged) -> tuple[float, int, str, str]:
    facts = one.artifact.facts
    return (-1.0 if facts.score is None else facts.score, facts.parameters, facts.created, one.reference.tag)


def why_not(artifact: Artifact, profile: str) -> str:
    """Why an artifact is not for a phone, in a few words."""
    verdict = artifact.facts.verdicts.get(profile)
    if verdict is None:
        measured = ", ".join(sorted(artifact.facts.verdicts))
        return f"never measured on {profile}" + (f" (only on {measured})" if measured else "")
    took = f", having written {human_bytes(verdict.peak_bytes)}" if verdict.peak_bytes else ""
    return f"at context {verdict.context:,} {verdict.reason or 'over the limit'}{took}"


def _none_passes(candidates: list[Tagged], profile: str) -> CheckFailedError:
    if not any(profile in one.artifact.facts.verdicts for one in candidates):
        from device_profiles.profile import load_profile

        load_profile(profile)  # a name that nobody knows is a mistake of another kind
    shown = candidates[:_SHOWN]
    more = f"\n            and {len(candidates) - len(shown)} more" if len(candidates) > len(shown) else ""
    lines = [f"{one.reference.tag or one.artifact.digest[:19]}: {why_not(one.artifact, profile)}" for one in shown]
    return CheckFailedError(
        f"No artifact of {candidates[0].reference.at()} has passed on {profile}.",
        found="\n            ".join(lines) + more,
        expected="a verdict that nanokit check --measure recorded before the bundle was pushed",
        todo=f"nanokit check BUNDLE --profile {profile} --measure, then nanokit push; or export with a shorter --context",  # noqa: E501
    )
