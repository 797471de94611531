"""What a problem is, and how one is drawn: by content-hashed split, as a function of (seed, split, index) alone.

Commonly got wrong: item i drawn with the seed `seed + i`. Two data sets with nearby seeds then share items, and the
test set stands in the training set."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import Literal, Protocol

from llm_quest.errors import UsageError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
HELD_OUT = 26  # of 256 hash values, for validation and for test each: about a tenth
PATIENCE = 10_000


@dataclass(frozen=True)
class Problem:
    """prompt: what the model reads. answer: the right answer, or what it must come to. check: the name of the verifier
    (`rollouts.verifiers.CHECKS`). key: the content that makes two problems the same. numbers: those that must be used
    (countdown). steps: right intermediate steps (chained)."""

    prompt: str
    answer: str
    check: str
    key: str
    numbers: tuple[int, ...] = ()
    steps: tuple[str, ...] = ()


class Task(Protocol):
    """name: it is part of the key's hash. alphabet: every character that occurs. problem(chance): one problem.
    demonstrate(problem, chance): a completion a teacher would write, which need not be right."""

    @property
    def name(self) -> str: ...

    @property
    def alphabet(self) -> str: ...

    def problem(self, chance: random.Random) -> Problem: ...

    def demonstrate(self, problem: Problem, chance: random.Random) -> str: ...


def draw(task: Task, part: Part, index: int, seed: int = 0) -> Problem:
    """Problem number `index` of a split."""
    for attempt in itertools.count():
        problem = task.problem(chance("problem", task.name, seed, part, index, attempt))
        if part_of(task, problem) == part:
            return problem
        if attempt == PATIENCE:
            raise UsageError(
                f"the task {task.name} has so few different problems that none falls into the {part} split: "
                "make its options larger"
            )
    raise AssertionError("itertools.count does not end")


@dataclass(frozen=True)
class Drawn:
    """A split of a task as `rollouts.sample.Task` wants it: (seed, index) -> problem."""

    task: Task
    part: Part = "train"

    def __call__(self, seed: int, index: int) -> Problem:
        return draw(self.task, self.part, index, seed)


def demonstration(task: Task, problem: Problem, index: int, seed: int = 0) -> str:
    """The teacher's completion for problem number `index`."""
    return task.demonstrate(problem, chance("demonstration", task.name, seed, index, problem.key))


def part_of(task: Task, problem: Problem) -> Part:
    """Which split a problem belongs to: its content alone decides, not the seed."""
    value = hashlib.sha256(f"{task.name}:{problem.key}".encode()).digest()[0]
    return "test" if value < HELD_OUT else "validation" if value < 2 * HELD_OUT else "train"


def chance(*key: object) -> random.Random:
    """A generator of its own for everything that is drawn."""
    return random.Random("/".join(map(str, key)))
