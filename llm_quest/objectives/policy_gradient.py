"""Policy-gradient loss on sampled completions: GRPO and its variants, one objective with exchangeable parts.

      loss = sum over tokens of w_t (-surrogate_t x corrections_t + beta KL_t - entropy H_t) / count

The aggregation is part of the algorithm: it is the choice of `count` and of the weights w that go with it. Everything
is a sum, so the split into micro-batches and processes changes nothing.

Commonly got wrong: a ratio that is not 1 before the first update, because the samples were drawn at another
temperature, with dropout, or at other positions than they are scored at. Here one engine samples and trains, and
`log_ratio` in the metrics says how true that is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.data.policy_batch import PolicyBatch
from llm_quest.errors import UsageError
from llm_quest.objectives.attention_divergence import jensen_shannon, read_attention_policy
from llm_quest.objectives.kl_penalty import KLPenalty, k3
from llm_quest.objectives.log_probs import log_probs_from_hidden, token_entropies
from llm_quest.objectives.next_token import batch_hidden_states
from llm_quest.objectives.surrogates import POLICY_VARIANTS, Surrogate, SurrogateInputs, sequence_mean

if TYPE_CHECKING:
    from llm_quest.objectives.value_loss import ValueLoss

TokenWeights = Callable[[Bool[Tensor, "B T"]], Float[Tensor, "B T"]]


@dataclass(frozen=True)
class ImportanceSamplingCorrection:
    """Where the trainer's old log-probabilities are not the sampler's, w = pi_old / pi_sampled weighs each token (TIS,
    MIS). mode: truncate w at `cap`, or mask what lies above it. level: token; sequence, the product over the sequence,
    which grows with length; geometric, its length-normalized form."""

    cap: float = 2.0
    mode: str = "truncate"
    level: str = "token"

    def __post_init__(self) -> None:
        for name, table in ((self.mode, CORRECTION_MODES), (self.level, CORRECTION_LEVELS)):
            if name not in table:
                raise UsageError(f"no correction is called {name!r}; known: {', '.join(table)}")

    def __call__(self, log_ratio: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """log_ratio: log pi_old - log pi_sampled."""
        w = CORRECTION_LEVELS[self.level](log_ratio, loss_mask).expand_as(log_ratio).exp()
        return CORRECTION_MODES[self.mode](w, self.cap)


CORRECTION_MODES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "truncate": lambda w, cap: w.clamp(max=cap),
    "mask": lambda w, cap: w * (w <= cap),
}
CORRECTION_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio, loss_mask: log_ratio,
    "sequence": lambda log_ratio, loss_mask: (log_ratio * loss_mask).sum(dim=1, keepdim=True),
    "geometric": sequence_mean,
}


def off_policy_mask(terms: SurrogateInputs, delta: float) -> Bool[Tensor, "B T"]:
    """Off-policy sequence mask (DeepSeek-V3.2): sequences with a negative advantage whose likelihood fell by more than
    delta nats a token, on average over the sequence, are masked."""
    return (terms.advantages >= 0) | (sequence_mean(-terms.log_ratio, terms.loss_mask) <= delta)


class PolicyGradientLoss(nn.Module):
    """`PolicyGradientLoss(model, surrogate, count=...)(batch) -> Loss`.

    count: what the loss is divided by (`TOKEN_WEIGHTS`), samples without an advantage included; horizon: the constant
    length that count "horizon" multiplies by. temperature: what the samples were drawn at. off_policy_delta: delta of
    the off-policy sequence mask. entropy_coef: coefficient of the bonus. attention_coef: lambda of Reinforced Attention
    Learning (`attention_divergence_loss`), for batches with attention maps and a model with one tap. value_loss: of
    PPO, for batches with values and returns and a model with a value head. The policy is put into evaluation mode and
    stays there: dropout between sampling and scoring makes the ratio wrong, and a backward that computes a block again
    must find the mode of the forward.

    metrics: ratio (before clipping), log_ratio (mean of its absolute value), clipped, kl (k3), and the metrics of the
    batch. `ratio_range` holds the smallest and largest ratio since it was last reset."""

    def __init__(
        self,
        model: nn.Module,
        surrogate: Surrogate = POLICY_VARIANTS["grpo"].surrogate,
        *,
        count: str = "sequences",
        horizon: int | None = None,
        temperature: float = 1.0,
        kl: KLPenalty | None = None,
        entropy_coef: float = 0.0,
        attention_coef: float = 0.0,
        correction: ImportanceSamplingCorrection | None = None,
        off_policy_delta: float | None = None,
        value_loss: ValueLoss | None = None,
    ):
        super().__init__()
        check_loss_options(count, horizon, entropy_coef, temperature)
        self.model: Any = model
        self.surrogate, self.count, self.horizon, self.temperature = surrogate, count, horizon, temperature
        self.attention_coef, self.value_loss = attention_coef, value_loss
        self.kl, self.entropy_coef, self.correction, self.off_policy_delta = (
            kl,
            entropy_coef,
            correction,
            off_policy_delta,
        )
        self.ratio_range: Tensor
        self.register_buffer("ratio_range", torch.ones(2))  # which a checkpoint holds

    def forward(self, batch: PolicyBatch) -> Loss:
        if self.model.training:
            self.model.eval()
        records: dict[str, list[Any]] | None = {} if self.attention_coef and batch.attention_maps is not None else None
        with nullcontext() if batch.routing is None else replay_batch_routing(self.model, batch.routing):
            h = batch_hidden_states(self.model, batch, records)
        log_p = log_probs_from_hidden(self.model, h, batch.targets, self.temperature)
        entropies = token_entropies(self.model, h, batch.targets, self.temperature) if self.entropy_coef else None
        attention = None if records is None else read_attention_policy(records)
        values = None if self.value_loss is None else self.value_loss.values(self.model, batch, h)
        return self.loss(log_p, batch, entropies, attention, values)

    def loss(
        self,
        log_p: Float[Tensor, "B T"],
        batch: PolicyBatch,
        entropies: Tensor | None = None,
        attention: Float[Tensor, "B T T"] | None = None,
        values: Float[Tensor, "B T"] | None = None,
    ) -> Loss:
        """The loss of given log-probabilities (and entropies, with a bonus; attention, with attention_coef; values,
        with a value loss)."""
        loss_mask = batch.loss_mask
        old = batch.sampler_log_probs if batch.old_log_probs is None else batch.old_log_probs
        terms = SurrogateInputs(log_p, (log_p - old) * loss_mask, batch.advantages, loss_mask)
        objective, clipped = self.surrogate(terms)
        per_token = -objective * self.weights(terms, batch)
        if self.kl is not None:
            per_token = per_token + self.kl(log_p, require_reference(batch.reference_log_probs), terms.log_ratio)
        if entropies is not None:
            per_token = per_token - self.entropy_coef * entropies
        attention_jsd = (
            None
            if attention is None or batch.attention_maps is None
            else jensen_shannon(attention, batch.attention_maps)
        )
        if attention_jsd is not None:
            per_token = per_token + self.attention_coef * batch.advantages * attention_jsd
        extra_metrics = {} if attention_jsd is None else {"attention_divergence": attention_jsd}
        if values is not None:
            value_loss, value_metrics = self.value_terms(values, batch)
            per_token, extra_metrics = per_token + value_loss, extra_metrics | value_metrics
        token_weights = TOKEN_WEIGHTS[self.count](loss_mask)
        total = torch.where(loss_mask, per_token * token_weights, 0.0).sum()
        return Loss(total, self.loss_count(batch), self.metrics(terms, clipped, batch, entropies, extra_metrics))

    def value_terms(self, values: Tensor, batch: PolicyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The value loss of every token, and what is reported of it."""
        assert self.value_loss is not None
        assert batch.values is not None, "rollouts have values (GAE)"
        assert batch.returns is not None, "values come with their returns"
        each, clipped = self.value_loss(values, batch.values, batch.returns)
        error = (values.detach() - batch.returns).square()
        return each, {"value/error": error, "value/mean": values.detach(), "value/clipped": clipped.float()}

    def weights(self, terms: SurrogateInputs, batch: PolicyBatch) -> Tensor:
        """Weights that correct for samples of another policy; the count does not change."""
        w = torch.ones_like(terms.log_p)
        if self.correction is not None:
            if batch.old_log_probs is None:
                raise UsageError(
                    "the importance correction has no effect: the old log-probabilities are those that were sampled; "
                    "leave it out, or score the samples again (sampler_correction={})"
                )
            w = w * self.correction(batch.old_log_probs - batch.sampler_log_probs, terms.loss_mask)
        if self.off_policy_delta is not None:
            with torch.no_grad():
                w = w * off_policy_mask(
                    terms._replace(log_ratio=(terms.log_p - batch.sampler_log_probs) * terms.loss_mask),
                    self.off_policy_delta,
                )
        return w

    def loss_count(self, batch: PolicyBatch) -> Tensor:
        """The number of summands: tokens, or sequences with any, including those that add 0 and were not computed."""
        if batch.zero_rows and self.entropy_coef:
            raise UsageError(
                f"{batch.zero_rows} samples without an advantage were left out of the batch, but the entropy bonus "
                "acts on them: give the rollouts read_all=True"
            )
        if self.count == "tokens":
            return batch.loss_mask.sum(dtype=torch.float32) + batch.zero_tokens
        rows = batch.loss_mask.any(dim=1).sum(dtype=torch.float32) + batch.zero_rows
        return rows * self.horizon if self.horizon is not None else rows

    @torch.no_grad()
    def metrics(
        self,
        terms: SurrogateInputs,
        clipped: Tensor,
        batch: PolicyBatch,
        entropies: Tensor | None,
        extra_metrics: dict[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        loss_mask = terms.loss_mask
        tokens = loss_mask.sum(dtype=torch.float32)
        ratio = torch.where(loss_mask, terms.log_ratio, 0.0).exp()
        self.ratio_range = torch.stack(
            [
                torch.minimum(self.ratio_range[0].to(ratio), ratio.min()),
                torch.maximum(self.ratio_range[1].to(ratio), ratio.max()),
            ]
        )
        summed = {"ratio": ratio, "log_ratio": terms.log_ratio.abs(), "clipped": clipped.float(), **extra_metrics}
        if batch.reference_log_probs is not None:
            summed["kl"] = k3(terms.log_p, batch.reference_log_probs, terms.log_ratio)
        if entropies is not None:
            summed["entropy_exact"] = entropies
        metrics = {name: (torch.where(loss_mask, value, 0.0).sum(), tokens) for name, value in summed.items()}
        return metrics | {
            name: (tokens.new_tensor(a), tokens.new_tensor(b)) for name, (a, b) in batch.metric_sums.items()
        }


def replay_batch_routing(model: Any, routing: Tensor) -> AbstractContextManager[None]:
    """Inside, a pass over the batch takes the experts of its rollout."""
    from llm_quest.layers.router_replay import replay_routing

    return replay_routing(model, routing)


def require_reference(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise UsageError("the KL term needs log-probabilities of the reference policy: give the rollouts a reference")
    return reference


def check_loss_options(count: str, horizon: int | None, entropy: float, temperature: float) -> None:
    if count not in TOKEN_WEIGHTS:
        raise UsageError(f"no count is called {count!r}; known: {', '.join(TOKEN_WEIGHTS)}")
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


def weigh_per_sequence(loss_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return loss_mask / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)


def weigh_per_token(loss_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return loss_mask.float()


TOKEN_WEIGHTS: dict[str, TokenWeights] = {
    "sequences": weigh_per_sequence,  # mean over sequences of means over tokens: GRPO, GSPO, SAPO
    "tokens": weigh_per_token,  # all tokens weigh the same: DAPO, CISPO
    "horizon": weigh_per_token,  # sequences x a constant length: Dr. GRPO
    "sums": weigh_per_token,  # mean over sequences of sums over tokens
}
