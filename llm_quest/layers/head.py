"""From vectors back to tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.layers.linear import Linear


class Unembed(Linear):
    """logits = x W^T, no bias; with a cap, cap * tanh(logits / cap). Tied: W is the token embedding itself, one
    parameter with two uses."""

    def __init__(self, width: int, vocab: int, *, tied: nn.Embedding | None = None, cap: float | None = None):
        super().__init__(width, vocab, bias=False, device="meta" if tied is not None else None)
        if tied is not None:
            self.weight = tied.weight
        self.cap = cap

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        logits = super().forward(x)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
