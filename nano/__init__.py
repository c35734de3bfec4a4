"""nanokit: from a full language model to phone artifacts.

`nano` is what every stage shares. Importing it costs next to nothing: neither torch nor transformers is
loaded, and one check is made that the sibling packages are ours, because their names are plain words
(`export`, `distill`, ...) that a user's own script can hide.
"""

import importlib.util
from pathlib import Path

from nano.version import __version__

__all__ = ["__version__"]

ROOMS = ("distill", "quantize", "export", "device_profiles")


def _check_rooms_are_ours() -> None:
    """Raise ImportError, naming the file in the way, when another module hides one of our packages."""
    home = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if found != home / room / "__init__.py":
            where = "nothing was found" if found is None else f"'{found}' was found first"
            raise ImportError(
                f"nanokit needs its own package '{room}' at '{home / room}', but {where} on the import path. "
                f"Rename that file or folder, or start Python from another directory; "
                f"if nothing was found, reinstall with: pip install --force-reinstall nanokit"
            )


_check_rooms_are_ours()
