"""The chat template of a recipe: its file, its arguments, and the date that it writes."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.template_program import find_reserved_argument
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.recipes.auto import recorded_config
from llm_quest.recipes.recipe import Context
from llm_quest.recipes.schema import LocalPath, StrictModel


class ChatTemplateConfig(StrictModel):
    """The chat template by which conversations become text."""

    chat_template_path: LocalPath | None = Field(
        default=None, min_length=1, description="a file with a chat template, in place of the model's own"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the chat template, such as {enable_thinking: false}"
    )
    chat_template_date: str | None = Field(
        default=None,
        pattern=r"^\d{4}-\d{2}-\d{2}$",
        description="the date given to a template that writes one, YYYY-MM-DD; null: the day the run begins",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def check_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        """ValueError for an argument that every template is given anyway."""
        if name := find_reserved_argument(given):
            raise ValueError(f"{name!r} is given to every chat template; leave it out")
        return given

    @field_validator("chat_template_date")
    @classmethod
    def check_date(cls, given: str | None) -> str | None:
        """ValueError for a date that does not exist."""
        if given is not None:
            datetime.date.fromisoformat(given)
        return given


def open_chat_template(config: ChatTemplateConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The recipe's chat template on a tokenizer."""
    return ChatTemplate(
        tokenizer,
        load_chat_template_file(config),
        chat_template_kwargs=config.chat_template_kwargs,
        now=config.chat_template_date or "",
    )


def load_chat_template_file(config: ChatTemplateConfig) -> str | None:
    """The text of the template file, where one is named."""
    if config.chat_template_path is None:
        return None
    try:
        return Path(config.chat_template_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data.chat_template_path {config.chat_template_path} cannot be read: {error}") from None


def fix_template_date(config: Any, context: Context, tokenizer: Tokenizer | None = None) -> Any:
    """Set the date of a chat template that writes one to the day of the run's start, so that a run that is resumed on
    another day has the same rows. config: of a recipe whose `data` may have a chat template. tokenizer: None before the
    model is read, and the date is then fixed in any case."""
    data = config.data
    if not isinstance(data, ChatTemplateConfig) or data.chat_template_date is not None:
        return config
    if tokenizer is not None and "strftime_now" not in (load_chat_template_file(data) or tokenizer.chat_template or ""):
        return config
    recorded = recorded_config(config, context)
    before = recorded.data.chat_template_date if recorded is not None and recorded.data is not None else None
    today = context.parallel.broadcast(before or datetime.date.today().isoformat())
    if tokenizer is not None:
        context.log(f"the chat template writes the date: {today} in the whole run")
    return config.model_copy(update={"data": data.model_copy(update={"chat_template_date": today})})
