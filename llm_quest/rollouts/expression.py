"""Evaluates arithmetic that a model wrote, exactly and within bounds, and never by Python's `eval`.

      sum     = product { (+|-) product }        numbers: unsigned integers without leading zeros, at most 12 digits
      product = factor { (*|/) factor }          limits: 200 characters, brackets 20 deep
      factor  = number | ( sum )                 values: fractions, exact

Commonly got wrong: `eval` behind a filter of characters still hangs on 9**9**9**9, and glues "1" "2" to 12; sympy's
parser evaluates too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPRESSION_CHARACTERS, MAX_BRACKET_DEPTH, MAX_NUMBER_DIGITS = 200, 20, 12
UNSIGNED_NUMBER = re.compile(r"(?:0|[1-9][0-9]*)", re.ASCII)
WHITESPACE = " \t\n"


class MalformedExpression(ValueError):
    """The text is not an expression, or lies beyond the bounds."""


@dataclass(frozen=True)
class ExpressionValue:
    """The value of an arithmetic expression. value: exact. numbers: the literals, in order."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate_expression(text: str) -> ExpressionValue:
    """The value of an expression and the numbers used in it. MalformedExpression for anything else, also for a division
    by zero."""
    if len(text) > MAX_EXPRESSION_CHARACTERS:
        raise MalformedExpression(f"longer than {MAX_EXPRESSION_CHARACTERS} characters")
    if not text.isascii():
        raise MalformedExpression("signs beyond ASCII")
    reader = ExpressionParser(text)
    value = reader.parse_sum(0)
    if reader.peek():
        raise MalformedExpression(f"{reader.peek()!r} is left over at {reader.position}")
    return ExpressionValue(value, tuple(reader.numbers))


class ExpressionParser:
    """Recursive descent; every call reads at least one character or raises."""

    def __init__(self, text: str):
        self.text, self.position = text, 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        """The next character that is not space, not yet read; empty at the end."""
        while self.position < len(self.text) and self.text[self.position] in WHITESPACE:
            self.position += 1
        return self.text[self.position : self.position + 1]

    def parse_sum(self, depth: int) -> Fraction:
        value = self.parse_product(depth)
        while (sign := self.peek()) and sign in "+-":
            self.position += 1
            other = self.parse_product(depth)
            value = value + other if sign == "+" else value - other
        return value

    def parse_product(self, depth: int) -> Fraction:
        value = self.parse_factor(depth)
        while (sign := self.peek()) and sign in "*/":
            self.position += 1
            other = self.parse_factor(depth)
            if sign == "/" and other == 0:
                raise MalformedExpression("division by zero")
            value = value * other if sign == "*" else value / other
        return value

    def parse_factor(self, depth: int) -> Fraction:
        if self.peek() == "(":
            if depth == MAX_BRACKET_DEPTH:
                raise MalformedExpression(f"brackets more than {MAX_BRACKET_DEPTH} deep")
            self.position += 1
            value = self.parse_sum(depth + 1)
            if self.peek() != ")":
                raise MalformedExpression("a bracket is not closed")
            self.position += 1
            return value
        return Fraction(self.parse_number())

    def parse_number(self) -> int:
        self.peek()
        match = UNSIGNED_NUMBER.match(self.text, self.position)
        if match is None or len(match[0]) > MAX_NUMBER_DIGITS:
            raise MalformedExpression(f"no number at {self.position}")
        self.position = match.end()
        if self.text[self.position : self.position + 1].isalnum():
            raise MalformedExpression(f"no sign after the number at {self.position}")
        self.numbers.append(int(match[0]))
        return self.numbers[-1]
