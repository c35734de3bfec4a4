"""What a run has finished, kept beside its output, so that a killed run goes on where it was.

`OUT.work` holds one safetensors file a solved layer and one of the training in progress, each written beside its
place and renamed. It belongs to one request (`key`: model, text, options, versions); another request's is dropped.
When the output is complete it is removed.

Legend: N output channels, K input channels, G groups, W packed words.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nano.errors import NoSpaceError, RequestError
from nano.folder import hold_folder
from nano.progress import say
from quantize.grid import QuantizedTensor
from quantize.layers import LayerResult
from quantize.packed import pack_codes, unpack_codes

KEY, STATE, TRAINING, FOLDS = "key.json", "state", "training.safetensors", "folds.safetensors"


class Journal:
    """Finished work of one request, for one process at a time.

    Attributes:
        folder: where it is kept.

    Raises:
        RequestError: another process works on the same output now, or the folder's name is taken.
    """

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self.folder = out.absolute().with_name(out.absolute().name + ".work")
        text = json.dumps(request, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._release = weakref.finalize(self, os.close, hold_folder(self.folder))
        self._check_own()
        if (self.folder / KEY).exists() and self._found_key() != key:
            say(f"the unfinished work in {self.folder} is of another request; it is dropped")
            for path in self.folder.iterdir():  # the folder stays, for the lock on it, and its key, which marks it ours
                if path.name != KEY:
                    path.unlink()
        if self._found_key() != key:
            (self.folder / KEY).write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
        elif layers := len(list(self.folder.glob("layer-*.safetensors"))):
            count = "1 finished layer" if layers == 1 else f"{layers} finished layers"
            say(f"an earlier run of this request left {count} in {self.folder}; the work goes on from there")

    def _check_own(self) -> None:
        """Refuse a folder of this name that someone else made: what is in it would be lost."""
        if any(self.folder.iterdir()) and not (self.folder / KEY).exists():
            self._release()
            raise RequestError(
                "The folder where unfinished work would be kept holds other things.",
                found=str(self.folder),
                todo="move it away, or choose another --out",
            )

    def _found_key(self) -> str | None:
        try:
            found = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found.get("key") if isinstance(found, dict) else None

    @contextlib.contextmanager
    def kept_if_interrupted(self) -> Iterator[None]:
        """Removed when the block ends, or fails in a way that would come again; kept when it was only stopped."""
        try:
            yield
        except (KeyboardInterrupt, NoSpaceError):
            self._release()
            say(f"what is finished is kept in {self.folder}: the same command goes on from there")
            raise
        except BaseException:
            self.discard()
            raise
        self.discard()

    def has_layer(self, layer: int) -> bool:
        """Whether a layer is finished."""
        return (self.folder / f"layer-{layer:04}.safetensors").exists()

    def layer(self, layer: int) -> LayerResult | None:
        """A layer that an earlier run finished, or None."""
        found = self._load(f"layer-{layer:04}.safetensors")
        if found is None:
            return None
        tensors, described = found
        result = LayerResult(**described["result"])
        for name, about in described["modules"].items():
            codes_NK = unpack_codes(tensors[name + ".codes"], about["columns"], about["bits"])
            zero_NG = tensors.get(name + ".zero")
            result.weights[name] = QuantizedTensor(
                codes_NK, tensors[name + ".scale"], about["group_size"], about["bits"], zero_NG
            )
        for name in described["floats"]:
            result.floats[name] = tensors[name]
        return result

    def save_layer(self, layer: int, result: LayerResult) -> None:
        """Keep a solved layer."""
        tensors: dict[str, torch.Tensor] = dict(result.floats)
        modules = {}
        for name, weight in result.weights.items():
            tensors[name + ".codes"] = pack_codes(weight.codes_NK, weight.bits)
            tensors[name + ".scale"] = weight.scale_NG
            if weight.zero_NG is not None:
                tensors[name + ".zero"] = weight.zero_NG
            columns = weight.codes_NK.shape[1]
            modules[name] = {"bits": weight.bits, "group_size": weight.group_size, "columns": columns}
        plain = {key: value for key, value in vars(result).items() if key not in ("weights", "floats")}
        described = {"result": plain, "modules": modules, "floats": list(result.floats)}
        self._save(f"layer-{layer:04}.safetensors", tensors, described)

    def folds(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What was found to fold into the weights: tensors and a description, or None."""
        return self._load(FOLDS)

    def save_folds(self, tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> None:
        """Keep what is folded into the weights."""
        self._save(FOLDS, tensors, described)

    def training(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last kept state of the training in progress: tensors and numbers, or None."""
        return self._load(TRAINING)

    def save_training(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Keep the state of the training in progress."""
        self._save(TRAINING, tensors, numbers)

    def discard(self) -> None:
        """Remove all of it, and let others have the output."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """A file's tensors and description; None where it is not there. Only whole files get their names."""
        from safetensors import safe_open

        path = self.folder / name
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            return tensors, json.loads(file.metadata()[STATE])

    def _save(self, name: str, tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        path = self.folder / name
        beside = path.with_suffix(".partial")
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(whole, beside, metadata={STATE: json.dumps(described)})
        beside.replace(path)
