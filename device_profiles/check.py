"""`check_bundle`: a written bundle against a phone, from its manifest alone. Loads no model and no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from device_profiles.budget import Verdict, judge
from device_profiles.footprint import BundleFacts, manifest_facts
from device_profiles.profile import DeviceProfile, load_profile
from nano.errors import BadFileError, RequestError
from nano.manifest import NAME, Manifest, read_manifest


def check_bundle(bundle: Path, profile: str | DeviceProfile, context: int | None = None) -> Verdict:
    """Predict a bundle's memory from its manifest and hold it against a phone. Loads no model and no torch.

    Args:
        bundle: the folder that nanokit export wrote.
        profile: a profile's name, the path of a profile file, or a profile.
        context: positions in use; the bundle's own where None.

    Raises:
        BadFileError: not a bundle, or a file of it is missing or has another size than recorded.
        RequestError: unknown profile, a context beyond the bundle's, or a profile that publishes no memory limit.
    """
    device = load_profile(profile) if isinstance(profile, str) else profile
    facts = bundle_facts(bundle)
    if context is not None and not 1 <= context <= facts.context:
        raise RequestError(
            "The bundle cannot hold this context.",
            found=f"--context {context}",
            expected=f"1 to {facts.context}, what it was exported with",
            todo="export again with a longer --context" if context > 0 else None,
        )
    if facts.runtime == "onnx" or context in (None, facts.context):
        return judge(facts, device, context or facts.context)
    verdict = judge(facts, device, facts.context)
    note = f"a .pte keeps the cache it was exported with, {facts.context} positions, however few are used"
    return replace(verdict, notes=(*verdict.notes, note))


def bundle_facts(bundle: Path) -> BundleFacts:
    """The facts of a bundle's manifest, after its files have been looked at: all there, all of the recorded size."""
    manifest = read_manifest(bundle)
    if manifest.kind not in ("executorch", "onnx"):
        raise BadFileError(
            "This folder is not a bundle.",
            found=f"{bundle}: a folder of kind '{manifest.kind}'",
            expected="what nanokit export writes: a .pte or ONNX bundle",
            todo="nanokit export it first, or use nanokit plan --profile for a forecast",
        )
    check_files(bundle, manifest)
    tokenizer = bundle / "tokenizer.json"
    return manifest_facts(manifest, tokenizer.stat().st_size if tokenizer.is_file() else 0, str(bundle / NAME))


def require_predictable(bundle: Path) -> None:
    """Raise RequestError for a bundle in ORT format: its memory is known only once it is measured.

    A session reads model.ort into memory and keeps more than its weights there: 352 MB were measured of a 100 M model
    whose forecast, made for model.onnx, is 146 MB.
    """
    if read_manifest(bundle).recipe.get("ort") is True:
        raise RequestError(
            "The memory of a bundle in ORT format cannot be predicted.",
            found=f"model.ort in {bundle}, which a session reads into memory",
            todo="add --measure, which runs it under the phone's limits, or export without --ort",
        )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise BadFileError unless every file of a manifest is there with its recorded size. Hashes are not computed."""
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        wanted = entry.get("bytes") if isinstance(entry, dict) else None
        if size is None or size != wanted:
            raise BadFileError(
                "A file of the bundle is missing." if size is None else "A file of the bundle has changed.",
                found=str(path) if size is None else f"{path}: {size:,} bytes",
                expected=f"{wanted:,} bytes, as {NAME} records" if isinstance(wanted, int) else f"a size in {NAME}",
                todo="copy the bundle again, or export it again",
            )
