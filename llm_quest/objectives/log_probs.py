"""Log-probabilities of given tokens, in two forms: `plain` (the definition) and `chunked` (no more than a few rows of
logits at a time, in the backward pass too). DPO, the policy-gradient family and evaluation all read these.

The entropy of the whole distribution, with its gradient, is for an entropy bonus; to *watch* entropy, the mean of -log
p over what was sampled is enough, and free.

      z = x W^T / temperature      log p = z[target] - logsumexp(z)      d log p / dz = onehot(target) - softmax(z)
      H = logsumexp(z) - sum_v p_v z_v

Commonly got wrong: (1) samples drawn at a temperature are scored at 1, and the ratio of a policy with itself is not 1;
(2) an off-by-one shift: here `targets[b, t]` is predicted *at* t, as everywhere in this package; (3) log-softmax in
bfloat16. Only the product with the head is in the model's dtype, as when sampling; all after it is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.layers.linear import autocast_dtype, disable_autocast, softcap_logits
from llm_quest.objectives.cross_entropy import CHUNK_ROWS, add_product_
from llm_quest.objectives.next_token import batch_hidden_states

MAX_FULL_LOGITS_BYTES = 4 * 2**20
"""Up to this size in bytes all logits are kept. Larger ones are computed again in parts, which is faster than reading
them: 4,096 rows at V 4096 took 0.31 s in parts against 0.43 (float32), 0.13 against 0.32 (bfloat16, docs/LOG.md)."""


def token_log_probs(model: Any, batch: TokenBatch, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """log p(targets[b, t] | what stands up to t), float32; exactly 0 where the target is -100, for which no logits are
    computed. Dropout follows the mode of the model."""
    return log_probs_from_hidden(model, batch_hidden_states(model, batch), batch.targets, temperature)


def log_probs_from_hidden(
    model: Any, h: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"], temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """`token_log_probs` from hidden states."""
    is_target = targets != IGNORE_INDEX
    x, head = h[is_target], model.head
    form = full_log_probs if x.shape[0] * head.weight.shape[0] * 4 <= MAX_FULL_LOGITS_BYTES else chunked_log_probs
    log_probs = form(x, head.weight, targets[is_target], head.softcap, temperature)
    return log_probs.new_zeros(targets.shape).masked_scatter(is_target, log_probs)


def full_log_probs(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    softcap: float | None,
    temperature: float,
) -> Float[Tensor, " N"]:
    """The definition."""
    z = logits_at_temperature(x, weight, softcap, temperature)
    return z.gather(1, targets[:, None]).squeeze(1) - z.logsumexp(dim=1)


def logits_at_temperature(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], softcap: float | None, temperature: float
) -> Float[Tensor, "N V"]:
    """z = softcap(x W^T) / temperature, at least float32."""
    return softcap_logits(at_least_float32(F.linear(x, weight)), softcap) / temperature


def chunked_log_probs(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """Log-probabilities in chunks; the backward pass computes the logits again. Differs from the definition in
    rounding."""
    return ChunkedLogProbs.apply(x, weight, targets, softcap, temperature)  # type: ignore[no-any-return, no-untyped-call]


class ChunkedLogProbs(torch.autograd.Function):
    """ROWS rows at a time, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, temperature: float
    ) -> Tensor:
        ctx.dtype = autocast_dtype(x) or x.dtype
        ctx.softcap, ctx.temperature = softcap, temperature
        ctx.save_for_backward(x, weight, targets)
        W = weight.to(ctx.dtype)
        with disable_autocast(x):
            parts = [
                full_log_probs(x_rows.to(ctx.dtype), W, t, softcap, temperature)
                for x_rows, t in zip(x.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
            ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, targets = ctx.saved_tensors
        W = weight.to(ctx.dtype)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(weight, dtype=upstream[0].dtype) if ctx.needs_input_grad[1] else None
        for first in range(0, x.shape[0], CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            x_rows = x[rows].to(ctx.dtype)
            g = (
                log_prob_gradient(x_rows, W, targets[rows], ctx.softcap, ctx.temperature)
                .mul_(upstream[0][rows, None])
                .to(ctx.dtype)
            )
            if dx is not None:
                dx[rows] = g @ W
            if dW is not None:
                add_product_(dW, g, x_rows)
        return dx, None if dW is None else dW.to(weight.dtype), None, None, None


def log_prob_gradient(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """d log p / d(x W^T), (N,V)."""
    z = at_least_float32(F.linear(x, weight))
    capped = None if softcap is None else torch.tanh(z / softcap)
    z = (z if softcap is None or capped is None else softcap * capped) / temperature
    g = z.softmax(dim=1).neg_()
    g[torch.arange(len(targets), device=g.device), targets] += 1
    g /= temperature
    return g if capped is None else g * (1 - capped**2)


def at_least_float32(z: Tensor) -> Tensor:
    """At least float32."""
    return z if z.dtype == torch.float64 else z.float()


def token_entropies(
    model: Any, h: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"], temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """In nats, at least float32; exactly 0 where the target is -100. No more than a few rows of logits are held."""
    learned, head = targets != IGNORE_INDEX, model.head
    parts = [
        checkpoint(head_entropy, x, head.weight, head.softcap, temperature, use_reentrant=False)
        for x in h[learned].split(CHUNK_ROWS)
    ]
    entropies = torch.cat(parts)
    return entropies.new_zeros(targets.shape).masked_scatter(learned, entropies)


def head_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], softcap: float | None, temperature: float
) -> Float[Tensor, " N"]:
    z = logits_at_temperature(x, weight, softcap, temperature)
    return z.logsumexp(dim=1) - (z.softmax(dim=1) * z).sum(dim=1)
