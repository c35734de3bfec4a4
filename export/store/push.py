"""Push: a bundle into a store.

Only blobs that the store lacks travel. The manifest goes last, so a tag is never half there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.store.artifact import MANIFEST, Artifact, Descriptor, describe_bundle
from export.store.backend import open_store
from export.store.reference import Reference
from export.store.transfer import Meter, in_parallel, require_jobs
from nano.errors import RequestError
from nano.folder import MIB
from nano.progress import track

JOBS = 4


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        reference: where the artifact is, with its digest.
        artifact: what it is.
        moved: bytes of files that travelled.
        shared: bytes of files that the store had already.
    """

    reference: Reference
    artifact: Artifact
    moved: int
    shared: int


def push_bundle(bundle: Path, reference: Reference, *, jobs: int = JOBS, plain_http: bool = False) -> Pushed:
    """Put a bundle into a store under a name and a tag.

    Args:
        bundle: the folder that nanokit export wrote.
        reference: where to; its tag is "latest" where it has none.
        jobs: files sent at the same time.
        plain_http: see `open_store`.

    Raises:
        BadFileError: not a whole bundle.
        RequestError: a digest in the reference, or the store refuses.
        WorkError: the store cannot be reached, or a transfer broke again and again.
    """
    if reference.digest:
        raise RequestError("A push goes to a tag; the digest follows from the bundle.", found=str(reference), todo="leave the @sha256:... out")  # noqa: E501  # fmt: skip
    require_jobs(jobs)
    artifact, config = describe_bundle(bundle)
    store = open_store(reference, plain_http=plain_http, create=True)
    contents: dict[str, tuple[Descriptor, Path | bytes]] = {
        file.blob.digest: (file.blob, bundle / file.path) for file in artifact.files
    }
    with store.session():
        missing = [digest for digest, (blob, _) in contents.items() if not store.has_blob(reference.name, blob)]
        total = sum(contents[digest][0].size for digest in missing)
        with track("push", max(total // MIB, 1), "MiB") as progress:
            meter = Meter(progress)
            in_parallel(lambda digest: store.put_blob(reference.name, *contents[digest], meter), missing, jobs)
        if not store.has_blob(reference.name, artifact.config):
            store.put_blob(reference.name, artifact.config, config, lambda _: None)
        tag = reference.tag or "latest"
        store.put_manifest(reference.name, artifact.payload, MANIFEST, tag)
    return Pushed(reference.at(tag, artifact.digest), artifact, total, artifact.size - total)
