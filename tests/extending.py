"""Follows `book/extending.md` to the letter: its files and edits are made in a copy of the package, its commands run.

`python -m tests.extending` runs all of them, the suite those of `quest`, but for an experiment."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book/extending.md"
BLOCK = re.compile(r"(?:^`([\w/.]+)`\n\n)?^```(python|diff|console)\n(.*?)^```$", re.M | re.S)
COPIED = ("llm_quest", "tests", "docs/papers")
SECTIONS = [one.removeprefix("--only=") for one in sys.argv if one.startswith("--only=")]
"""`--only="A family"` runs the commands of one section."""


class RecipeError(AssertionError):
    """A step of the page that cannot be followed."""


@dataclass(frozen=True)
class Instruction:
    """kind: python (a new file), diff (an edit) or console (commands). path: of the file."""

    kind: str
    path: str
    text: str
    section: str


def read_instructions(page: Path = PAGE) -> list[Instruction]:
    """The blocks of the page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        path, kind, body = match[1] or "", match[2], match[3]
        if not path and kind != "console":
            raise RecipeError(f"a {kind} block has no path above it:\n{body[:80]}")
        section = re.findall(r"^## (.*)$", text[: match.start()], re.M)
        found.append(Instruction(kind, path, body, section[-1] if section else ""))
    return found


def copy_package(folder: Path) -> None:
    """With the bytecode of what is compiled already: it is good as long as its file is not edited."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("runs"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def apply_instruction(one: Instruction, folder: Path) -> None:
    """Make a file, or put the new lines of an edit where its known lines stand."""
    file = folder / one.path
    if one.kind == "python":
        if file.exists():
            raise RecipeError(f"{one.path} is there already")
        file.write_text(one.text, encoding="utf-8")
    elif one.kind == "diff":
        file.write_text(apply_edit(file.read_text(encoding="utf-8"), one), encoding="utf-8")


def apply_edit(text: str, one: Instruction) -> str:
    """The text of a file with an edit. Its known lines must stand there once."""
    lines = one.text.splitlines()
    known = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    wanted = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    if (places := len(re.findall(rf"^{re.escape(known)}$", text, re.M))) != 1:
        raise RecipeError(f"{one.path}: these lines stand there {places} times, once is needed:\n{known}")
    return f"\n{text}".replace(f"\n{known}\n", f"\n{wanted}\n")[1:]


def commands_of(instructions: list[Instruction]) -> Iterator[str]:
    for one in instructions:
        if one.kind == "console" and (not SECTIONS or one.section in SECTIONS):
            yield from (line.removeprefix("$ ") for line in one.text.splitlines())


def run_in_copy(folder: Path, *, quick: bool) -> subprocess.CompletedProcess[str]:
    """The commands of the page, in a process that knows the copy alone."""
    environment = dict(os.environ, PYTHONPATH=str(folder), HF_HUB_OFFLINE="1", LLM_QUEST_CACHE=str(folder / "cache"))
    command = [sys.executable, "-B", "-m", "tests.extending", "--inside"]
    command += [*(["--quick"] if quick else []), *(f"--only={one}" for one in SECTIONS)]
    shutil.copy(PAGE, folder / "extending.md")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_commands(quick: bool) -> int:
    """In the copy: `quest` in this process, `pytest` in processes of their own."""
    from typer.testing import CliRunner

    from llm_quest.cli.main import app
    from tests.rendered import render_once

    render_once()
    for line in commands_of(read_instructions(Path("extending.md"))):
        program, *arguments = shlex.split(line)
        if quick and (program == "pytest" or arguments[0] == "reproduce"):
            continue
        if program == "quest":
            result = CliRunner().invoke(app, arguments)
            code, said = result.exit_code, f"{result.output}\n{result.exception}"
        else:
            options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
            command = [sys.executable, "-B", "-m", "pytest", *arguments, *options]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            code, said = ended.returncode, ended.stdout[-2000:]
        print(f"{'ok' if code == 0 else 'FAILED'}: {line}")
        if code != 0:
            print(said)
            return 1
    return 0


def follow(folder: Path, *, quick: bool) -> subprocess.CompletedProcess[str]:
    """All steps of the page, in an empty folder."""
    copy_package(folder)
    for one in read_instructions():
        apply_instruction(one, folder)
    return run_in_copy(folder, quick=quick)


def main() -> int:
    if "--inside" in sys.argv:
        return run_commands(quick="--quick" in sys.argv)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="extending-")))
        ended = follow(folder, quick="--quick" in sys.argv)
    print(ended.stdout + ended.stderr, end="")
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
