"""ValueHead: one number at every position, v = h w + b: how much reward the rest of the text is expected to bring. PPO
(arXiv:1707.06347) trains it beside the policy, on the same trunk.

It begins at 0, so that the first advantages are those of the rewards alone. The model's logits are unchanged; `quest
export` leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.techniques.model_spec import Model, record_technique, require_decoder, require_not_applied


@dataclass(frozen=True)
class ValueHead:
    """Adds `model.value_head`, of which the objective of PPO reads `values_from_hidden`."""

    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        require_not_applied(model, self)
        like = next(model.parameters())
        model.value_head = nn.Linear(model.config.hidden_size, 1, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            model.value_head.weight.zero_()
            model.value_head.bias.zero_()
        return record_technique(model, self)


def find_value_head(model: Any) -> ValueHead | None:
    """The ValueHead in the model's spec."""
    return next((one for one in model.spec.techniques if isinstance(one, ValueHead)), None)


def values_from_hidden(model: Any, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
    """The value at each position, at least float32."""
    values = model.value_head(h).squeeze(-1)
    return values if values.dtype == torch.float64 else values.float()


def remove_value_head(model: Model) -> Model:
    """The model without its value head, and without it in its spec."""
    if (head := find_value_head(model)) is not None:
        del model.value_head
        model.spec = replace(model.spec, techniques=tuple(one for one in model.spec.techniques if one is not head))
    return model
