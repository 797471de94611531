"""Multi-token prediction added to any decoder (DeepSeek-V3, arXiv:2412.19437, section 2.2): modules of the family's own
block, each predicting one token further ahead (`layers/multi_token_prediction.py` shows the chain). The objective
trains them with a weight of its own; speculative decoding uses them; the model's own logits are unchanged.

Commonly got wrong: module k's state at t is paired with the token k + 1 further on, not with the next; modules have
the form of the model's last layer and weights of their own, drawn apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.initialize import copy_module
from llm_quest.layers.multi_token_prediction import MTPModule
from llm_quest.models.build import SkipInit, build_meta_model
from llm_quest.techniques.model_spec import Model, materialize_part, record_technique, require_decoder


@dataclass(frozen=True)
class MultiTokenPrediction:
    """Adds DeepSeek-V3's modules that predict further tokens. depth: how many modules. seed: of their initial
    values."""

    depth: int = 1
    seed: int = 0
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UsageError(f"depth {self.depth}: at least one module is added")

    def __call__(self, model: Model) -> Model:
        require_decoder(model, self)
        if len(model.mtp_modules):
            raise ValueError(f"this model has multi-token modules already ({len(model.mtp_modules)}): train those")
        for k in range(self.depth):
            model.mtp_modules.append(materialize_part(build_mtp_module(model.config), model, self.seed + k))
        return record_technique(model, self)


def build_mtp_module(config: Any) -> nn.Module:
    """One module like the family's last layer, on the meta device."""
    template = build_meta_model(config)
    embed_norm, hidden_norm, norm = (copy_module(template.norm) for _ in range(3))
    with torch.device("meta"), SkipInit():
        join = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
    return MTPModule(embed_norm=embed_norm, hidden_norm=hidden_norm, join=join, block=template.blocks[-1], norm=norm)
