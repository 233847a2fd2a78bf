"""A real browser, headless, that pages of ours are opened in."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Dom = Callable[..., str]
"""(page, fragment of its address, seconds that its work may take) -> its DOM after all work is
done."""


def open_browser(profile: Path) -> Dom:
    """Opens pages, each in a fresh browser with this profile; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("needs chromium on the PATH, which the page is opened in")

    def opened(page: Path, fragment: str = "", seconds: int = 60) -> str:
        found = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *(f"--user-data-dir={profile}", f"--virtual-time-budget={seconds * 1000}"),
                f"{page.as_uri()}#{fragment}",
            ],
            capture_output=True,
            text=True,
            timeout=2 * seconds,
            check=True,
        )
        return found.stdout

    return opened
