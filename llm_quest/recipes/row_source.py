"""Keys of every `data` group of rows: their sources, their columns, and whether rows that cannot be used are
skipped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from llm_quest.data.conversation_forms import RowForm
from llm_quest.data.sources import absolute_source
from llm_quest.recipes.config import hold_nothing_out, parse_sources
from llm_quest.recipes.schema import StrictModel, did_you_mean

RowPath = Annotated[str, Field(min_length=1), AfterValidator(absolute_source)]


class SourceEntry(StrictModel):
    """One of several sources."""

    path: RowPath = Field(description="a file, a folder, hf:DATASET or FILE.py:FUNCTION")
    weight: float = Field(default=1.0, gt=0, description="how often each row is seen in an epoch")
    name: str | None = Field(default=None, description="of a data set of the hub: its configuration")
    split: str | None = Field(
        default=None, description="of a data set of the hub or of a folder; null: train, or the only one"
    )


Sources = Annotated[str | tuple[SourceEntry, ...], BeforeValidator(partial(parse_sources, SourceEntry))]
"""A source, or a list of sources with weights: [{path: a.jsonl, weight: 2}, b.jsonl]."""


class RowsConfig(StrictModel):
    """Keys of every `data` group of rows."""

    forms: ClassVar[Sequence[RowForm]] = ()
    source: Sources = Field(
        default="builtin",
        description="builtin, a file of rows, a folder, hf:DATASET, FILE.py:FUNCTION, or a list of them with weights",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="keys whose column has another name: {prompt: question, completion: reply}"
    )
    strict: bool = Field(default=False, description="true: rows that cannot be used stop the run; false: are left out")

    validation: Sources | None = Field(
        default=None, description="rows to evaluate on, in place of a part of source, all of which is then trained on"
    )
    eval_part: Literal["all", "dev", "test"] = Field(
        default="all", description="evaluate on all that is held out, or on one half of it: choose by dev, report test"
    )

    hold_nothing_out = model_validator(mode="before")(hold_nothing_out)

    @property
    def of_validation(self) -> Self:
        """The config of the rows to evaluate on."""
        return self.model_copy(update={"source": self.validation, "validation": None})

    @field_validator("columns")
    @classmethod
    def check_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        known = list(dict.fromkeys(key for form in cls.forms for key in (*form.keys, *form.optional)))
        for key in columns:
            if key not in known:
                raise ValueError(
                    f"no form of row has a key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}"
                )
        return columns
