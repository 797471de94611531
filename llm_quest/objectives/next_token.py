"""Next-token prediction, the objective of pretraining: sum over tokens of -log p(token t+1 | tokens <= t).

Captioning and visual question answering are the same with an image before the text: -log p(token t+1 | image,
tokens <= t). The question, the image placeholders and the padding have no loss, and no logits are computed for them.

Commonly got wrong: held-out losses count neither tokens for the balancing of experts nor the loss of extra modules;
what a teacher's distribution replaces is taken from the cross-entropy, not added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.data.batch import IGNORE_INDEX, SharedPrefix, TokenBatch
from llm_quest.errors import UsageError
from llm_quest.layers.moe import RouterOutput
from llm_quest.layers.multi_token_prediction import shift_left, shift_position_ids
from llm_quest.objectives.cross_entropy import CROSS_ENTROPY_FORMS, linear_cross_entropy
from llm_quest.objectives.routing import ROUTER_LOSSES, ROUTING_METRICS, accumulate_tokens_per_expert
from llm_quest.scope import Scope

if TYPE_CHECKING:
    from llm_quest.data.image_text import ImageTextBatch


class AuxiliaryLoss(Protocol):
    """A module that adds a term to the main loss, from hidden states h (B,T,D), the batch, head -> a sum and how many
    things were summed. It is added times `weight`, and reported as `name`. replaces: the part of the main loss whose
    place it takes."""

    name: str
    weight: float
    replaces: float

    def __call__(self, h: Tensor, batch: TokenBatch, head: Any) -> tuple[Tensor, Tensor]: ...


class NextTokenLoss(nn.Module):
    """`NextTokenLoss(model)(batch) -> Loss`: total in nats, count = learned tokens.

    form: how the cross-entropy is computed (`CROSS_ENTROPY_FORMS`); auto takes the one that fits size and device.
    router_coefs: names in `routing.ROUTER_LOSSES` -> coefficient, added for models with routers, each weighed by the
    batch's tokens. mtp_weight: lambda of the multi-token loss (DeepSeek-V3 eq. 24-25), for models with such modules:
    lambda/K sum_k of module k's loss, all over the main loss's count, as the paper divides; 0 leaves the modules out
    (evaluation). auxiliary: further terms (`number_token.NumberTokenLoss`, `distillation.DistillationLoss`); their sums
    are divided by the main loss's count too, so that a batch's halves add up. What is added to the main loss stands
    among the metrics, and then the main loss itself, as "next_token".

    Splitting a batch adds exactly, but for the router's terms: they are products of averages over the micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        form: str = "auto",
        router_coefs: Mapping[str, float] | None = None,
        mtp_weight: float = 0.3,
        auxiliary: Sequence[AuxiliaryLoss] = (),
    ):
        super().__init__()
        if form not in ("auto", *CROSS_ENTROPY_FORMS):
            raise UsageError(f"no form of the loss is called {form!r}; known: auto, {', '.join(CROSS_ENTROPY_FORMS)}")
        unknown = set(router_coefs or {}) - set(ROUTER_LOSSES)
        if unknown:
            raise UsageError(
                f"no router loss is called {', '.join(sorted(unknown))}; known: {', '.join(ROUTER_LOSSES)}"
            )
        self.model: Any = model
        self.form = form
        self.router_coefs = dict(router_coefs or {})
        self.mtp_weight = mtp_weight
        self.auxiliary = nn.ModuleList(auxiliary)  # type: ignore[arg-type]
        self.main_weight = 1.0 - sum(term.replaces for term in auxiliary)
        if self.main_weight < 0:
            raise UsageError(
                f"the terms beside the main loss take its place {1 - self.main_weight:g} times; lower their weights"
            )

    def forward(self, batch: TokenBatch) -> Loss:
        records: dict[str, list[Any]] = {}
        scope = batch_scope(batch, records)
        h = self.model.hidden_states(batch.input_ids, scope)
        main_loss = self.main_loss(h, batch.targets)
        count = (batch.targets != IGNORE_INDEX).sum(dtype=torch.float32)
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        if self.has_auxiliary_terms:
            metrics["next_token"] = (main_loss.detach(), count)
        total = self.main_weight * main_loss
        for term in self.auxiliary:
            term_total, term_count = term(h, batch, self.model.head)
            metrics[term.name] = (term_total.detach(), term_count)  # type: ignore[index]
            total = total + term.weight * term_total  # type: ignore[operator]
        if self.mtp_weight:
            total = total + self.mtp_loss(h, batch, scope, metrics)
        routings: list[RouterOutput] = records.get("routing", [])
        if routings:
            total = total + self.router_loss(routings, count, metrics)
        return Loss(total, count, metrics)

    @property
    def has_auxiliary_terms(self) -> bool:
        """Whether anything is added to the main loss."""
        return (
            bool(self.router_coefs)
            or len(self.auxiliary) > 0
            or (self.mtp_weight > 0 and len(self.model.mtp_modules) > 0)
        )

    def main_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """The main loss; without gradient where an auxiliary term replaces it."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.main_weight > 0):
            return self.cross_entropy(h, targets)

    def cross_entropy(self, h: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of these hidden states (B,T,D) and targets (B,T)."""
        head = self.model.head
        return linear_cross_entropy(h.flatten(0, 1), head.weight, targets.flatten(), self.form, head.softcap)

    def mtp_loss(self, h: Tensor, batch: TokenBatch, scope: Scope, metrics: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """lambda / K times the sum of the multi-token modules' losses."""
        total, modules = h.new_zeros((), dtype=torch.float32), self.model.mtp_modules
        for k, module in enumerate(modules, start=1):
            shifted_scope = Scope(shift_position_ids(scope, k), segment_ids=scope.segment_ids, records=scope.records)
            h = module(h, self.model.embed(shift_left(batch.input_ids, k, 0), shifted_scope), shifted_scope)
            targets = shift_left(batch.targets, k, IGNORE_INDEX).masked_fill(
                shifted_scope.position_ids < 0, IGNORE_INDEX
            )
            loss = self.cross_entropy(h, targets)
            metrics[f"lookahead_{k}"] = (loss.detach(), (targets != IGNORE_INDEX).sum(dtype=torch.float32))
            total = total + loss * (self.mtp_weight / len(modules))
        return total

    def router_loss(
        self, routings: list[RouterOutput], count: Tensor, metrics: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The router losses; the loads are recorded for the callback that balances after the step."""
        if self.model.training:
            accumulate_tokens_per_expert(routings)
        for name, metric in ROUTING_METRICS.items():
            metrics[name] = (metric(routings).detach() * count, count)
        terms = {name: ROUTER_LOSSES[name](routings) for name in self.router_coefs}
        metrics |= {name: (term.detach() * count, count) for name, term in terms.items()}
        return sum((self.router_coefs[name] * term for name, term in terms.items()), start=count.new_zeros(())) * count


def batch_scope(batch: TokenBatch, records: dict[str, list[Any]] | None = None) -> Scope:
    """The scope of a batch: plain rows, or positions and segments as the batch has them."""
    if batch.position_ids is None:
        return Scope.unpadded(batch.input_ids, records=records)
    return Scope(batch.position_ids, segment_ids=batch.segment_ids, records=records)


def batch_hidden_states(model: Any, batch: Any, records: dict[str, list[Any]] | None = None) -> Tensor:
    """The hidden states that the head reads (B,T,D). Prefixes that rows share are computed once, into a cache from
    which every row continues: the same values and gradients as if each row were computed in full. records: of plain
    rows, what `Scope.records` is."""
    prefix: SharedPrefix | None = batch.prefix
    if prefix is None:
        return model.hidden_states(batch.input_ids, batch_scope(batch, records))  # type: ignore[no-any-return]
    assert records is None, "rows that share their beginnings leave no record of them"
    cache = model.new_cache(prefix.input_ids.shape[0], prefix.reach)
    model.hidden_states(
        prefix.input_ids, Scope(prefix.position_ids, cache=cache, max_seq_len=prefix.input_ids.shape[1])
    )
    cache.batch_select_indices(prefix.prefix_index)
    scope = Scope(batch.position_ids, cache=cache, max_seq_len=prefix.reach)
    return model.hidden_states(batch.input_ids, scope)  # type: ignore[no-any-return]


class CaptioningLoss(nn.Module):
    """`CaptioningLoss(model)(batch) -> Loss`: total in nats, count = learned tokens. model: a VisionLanguage. metrics:
    none."""

    def __init__(self, model: nn.Module, *, form: str = "auto"):
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, batch: ImageTextBatch) -> Loss:
        x = self.model.hidden_states(batch.input_ids, image_features=self.encode_images(batch.images))  # type: ignore[operator]
        head = self.model.head
        targets = batch.targets.flatten()
        learned = targets != IGNORE_INDEX
        total = linear_cross_entropy(x.flatten(0, 1)[learned], head.weight, targets[learned], self.form, head.softcap)  # type: ignore[union-attr, arg-type]
        return Loss(total, learned.sum(dtype=torch.float32), {})

    def encode_images(self, images: Tensor | tuple[Tensor, ...]) -> Tensor | list[Tensor]:
        """The features of a batch of images, or of each where they are of several sizes."""
        encode: Any = self.model.get_image_features
        return encode(images) if isinstance(images, Tensor) else [encode(image[None])[0] for image in images]  # type: ignore[no-any-return]
