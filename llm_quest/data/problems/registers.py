"""Registers: each is computed from the one before. A letter says where each step is, so that a small model finds it;
a single pass cannot compute the last one, which takes all of them, one after another."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from llm_quest.data.problems.chained import ANSWER_PREFIX, OPERATIONS
from llm_quest.data.problems.problem import Problem
from llm_quest.errors import UsageError


@dataclass(frozen=True)
class Registers:
    """`a3b*2c+1:` (a holds 3, b is a*2, c is b+1, modulo 7) is worked as `a3b*2=6c+1=0#0`. shortest, longest:
    operations; largest: of their numbers; noise: how often the teacher gets a step wrong, and goes on from there."""

    shortest: int = 1
    longest: int = 5
    modulus: int = 7
    largest: int = 3
    noise: float = 0.0
    name: str = "registers"

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest < len(string.ascii_lowercase):
            raise UsageError(
                f"registers: {self.shortest} to {self.longest} operations; give 1 to {len(string.ascii_lowercase) - 1}"
            )

    @property
    def alphabet(self) -> str:
        return "0123456789+-*:=" + ANSWER_PREFIX + string.ascii_lowercase[: self.longest + 1]

    def generate_problem(self, rng: random.Random) -> Problem:
        first = rng.randint(1, self.largest)
        chain = [
            (rng.choice("+-*"), rng.randint(1, self.largest)) for _ in range(rng.randint(self.shortest, self.longest))
        ]
        letters = string.ascii_lowercase[1:]
        text = f"a{first}" + "".join(f"{name}{sign}{n}" for name, (sign, n) in zip(letters, chain, strict=False))
        values = [first % self.modulus]
        for sign, n in chain:
            values.append(OPERATIONS[sign](values[-1], n) % self.modulus)
        steps = tuple(
            f"{name}{sign}{n}={value}" for name, (sign, n), value in zip(letters, chain, values[1:], strict=False)
        )
        return Problem(f"{text}:", str(values[-1]), "marked", text, (self.modulus, first), (f"a{first}", *steps))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        completion = problem.steps[0]
        value = int(completion[1:])
        for name, (sign, n) in parse_assignments(problem.prompt):
            value = OPERATIONS[sign](value, n) % self.modulus
            if rng.random() < self.noise:
                value = (value + rng.randrange(1, self.modulus)) % self.modulus
            completion += f"{name}{sign}{n}={value}"
        return f"{completion}{ANSWER_PREFIX}{value}"


def parse_assignments(prompt: str) -> list[tuple[str, tuple[str, int]]]:
    """`a3b*2c+10:` as `b`, (`*`, 2) and `c`, (`+`, 10)."""
    names = [place for place, sign in enumerate(prompt) if sign.isalpha()][1:]
    ends = [*names[1:], len(prompt) - 1]
    return [(prompt[at], (prompt[at + 1], int(prompt[at + 2 : end]))) for at, end in zip(names, ends, strict=True)]
