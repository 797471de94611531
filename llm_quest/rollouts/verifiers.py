"""Verifies answers: each is right, wrong or unscorable. `VERIFIERS` lists the verifiers by the name in a problem.

An answer in a wrong form is wrong. One that the *verifier* cannot judge (a gold answer that does not parse, an optional
package that failed, a time-out) is unscorable: NaN, in no statistic, and counted apart. A verifier reads the whole
completion and nothing else. It does not search for something that looks like an answer, so listing every number,
answering twice or echoing the prompt earns nothing.

Verifiers are pure functions of (problem, completion text)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from llm_quest.data.problems.answer_forms import extract_answer, normalize_answer
from llm_quest.data.problems.chained import ANSWER_PREFIX, STEP_END
from llm_quest.data.problems.problem import Problem
from llm_quest.rollouts.expression import MAX_NUMBER_DIGITS, MalformedExpression, evaluate_expression

CORRECT, INCORRECT, UNSCORABLE = 1.0, 0.0, math.nan

Verifier = Callable[[Problem, str], float]

NUMBER_PATTERN = re.compile(r"-?(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*)(?:\.[0-9]+)?", re.ASCII)
FRACTION_PATTERN = re.compile(r"(-?[0-9]+)/([0-9]+)", re.ASCII)
STEP_PATTERN = re.compile(r"([0-9]{1,12})([-+*])([0-9]{1,12})=([0-9]{1,12})", re.ASCII)
THINK_ANSWER_PATTERN = re.compile(r"<think>([^<>]+)</think>\s*<answer>([^<>]+)</answer>", re.ASCII)
FINAL_ANSWER_MARK = "####"
MAX_COMPLETION_CHARACTERS = 100_000


def verify_answer(problem: Problem, text: str) -> float:
    """CORRECT, INCORRECT or UNSCORABLE. Where the problem has an answer form, the verifier reads only the answer that
    has it."""
    if len(text) > MAX_COMPLETION_CHARACTERS:
        return INCORRECT
    if problem.answer_form:
        answer = extract_answer(problem.answer_form, problem.grading, text)
        return INCORRECT if answer is None else VERIFIERS[problem.verifier](problem, answer)
    return VERIFIERS[problem.verifier](problem, text)


def parse_number(text: str) -> Fraction | None:
    """A number as people write it: 72, -3, 1,250, 0.5. None for anything else: signs in a row, 1e9, 0x10, 1_000, 007,
    digits of other alphabets, more than 12 digits."""
    text = text.strip(" \t\n")
    if not NUMBER_PATTERN.fullmatch(text) or sum(sign.isdigit() for sign in text) > MAX_NUMBER_DIGITS:
        return None
    return Fraction(text.replace(",", ""))


def parse_fraction(text: str) -> Fraction | None:
    """A number, or one whole number over another."""
    found = FRACTION_PATTERN.fullmatch(text.strip(" \t\n"))
    if found is None:
        return parse_number(text)
    above, below = parse_number(found[1]), parse_number(found[2])
    return None if above is None or not below else above / below


def compare_values(value: Fraction | None, gold: Fraction | None) -> float:
    return UNSCORABLE if gold is None else CORRECT if value == gold else INCORRECT


def verify_exact(problem: Problem, text: str) -> float:
    """The answer itself, but for space around it."""
    return CORRECT if text.strip(" \t\n") == problem.answer else INCORRECT


def verify_equal(problem: Problem, text: str) -> float:
    """The answer of a row: the same number, or the same text (graded tolerantly: but for what `normalize_answer`
    takes away). UNSCORABLE where the row has none."""
    gold = problem.answer
    if not gold:
        return UNSCORABLE
    if problem.grading == "tolerant":
        text, gold = normalize_answer(text), normalize_answer(gold)
    value, wanted = parse_fraction(text), parse_fraction(gold)
    return CORRECT if text.strip(" \t\n") == gold or (wanted is not None and value == wanted) else INCORRECT


def verify_number(problem: Problem, text: str) -> float:
    """A number equal to the answer."""
    return compare_values(parse_number(text), parse_number(problem.answer))


def verify_fraction(problem: Problem, text: str) -> float:
    """A fraction or number equal to the answer."""
    return compare_values(parse_fraction(text), parse_fraction(problem.answer))


def verify_expression(problem: Problem, text: str) -> float:
    """An expression that comes to the answer and uses the problem's numbers, each exactly once."""
    gold = parse_number(problem.answer)
    try:
        worked = evaluate_expression(text)
    except MalformedExpression:
        return compare_values(None, gold)
    if Counter(worked.numbers) != Counter(problem.numbers):
        return compare_values(None, gold)
    return compare_values(worked.value, gold)


