"""The key `teacher` of recipes that learn the next token: a model whose distributions are learned too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.build import count_parameters, page_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.distillation import Distillation
from llm_quest.recipes.choices import precision
from llm_quest.recipes.config import Strict
from llm_quest.recipes.course import require_run
from llm_quest.recipes.parts import Rate, Share
from llm_quest.recipes.reference import weights_hash
from llm_quest.train.parallel import Parallel

if TYPE_CHECKING:
    from llm_quest.recipes.pretrain_config import Pretrain
    from llm_quest.recipes.tuning_config import Sft

Say = Callable[[str], None]


class Teaching(Strict):
    """A teacher of the same tokenizer: loss = (1 - weight) cross-entropy + weight divergence."""

    load: str = Field(min_length=1, description="a run folder, a Hugging Face folder or a hub id")
    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="of the divergence from the teacher; the cross-entropy has the rest"
    )
    beta: Share = Field(
        default=0.0, description="0: KL(teacher || model), 1: KL(model || teacher), between: Jensen-Shannon"
    )
    temperature: Rate = Field(default=1.0, description="of both distributions")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="how the teacher is held; auto: bfloat16 where the run's precision is bf16"
    )


def taught(
    config: Pretrain | Sft, tokenizer: Tokenizer, vocab: int, parallel: Parallel, say: Say
) -> list[Distillation]:
    """The term, if there is a teacher, which every process holds whole. vocab: the model's."""
    if config.teacher is None:
        return []
    where = config.teacher.load
    require_same_tokenizer(where, tokenizer, config.model.load)
    term = lesson(config.teacher, config, ids=tokenizer.vocab_size, vocab=vocab, device=parallel.device)
    model = term.teacher.model
    held = str(next(model.parameters()).dtype).removeprefix("torch.")
    say(f"teacher: {where}, {page_of(model.config).name}-style, {count_parameters(model):,} parameters, {held}")
    return [term]


def lesson(part: Teaching, config: Pretrain | Sft, *, ids: int, vocab: int, device: torch.device) -> Distillation:
    """The term itself. ids: how many tokens the tokenizer has; vocab: how many the model knows. A teacher whose
    vocabulary is padded as the model's is has learned that padding never comes, and teaches it."""
    where = part.load
    require_run(where, "teacher.load", f"quest train pretrain --out {where}")
    auto = "bfloat16" if precision(config.precision, device).value == "bf16" else "float32"
    model = load(where, device=device, dtype=auto if part.dtype == "auto" else part.dtype, aligned=True)
    if not isinstance(model, Decoder):
        raise UsageError(f"teacher.load must name a language model; {where} is a {page_of(model.config).name}")
    if model.config.vocab < ids:
        remedy = "" if config.model.load else f": set tokenizer.load={where}"
        raise UsageError(f"the teacher {where} knows {model.config.vocab} tokens, this run has {ids}{remedy}")
    if config.batch.length > model.config.context:
        raise UsageError(
            f"batch.length {config.batch.length} is longer than the context of {model.config.context} of the teacher "
            f"{where}; shorten the rows, or take another teacher"
        )
    counted = vocab if vocab == model.config.vocab else ids
    term = Distillation(model, weight=part.weight, beta=part.beta, temperature=part.temperature, ids=counted)
    term.require_vocab(vocab)
    return term


def require_same_tokenizer(where: str, tokenizer: Tokenizer, start: str | None) -> None:
    """What a teacher says of token 17 is of use where 17 is the same token. start: the model that a run goes on
    from."""
    require_run(where, "teacher.load", f"quest train pretrain --out {where}")
    theirs = load_tokenizer(where)
    if theirs.hash != tokenizer.hash:
        remedy = f"set tokenizer.load={where}" if start is None else "go on from a model trained with that one"
        raise UsageError(
            f"the teacher {where} has another tokenizer (of {theirs.vocab_size} tokens) than {start or 'this run'} "
            f"(of {tokenizer.vocab_size}), so its probabilities are of other tokens: {remedy}"
        )


def teachers_hash(lessons: Sequence[Distillation]) -> dict[str, str]:
    """Of the weights, which a resumed run may not change."""
    return {"teacher": weights_hash(lessons[0].teacher.model)} if lessons else {}
