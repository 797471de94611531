"""The output projection: from vectors to logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.layers.linear import Linear


class LMHead(Linear):
    """logits = x W^T, without bias; with a soft cap, cap * tanh(logits / cap). If tied, W is the token embedding
    itself: one parameter with two uses."""

    def __init__(
        self, dim: int, vocab_size: int, *, tied_embedding: nn.Embedding | None = None, softcap: float | None = None
    ):
        super().__init__(dim, vocab_size, bias=False, device="meta" if tied_embedding is not None else None)
        if tied_embedding is not None:
            self.weight = tied_embedding.weight
        self.softcap = softcap

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        logits = super().forward(x)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
