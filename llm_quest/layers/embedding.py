"""From tokens to vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.scope import Scope


class TokenEmbedding(nn.Module):
    """One learned vector per token, times `scale` (Gemma: sqrt(width), rounded to the weights' dtype as its makers
    do)."""

    def __init__(self, vocab_size: int, dim: int, *, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.token = nn.Embedding(vocab_size, dim)

    def forward(self, input_ids: Int[Tensor, "B T"], scope: Scope) -> Float[Tensor, "B T D"]:
        x = self.token(input_ids)
        x = x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        return scope.fill(x)


class ScaledEmbedding(nn.Module):
    """What an embedding gives times one learned number."""

    def __init__(self, base: nn.Module, scale: nn.Parameter):
        super().__init__()
        self.base = base
        self.scale = scale

    @property
    def token(self) -> nn.Embedding:
        """The table within."""
        return self.base.token  # type: ignore[return-value]

    def forward(self, input_ids: Int[Tensor, "B T"], scope: Scope) -> Float[Tensor, "B T D"]:
        x = self.base(input_ids, scope)
        return x * self.scale.to(x.dtype)


class TokenPositionEmbedding(nn.Module):
    """token(t) + position(p): GPT-2's. Padding (p = -1) reads position 0: nobody looks at it.

    Raises ValueError for a position beyond the table, where it is known without waiting for the device."""

    def __init__(self, vocab_size: int, dim: int, max_position_embeddings: int, *, dropout: float = 0.0):
        super().__init__()
        self.max_position_embeddings = max_position_embeddings
        self.token = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_position_embeddings, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, input_ids: Int[Tensor, "B T"], scope: Scope) -> Float[Tensor, "B T D"]:
        if scope.max_seq_len is not None and scope.max_seq_len > self.max_position_embeddings:
            raise ValueError(
                f"position {scope.max_seq_len - 1} is beyond this model's {self.max_position_embeddings} learned positions: "
                "shorten the input or let the window slide"
            )
        position_ids = scope.position_ids[:1] if scope.is_unpadded else scope.position_ids
        return self.dropout(scope.fill(self.token(input_ids)) + self.position(position_ids.clamp(min=0)))
