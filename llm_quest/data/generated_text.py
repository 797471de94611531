"""Texts and answers that a program writes, for experiments whose best loss is known: rows of `data.source
FILE.py:FUNCTION`. Letters stand apart, so that a byte-pair tokenizer of 300 has one token for each.

    copies()                  random letters, a bar, the same letters again: the second half can only be retrieved
    sums()                    sums of two numbers of two digits
    reversals()               `reverse(abc)=` and the answer, as the task `reverse` has them
    few_reversals()           the first 600 of them
    reversal_pairs()          the same prompt, the reversed word, and its letters in another order
    rated_reversals()         one answer of a pair, and whether it is right: one in five is
    criticised_reversals()    an answer, what is wrong with it, and another one: half of the answers copy the word"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator
from typing import Any

from llm_quest.data.problems import draw_problem
from llm_quest.data.problems.strings import Reverse

Row = dict[str, Any]
ROWS = 6000


def copies() -> Iterator[Row]:
    rng = random.Random("copies 28")
    for _ in range(ROWS):
        text = " ".join(rng.choices(string.ascii_lowercase[:16], k=rng.randint(8, 28)))
        yield {"text": f" {text} | {text}"}


def sums() -> Iterator[Row]:
    rng = random.Random("sums")
    for _ in range(ROWS):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        yield {"text": f"{a} + {b} = {a + b}"}


def words() -> Iterator[str]:
    """Words of 3 and 4 of 8 letters, with more than one distinct letter."""
    rng = random.Random("words")
    for _ in range(ROWS // 2):
        word = rng.choices(string.ascii_lowercase[:8], k=rng.randint(3, 4))
        if len(set(word)) > 1:
            yield "".join(word)


def reversals() -> Iterator[Row]:
    for word in words():
        yield {"prompt": f"reverse({word})=", "completion": word[::-1]}


def few_reversals() -> Iterator[Row]:
    return itertools.islice(reversals(), 600)


def reversal_pairs() -> Iterator[Row]:
    rng = random.Random("pairs")
    for word in words():
        letters, right = list(word), word[::-1]
        wrong = right
        while wrong == right:
            rng.shuffle(letters)
            wrong = "".join(letters)
        yield {"prompt": f"reverse({word})=", "chosen": right, "rejected": wrong}


def rated_reversals() -> Iterator[Row]:
    rng = random.Random("ratings")
    for pair in reversal_pairs():
        right = rng.random() < 0.2
        yield {"prompt": pair["prompt"], "completion": pair["chosen" if right else "rejected"], "label": right}


def criticised_reversals() -> Iterator[Row]:
    """Conversations about the words that the task `reverse` trains on. First and second answers are as often wrong;
    what is said about them is always right, and ends the conversation where they are. All words are spelled with the
    characters that the policy of `words` knows."""
    task = Reverse(3, 4, 8, noise=0.5)
    for index in range(ROWS // 2):
        problem = draw_problem(task, "train", index)
        rng = random.Random(f"criticism {index}")
        first, second = (task.demonstrate(problem, rng) for _ in range(2))
        turns = [problem.prompt, first, "assess", "safe" if first == problem.answer else "bad"]
        turns += [] if first == problem.answer else ["rehash", second]
        yield {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}
