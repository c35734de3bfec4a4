"""`nanokit export`, `nanokit verify`, `nanokit bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from export.options import ExportOptions
from nano.errors import RequestError
from nano.hub import resolve_model

Negative = Parameter(negative="")


def export(
    int4: str,
    /,
    *,
    format: Literal["executorch", "onnx"],
    out: Path,
    options: Annotated[ExportOptions, Parameter(name="*")] = ExportOptions(),  # noqa: B008
    data: list[Path] | None = None,
    force: Annotated[bool, Negative] = False,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Write an int4 student as an ExecuTorch or ONNX bundle, codes and scales unchanged.

    Parameters
    ----------
    int4
        The folder that nanokit quantize wrote.
    format
        "executorch" writes model.pte for ExecuTorch's runtime, "onnx" a folder for onnxruntime-genai.
    out
        The bundle's folder.
    data
        Text on which to report the bundle's parity with torch; may be repeated.
    force
        Replace an existing output once the new one is complete.
    json
        Print the manifest's facts as one JSON object.
    """
    from export.run import run_export
    from nano.progress import emit_json

    manifest = run_export(resolve_model(int4), format, out, options, data=data or (), force=force)
    facts = {"out": str(out), "format": format, "footprint": manifest.footprint, **manifest.results}
    if json:
        emit_json(facts)
    else:
        _print(facts, manifest.files)
    return 0


