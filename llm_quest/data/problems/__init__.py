"""Problems whose answers a program can check. A task is a pure function: the same seed and index give the same problem
on every machine, and which split a problem belongs to is decided by its content.

`TASKS` lists them by the names recipes use. A new task is its file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llm_quest.data.problems.addition import Addition
from llm_quest.data.problems.chained import Chained
from llm_quest.data.problems.countdown import Countdown
from llm_quest.data.problems.problem import (
    SPLIT_NAMES,
    Problem,
    SplitName,
    Task,
    TaskSplit,
    draw_problem,
    teacher_demonstration,
)
from llm_quest.data.problems.registers import Registers
from llm_quest.data.problems.strings import Reverse, Sort
from llm_quest.errors import UsageError
from llm_quest.files import parse_digits

__all__ = [
    "SPLIT_NAMES",
    "TASKS",
    "Problem",
    "SplitName",
    "Task",
    "TaskSplit",
    "draw_problem",
    "parse_task",
    "teacher_demonstration",
]

TASKS: dict[str, Any] = {
    "reverse": Reverse,
    "sort": Sort,
    "addition": Addition,
    "chained": Chained,
    "countdown": Countdown,
    "registers": Registers,
}


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of this name, with its options. UsageError for a name or an option that does not exist."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"no task is called {name!r}{hint}; known: {', '.join(TASKS)}, gsm8k, or a file of it (*.jsonl)"
        )
    known = {field.name for field in fields(TASKS[name])}
    if unknown := set(options or {}) - known:
        raise UsageError(
            f"the task {name} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
        )
    task: Task = TASKS[name](**(options or {}))
    return task


def parse_task(text: str) -> Task:
    """Parse a task: its name, with options after a colon (countdown:count=4,largest=9)."""
    name, _, options = text.partition(":")
    return make_task(name, dict(parse_option(pair) for pair in options.split(",") if pair))


def parse_option(pair: str) -> tuple[str, int | float]:
    """Parse `count=4` into name and value."""
    name, equals, value = pair.partition("=")
    if not equals:
        raise UsageError(f"{pair!r} is no option; write name=value, like countdown:count=4")
    try:
        return name, float(value) if (number := parse_digits(value)) is None else number
    except ValueError:
        raise UsageError(f"{pair!r}: a task's options are numbers") from None
