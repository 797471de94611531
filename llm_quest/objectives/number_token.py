"""Number Token Loss (Zausinger et al. 2024, arXiv:2411.02083): cross-entropy ignores that 4 is nearer to 5 than 9
is. Where the target is a number token of value y, with p the softmax over the *number tokens alone* and v their
values,

      WAS   sum_j p_j |y - v_j|         the Wasserstein-1 distance of p to the target
      MSE   (y - sum_j p_j v_j)^2       a mixture of wrong digits may have the right mean, which WAS penalizes

It is an auxiliary term of next-token prediction: `NextTokenLoss(model, auxiliary=[NumberTokenLoss(values,
weight=0.3)])`. Only the logits of the number tokens are computed.

Differs: the paper averages over number tokens; here the sum is divided, as every term, by all learned tokens, so that
splitting a batch adds up: its lambda is ours times the share of numbers among the learned tokens.

Commonly got wrong: vocabularies are padded beyond the tokenizer; "inf" and "nan" parse as numbers; ids of digits are
not in the order of their values; without a number in the batch the term is 0, not NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.data.batch import TokenBatch
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.layers.linear import softcap_logits

Distance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""p (..., K), values (K,), y (...) -> (...)."""


def wasserstein(p: Float[Tensor, "*n K"], values: Float[Tensor, " K"], y: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return (p * (y[..., None] - values).abs()).sum(dim=-1)


def squared_error(p: Float[Tensor, "*n K"], values: Float[Tensor, " K"], y: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return (y - p @ values).square()


DISTANCES: dict[str, Distance] = {"was": wasserstein, "mse": squared_error}


class NumberTokenLoss(nn.Module):
    """An auxiliary term of next-token prediction. values (V,): the numeric value of each token, NaN for tokens without
    one (`number_values`); V is the model's vocabulary. weight: lambda. distance: a name in DISTANCES."""

    name, replaces = "number_token", 0.0

    def __init__(self, values: Float[Tensor, " V"], *, weight: float = 0.3, distance: str = "was"):
        super().__init__()
        if distance not in DISTANCES:
            raise UsageError(f"no number loss is called {distance!r}; known: {', '.join(DISTANCES)}")
        ids = (~values.isnan()).nonzero()[:, 0]
        if len(ids) < 2:
            raise UsageError(f"{len(ids)} of the vocabulary's tokens are numbers: there is no distance to learn")
        self.weight, self.distance, self.vocab_size = weight, DISTANCES[distance], values.shape[0]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("values", values[ids].float(), persistent=False)
        self.register_buffer("worth", values.float(), persistent=False)

    def forward(self, h: Float[Tensor, "B T D"], batch: TokenBatch, head: Any) -> tuple[Tensor, Tensor]:
        """The summed distance over number targets, and how many there are."""
        if head.weight.shape[0] != self.vocab_size:
            raise UsageError(f"the values are of {self.vocab_size} tokens, the model has {head.weight.shape[0]}")
        return self.distance_sum(softcap_logits(F.linear(h, head.weight[self.ids]), head.softcap), batch.targets)

    def distance_sum(self, logits: Float[Tensor, "B T K"], targets: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """From the logits of the number tokens."""
        y = torch.where(targets < 0, torch.nan, self.worth[targets.clamp(min=0)])  # type: ignore[index]
        is_number = ~y.isnan()
        p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        distance = self.distance(p, self.values.to(p), torch.where(is_number, y, 0.0).to(p))  # type: ignore[operator, arg-type]
        return (distance * is_number).sum(), is_number.sum(dtype=torch.float32)


def number_values(tokenizer: Tokenizer, vocab_size: int, *, multi_digit: bool = False) -> Float[Tensor, " V"]:
    """The numeric value of each token: single digits, with or without the space that byte-level and SentencePiece
    vocabularies write into them; multi_digit: longer ones too (GPT-2 has " 1984"). NaN for all others."""
    values = torch.full((vocab_size,), float("nan"))
    for token, number in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).items():
        digits = NUMBER.fullmatch(token)
        if digits is not None and (multi_digit or len(digits[1]) == 1):
            if number >= vocab_size:
                raise UsageError(f"the tokenizer's id {number} is beyond the vocabulary of {vocab_size}")
            values[number] = float(digits[1])
    return values


NUMBER = re.compile("[ Ġ▁]?([0-9]+)")
