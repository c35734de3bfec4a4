"""`nanokit report`: everything that is known of a stage's output on one HTML page, for people who decide on a release.

What can be read is read (`nano.report.facts`), what should be measured first is measured (`nano.report.measure`), and
the page (`nano.report.page`) is one self-contained file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nano.ci import check_report
from nano.errors import OutputExistsError, RequestError
from nano.folder import write_text_atomically
from nano.history import Step, lineage
from nano.integrity import file_entries
from nano.manifest import NAME, fingerprint, read_manifest
from nano.report.facts import gather, model_name
from nano.report.page import GENERATOR, report_page
from nano.report.types import Report


def default_page(folder: Path) -> Path:
    """Where the page goes: in the current folder, named after the model and the folder."""
    manifest = read_manifest(folder)
    file_entries(manifest, folder)
    name = model_name(lineage(folder, manifest)[::-1])
    return Path(f"{name}-{manifest.kind}-report.html")


def check_page(page: Path, folder: Path, *, force: bool) -> None:
    """Refuse a page that could not be written, or would replace what is not one, before any work is done.

    Raises:
        RequestError: it is a folder, cannot be written to, or lies in the folder it speaks of, whose manifest vouches
            for every file there.
        OutputExistsError: a file that this command did not write is there, and `force` is not set.
    """
    check_report(page)
    if page.resolve().is_relative_to(folder.resolve()):
        raise RequestError(
            "The page would lie in the folder it speaks of, among files that its manifest vouches for.",
            found=str(page), todo="choose an --out elsewhere",
        )  # fmt: skip
    if page.exists() and not force and not _is_page(page):
        raise OutputExistsError(
            "There is a file already that is no page of nanokit report.", found=str(page),
            todo="choose another --out, or give --force to replace it",
        )  # fmt: skip


def _is_page(page: Path) -> bool:
    """Whether a file's last words are those of our pages."""
    with page.open("rb") as stream:
        stream.seek(max(0, page.stat().st_size - 400))
        return f"<footer>{GENERATOR} ".encode() in stream.read()


def find_teacher(folder: Path) -> Path:
    """The teacher that a folder's history names, where it still lies there.

    Raises:
        RequestError: it names none, or another model lies there now.
    """
    manifest = read_manifest(folder)
    steps = [step for step in lineage(folder, manifest) if step.ancestor.role == "teacher"]
    if steps and _is_there(steps[-1]):
        return Path(steps[-1].ancestor.path)
    found = f"the teacher lay at {steps[-1].ancestor.path}" if steps else f"{folder / NAME} names no teacher"
    raise RequestError("The model to measure the divergence from is not there.", found=found, todo="add --reference MODEL")  # noqa: E501  # fmt: skip


def _is_there(step: Step) -> bool:
    path = Path(step.ancestor.path)
    try:
        return bool(step.ancestor.path) and path.is_dir() and fingerprint(path) == step.ancestor.fingerprint
    except OSError:
        return False


def check_writable(folder: Path) -> None:
    """Refuse to record in a manifest that cannot be written, before anything is measured."""
    if not os.access(folder, os.W_OK) or not os.access(folder / NAME, os.W_OK):
        raise RequestError(
            "The divergence cannot be recorded.", found=f"no write permission for {folder / NAME}",
            todo="add --no-record",
        )  # fmt: skip


def run_report(
    folder: Path,
    page: Path,
    *,
    profiles: Sequence[str] = (),
    title: str = "",
    divergence: Mapping[str, Any] | None = None,
    hashed: bool = True,
    force: bool = False,
) -> Report:
    """Gather and write the page.

    Args:
        folder: any stage's output.
        page: the HTML file; replaced where it is such a page.
        profiles: phones; all that come with nanokit where there are none.
        title: heading; made of the folders' names where empty.
        divergence: measured by `nano.report.measure`, shown in the place of the recorded one.
        hashed: compute every file's sha256.
        force: replace any file.

    Raises:
        BadFileError: the folder's manifest cannot be used.
        RequestError: see `check_page`; a profile that there is none of.
    """
    check_page(page, folder, force=force)
    report = gather(folder, profiles=profiles, title=title, divergence=divergence, hashed=hashed)
    made = datetime.now(timezone.utc).isoformat(sep=" ", timespec="minutes").removesuffix("+00:00") + " UTC"
    write_text_atomically(page, report_page(report, made))
    return report
