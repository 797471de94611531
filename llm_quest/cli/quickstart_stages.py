"""The stages of `quest quickstart` after pretraining: SFT, DPO and GRPO, with one evaluation before and after each.

Each stage is a recipe in a run folder of its own (`quest train FOLDER` resumes it), evaluated in float32 on held-out
data."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_quest.cli.train import write_plan_and_report
from llm_quest.contracts import LogFn
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.conversations import Conversation
from llm_quest.errors import StoppedBySignal
from llm_quest.eval.evaluators import PairsEvaluator
from llm_quest.eval.problems import evaluate_problems
from llm_quest.eval.statistics import ConfidenceInterval, wilson_confidence_interval
from llm_quest.generation.generate import generate
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.preference import sequence_log_probs
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.finetuning import prepare_preferences
from llm_quest.recipes.grpo import load_problems, prompt_encoder
from llm_quest.recipes.recipe import RunOutcome, load_recipe
from llm_quest.recipes.sft import AnswerLossEvaluator, ConversationData, prepare_conversations
from llm_quest.train.parallel import resolve_device

NUM_QUESTIONS = 2
MAX_ANSWER_TOKENS = 64
STAGE_BATCH_SIZE = 8


@dataclass(frozen=True)
class StageResult:
    """A metric on held-out data before and after a stage. intervals: 95 % confidence intervals, if it is a share."""

    run: str
    measure: str
    before: float
    after: float
    seconds: float
    intervals: tuple[tuple[float, float], ...] = ()

    def line(self) -> str:
        values = [f"{number:.3f}" for number in (self.before, self.after)]
        if self.intervals:
            values = [f"{n} [{low:.3f}, {high:.3f}]" for n, (low, high) in zip(values, self.intervals, strict=True)]
        return f"{self.measure}: {values[0]} before, {values[1]} after"


@dataclass(frozen=True)
class QuickstartContext:
    """The settings that the stages share. root: the quickstart's folder. changes: further settings by recipe."""

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
        """Train a recipe in its sub-folder and write its report; returns the folder. StoppedBySignal if it was
        stopped."""
        loaded_recipe, config, settings = load_recipe(recipe, self.overrides(recipe, pairs))
        folder = self.root / recipe
        require_finished(run_recipe(loaded_recipe, config, settings, folder, env=self.env, log=self.log), self.log)
        write_plan_and_report(folder, None, self.log)
        return folder

    def model(self, folder: Path) -> Decoder:
        return load(folder, device=resolve_device(self.device), dtype="float32")

    @cached_property
    def conversations(self) -> ConversationData:
        """The conversations of the SFT stage: for training and held out."""
        config = self.config("sft", model_override(self.root))
        return prepare_conversations(config.data, load_tokenizer(self.root), config.sequence_length)


def require_finished(outcome: RunOutcome, log: LogFn) -> None:
    """StoppedBySignal if a stage was stopped; its checkpoint is saved."""
    if outcome.status != "finished":
        log(f"Interrupted; the checkpoint is saved. quest train {outcome.run} resumes it.")
        raise StoppedBySignal(outcome.exit_code - 128 if outcome.exit_code else signal.SIGINT)


def model_override(folder: Path) -> str:
    """The setting by which a recipe starts from the model in a folder."""
    return f"model.load={json.dumps(str(folder))}"


def run_sft_stage(context: QuickstartContext) -> StageResult:
    """SFT; the metric is the loss of held-out answers."""
    began = time.monotonic()
    folder = context.train("sft", model_override(context.root))
    evaluator = AnswerLossEvaluator(context.conversations.held_out, 0, STAGE_BATCH_SIZE)
    before, after = (evaluator.evaluate(context.model(one), 0)["loss"] for one in (context.root, folder))
    return StageResult(str(folder), "loss of held-out answers, nats per token", before, after, time.monotonic() - began)


def run_dpo_stage(context: QuickstartContext, start: Path) -> StageResult:
    """DPO; the metric is the share of held-out pairs whose chosen answer is more probable."""
    began = time.monotonic()
    folder = context.train("dpo", model_override(start))
    config = context.config("dpo", model_override(start))
    held_out = prepare_preferences(config.data, load_tokenizer(start), config.sequence_length, config.seed).held_out
    evaluator = PairsEvaluator(held_out, 0, sequence_log_probs)
    shares = (evaluator.evaluate(context.model(one), 0)["accuracy"] for one in (start, folder))
    before, after = (wilson_confidence_interval(round(share * len(held_out)), len(held_out)) for share in shares)
    return make_stage_result(folder, "held-out pairs whose chosen answer is more probable", before, after, began)


def run_grpo_stage(context: QuickstartContext) -> StageResult:
    """GRPO; the metric is held-out accuracy."""
    began = time.monotonic()
    folder = context.train("grpo")
    config = context.config("grpo")
    problems = load_problems(config, lambda line: None)
    before, after = (
        evaluate_problems(
            context.model(one),
            tokenizer := load_tokenizer(one),
            problems.held_out,
            max_new_tokens=config.max_new_tokens,
            encode_prompt=prompt_encoder(config, tokenizer, problems),
        ).greedy_accuracy
        for one in (folder / "warmup", folder)
    )
    return make_stage_result(folder, f"held-out accuracy on {config.task_name.partition(':')[0]}", before, after, began)


def make_stage_result(
    folder: Path, measure: str, before: ConfidenceInterval, after: ConfidenceInterval, began: float
) -> StageResult:
    between = tuple((one.low, one.high) for one in (before, after))
    return StageResult(str(folder), measure, before.share, after.share, time.monotonic() - began, between)


@dataclass(frozen=True)
class AnsweredQuestion:
    """A held-out question, the model's answer, and the answer in the documentation."""

    question: str
    answer: str
    reference: str

    def lines(self) -> list[str]:
        return [f"> {self.question}", self.answer, f"  (the documentation: {self.reference})"]


def answer_held_out_questions(context: QuickstartContext, folder: Path) -> list[AnsweredQuestion]:
    """Answer the first held-out questions greedily, with the chat template."""
    questions: Sequence[Conversation] = context.conversations.questions[:NUM_QUESTIONS]
    tokenizer = load_tokenizer(folder)
    prompts = ChatTemplate(tokenizer).encode_prompts([question.prompt for question in questions])
    done = generate(
        context.model(folder), prompts, max_new_tokens=MAX_ANSWER_TOKENS, temperature=0.0, tokenizer=tokenizer
    )
    return [
        AnsweredQuestion(question.prompt[-1]["content"], (completion.text or "").strip(), question.answer)
        for question, completion in zip(questions, done, strict=True)
    ]
