"""Countdown: make the target from the numbers. Many expressions are right and the check is trivial, so a policy that
imitates random solutions can be sharpened by rewards alone (TinyZero, GRPO-Zero)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction

from llm_quest.data.problems.problem import Problem


@dataclass(frozen=True)
class Countdown:
    """`3 7 25 make 46:` is `25+3*7`: every number once, with + - * / and brackets. count: how many numbers; largest:
    the largest of them; top: the largest target."""

    count: int = 3
    largest: int = 20
    top: int = 99
    name: str = "countdown"

    @property
    def alphabet(self) -> str:
        return "0123456789+-*/() :" + "make"

    def generate_problem(self, rng: random.Random) -> Problem:
        while True:
            numbers = tuple(rng.randint(1, self.largest) for _ in range(self.count))
            expression = random_expression([(Fraction(number), str(number)) for number in numbers], rng)
            if expression is not None and expression[0].denominator == 1 and 1 <= expression[0] <= self.top:
                target = int(expression[0])
                listed = " ".join(map(str, numbers))
                key = " ".join(map(str, sorted(numbers))) + f" -> {target}"
                return Problem(f"{listed} make {target}:", str(target), "expression", key, numbers)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        """A solution found by trying at random: any of the right ones, not the shortest."""
        while True:
            expression = random_expression([(Fraction(number), str(number)) for number in problem.numbers], rng)
            if expression is not None and expression[0] == int(problem.answer):
                return (
                    expression[1].removeprefix("(").removesuffix(")") if is_bracketed(expression[1]) else expression[1]
                )


def random_expression(parts: list[tuple[Fraction, str]], rng: random.Random) -> tuple[Fraction, str] | None:
    """All parts joined by random operations in a random order, with brackets where a reader needs them; None if that
    divides by zero."""
    parts = list(parts)
    while len(parts) > 1:
        (a, left), (b, right) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice("+-*/")
        if sign == "/" and b == 0:
            return None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]
        last = not parts
        text = f"{left}{sign}{right}"
        parts.append((value, text if last else f"({text})"))
    return parts[0]


def is_bracketed(text: str) -> bool:
    """Is the whole text one pair of brackets?"""
    if not (text.startswith("(") and text.endswith(")")):
        return False
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if depth == 0 and place < len(text) - 1:
            return False
    return True
