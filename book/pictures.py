"""`python -m book.pictures SITE REPORT`: the two pictures of the README, of a page of the built site and of a run's
report (`report.html`), by a headless Chromium. They are small: at most 150 kB each."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from book.source import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PICTURES = ROOT / "docs/pictures"
PAGE = "layer/latent_attention.html"
MAX_BYTES = 150_000


class PictureError(RuntimeError):
    """No browser, or a picture that is too large."""


def find_browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise PictureError(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    return found


def take_picture(page: Path, out: Path, width: int, height: int, *, dark: bool = False) -> None:
    """A PNG of what a window of this size shows of a page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options += [f"--window-size={width},{height}", f"--screenshot={out.resolve()}"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        command = [find_browser(), *options, page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m book.pictures", description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("report", type=Path)
    options = parser.parse_args()
    for name, page in (("page", options.site / PAGE), ("report", options.report)):
        out = PICTURES / f"{name}.png"
        try:
            take_picture(page, out, 1000, 720)
        except PictureError as error:
            print(error, file=sys.stderr)
            return 1
        if (size := out.stat().st_size) > MAX_BYTES:
            print(f"{out} has {size} bytes, more than {MAX_BYTES}", file=sys.stderr)
            return 1
        print(f"{out}: {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
