"""`nanokit push`, `pull`, `ls`, `inspect`, `tags`, `rm`, `gc`, `sign`, `keygen`, `catalog`; none loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

Negative = Parameter(negative="")
Flag = Annotated[bool, Negative]
Store = Annotated[
    Path | None,
    Parameter(
        help="The local store, an OCI layout folder. Without it $NANOKIT_STORE, or ~/.local/share/nanokit/store."
    ),
]
PlainHttp = Annotated[
    bool,
    Parameter(
        negative="",
        help="Talk to a registry without encryption; to this machine itself that needs no flag.",
    ),
]
Json = Annotated[bool, Parameter(negative="", help="Print one JSON object.")]


def push(
    bundle: Path,
    reference: str,
    /,
    *,
    store: Store = None,
    jobs: int = 4,
    plain_http: PlainHttp = False,
    json: Json = False,
) -> int:
    """Put a bundle into a store as an OCI artifact; files that the store has already do not travel again.

    Parameters
    ----------
    bundle
        The folder that nanokit export wrote.
    reference
        Where to: NAME:TAG in the local store, oci:FOLDER:NAME:TAG, or HOST/NAME:TAG in a registry, with the login that
        docker's config has.
    jobs
        Files sent at the same time.
    """
    from export.store.push import push_bundle
    from export.store.reference import parse_reference
    from nano.folder import human_bytes
    from nano.progress import emit_json

    done = push_bundle(bundle, parse_reference(reference, store), jobs=jobs, plain_http=plain_http)
    if json:
        emit_json({"reference": str(done.reference), "digest": done.artifact.digest, "bytes": done.artifact.size, "moved": done.moved, "shared": done.shared})  # noqa: E501  # fmt: skip
    else:
        print(done.reference)
        print(f"{human_bytes(done.moved)} sent, {human_bytes(done.shared)} were there already")
    return 0


def pull(
    reference: str,
    /,
    *,
    out: Path | None = None,
    profile: Annotated[str, Parameter(name="--for")] = "",
    format: Literal["executorch", "onnx"] | None = None,
    file: Annotated[list[str] | None, Negative] = None,
    require_signature: Path | None = None,
    store: Store = None,
    jobs: int = 4,
    plain_http: PlainHttp = False,
    force: Flag = False,
    json: Json = False,
) -> int:
    """Bring an artifact into a folder, whole and checked, or not at all; an interrupted pull goes on where it stopped.

    Parameters
    ----------
    reference
        What: NAME:TAG, NAME@sha256:..., oci:FOLDER:NAME:TAG or HOST/NAME:TAG. Without a tag and with --for or --format
        the best of all tags.
    out
        The folder to make; the name's last part where it is not given. With --file, the folder to put them into.
    profile
        A phone from nanokit profiles: take only an artifact whose measured verdict is a pass there. Of several the one
        with the best scorecard, then the most parameters, then the newest.
    format
        Take only an artifact for this runtime.
    file
        Fetch this file of the artifact alone, for instance model.pte; may be repeated.
    require_signature
        A public key (PEM, as cosign writes it); refuse an artifact that it has not signed.
    jobs
        Files fetched at the same time.
    force
        Replace what is there once the new files are complete.
    """
    from export.store.pull import PullOptions, pull_artifact
    from export.store.reference import parse_reference
    from nano.folder import human_bytes
    from nano.progress import emit_json

    parsed = parse_reference(reference, store)
    options = PullOptions(
        profile, format or "", tuple(file or ()), require_signature, jobs, plain_http=plain_http, force=force
    )
    done = pull_artifact(parsed, out or Path(parsed.name.rpartition("/")[2]), options)
    if json:
        emit_json({"reference": str(done.reference), "digest": done.artifact.digest, "out": str(done.out), "files": done.files, "bytes": done.artifact.size, "moved": done.moved, "signed": done.signed})  # noqa: E501  # fmt: skip
    else:
        print(done.reference)
        print(f"{len(done.files)} files in {done.out}, {human_bytes(done.moved)} fetched")
    return 0


def ls(
    reference: str | None = None,
    /,
    *,
    store: Store = None,
    plain_http: PlainHttp = False,
    json: Json = False,
) -> int:
    """List the artifacts of the local store, or of one name there or in a registry.

    Parameters
    ----------
    reference
        A name: NAME, oci:FOLDER:NAME or HOST/NAME. All of the local store where it is not given.
    """
    from export.store.manage import list_artifacts, list_store
    from export.store.reference import default_store, parse_reference
    from export.store.tables import artifact_lines, artifact_row
    from nano.progress import emit_json

    if reference is None:
        found = list_store(store or default_store())
    else:
        found = list_artifacts(parse_reference(reference, store), plain_http=plain_http)
    if json:
        emit_json({"artifacts": [artifact_row(one) for one in found]})
    else:
        print("\n".join(artifact_lines(found)))
    return 0


def inspect(
    reference: str,
    /,
    *,
    store: Store = None,
    plain_http: PlainHttp = False,
    json: Json = False,
) -> int:
    """Show what a store says of one artifact: files, digests, verdicts, signatures.

    Parameters
    ----------
    reference
        NAME:TAG, NAME@sha256:..., oci:FOLDER:NAME:TAG or HOST/NAME:TAG.
    """
    from dataclasses import asdict

    from export.store.manage import inspect_artifact
    from export.store.reference import parse_reference
    from export.store.tables import inspection_tables
    from nano.progress import emit_json, show

    found = inspect_artifact(parse_reference(reference, store), plain_http=plain_http)
    if json:
        emit_json({**found, "facts": asdict(found["facts"])})
    else:
        for table in inspection_tables(found):
            show(table)
    return 0


def tags(
    reference: str,
    /,
    *,
    store: Store = None,
    plain_http: PlainHttp = False,
    json: Json = False,
) -> int:
    """List the tags of a name, one a line.

    Parameters
    ----------
    reference
        NAME, oci:FOLDER:NAME or HOST/NAME.
    """
    from export.store.manage import list_tags
    from export.store.reference import parse_reference
    from nano.progress import emit_json

    found = list_tags(parse_reference(reference, store), plain_http=plain_http)
    if json:
        emit_json({"tags": found})
    else:
        print("\n".join(found))
    return 0


def rm(reference: str, /, *, store: Store = None, json: Json = False) -> int:
    """Take a tag out of a local store; its files go with nanokit gc.

    Parameters
    ----------
    reference
        NAME:TAG for that tag, NAME@sha256:... for every tag of that artifact.
    """
    from export.store.manage import remove
    from export.store.reference import parse_reference
    from nano.progress import emit_json

    parsed = parse_reference(reference, store)
    gone = remove(parsed)
    if json:
        emit_json({"removed": [str(parsed.at(tag)) for tag in gone]})
    else:
        print("\n".join(f"removed {parsed.at(tag)}" for tag in gone))
    return 0


def gc(*, store: Store = None, dry_run: Flag = False, json: Json = False) -> int:
    """Delete the files of a local store that no tag leads to.

    Parameters
    ----------
    dry_run
        Only say how much would go.
    """
    from export.store.manage import collect_garbage
    from export.store.reference import default_store
    from nano.folder import human_bytes
    from nano.progress import emit_json

    found = collect_garbage(store or default_store(), dry_run=dry_run)
    if json:
        emit_json({"blobs": found.blobs, "bytes": found.bytes, "deleted": not dry_run})
    else:
        print(f"{found.blobs} files, {human_bytes(found.bytes)} {'would go' if dry_run else 'deleted'}")
    return 0


def sign(
    reference: str,
    /,
    *,
    key: Path,
    store: Store = None,
    plain_http: PlainHttp = False,
    json: Json = False,
) -> int:
    """Sign an artifact with an ECDSA P-256 key, in the form in which cosign stores and verifies signatures.

    Parameters
    ----------
    reference
        NAME:TAG, NAME@sha256:..., oci:FOLDER:NAME:TAG or HOST/NAME:TAG.
    key
        A private key in PEM, from nanokit keygen or openssl; its password, if it has one, in $NANOKIT_KEY_PASSWORD.
    """
    from export.store.backend import open_store, read_artifact
    from export.store.reference import parse_reference
    from export.store.signing import load_private_key, sign_artifact, signature_tag
    from nano.progress import emit_json

    parsed = parse_reference(reference, store)
    load_private_key(key)
    opened = open_store(parsed, plain_http=plain_http)
    with opened.session():
        digest = read_artifact(opened, parsed).digest
        new = sign_artifact(opened, parsed.name, digest, str(parsed.at()), key)
    if json:
        emit_json({"digest": digest, "tag": signature_tag(digest), "new": new})
    else:
        print(f"{'signed' if new else 'was signed already:'} {parsed.at(parsed.tag, digest)}")
    return 0


def keygen(name: Path, /, *, json: Json = False) -> int:
    """Make an ECDSA P-256 key pair: NAME.key to sign with, NAME.pub to give away.

    Parameters
    ----------
    name
        Path without ending. Where $NANOKIT_KEY_PASSWORD is set, the private key is encrypted with it.
    """
    from export.store.signing import make_keys
    from nano.progress import emit_json

    private, public = make_keys(name)
    if json:
        emit_json({"private": str(private), "public": str(public)})
    else:
        print(f"{private}  keep it secret\n{public}  give it to those who pull")
    return 0


def catalog(
    source: str | None = None,
    /,
    *,
    out: Path,
    title: str = "Model artifacts",
    plain_http: PlainHttp = False,
    force: Flag = False,
    json: Json = False,
) -> int:
    """Make a static page of a store's artifacts: which phones they passed on, size, speed, capabilities, how to pull.

    Parameters
    ----------
    source
        An OCI layout folder, or names in a registry (HOST/NAME, several with commas between). The default store where
        it is not given.
    out
        The folder to make; its index.html needs no server and loads nothing.
    title
        The page's heading.
    force
        Replace an existing folder.
    """
    from export.store.catalog import write_catalog
    from nano.progress import emit_json

    count = write_catalog(source, out, title=title, plain_http=plain_http, force=force)
    if json:
        emit_json({"out": str(out), "artifacts": count})
    else:
        print(f"{count} artifacts in {out / 'index.html'}")
    return 0
