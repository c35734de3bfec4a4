"""Facts about a written model.pte, taken from the file itself: bytes by cause, and which kernel runs what.

Legend: V vocabulary, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.executorch_file import MODEL
from export.executorch_readback import LINEAR_BITS, Filter, PteFile, Table, named_filters, open_pte
from nano.errors import WorkError
from nano.families import EMBEDDING, HEAD, linear_names
from nano.shapes import ModelShape

if TYPE_CHECKING:
    from pathlib import Path

    from export.executorch_model import CachePlan

FLOAT_BYTES = 4
MOST_BYTES_PER_INT4 = 0.58
"""Of a decoder linear's weight in 4 bits with its scales: 0.5 + 2 / 32 with the smallest group that XNNPACK takes."""


def describe(folder: Path, shape: ModelShape, plan: CachePlan, last_only: bool) -> dict[str, Any]:
    """What a manifest records of model.pte, as plain data.

    Args:
        folder: holds model.pte.
        shape: the model's dimensions.
        plan: its caches.
        last_only: whether a call gives one row of logits.

    Returns:
        "footprint": bytes by cause (`planned_bytes` is what the program plans besides the caches; XNNPACK's own
        workspace is not in any file); "delegation": linears by kernel; "modules": for each quantized module its
        bits, group size, and where its codes and scales stand: named data, or a constant's index.

    Raises:
        WorkError: a decoder linear did not get one of XNNPACK's 4-bit or 8-bit kernels, or takes more bytes than it
            should; a delegate owns data that XNNPACK does not pack, so that its weight cache would crash.
    """
    with open_pte(folder) as pte:
        filters, table = dict(named_filters(pte)), pte.table()
        require_kernels(filters, shape)
        int4 = {name: one for name, one in filters.items() if one.bits == 4}
        int4_bytes = sum(pte.named_size(one.codes) + pte.named_size(one.scales) for one in int4.values())
        int4_weights = sum(one.rows * one.columns for one in int4.values())
        require_small(int4_bytes, int4_weights, pte.unpacked())
        kinds = [one.kind for one in pte.filters()]
        footprint = {"file_bytes": (folder / MODEL).stat().st_size, **_weights(pte, filters, table, shape)}
        kv = kv_cache_bytes(shape, plan)
        footprint |= {
            "kv_cache_bytes": kv,
            "kv_cache_dtype": "int8" if plan.int8 else "float32",
            "planned_bytes": pte.planned_bytes - kv,
            "logits_bytes": FLOAT_BYTES * shape.vocab_size * (1 if last_only else plan.chunk),
            "context": plan.context,
            "chunk": plan.chunk,
        }
        return {
            "footprint": footprint,
            "delegation": {
                "delegates": pte.delegates,
                "linears_int4": sum(one.bits == 4 for name, one in filters.items() if name != HEAD),
                "linears_int8": sum(one.bits == 8 for name, one in filters.items() if name != HEAD),
                "fully_connected": {
                    kind.removeprefix("xnn_datatype_"): kinds.count(kind) for kind in sorted(set(kinds))
                },
                "int4_bytes_per_weight": round(int4_bytes / max(int4_weights, 1), 4),
                "file_bytes_per_parameter": round(footprint["file_bytes"] / shape.num_parameters, 4),
                "operators": pte.operators,
            },
            "modules": _modules(filters, table, shape),
        }


def require_kernels(filters: dict[str, Filter], shape: ModelShape) -> None:
    """Raise WorkError unless every decoder linear runs in a kernel that takes its codes as they are."""
    other = [name for name in linear_names(shape) if name not in filters or filters[name].kind not in LINEAR_BITS]
    if other:
        raise WorkError(
            "A linear did not get XNNPACK's kernel for weights on a grid.",
            found=f"{len(other)} of {len(linear_names(shape))}, the first is '{other[0]}'",
            todo="report this; the artifact was not kept",
        )


def require_small(int4_bytes: int, int4_weights: int, unpacked: int) -> None:
    """Raise WorkError where 4-bit weights take more than they should, or a delegate owns data that is not packed."""
    if int4_bytes > MOST_BYTES_PER_INT4 * int4_weights:
        raise WorkError(
            "The 4-bit linears take too much of the file.",
            found=f"{int4_bytes / int4_weights:.3f} bytes a weight",
            expected=f"at most {MOST_BYTES_PER_INT4}",
            todo="report this; the artifact was not kept",
        )
    if unpacked:
        raise WorkError(
            "A delegate owns data that XNNPACK does not pack; with its weight cache on, the program would crash.",
            found=f"{unpacked} tensors",
            expected="filters and biases of linears alone",
            todo="report this; the artifact was not kept",
        )


def _weights(pte: PteFile, filters: dict[str, Filter], table: Table | None, shape: ModelShape) -> dict[str, Any]:
    """Bytes of the weights by cause."""
    size = {name: pte.named_size(one.codes) + pte.named_size(one.scales) for name, one in filters.items()}
    dense = FLOAT_BYTES * shape.vocab_size * shape.hidden_size
    head_on_grid = size.pop(HEAD, 0)
    shared = table is not None and HEAD in filters and pte.shares_table(filters[HEAD].codes, table)
    head_bytes = pte.named_size(filters[HEAD].scales) if shared else head_on_grid or dense
    linears = sum(size.values())
    embedding = dense if table is None else sum(pte.constant_size(i) for i in (table.codes, table.scales))
    return {
        "linear_bytes": linears,
        "packed_copy_bytes": linears + head_on_grid,
        "head_bytes": head_bytes,
        "embedding_bytes": embedding,
        "float_weight_bytes": pte.weight_bytes - linears - head_bytes - embedding,
    }


def kv_cache_bytes(shape: ModelShape, plan: CachePlan) -> int:
    """Bytes of the caches, rings for sliding layers: float32, or int8 with a float32 scale and an int8 zero point."""
    slots = sum(plan.slots(kind) for kind in shape.layer_types)
    row = shape.head_dim + FLOAT_BYTES + 1 if plan.int8 else FLOAT_BYTES * shape.head_dim
    return 2 * slots * shape.num_kv_heads * row


def _modules(filters: dict[str, Filter], table: Table | None, shape: ModelShape) -> dict[str, Any]:
    modules: dict[str, Any] = {}
    if table is not None:
        modules[EMBEDDING] = {
            "bits": table.bits,
            "group_size": table.width // table.scale_size[1],
            "codes": f"constant {table.codes}",
            "scales": f"constant {table.scales}",
        }
    for name, one in filters.items():
        name = "tied " + HEAD if name == HEAD and shape.tied else name
        modules[name] = {"bits": one.bits, "group_size": one.group_size, "codes": one.codes, "scales": one.scales}
    return modules
