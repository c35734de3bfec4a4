"""A .pte file from outside: whether it is whole, and where its segments lie. Free of torch and of ExecuTorch.

Layout (executorch/schema/extended_header.h): a flatbuffer with magic "ET12" whose bytes 8 to 40 hold the extended
header: magic "eh00", length (uint32), program size, offset of the first segment, size of all segments (uint64 each,
little-endian). The runtime trusts these sizes, so a truncated file must be found here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from nano.errors import BadFileError

MODEL = "model.pte"
_HEADER = struct.Struct("<4x4s4sIQQQ")
_MAGIC = {b"ET12"}
SEGMENT_BYTES_AT = 32
"""Where the header holds the size of all segments."""


@dataclass(frozen=True)
class Layout:
    """Sizes that the header gives, in bytes.

    Attributes:
        program_bytes: of the flatbuffer that describes the program.
        segments_at: offset of the first segment.
        segment_bytes: of all segments.
    """

    program_bytes: int
    segments_at: int
    segment_bytes: int

    @property
    def end(self) -> int:
        """Where the last byte must be."""
        return max(self.program_bytes, self.segments_at + self.segment_bytes)


def check_whole(folder: Path) -> Layout:
    """The layout of a bundle's model file, of which every byte is there.

    Raises:
        BadFileError: missing, truncated, or not an ExecuTorch program.
    """
    path = folder / MODEL
    if not path.is_file():
        raise BadFileError("The bundle has no model.", found=f"no {path}", todo="copy the bundle again")
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    size = path.stat().st_size
    if len(head) < _HEADER.size:
        raise BadFileError("The bundle's model is truncated.", found=f"{path}: {size} bytes", todo="copy it again")
    magic, extended, _length, program, base, segments = _HEADER.unpack(head)
    if magic not in _MAGIC or extended != b"eh00":
        raise BadFileError(
            "The bundle's model is not an ExecuTorch program.", found=f"{path} begins with {head[:12]!r}"
        )
    layout = Layout(program, base, segments)
    if size < layout.end:
        raise BadFileError(
            "The bundle's model is truncated.",
            found=f"{path}: {size} bytes",
            expected=f"{layout.end} bytes, as its own header says",
            todo="copy the bundle again",
        )
    return layout
