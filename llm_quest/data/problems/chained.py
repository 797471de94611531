"""Chained arithmetic modulo a prime, with a scratchpad whose every step a program can check: outcome against process
supervision, and a knob for difficulty (the length of the chain)."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_quest.data.problems.problem import Problem

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
STEP_END, ANSWER_PREFIX = ";", "#"


@dataclass(frozen=True)
class Chained:
    """`3*4+5%7:` is worked from left to right: `3*4=5;5+5=3;#3`. shortest, longest: operations in the chain. largest:
    of the numbers in it, 0: any below the modulus. noise: how often the teacher gets a step wrong, and goes on from
    there."""

    shortest: int = 2
    longest: int = 5
    modulus: int = 11
    largest: int = 0
    noise: float = 0.0
    name: str = "chained"

    @property
    def alphabet(self) -> str:
        return "0123456789+-*%:=;#"

    def generate_problem(self, rng: random.Random) -> Problem:
        length = rng.randint(self.shortest, self.longest)
        top = self.largest + 1 if self.largest else self.modulus
        first = rng.randrange(1 if self.largest else 0, top)
        chain = [(rng.choice("+-*"), rng.randrange(1, top)) for _ in range(length)]
        text = f"{first}" + "".join(f"{sign}{number}" for sign, number in chain)
        steps = solve_chain(first, chain, self.modulus)
        answer = steps[-1].rpartition("=")[2]
        return Problem(
            f"{text}%{self.modulus}:", answer, "chained", f"{text}%{self.modulus}", (self.modulus,), tuple(steps)
        )

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        steps, value = [], problem.steps[0][: count_leading_digits(problem.steps[0])]
        for right in problem.steps:
            left = right.partition("=")[0]
            sign, number = parse_operation(left[count_leading_digits(left) :])
            result = OPERATIONS[sign](int(value), number) % self.modulus
            if rng.random() < self.noise:
                result = (result + rng.randrange(1, self.modulus)) % self.modulus
            steps.append(f"{value}{sign}{number}={result}")
            value = str(result)
        return "".join(f"{step}{STEP_END}" for step in steps) + f"{ANSWER_PREFIX}{value}"


def solve_chain(first: int, chain: Sequence[tuple[str, int]], modulus: int) -> list[str]:
    """The right steps: `3*4=5`, `5+5=3`."""
    steps, value = [], first
    for sign, number in chain:
        result = OPERATIONS[sign](value, number) % modulus
        steps.append(f"{value}{sign}{number}={result}")
        value = result
    return steps


def count_leading_digits(text: str) -> int:
    return len(text) - len(text.lstrip("0123456789"))


def parse_operation(text: str) -> tuple[str, int]:
    """`*4` as its sign and its number."""
    return text[0], int(text[1:])
