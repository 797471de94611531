"""The parser against Python's own arithmetic on random expressions, and against everything that is no expression."""

from __future__ import annotations

import contextlib
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.rollouts.expression import MalformedExpression, evaluate_expression


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, (7,)),
        ("2+3*4", 14, (2, 3, 4)),
        ("(2+3)*4", 20, (2, 3, 4)),
        ("8-3-2", 3, (8, 3, 2)),
        ("8/4/2", 1, (8, 4, 2)),
        ("1/3+1/6", Fraction(1, 2), (1, 3, 1, 6)),
        (" ( 1 +\t2 ) \n", 3, (1, 2)),
        ("1 2 + 3".replace(" 2", "2"), 15, (12, 3)),
        ("999999999999*999999999999", 999999999999**2, (999999999999,) * 2),
    ],
)
def test_an_expression_is_worked_out_exactly(text: str, value: Fraction, numbers: tuple[int, ...]) -> None:
    worked = evaluate_expression(text)
    assert (worked.value, worked.numbers) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "(", ")", "(1", "1)", "1+", "+1", "-1", "+-+-1", "1++2", "1 2", "1(2)", "(1)(2)", "(1)2",
        "9**9**9**9", "2^3", "5//2", "7%3", "1/0", "1/(2-2)", "1e999", "nan", "inf", "0x10", "1_000", "007", "00",
        "1.5", "1,000", "1234567890123", "9" * 10**5, "(" * 10**6, "(" * 21 + "1" + ")" * 21,
        "１", "²", "1\u200b+2", "1\u00a0+ 2", "__import__('os')", "a", "1a", "lambda: 0", "1;2", "1=1", "[1]",
        "1" + "+1" * 200,
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(MalformedExpression):
        evaluate_expression(text)


def random_expression(chance: random.Random, depth: int) -> str:
    if depth == 0 or chance.random() < 0.3:
        return str(chance.randrange(30))
    left, right = random_expression(chance, depth - 1), random_expression(chance, depth - 1)
    text = f"{left}{chance.choice('+-*/')}{right}"
    return f"({text})" if chance.random() < 0.7 else text


@given(st.integers(0, 2**32))
def test_random_expressions_come_to_what_python_says(seed: int) -> None:
    text = random_expression(random.Random(seed), 3)
    try:
        expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})  # our own text, in a test
    except ZeroDivisionError:
        with pytest.raises(MalformedExpression):
            evaluate_expression(text)
        return
    assert evaluate_expression(text).value == expected
    assert list(evaluate_expression(text).numbers) == [int(number) for number in re.findall(r"\d+", text)]


@given(st.text(max_size=300) | st.text(alphabet="0123456789+-*/() ", max_size=300))
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(MalformedExpression):
        evaluate_expression(text)