def verify_chained(problem: Problem, text: str) -> float:
    """Well-formed steps, then `#` and the right number; the steps themselves are not judged (see `verify_steps`)."""
    *steps, last = text.strip(" \t\n").split(STEP_END)
    if not last.startswith(ANSWER_PREFIX) or not all(STEP_PATTERN.fullmatch(step) for step in steps):
        return compare_values(None, parse_number(problem.answer))
    return compare_values(parse_number(last[len(ANSWER_PREFIX) :]), parse_number(problem.answer))


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


def verify_marked(problem: Problem, text: str) -> float:
    """Something, exactly one `#`, and after it the right number and nothing else; what stands before is not judged."""
    before, _, after = text.partition(ANSWER_PREFIX)
    return compare_values(parse_number(after) if before.strip(" \t\n") else None, parse_number(problem.answer))


def verify_gsm8k(problem: Problem, text: str) -> float:
    """Exactly one `####`, and after it the number and nothing else."""
    gold = parse_number(problem.answer)
    if text.count(FINAL_ANSWER_MARK) != 1:
        return compare_values(None, gold)
    return compare_values(parse_number(text.partition(FINAL_ANSWER_MARK)[2].strip(" \t\n$")), gold)


def verify_tagged(problem: Problem, text: str) -> float:
    """`<think>...</think><answer>...</answer>`, both non-empty, nothing around them, no tag inside; the answer a number
    or fraction."""
    found = THINK_ANSWER_PATTERN.fullmatch(text.strip(" \t\n"))
    return compare_values(
        parse_fraction(found[2]) if found and found[1].strip() else None, parse_fraction(problem.answer)
    )


VERIFIERS: dict[str, Verifier] = {
    "exact": verify_exact,
    "number": verify_number,
    "fraction": verify_fraction,
    "expression": verify_expression,
    "chained": verify_chained,
    "marked": verify_marked,
    "gsm8k": verify_gsm8k,
    "tagged": verify_tagged,
    "equal": verify_equal,
}


def is_well_formed(problem: Problem, text: str) -> bool:
    """Whether the completion has the form of an answer, whatever its value (for a format reward)."""
    if problem.answer_form:
        answer = extract_answer(problem.answer_form, problem.grading, text)
        return answer is not None and FORMAT_CHECKS[problem.verifier](answer)
    return FORMAT_CHECKS[problem.verifier](text.strip(" \t\n"))


def is_expression(text: str) -> bool:
    try:
        evaluate_expression(text)
    except MalformedExpression:
        return False
    return True


def is_chained_answer(text: str) -> bool:
    *steps, last = text.split(STEP_END)
    answered = last.startswith(ANSWER_PREFIX) and parse_number(last[len(ANSWER_PREFIX) :]) is not None
    return answered and all(STEP_PATTERN.fullmatch(step) for step in steps)


FORMAT_CHECKS: dict[str, Callable[[str], bool]] = {
    "exact": lambda text: bool(text) and text.isalnum(),
    "number": lambda text: parse_number(text) is not None,
    "fraction": lambda text: parse_fraction(text) is not None,
    "expression": is_expression,
    "chained": is_chained_answer,
    "marked": lambda text: text.find(ANSWER_PREFIX) > 0 and parse_number(text.partition(ANSWER_PREFIX)[2]) is not None,
    "gsm8k": lambda text: (
        text.count(FINAL_ANSWER_MARK) == 1
        and parse_number(text.partition(FINAL_ANSWER_MARK)[2].strip(" \t\n$")) is not None
    ),
    "tagged": lambda text: THINK_ANSWER_PATTERN.fullmatch(text) is not None,
    "equal": bool,
}


def count_outcomes(scores: Sequence[float]) -> dict[str, int]:
    """The numbers of right, wrong and unscorable answers."""
    right = sum(verdict == CORRECT for verdict in scores)
    unscorable = sum(math.isnan(verdict) for verdict in scores)
    return {"right": right, "wrong": len(scores) - right - unscorable, "unscorable": unscorable}
