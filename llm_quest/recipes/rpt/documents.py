"""The documents of RPT, for training and held out, and their keys: rows of text, or the problems of a task written out
with their answers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator

from llm_quest.contracts import LogFn
from llm_quest.data.problems import TASKS, Problem, SplitName, Task, draw_problem, parse_task
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole_documents import hash_documents
from llm_quest.errors import DataError
from llm_quest.recipes.assembly import load_text_data, source_name
from llm_quest.recipes.config_schema import ModelConfig, PositiveInt, TextDataConfig, TokenizerConfig
from llm_quest.recipes.policy import PolicyConfig
from llm_quest.recipes.row_source import Sources
from llm_quest.recipes.rpt.prompts import (
    PromptBuilder,
    PromptConfig,
    make_prompt_builder,
    max_document_length,
    split_documents,
)
from llm_quest.recipes.schema import LocalPath, StrictModel
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed

Documents = list[list[int]]
TOP_K_ENTROPY = 16
ENTROPY_THRESHOLDS = (0.5, 1.0, 1.5)
"""Easy, medium and hard begin here (RPT), in nats. The paper's sets are nested: hard is in medium too."""
NUM_HELD_OUT = 2000


class RptDataConfig(TextDataConfig):
    """The text whose tokens are to be predicted: what pretraining takes, or a task, whose problems and answers are
    written out as documents."""

    source: Sources = Field(
        default="registers", description="a task, options after a colon; or any text that `pretrain` reads"
    )
    num_documents: PositiveInt | None = Field(default=None, description="of a task: how many are drawn; null: 8000")
    max_document_tokens: PositiveInt | None = Field(
        default=None, description="tokens of a document that are read at once; null: as many as leave room to think"
    )

    @property
    def is_task(self) -> bool:
        return source_name(self).partition(":")[0] in TASKS

    @property
    def document_count(self) -> int:
        return self.num_documents or 8000

    @model_validator(mode="after")
    def check_source_keys(self) -> RptDataConfig:
        if self.is_task:
            parse_task(source_name(self))
        if not self.is_task and self.num_documents is not None:
            raise ValueError(
                f"data.num_documents has no effect on {source_name(self)}, whose documents are what they are: leave out"
            )
        if not self.is_task and not self.held_out and self.validation is None:
            raise ValueError("RPT is evaluated on held-out documents: give data.validation, or data.held_out above 0")
        for name in ("validation", "columns", "strict", "separator", "held_out", "eval_part") if self.is_task else ():
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"data.{name} has no effect on a task, whose content decides its splits; leave it out")
        return self


class PositionSelectionConfig(StrictModel):
    """Selection of places: those where a proxy is uncertain of the next token."""

    proxy_model: LocalPath | None = Field(
        default=None, description="a model's folder or run; null: the model as it began to think"
    )
    entropy_threshold: float = Field(
        default=ENTROPY_THRESHOLDS[0], ge=0, description="nats of entropy over the top_k most likely tokens"
    )
    top_k: int = Field(default=TOP_K_ENTROPY, ge=2, description="number of most likely tokens in the entropy")
    renormalize: bool = Field(default=True, description="those tokens' probabilities are made to sum to one")
    max_positions: PositiveInt | None = Field(default=None, description="keep so many places, drawn evenly; null: all")


class RptTextConfig(PolicyConfig):
    """The keys that decide which positions of which documents are prompts."""

    data: RptDataConfig = RptDataConfig()
    model: ModelConfig
    selection: PositionSelectionConfig = PositionSelectionConfig()
    prompt: PromptConfig = PromptConfig()
    eval_positions_per_bucket: PositiveInt = Field(
        default=150, description="held-out positions of each bucket (trivial, easy, medium, hard)"
    )


@dataclass(frozen=True)
class RptDocuments:
    """Documents with their start tokens, short enough for a completion, and the builder of their prompts. facts: about
    the text they are from, for the report."""

    train: Documents
    held_out: Documents
    prompt_builder: PromptBuilder
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        return hash_documents([*self.train, *self.held_out])


def split_problems(config: RptDataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Draw a task's training and held-out problems."""
    train, held_out = draw_splits(source_name(config), config.document_count, derive_seed(seed, "documents"))
    return list(train), list(held_out)


@functools.lru_cache(maxsize=2)
def draw_splits(name: str, number: int, seed: int) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Draw the splits of a task once for the checks, the warm-up and the run."""
    task = parse_task(name)
    train = unique_problems(task, "train", number, seed)
    return tuple(train), tuple(unique_problems(task, "validation", NUM_HELD_OUT, seed))


def load_documents(
    config: RptTextConfig, tokenizer: Tokenizer, context: int, parallel: DistributedContext, log: LogFn
) -> RptDocuments:
    """Load the documents of this run as this tokenizer's ids."""
    facts: Mapping[str, Any] = {}
    if config.data.is_task:
        train, held_out = (
            [encode_problem(one, tokenizer) for one in part] for part in split_problems(config.data, config.seed)
        )
    else:
        train, held_out, facts = documents_from_text(config, tokenizer, parallel, log)
    asking = make_prompt_builder(
        tokenizer,
        [*train, *held_out],
        prefix=config.prompt.prefix,
        suffix=config.prompt.suffix,
        max_target_tokens=config.prompt.max_target_tokens,
    )
    length = max_document_length(context, config.max_new_tokens, asking, config.data.max_document_tokens)
    return RptDocuments(
        split_documents(train, length, tokenizer.start_token_id),
        split_documents(held_out, length, tokenizer.start_token_id),
        asking,
        facts,
    )


def documents_from_text(
    config: RptTextConfig, tokenizer: Tokenizer, parallel: DistributedContext, log: LogFn
) -> tuple[Documents, Documents, Mapping[str, Any]]:
    """Load the documents of a text as pretraining does, in the model's own tokens, with facts about it."""
    text = load_text_data(config.data, TokenizerConfig(load=config.model.load), parallel, log)
    folder = text.tokens
    start, end = tokenizer.start_token_id, tokenizer.eos_token_id
    sides = folder.train, folder.val.eval_part(config.data.eval_part)
    train, held_out = ([[start, *map(int, ids), end] for ids in side.documents()] for side in sides)
    if not train or not held_out:
        raise DataError(
            f"{source_name(config.data)} holds too few documents to keep some of them out of training; add text"
        )
    return train, held_out, {"corpus": text.facts["corpus"]}


def unique_problems(task: Task, part: SplitName, number: int, seed: int = 0) -> list[Problem]:
    """The first `number` problems of a split, each content once: fewer, where the task has not so many."""
    by_key = {problem.key: problem for problem in (draw_problem(task, part, index, seed) for index in range(number))}
    return list(by_key.values())


def encode_problem(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    text = problem.prompt + problem.answer
    return [tokenizer.start_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
