"""Is an answer right? Three outcomes: right, wrong, unscorable. `CHECKS` lists the verifiers by the name that a problem
carries.

What the model got wrong in form is wrong; what the *verifier* cannot judge (a gold answer that does not parse, an
optional package that failed, a time-out) is unscorable: NaN, kept out of the statistics, counted apart. A verifier
reads the completion alone, the whole of it, to the letter: no search for something that looks like an answer, so that
listing every number, answering twice or echoing the prompt earns nothing.

Verifiers are pure functions of (problem, completion text)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from llm_quest.data.problems.chained import ANSWER, STEP_END
from llm_quest.data.problems.problem import Problem
from llm_quest.rollouts.expression import MOST_DIGITS, Malformed, work_out

RIGHT, WRONG, UNSCORABLE = 1.0, 0.0, math.nan

Check = Callable[[Problem, str], float]

SIGNED = re.compile(r"-?(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*)(?:\.[0-9]+)?", re.ASCII)
RATIO = re.compile(r"(-?[0-9]+)/([0-9]+)", re.ASCII)
STEP = re.compile(r"([0-9]{1,12})([-+*])([0-9]{1,12})=([0-9]{1,12})", re.ASCII)
TAGGED = re.compile(r"<think>([^<>]+)</think>\s*<answer>([^<>]+)</answer>", re.ASCII)
MARK = "####"
LONGEST_ANSWER = 100_000


def verify(problem: Problem, text: str) -> float:
    """RIGHT, WRONG or UNSCORABLE."""
    if len(text) > LONGEST_ANSWER:
        return WRONG
    return CHECKS[problem.check](problem, text)


def number(text: str) -> Fraction | None:
    """A number as people write it: 72, -3, 1,250, 0.5. None for anything else: signs in a row, 1e9, 0x10, 1_000, 007,
    digits of other alphabets, more than 12 digits."""
    text = text.strip(" \t\n")
    if not SIGNED.fullmatch(text) or sum(sign.isdigit() for sign in text) > MOST_DIGITS:
        return None
    return Fraction(text.replace(",", ""))


def fraction(text: str) -> Fraction | None:
    """A number, or one whole number over another."""
    found = RATIO.fullmatch(text.strip(" \t\n"))
    if found is None:
        return number(text)
    above, below = number(found[1]), number(found[2])
    return None if above is None or not below else above / below


def judged(found: Fraction | None, gold: Fraction | None) -> float:
    return UNSCORABLE if gold is None else RIGHT if found == gold else WRONG


def exact(problem: Problem, text: str) -> float:
    """The answer itself, but for space around it."""
    return RIGHT if text.strip(" \t\n") == problem.answer else WRONG


def numeric(problem: Problem, text: str) -> float:
    """A number equal to the answer."""
    return judged(number(text), number(problem.answer))


def rational(problem: Problem, text: str) -> float:
    """A fraction or number equal to the answer."""
    return judged(fraction(text), fraction(problem.answer))


def expression(problem: Problem, text: str) -> float:
    """An expression that comes to the answer and uses the problem's numbers, each exactly once."""
    gold = number(problem.answer)
    try:
        worked = work_out(text)
    except Malformed:
        return judged(None, gold)
    if Counter(worked.numbers) != Counter(problem.numbers):
        return judged(None, gold)
    return judged(worked.value, gold)


def chained(problem: Problem, text: str) -> float:
    """Well-formed steps, then `#` and the right number; the steps themselves are not judged (see `steps_right`)."""
    *steps, last = text.strip(" \t\n").split(STEP_END)
    if not last.startswith(ANSWER) or not all(STEP.fullmatch(step) for step in steps):
        return judged(None, number(problem.answer))
    return judged(number(last[len(ANSWER) :]), number(problem.answer))


def steps_right(problem: Problem, text: str) -> list[tuple[int, float]]:
    """For every step, where it ends in the text (one beyond its `;`) and whether it is the problem's own step; the
    answer is the last one. What follows a malformed step is wrong."""
    ends: list[tuple[int, float]] = []
    place, pieces = 0, text.split(STEP_END)
    for count, step in enumerate(pieces[:-1]):
        place += len(step) + len(STEP_END)
        right = count < len(problem.steps) and step == problem.steps[count]
        ends.append((place, RIGHT if right else WRONG))
    if pieces[-1]:
        ends.append((len(text), RIGHT if pieces[-1] == f"{ANSWER}{problem.answer}" else WRONG))
    return ends


def marked(problem: Problem, text: str) -> float:
    """Something, exactly one `#`, and after it the right number and nothing else; what stands before is not judged."""
    before, _, after = text.partition(ANSWER)
    return judged(number(after) if before.strip(" \t\n") else None, number(problem.answer))


def gsm8k(problem: Problem, text: str) -> float:
    """Exactly one `####`, and after it the number and nothing else."""
    gold = number(problem.answer)
    if text.count(MARK) != 1:
        return judged(None, gold)
    return judged(number(text.partition(MARK)[2].strip(" \t\n$")), gold)


def tagged(problem: Problem, text: str) -> float:
    """`<think>...</think><answer>...</answer>`, both non-empty, nothing around them, no tag inside; the answer a number
    or fraction."""
    found = TAGGED.fullmatch(text.strip(" \t\n"))
    return judged(fraction(found[2]) if found and found[1].strip() else None, fraction(problem.answer))


CHECKS: dict[str, Check] = {
    "exact": exact,
    "number": numeric,
    "fraction": rational,
    "expression": expression,
    "chained": chained,
    "marked": marked,
    "gsm8k": gsm8k,
    "tagged": tagged,
}


def well_formed(problem: Problem, text: str) -> bool:
    """Has the completion the form of an answer, whatever its value? What a format reward pays for."""
    return FORMS[problem.check](text.strip(" \t\n"))


def worked_form(text: str) -> bool:
    try:
        work_out(text)
    except Malformed:
        return False
    return True


def chained_form(text: str) -> bool:
    *steps, last = text.split(STEP_END)
    answered = last.startswith(ANSWER) and number(last[len(ANSWER) :]) is not None
    return answered and all(STEP.fullmatch(step) for step in steps)


FORMS: dict[str, Callable[[str], bool]] = {
    "exact": lambda text: bool(text) and text.isalnum(),
    "number": lambda text: number(text) is not None,
    "fraction": lambda text: fraction(text) is not None,
    "expression": worked_form,
    "chained": chained_form,
    "marked": lambda text: text.find(ANSWER) > 0 and number(text.partition(ANSWER)[2]) is not None,
    "gsm8k": lambda text: text.count(MARK) == 1 and number(text.partition(MARK)[2].strip(" \t\n$")) is not None,
    "tagged": lambda text: TAGGED.fullmatch(text) is not None,
}


def tally(verdicts: Sequence[float]) -> dict[str, int]:
    """How many were right, wrong, unscorable."""
    right = sum(verdict == RIGHT for verdict in verdicts)
    unscorable = sum(math.isnan(verdict) for verdict in verdicts)
    return {"right": right, "wrong": len(verdicts) - right - unscorable, "unscorable": unscorable}
