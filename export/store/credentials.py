"""Credentials of a registry, from docker's config file, as `docker login` and its helpers keep them.

$DOCKER_CONFIG/config.json or ~/.docker/config.json: "auths" (base64 of user:password), "credHelpers" (a program a
registry), "credsStore" (a program for all). oras-py runs the helpers, but reads ~/.docker alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nano.errors import BadFileError

_HUB = "https://index.docker.io/v1/"
"""The key under which docker keeps the credentials of Docker Hub."""
_HUB_HOST = "registry-1.docker.io"
MAX_CONFIG = 4 << 20


def docker_config() -> Path:
    """Where docker keeps credentials."""
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def read_credentials() -> dict[str, Any]:
    """Docker's config in the form that oras-py works on: host to entry.

    Raises:
        BadFileError: the file is there and is not what docker writes.
    """
    path = docker_config()
    config: Any = {}
    if path.is_file():
        try:
            with path.open("rb") as stream:
                config = json.loads(stream.read(MAX_CONFIG))
        except (OSError, ValueError, RecursionError) as error:
            raise BadFileError("Docker's config cannot be read.", found=f"{path}: {error}", todo="docker login again, or point DOCKER_CONFIG elsewhere") from None  # noqa: E501  # fmt: skip
    auths, helpers = (_table(config, key) for key in ("auths", "credHelpers"))
    store = config.get("credsStore") if isinstance(config, dict) else None
    return {
        "auths": {_host(key): entry for key, entry in auths.items() if isinstance(entry, dict)},
        "credHelpers": {_host(key): name for key, name in helpers.items() if isinstance(name, str)},
        "credsStore": store if isinstance(store, str) else None,
    }


def api_host(host: str) -> str:
    """The host that answers for a registry's name: Docker Hub's is another than its name."""
    return _HUB_HOST if host in ("docker.io", "index.docker.io") else host


def _table(config: Any, key: str) -> dict[str, Any]:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def _host(key: str) -> str:
    """A config's key, which may be a whole address, as the host it stands for."""
    if key == _HUB:
        return _HUB_HOST
    return api_host(key.split("://", 1)[-1].split("/", 1)[0])
