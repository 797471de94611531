"""Rows that begin with the same question are on one side of the held-out split, whatever kind of rows they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from llm_quest.data.conversations import read_conversations, split_by_prompt
from llm_quest.data.documents import DropReport
from llm_quest.data.preferences import read_preferences
from llm_quest.data.prompt_rows import read_prompt_rows
from llm_quest.data.records import Record
from llm_quest.data.unpaired import read_unpaired

Turns = list[dict[str, str]]


def branches(drawn: random.Random, roots: int) -> Iterator[Turns]:
    """The paths of conversation trees, a user's message last; some with a system message of their own."""
    for root in range(roots):
        for branch in range(drawn.randint(1, 5)):
            turns = [{"role": "user", "content": drawn.choice([f"Question {root}", f" question  {root}"])}]
            for depth in range(drawn.randint(0, 3)):
                turns += [
                    {"role": "assistant", "content": f"answer {root} {depth} {branch % 2}"},
                    {"role": "user", "content": f"and {root} {depth} {branch}"},
                ]
            system = [{"role": "system", "content": f"be {branch}"}] if drawn.random() < 0.3 else []
            yield [*system, *turns]


def with_answer(turns: Turns, answer: str = "yes") -> Turns:
    return [*turns, {"role": "assistant", "content": answer}]


READERS: dict[str, tuple[Callable[..., Sequence[Any]], Callable[[Turns], dict[str, Any]]]] = {
    "sft": (read_conversations, lambda turns: {"messages": with_answer(turns)}),
    "dpo, reward": (read_preferences, lambda turns: {"prompt": turns, "chosen": "yes", "rejected": "no"}),
    "dpo, whole": (
        read_preferences, lambda turns: {"chosen": with_answer(turns), "rejected": with_answer(turns, "no")}
    ),
    "kto": (read_unpaired, lambda turns: {"prompt": turns, "completion": "yes", "label": True}),
    "grpo": (read_prompt_rows, lambda turns: {"messages": turns}),
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("seed", range(5))
def test_a_conversation_tree_is_on_one_side(kind: str, seed: int):
    reader, make_row = READERS[kind]
    records = [Record(make_row(turns), f"f:{n}") for n, turns in enumerate(branches(random.Random(seed), 40))]
    rows = reader(records, DropReport())
    train, held = split_by_prompt(rows, 0.2)
    assert len(train) + len(held) == len(rows) >= 40
    roots = [
        {next(" ".join(one["content"].lower().split()) for one in row.prompt if one["role"] == "user") for row in side}
        for side in (train, held)
    ]
    assert roots[0]
    assert roots[1]
    assert not roots[0] & roots[1]
