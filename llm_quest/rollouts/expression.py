"""Arithmetic that a model wrote, worked out exactly and within bounds. Nothing it writes is ever evaluated by Python.

      sum     = product { (+|-) product }        numbers: unsigned integers without leading zeros, at most 12 digits
      product = factor { (*|/) factor }          limits: 200 characters, brackets 20 deep
      factor  = number | ( sum )                 values: fractions, exact

Commonly got wrong: `eval` behind a filter of characters still hangs on 9**9**9**9, and glues "1" "2" to 12; sympy's
parser evaluates too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST, DEEPEST, MOST_DIGITS = 200, 20, 12
NUMBER = re.compile(r"(?:0|[1-9][0-9]*)", re.ASCII)
SPACE = " \t\n"


class Malformed(ValueError):
    """The text is not an expression, or lies beyond the bounds."""


@dataclass(frozen=True)
class Worked:
    """value: exact. numbers: the literals, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def work_out(text: str) -> Worked:
    """The value of an expression and the numbers used in it. Malformed for anything else, a division by zero
    included."""
    if len(text) > LONGEST:
        raise Malformed(f"longer than {LONGEST} characters")
    if not text.isascii():
        raise Malformed("signs beyond ASCII")
    reader = Reader(text)
    value = reader.sum(0)
    if reader.sign():
        raise Malformed(f"{reader.sign()!r} is left over at {reader.place}")
    return Worked(value, tuple(reader.numbers))


class Reader:
    """Recursive descent; every call reads at least one character or raises."""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.numbers: list[int] = []

    def sign(self) -> str:
        """The next character that is not space, not yet read; empty at the end."""
        while self.place < len(self.text) and self.text[self.place] in SPACE:
            self.place += 1
        return self.text[self.place : self.place + 1]

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (sign := self.sign()) and sign in "+-":
            self.place += 1
            other = self.product(depth)
            value = value + other if sign == "+" else value - other
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (sign := self.sign()) and sign in "*/":
            self.place += 1
            other = self.factor(depth)
            if sign == "/" and other == 0:
                raise Malformed("division by zero")
            value = value * other if sign == "*" else value / other
        return value

    def factor(self, depth: int) -> Fraction:
        if self.sign() == "(":
            if depth == DEEPEST:
                raise Malformed(f"brackets more than {DEEPEST} deep")
            self.place += 1
            value = self.sum(depth + 1)
            if self.sign() != ")":
                raise Malformed("a bracket is not closed")
            self.place += 1
            return value
        return Fraction(self.number())

    def number(self) -> int:
        self.sign()
        found = NUMBER.match(self.text, self.place)
        if found is None or len(found[0]) > MOST_DIGITS:
            raise Malformed(f"no number at {self.place}")
        self.place = found.end()
        if self.text[self.place : self.place + 1].isalnum():
            raise Malformed(f"no sign after the number at {self.place}")
        self.numbers.append(int(found[0]))
        return self.numbers[-1]
