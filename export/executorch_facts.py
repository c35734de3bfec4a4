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
        WorkError: a decoder linear did not get one of XNNPACK's 4-bit or 8-bit kernels.
    """
    with open_pte(folder) as pte:
        filters, table = dict(named_filters(pte)), pte.table()
        require_kernels(filters, shape)
        kinds = [one.kind for one in pte.filters()]
        footprint = {"file_bytes": (folder / MODEL).stat().st_size, **_weights(pte, filters, table, shape)}
        kv = kv_cache_bytes(shape, plan)
        footprint |= {
            "kv_cache_bytes": kv,
            "kv_cache_dtype": "float32",
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


def _weights(pte: PteFile, filters: dict[str, Filter], table: Table | None, shape: ModelShape) -> dict[str, Any]:
    """Bytes of the weights by cause."""
    size = {name: pte.named_size(one.codes) + pte.named_size(one.scales) for name, one in filters.items()}
    dense = FLOAT_BYTES * shape.vocab_size * shape.hidden_size
    head_on_grid = size.pop(HEAD, 0)
    linears = sum(size.values())
    embedding = dense if table is None else sum(pte.constant_size(i) for i in (table.codes, table.scales))
    return {
        "linear_bytes": linears,
        "packed_copy_bytes": linears + head_on_grid,
        "head_bytes": head_on_grid or dense,
        "embedding_bytes": embedding,
        "float_weight_bytes": pte.weight_bytes - linears - (head_on_grid or dense) - embedding,
    }


def kv_cache_bytes(shape: ModelShape, plan: CachePlan) -> int:
    """Bytes of the float32 caches: rings for sliding layers."""
    slots = sum(plan.slots(kind) for kind in shape.layer_types)
    return FLOAT_BYTES * 2 * slots * shape.num_kv_heads * shape.head_dim


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
