"""Right, wrong, unscorable; and the list of answers that earned something somewhere and must earn nothing here
(alignment.md 8.3)."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.data.problems import Problem
from llm_quest.rollouts.verifiers import (
    VERIFIERS,
    count_outcomes,
    is_well_formed,
    parse_fraction,
    parse_number,
    verify_answer,
    verify_steps,
)
from tests.rollouts.hostile import HOSTILE

COUNTDOWN = Problem("3 7 25 make 46:", "46", "expression", "", (3, 7, 25))
CHAIN = Problem("3*4+5%7:", "3", "chained", "", (7,), ("3*4=5", "5+5=3"))
NUMBER = Problem("47+85=", "132", "number", "")
WORD = Problem("reverse(abc)=", "cba", "exact", "")
SCHOOL = Problem("How many?", "72", "gsm8k", "")
TAGS = Problem("How much?", "3/4", "tagged", "")
EVERY = {"exact": WORD, "number": NUMBER, "fraction": Problem("", "3/4", "fraction", ""), "expression": COUNTDOWN}
EVERY |= {"chained": CHAIN, "gsm8k": SCHOOL, "tagged": TAGS}
EVERY |= {"equal": Problem("How much?", "3/4", "equal", "")}
EVERY |= {"marked": (REGISTERS := Problem("a2b*3:", "6", "marked", "", (7, 2), ("a2", "b*3=6")))}


@pytest.mark.parametrize(
    ("problem", "text", "right"),
    [
        (WORD, "cba", True), (WORD, "cba\n", True), (WORD, "abc", False), (WORD, "cba cba", False),
        (NUMBER, "132", True), (NUMBER, " 132", True), (NUMBER, "132.0", True), (NUMBER, "133", False),
        (NUMBER, "-132", False), (NUMBER, "1320", False), (NUMBER, "13", False),
        (COUNTDOWN, "25+3*7", True), (COUNTDOWN, "7*3+25", True), (COUNTDOWN, "(25+(3*7))", True),
        (COUNTDOWN, "46", False), (COUNTDOWN, "25+7*3*1", False), (COUNTDOWN, "25+21", False),
        (COUNTDOWN, "7+7+7+25", False), (COUNTDOWN, "257*3", False),
        (COUNTDOWN, "25+3*7+3-3", False), (COUNTDOWN, "25+3*7=46", False),
        (CHAIN, "3*4=5;5+5=3;#3", True), (CHAIN, "#3", True), (CHAIN, "3*4=1;1+5=6;#3", True),
        (CHAIN, "3*4=5;5+5=3;#4", False), (CHAIN, "3*4=5;5+5=3", False), (CHAIN, "3*4=5;5+5=3;#3;", False),
        (REGISTERS, "a2b*3=6#6", True), (REGISTERS, "a2b*3=1#6", True), (REGISTERS, "#6", False),
        (REGISTERS, "a2b*3=6", False), (REGISTERS, "a2b*3=6#6#6", False), (REGISTERS, "a2b*3=6#61", False),
        (SCHOOL, "48/2=24\n48+24=72\n#### 72", True), (SCHOOL, "#### $72", True), (SCHOOL, "#### 72.00", True),
        (SCHOOL, "72", False), (SCHOOL, "#### 72 #### 71", False), (SCHOOL, "#### 71\n#### 72", False),
        (SCHOOL, "#### 72 apples", False),
        (TAGS, "<think>a</think><answer>3/4</answer>", True), (TAGS, "<think>a</think>\n<answer>0.75</answer>\n", True),
        (TAGS, "<think>a</think><answer>6/8</answer>", True), (TAGS, "<answer>3/4</answer>", False),
    ],
)  # fmt: skip
def test_right_and_wrong(problem: Problem, text: str, right: bool) -> None:
    assert verify_answer(problem, text) == float(right)


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_answer_is_wrong_and_nothing_else(name: str, text: str) -> None:
    assert verify_answer(EVERY[name], text) == 0.0


@pytest.mark.parametrize("name", VERIFIERS)
def test_no_hostile_answer_takes_long(name: str) -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        verify_answer(EVERY[name], text)
        return time.process_time() - start

    slowest = max(HOSTILE, key=seconds)
    assert min(seconds(slowest) for _ in range(3)) < 0.05, slowest[:40]


@pytest.mark.parametrize("name", VERIFIERS)
@given(text=st.text(max_size=200))
def test_no_text_raises(name: str, text: str) -> None:
    assert verify_answer(EVERY[name], text) in (0.0, 1.0)
    assert is_well_formed(EVERY[name], text) in (True, False)


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name not in ("exact", "equal")])
def test_a_gold_answer_that_cannot_be_read_is_unscorable_not_wrong(name: str) -> None:
    assert math.isnan(verify_answer(Problem("", "unknown", name, "", (1,), ("1+1=2",)), "#### 5"))


def test_right_answers_have_their_form() -> None:
    good = {"exact": "cba", "number": "132", "fraction": "3/4", "expression": "25+3*7", "chained": "3*4=5;5+5=3;#3"}
    good |= {"marked": "a2b*3=6#6", "gsm8k": "a\n#### 72", "tagged": "<think>a</think><answer>3/4</answer>"}
    good |= {"equal": "3/4"}
    assert set(good) == set(VERIFIERS)
    for name, text in good.items():
        assert verify_answer(EVERY[name], text) == 1.0
        assert is_well_formed(EVERY[name], text)
        assert name == "equal" or not is_well_formed(EVERY[name], "?")


ALMOST = {
    "exact": ["", "  ", "cba cba"], "number": ["", "132.", "one"], "fraction": ["3:4", "3/0", "3/4/1"],
    "expression": ["", "3+", "46=46"], "chained": ["#", "3;#3", "3*4=5;5+5=3;#3;", "3*4=5;5+5=3;3"],
    "marked": ["#6", " #6", "a#6#6", "a6"], "gsm8k": ["72", "#### 72 #### 72", "####", "#### 72 apples"],
    "tagged": [
        "<think> </think><answer>3/4</answer>", "<think>\n\t</think>\n<answer>3/4</answer>",
        "<think></think><answer>3/4</answer>", "<think>a</think><answer> </answer>", "<answer>3/4</answer>",
    ],
    "equal": ["", " \n"],
}  # fmt: skip
"""Texts that a lenient check of the form could take for an answer."""


@pytest.mark.parametrize("name", VERIFIERS)
def test_the_form_that_is_paid_for_is_the_one_that_the_verifier_reads(name: str) -> None:
    """An answer in another form is neither right nor well-formed, whatever stands where its value is looked for."""
    problem = EVERY[name]
    assert all(not is_well_formed(problem, text) for text in ALMOST[name])
    for text in [*ALMOST[name], *HOSTILE, "132" + " " * 100_000]:
        if not is_well_formed(problem, text):
            assert verify_answer(problem, text) == 0.0, text[:80]


@pytest.mark.parametrize("text", ["1,25", "12,3456", ",5", "5,", "1.", ".5", "--1", "1e3", "½", "1 000"])
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


def test_numbers_as_people_write_them() -> None:
    assert parse_number("1,250,000.50") == parse_fraction("2500001/2") == 1250000.5
    assert parse_number("-0") == 0
    assert parse_fraction("3/0") is None


def test_steps_are_judged_one_by_one_with_the_place_where_each_ends() -> None:
    assert verify_steps(CHAIN, "3*4=5;5+5=3;#3") == [(6, 1.0), (12, 1.0), (14, 1.0)]
    assert verify_steps(CHAIN, "3*4=1;5+5=3;#3") == [(6, 0.0), (12, 1.0), (14, 1.0)]
    assert verify_steps(CHAIN, "3*4=5;5+5=3;1+1=2;#3") == [(6, 1.0), (12, 1.0), (18, 0.0), (20, 1.0)]
    assert verify_steps(CHAIN, "") == []


def test_the_tally_keeps_three_outcomes_apart() -> None:
    assert count_outcomes([1.0, 0.0, math.nan, 1.0]) == {"right": 2, "wrong": 1, "unscorable": 1}


@pytest.mark.parametrize(
    ("gold", "text", "strict", "tolerant"),
    [
        ("Paris", "Paris", True, True), ("Paris", " Paris\n", True, True), ("Paris", "paris.", False, True),
        ("Paris", "The capital is Paris", False, False), ("1,250", "1250", True, True), ("3/4", "0.75", True, True),
        ("72", "So it is $72.", False, True), ("72", "72 or 71", False, False), ("72", "71, no, 72", False, True),
        ("72", "", False, False), ("", "72", None, None),
    ],
)  # fmt: skip
def test_the_answer_of_a_row_is_read_strictly_or_tolerantly(
    gold: str, text: str, strict: bool | None, tolerant: bool | None
) -> None:
    for grading, right in (("strict", strict), ("tolerant", tolerant)):
        found = verify_answer(Problem("", gold, "equal", "", answer_form="plain", grading=grading), text)
        wanted = math.nan if right is None else float(right)
        assert found == wanted or (right is None and math.isnan(found)), grading
