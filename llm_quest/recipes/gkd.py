"""`quest train gkd`: a model and a teacher -> a model that answers as the teacher would, trained on its own answers
(on-policy distillation, GKD, arXiv:2306.13649).

Commonly got wrong: a question is truncated such that the data's answer and the model's own both fit; the teacher is a
part of the run's identity, so that a resumed run has the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from llm_quest.data.builtin_qa import builtin_instructions
from llm_quest.data.conversations import Conversation, read_conversations
from llm_quest.data.document import DropReport
from llm_quest.data.loader import repeat_by_weight
from llm_quest.data.preference_pairs import PreferenceDataset
from llm_quest.data.preferences import Preference, TokenizedPreference, tokenize_preferences
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.generation.stopping import end_token_ids
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.assembly import load_split_rows, micro_batch_rows
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.auxiliary_losses import TeacherConfig, build_distillation_terms, teacher_hash
from llm_quest.recipes.chat_template_config import open_chat_template
from llm_quest.recipes.config_schema import BatchedConfig, NonNegativeInt, PositiveFloat, PositiveInt, UnitFraction
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import (
    ConversationDataConfig,
    FreshTokenizer,
    PreferenceData,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
    count_steps,
    data_facts,
    set_generation_eos,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.rollouts.on_policy_distillation import GKDLoader, collate_answers
from llm_quest.rollouts.sampler import PolicyPrompt, Sampler
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed
from llm_quest.train.step import autocast

EVAL_BATCH_SIZE = 16


class GkdConfig(BatchedConfig):
    """A model, a teacher and questions in, a model that answers as the teacher would out."""

    recipe: Literal["gkd"]
    model: StartModelConfig
    tokenizer: FreshTokenizer = None
    teacher: TeacherConfig
    data: ConversationDataConfig = ConversationDataConfig()
    lmbda: UnitFraction = Field(
        default=0.5, description="how often a step's answers are the model's own; 0: those of the data, 1: always"
    )
    max_new_tokens: PositiveInt = Field(default=64, description="tokens of an answer that the model writes, at most")
    temperature: PositiveFloat = Field(default=1.0, description="of the answers that the model samples")
    sequence_length: int = Field(default=256, ge=4, description="tokens of a question with its answer, at most")
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    @model_validator(mode="after")
    def check_room(self) -> GkdConfig:
        if self.max_new_tokens >= self.sequence_length:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} leaves no tokens for a question in sequence_length "
                f"{self.sequence_length}; lower one or raise the other"
            )
        return self


def build_gkd(config: GkdConfig, context: Context) -> Job:
    """Model, teacher, questions, the divergence on answers of both."""
    parallel, log = context.parallel, context.log
    config, model, tokenizer = begin_finetuning(config, context, builtin_instructions)
    data = prepare_questions(config, tokenizer)
    set_generation_eos(model, tokenizer, (one.answers[0][-1] for one in data.train))
    config = count_steps(config, context, model, len(data.train))
    terms = build_distillation_terms(config, tokenizer, model.config.vocab_size, parallel, log)
    callbacks = apply_config_techniques(config, model, log)
    objective = NextTokenLoss(model, auxiliary=terms)
    sampler = answer_sampler(config, model, tokenizer, parallel)
    loader = GKDLoader(
        model, data.train, sampler, lmbda=config.lmbda, batch_size=config.batch_size,
        micro_batch_size=micro_batch_rows(config, parallel, config.sequence_length),
        seed=derive_seed(config.seed, "order"), shard=parallel.data_shard,
        student_context=partial(parallel.gather_model, objective),
    )  # fmt: skip
    evaluator = TeacherEvaluator(data.held_out, config.eval_steps, terms, sampler, derive_seed(config.seed, "answers"))
    facts = data_facts(config.data, data.chat, data.drop_report, len(data.train), len(data.held_out), log)
    held_out = PreferenceDataset(data.held_out).hash
    identity = {"tokenizer": tokenizer.hash, "data": loader.data_hash, "held_out": held_out, **teacher_hash(terms)}
    return Job(
        config, objective, loader, [evaluator] if data.held_out else [], identity, facts, tokenizer,
        callbacks=callbacks, watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
    )  # fmt: skip


def prepare_questions(config: GkdConfig, tokenizer: Tokenizer) -> PreferenceData:
    """Prepare the questions of a source, with one answer each, and held-out ones. A question is truncated on its left
    such that the data's answer and the model's own both fit."""
    data, drop_report = config.data, DropReport()
    chat = open_chat_template(data, tokenizer)
    learned, held_out = load_split_rows(
        data, read_conversations, drop_report, builtin=builtin_instructions, limit=data.max_samples
    )
    room = config.sequence_length - config.max_new_tokens
    parts = []
    for part in (repeat_by_weight(learned), held_out):
        rows = tokenize_preferences(chat, [last_turn(one) for one in part], config.sequence_length, drop_report)
        parts.append([replace(row, prompt=row.prompt[-room:]) for row in rows])
    return PreferenceData(chat, parts[0], parts[1], drop_report)


def last_turn(conversation: Conversation) -> Preference:
    """A conversation's last answer, with all before it as its prompt."""
    return Preference(
        conversation.messages[:-1], (conversation.answer,), where=conversation.where, tools=conversation.tools
    )


def answer_sampler(config: GkdConfig, model: Decoder, tokenizer: Tokenizer, parallel: DistributedContext) -> Sampler:
    precision = resolve_precision(config.precision, parallel.device).value
    return Sampler(
        tokenizer=tokenizer,
        eos_token_ids=tuple(sorted(end_token_ids(model, tokenizer))),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        autocast_context=partial(autocast, precision, parallel.device),
    )


class TeacherEvaluator:
    """Evaluates held-out questions: loss, the divergence from the teacher on the data's answers; next_token, their
    cross-entropy; on_policy, the divergence on answers that the model writes, always with the same seed."""

    name = "eval"

    def __init__(
        self,
        examples: Sequence[TokenizedPreference],
        every: int,
        terms: Sequence[DistillationLoss],
        sampler: Sampler,
        seed: int,
    ):
        self.examples, self.interval, self.terms, self.sampler, self.seed = examples, every, terms, sampler, seed

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> Mapping[str, float]:
        given = [(example.prompt.tolist(), example.answers[0].tolist()) for example in self.examples]
        prompts = [PolicyPrompt(tuple(prompt)) for prompt, _ in given]
        groups = self.sampler(model, prompts, 1, self.seed)
        written = [(sample.prompt_ids, sample.completion_ids) for group in groups for sample in group]
        on_data, own = self.divergences(model, given), self.divergences(model, written)
        return {"loss": on_data["distillation"], "next_token": on_data["next_token"], "on_policy": own["distillation"]}

    def divergences(self, model: Any, pairs: Sequence[Any]) -> dict[str, float]:
        """The means of the objective's metrics per token of these answers."""
        objective, device = NextTokenLoss(model, auxiliary=self.terms), next(model.parameters()).device
        sums: dict[str, list[float]] = {}
        for first in range(0, len(pairs), EVAL_BATCH_SIZE):
            batch = collate_answers(pairs[first : first + EVAL_BATCH_SIZE])
            for name, pair in objective(batch.to(device)).metrics.items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[:] = [total[0] + float(pair[0]), total[1] + float(pair[1])]
        return {name: total / count for name, (total, count) in sums.items()}


RECIPE = Recipe("gkd", GkdConfig, build_gkd)
