"""How layers are stacked: a block is a mixer and a feed-forward layer, each on its own branch beside the stream."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.scope import Scope


class Residual(nn.Module):
    """The plain residual, x + branch(x). It takes the branch as a function so that hyper-connections can take its
    place."""

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return x + branch(x)


class Sublayer(nn.Module):
    """residual(x, post_norm(dropout(layer(norm(x), scope)))). post_norm is Identity but for families that norm
    twice."""

    def __init__(
        self,
        norm: nn.Module,
        layer: nn.Module,
        *,
        post_norm: nn.Module | None = None,
        residual: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm = norm
        self.layer = layer
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.post_norm = post_norm or nn.Identity()
        self.residual = residual or Residual()

    def forward(self, x: Float[Tensor, "B T *streams D"], scope: Scope) -> Float[Tensor, "B T *streams D"]:
        return self.residual(x, lambda y: self.post_norm(self.dropout(self.layer(self.norm(y), scope))))

    def forward_first(
        self, x: Float[Tensor, "B T *streams D"], scope: Scope, num_queries: int
    ) -> Float[Tensor, "B N *streams D"]:
        """The same for so many first positions alone, of a mixer: it looks at all of them and answers for these. (Where
        the residual mixes streams before the norm, all are worked out.)"""
        if not isinstance(self.residual, Residual):
            return self(x, scope)[:, :num_queries]
        normed = self.norm(x)
        return self.residual(
            x[:, :num_queries],
            lambda y: self.post_norm(self.dropout(self.layer(normed, scope, num_queries=num_queries))),
        )


class Block(nn.Module):
    """A mixer moves information between positions, then a feed-forward layer works on each position."""

    def __init__(self, mixer: Sublayer, feed_forward: Sublayer):
        super().__init__()
        self.mixer = mixer
        self.feed_forward = feed_forward

    def forward(
        self, x: Float[Tensor, "B T *streams D"], scope: Scope, num_queries: int | None = None
    ) -> Float[Tensor, "B N *streams D"]:
        """num_queries: only so many first positions are read by what follows; no others are worked out."""
        return self.feed_forward(
            self.mixer(x, scope) if num_queries is None else self.mixer.forward_first(x, scope, num_queries), scope
        )
