"""Markdown to HTML: mathematics as MathML (no script, no network), code with colors, and blocks that are made while
the book is built. A fence whose first word is a key of `BLOCKS` is such a block; its body or its words are the
arguments.

    ```code layers/norm.py:RMSNorm     the source of an anchor
    ```quest                           commands, which run; what they print is shown under them
    ```python                          code, which runs (one namespace for a chapter); what it prints is shown
    ```mistakes layers/norm.py         what is commonly got wrong
    ```breaks layers/norm.py           recorded mutations of a file: the change, and the test that fails
    ```figure NAME                     a figure of `book/figures.py`

`[[layer/norm]]` and `[[layer/norm|the norm]]` link to a page; one that does not exist is an error."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable
from typing import Any

from latex2mathml.converter import convert as mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

FORMATTER = HtmlFormatter(nowrap=True)
LINK = re.compile(r"\[\[([a-z0-9_/.-]+)(?:\|([^\]]+))?\]\]")
Block = Callable[[str, str], str]
"""(the words after the block's name, its body) -> HTML."""


def render_math(text: str, options: dict[str, Any]) -> str:
    """A formula in LaTeX as MathML."""
    return mathml(text, display="block" if options.get("display_mode") else "inline")


def color_code(text: str, language: str) -> str:
    """Code as HTML with a class for each kind of token."""
    try:
        lexer = get_lexer_by_name(language or "text", stripnl=False)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return f'<pre class="code" tabindex="0"><code>{highlight(text.rstrip(), lexer, FORMATTER)}</code></pre>'


def output_block(text: str) -> str:
    """What a command or an example printed."""
    return f'<pre class="output" tabindex="0"><samp>{html.escape(text.rstrip())}</samp></pre>'


class Renderer:
    """Renders Markdown. blocks: the fences that are made; link: a page's key -> (address, title)."""

    def __init__(self, blocks: dict[str, Block], link: Callable[[str], tuple[str, str]]):
        self.blocks, self.link = blocks, link
        self.parser = MarkdownIt("commonmark", {"html": False, "highlight": None}).enable(["table", "strikethrough"])
        self.parser.use(dollarmath_plugin, renderer=render_math, allow_space=False, allow_digits=False)
        self.parser.renderer.rules["fence"] = self.fence
        self.parser.renderer.rules["code_block"] = lambda tokens, i, *_: color_code(
            inspect.cleandoc("\n" + tokens[i].content), "text"
        )
        self.parser.renderer.rules["heading_open"] = self.heading
        self.parser.renderer.rules["text"] = self.text

    def __call__(self, text: str) -> str:
        return str(self.parser.render(text))

    def fence(self, tokens: Any, i: int, *_: Any) -> str:
        name, _, words = tokens[i].info.strip().partition(" ")
        if name in self.blocks:
            return self.blocks[name](words.strip(), tokens[i].content)
        return color_code(tokens[i].content, name)

    def heading(self, tokens: Any, i: int, *_: Any) -> str:
        """A heading with an id that links may name."""
        return f'<{tokens[i].tag} id="{slug(tokens[i + 1].content)}">'

    def text(self, tokens: Any, i: int, *_: Any) -> str:
        """Text with its [[links]]."""
        return LINK.sub(self.make_link, html.escape(tokens[i].content, quote=False))

    def make_link(self, found: re.Match[str]) -> str:
        address, title = self.link(found[1])
        return f'<a href="{html.escape(address)}">{found[2] or html.escape(title)}</a>'


def slug(text: str) -> str:
    """A heading as an id: lower case, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
