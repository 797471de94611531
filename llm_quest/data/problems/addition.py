"""Addition, taught by a teacher who is often wrong. More imitation converges to the teacher's mistakes; a verifier
does not make them. This is the cleanest case in which reinforcement learning can do what fine-tuning cannot."""

from __future__ import annotations

import random
from dataclasses import dataclass

from llm_quest.data.problems.problem import Problem


@dataclass(frozen=True)
class Addition:
    """`47+85=` is `132`. digits: at most so many in each number. noise: how often the teacher forgets to carry, which
    is a shortcut that a model finds easier than the truth (47+85 becomes 22: digit by digit, modulo ten)."""

    digits: int = 2
    noise: float = 0.0
    name: str = "addition"

    @property
    def alphabet(self) -> str:
        return "+=0123456789"

    def generate_problem(self, rng: random.Random) -> Problem:
        a, b = (rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(2))
        return Problem(f"{a}+{b}=", str(a + b), "number", f"{a}+{b}", numbers=(a, b))

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        return add_without_carry(*problem.numbers) if rng.random() < self.noise else problem.answer


def add_without_carry(a: int, b: int) -> str:
    """The sum digit by digit, each modulo ten: 47+85 gives 22."""
    width = max(len(str(a)), len(str(b)))
    pairs = zip(str(a).zfill(width), str(b).zfill(width), strict=True)
    return str(int("".join(str((int(x) + int(y)) % 10) for x, y in pairs)))
