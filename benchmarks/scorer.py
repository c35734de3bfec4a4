"""How near models are to the float model they were made from: KL, perplexity, top-1 agreement on held-out text.

    python benchmarks/scorer.py --reference FLOAT --text NAME=FILE ... --json OUT FOLDER...

Every folder is a dense float32 HF folder of one architecture, so that no tool's own kernels enter the figures. The
text's first tokens are cut into windows that do not overlap, each with the beginning id in front; every token of a
window is predicted. KL is KL(float || model) in nats a token.

Legend: B windows in a batch, T positions, V vocabulary, N output channels, K input channels.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nano.corpus import read_documents
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float

BATCH = 8
CHARACTERS_PER_TOKEN = 8
"""No tokenizer of ours needs more: text beyond that is not read."""


def held_out_windows(folder: Path, text: Path, tokens: int, length: int) -> torch.Tensor:
    """Token windows (count, length + 1) of a text, the beginning id first."""
    tokenizer = load_tokenizer(folder)
    whole = "\n".join(read_documents([text]))[: tokens * CHARACTERS_PER_TOKEN]
    ids = torch.tensor(tokenizer.encode(whole)[:tokens])
    count = len(ids) // length
    if not count:
        raise SystemExit(f"{text} holds {len(ids)} tokens; one window needs {length}")
    head = 1 if tokenizer.bos_id is None else tokenizer.bos_id
    return torch.cat([torch.full((count, 1), head), ids[: count * length].view(count, length)], 1)


def score(model: Any, reference: Any, windows: torch.Tensor) -> dict[str, float]:
    """Figures of a model over windows (count, T + 1), beside the reference's perplexity."""
    nll = reference_nll = kl = same = 0.0
    with torch.inference_mode():
        for start in range(0, len(windows), BATCH):
            ids_BT, target_BT1 = windows[start : start + BATCH, :-1], windows[start : start + BATCH, 1:, None]
            log_p_BTV = torch.log_softmax(reference(input_ids=ids_BT, use_cache=False).logits.float(), -1)
            log_q_BTV = torch.log_softmax(model(input_ids=ids_BT, use_cache=False).logits.float(), -1)
            nll -= log_q_BTV.gather(-1, target_BT1).double().sum().item()
            reference_nll -= log_p_BTV.gather(-1, target_BT1).double().sum().item()
            kl += (log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1).double().sum().item()
            same += (log_p_BTV.argmax(-1) == log_q_BTV.argmax(-1)).sum().item()
    count = windows[:, 1:].numel()
    return {
        "kl": kl / count,
        "perplexity": math.exp(nll / count),
        "top1": same / count,
        "reference_perplexity": math.exp(reference_nll / count),
        "tokens": count,
    }


def levels(weight_NK: torch.Tensor, group_size: int) -> int:
    """The largest number of different values in one group of input channels: at most 16 on an int4 grid."""
    if weight_NK.shape[1] % group_size:
        return weight_NK.shape[1]
    ordered = weight_NK.reshape(-1, group_size).sort(-1).values
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def scope(model: Any, reference: Any, group_size: int) -> dict[str, Any]:
    """What differs from the float model: decoder linears changed, the most levels in a group, and anything else."""
    ours, theirs = model.state_dict(), reference.state_dict()
    changed = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    linears = [name for name in theirs if name.endswith("_proj.weight")]
    others = {"norms" if "norm" in name else "embedding and head" for name in changed if name not in linears}
    return {
        "linears": len(linears),
        "linears_changed": len([name for name in changed if name in linears]),
        "levels": max(levels(ours[name], group_size) for name in linears),
        "also_changed": sorted(others),
    }


def score_folders(
    reference: Path, folders: Sequence[Path], texts: Mapping[str, Path], tokens: int, length: int, group_size: int = 32
) -> dict[str, dict[str, Any]]:
    """Figures of every folder on every text, by folder."""
    float_model = load_float(reference).eval()
    length = min(length, int(float_model.config.max_position_embeddings))
    windows = {name: held_out_windows(reference, path, tokens, length) for name, path in texts.items()}
    found = {}
    for folder in folders:
        model = load_float(folder).eval()
        scores = {name: score(model, float_model, ids) for name, ids in windows.items()}
        found[str(folder)] = {"scores": scores, **scope(model, float_model, group_size)}
    return found


def named_file(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FILE")
    return name, Path(path)


def main() -> None:
    """Parse, score, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--text", type=named_file, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = score_folders(given.reference, given.folders, dict(given.text), given.tokens, given.length)
    given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
