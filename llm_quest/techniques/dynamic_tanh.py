"""Dynamic Tanh in place of every norm of the residual stream (Zhu et al. 2025, arXiv:2503.10622): before and after each
layer and at the end. Norms inside a layer (q/k norm, MLA's latents, the DeltaNet's) are part of that layer and stay.

The LLaMA form (their section 7.2): no bias; a larger alpha before attention than elsewhere, both smaller the wider the
model; a learned number after the embedding, sqrt(D) at first, without which large models do not converge; an output
matrix of its own.

Commonly got wrong: alpha is one number for a layer, not one per feature. The edited model is another model, to be
trained from the start: a trained model's logits are lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llm_quest.errors import UsageError
from llm_quest.layers.embedding import ScaledEmbedding, TokenEmbedding
from llm_quest.layers.norm import DynamicTanh, LayerNorm, RMSNorm, ZeroCenteredRMSNorm
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.techniques.model_spec import (
    Model,
    first_floating_parameter,
    materialize_part,
    record_technique,
    replace_module,
    require_decoder,
    require_not_applied,
)

Norm = RMSNorm | ZeroCenteredRMSNorm | LayerNorm
BRANCH_NORMS = (".layer.mixer_norm", ".layer.feed_forward_norm")
BEFORE_ATTENTION = ("mixer.norm", "mixer_norm", "sublayer.norm")
ALPHA_BY_DIM = {1024: (1.0, 1.0), 2048: (1.0, 0.5), 4096: (0.8, 0.2), 5120: (0.6, 0.15), 8192: (0.2, 0.05)}
"""The paper's table for the LLaMA form: width -> alpha before attention, alpha elsewhere. The nearest width counts."""


@dataclass(frozen=True)
class DyT:
    """Replaces every norm by a scaled tanh. form: plain or llama. alpha: the initial value of every alpha;
    attention_alpha: of those before attention; None: the paper's (plain: 0.5 for both)."""

    form: str = "plain"
    alpha: float | None = None
    attention_alpha: float | None = None
    is_identity_at_init: ClassVar[bool] = False
    exportable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.form not in ("plain", "llama"):
            raise UsageError(f"no form of DyT is called {self.form!r}; known: plain, llama")
        if any(value is not None and not value > 0 for value in (self.alpha, self.attention_alpha)):
            raise UsageError(f"alpha {self.alpha}, attention_alpha {self.attention_alpha}: both must be above 0")

    def __call__(self, model: Model) -> Model:
        require_not_applied(model, self)
        if self.form == "llama" or not isinstance(model, ImageEncoder):
            require_decoder(model, self)
        before_attention, elsewhere = self.initial_alphas(model.config.hidden_size)
        norms = {path: norm for path, norm in model.named_modules() if is_stream_norm(path, norm)}
        for path, norm in norms.items():
            start = before_attention if path.endswith(BEFORE_ATTENTION) else elsewhere
            replace_module(model, path, materialize_part(self.build_dynamic_tanh(norm.weight.shape[0], start), model))
        if self.form == "llama":
            add_learned_scale(model)
            untie_head(model)
        return record_technique(model, self)

    def initial_alphas(self, hidden_size: int) -> tuple[float, float]:
        """Initial values before attention and elsewhere."""
        nearest = min(ALPHA_BY_DIM, key=lambda known: abs(math.log(known / hidden_size)))
        attention, other = ALPHA_BY_DIM[nearest] if self.form == "llama" else (0.5, 0.5)
        given = self.alpha if self.attention_alpha is None else self.attention_alpha
        return (attention if given is None else given), (other if self.alpha is None else self.alpha)

    def build_dynamic_tanh(self, dim: int, alpha_init: float) -> nn.Module:
        with torch.device("meta"):
            return DynamicTanh(dim, alpha_init, bias=self.form == "plain")


def is_stream_norm(path: str, module: nn.Module) -> bool:
    """Is this a norm of the residual stream, not one inside a layer? (The norms of parallel branches are within the
    layer that holds both.)"""
    return isinstance(module, Norm) and (".layer." not in path or path.endswith(BRANCH_NORMS))


def add_learned_scale(model: Any) -> None:
    """Add the learned number after the embedding, such that its output is sqrt(D) times the table's vectors."""
    fixed_scale = model.embed.scale if isinstance(model.embed, TokenEmbedding) else 1.0
    start = first_floating_parameter(model).new_full((), model.config.hidden_size**0.5 / fixed_scale)
    model.embed = ScaledEmbedding(model.embed, nn.Parameter(start))


def untie_head(model: Any) -> None:
    """Give the head an output matrix of its own, with its present values."""
    if model.head.weight is model.embed.token.weight:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
