"""Keeps libraries' chatter off the user's screen: the command line's own words are the only ones there.

Called by `nano.cli` alone; a program that imports nanokit keeps its own logging. Errors are still shown.
"""

from __future__ import annotations

import logging
import os

_LOUD = (
    "torchao",  # "Failed to load ..._C*.so" at every import on a CPU
    "torch.utils._pytree",
    "torch._export",
    "torch.export",
    "transformers",
    "compressed_tensors",
    "bitsandbytes",
    "executorch",
    "root",
)


def hush() -> None:
    """Raise the threshold of libraries' loggers to errors, unless NANOKIT_DEBUG asks for everything."""
    if os.environ.get("NANOKIT_DEBUG"):
        return
    for name in _LOUD:
        logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
