"""Losses besides the next token's: routers of experts, multi-token prediction modules, distances between numbers, and a
teacher's distributions. A coefficient for a part that the model lacks is an error.

Routers that choose by sigmoid and a bias (DeepSeek-V3, MiMo) are balanced by that bias, with the paper's small loss
within sequences; routers that choose by softmax (Mixtral, Qwen3) by the load-balancing loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field

from llm_quest.contracts import Callback, LogFn
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.layers.moe import SigmoidRouter, SoftmaxRouter
from llm_quest.models.build import count_parameters, family_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.next_token import AuxiliaryLoss, NextTokenLoss
from llm_quest.objectives.number_token import DISTANCES, NumberTokenLoss, number_values
from llm_quest.recipes.assembly import require_run_exists
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.config_schema import PositiveFloat, UnitFraction
from llm_quest.recipes.reference_model import weights_hash
from llm_quest.recipes.schema import Choice, LocalPath, StrictModel
from llm_quest.techniques.expert_bias import ExpertBiasBalancer
from llm_quest.train.parallel import DistributedContext

BIAS_UPDATE_SPEED, SEQUENCE_BALANCE_COEF, MTP_LOSS_WEIGHT = 0.001, 0.0001, 0.3
MTP_FAMILIES = "deepseek_v3 and mimo"
ROUTER_COEFFICIENTS = ("router_aux_loss_coef", "router_seq_aux_loss_coef", "router_z_loss_coef")


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Coefficients of the losses besides the next token's; None where the model has no such part."""

    router_aux_loss_coef: float | None
    router_seq_aux_loss_coef: float | None
    router_z_loss_coef: float
    expert_bias_update_speed: float | None
    mtp_loss_weight: float | None
    router_aux_loss_pooled: bool = False

    def resolve(self, model: Decoder) -> AuxiliaryLosses:
        """Fill in the defaults of this model. UsageError for a coefficient that would have no effect."""
        self.require_effect(model)
        by_softmax = [module.aux_loss_coef for module in model.modules() if isinstance(module, SoftmaxRouter)]
        by_bias = any(isinstance(module, SigmoidRouter) for module in model.modules())
        balance, within, speed, mtp = (
            self.router_aux_loss_coef,
            self.router_seq_aux_loss_coef,
            self.expert_bias_update_speed,
            self.mtp_loss_weight,
        )
        if by_softmax or by_bias:
            balance = max(by_softmax, default=0.0) if balance is None else balance
            within = (SEQUENCE_BALANCE_COEF if by_bias else 0.0) if within is None else within
        if by_bias and speed is None:
            speed = BIAS_UPDATE_SPEED
        if len(model.mtp_modules) and mtp is None:
            mtp = MTP_LOSS_WEIGHT
        if self.router_aux_loss_pooled and not balance:
            raise UsageError(
                "router_aux_loss_pooled has no effect: this run adds no load-balancing loss; set router_aux_loss_coef "
                "on a model with experts, or leave it out"
            )
        return AuxiliaryLosses(balance, within, self.router_z_loss_coef, speed, mtp, self.router_aux_loss_pooled)

    def require_effect(self, model: Decoder) -> None:
        """Raise UsageError for a coefficient of a part that the model does not have."""
        family = family_of(model.config).name
        softmax, sigmoid = (
            any(isinstance(module, kind) for module in model.modules()) for kind in (SoftmaxRouter, SigmoidRouter)
        )
        for key in ROUTER_COEFFICIENTS if not (softmax or sigmoid) else ():
            if getattr(self, key):
                raise UsageError(f"{key} has no effect: this {family} model has no experts; leave it out")
        if self.expert_bias_update_speed is not None and not sigmoid:
            why = "its routers have no bias; use router_aux_loss_coef" if softmax else "it has no experts"
            raise UsageError(f"expert_bias_update_speed has no effect on this {family} model: {why}")
        if self.mtp_loss_weight is not None and not len(model.mtp_modules):
            raise UsageError(
                f"mtp_loss_weight has no effect: this {family} model has no multi-token modules; {MTP_FAMILIES} build "
                "them with model.config.num_nextn_predict_layers=1, the technique multi_token adds them to any"
            )

    @property
    def router_coefs(self) -> dict[str, float]:
        """Coefficients of the routers' losses that are added, by the loss's name."""
        coefs = {
            "load_balancing_pooled" if self.router_aux_loss_pooled else "load_balancing": self.router_aux_loss_coef,
            "sequence_balancing": self.router_seq_aux_loss_coef,
            "z_loss": self.router_z_loss_coef,
        }
        return {name: value for name, value in coefs.items() if value}

    def build_objective(self, model: Decoder, extra_terms: Sequence[AuxiliaryLoss] = ()) -> NextTokenLoss:
        """The next-token loss with the model's auxiliary losses and further terms."""
        return NextTokenLoss(
            model, router_coefs=self.router_coefs, mtp_weight=self.mtp_loss_weight or 0.0, auxiliary=extra_terms
        )

    def build_callbacks(self) -> list[Callback]:
        """The callback that balances experts by their bias, if the model has one."""
        return [ExpertBiasBalancer(self.expert_bias_update_speed)] if self.expert_bias_update_speed else []

    def initial_loss(self, model: Decoder) -> float:
        """The expected loss of random weights, in nats: ln V (1 + mtp_loss_weight)."""
        return math.log(model.config.vocab_size) * (1 + (self.mtp_loss_weight or 0.0))


