"""Self-refinement: the model criticizes its own answer and answers again (Madaan et al. 2023,
arXiv:2303.17651, algorithm 1).

      y_0      = model(x)
      fb_t     = model(x, y_0, fb_0, ..., y_t, "is this right?")        ends the loop where it holds the stop words
      y_t+1    = model(x, y_0, fb_0, ..., y_t, fb_t, "answer again")

All of it is one conversation in the chat template, decoded greedily. The accuracy after every round is reported with
what changed: right answers that became wrong count as much as wrong ones that became right.

Commonly got wrong: the loop stops where the gold answer is reached, which no user has; without it, models change more
right answers than wrong ones on many tasks (Huang et al. 2023, arXiv:2310.01798). Here the model's feedback alone
ends it, and an answer that no longer fits into the context stays as it is and is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_quest.data.problems import Problem
from llm_quest.errors import UsageError
from llm_quest.eval.statistics import ConfidenceInterval, wilson_confidence_interval
from llm_quest.progress import track
from llm_quest.rollouts.rewards import score_correctness
from llm_quest.rollouts.sampler import Sample

Messages = list[dict[str, Any]]
Complete = Callable[[Sequence[Problem], Sequence[list[int]]], list[Sample]]
"""Greedy completions of prompts, each of a problem."""


@dataclass(frozen=True)
class RefinePrompts:
    """What the model is told. stop: words in the feedback that end the loop."""

    feedback: str = (
        "Check your answer step by step and say what is wrong with it. If nothing is wrong, write only: THE ANSWER IS "
        "CORRECT"
    )
    refine: str = (
        "Answer the question again with this feedback. Write the whole answer, in the form that was asked for."
    )
    stop: str = "THE ANSWER IS CORRECT"

    @classmethod
    def parse(cls, given: Any, where: str) -> RefinePrompts:
        """From a mapping of some of these names to texts. UsageError for anything else."""
        names = asdict(cls())
        if not isinstance(given, Mapping) or not all(key in names and isinstance(given[key], str) for key in given):
            raise UsageError(f"{where}: expected some of the keys {', '.join(names)}, each with a text")
        prompts = cls(**given)
        if empty := [name for name, text in asdict(prompts).items() if not text.strip()]:
            raise UsageError(f"{where}: {empty[0]} is empty: give it a text, or leave it out")
        return prompts

    def stops(self, feedback: str) -> bool:
        return self.stop.casefold() in feedback.casefold()


@dataclass(frozen=True)
class RefineRound:
    """Accuracy after a round. corrected: wrong before it and right now; broken: the other way round. stopped: problems
    whose feedback has ended the loop. no_room: those whose conversation no longer fits into the context."""

    accuracy: ConfidenceInterval
    corrected: int
    broken: int
    stopped: int
    no_room: int

    def line(self, number: int) -> str:
        return (
            f"refine@{number:<11}{self.accuracy}   {self.corrected} corrected, {self.broken} broken, "
            f"{self.stopped} left alone by the feedback" + (f", {self.no_room} without room" if self.no_room else "")
        )


@dataclass(frozen=True)
class SelfRefinement:
    """Answers that the model revises by its own feedback. rounds: of feedback and another answer. messages: a problem
    as messages. encode: the prompts of conversations, as ids. context: the model's longest."""

    rounds: int
    messages: Callable[[Problem], Messages]
    encode: Callable[[Sequence[Messages]], list[list[int]]]
    context: int
    prompts: RefinePrompts = RefinePrompts()

    def refine(self, drafts: Sequence[Sample], complete: Complete) -> list[RefineRound]:
        """Refine one answer of each problem."""
        answers = list(drafts)
        conversations = {
            n: [*self.messages(answer.problem), assistant(answer.text)] for n, answer in enumerate(answers)
        }
        stopped, cramped, rounds = set[int](), set[int](), list[RefineRound]()
        for _ in track(range(self.rounds), "refining answers, round"):
            feedback = self.ask(conversations, self.prompts.feedback, answers, complete)
            stopped |= {n for n, one in feedback.items() if self.prompts.stops(one.text)}
            cramped |= conversations.keys() - feedback.keys()
            conversations = {n: conversations[n] for n in feedback.keys() - stopped}
            again = self.ask(conversations, self.prompts.refine, answers, complete)
            cramped |= conversations.keys() - again.keys()
            conversations = {n: conversations[n] for n in again}
            before, answers = answers, [again.get(n, answer) for n, answer in enumerate(answers)]
            rounds.append(compare_answers(before, answers, len(stopped), len(cramped)))
        return rounds

    def ask(
        self, conversations: dict[int, Messages], prompt: str, answers: Sequence[Sample], complete: Complete
    ) -> dict[int, Sample]:
        """The replies to another message of the user, which the conversations then hold. Conversations that are too
        long for the context are left out."""
        numbers = sorted(conversations)
        extended = {n: [*conversations[n], {"role": "user", "content": prompt}] for n in numbers}
        prompts = dict(zip(numbers, self.encode(list(extended.values())), strict=True)) if numbers else {}
        fitting = [n for n in numbers if len(prompts[n]) < self.context]
        replies = complete([answers[n].problem for n in fitting], [prompts[n] for n in fitting]) if fitting else []
        for n, reply in zip(fitting, replies, strict=True):
            conversations[n] = [*extended[n], assistant(reply.text)]
        return dict(zip(fitting, replies, strict=True))


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def compare_answers(before: Sequence[Sample], after: Sequence[Sample], stopped: int, no_room: int) -> RefineRound:
    """The accuracy of the answers after a round, and what changed in it. Those that cannot be scored do not count."""
    scores = [(score_correctness(old), score_correctness(new)) for old, new in zip(before, after, strict=True)]
    scored = [pair for pair in scores if not any(map(math.isnan, pair))]
    if not scored:
        raise UsageError(f"none of {len(after)} answers could be scored: check the gold answers")
    return RefineRound(
        accuracy=wilson_confidence_interval(sum(new == 1 for _, new in scored), len(scored)),
        corrected=sum(old != 1 and new == 1 for old, new in scored),
        broken=sum(old == 1 and new != 1 for old, new in scored),
        stopped=stopped,
        no_room=no_room,
    )
