"""From tokens to vectors."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.scope import Scope


class TokenEmbedding(nn.Module):
    """One learned vector per token, times `scale` (Gemma: sqrt(width), rounded to the weights' dtype as its makers
    do)."""

    def __init__(self, vocab: int, width: int, *, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.token = nn.Embedding(vocab, width)

    def forward(self, tokens: Int[Tensor, "B T"], scope: Scope) -> Float[Tensor, "B T D"]:
        x = self.token(tokens)
        x = x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        return scope.fill(x)


class LearnedScale(nn.Module):
    """What an embedding gives times one learned number."""

    def __init__(self, base: nn.Module, scale: nn.Parameter):
        super().__init__()
        self.base = base
        self.scale = scale

    @property
    def token(self) -> nn.Embedding:
        """The table within."""
        return self.base.token  # type: ignore[return-value]

    def forward(self, tokens: Int[Tensor, "B T"], scope: Scope) -> Float[Tensor, "B T D"]:
        x = self.base(tokens, scope)
        return x * self.scale.to(x.dtype)


class LearnedPositions(nn.Module):
    """token(t) + position(p): GPT-2's. Padding (p = -1) reads position 0: nobody looks at it.

    Raises ValueError for a position beyond the table, where it is known without waiting for the device."""

    def __init__(self, vocab: int, width: int, context: int, *, dropout: float = 0.0):
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, tokens: Int[Tensor, "B T"], scope: Scope) -> Float[Tensor, "B T D"]:
        if scope.reach is not None and scope.reach > self.context:
            raise ValueError(
                f"position {scope.reach - 1} is beyond this model's {self.context} learned positions: "
                "shorten the input or let the window slide"
            )
        positions = scope.positions[:1] if scope.is_plain else scope.positions
        return self.dropout(scope.fill(self.token(tokens)) + self.position(positions.clamp(min=0)))