class NumberTokenLossConfig(StrictModel):
    """The Number Token Loss, added to the loss of the next token."""

    weight: PositiveFloat = Field(default=0.3, description="lambda; per learned token, not per number")
    distance: Annotated[str, Choice(DISTANCES)] = Field(
        default="was", description="was: expected distance; mse: of the expected value"
    )
    multi_digit: bool = Field(default=False, description="tokens of several digits are numbers too")


def number_token_terms(
    numbers: NumberTokenLossConfig | None, tokenizer: Tokenizer, model: Any
) -> list[NumberTokenLoss]:
    """The Number Token Loss as a list of one term; empty without it."""
    if numbers is None:
        return []
    values = number_values(tokenizer, model.head.weight.shape[0], multi_digit=numbers.multi_digit)
    return [NumberTokenLoss(values, weight=numbers.weight, distance=numbers.distance)]


class TeacherConfig(StrictModel):
    """A teacher of the same tokenizer: loss = (1 - weight) cross-entropy + weight divergence."""

    load: LocalPath = Field(min_length=1, description="a run folder, a Hugging Face folder or a hub id")
    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="of the divergence from the teacher; the cross-entropy has the rest"
    )
    beta: UnitFraction = Field(
        default=0.0, description="0: KL(teacher || model), 1: KL(model || teacher), between: Jensen-Shannon"
    )
    temperature: PositiveFloat = Field(default=1.0, description="of both distributions")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="how the teacher is held; auto: bfloat16 where the run's precision is bf16"
    )


class LearnsFromTeacher(Protocol):
    """The keys of a recipe's config that distillation reads."""

    @property
    def teacher(self) -> TeacherConfig | None: ...
    @property
    def model(self) -> Any: ...
    @property
    def precision(self) -> str: ...
    @property
    def sequence_length(self) -> int: ...


def build_distillation_terms(
    config: LearnsFromTeacher, tokenizer: Tokenizer, vocab: int, parallel: DistributedContext, log: LogFn
) -> list[DistillationLoss]:
    """Build the distillation loss as a list of one term; empty without a teacher. Every process holds the teacher
    whole. vocab: the model's."""
    if config.teacher is None:
        return []
    where = config.teacher.load
    require_same_tokenizer(where, tokenizer, config.model.load)
    term = build_distillation(config.teacher, config, ids=tokenizer.vocab_size, vocab=vocab, device=parallel.device)
    model = term.teacher.model
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    log(f"teacher: {where}, {family_of(model.config).name}-style, {count_parameters(model):,} parameters, {dtype}")
    return [term]


def build_distillation(
    teacher: TeacherConfig, config: LearnsFromTeacher, *, ids: int, vocab: int, device: torch.device
) -> DistillationLoss:
    """Load a teacher and build its distillation loss. ids: tokens of the tokenizer; vocab: rows of the model's
    vocabulary. A teacher whose vocabulary is padded like the model's teaches the padding too: a probability of about
    0."""
    where = teacher.load
    require_run_exists(where, "teacher.load", f"quest train pretrain --out {where}")
    auto = "bfloat16" if resolve_precision(config.precision, device).value == "bf16" else "float32"
    model = load(where, device=device, dtype=auto if teacher.dtype == "auto" else teacher.dtype, aligned=True)
    if not isinstance(model, Decoder):
        raise UsageError(f"teacher.load must name a language model; {where} is a {family_of(model.config).name}")
    if model.config.vocab_size < ids:
        remedy = "" if config.model.load else f": set tokenizer.load={where}"
        raise UsageError(f"the teacher {where} knows {model.config.vocab_size} tokens, this run has {ids}{remedy}")
    if config.sequence_length > model.config.max_position_embeddings:
        raise UsageError(
            f"sequence_length {config.sequence_length} is longer than the context of "
            f"{model.config.max_position_embeddings} of the teacher {where}; shorten the rows, or take another teacher"
        )
    shared_ids = vocab if vocab == model.config.vocab_size else ids
    term = DistillationLoss(
        model, weight=teacher.weight, beta=teacher.beta, temperature=teacher.temperature, vocab_size=shared_ids
    )
    term.require_vocab(vocab)
    return term


def require_same_tokenizer(name_or_path: str, tokenizer: Tokenizer, start: str | None) -> None:
    """Raise UsageError if the teacher has another tokenizer: its probabilities would be of other tokens. start: the
    model that the run starts from."""
    require_run_exists(name_or_path, "teacher.load", f"quest train pretrain --out {name_or_path}")
    theirs = load_tokenizer(name_or_path)
    if theirs.hash != tokenizer.hash:
        remedy = f"set tokenizer.load={name_or_path}" if start is None else "go on from a model trained with that one"
        raise UsageError(
            f"the teacher {name_or_path} has another tokenizer (of {theirs.vocab_size} tokens) than "
            f"{start or 'this run'} (of {tokenizer.vocab_size}), so its probabilities are of other tokens: {remedy}"
        )


def teacher_hash(terms: Sequence[DistillationLoss]) -> dict[str, str]:
    """A hash of the teacher's weights, which a resumed run may not change."""
    return {"teacher": weights_hash(terms[0].teacher.model)} if terms else {}
