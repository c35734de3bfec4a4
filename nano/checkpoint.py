"""A safetensors folder, read and written tensor by tensor, so that no model need fit in memory.

Reading opens each shard's header only; a tensor's bytes are mapped when it is asked for. Writing buffers one
shard at a time. Truncated or foreign files are found at opening, before any work is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nano.errors import BadFileError
from nano.families import weight_shapes
from nano.model_files import read_json_object, refuse_pointer
from nano.shapes import ModelShape

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 1 << 30

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of tensors that a float model may have, as safetensors names them."""

LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Checkpoint:
    """A model folder's tensors, opened lazily. Use as a context manager, or call `close`.

    Raises:
        BadFileError: no safetensors there, a shard is missing or truncated, or the index names absent tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open()

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        self._stack = ExitStack()
        self._home: dict[str, Any] = {}
        for path in _shards(self.folder):
            refuse_pointer(path)
            try:
                shard = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                self._stack.close()
                raise BadFileError(
                    "A weight file is truncated or not safetensors.",
                    found=f"{path} ({path.stat().st_size} bytes): {error}",
                    todo="copy or download the file again",
                ) from None
            self._home.update(dict.fromkeys(shard.keys(), shard))

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def size(self, name: str) -> tuple[int, ...]:
        """Dimensions of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as stored.

        Raises:
            BadFileError: there is none of that name.
        """
        self._slice(name)
        tensor: torch.Tensor = self._home[name].get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, without reading the others."""
        rows: torch.Tensor = self._slice(name)[start:stop]
        return rows

    def _slice(self, name: str) -> Any:
        if name not in self._home:
            raise BadFileError(
                "A weight is missing.", found=f"no '{name}' in {self.folder}", todo="copy the model again"
            )
        return self._home[name].get_slice(name)

    def check(self, shape: ModelShape) -> None:
        """Every tensor of `shape` is there with its dimensions, in a float type, and no bias or layer beyond it.

        Raises:
            BadFileError: names the first that does not fit, and how many.
        """
        wrong: list[tuple[str, str, str]] = []
        for name, expected in weight_shapes(shape).items():
            if name not in self:
                wrong.append((name, "nothing", str(list(expected))))
            elif self.size(name) != expected:
                wrong.append((name, str(list(self.size(name))), str(list(expected))))
            elif (kind := self._slice(name).get_dtype()) not in FLOATS:
                raise BadFileError(
                    f"'{name}' is not stored in floating point that can be trained on.",
                    found=f"{kind} in {self.folder}",
                    expected=f"one of {', '.join(FLOATS)}",
                    todo="name the float model that it was made from",
                )
        wrong += [(name, str(list(self.size(name))), "nothing") for name in self.names() if _is_beyond(name, shape)]
        if wrong:
            name, found, wanted = wrong[0]
            raise BadFileError(
                f"{len(wrong)} of the model's weights do not fit its config.json; the first is '{name}'.",
                found=f"{found} in {self.folder}",
                expected=wanted,
                todo="make sure config.json and the safetensors come from the same model",
            )

    def release(self) -> None:
        """Unmap the files and map them anew: what was read so far no longer counts as this process's memory."""
        self._stack.close()
        self._open()

    def close(self) -> None:
        """Unmap the files."""
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _is_beyond(name: str, shape: ModelShape) -> bool:
    """Whether a tensor is a layer's that the shape has not, or a bias: left out, the model would be another one."""
    layer = LAYER.match(name)
    return layer is not None and (int(layer[1]) >= shape.num_layers or name.endswith("_proj.bias"))


def _shards(folder: Path) -> list[Path]:
    """The weight files that transformers would take: the single one, else those of the index."""
    if not folder.is_dir():
        raise BadFileError("There is no such model folder.", found=str(folder), todo="check the path")
    index, paths = folder / INDEX, [folder / SINGLE]
    if not paths[0].is_file() and index.is_file():
        homes = read_json_object(index).get("weight_map")
        if not isinstance(homes, dict) or not homes or not all(isinstance(home, str) for home in homes.values()):
            raise BadFileError(
                "The weight index cannot be read.", found=str(index), expected="a weight_map from tensor to file"
            )
        paths = [folder / Path(name).name for name in sorted(set(homes.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise BadFileError(
            "The model's weights are missing.",
            found=f"no {missing[0]} in {folder}",
            expected=f"{SINGLE}, or its shards and {INDEX}",
            todo=_instead(folder),
        )
    return paths


def _instead(folder: Path) -> str:
    """What to do about missing weights, by what lies there."""
    if any(folder.glob("*.bin")):
        return (
            "convert the *.bin files: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), transformers 5"
        )
    if any(folder.glob("*.safetensors")):
        return f"copy {INDEX} too: it says which file holds what"
    return "copy the model again"


class CheckpointWriter:
    """Writes safetensors shard by shard; `finish` names the shards and writes the index.

    Args:
        folder: where to write; it exists.
        shard_bytes: a shard is written once it holds this many bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it must not change until its shard is written."""
        tensor = tensor.detach().to("cpu").contiguous()
        self._pending[name] = tensor
        self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._pending:
            return
        path = self.folder / f"shard-{len(self._shards)}.tmp"
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files that only their owner reads
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        self._shards.append(list(self._pending))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Write what is pending, give the shards their final names, and write the index if there are several."""
        self._flush()
        if len(self._shards) == 1:
            (self.folder / "shard-0.tmp").rename(self.folder / SINGLE)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            final = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / f"shard-{i}.tmp").rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        if kind is None:
            self.finish()


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor] | Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write named tensors into `folder` as safetensors, in their order."""
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    with CheckpointWriter(folder) as writer:
        for name, tensor in pairs:
            writer.add(name, tensor)
