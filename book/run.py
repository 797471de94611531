"""Runs what the chapters print: commands in a folder of their own, Python in one namespace. A command that fails ends
the build with what it printed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

from book.markdown import color_code, output_block

MAX_LINES = 40


class ExampleError(RuntimeError):
    """An example of the book that does not run."""


class Examples:
    """The examples of one chapter. folder: where they run; name: of the chapter, for errors."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.variables: dict[str, Any] = {"__name__": "__book__"}

    def quest(self, words: str, body: str) -> str:
        """Commands and what they print. words: `head=N` shows the first lines, `tail=N` the last, `quiet` nothing."""
        shown = []
        for line in body.strip().splitlines():
            shown.append(color_code(f"$ {line}", "console"))
            printed = select_lines(self.run_command(line), words)
            shown += [output_block(printed)] if printed else []
        return '<div class="example">' + "".join(shown) + "</div>"

    def run_command(self, line: str) -> str:
        program, *arguments = shlex.split(line, comments=True)
        if program != "quest":
            raise ExampleError(f"{self.name}: a command begins with quest: {line}")
        from typer.testing import CliRunner

        from llm_quest.cli.main import app

        with contextlib.chdir(self.folder):
            result = CliRunner().invoke(app, arguments)
        if result.exit_code != 0:
            raise ExampleError(
                f"{self.name}: {line}\nended with {result.exit_code}:\n{result.output}{result.exception}"
            )
        return clean(result.stdout)

    def python(self, words: str, body: str) -> str:
        """Code, and what it prints."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
                exec(compile(body, f"<{self.name}>", "exec"), self.variables)
        except Exception as error:
            raise ExampleError(f"{self.name}: {type(error).__name__}: {error}, in\n{body}") from error
        text = select_lines(clean(printed.getvalue()), words)
        return '<div class="example">' + color_code(body, "python") + (output_block(text) if text else "") + "</div>"


def clean(text: str) -> str:
    """Without terminal colors."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def select_lines(text: str, words: str) -> str:
    """The lines that are shown; left out ones are marked."""
    options = dict(one.partition("=")[::2] for one in words.split())
    lines = text.rstrip().splitlines()
    if "quiet" in options:
        return ""
    if "tail" in options and len(lines) > int(options["tail"]):
        return "\n".join(["...", *lines[-int(options["tail"]) :]])
    limit = int(options.get("head", MAX_LINES))
    return "\n".join([*lines[:limit], "..."] if len(lines) > limit else lines)


@contextlib.contextmanager
def example_environment() -> Any:
    """A temporary folder for what examples write, its cache in it, and no network."""
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="llm-quest-book-") as folder:
        os.environ |= {"LLM_QUEST_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(kept)
