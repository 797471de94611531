"""ValueHead: one number at every position, v = h w + b: how much reward the rest of the text is expected to bring. PPO
(arXiv:1707.06347) trains it beside the policy: on the policy's own trunk, or on a value model of its own, which takes
as much memory again, and whose errors do not move the policy.

It begins at 0, so that the first advantages are those of the rewards alone; on a reward model as the value model, with
its score. The model's logits are unchanged; `quest export` leaves both out.

Commonly got wrong: a head that begins elsewhere than at 0 gives the first advantages its own noise; adding it must not
change the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.errors import DataError, UsageError
from llm_quest.models import FAMILIES
from llm_quest.models.build import build_meta_model, family_of
from llm_quest.models.decoder import Decoder
from llm_quest.techniques.model_spec import (
    Model,
    first_floating_parameter,
    materialize_part,
    record_technique,
    require_decoder,
    require_not_applied,
)
from llm_quest.techniques.score_head import ScoreHead


@dataclass(frozen=True)
class ValueHead:
    """Adds `model.value_head`. value_model: the family and the config.json of a value model, which is then
    `model.value_model` and which the head reads in place of the model; None: the head reads the model itself."""

    value_model: Mapping[str, Any] | None = None
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        own: Any = None if self.value_model is None else materialize_part(build_value_model(self.value_model), model)
        return add_value_head(model, self, own)


def build_value_model(described: Mapping[str, Any]) -> Decoder:
    """A value model without memory, from its family and config.json."""
    family = next((one for one in FAMILIES if one.name == described.get("family")), None)
    if family is None:
        raise DataError(f"the value model is of the family {described.get('family')!r}, which is not known")
    return remove_output_head(build_meta_model(family.read(described["config"])))


def remove_output_head(model: Decoder) -> Decoder:
    model.head = nn.Identity()
    return model


def attach_value_model(model: Model, own: Decoder) -> Model:
    """The model with `own` as its value model, all of which is trained. A reward model's score is where the head
    begins. UsageError for a model whose config alone does not describe it."""
    scores = [
        technique for technique in own.spec.techniques if isinstance(technique, ScoreHead) and technique.outputs == 1
    ]
    others = [technique for technique in own.spec.techniques if technique not in scores and not technique.exportable]
    if others:
        raise UsageError(
            f"value_model: a model with {type(others[0]).__name__} cannot be the value model; give value_model.load of "
            "a model without it"
        )
    head: Any = own.head
    family, weight = family_of(own.config), head.weight.detach().clone() if scores else None
    described = {"family": family.name, "config": family.publish(own.config)}
    own = remove_output_head(own).requires_grad_(True)
    add_value_head(model, ValueHead(described), own)
    if weight is not None:
        with torch.no_grad():
            model.value_head.weight.copy_(weight)
    return model


def add_value_head(model: Model, technique: ValueHead, own: Decoder | None) -> Model:
    """The head, which begins at 0, and the value model that it reads."""
    require_decoder(model, technique)
    require_not_applied(model, technique)
    like, width = first_floating_parameter(model), (own or model).config.hidden_size
    model.value_head = nn.Linear(width, 1, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        model.value_head.weight.zero_()
        model.value_head.bias.zero_()
    if own is not None:
        model.value_model = own.to(like.device).train(model.training)
    return record_technique(model, technique)


def find_value_head(model: Any) -> ValueHead | None:
    """The ValueHead in the model's spec."""
    return next((technique for technique in model.spec.techniques if isinstance(technique, ValueHead)), None)


def find_value_model(model: Any) -> Decoder | None:
    """The value model of its own, if the model has one."""
    return getattr(model, "value_model", None)


def values_from_hidden(model: Any, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
    """The value at each position, at least float32. h: hidden states of the value model, or of a model without one."""
    values = model.value_head(h).squeeze(-1)
    return values if values.dtype == torch.float64 else values.float()


def remove_value_head(model: Model) -> Model:
    """The model without its value head and value model, and without them in its spec."""
    if (head := find_value_head(model)) is not None:
        del model.value_head
        if find_value_model(model) is not None:
            del model.value_model
        model.spec = replace(
            model.spec, techniques=tuple(technique for technique in model.spec.techniques if technique is not head)
        )
    return model
