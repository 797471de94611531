"""The key `teacher` of recipes that learn the next token: a model whose distributions are learned too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.build import count_parameters, family_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import PositiveFloat, UnitFraction
from llm_quest.recipes.reference_model import weights_hash
from llm_quest.recipes.run import require_run_exists
from llm_quest.train.parallel import DistributedContext

LogFn = Callable[[str], None]


class TeacherConfig(StrictModel):
    """A teacher of the same tokenizer: loss = (1 - weight) cross-entropy + weight divergence."""

    load: str = Field(min_length=1, description="a run folder, a Hugging Face folder or a hub id")
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
    """What distillation reads of a recipe's config."""

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
    """The term, if there is a teacher, which every process holds whole. vocab: the model's."""
    if config.teacher is None:
        return []
    where = config.teacher.load
    require_same_tokenizer(where, tokenizer, config.model.load)
    term = build_distillation(config.teacher, config, ids=tokenizer.vocab_size, vocab=vocab, device=parallel.device)
    model = term.teacher.model
    held = str(next(model.parameters()).dtype).removeprefix("torch.")
    log(f"teacher: {where}, {family_of(model.config).name}-style, {count_parameters(model):,} parameters, {held}")
    return [term]


def build_distillation(
    teacher: TeacherConfig, config: LearnsFromTeacher, *, ids: int, vocab: int, device: torch.device
) -> DistillationLoss:
    """The term itself. ids: how many tokens the tokenizer has; vocab: how many the model knows. A teacher whose
    vocabulary is padded as the model's is has learned that padding never comes, and teaches it."""
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
    """What a teacher says of token 17 is of use where 17 is the same token. start: the model that a run goes on
    from."""
    require_run_exists(name_or_path, "teacher.load", f"quest train pretrain --out {name_or_path}")
    theirs = load_tokenizer(name_or_path)
    if theirs.hash != tokenizer.hash:
        remedy = f"set tokenizer.load={name_or_path}" if start is None else "go on from a model trained with that one"
        raise UsageError(
            f"the teacher {name_or_path} has another tokenizer (of {theirs.vocab_size} tokens) than "
            f"{start or 'this run'} (of {tokenizer.vocab_size}), so its probabilities are of other tokens: {remedy}"
        )


def teacher_hash(terms: Sequence[DistillationLoss]) -> dict[str, str]:
    """Of the weights, which a resumed run may not change."""
    return {"teacher": weights_hash(terms[0].teacher.model)} if terms else {}
