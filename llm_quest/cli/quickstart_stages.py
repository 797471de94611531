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

from llm_quest.cli.train import load_recipe, write_plan_and_report
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.conversations import Conversation
from llm_quest.eval.problems import evaluate_problems
from llm_quest.eval.statistics import ConfidenceInterval, wilson_confidence_interval
from llm_quest.generation.generate import generate
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.preference import sequence_log_probs
from llm_quest.recipes.grpo import load_problems, prompt_encoder
from llm_quest.recipes.preference_data import PairsEvaluator
from llm_quest.recipes.preference_data import prepare_preferences as prepare_preferences
from llm_quest.recipes.run import RunOutcome
from llm_quest.recipes.sft import AnswerLossEvaluator, ConversationData
from llm_quest.recipes.sft import prepare_conversations as talked
from llm_quest.train.parallel import resolve_device

LogFn = Callable[[str], None]

NUM_QUESTIONS = 2
MAX_ANSWER_TOKENS = 64
STAGE_BATCH_SIZE = 8


@dataclass(frozen=True)
class StageResult:
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
class QuickstartContext:
    """What the stages share. root: the tour's folder. changes: further settings by recipe."""

    root: Path
    seed: int
    device: str
    env: Mapping[str, Any]
    log: LogFn
    changes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def config(self, recipe: str, *pairs: str) -> Any:
        return load_recipe(recipe, self.overrides(recipe, pairs))[1]

    def overrides(self, recipe: str, overrides: Sequence[str]) -> list[str]:
        return [f"seed={self.seed}", f"device={self.device}", *overrides, *self.changes.get(recipe, ())]

    def train(self, recipe: str, *pairs: str) -> Path:
        """The recipe in its sub-folder, with a report; which folder that is. KeyboardInterrupt if it was stopped."""
        settings, config, run = load_recipe(recipe, self.overrides(recipe, pairs))
        folder = self.root / recipe
        require_finished(run(config, settings, folder, env=self.env, log=self.log), self.log)
        write_plan_and_report(folder, None, self.log)
        return folder

    def model(self, folder: Path) -> Decoder:
        return load(folder, device=resolve_device(self.device), dtype="float32")

    @cached_property
    def conversations(self) -> ConversationData:
        """The conversations that the tour's model learns from, and those it does not."""
        config = self.config("sft", model_override(self.root))
        return talked(config.data, ChatTemplate(load_tokenizer(self.root)), config.sequence_length)


def require_finished(outcome: RunOutcome, log: LogFn) -> None:
    """A stage that was stopped ends the tour; what it has learned is saved."""
    if outcome.status != "finished":
        log(f"Interrupted; what was learned is saved. quest train {outcome.run} goes on with it.")
        raise KeyboardInterrupt


def model_override(folder: Path) -> str:
    """The setting by which a recipe goes on from a folder, whatever its name."""
    return f"model.load={json.dumps(str(folder))}"


def run_sft_stage(guide: QuickstartContext) -> StageResult:
    """Fine-tuning: nats per token of answers to questions it was never taught."""
    began = time.monotonic()
    folder = guide.train("sft", model_override(guide.root))
    evaluator = AnswerLossEvaluator(guide.conversations.held_out, 0, STAGE_BATCH_SIZE)
    before, after = (evaluator.evaluate(guide.model(one), 0)["loss"] for one in (guide.root, folder))
    return StageResult(str(folder), "loss of held-out answers, nats per token", before, after, time.monotonic() - began)


def run_dpo_stage(guide: QuickstartContext, start: Path) -> StageResult:
    """DPO: the share of held-out pairs whose better answer is the likelier one."""
    began = time.monotonic()
    folder = guide.train("dpo", model_override(start))
    config = guide.config("dpo", model_override(start))
    held = prepare_preferences(
        config.data, ChatTemplate(load_tokenizer(start)), config.sequence_length, config.seed
    ).held_out
    evaluator = PairsEvaluator(held, 0, sequence_log_probs)
    shares = (evaluator.evaluate(guide.model(one), 0)["accuracy"] for one in (start, folder))
    before, after = (wilson_confidence_interval(round(share * len(held)), len(held)) for share in shares)
    return make_stage_result(folder, "held-out pairs whose better answer is the likelier", before, after, began)


def run_grpo_stage(guide: QuickstartContext) -> StageResult:
    """GRPO: held-out accuracy, of the model as rewards found it and as they left it."""
    began = time.monotonic()
    folder = guide.train("grpo")
    config = guide.config("grpo")
    problems = load_problems(config).held_out
    before, after = (
        evaluate_problems(
            guide.model(one),
            tokenizer := load_tokenizer(one),
            problems,
            max_new_tokens=config.max_new_tokens,
            encode_prompt=prompt_encoder(config, tokenizer),
        ).greedy_accuracy
        for one in (folder / "warmup", folder)
    )
    return make_stage_result(folder, f"held-out accuracy on {config.task.partition(':')[0]}", before, after, began)


def make_stage_result(
    folder: Path, measure: str, before: ConfidenceInterval, after: ConfidenceInterval, began: float
) -> StageResult:
    between = tuple((one.low, one.high) for one in (before, after))
    return StageResult(str(folder), measure, before.share, after.share, time.monotonic() - began, between)


@dataclass(frozen=True)
class AnsweredQuestion:
    """What the model said to a question it was never taught, and what the manual says."""

    question: str
    said: str
    manual: str

    def lines(self) -> list[str]:
        return [f"> {self.question}", self.said, f"  (the manual: {self.manual})"]


def answer_held_out_questions(guide: QuickstartContext, folder: Path) -> list[AnsweredQuestion]:
    """The first held-out questions, asked through the chat template and answered greedily."""
    asked: Sequence[Conversation] = guide.conversations.questions[:NUM_QUESTIONS]
    tokenizer = load_tokenizer(folder)
    prompts = ChatTemplate(tokenizer).encode_prompts([one.prompt for one in asked])
    done = generate(
        guide.model(folder), prompts, max_new_tokens=MAX_ANSWER_TOKENS, temperature=0.0, tokenizer=tokenizer
    )
    return [
        AnsweredQuestion(one.prompt[-1]["content"], (made.text or "").strip(), one.answer)
        for one, made in zip(asked, done, strict=True)
    ]
