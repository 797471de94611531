"""Problems, drawn as a function of (seed, split, index) alone; the hash of its content decides the split of a problem.

Commonly got wrong: item i drawn with the seed `seed + i`. Two data sets with nearby seeds then share items, and the
test set is in the training set."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llm_quest.errors import UsageError

SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")
HELD_OUT_HASH_VALUES = 26  # of 256 hash values, for validation and for test each: about a tenth
MAX_DRAW_ATTEMPTS = 10_000


@dataclass(frozen=True)
class Problem:
    """A problem. prompt: what the model reads. answer: the right answer, or the value it must have. verifier: the
    name of the verifier (`rollouts.verifiers.VERIFIERS`). key: the content that makes two problems the same.
    numbers: those that must be used (countdown). steps: right intermediate steps (chained). answer_form, grading: how
    the answer stands in the completion, and how strictly it is read (`data.problems.answer_forms`); "": the completion
    is the answer. messages: the prompt as messages, of a row; is_conversational: the row itself held messages.
    columns: all of the row, for rewards. tools: functions that may be called, as JSON schemas, for the chat
    template."""

    prompt: str
    answer: str
    verifier: str
    key: str
    numbers: tuple[int, ...] = ()
    steps: tuple[str, ...] = ()
    answer_form: str = ""
    grading: str = "strict"
    messages: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    is_conversational: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False, repr=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)


class Task(Protocol):
    """name: it is part of the key's hash. alphabet: every character that occurs. problem(chance): one problem.
    demonstrate(problem, chance): a completion a teacher would write, which need not be right."""

    @property
    def name(self) -> str: ...

    @property
    def alphabet(self) -> str: ...

    def generate_problem(self, rng: random.Random) -> Problem: ...

    def demonstrate(self, problem: Problem, rng: random.Random) -> str: ...


def draw_problem(task: Task, split: SplitName, index: int, seed: int = 0) -> Problem:
    """Problem `index` of a split."""
    for attempt in itertools.count():
        problem = task.generate_problem(make_rng("problem", task.name, seed, split, index, attempt))
        if assign_split(task, problem) == split:
            return problem
        if attempt == MAX_DRAW_ATTEMPTS:
            raise UsageError(
                f"the task {task.name} has so few different problems that none falls into the {split} split: "
                "make its options larger"
            )
    raise AssertionError("itertools.count does not end")


@dataclass(frozen=True)
class TaskSplit:
    """The problems of a split of a task: (seed, index) -> problem."""

    task: Task
    split: SplitName = "train"

    def __call__(self, seed: int, index: int) -> Problem:
        return draw_problem(self.task, self.split, index, seed)


def teacher_demonstration(task: Task, problem: Problem, index: int, seed: int = 0) -> str:
    """The teacher's completion for problem `index`."""
    return task.demonstrate(problem, make_rng("demonstration", task.name, seed, index, problem.key))


def assign_split(task: Task, problem: Problem) -> SplitName:
    """The split of a problem: its content alone decides, not the seed."""
    value = hashlib.sha256(f"{task.name}:{problem.key}".encode()).digest()[0]
    return "test" if value < HELD_OUT_HASH_VALUES else "validation" if value < 2 * HELD_OUT_HASH_VALUES else "train"


def make_rng(*key: object) -> random.Random:
    """A random generator of its own for everything that is sampled."""
    return random.Random("/".join(map(str, key)))
