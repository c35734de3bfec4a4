"""What a user types to name an artifact, read the way docker and skopeo read it.

    nano-2:1.0                     in the default store, a local OCI layout folder (or the one that --store names)
    oci:build/store:nano-2:1.0     in the layout folder build/store
    ghcr.io/team/nano-2:1.0        in a registry: the part before the first / has a dot, a colon, or is localhost
    ...@sha256:<64 hex digits>     exactly these bytes, whatever a tag says now

Grammar of names, tags and digests: OCI distribution-spec 1.1, "Pulling manifests".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from nano.errors import RequestError

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]{1,5})?")
MAX_NAME = 255
"""Longest name that registries take (distribution-spec 1.1)."""


@dataclass(frozen=True)
class Reference:
    """One artifact, or a name that several share.

    Attributes:
        name: for instance "team/nano-2".
        tag: empty where none was given.
        digest: "sha256:..." or empty; where given it decides, not the tag.
        host: the registry, with its port; empty for a folder.
        folder: the layout folder; None for a registry.
    """

    name: str
    tag: str = ""
    digest: str = ""
    host: str = ""
    folder: Path | None = None

    def __str__(self) -> str:
        where = f"{self.host}/" if self.host else ""
        tag = f":{self.tag}" if self.tag else ""
        return f"{where}{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"

    @property
    def pinned(self) -> str:
        """What to ask a store for: the digest, or the tag, or "latest"."""
        return self.digest or self.tag or "latest"

    def at(self, tag: str = "", digest: str = "") -> Reference:
        """The same name with another tag or digest."""
        return replace(self, tag=tag, digest=digest)


def is_digest(text: str) -> bool:
    """Whether `text` is a digest that we compute and check: sha256."""
    return _DIGEST.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Whether a registry's host, with or without its port, is this machine itself."""
    return _LOOPBACK.fullmatch(host) is not None


def default_store() -> Path:
    """$NANOKIT_STORE, or nanokit/store in $XDG_DATA_HOME or ~/.local/share."""
    if named := os.environ.get("NANOKIT_STORE"):
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "nanokit" / "store"


def parse_reference(text: str, store: Path | None = None) -> Reference:
    """Read a reference.

    Args:
        text: see the module's docstring.
        store: the layout folder that names without a host are in; `default_store()` where None.

    Raises:
        RequestError: it is none; the message says which part.
    """
    rest, digest = text, ""
    if "@" in text:
        rest, digest = text.split("@", 1)
        if not is_digest(digest):
            raise _refused(text, f"'{digest}' after the @", "sha256: and 64 hexadecimal digits, in lower case")
    if rest.startswith("oci:"):
        folder, _, rest = rest.removeprefix("oci:").partition(":")
        if not folder:
            raise _refused(text, "no folder after oci:", "oci:FOLDER:NAME:TAG")
        name, tag = _name_and_tag(text, rest)
        return Reference(name, tag, digest, folder=Path(folder))
    first, slash, after = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        if not _HOST.fullmatch(first):
            raise _refused(text, f"'{first}'", "a registry's host, with or without :PORT")
        name, tag = _name_and_tag(text, after)
        return Reference(name, tag, digest, host=first)
    name, tag = _name_and_tag(text, rest)
    return Reference(name, tag, digest, folder=store or default_store())


def _name_and_tag(text: str, rest: str) -> tuple[str, str]:
    name, colon, tag = rest.partition(":")
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise _refused(text, f"the name '{name}'", "lower-case letters, digits, and . _ - / between them")
    if colon and not _TAG.fullmatch(tag):
        raise _refused(text, f"the tag '{tag}'", "letters, digits, . _ and -, at most 128, not beginning with . or -")
    return name, tag


def _refused(text: str, found: str, expected: str) -> RequestError:
    return RequestError(
        "This is not a reference to an artifact.",
        found=f"{found} in '{text}'",
        expected=expected,
        todo="write it as NAME:TAG (local store), oci:FOLDER:NAME:TAG, or HOST/NAME:TAG",
    )
