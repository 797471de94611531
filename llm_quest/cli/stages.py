"""What the tour does with the model it has pretrained: teach it to answer, then to prefer; and a small one to reason.

Each stage is a recipe in a run folder of its own (`quest train FOLDER` goes on with it), measured on held-out data
before and after, both times by the same eye and in float32."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_quest.cli.training import conclude, understood
from llm_quest.data.chat import Chat
from llm_quest.data.conversations import Conversation
from llm_quest.generation.generate import generate
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.preference import answer_log_probs
from llm_quest.recipes.course import Outcome
from llm_quest.recipes.grpo import asking, posed
from llm_quest.recipes.preferring import HeldPairs
from llm_quest.recipes.preferring import prepared as compared
from llm_quest.recipes.sft import AnswerLoss, Talk
from llm_quest.recipes.sft import prepared as talked
from llm_quest.rollouts.evaluation import evaluate_problems
from llm_quest.rollouts.measures import Interval, wilson
from llm_quest.train.parallel import pick_device

Say = Callable[[str], None]

ASKED = 2
ANSWER = 64
ROWS = 8


@dataclass(frozen=True)
class Stage:
    """One measure on held-out data before and after a stage. intervals: 95 %, of both, where it is a share."""

    run: str
    measure: str
    before: float
    after: float
    seconds: float
    intervals: tuple[tuple[float, float], ...] = ()

    def line(self) -> str:
        told = [f"{number:.3f}" for number in (self.before, self.after)]
        if self.intervals:
            told = [f"{n} [{low:.3f}, {high:.3f}]" for n, (low, high) in zip(told, self.intervals, strict=True)]
        return f"{self.measure}: {told[0]} before, {told[1]} after"


@dataclass(frozen=True)
class Guide:
    """What the stages share. root: the tour's folder. changes: further settings by recipe."""

    root: Path
    seed: int
    device: str
    env: Mapping[str, Any]
    say: Say
    changes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def config(self, recipe: str, *pairs: str) -> Any:
        return understood(recipe, self.given(recipe, pairs))[1]

    def given(self, recipe: str, pairs: Sequence[str]) -> list[str]:
        return [f"seed={self.seed}", f"device={self.device}", *pairs, *self.changes.get(recipe, ())]

    def train(self, recipe: str, *pairs: str) -> Path:
        """The recipe in its sub-folder, with a report; which folder that is. KeyboardInterrupt if it was stopped."""
        settings, config, run = understood(recipe, self.given(recipe, pairs))
        folder = self.root / recipe
        require_whole(run(config, settings, folder, env=self.env, say=self.say), self.say)
        conclude(folder, None, self.say)
        return folder

    def model(self, folder: Path) -> Decoder:
        return load(folder, device=pick_device(self.device), dtype="float32")

    @cached_property
    def talk(self) -> Talk:
        """The conversations that the tour's model learns from, and those it does not."""
        config = self.config("sft", loaded(self.root))
        return talked(config.data, Chat(load_tokenizer(self.root)), config.batch.length)


def require_whole(outcome: Outcome, say: Say) -> None:
    """A stage that was stopped ends the tour; what it has learned is saved."""
    if outcome.status != "finished":
        say(f"Interrupted; what was learned is saved. quest train {outcome.run} goes on with it.")
        raise KeyboardInterrupt


def loaded(folder: Path) -> str:
    """The setting by which a recipe goes on from a folder, whatever its name."""
    return f"model.load={json.dumps(str(folder))}"


def answers(guide: Guide) -> Stage:
    """Fine-tuning: nats per token of answers to questions it was never taught."""
    began = time.monotonic()
    folder = guide.train("sft", loaded(guide.root))
    eye = AnswerLoss(guide.talk.held, 0, ROWS)
    before, after = (eye.measure(guide.model(one), 0)["loss"] for one in (guide.root, folder))
    return Stage(str(folder), "loss of held-out answers, nats per token", before, after, time.monotonic() - began)


def preferences(guide: Guide, start: Path) -> Stage:
    """DPO: the share of held-out pairs whose better answer is the likelier one."""
    began = time.monotonic()
    folder = guide.train("dpo", loaded(start))
    config = guide.config("dpo", loaded(start))
    held = compared(config.data, Chat(load_tokenizer(start)), config.batch.length, config.seed).held
    eye = HeldPairs(held, 0, answer_log_probs)
    shares = (eye.measure(guide.model(one), 0)["accuracy"] for one in (start, folder))
    before, after = (wilson(round(share * len(held)), len(held)) for share in shares)
    return told(folder, "held-out pairs whose better answer is the likelier", before, after, began)


def reasons(guide: Guide) -> Stage:
    """GRPO: held-out accuracy, of the model as rewards found it and as they left it."""
    began = time.monotonic()
    folder = guide.train("grpo")
    config = guide.config("grpo")
    problems = posed(config).held_out
    before, after = (
        evaluate_problems(
            guide.model(one),
            tokenizer := load_tokenizer(one),
            problems,
            max_new_tokens=config.rollout.new_tokens,
            encode=asking(config, tokenizer),
        ).greedy
        for one in (folder / "warmup", folder)
    )
    return told(folder, f"held-out accuracy on {config.task.partition(':')[0]}", before, after, began)


def told(folder: Path, measure: str, before: Interval, after: Interval, began: float) -> Stage:
    between = tuple((one.low, one.high) for one in (before, after))
    return Stage(str(folder), measure, before.share, after.share, time.monotonic() - began, between)


@dataclass(frozen=True)
class Answer:
    """What the model said to a question it was never taught, and what the manual says."""

    question: str
    said: str
    manual: str

    def lines(self) -> list[str]:
        return [f"> {self.question}", self.said, f"  (the manual: {self.manual})"]


def conversation(guide: Guide, folder: Path) -> list[Answer]:
    """The first held-out questions, asked through the chat template and answered greedily."""
    asked: Sequence[Conversation] = guide.talk.questions[:ASKED]
    tokenizer = load_tokenizer(folder)
    prompts = Chat(tokenizer).prompts([one.prompt for one in asked])
    done = generate(guide.model(folder), prompts, max_new_tokens=ANSWER, temperature=0.0, tokenizer=tokenizer)
    return [
        Answer(one.prompt[-1]["content"], (made.text or "").strip(), one.answer)
        for one, made in zip(asked, done, strict=True)
    ]
