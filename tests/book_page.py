"""Looks at the book in headless Chromium, 400 and 1200 pixels wide, light and dark: nothing is wider than the window
(tables, code, output and formulas scroll within themselves), texts have a contrast of at least 4.5, every control of a
page gets the focus and shows it (at 400 pixels, light), the console has no error, and the search finds a page.

python -m tests.book_page SITE [--all] [--chromium PATH] [--screenshots FOLDER]

SITE is what `make book` wrote. Of each kind two pages are looked at, the largest among them; --all: every page at 400
pixels, for its width alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.browser import SCHEMES, WIDTHS, Browser

OVERFLOW = """(() => {
  const width = document.documentElement.clientWidth, wide = [];
  if (document.documentElement.scrollWidth <= width) return wide;
  for (const one of document.querySelectorAll('main *')) {
    if (one.getBoundingClientRect().right > width + 1 && !one.closest('pre, table, math, svg'))
      wide.push(one.tagName.toLowerCase() + ' ' + one.textContent.trim().slice(0, 40));
  }
  return [`${document.documentElement.scrollWidth} pixels wide`, ...wide.slice(0, 3)];
})()"""
"""The page's width, and what reaches beyond the window, where the page is wider than it."""
SECONDS = 20.0


def sample_pages(site: Path, per_kind: int = 2) -> list[Path]:
    """Of each folder the largest pages and the first."""
    found: list[Path] = []
    for folder in [site, *sorted(one for one in site.iterdir() if one.is_dir())]:
        files = sorted(folder.glob("*.html"))
        by_size = sorted(files, key=lambda one: -one.stat().st_size)
        found += dict.fromkeys([*by_size[: per_kind - 1], *files])
        del found[len(found) - max(len(files) - per_kind, 0) :]
    return found


def open_page(browser: Browser, page: Path, width: int, scheme: str) -> None:
    """Open a file and wait until it is laid out."""
    browser.open(page.resolve().as_uri(), width, scheme)
    end = time.monotonic() + SECONDS
    while browser.evaluate("document.readyState + location.protocol") != "completefile:":
        if time.monotonic() > end:
            raise RuntimeError(f"{page} is not loaded after {SECONDS:g} s")
        time.sleep(0.02)


def look_at(browser: Browser, width_alone: bool, *, keyboard: bool) -> list[str]:
    """What is wrong with the open page, each problem once."""
    found: list[str] = browser.evaluate(OVERFLOW)
    return found if width_alone else [*dict.fromkeys([*found, *browser.reading_problems(keyboard=keyboard)])]


def search_problems(browser: Browser, site: Path) -> list[str]:
    """The search works from a file: what is typed finds its page."""
    open_page(browser, site / "layer/norm.html", WIDTHS[0], SCHEMES[0])
    browser.evaluate("document.getElementById('the-search').focus()")
    browser.type("latent attention")
    found = browser.evaluate("[...document.querySelectorAll('#the-found a')].map((one) => one.getAttribute('href'))")
    return [] if "../layer/latent_attention.html" in found else [f"the search for latent attention finds {found}"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.book_page", description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args(arguments)
    if options.chromium is None:
        parser.error("Chromium is not there; name it with --chromium")
    problems, looked = 0, 0
    with tempfile.TemporaryDirectory(prefix="book-page-") as profile:
        browser = Browser(options.chromium, Path(profile))
        try:
            views = [
                (one, width, scheme) for one in sample_pages(options.site) for width in WIDTHS for scheme in SCHEMES
            ]
            whole = [(one, WIDTHS[0], SCHEMES[0]) for one in sorted(options.site.rglob("*.html"))]
            for page, width, scheme in whole if options.all else views:
                open_page(browser, page, width, scheme)
                found = look_at(browser, options.all, keyboard=(width, scheme) == (WIDTHS[0], SCHEMES[0]))
                looked, problems = looked + 1, problems + len(found)
                for one in found:
                    print(f"{page.relative_to(options.site)} {width} {scheme}: {one}")
                if options.screenshots:
                    options.screenshots.mkdir(parents=True, exist_ok=True)
                    browser.screenshot(options.screenshots / f"{page.parent.name}-{page.stem}-{width}-{scheme}.png")
            found = search_problems(browser, options.site)
            problems += len(found)
            print(*found, sep="\n", end="\n" if found else "")
        finally:
            browser.close()
    print(f"{looked} views, {problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
