"""`nanokit quantize`: check the request, run the stage, say what was made."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quantize.options import QuantizeOptions
from quantize.rules import read_rules

DEFAULT = QuantizeOptions()


def quantize(
    student: str,
    *,
    data: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative=())] = (),
    out: Path,
    options: Annotated[QuantizeOptions, Parameter(name="*")] = DEFAULT,
    rules: Path | None = None,
    force: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Quantize a float student to packed int4, layer by layer.

    The output is an ordinary Hugging Face folder in compressed-tensors "pack-quantized" form: transformers and
    vLLM load it, and `nanokit export` puts the same codes and scales into the phone files.

    Parameters
    ----------
    student
        A float model: a folder, or a hub id.
    data
        Calibration text: a file (plain text, JSONL, parquet) or a folder of files; may be repeated. rtn needs none.
    out
        The folder to make.
    rules
        A TOML file of [[rule]] tables (pattern, bits = 4, 8 or "float", group_size, symmetric); the first rule that
        matches a module's whole name decides about it, before the options above do.
    force
        Replace the output folder if it exists, once the new one is complete.
    json
        Print one JSON object on stdout; everything for people goes to stderr.
    """
    from nano.folder import check_output, human_bytes
    from nano.hub import resolve_model
    from nano.progress import emit_json, say
    from quantize.run import run_quantize

    check_output(out, force=force)
    if rules:
        options = replace(options, rules=read_rules(rules))
    manifest = run_quantize(resolve_model(student), data, out, options, force)
    size = sum(entry["bytes"] for entry in manifest.files.values())
    if json:
        emit_json({"out": str(out), "bytes": size, "recipe": asdict(options), **manifest.results})
        return
    mean = manifest.results["mean_relative_error"]
    say(f"{options.method}: mean relative error {mean:.2%} per linear, {human_bytes(size)}, in {out}")
