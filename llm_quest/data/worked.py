"""Documents whose ending a short computation foretells: problems of a task with their answers, as plain text. And for a
few of them the teacher's thought, so that a fresh model learns in which form to think.

      document   3*2+1%7:0        thought at the answer   <think>3*2=6;6+1=0;</think><answer>0</answer>
                                  elsewhere               <think></think><answer>+</answer>

A document is a function of (task, seed, part, index), and its part follows from its content, as with problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_quest.data.alphabet import character_tokenizer
from llm_quest.data.batch import TokenBatch
from llm_quest.data.demonstrations import demonstrations
from llm_quest.data.problems import Part, Problem, Task, demonstration, draw
from llm_quest.data.problems.chained import ANSWER
from llm_quest.data.problems.problem import chance
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole import WholeFeed

THINK, THOUGHT, SAY, SAID = TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def worked(task: Task, part: Part, number: int, seed: int = 0) -> list[Problem]:
    """The first `number` problems of a split, each content once: fewer, where the task has not so many."""
    found = {problem.key: problem for problem in (draw(task, part, index, seed) for index in range(number))}
    return list(found.values())


def worked_tokenizer(task: Task) -> Tokenizer:
    """Single characters, and each tag one token."""
    return character_tokenizer(task.alphabet, TAGS)


def as_document(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    text = problem.prompt + problem.answer
    return [tokenizer.start_id, *tokenizer.encode(text, template=False), tokenizer.end_id]


def thought_of(task: Task, problem: Problem, index: int, seed: int) -> tuple[str, str]:
    """What the teacher thinks before the answer, and the answer it comes to, which may be wrong (the task's noise). A
    task without steps has no thoughts."""
    told = demonstration(task, problem, index, seed)
    before, _, answer = told.rpartition(ANSWER) if problem.steps else ("", "", told)
    return before, answer


class ThinkingFeed:
    """`rows` demonstrations in each step, of the first `examples` problems again and again: a teacher's thought before
    the answer. A quarter as many are of other places, where nothing is thought, and again as many rows are plain
    documents, so that reading is not forgotten."""

    def __init__(
        self, task: Task, problems: Sequence[Problem], tokenizer: Tokenizer, *, examples: int, rows: int, seed: int = 0
    ):
        self.task, self.tokenizer = task, tokenizer
        self.rows, self.seed = rows, seed
        self.problems = list(problems[:examples])
        self.documents = [as_document(problem, tokenizer) for problem in self.problems]
        self.few = max(1, rows // 4)
        self.plain = WholeFeed(self.documents, rows=self.few, seed=seed)

    def at(self, step: int) -> list[TokenBatch]:
        shown = [self.thoughtful(step * self.rows + number) for number in range(self.rows)]
        quick = [self.quick(step * self.few + number) for number in range(self.few)]
        return [demonstrations([*shown, *quick]), *self.plain.at(step)]

    def thoughtful(self, index: int) -> tuple[list[int], list[int]]:
        """Prompt and completion as ids, apart: the answer, thought about."""
        number = index % len(self.problems)
        problem = self.problems[number]
        answer = self.tokenizer.encode(problem.answer, template=False)
        thought, said = thought_of(self.task, problem, number, self.seed)
        return self.row(number, len(self.documents[number]) - 1 - len(answer), thought, said)

    def quick(self, index: int) -> tuple[list[int], list[int]]:
        """Some other place, where the text itself says what comes."""
        number = index % len(self.problems)
        ids = self.documents[number]
        answer = self.tokenizer.encode(self.problems[number].answer, template=False)
        place = chance("quick", self.seed, index).randrange(1, len(ids) - 1 - len(answer))
        return self.row(number, place, "", self.tokenizer.decode(ids[place : place + 1]))

    def row(self, number: int, place: int, thought: str, said: str) -> tuple[list[int], list[int]]:
        told = f"{thought}{THOUGHT}{SAY}{said}{SAID}"
        written = [*self.tokenizer.encode(told, template=False), self.tokenizer.end_id]
        return [*self.documents[number][:place], *self.tokenizer.encode(THINK, template=False)], written

    def bookmark(self) -> dict[str, Any]:
        return {"task": repr(self.task), "rows": self.rows, "seed": self.seed, "examples": len(self.problems)}

    def resume(self, bookmark: dict[str, Any]) -> None:
        if bookmark != self.bookmark():
            raise ValueError(f"the bookmark belongs to other demonstrations: {bookmark}")
