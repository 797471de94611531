"""Logit soft-capping on any model (Gemma 2, arXiv:2408.00118): attention scores and final logits s become cap * tanh(s
/ cap): bounded by the cap, and nearly unchanged where they are small.

Commonly got wrong: the attention cap comes before the mask; after it, a masked key would score -cap instead of -inf.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from llm_quest.errors import QuestWarning, UsageError
from llm_quest.layers.linear import LMHead
from llm_quest.techniques.model_spec import Model, attention_layers, record_technique, require_not_applied


@dataclass(frozen=True)
class SoftCap:
    """Bounds attention scores and logits by tanh. attention: cap of the scores, final: of the logits; None: not capped.
    Defaults: Gemma 2's."""

    attention: float | None = 50.0
    final: float | None = 30.0
    is_identity_at_init: ClassVar[bool] = False
    exportable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        caps = [cap for cap in (self.attention, self.final) if cap is not None]
        if not caps or min(caps) <= 0:
            raise UsageError(f"caps {self.attention} and {self.final}: give at least one, above 0")

    def __call__(self, model: Model) -> Model:
        require_not_applied(model, self)
        if self.final is not None:
            if not isinstance(model.head, LMHead):
                raise UsageError("the logits of classes are not capped: set final to null")
            if model.head.softcap is not None:
                raise UsageError(f"the model's logits are capped at {model.head.softcap} already: set final to null")
            model.head.softcap = self.final
        if self.attention is not None:
            mixers = attention_layers(model, self)
            if before := next((cap for mixer in mixers if (cap := mixer.attend.softcap) is not None), None):
                raise UsageError(f"the model's scores are capped at {before} already: set attention to null")
            for mixer in mixers:
                mixer.attend.softcap = self.attention
            warnings.warn(
                "softcap: attention runs in its explicit form, with every score in memory: the fused kernel has no cap",
                QuestWarning,
                stacklevel=2,
            )
        return record_technique(model, self)
