"""Next-token prediction, the objective of pretraining: sum over tokens of -log p(token t+1 | tokens <= t)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.data.prefix import Prefix
from llm_quest.errors import UsageError
from llm_quest.layers.moe import Routing
from llm_quest.layers.multi_token import ahead, positions_ahead
from llm_quest.objectives.cross_entropy import FORMS, cross_entropy
from llm_quest.objectives.routing import METRICS, TERMS, note_loads
from llm_quest.scope import Scope


class Beside(Protocol):
    """A module that adds to the main loss, from what the head reads: h (B,T,D), the batch, head -> a sum and how many
    things were summed. It is added times `weight`, and reported as `name`. replaces: the part of the main loss whose
    place it takes."""

    name: str
    weight: float
    replaces: float

    def __call__(self, h: Tensor, batch: TokenBatch, head: Any) -> tuple[Tensor, Tensor]: ...


class NextToken(nn.Module):
    """`NextToken(model)(batch) -> Loss`: total in nats, count = learned tokens.

    form: how the cross-entropy is computed (`cross_entropy.FORMS`); auto takes the one that fits size and device.
    router: names in `routing.TERMS` -> coefficient, added for models with routers, each weighed by the batch's tokens.
    lookahead: lambda of the multi-token loss (DeepSeek-V3 eq. 24-25), for models with such modules: lambda / K * sum_k
    of module k's loss, all over the main loss's count, as the paper divides; 0 leaves the modules out (evaluation).
    beside: further terms (`number_token.NumberToken`, `distillation.Distillation`); their sums are divided by the main
    loss's count too, so that a batch's halves add up.
    What is added to the main loss stands among the metrics, and then the main loss itself, as "next_token".

    Splitting a batch adds exactly, but for the router's terms: they are products of averages over the micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        form: str = "auto",
        router: Mapping[str, float] | None = None,
        lookahead: float = 0.3,
        beside: Sequence[Beside] = (),
    ):
        super().__init__()
        if form not in ("auto", *FORMS):
            raise UsageError(f"no form of the loss is called {form!r}; known: auto, {', '.join(FORMS)}")
        unknown = set(router or {}) - set(TERMS)
        if unknown:
            raise UsageError(f"no router loss is called {', '.join(sorted(unknown))}; known: {', '.join(TERMS)}")
        self.model: Any = model
        self.form = form
        self.router = dict(router or {})
        self.lookahead = lookahead
        self.beside = nn.ModuleList(beside)  # type: ignore[arg-type]
        self.own = 1.0 - sum(term.replaces for term in beside)
        if self.own < 0:
            raise UsageError(
                f"the terms beside the main loss take its place {1 - self.own:g} times; lower their weights"
            )

    def forward(self, batch: TokenBatch) -> Loss:
        records: dict[str, list[Any]] = {}
        scope = scope_of(batch, records)
        h = self.model.hidden(batch.tokens, scope)
        main = self.main(h, batch.targets)
        count = (batch.targets != IGNORE).sum(dtype=torch.float32)
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if self.adds:
            metrics["next_token"] = (main.detach(), count)
        total = self.own * main
        for term in self.beside:
            added, counted = term(h, batch, self.model.head)
            metrics[term.name] = (added.detach(), counted)  # type: ignore[index]
            total = total + term.weight * added  # type: ignore[operator]
        if self.lookahead:
            total = total + self.multi_token(h, batch, scope, metrics)
        routings: list[Routing] = records.get("routing", [])
        if routings:
            total = total + self.balance(routings, count, metrics)
        return Loss(total, count, metrics)

    @property
    def adds(self) -> bool:
        """Is anything added to the main loss?"""
        return bool(self.router) or len(self.beside) > 0 or (self.lookahead > 0 and len(self.model.lookahead) > 0)

    def main(self, h: Tensor, targets: Tensor) -> Tensor:
        """The main loss; where something else stands in its place it is looked at and not learned."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.own > 0):
            return self.cross_entropy(h, targets)

    def cross_entropy(self, h: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of these hidden states (B,T,D) and targets (B,T)."""
        head = self.model.head
        return cross_entropy(h.flatten(0, 1), head.weight, targets.flatten(), self.form, head.cap)

    def multi_token(
        self, h: Tensor, batch: TokenBatch, scope: Scope, metrics: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """lambda / K times the sum of the lookahead modules' losses."""
        total, modules = h.new_zeros((), dtype=torch.float32), self.model.lookahead
        for k, module in enumerate(modules, start=1):
            further = Scope(positions_ahead(scope, k), segments=scope.segments, records=scope.records)
            h = module(h, self.model.embed(ahead(batch.tokens, k, 0), further), further)
            targets = ahead(batch.targets, k, IGNORE).masked_fill(further.positions < 0, IGNORE)
            loss = self.cross_entropy(h, targets)
            metrics[f"lookahead_{k}"] = (loss.detach(), (targets != IGNORE).sum(dtype=torch.float32))
            total = total + loss * (self.lookahead / len(modules))
        return total

    def balance(self, routings: list[Routing], count: Tensor, metrics: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The router's terms; the loads are noted for whoever balances after the step."""
        if self.model.training:
            note_loads(routings)
        for name, measure in METRICS.items():
            metrics[name] = (measure(routings).detach() * count, count)
        terms = {name: TERMS[name](routings) for name in self.router}
        metrics |= {name: (term.detach() * count, count) for name, term in terms.items()}
        return sum((self.router[name] * term for name, term in terms.items()), start=count.new_zeros(())) * count


def scope_of(batch: TokenBatch, records: dict[str, list[Any]] | None = None) -> Scope:
    """What the tokens of a batch may see: plain rows, or what positions and segments say."""
    if batch.positions is None:
        return Scope.plain(batch.tokens, records=records)
    return Scope(batch.positions, segments=batch.segments, records=records)


def hidden_of(model: Any, batch: Any, records: dict[str, list[Any]] | None = None) -> Tensor:
    """What the head reads at a batch's tokens (B,T,D). Beginnings that rows share are read once, into a cache, from
    which every row goes on: the same numbers, and the same gradients, as if each were read in full. records: of plain
    rows, what `Scope.records` is."""
    prefix: Prefix | None = batch.prefix
    if prefix is None:
        return model.hidden(batch.tokens, scope_of(batch, records))  # type: ignore[no-any-return]
    assert records is None, "rows that share their beginnings leave no record of them"
    cache = model.new_cache(prefix.tokens.shape[0], prefix.reach)
    model.hidden(prefix.tokens, Scope(prefix.positions, cache=cache, reach=prefix.tokens.shape[1]))
    cache.keep(prefix.of)
    scope = Scope(batch.positions, cache=cache, reach=prefix.reach)
    return model.hidden(batch.tokens, scope)  # type: ignore[no-any-return]