def verify(
    target: str,
    /,
    *,
    against: Path | None = None,
    require_signature: Path | None = None,
    store: Path | None = None,
    plain_http: Annotated[bool, Negative] = False,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Check every file of a folder against its manifest's hashes, and a bundle's weights against its int4 checkpoint.

    An artifact in a store is checked where it lies: each blob hashed, the bundle's manifest compared with them, and a
    signature. Exit status 1 names the first file or tensor that differs.

    Parameters
    ----------
    target
        A bundle, or any other folder that nanokit made; or an artifact: NAME:TAG, oci:FOLDER:NAME:TAG, HOST/NAME:TAG.
    against
        The int4 folder that a bundle was made from: every code and scale is read back from the model file and compared.
    require_signature
        A public key (PEM, as cosign writes it) that must have signed the artifact.
    store
        The local store, an OCI layout folder; $NANOKIT_STORE or ~/.local/share/nanokit/store where it is not given.
    plain_http
        Talk to a registry without encryption; to this machine itself that needs no flag.
    json
        Print what was checked and found as one JSON object.
    """
    folder = Path(target)
    if not folder.exists() and (":" in target or "@" in target):
        if against is not None:
            raise RequestError("--against takes a folder.", found=target, todo=f"nanokit pull {target} first")
        return _verify_stored(target, require_signature, store, plain_http, json)
    if require_signature is not None:
        raise RequestError(
            "A signature belongs to an artifact in a store, not to a folder.",
            found=target,
            todo=f"nanokit verify REFERENCE --require-signature {require_signature}",
        )
    return _verify_folder(folder, against, json)


def _verify_stored(target: str, key: Path | None, store: Path | None, plain_http: bool, json: bool) -> int:
    """An artifact in a layout folder or a registry."""
    from dataclasses import asdict

    from export.store.check import verify_stored
    from export.store.reference import parse_reference
    from export.verify import history_rows
    from nano.folder import human_bytes
    from nano.progress import emit_json, show

    found = verify_stored(parse_reference(target, store), key, plain_http=plain_http)
    if json:
        emit_json({**asdict(found), "ok": True, "reference": str(found.reference)})
        return 0
    signed = f"{found.signatures}, one of them by {key}" if found.signed else f"{found.signatures}, not asked for"
    rows = [
        ("artifact", str(found.reference.at(found.reference.tag))),
        ("digest", found.reference.digest[:23]),
        ("files as their digests say", f"{found.files}, {human_bytes(found.bytes)}"),
        ("signatures", signed),
    ]
    show(_grid([*rows, *history_rows(found.history)]))
    return 0


def _verify_folder(folder: Path, against: Path | None, json: bool) -> int:
    """A folder that nanokit made."""
    from dataclasses import asdict

    from export.verify import require_verified, summary, verify_bundle
    from nano.progress import emit_json, show, warn

    verification = verify_bundle(folder, against)
    if json:
        emit_json({"folder": str(folder), "ok": verification.ok, **asdict(verification)})
    require_verified(verification, folder)
    for name in verification.unlisted[:5]:
        warn(f"'{name}' is not named in the manifest: nothing vouches for it")
    if verification.same_checkpoint is False:
        warn(f"{against} is not the very folder that the manifest names, though its codes and scales are the same")
    if not json:
        show(_grid(summary(verification)))
    return 0


def bench(
    bundle: Path,
    /,
    *,
    threads: int = 0,
    context: int = 256,
    decode: int = 32,
    repeat: int = 3,
    record: Annotated[bool, Negative] = False,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Measure a bundle's speed and memory in its own runtime, each repeat in a fresh process.

    Figures are medians, with the least and the most. Decoding is also told as a fraction of its limit: how fast this
    machine reads memory, measured in the same run with as many threads.

    Parameters
    ----------
    bundle
        The folder that nanokit export wrote.
    threads
        Threads of the runtime; 0 means all cores.
    context
        Tokens of the prompt (random ones): prefill takes them, decoding begins behind them.
    decode
        Tokens decoded after the prompt.
    repeat
        How many fresh processes.
    record
        Keep the figures in the bundle's manifest.json, under results.
    json
        Print the figures as one JSON object; seconds, bytes, tokens a second.
    """
    from rich.table import Table

    from export.bench import as_dict, rows, run_bench
    from nano.manifest import add_results
    from nano.progress import emit_json, show

    found = run_bench(bundle, threads=threads, prompt=context, decode=decode, repeat=repeat)
    if record:
        add_results(bundle, {"bench": as_dict(found)})
    if json:
        emit_json({"bundle": str(bundle), **as_dict(found)})
        return 0
    title = f"{found.runtime}, {found.threads} threads, {found.repeat} processes; {found.machine}"
    table = Table("", "median", "least to most", title=title)
    for row in rows(found):
        table.add_row(*row)
    show(table)
    return 0


def _grid(rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table

    table = Table(show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _print(facts: dict[str, Any], files: Any) -> None:
    from rich.table import Table

    from nano.folder import human_bytes
    from nano.progress import show

    table = Table(title=f"{facts['format']} bundle in {facts['out']}", show_header=False)
    for name, entry in files.items():
        table.add_row(name, human_bytes(entry["bytes"]))
    exact = facts["exact"]
    table.add_row("codes equal to the checkpoint's", f"{exact['codes']:,} in {exact['modules']} modules: all")
    for label, figures in _parity_rows(facts.get("parity")):
        table.add_row(label, figures)
    show(table)


def _parity_rows(parity: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the parity report says, a line each."""
    if not parity:
        return []
    rows = []
    for name, label in (("simulated", "int8 activations simulated"), ("float", "float activations")):
        row, greedy, prefill = parity[name], parity["greedy"][name], parity["prefill"][name]
        figures = (
            f"same top token {row['top1']:.2%}, logit error {row['logit_error']:.2%}, KL {row['kl']:.2g}, "
            f"greedy {greedy['same']}/{greedy['of']}, logit error of prefill {prefill['logit_error']:.2%}"
        )
        for edge, found in parity.get("edges", {}).get(name, {}).items():
            figures += f", at the {edge}'s edge {found['logit_error']:.2%}"
        rows.append((f"against torch, {label}", figures))
    if "floor" in parity:
        floor = parity["floor"]
        figures = f"same top token {floor['top1']:.2%}, logit error {floor['logit_error']:.2%}: the noise floor"
        rows.append(("simulation against itself, moved by 1e-7", figures))
    return rows
