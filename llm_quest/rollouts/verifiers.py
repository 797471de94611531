"""Verifies answers: each is right, wrong or unscorable. `VERIFIERS` lists the verifiers by the name in a problem.

An answer in a wrong form is wrong. One that the *verifier* cannot judge (a gold answer that does not parse, an optional
package that failed, a time-out) is unscorable: NaN, in no statistic, and counted apart. A verifier reads the whole
completion and nothing else. It does not search for something that looks like an answer, so listing every number,
answering twice or echoing the prompt earns nothing.

Verifiers are pure functions of (problem, completion text)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llm_quest.data.problems.answer_forms import extract_answer, normalize_answer
from llm_quest.data.problems.chained import ANSWER_PREFIX, STEP_END
from llm_quest.data.problems.problem import Problem
from llm_quest.rollouts.expression import MAX_NUMBER_DIGITS, WHITESPACE, MalformedExpression, evaluate_expression

CORRECT, INCORRECT, UNSCORABLE = 1.0, 0.0, math.nan

NUMBER_PATTERN = re.compile(r"-?(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*)(?:\.[0-9]+)?", re.ASCII)
FRACTION_PATTERN = re.compile(r"(-?[0-9]+)/([0-9]+)", re.ASCII)
STEP_PATTERN = re.compile(r"([0-9]{1,12})([-+*])([0-9]{1,12})=([0-9]{1,12})", re.ASCII)
THINK_ANSWER_PATTERN = re.compile(r"<think>([^<>]+)</think>\s*<answer>([^<>]+)</answer>", re.ASCII)
FINAL_ANSWER_MARK = "####"
MAX_COMPLETION_CHARACTERS = 100_000


def parse_number(text: str) -> Fraction | None:
    """A number as people write it: 72, -3, 1,250, 0.5. None for anything else: signs in a row, 1e9, 0x10, 1_000, 007,
    digits of other alphabets, more than 12 digits."""
    text = text.strip(WHITESPACE)
    if not NUMBER_PATTERN.fullmatch(text) or sum(sign.isdigit() for sign in text) > MAX_NUMBER_DIGITS:
        return None
    return Fraction(text.replace(",", ""))


def parse_fraction(text: str) -> Fraction | None:
    """A number, or one whole number over another."""
    match = FRACTION_PATTERN.fullmatch(text.strip(WHITESPACE))
    if match is None:
        return parse_number(text)
    above, below = parse_number(match[1]), parse_number(match[2])
    return None if above is None or not below else above / below


def parse_word(problem: Problem, text: str) -> str | None:
    """The text; None for no text, and for other characters than letters and digits where the right answer has none."""
    return text if text and (text.isalnum() or not problem.answer.isalnum()) else None


def parse_row_answer(problem: Problem, text: str) -> Fraction | str | None:
    """A number, or else the text; graded tolerantly, as `normalize_answer` leaves it. None for no text."""
    if problem.grading == "tolerant":
        text = normalize_answer(text)
    value = parse_fraction(text)
    return text or None if value is None else value


def parse_expression(text: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """The value of an expression and its numbers, sorted: both decide whether it is right."""
    try:
        worked = evaluate_expression(text)
    except MalformedExpression:
        return None
    return worked.value, tuple(sorted(worked.numbers))


def expected_expression(problem: Problem) -> tuple[Fraction, tuple[int, ...]] | None:
    """The answer as the value, and the problem's numbers, each exactly once."""
    value = parse_number(problem.answer)
    return None if value is None else (value, tuple(sorted(problem.numbers)))


def parse_chained(text: str) -> Fraction | None:
    """The number after `#`, behind well-formed steps; the steps themselves are not judged (see `verify_steps`)."""
    *steps, last = text.split(STEP_END)
    if not last.startswith(ANSWER_PREFIX) or not all(STEP_PATTERN.fullmatch(step) for step in steps):
        return None
    return parse_number(last[len(ANSWER_PREFIX) :])


def parse_marked(text: str) -> Fraction | None:
    """The number after the only `#`, behind something that is not judged."""
    before, _, after = text.partition(ANSWER_PREFIX)
    return parse_number(after) if before else None


