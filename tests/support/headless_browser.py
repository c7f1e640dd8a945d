"""A page in a headless Chromium, by its command line: its document, its errors, its picture."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
DARK, LIGHT = "preferredColorScheme=0", "preferredColorScheme=1"


def find_browser() -> str | None:
    """Return the program that ``PYRA_BROWSER`` names, or the first Chromium on the path."""
    named = os.environ.get("PYRA_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(frozen=True)
class Seen:
    """The document after its scripts, what the probe found, and errors of scripts and console."""

    dom: str
    probe: Any
    errors: list[str]


def look(page: Path, fragment: str = "", *, width: int = 1280, settings: str = LIGHT, probe: str = "null") -> Seen:
    """Open a page and return what is there; ``probe`` is JavaScript whose value comes back as JSON.

    Skips the test where the browser's window cannot be that narrow.
    """
    kept = f"document.documentElement.dataset.probe = JSON.stringify([innerWidth, ({probe})])"
    script = f"<script>{kept};</script>"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "page.html")
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
        done = _run(["--dump-dom", f"--window-size={width},900", *_settings(settings), _address(copy, fragment)])
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root, done.stderr
    found = re.search(r'data-probe="([^"]*)"', root[0])
    broken = re.search(r'data-error="([^"]*)"', root[0])
    errors = re.findall(r"CONSOLE[^\n]*", done.stderr) + ([broken[1]] if broken else [])
    wide, value = json.loads(html.unescape(found[1])) if found else (width, None)
    if wide > width:
        pytest.skip(f"this browser's window is never narrower than {wide} px; that of chromium-headless-shell is")
    return Seen(done.stdout, value, errors)


def photograph(
    page: Path, to: Path, fragment: str = "", *, width: int = 1280, height: int = 900, settings: str = LIGHT
):
    """Write a screenshot."""
    size = f"--window-size={width},{height}"
    _run([f"--screenshot={to}", "--hide-scrollbars", size, *_settings(settings), _address(page, fragment)])


def _settings(text: str) -> list[str]:
    return [f"--blink-settings={text}"]


def _address(page: Path, fragment: str) -> str:
    return page.resolve().as_uri() + (f"#{fragment}" if fragment else "")


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    program = find_browser()
    assert program is not None
    own = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    return subprocess.run([program, *own, *arguments], capture_output=True, text=True, timeout=120, check=True)
