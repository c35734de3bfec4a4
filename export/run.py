"""The export stage: int4 folder to bundle, written beside, read back, measured, renamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.bundle import Format, compare_codes, require_exact, writer
from export.executorch import adapt_tokenizer
from export.options import ExportOptions
from nano.corpus import describe_data
from nano.folder import check_output, require_space, staged_folder
from nano.manifest import Manifest, input_entry, write_manifest
from nano.progress import say
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.bnb import refuse_export
from quantize.packed import Int4Checkpoint


def run_export(
    int4: Path,
    format: Format,
    out: Path,
    options: ExportOptions,
    *,
    data: Sequence[Path] = (),
    force: bool = False,
) -> Manifest:
    """Write one bundle.

    Args:
        int4: the int4 folder.
        format: "executorch" or "onnx".
        out: the bundle's folder.
        options: see `ExportOptions`.
        data: text on which the bundle's parity with torch is measured; none skips that.
        force: replace `out` once the new bundle is complete.

    Raises:
        BadFileError, UnsupportedError: the int4 folder cannot be used.
        WorkError: the artifact read back does not equal the checkpoint.
    """
    check_output(out, force=force, made_from=(int4, *data))
    refuse_export(int4)
    with Int4Checkpoint(int4) as checkpoint:
        tokenizer = load_tokenizer(int4, checkpoint.shape.vocab_size)
        require_space(out, 3 * sum(p.stat().st_size for p in int4.glob("*.safetensors")))
        write = writer(format)
        with staged_folder(out, force=force) as folder:
            facts = write(checkpoint, folder, options, tokenizer)
            copy_tokenizer(int4, folder)
            if format == "executorch":
                adapt_tokenizer(folder)
            exactness = compare_codes(folder, format, checkpoint)
            require_exact(exactness)
            say(f"read back: {exactness.codes:,} codes of {exactness.modules} modules equal the checkpoint's")
            manifest = _describe(checkpoint, format, options, facts, int4)
            results: dict[str, Any] = {"exact": dataclasses.asdict(exactness)}
            results.update({k: v for k, v in facts.items() if k not in ("footprint", "modules")})
            manifest = write_manifest(folder, dataclasses.replace(manifest, results=results))
            if data:
                manifest = _with_parity(manifest, folder, int4, data)
        return manifest


def _describe(
    checkpoint: Int4Checkpoint, format: Format, options: ExportOptions, facts: dict[str, Any], int4: Path
) -> Manifest:
    return Manifest(
        kind=format,
        inputs={"int4": input_entry(int4)},
        recipe={**dataclasses.asdict(options), "modules": facts.get("modules", {})},
        footprint={"runtime": format, **facts["footprint"]},
        shape=dataclasses.asdict(checkpoint.shape),
    )


def _with_parity(manifest: Manifest, folder: Path, int4: Path, data: Sequence[Path]) -> Manifest:
    """Add the parity report to a bundle's manifest."""
    from export.parity import measure_parity

    parity = measure_parity(folder, int4, data)
    described = describe_data(data, tokens=parity["tokens"])
    results = {**manifest.results, "parity": parity}
    return write_manifest(folder, dataclasses.replace(manifest, results=results, data=described))
