"""The decoder: embed, enter, blocks, leave, norm, head. Final: families differ by what fills its slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from llm_quest.contracts import Card
from llm_quest.layers.cache import Cache
from llm_quest.layers.projections import row_splits
from llm_quest.models.generation import GenerationDefaults
from llm_quest.scope import Scope


class Decoder(nn.Module):
    """`model(tokens (B,T), scope=None) -> logits (B,T,V)`; the promises are in `contracts.Decoder`.

    embed(tokens, scope) -> (B,T,D). enter, leave: widen and close the stream (Identity but for hyper-connections). Each
    of `blocks` is called with the scope as its layer sees it. head: after the projection it may cap the logits.
    lookahead: multi-token prediction modules, read by their objective and by drafting alone."""

    def __init__(
        self,
        card: Card,
        *,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        head: nn.Module,
        enter: nn.Module | None = None,
        leave: nn.Module | None = None,
        lookahead: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self.card = card
        self.embed = embed
        self.enter = enter or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.leave = leave or nn.Identity()
        self.norm = norm
        self.head = head
        self.lookahead = nn.ModuleList(lookahead)
        self.generation: GenerationDefaults | None = None

    @property
    def config(self) -> Any:
        """The numbers this model was assembled from."""
        return self.card.config

    def forward(self, tokens: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T V"]:
        return self.head(self.hidden(tokens, scope))

    def hidden(self, tokens: Int[Tensor, "B T"], scope: Scope | None = None) -> Float[Tensor, "B T D"]:
        """What the head reads: the last block's output after the final norm."""
        scope = Scope.plain(tokens) if scope is None else scope
        x = self.enter(self.embed(tokens, scope))
        for layer, block in enumerate(self.blocks):
            x = block(x, scope.at(layer))
        return self.norm(self.leave(x))

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> Cache:
        """An empty cache for `batch` rows and positions below `capacity`; windowed layers can take back `slack`
        tokens."""
        parts = [block.mixer.layer.new_cache(batch, capacity, slack) for block in self.blocks]  # type: ignore[union-attr, operator]
        return Cache(parts, batch, capacity)

    def row_splits(self) -> dict[str, tuple[int, ...]]:
        """Parameters that are several matrices stacked by rows, and how many rows each has (Muon works on each
        alone)."""
        return row_splits(self)
