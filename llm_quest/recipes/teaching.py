"""The key `teacher` of recipes that learn the next token: a model whose distributions are learned too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.build import count_parameters, page_of
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.distillation import Distillation
from llm_quest.recipes.choices import precision
from llm_quest.recipes.config import Strict
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


def taught(config: Pretrain | Sft, tokenizer: Tokenizer, parallel: Parallel, say: Say) -> list[Distillation]:
    """The term, if there is a teacher, which every process holds whole."""
    part = config.teacher
    if part is None:
        return []
    model = teacher(part, precision(config.precision, parallel.device).value, str(parallel.device))
    require_same_tokenizer(part.load, tokenizer, config.model.load)
    if config.batch.length > model.config.context:
        raise UsageError(
            f"batch.length {config.batch.length} is longer than the context of {model.config.context} of the teacher "
            f"{part.load}; shorten the rows, or take another teacher"
        )
    held = str(next(model.parameters()).dtype).removeprefix("torch.")
    say(f"teacher: {part.load}, {page_of(model.config).name}-style, {count_parameters(model):,} parameters, {held}")
    return [distillation(part, model, tokenizer.vocab_size)]


def teacher(part: Teaching, number: str, device: str) -> Decoder:
    """number: the run's precision."""
    if part.load.startswith("runs/") and not Path(part.load).is_dir():
        raise UsageError(f"there is no run {part.load}: train the teacher first, or give teacher.load=FOLDER")
    auto = "bfloat16" if number == "bf16" else "float32"
    model = load(part.load, device=device, dtype=auto if part.dtype == "auto" else part.dtype)
    if not isinstance(model, Decoder):
        raise UsageError(f"teacher.load must name a language model; {part.load} is a {page_of(model.config).name}")
    return model


def require_same_tokenizer(where: str, tokenizer: Tokenizer, start: str | None) -> None:
    """What a teacher says of token 17 is of use where 17 is the same token. start: the model that a run goes on
    from."""
    theirs = load_tokenizer(where)
    if theirs.hash != tokenizer.hash:
        remedy = f"set tokenizer.load={where}" if start is None else "go on from a model trained with that one"
        raise UsageError(
            f"the teacher {where} has another tokenizer (of {theirs.vocab_size} tokens) than {start or 'this run'} "
            f"(of {tokenizer.vocab_size}), so its probabilities are of other tokens: {remedy}"
        )


def distillation(part: Teaching, model: Decoder, ids: int) -> Distillation:
    return Distillation(model, weight=part.weight, beta=part.beta, temperature=part.temperature, ids=ids)


def teachers_hash(lessons: Sequence[Distillation]) -> dict[str, str]:
    """Of the weights, which a resumed run may not change."""
    return {"teacher": weights_hash(lessons[0].teacher.model)} if lessons else {}
