"""The value loss of PPO (arXiv:1707.06347; its clipped form is that of the released code, see arXiv:2005.12729).

      L_t = max((v - G)^2, (clip(v, v_old - clip, v_old + clip) - G)^2) / 2        G: the return

Commonly got wrong: min where max is due, which takes the gradient away where the value moved towards its return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.objectives.next_token import batch_hidden_states
from llm_quest.techniques.value_head import find_value_model, values_from_hidden


@dataclass(frozen=True)
class ValueLoss:
    """The loss of a value head (PPO). coef: its weight beside the policy's loss. clip: how far v may move from v_old in
    one rollout; None: not bounded."""

    coef: float = 0.1
    clip: float | None = 0.2

    def __post_init__(self) -> None:
        if not self.coef > 0 or (self.clip is not None and not self.clip > 0):
            raise UsageError(f"a value loss of coef {self.coef} and clip {self.clip}: give numbers above 0")

    def values(self, model: Any, batch: Any, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
        """See `token_values`."""
        return token_values(model, batch, h)

    def __call__(
        self, values: Float[Tensor, "B T"], old_values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """coef L at every token, and where the clipped value was the worse one."""
        plain = (values - returns).square()
        if self.clip is None:
            return self.coef * plain / 2, torch.zeros_like(plain, dtype=torch.bool)
        clipped = (old_values + (values - old_values).clamp(-self.clip, self.clip) - returns).square()
        return self.coef * torch.maximum(plain, clipped) / 2, clipped > plain


def token_values(model: Any, batch: Any, h: Float[Tensor, "B T D"] | None = None) -> Float[Tensor, "B T"]:
    """The value of each position, before its target is written. h: the policy's hidden states, where they are known;
    a value model of its own is read in their place."""
    own = find_value_model(model)
    if own is not None or h is None:
        h = batch_hidden_states(model if own is None else own, batch)
    return values_from_hidden(model, h)
