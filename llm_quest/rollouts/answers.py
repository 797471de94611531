"""Reads the answer of a completion in a canonical form, so that a majority vote can count equal answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from fractions import Fraction

from llm_quest.data.problems.answer_forms import extract_answer, normalize_answer
from llm_quest.data.problems.chained import ANSWER_PREFIX
from llm_quest.rollouts.expression import MalformedExpression, evaluate_expression
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.verifiers import FINAL_ANSWER_MARK, THINK_ANSWER_PATTERN, parse_fraction, parse_number


def answer_value(sample: Sample) -> Hashable | None:
    """The answer of a sample; None where it has none to vote with: cut off by the length, or in another form."""
    problem, text = sample.problem, sample.text
    if sample.truncated:
        return None
    if problem.answer_form:
        text = extract_answer(problem.answer_form, problem.grading, text) or ""
    return ANSWER_VALUES[problem.verifier](text.strip(" \t\n")) if text else None


def expression_value(text: str) -> Hashable | None:
    """The value of an expression and its literals, sorted: both decide whether it is right."""
    try:
        worked = evaluate_expression(text)
    except MalformedExpression:
        return None
    return worked.value, tuple(sorted(worked.numbers))


def tagged_value(text: str) -> Fraction | None:
    found = THINK_ANSWER_PATTERN.fullmatch(text)
    return parse_fraction(found[2]) if found else None


def normal_value(text: str) -> Hashable | None:
    """A number, or else the text as `normalize_answer` leaves it."""
    plain = normalize_answer(text)
    value = parse_fraction(plain)
    return plain if value is None else value


ANSWER_VALUES: dict[str, Callable[[str], Hashable | None]] = {
    "exact": str,
    "number": parse_number,
    "fraction": parse_fraction,
    "expression": expression_value,
    "chained": lambda text: parse_number(text.rpartition(ANSWER_PREFIX)[2]),
    "marked": lambda text: parse_number(text.partition(ANSWER_PREFIX)[2]),
    "gsm8k": lambda text: parse_number(text.partition(FINAL_ANSWER_MARK)[2].strip(" \t\n$")),
    "tagged": tagged_value,
    "equal": normal_value,
}
"""Verifier -> a function that reads the answer of a stripped completion; None for no answer."""
