"""A real registry on loopback: Debian's docker-registry (CNCF Distribution), found, or fetched without root, and run.

    python benchmarks/registry_server.py --port 5000 --root registry-data     # or: make registry

Tests and `benchmarks/registry.py` start the same one, with or without a login (basic, bcrypt).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


class NoRegistryError(Exception):
    """docker-registry is neither here nor to be had."""


def find_registry() -> Path:
    """The registry's program: installed, or unpacked from Debian's package into the cache.

    Raises:
        NoRegistryError: it is not installed and `apt-get download` does not bring it.
    """
    for name in ("docker-registry", "registry"):
        if found := shutil.which(name):
            return Path(found)
    data = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(data) if data else Path.home() / ".cache") / "nanokit" / "docker-registry"
    program = cache / "usr" / "bin" / "docker-registry"
    if program.is_file():
        return program
    try:
        with tempfile.TemporaryDirectory() as folder:
            quiet = {"check": True, "capture_output": True, "timeout": 120}
            subprocess.run(["apt-get", "download", "docker-registry"], cwd=folder, **quiet)  # type: ignore[call-overload]
            package = next(Path(folder).glob("docker-registry*.deb"))
            subprocess.run(["dpkg", "-x", package, cache], **quiet)  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        raise NoRegistryError(
            f"docker-registry is not installed, and apt-get download did not bring it ({error}); "
            "apt-get install docker-registry"
        ) from None
    return program


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(root: Path, port: int, htpasswd: Path | None, tls: tuple[Path, Path] | None = None) -> Path:
    """The registry's configuration (docs: Distribution, "Configuring a registry")."""
    root.mkdir(parents=True, exist_ok=True)
    login = f"auth: {{htpasswd: {{realm: nanokit, path: {htpasswd}}}}}\n" if htpasswd else ""
    certificate = f", tls: {{certificate: {tls[0]}, key: {tls[1]}}}" if tls else ""
    config = root / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage:\n  filesystem: {{rootdirectory: {root}}}\n  delete: {{enabled: true}}\n"
        f"http: {{addr: '127.0.0.1:{port}'{certificate}}}\n{login}"
    )
    return config


@contextlib.contextmanager
def serving(
    root: Path, port: int = 0, htpasswd: Path | None = None, tls: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """Run a registry while the block runs; gives HOST:PORT. `tls` is a certificate and its key."""
    program, port = find_registry(), port or free_port()
    config = write_config(root, port, htpasswd, tls)
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", config], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait(process, port, root / "log")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(urllib.error.HTTPError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=2).close()
            return
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return  # it asks for a login
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise NoRegistryError(f"docker-registry did not start: {log.read_text()[-500:]}")


def main() -> int:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(description="A registry on this machine alone.")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--root", type=Path, default=Path("registry-data"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(arguments.root.absolute(), arguments.port) as host:
            print(f"registry at {host}, files in {arguments.root}; Ctrl-C stops it", flush=True)
            print(f"    nanokit push BUNDLE {host}/team/nano-2:1.0", flush=True)
            signal.pause()
    except NoRegistryError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
