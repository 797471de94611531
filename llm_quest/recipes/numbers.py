"""The key `number_token` of recipes that learn the next token: how far off a number is counts too."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.objectives.number_token import NumberToken, number_values
from llm_quest.recipes.config import Strict
from llm_quest.recipes.parts import Rate


class Numbers(Strict):
    """The Number Token Loss, added to the loss of the next token."""

    weight: Rate = Field(default=0.3, description="lambda; per learned token, not per number")
    distance: Literal["was", "mse"] = Field(
        default="was", description="was: expected distance; mse: of the expected value"
    )
    multi_digit: bool = Field(default=False, description="tokens of several digits are numbers too")


def beside(numbers: Numbers | None, tokenizer: Tokenizer, model: Any) -> list[NumberToken]:
    """The term, if there is one."""
    if numbers is None:
        return []
    values = number_values(tokenizer, model.head.weight.shape[0], multi_digit=numbers.multi_digit)
    return [NumberToken(values, weight=numbers.weight, distance=numbers.distance)]
