"""A tied embedding and head as one copy in model.pte.

ExecuTorch's lookup reads the table from the program's constants, XNNPACK its codes from named data. Both are the same
bytes (`export.executorch_model.Embedding` sees to that), but the serializer has no way to say so: it joins equal named
data, and equal constants, not one with the other. The runtime asks a segment for nothing but its offset and size
(schema/program.fbs, `DataSegment`), so the head's segment is pointed at the table, and its own bytes are cut out.

    before   program | constants (… table …) | … | head's codes | rest
    after    program | constants (… table …) | … | rest           head's codes → table

Only numbers in place change: the offsets of segments in the flatbuffer, and the size of all segments in its header.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from export.executorch_file import MODEL, SEGMENT_BYTES_AT
from export.executorch_readback import PteFile, named_filters, open_pte
from nano.errors import require_module
from nano.families import HEAD

_OFFSET_FIELD = 4
"""Vtable slot of `DataSegment.offset`."""
_PAGE = 4096
"""What follows moves by whole pages, so that every segment keeps its alignment."""
_BLOCK = 1 << 24


def share_table(folder: Path) -> int:
    """Cut the head's codes out of a bundle's model.pte where they are the embedding's table.

    Args:
        folder: holds a model.pte that was just written; it is changed in place.

    Returns:
        How many bytes the file is smaller; 0 where the head has codes of its own or none.
    """
    with open_pte(folder) as pte:
        found = _head_segment(pte)
        if found is None:
            return 0
        index, table_at = found
        segments: list[Any] = pte.program.segments
        start: int = segments[index].offset
        later = [i for i, one in enumerate(segments) if one.offset > start]
        size = pte.segments_at, max(int(one.offset + one.size) for one in segments)
        moved_from: int = min((segments[i].offset for i in later), default=size[1])
        delta = (moved_from - start) // _PAGE * _PAGE
        offsets = {index: table_at, **{i: segments[i].offset - delta for i in later}}
        places = {i: at for i, at in enumerate(_offset_places(pte.flatbuffer)) if i in offsets}
    with (folder / MODEL).open("r+b") as file:
        _move(file, size[0] + moved_from, size[0] + size[1], delta)
        for i, at in places.items():
            _write_uint64(file, at, offsets[i])
        _write_uint64(file, SEGMENT_BYTES_AT, size[1] - delta)
    return delta


def _head_segment(pte: PteFile) -> tuple[int, int] | None:
    """(segment of the head's codes, offset of the table), where the two hold the same bytes in two places."""
    table, filters = pte.table(), dict(named_filters(pte))
    if table is None or HEAD not in filters:
        return None
    index = pte.named_segment(filters[HEAD].codes)
    start = pte.constant_start(table.codes)
    if pte.shares_table(filters[HEAD].codes, table) or pte.segment(index) != pte.view(
        start, pte.named_size(filters[HEAD].codes)
    ):
        return None
    return index, start


def _offset_places(flatbuffer: bytes) -> list[int]:
    """Where in the file each segment's offset is written; the first one's is 0, hence left out, and never asked for."""
    generated = require_module("executorch.exir._serialize.generated.executorch_flatbuffer.Program", "executorch")
    program = generated.Program.GetRootAs(flatbuffer, 0)
    places = []
    for i in range(program.SegmentsLength()):
        table = program.Segments(i)._tab
        places.append(table.Pos + table.Offset(_OFFSET_FIELD))
    return places


def _move(file: BinaryIO, start: int, stop: int, delta: int) -> None:
    """Move the bytes from `start` to `stop`, the end of the file, forward by `delta`."""
    for at in range(start, stop, _BLOCK):
        file.seek(at)
        block = file.read(min(_BLOCK, stop - at))
        file.seek(at - delta)
        file.write(block)
    file.truncate(stop - delta)


def _write_uint64(file: BinaryIO, at: int, value: int) -> None:
    file.seek(at)
    file.write(struct.pack("<Q", value))
