"""The command that shows a subject at work, and what it prints: of families, techniques and recipes from the package's
tables, of the others from `book/commands.yaml`. It runs while the book is built."""

from __future__ import annotations

import functools

import yaml

from book.catalog import Subject
from book.markdown import color_code, output_block
from book.run import ExampleError, Examples
from book.source import ROOT

COMMANDS = ROOT / "book/commands.yaml"


@functools.cache
def read_commands() -> dict[str, tuple[str, str]]:
    """KIND/NAME -> (command, which lines are shown)."""
    read = yaml.safe_load(COMMANDS.read_text(encoding="utf-8"))
    return {f"{kind}/{name}": (one[0], one[1]) for kind, named in read.items() for name, one in named.items()}


def command_of(subject: Subject) -> tuple[str, str]:
    """The command of a subject, and the words that choose lines of its output: of a paper none, since its card is what
    the command writes."""
    if subject.kind == "paper":
        return f"quest reproduce {subject.name}", ""
    if subject.kind == "family":
        from llm_quest.cli.models import ALL_FAMILIES

        family = next(one for one in ALL_FAMILIES if one.name == subject.name)
        return f"quest show {family.presets[-1].name}", "from=embed head=24"
    if subject.kind == "technique":
        from llm_quest.cli.techniques import list_techniques

        entry = next(one for one in list_techniques().entries if one.name == subject.name)
        key = next((key for key in ("gradient_checkpointing", "techniques") if key in entry.command), "recipe")
        command = entry.command.replace("RECIPE", "tiny")
        return f"quest train {command} --dry-run", f"from={key} head={1 if key != 'techniques' else 3}"
    if subject.kind == "recipe":
        return f"quest train {subject.name} --dry-run", "head=8"
    return read_commands().get(subject.key, ("", ""))


def chosen_lines(text: str, words: str) -> list[str]:
    """The lines of an output that a page shows. has=WORD: those with it; from=WORD: from the first of those; head=N."""
    options = dict(one.split("=", 1) for one in words.split())
    lines = text.splitlines()
    if "has" in options:
        lines = [line for line in lines if options["has"] in line]
    if "from" in options:
        first = next((number for number, line in enumerate(lines) if options["from"] in line), len(lines))
        lines = lines[first:]
    return lines[: int(options.get("head", 12))]


def switch_section(subject: Subject, examples: Examples | None) -> str:
    """The command as HTML, with its output where examples run. One that prints nothing ends the build."""
    command, words = command_of(subject)
    if not command:
        return ""
    shown = color_code(f"$ {command}", "console")
    if examples is None or not words:
        return shown
    if not (lines := chosen_lines(examples.run_command(command), words)):
        raise ExampleError(f"{subject.key}: {command} prints no line with {words}")
    return f'<div class="example">{shown}{output_block(chr(10).join(lines))}</div>'
