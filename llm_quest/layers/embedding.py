"""Token embeddings.

`embed(input_ids, scope, inputs_embeds=None)` -> (B,T,D). inputs_embeds (B,T,D), if given, replaces what
`embed.embed_tokens(input_ids)` would give: an image's vectors in place of its placeholders. Positions are added after.

Commonly got wrong: learned positions begin at 0 behind padding, in every row at another column; vectors of an image get
positions like words; a position beyond the table is an error, not the last one again.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.scope import Scope


class TokenEmbedding(nn.Module):
    """One learned vector per token, times `scale` (Gemma: sqrt(D), rounded to the weights' dtype as in the published
    code)."""

    def __init__(self, vocab_size: int, dim: int, *, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.token = nn.Embedding(vocab_size, dim)

    def embed_tokens(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = self.token(input_ids)
        return x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)

    def forward(
        self, input_ids: Int[Tensor, "B T"], scope: Scope, inputs_embeds: Float[Tensor, "B T D"] | None = None
    ) -> Float[Tensor, "B T D"]:
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds


class ScaledEmbedding(nn.Module):
    """An embedding times one learned number."""

    def __init__(self, base: nn.Module, scale: nn.Parameter):
        super().__init__()
        self.base = base
        self.scale = scale

    @property
    def token(self) -> nn.Embedding:
        """The wrapped embedding's table."""
        return self.base.token  # type: ignore[return-value]

    def embed_tokens(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.base.embed_tokens(input_ids)  # type: ignore[operator, no-any-return]

    def forward(
        self, input_ids: Int[Tensor, "B T"], scope: Scope, inputs_embeds: Float[Tensor, "B T D"] | None = None
    ) -> Float[Tensor, "B T D"]:
        x = self.base(input_ids, scope, inputs_embeds)
        return x * self.scale.to(x.dtype)


class TokenPositionEmbedding(nn.Module):
    """token(t) + position(p) (GPT-2). Padding (p = -1) reads position 0; no token sees it.

    Raises ValueError for a position beyond the table, where the host knows the positions."""

    def __init__(self, vocab_size: int, dim: int, max_position_embeddings: int, *, dropout: float = 0.0):
        super().__init__()
        self.max_position_embeddings = max_position_embeddings
        self.token = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_position_embeddings, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def embed_tokens(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.token(input_ids)  # type: ignore[no-any-return]

    def forward(
        self, input_ids: Int[Tensor, "B T"], scope: Scope, inputs_embeds: Float[Tensor, "B T D"] | None = None
    ) -> Float[Tensor, "B T D"]:
        if scope.max_seq_len is not None and scope.max_seq_len > self.max_position_embeddings:
            raise ValueError(
                f"position {scope.max_seq_len - 1} is beyond this model's {self.max_position_embeddings} learned "
                "positions: shorten the input or let the window slide"
            )
        position_ids = scope.position_ids[:1] if scope.is_unpadded else scope.position_ids
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return self.dropout(x + self.position(position_ids.clamp(min=0)))
