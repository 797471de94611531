"""The key `number_token` of recipes that learn the next token: how far off a number is counts too."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.objectives.number_token import DISTANCES, NumberTokenLoss, number_values
from llm_quest.recipes.choice import Choice
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import PositiveFloat


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
    """The term, if there is one."""
    if numbers is None:
        return []
    values = number_values(tokenizer, model.head.weight.shape[0], multi_digit=numbers.multi_digit)
    return [NumberTokenLoss(values, weight=numbers.weight, distance=numbers.distance)]
