"""Documents whose ending a short computation foretells: problems of a task with their answers, as plain text. And for a
few of them the teacher's thought, so that a fresh model learns in which form to think.

      document   3*2+1%7:0        thought at the answer   <think>3*2=6;6+1=0;</think><answer>0</answer>
                                  elsewhere               <think></think><answer>+</answer>

A document is a function of (task, seed, part, index), and its part follows from its content, as with problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_quest.data.batch import TokenBatch
from llm_quest.data.char_tokenizer import character_tokenizer
from llm_quest.data.demonstrations import collate_demonstrations
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.problems import Problem, SplitName, Task, draw_problem, teacher_demonstration
from llm_quest.data.problems.chained import ANSWER_PREFIX
from llm_quest.data.problems.problem import make_rng
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole_documents import WholeDocuments

THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE = REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def unique_problems(task: Task, part: SplitName, number: int, seed: int = 0) -> list[Problem]:
    """The first `number` problems of a split, each content once: fewer, where the task has not so many."""
    found = {problem.key: problem for problem in (draw_problem(task, part, index, seed) for index in range(number))}
    return list(found.values())


def reasoning_tokenizer(task: Task) -> Tokenizer:
    """Single characters, and each tag one token."""
    return character_tokenizer(task.alphabet, REASONING_TAGS)


def encode_problem(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    text = problem.prompt + problem.answer
    return [tokenizer.start_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def teacher_reasoning(task: Task, problem: Problem, index: int, seed: int) -> tuple[str, str]:
    """What the teacher thinks before the answer, and the answer it comes to, which may be wrong (the task's noise). A
    task without steps has no thoughts."""
    completion = teacher_demonstration(task, problem, index, seed)
    before, _, answer = completion.rpartition(ANSWER_PREFIX) if problem.steps else ("", "", completion)
    return before, answer


class ReasoningLoader:
    """`rows` demonstrations in each step, of the first `examples` problems again and again: a teacher's thought before
    the answer. A quarter as many are of other places, where nothing is thought, and again as many rows are plain
    documents, so that reading is not forgotten."""

    def __init__(
        self,
        task: Task,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        *,
        num_examples: int,
        batch_size: int,
        seed: int = 0,
    ):
        self.task, self.tokenizer = task, tokenizer
        self.batch_size, self.seed = batch_size, seed
        self.problems = list(problems[:num_examples])
        self.documents = [encode_problem(problem, tokenizer) for problem in self.problems]
        self.num_direct = max(1, batch_size // 4)
        self.document_loader = ShardedLoader(
            WholeDocuments(self.documents), batch_size=self.num_direct, micro_batch_size=self.num_direct, seed=seed
        )

    def batches(self, step: int) -> list[TokenBatch]:
        shown = [self.reasoning_example(step * self.batch_size + number) for number in range(self.batch_size)]
        quick = [self.direct_example(step * self.num_direct + number) for number in range(self.num_direct)]
        return [collate_demonstrations([*shown, *quick]), *self.document_loader.batches(step)]

    def reasoning_example(self, index: int) -> tuple[list[int], list[int]]:
        """Prompt and completion as ids, apart: the answer, thought about."""
        number = index % len(self.problems)
        problem = self.problems[number]
        answer = self.tokenizer.encode(problem.answer, add_special_tokens=False)
        thought, said = teacher_reasoning(self.task, problem, number, self.seed)
        return self.build_example(number, len(self.documents[number]) - 1 - len(answer), thought, said)

    def direct_example(self, index: int) -> tuple[list[int], list[int]]:
        """Some other place, where the text itself says what comes."""
        number = index % len(self.problems)
        ids = self.documents[number]
        answer = self.tokenizer.encode(self.problems[number].answer, add_special_tokens=False)
        place = make_rng("quick", self.seed, index).randrange(1, len(ids) - 1 - len(answer))
        return self.build_example(number, place, "", self.tokenizer.decode(ids[place : place + 1]))

    def build_example(self, number: int, place: int, thought: str, said: str) -> tuple[list[int], list[int]]:
        completion = f"{thought}{THINK_CLOSE}{ANSWER_OPEN}{said}{ANSWER_CLOSE}"
        completion_ids = [*self.tokenizer.encode(completion, add_special_tokens=False), self.tokenizer.eos_token_id]
        return [
            *self.documents[number][:place],
            *self.tokenizer.encode(THINK_OPEN, add_special_tokens=False),
        ], completion_ids

    def state_dict(self) -> dict[str, Any]:
        return {"task": repr(self.task), "rows": self.batch_size, "seed": self.seed, "examples": len(self.problems)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict != self.state_dict():
            raise ValueError(f"the bookmark belongs to other demonstrations: {state_dict}")
