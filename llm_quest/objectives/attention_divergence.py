"""Reinforced Attention Learning (arXiv:2602.04884): a policy-gradient loss on attention. Attention of
answers better than their group is kept; attention of worse answers is changed:

      L = sum_t A_t JSD(p_t || p_old_t)        p_t(j) = mean over heads of the attention of token t to j < t

p_t excludes the token itself and is normalized to 1. JSD is the Jensen-Shannon divergence, 0 to ln 2.

Commonly got wrong: at p = p_old it has neither value nor gradient, so it acts from the second update of a batch on; the
diagonal must go before the row is renormalized; fused kernels do not return attention weights (`AttentionTaps` computes
them in the tapped layer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.contracts import Loss
from llm_quest.data.policy_batch import PolicyBatch
from llm_quest.errors import UsageError
from llm_quest.scope import Scope


def attention_policy(weights: Float[Tensor, "B H T T"]) -> Float[Tensor, "B T T"]:
    """The attention distribution of each token: mean over heads, without itself, normalized to 1. The first token of a
    row sees only itself: its row is 0."""
    mean_weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).mean(dim=1)
    others = mean_weights.masked_fill(
        torch.eye(mean_weights.shape[-1], dtype=torch.bool, device=mean_weights.device), 0.0
    )
    return others / others.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(others.dtype).tiny)


def jensen_shannon(p: Float[Tensor, "*rows S"], q: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows"]:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats. Where p is 0 it adds nothing, and no NaN to the
    gradient."""
    m = (p + q) / 2
    return (kl_divergence(p, m) + kl_divergence(q, m)) / 2


def kl_divergence(p: Tensor, m: Tensor) -> Tensor:
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp(min=tiny).log() - m.clamp(min=tiny).log())).sum(dim=-1)


@dataclass(frozen=True)
class AttentionPolicyBatch:
    """Rows sampled by a policy with the attention of their tokens at that time, old_attention (B,T,T)
    (`attention_policy`)."""

    rows: PolicyBatch
    old_attention: Float[Tensor, "B T T"]

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    def to(self, device: torch.device | str) -> AttentionPolicyBatch:
        return AttentionPolicyBatch(self.rows.to(device), self.old_attention.to(device))


class AttentionDivergenceLoss(nn.Module):
    """`AttentionDivergenceLoss(model)(batch) -> Loss`: the sum over learned tokens of A_t JSD_t, count = learned
    tokens. Added, times lambda, to a policy gradient over the same tokens. The model has one tap (`AttentionTaps`).

    metrics: divergence, the mean JSD."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, batch: AttentionPolicyBatch) -> Loss:
        if self.model.training:
            self.model.eval()
        current = compute_attention_policy(self.model, batch.rows.input_ids)
        return attention_divergence_loss(current, batch.old_attention, batch.rows)


def attention_divergence_loss(current: Float[Tensor, "B T T"], old: Float[Tensor, "B T T"], rows: PolicyBatch) -> Loss:
    """The loss from attention distributions."""
    learn = rows.loss_mask
    count = learn.sum(dtype=torch.float32)
    per_token = torch.where(learn, jensen_shannon(current, old), 0.0)
    return Loss((rows.advantages * per_token).sum(), count, {"divergence": (per_token.detach().sum(), count)})


def compute_attention_policy(model: Any, input_ids: Tensor) -> Float[Tensor, "B T T"]:
    """The attention distributions of plain rows at the tap of the model."""
    records: dict[str, list[Any]] = {}
    model.hidden_states(input_ids, Scope.unpadded(input_ids, records=records))
    return read_attention_policy(records)


def read_attention_policy(records: dict[str, list[Any]]) -> Float[Tensor, "B T T"]:
    """The attention that the one tap of a pass recorded."""
    tapped = records.get("attention", [])
    if len(tapped) != 1:
        raise UsageError(
            f"the model has {len(tapped)} attention taps; this needs one, on the layer whose attention is learned: "
            "Taps((-1,))(model)"
        )
    return attention_policy(tapped[0].weights)
