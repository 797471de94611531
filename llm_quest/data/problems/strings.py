"""Reverse and sort a word: fast tasks for tests, with one right answer."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from llm_quest.data.problems.problem import Problem


@dataclass(frozen=True)
class Reverse:
    """`reverse(abc)=` is `cba`. shortest, longest: letters of the word; letters: how many different ones. noise: how
    often the teacher copies the word as it stands."""

    shortest: int = 3
    longest: int = 8
    letters: int = 10
    noise: float = 0.0
    name: str = "reverse"

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*self.name, *"()=", *string.ascii_lowercase[: self.letters]}))

    def generate_problem(self, rng: random.Random) -> Problem:
        word = random_word(rng, self.shortest, self.longest, self.letters)
        return Problem(f"{self.name}({word})=", word[::-1], "exact", word)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        return problem.answer[::-1] if self.noise and rng.random() < self.noise else problem.answer


@dataclass(frozen=True)
class Sort:
    """`sort(bca)=` is `abc`."""

    shortest: int = 3
    longest: int = 8
    letters: int = 10
    name: str = "sort"

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*self.name, *"()=", *string.ascii_lowercase[: self.letters]}))

    def generate_problem(self, rng: random.Random) -> Problem:
        word = random_word(rng, self.shortest, self.longest, self.letters)
        return Problem(f"{self.name}({word})=", "".join(sorted(word)), "exact", word)

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        return problem.answer


def random_word(rng: random.Random, shortest: int, longest: int, letters: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase[:letters], k=rng.randint(shortest, longest)))