def parse_gsm8k(text: str) -> Fraction | None:
    """The number after the only `####`."""
    if text.count(FINAL_ANSWER_MARK) != 1:
        return None
    return parse_number(text.partition(FINAL_ANSWER_MARK)[2].strip(" \t\n$"))


def parse_tagged(text: str) -> Fraction | None:
    """The number or fraction of `<think>...</think><answer>...</answer>`, both filled, nothing around them, no tag
    inside."""
    match = THINK_ANSWER_PATTERN.fullmatch(text)
    return parse_fraction(match[2]) if match and match[1].strip() else None


@dataclass(frozen=True)
class Verifier:
    """How a completion is compared with the right answer: right if both have one canonical form.

    parse: the answer of a completion without the space around it; None where it has another form. expected: the right
    answer; None where it cannot be read."""

    parse: Callable[[Problem, str], Hashable | None]
    expected: Callable[[Problem], Hashable | None]


Parser = Callable[[str], Fraction | None]


def number_verifier(parse: Parser, parse_expected: Parser = parse_number) -> Verifier:
    """A verifier of a number that the completion alone determines."""
    return Verifier(lambda problem, text: parse(text), lambda problem: parse_expected(problem.answer))


VERIFIERS: dict[str, Verifier] = {
    "exact": Verifier(parse_word, lambda problem: problem.answer),
    "number": number_verifier(parse_number),
    "fraction": number_verifier(parse_fraction, parse_fraction),
    "expression": Verifier(lambda problem, text: parse_expression(text), expected_expression),
    "chained": number_verifier(parse_chained),
    "marked": number_verifier(parse_marked),
    "gsm8k": number_verifier(parse_gsm8k),
    "tagged": number_verifier(parse_tagged, parse_fraction),
    "equal": Verifier(parse_row_answer, lambda problem: parse_row_answer(problem, problem.answer.strip(WHITESPACE))),
}


def canonical_answer(problem: Problem, text: str) -> Hashable | None:
    """The answer of a completion in a canonical form, by which equal answers are equal; None where it has another form
    than the verifier reads. Where the problem has an answer form, only the answer that has it is read."""
    if len(text) > MAX_COMPLETION_CHARACTERS:
        return None
    if problem.answer_form:
        text = extract_answer(problem.answer_form, problem.grading, text) or ""
    return VERIFIERS[problem.verifier].parse(problem, text.strip(WHITESPACE))


def verify_answer(problem: Problem, text: str) -> float:
    """CORRECT, INCORRECT or UNSCORABLE."""
    expected = VERIFIERS[problem.verifier].expected(problem)
    if expected is None:
        return UNSCORABLE
    return CORRECT if canonical_answer(problem, text) == expected else INCORRECT


def is_well_formed(problem: Problem, text: str) -> bool:
    """Whether the completion has the form of an answer, whatever its value (for a format reward)."""
    return canonical_answer(problem, text) is not None


def verify_steps(problem: Problem, text: str) -> list[tuple[int, float]]:
    """For every step, where it ends in the text (one beyond its `;`) and whether it is the problem's own step; the
    answer is the last one. What follows a malformed step is wrong."""
    ends: list[tuple[int, float]] = []
    place, pieces = 0, text.split(STEP_END)
    for count, step in enumerate(pieces[:-1]):
        place += len(step) + len(STEP_END)
        right = count < len(problem.steps) and step == problem.steps[count]
        ends.append((place, CORRECT if right else INCORRECT))
    if pieces[-1]:
        ends.append((len(text), CORRECT if pieces[-1] == f"{ANSWER_PREFIX}{problem.answer}" else INCORRECT))
    return ends


def count_outcomes(scores: Sequence[float]) -> dict[str, int]:
    """The numbers of right, wrong and unscorable answers."""
    right = sum(verdict == CORRECT for verdict in scores)
    unscorable = sum(math.isnan(verdict) for verdict in scores)
    return {"right": right, "wrong": len(scores) - right - unscorable, "unscorable": unscorable}
