r"""How an answer stands in a completion: what a model is asked for, and where the answer is read.

      boxed    ... so there are \boxed{72}                     tagged   <think> ... </think><answer>72</answer>
      hashes   ... #### 72                                     plain    72

Grading is strict (one answer, in exactly this form) or tolerant (the last one that looks like it, spaces, capitals, a
final period, thousands separators and currency signs aside). Strict is for training: what is tolerated is learned.

Commonly got wrong: the *first* thing that looks like an answer is taken, or any of several, so that listing numbers
pays; or `\boxed{\frac{1}{2}}` is cut at the first brace."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Extractor = Callable[[str], str | None]
"""A completion -> the answer in it; None where there is none in this form."""

HASHES = "####"
TAGGED = re.compile(r"<think>(.+?)</think>\s*<answer>(.+?)</answer>", re.DOTALL)
TAGS = re.compile(r"</?(?:think|answer)>")
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
LAST_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?", re.ASCII)
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}\b)")
MAX_BOXES = 1000


@dataclass(frozen=True)
class AnswerForm:
    """A way to mark an answer in a text. instruction: how a model is asked for it. strict, tolerant: where the answer
    is read."""

    instruction: str
    strict: Extractor
    tolerant: Extractor


def boxed_answers(text: str) -> list[tuple[str, int]]:
    r"""What stands in each `\boxed{...}`, its braces balanced, and where the box ends."""
    boxes: list[tuple[str, int]] = []
    for begin in re.finditer(r"\\boxed\s*\{", text):
        depth, at = 1, begin.end()
        while depth and at < len(text):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            boxes.append((text[begin.end() : at - 1].strip(), at))
        if len(boxes) == MAX_BOXES or depth:
            break
    return boxes


def only_boxed_answer(text: str) -> str | None:
    """The answer of the one box; nothing but punctuation may follow it."""
    boxes = boxed_answers(text)
    if len(boxes) != 1 or text[boxes[0][1] :].strip(" \t\n.$)]\\"):
        return None
    return boxes[0][0] or None


def last_boxed_answer(text: str) -> str | None:
    boxes = boxed_answers(text)
    return boxes[-1][0] or None if boxes else None


def only_tagged_answer(text: str) -> str | None:
    """`<think>...</think><answer>...</answer>`, both filled, nothing around them and no further tag."""
    match = TAGGED.fullmatch(text.strip(" \t\n"))
    if match is None or len(TAGS.findall(text)) != 4 or not match[1].strip():
        return None
    return match[2].strip() or None


def last_tagged_answer(text: str) -> str | None:
    """The last `<answer>`, thought before or not, closed or not."""
    answers = ANSWER_TAG.findall(text)
    return answers[-1].strip() or None if answers else None


def only_hashes_answer(text: str) -> str | None:
    return text.partition(HASHES)[2].strip() or None if text.count(HASHES) == 1 else None


def last_hashes_answer(text: str) -> str | None:
    """The line behind the last `####`."""
    _, mark, after = text.rpartition(HASHES)
    return after.strip().split("\n")[0].strip() or None if mark else None


def whole_text(text: str) -> str | None:
    return text.strip(" \t\n") or None


def last_number_or_line(text: str) -> str | None:
    """The last number of the last line that is not blank; that line itself where it has none."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    numbers = LAST_NUMBER.findall(lines[-1])
    return numbers[-1] if numbers else lines[-1].strip()


ANSWER_FORMS: dict[str, AnswerForm] = {
    "plain": AnswerForm("Answer with the result alone.", whole_text, last_number_or_line),
    "boxed": AnswerForm(
        r"Think step by step, and put the final answer in \boxed{}.", only_boxed_answer, last_boxed_answer
    ),
    "tagged": AnswerForm(
        "Think first, then answer. Write <think>your reasoning</think><answer>the final answer</answer> and nothing "
        "else.",
        only_tagged_answer,
        last_tagged_answer,
    ),
    "hashes": AnswerForm(
        "Think step by step, and end with #### and the final answer alone.", only_hashes_answer, last_hashes_answer
    ),
}
"""Name -> the form: what `answer_form` may be."""

GRADINGS: dict[str, Callable[[AnswerForm], Extractor]] = {
    "strict": lambda form: form.strict,
    "tolerant": lambda form: form.tolerant,
}

TASK_INSTRUCTIONS = {
    "exact": ANSWER_FORMS["plain"].instruction,
    "number": "Answer with the number alone.",
    "fraction": "Answer with the number or fraction alone.",
    "expression": "Answer with one arithmetic expression that uses each of the numbers exactly once, and nothing else.",
    "chained": "Work from left to right. Write each step like 3*4=5; and end with # and the result alone.",
    "marked": "Write the steps, then # and the result alone.",
    "gsm8k": ANSWER_FORMS["hashes"].instruction,
    "tagged": ANSWER_FORMS["tagged"].instruction,
}
"""What each verifier of a task wants to read, as a system prompt."""


def extract_answer(form: str, grading: str, text: str) -> str | None:
    """The answer of a completion; None where it has none in this form."""
    return GRADINGS[grading](ANSWER_FORMS[form])(text)


def gold_answer(text: str) -> str:
    r"""The final answer of a row's `answer`, `ground_truth` or `solution`: behind its `####`, in its last `\boxed{}`,
    or the text itself."""
    text = text.strip()
    if HASHES in text:
        return THOUSANDS.sub("", last_hashes_answer(text) or "")
    return last_boxed_answer(text) or text


def normalize_answer(text: str) -> str:
    """An answer without what does not matter to a tolerant reader."""
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[ ,;!]|[$€£%*_`\"]", "", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".!").strip()
    return THOUSANDS.sub("", text).casefold()
