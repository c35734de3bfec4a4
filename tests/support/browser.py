"""A page as headless Chromium shows it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = "chromium-headless-shell"


@dataclass(frozen=True)
class Looked:
    """What Chromium made of a page.

    Attributes:
        dom: its HTML after its script ran, and after one of the test's.
        console: what it said on the console, warnings and errors among it.
    """

    dom: str
    console: tuple[str, ...]


def look(
    page: Path, scratch: Path, *, state: str = "", script: str = "", width: int = 1280, dark: bool = False
) -> Looked:
    """Open a page; the test is skipped where Chromium is missing.

    Args:
        page: the HTML file.
        scratch: a folder to write a copy to.
        state: the address behind #.
        script: JavaScript to run at the end of the page.
        width: of the window, pixels.
        dark: as a reader who prefers dark pages.
    """
    chromium = shutil.which(CHROMIUM)
    if chromium is None:
        pytest.skip(f"{CHROMIUM} is not installed")
    text = page.read_text(encoding="utf-8")
    if script:
        text = text.replace("</main>", f"<script>{script}</script></main>")
    (scratch / "look.html").write_text(text, encoding="utf-8")
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [chromium, "--no-sandbox", "--enable-logging=stderr", "--dump-dom", "--virtual-time-budget=2000", *flags,
         f"--window-size={width},900", f"file://{scratch / 'look.html'}#{state}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Looked(done.stdout, tuple(line for line in done.stderr.splitlines() if "CONSOLE" in line))
