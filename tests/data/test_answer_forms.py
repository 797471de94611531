r"""Where an answer is read: the boxes with their braces, the tags, the last `####`; and what is wrong in form."""

from __future__ import annotations

import pytest

from llm_quest.data.problems.answer_forms import (
    ANSWER_FORMS,
    GRADINGS,
    TASK_INSTRUCTIONS,
    extract_answer,
    gold_answer,
    normalize_answer,
)
from llm_quest.rollouts.verifiers import VERIFIERS

BOTH = [
    ("boxed", r"so \boxed{72}.", "72", "72"),
    ("boxed", r"so $\boxed{\frac{1}{2}}$", r"\frac{1}{2}", r"\frac{1}{2}"),
    ("boxed", r"\boxed{71} no, \boxed{72}", None, "72"),
    ("boxed", r"\boxed{72} apples", None, "72"),
    ("boxed", r"\boxed{72", None, None),
    ("boxed", r"\boxed{}", None, None),
    ("boxed", "72", None, None),
    ("tagged", "<think>a</think><answer>72</answer>", "72", "72"),
    ("tagged", "<think>a < b</think>\n<answer>x < 2</answer>\n", "x < 2", "x < 2"),
    ("tagged", "<answer>72</answer>", None, "72"),
    ("tagged", "<think>a</think><answer>71</answer><answer>72</answer>", None, "72"),
    ("tagged", "<think>a</think><answer>72", None, "72"),
    ("tagged", "<think> </think><answer>72</answer>", None, "72"),
    ("tagged", "ok <think>a</think><answer>72</answer>", None, "72"),
    ("hashes", "6 + 66\n#### 72", "72", "72"),
    ("hashes", "#### 71\n#### 72\nDone", None, "72"),
    ("hashes", "72", None, None),
    ("plain", " 72\n", "72", "72"),
    ("plain", "It is 72", "It is 72", "72"),
    ("plain", "Paris, of course", "Paris, of course", "Paris, of course"),
    ("plain", "  ", None, None),
]


@pytest.mark.parametrize(("form", "text", "strict", "tolerant"), BOTH)
def test_an_answer_is_read_in_its_form(form: str, text: str, strict: str | None, tolerant: str | None):
    assert extract_answer(form, "strict", text) == strict
    assert extract_answer(form, "tolerant", text) == tolerant


@pytest.mark.parametrize("form", ANSWER_FORMS)
def test_what_the_strict_reader_takes_the_tolerant_one_takes_too(form: str):
    texts = [text for _, text, _, _ in BOTH]
    for text in texts:
        if extract_answer(form, "strict", text) is not None:
            assert extract_answer(form, "tolerant", text) is not None


@pytest.mark.parametrize("grading", GRADINGS)
@pytest.mark.parametrize("text", [r"\boxed{" * 5000, "<answer>" * 5000, "####" * 5000, "<think>" * 9000, "1," * 9000])
def test_no_text_takes_long(text: str, grading: str):
    for form in ANSWER_FORMS:
        extract_answer(form, grading, text)


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ("48 / 2 = 24\n#### 1,234,072", "1234072"), ("#### (1, 2)", "(1, 2)"), (r"Thus $\boxed{\frac12}$.", r"\frac12"),
        (" Paris ", "Paris"), ("72", "72"),
    ],
)  # fmt: skip
def test_the_final_answer_of_a_row(row: str, gold: str):
    assert gold_answer(row) == gold


@pytest.mark.parametrize(
    ("one", "other"),
    [("$1,250.", "1250"), (r"\text{Paris}", "paris"), ("**x = 2**", "x = 2"), ("50\\%", "50"), ("a  b", "A b!")],
)
def test_a_tolerant_reader_passes_over_what_does_not_matter(one: str, other: str):
    assert normalize_answer(one).replace("\\", "") == normalize_answer(other)


def test_every_verifier_of_a_task_has_an_instruction():
    assert set(TASK_INSTRUCTIONS) == set(VERIFIERS) - {"equal"}
