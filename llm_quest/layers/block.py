"""Blocks: how layers are stacked. Each layer is a branch beside a residual stream x:

Block          x = x + mixer(norm(x));  x = x + feed_forward(norm(x))
SingleBlock    x = x + layer(norm(x))                                      one sublayer (Mamba hybrids)
               x = x + mixer(y) + feed_forward(y),  y = norm(x)            its layer a ParallelLayers (Cohere)
               x = x + mixer(norm1(x)) + feed_forward(norm2(x))            the same with two norms (GPT-NeoX)

Commonly got wrong: in a plain block the feed-forward layer reads the stream with attention's output in it; of two
parallel branches Cohere's share one norm and GPT-NeoX's have a norm each.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.contracts import LayerCache, Mixer
from llm_quest.layers.kv_cache import NoCache
from llm_quest.layers.norm import Identity
from llm_quest.scope import Scope


class Residual:
    """x + branch(x). The branch is passed as a function, so that hyper-connections can replace it.
    Not a module: a module's call costs as much as a small operator of a decoded token."""

    def __call__(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return x + branch(x)


class Sublayer(nn.Module):
    """residual(x, post_norm(dropout(layer(norm(x), scope)))). post_norm: Identity but for families that normalize each
    layer's output too (Gemma)."""

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
        self.dropout = nn.Dropout(dropout) if dropout else Identity()
        self.post_norm = post_norm or Identity()
        self.residual: nn.Module | Residual = residual or Residual()

    def forward(self, x: Float[Tensor, "B T *streams D"], scope: Scope) -> Float[Tensor, "B T *streams D"]:
        return self.residual(x, lambda y: self.post_norm(self.dropout(self.layer(self.norm(y), scope))))

    def forward_first(
        self, x: Float[Tensor, "B T *streams D"], scope: Scope, num_queries: int
    ) -> Float[Tensor, "B N *streams D"]:
        """The sublayer at the first `num_queries` positions of a mixer's input; all positions are its keys. (A residual
        that mixes streams before the norm computes all positions.)"""
        if not isinstance(self.residual, Residual):
            return self(x, scope)[:, :num_queries]
        normed = self.norm(x)
        return self.residual(
            x[:, :num_queries],
            lambda y: self.post_norm(self.dropout(self.layer(normed, scope, num_queries=num_queries))),
        )

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> LayerCache:
        """The layer's cache; `NoCache` for a layer that works on each position alone."""
        if isinstance(self.layer, Mixer):
            return self.layer.new_cache(batch_size, capacity, max_rewind)
        return NoCache()


class Block(nn.Module):
    """Two sublayers in sequence: a mixer, then a feed-forward layer."""

    def __init__(self, mixer: Sublayer, feed_forward: Sublayer):
        super().__init__()
        self.mixer = mixer
        self.feed_forward = feed_forward

    def forward(
        self, x: Float[Tensor, "B T *streams D"], scope: Scope, num_queries: int | None = None
    ) -> Float[Tensor, "B N *streams D"]:
        """Run both sublayers. num_queries: compute the output of the first positions alone, where nothing reads the
        others."""
        return self.feed_forward(
            self.mixer(x, scope) if num_queries is None else self.mixer.forward_first(x, scope, num_queries), scope
        )

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Every sublayer, in order."""
        return (self.mixer, self.feed_forward)

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> LayerCache:
        """The mixer's cache."""
        return self.mixer.new_cache(batch_size, capacity, max_rewind)


class SingleBlock(nn.Module):
    """One sublayer: a mixer or a feed-forward layer alone, or both in parallel (`ParallelLayers`)."""

    def __init__(self, sublayer: Sublayer):
        super().__init__()
        self.sublayer = sublayer

    def forward(self, x: Float[Tensor, "B T *streams D"], scope: Scope) -> Float[Tensor, "B T *streams D"]:
        return self.sublayer(x, scope)

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The one sublayer."""
        return (self.sublayer,)

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> LayerCache:
        """The layer's cache."""
        return self.sublayer.new_cache(batch_size, capacity, max_rewind)


class ParallelLayers(nn.Module):
    """mixer(x) + feed_forward(x), both from the same normalized x (GPT-J; Cohere's Command R).

    mixer_norm, feed_forward_norm: norms of the two branches, where they have one each (GPT-NeoX); Identity elsewhere.
    """

    def __init__(
        self,
        mixer: nn.Module,
        feed_forward: nn.Module,
        *,
        mixer_norm: nn.Module | None = None,
        feed_forward_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.mixer_norm = mixer_norm or nn.Identity()
        self.mixer = mixer
        self.feed_forward_norm = feed_forward_norm or nn.Identity()
        self.feed_forward = feed_forward

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        return self.mixer(self.mixer_norm(x), scope) + self.feed_forward(self.feed_forward_norm(x), scope)

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> LayerCache:
        """The mixer's cache."""
        return self.mixer.new_cache(batch_size, capacity, max_rewind)  # type: ignore[operator, no-any-return]

    def rescale_logits_(self, gamma: Tensor, key_share: str = "query") -> None:
        """The mixer's."""
        self.mixer.rescale_logits_(gamma, key_share)  # type: ignore[operator]
