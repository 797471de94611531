"""`quest book`: builds the site of the book from the checkout, and opens it."""

from __future__ import annotations

import importlib.util
import sys
import webbrowser
from pathlib import Path

from llm_quest.contracts import LogFn
from llm_quest.errors import MissingError, UsageError

CHECKOUT = Path(__file__).resolve().parents[2]
NEEDED = ("markdown_it", "mdit_py_plugins", "pygments", "latex2mathml")


def open_book(folder: Path, *, renew: bool, browser: bool, log: LogFn) -> str:
    """Build the site unless the folder has it, and show it. Returns the address of its first page."""
    first = folder / "index.html"
    if renew or not first.is_file():
        build(folder, log)
    address = first.resolve().as_uri()
    if browser:
        webbrowser.open(address)
    return address


def build(folder: Path, log: LogFn) -> None:
    """Build the site into a folder. UsageError without a checkout, or where the folder holds other files."""
    if not (CHECKOUT / "book" / "chapters").is_dir():
        raise UsageError("the book is built from a clone of LLM Quest: git clone it, then `make book`")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"the book needs {', '.join(missing)}: pip install 'llm-quest[book]'")
    sys.path.insert(0, str(CHECKOUT))
    site = importlib.import_module("book.site")
    try:
        site.build_site(folder, log=log)
    except site.BookError as error:
        raise UsageError(str(error)) from None
