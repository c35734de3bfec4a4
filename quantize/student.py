"""A float checkpoint read as the model that will be quantized: checked, and padded where the grid needs it.

The feed-forward width need not be a multiple of the group size (stories260K: 172). It is then padded to the next
multiple with neurons whose gate, up and down weights are all zero: their activation is act(0) x 0 = 0, and 0 x 0
is what they add, so the padded model's outputs are the same numbers. No other width is free like that.

Legend: N output channels, K input channels, F feed-forward width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.checkpoint import Checkpoint
from nano.errors import BadFileError
from nano.families import weight_shapes
from nano.shapes import ModelShape, read_config

if TYPE_CHECKING:
    import torch


class Student:
    """A float HF folder, opened lazily, its feed-forward width padded to a multiple of the group size.

    Attributes:
        folder: where it lies.
        source_shape: its dimensions as they are on disk.
        shape: its dimensions as it will be quantized.
        config: config.json of the padded model.

    Raises:
        BadFileError: files are missing, truncated, or do not fit config.json; or it is quantized already.
        UnsupportedError: the family is not one of ours.
    """

    def __init__(self, folder: Path, group_size: int) -> None:
        config = read_config(folder)
        if (done := config.get("quantization_config")) is not None:
            method = done.get("quant_method") if isinstance(done, dict) else done
            raise BadFileError(
                "This model is quantized already.",
                found=f"{folder}, quant_method {method!r}",
                expected="a float model",
                todo="name the folder that nanokit distill wrote, or the original model",
            )
        self.folder = folder
        self.source_shape = ModelShape.from_hf(config)
        width = self.source_shape.intermediate_size
        self.shape = self.source_shape.resized(intermediate_size=width + -width % group_size)
        self.config: dict[str, Any] = self.shape.to_hf(config)
        self.store = Checkpoint(folder)
        try:
            self.store.check(self.source_shape)
        except BaseException:
            self.store.close()
            raise

    @property
    def padding(self) -> dict[str, int] | None:
        """What was widened, for the manifest; None where nothing was."""
        before, after = self.source_shape.intermediate_size, self.shape.intermediate_size
        return None if before == after else {"intermediate_size_from": before, "intermediate_size_to": after}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the padded model, as stored on disk.

        Raises:
            BadFileError: it holds NaN or infinity.
        """
        import torch

        from nano.torch_lm import refuse_not_finite

        tensor = self.store.tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            refuse_not_finite(name, tensor, self.folder)
        size = weight_shapes(self.shape)[name]
        if tuple(tensor.shape) == size:
            return tensor
        padded = torch.zeros(size, dtype=tensor.dtype)
        padded[tuple(slice(0, length) for length in tensor.shape)] = tensor
        return padded

    def close(self) -> None:
        """Unmap the files."""
        self.store.close()

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
