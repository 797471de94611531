"""`quest train sft`: conversations -> a model that answers. The loss is over the answers alone, each with its end
token; whole conversations are packed into rows and do not attend to one another.

Commonly got wrong: the end token of an answer has a loss too, or the model never stops; prompt and answer are encoded
as pieces of one text, so that no token spans their border; a user's text is never read as a control token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from llm_quest.contracts import Evaluator
from llm_quest.data.builtin_qa import builtin_instructions
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.conversations import Conversation, read_conversations
from llm_quest.data.document import DropReport
from llm_quest.data.instructions import PackedExamples, drop_too_long
from llm_quest.data.loader import repeat_by_weight
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.eval.evaluators import save_samples
from llm_quest.generation.generate import generate
from llm_quest.generation.stopping import end_token_ids
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import AuxiliaryLoss, NextTokenLoss
from llm_quest.recipes.assembly import load_split_rows, make_sharded_loader, micro_batch_rows
from llm_quest.recipes.auxiliary_losses import (
    NumberTokenLossConfig,
    TeacherConfig,
    build_distillation_terms,
    number_token_terms,
    teacher_hash,
)
from llm_quest.recipes.chat_template_config import open_chat_template
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveInt, TextBatchedConfig
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import (
    ConversationDataConfig,
    FreshTokenizer,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
    count_steps,
    data_facts,
    set_generation_eos,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.schema import StrictModel
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.train.rng_state import derive_seed


class AnswerSamplesConfig(StrictModel):
    """Held-out questions that the model answers during the run."""

    every_steps: NonNegativeInt = Field(default=100, description="steps; 0: none")
    num_prompts: PositiveInt = Field(default=4, description="how many questions")
    max_new_tokens: PositiveInt = Field(default=64, description="tokens of an answer, at most")
    temperature: float = Field(default=0.0, ge=0, description="of the answers; 0: greedy")


class SftConfig(TextBatchedConfig):
    """A model and conversations in, a model that answers out."""

    recipe: Literal["sft"]
    model: StartModelConfig
    tokenizer: FreshTokenizer = None
    data: ConversationDataConfig = ConversationDataConfig()
    number_token_loss: NumberTokenLossConfig | None = Field(
        default=None, description="adds the distance between numbers (weight, distance, multi_digit); null: no"
    )
    teacher: TeacherConfig | None = Field(
        default=None, description="a model to learn from (load, weight, beta, temperature, dtype); null: none"
    )
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")
    samples: AnswerSamplesConfig = AnswerSamplesConfig()


def build_sft(config: SftConfig, context: Context) -> Job:
    """Model, conversations, next-token loss of the answers."""
    parallel, log = context.parallel, context.log
    config, model, tokenizer = begin_finetuning(config, context, builtin_instructions)
    data = prepare_conversations(config.data, tokenizer, config.sequence_length)
    set_generation_eos(
        model, tokenizer, (example.input_ids[example.last_answer_span[1] - 1] for example in data.train.examples)
    )
    micro_rows = micro_batch_rows(config, parallel, config.sequence_length)
    config = count_steps(config, context, model, len(data.train))
    loader = make_sharded_loader(config, data.train, parallel, micro_rows)
    facts = data_facts(
        config.data, data.chat, data.drop_report, len(data.train.examples), len(data.held_out.examples), log
    )
    log(f"learned: {data.train.num_targets:,} tokens of answers, in {len(data.train):,} rows an epoch")

    distillation_terms = build_distillation_terms(config, tokenizer, model.config.vocab_size, parallel, log)
    terms: list[AuxiliaryLoss] = [*number_token_terms(config.number_token_loss, tokenizer, model), *distillation_terms]

    evaluators: list[Evaluator] = []
    if data.questions:
        evaluators.append(AnswerLossEvaluator(data.held_out, config.eval_steps, micro_rows))
    if data.questions and config.samples.every_steps:
        seed = derive_seed(config.seed, "sampling")
        evaluators.append(AnswerSampler(data, config.samples, seed, context.samples_dir))
    identity = {"tokenizer": tokenizer.hash, "data": data.train.hash, "held_out": data.held_out.hash}
    return Job(
        config,
        NextTokenLoss(model, auxiliary=terms),
        loader,
        evaluators,
        identity | teacher_hash(distillation_terms),
        facts,
        tokenizer,
        callbacks=apply_config_techniques(config, model, log),
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
    )


@dataclass(frozen=True)
class ConversationData:
    """Conversations as rows of ids. questions: the held-out conversations as messages."""

    chat: ChatTemplate
    train: PackedExamples
    held_out: PackedExamples
    questions: Sequence[Conversation]
    drop_report: DropReport


def prepare_conversations(config: ConversationDataConfig, tokenizer: Tokenizer, length: int) -> ConversationData:
    """Prepare the conversations of a source as rows; what is left out is in the drop report."""
    chat = open_chat_template(config, tokenizer)
    drop_report = DropReport()
    train, held_out = load_split_rows(
        config, read_conversations, drop_report, builtin=builtin_instructions, limit=config.max_samples
    )
    train = repeat_by_weight(train)
    learned, looked_at = (
        PackedExamples(drop_too_long(chat.encode_conversations(side, drop_report), length, drop_report), length)
        for side in (train, held_out)
    )
    return ConversationData(chat, learned, looked_at, held_out, drop_report)


class AnswerLossEvaluator:
    """Evaluates held-out answers: the loss in nats per token, and its perplexity."""

    name = "eval"

    def __init__(self, held_out: PackedExamples, every: int, micro_rows: int):
        self.held, self.interval, self.micro_rows = held_out, every, micro_rows

    @torch.no_grad()
    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        objective, device, nats = NextTokenLoss(model), next(model.parameters()).device, 0.0
        for first in range(0, len(self.held), self.micro_rows):
            batch = self.held.collate(range(first, min(first + self.micro_rows, len(self.held))))
            nats += float(objective(batch.to(device)).total)
        loss = nats / self.held.num_targets
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


class AnswerSampler:
    """Samples answers to the first held-out questions, into samples/step-00000100.json."""

    name = "samples"

    def __init__(self, data: ConversationData, samples: AnswerSamplesConfig, seed: int, samples_dir: Path | None):
        self.interval, self.part, self.tokenizer = samples.every_steps, samples, data.chat.tokenizer
        self.folder, self.seed = samples_dir, seed
        self.questions = list(data.questions[: samples.num_prompts])
        self.prompts = data.chat.encode_prompts([question.prompt for question in self.questions])

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        """Sample on every process (each may hold a part of the model); only one with a folder saves them."""
        room = model.config.max_position_embeddings
        questions = [
            (question, ids) for question, ids in zip(self.questions, self.prompts, strict=True) if len(ids) < room
        ]
        done = generate(
            model,
            [ids for _, ids in questions],
            max_new_tokens=self.part.max_new_tokens,
            temperature=self.part.temperature,
            seed=self.seed,
            eos_token_id=end_token_ids(model, self.tokenizer),
            tokenizer=self.tokenizer,
        )
        if self.folder is not None:
            sample_rows = [
                {"prompt": one.prompt[-1]["content"], "text": written.text, "wanted": one.answer}
                for (one, _), written in zip(questions, done, strict=True)
            ]
            save_samples(self.folder, step, sample_rows)
        return {}


RECIPE = Recipe("sft", SftConfig, build_sft)
