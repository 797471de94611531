"""`quest book` and `quest learn`: build and open the book of a clone, and run its exercises."""

from __future__ import annotations

import importlib.util
import sys
import webbrowser
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import MissingError, UsageError

CHECKOUT = Path(__file__).resolve().parents[2]
NEEDED = ("markdown_it", "mdit_py_plugins", "pygments", "latex2mathml")


def open_book(folder: Path, *, renew: bool, browser: bool, log: LogFn) -> str:
    """Build the site unless the folder has it, and show it. Returns the address of its first page."""
    first = folder / "index.html"
    if renew or not first.is_file():
        build_book(folder, log)
    address = first.resolve().as_uri()
    if browser:
        webbrowser.open(address)
    return address


def run_lesson(action: str | None, name: str | None, folder: Path, log: LogFn) -> tuple[bool, list[str]]:
    """List, begin or check exercises and games. Returns whether the answer is right, and the lines to print."""
    learn = import_from_checkout("book.learn")
    if action is None:
        return True, list(learn.overview(folder))
    if action == "break":
        return True, list(learn.begin_game(folder, name or "next", log))
    if action == "check":
        if name is None:
            raise UsageError("name what to check: quest learn check NAME")
        right, lines = learn.check(folder, name)
        return bool(right), list(lines)
    return True, list(learn.begin(folder, action))


def import_from_checkout(module: str) -> Any:
    """Import a module of the book, which is beside the package in a clone. UsageError without a clone."""
    if not (CHECKOUT / "book" / "chapters").is_dir():
        raise UsageError(
            "the book and its exercises come with a clone of LLM Quest: git clone it, then make install-test"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(module)


def build_book(folder: Path, log: LogFn) -> None:
    """Build the site into a folder. UsageError without a checkout, or where the folder holds other files."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"the book needs {', '.join(missing)}: pip install 'llm-quest[book]'")
    site = import_from_checkout("book.site")
    try:
        site.build_site(folder, log=log)
    except site.BookError as error:
        raise UsageError(str(error)) from None
