"""Policy gradient on what the policy wrote: GRPO and its family, one objective whose parts are chosen.

      loss = sum over tokens of w_t (-surrogate_t x corrections_t + beta KL_t - entropy H_t) / count

The aggregation is part of the algorithm: it is the choice of `count` and of the weights w that go with it. Everything
is a sum, so the split into micro-batches and processes changes nothing.

Commonly got wrong: a ratio that is not 1 before the first update, because the samples were drawn at another
temperature, with dropout, or at other positions than they are scored at. Here one engine samples and trains, and
`log_ratio` in the metrics says how true that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.data.policy_batch import PolicyBatch
from llm_quest.errors import UsageError
from llm_quest.objectives.attention_divergence import jensen_shannon, looks_in
from llm_quest.objectives.divergence import KL, k3
from llm_quest.objectives.entropy import entropies_of
from llm_quest.objectives.log_probs import log_probs_of
from llm_quest.objectives.next_token import hidden_of
from llm_quest.objectives.surrogates import VARIANTS, Surrogate, Terms, sequence_mean

Weights = Callable[[Bool[Tensor, "B T"]], Float[Tensor, "B T"]]


@dataclass(frozen=True)
class Correction:
    """Where the trainer's old log-probabilities are not the sampler's, w = pi_old / pi_sampled weighs each token (TIS,
    MIS). kind: truncate w at `limit`, or mask what lies above it. level: token; sequence, the product over the
    sequence, which grows with length; geometric, its length-normalised form."""

    limit: float = 2.0
    kind: str = "truncate"
    level: str = "token"

    def __post_init__(self) -> None:
        if self.kind not in ("truncate", "mask") or self.level not in ("token", "sequence", "geometric"):
            raise UsageError(
                f"no correction is called {self.kind}, {self.level}; known: truncate, mask; token, sequence, geometric"
            )

    def __call__(self, gap: Float[Tensor, "B T"], learn: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """gap: log pi_old - log pi_sampled."""
        if self.level == "sequence":
            gap = (gap * learn).sum(dim=1, keepdim=True).expand_as(gap)
        elif self.level == "geometric":
            gap = sequence_mean(gap, learn).expand_as(gap)
        w = gap.exp()
        return w.clamp(max=self.limit) if self.kind == "truncate" else w * (w <= self.limit)


def not_stale(terms: Terms, delta: float) -> Bool[Tensor, "B T"]:
    """Off-policy sequence mask (DeepSeek-V3.2): what has a negative advantage and has become less likely by more than
    delta nats a token, on average over the sequence, is left alone."""
    return (terms.advantages >= 0) | (sequence_mean(-terms.log_ratio, terms.learn) <= delta)


class PolicyGradient(nn.Module):
    """`PolicyGradient(model, surrogate, count=...)(batch) -> Loss`.

    count: what the loss is divided by (`WEIGHTS`), samples without an advantage included; horizon: the constant length
    that count "horizon" multiplies by. temperature: what the samples were drawn at. stale: delta of the off-policy
    sequence mask. entropy: coefficient of the bonus. looking: lambda of Reinforced Attention Learning
    (`attention_divergence`), for batches that hold looks and a model with one tap. The policy is put into evaluation
    mode and stays there: dropout between sampling and scoring makes the ratio wrong, and a backward that computes a
    block again must find the mode of the forward.

    metrics: ratio (before clipping), log_ratio (mean of its absolute value), clipped, kl (k3), and the batch's notes.
    `extremes` holds the smallest and largest ratio since it was last reset."""

    def __init__(
        self,
        model: nn.Module,
        surrogate: Surrogate = VARIANTS["grpo"].surrogate,
        *,
        count: str = "sequences",
        horizon: int | None = None,
        temperature: float = 1.0,
        kl: KL | None = None,
        entropy: float = 0.0,
        looking: float = 0.0,
        correction: Correction | None = None,
        stale: float | None = None,
    ):
        super().__init__()
        require_sense(count, horizon, entropy, temperature)
        self.model: Any = model
        self.surrogate, self.count, self.horizon, self.temperature = surrogate, count, horizon, temperature
        self.looking = looking
        self.kl, self.entropy, self.correction, self.stale = kl, entropy, correction, stale
        self.extremes = torch.ones(2)

    def forward(self, batch: PolicyBatch) -> Loss:
        if self.model.training:
            self.model.eval()
        records: dict[str, list[Any]] | None = {} if self.looking and batch.looks is not None else None
        h = hidden_of(self.model, batch, records)
        log_p = log_probs_of(self.model, h, batch.targets, self.temperature)
        entropies = entropies_of(self.model, h, batch.targets, self.temperature) if self.entropy else None
        looks = None if records is None else looks_in(records)
        return self.loss(log_p, batch, entropies, looks)

    def loss(
        self,
        log_p: Float[Tensor, "B T"],
        batch: PolicyBatch,
        entropies: Tensor | None = None,
        looks: Float[Tensor, "B T T"] | None = None,
    ) -> Loss:
        """The loss of given log-probabilities (and entropies, where there is a bonus; and looks, where they are
        learned)."""
        learn = batch.learn
        old = batch.sampled if batch.old is None else batch.old
        terms = Terms(log_p, (log_p - old) * learn, batch.advantages, learn)
        gain, held = self.surrogate(terms)
        per_token = -gain * self.weights(terms, batch)
        if self.kl is not None:
            per_token = per_token + self.kl(log_p, need(batch.reference), terms.log_ratio)
        if entropies is not None:
            per_token = per_token - self.entropy * entropies
        left = None if looks is None or batch.looks is None else jensen_shannon(looks, batch.looks)
        if left is not None:
            per_token = per_token + self.looking * batch.advantages * left
        w = WEIGHTS[self.count](learn)
        total = torch.where(learn, per_token * w, 0.0).sum()
        more = {} if left is None else {"attention_divergence": left}
        return Loss(total, self.counted(batch), self.metrics(terms, held, batch, entropies, more))

    def weights(self, terms: Terms, batch: PolicyBatch) -> Tensor:
        """What corrects for samples of another policy; the count stays what it was."""
        w = torch.ones_like(terms.log_p)
        if self.correction is not None:
            if batch.old is None:
                raise UsageError(
                    "the importance correction has no effect: the old log-probabilities are those that were sampled; "
                    "leave it out, or score the samples again (rollout.rescore=true)"
                )
            w = w * self.correction(batch.old - batch.sampled, terms.learn)
        if self.stale is not None:
            with torch.no_grad():
                w = w * not_stale(terms._replace(log_ratio=(terms.log_p - batch.sampled) * terms.learn), self.stale)
        return w

    def counted(self, batch: PolicyBatch) -> Tensor:
        """How many things were summed: tokens, or sequences that have any, those that add 0 and were not read too."""
        if batch.zero_rows and self.entropy:
            raise UsageError(
                f"{batch.zero_rows} samples without an advantage were left out of the batch, but the entropy bonus "
                "acts on them: give the rollouts read_all=True"
            )
        if self.count == "tokens":
            return batch.learn.sum(dtype=torch.float32) + batch.zero_tokens
        rows = batch.learn.any(dim=1).sum(dtype=torch.float32) + batch.zero_rows
        return rows * self.horizon if self.horizon is not None else rows

    @torch.no_grad()
    def metrics(
        self, terms: Terms, held: Tensor, batch: PolicyBatch, entropies: Tensor | None, more: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        learn = terms.learn
        tokens = learn.sum(dtype=torch.float32)
        ratio = torch.where(learn, terms.log_ratio, 0.0).exp()
        self.extremes = torch.stack(
            [
                torch.minimum(self.extremes[0].to(ratio), ratio.min()),
                torch.maximum(self.extremes[1].to(ratio), ratio.max()),
            ]
        )
        summed = {"ratio": ratio, "log_ratio": terms.log_ratio.abs(), "clipped": held.float(), **more}
        if batch.reference is not None:
            summed["kl"] = k3(terms.log_p, batch.reference, terms.log_ratio)
        if entropies is not None:
            summed["entropy_exact"] = entropies
        found = {name: (torch.where(learn, value, 0.0).sum(), tokens) for name, value in summed.items()}
        return found | {name: (tokens.new_tensor(a), tokens.new_tensor(b)) for name, (a, b) in batch.notes.items()}


def need(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise UsageError("the KL term needs log-probabilities of the reference policy: give the rollouts a reference")
    return reference


def require_sense(count: str, horizon: int | None, entropy: float, temperature: float) -> None:
    if count not in WEIGHTS:
        raise UsageError(f"no count is called {count!r}; known: {', '.join(WEIGHTS)}")
    if (horizon is None) == (count == "horizon"):
        raise UsageError(
            "count 'horizon' needs horizon=, the constant length: the budget of new tokens"
            if horizon is None
            else f"horizon={horizon} has no effect with count {count!r}; leave it out"
        )
    if entropy < 0:
        raise UsageError(f"entropy is {entropy}: a bonus is at least 0")
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature}: a policy that is trained has to be sampled, above 0")


def per_sequence(learn: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return learn / learn.sum(dim=1, keepdim=True).clamp(min=1)


def per_token(learn: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return learn.float()


WEIGHTS: dict[str, Weights] = {
    "sequences": per_sequence,  # mean over sequences of means over tokens: GRPO, GSPO, SAPO
    "tokens": per_token,  # all tokens weigh the same: DAPO, CISPO
    "horizon": per_token,  # sequences x a constant length: Dr. GRPO
    "sums": per_token,  # mean over sequences of sums over tokens
}
