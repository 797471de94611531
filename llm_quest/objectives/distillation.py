"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): the student learns the teacher's whole distribution
over the next token instead of the one token of the text. With p the teacher's softmax(logits / temperature) and q the
student's, at every learned token (GKD, Agarwal et al. 2024, arXiv:2306.13649, eq. 1):

      beta = 0      KL(p || q)                                  q covers all that p finds likely
      beta = 1      KL(q || p)                                  q keeps to what p finds likely
      between       beta KL(p || m) + (1 - beta) KL(q || m)     m = beta p + (1 - beta) q

It is an auxiliary term of next-token prediction and replaces the same share of the main loss:
`NextTokenLoss(model, auxiliary=[DistillationLoss(teacher, weight=0.5)])` has half of each. The logits of both models
and their gradient

      dD/dz = (q - p) / temperature                             beta = 0
      dD/dz = q (a - sum q a) / temperature                     a = log q - log p; between: (1 - beta) (log q - log m)

are computed a few rows at a time, as in `cross_entropy.chunked_head_loss`.

Differs: Hinton multiplies the soft loss by temperature^2, so that its gradient keeps its size; GKD, TRL and we do not.

Commonly got wrong: KL's direction (for drafts of speculative decoding the best depends on the task and on how tokens
are drawn, DistillSpec, arXiv:2310.08461); the intermediate forms shrink towards either end, which are not their limits;
vocabularies padded differently; a teacher with dropout, or one that the optimizer, the checkpoint and DDP treat as a
part of the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.errors import UsageError
from llm_quest.layers.linear import autocast_dtype, softcap_logits
from llm_quest.objectives.cross_entropy import chunked_head_loss, scale_saved_gradients
from llm_quest.objectives.next_token import batch_scope


@dataclass(frozen=True)
class FrozenTeacher:
    """Holds a model that is no submodule of the objective, so that it is neither trained, saved nor moved; it is on the
    student's device already."""

    model: Any

    @torch.no_grad()
    def hidden_states(self, batch: TokenBatch) -> Float[Tensor, "B T D"]:
        """What its head reads."""
        return self.model.hidden_states(batch.input_ids, batch_scope(batch))  # type: ignore[no-any-return]


class DistillationLoss(nn.Module):
    """An auxiliary term of next-token prediction. teacher: in evaluation mode, on the student's device; under autocast
    it computes as the student does. weight: of the divergence; the main loss has the rest to 1. vocab_size: how many
    token ids count (`tokenizer.vocab_size`): ids beyond it, padding of either vocabulary, are excluded from both
    distributions. None: all of the teacher's."""

    name = "distillation"

    def __init__(
        self,
        teacher: Any,
        *,
        weight: float = 1.0,
        beta: float = 0.0,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ):
        super().__init__()
        if not 0 < weight <= 1:
            raise UsageError(f"a teacher of weight {weight:g}: give more than 0, which has no effect, and at most 1")
        if not 0 <= beta <= 1:
            raise UsageError(f"beta is {beta:g}: give 0 (KL from the teacher) to 1 (KL from the student)")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise UsageError(f"temperature is {temperature:g}: give a number above 0")
        if teacher.training:
            raise UsageError(
                "the teacher is in training mode, where dropout would disturb it: call teacher.eval() first"
            )
        self.teacher, self.weight, self.replaces = FrozenTeacher(teacher), weight, weight
        self.beta, self.temperature = beta, temperature
        self.vocab_size = teacher.head.weight.shape[0] if vocab_size is None else vocab_size
        if teacher.head.weight.shape[0] < self.vocab_size:
            raise UsageError(
                f"the teacher knows {teacher.head.weight.shape[0]} tokens, the tokenizer has {self.vocab_size}"
            )

    def forward(self, h: Float[Tensor, "B T D"], batch: TokenBatch, head: Any) -> tuple[Tensor, Tensor]:
        """The summed divergence over learned tokens, and how many there are."""
        self.require_vocab(head.weight.shape[0])
        is_target, teacher_head = (batch.targets != IGNORE_INDEX).flatten(), self.teacher.model.head
        teacher_hidden = self.teacher.hidden_states(batch).flatten(0, 1)
        teacher_args = (
            teacher_hidden,
            teacher_head.weight.detach()[: self.vocab_size],
            teacher_head.softcap,
            is_target,
        )
        weight = head.weight if len(head.weight) == self.vocab_size else head.weight[: self.vocab_size]
        total = ChunkedDivergence.apply(
            h.flatten(0, 1), weight, head.softcap, *teacher_args, self.beta, self.temperature
        )  # type: ignore[no-untyped-call]
        return total, is_target.sum(dtype=torch.float32)

    def require_vocab(self, model_vocab_size: int) -> None:
        if model_vocab_size < self.vocab_size:
            raise UsageError(f"the teacher speaks of {self.vocab_size} tokens, the model knows {model_vocab_size}")
        if model_vocab_size > self.vocab_size and self.weight == 1:
            raise UsageError(
                f"the model's vocabulary is padded with {model_vocab_size - self.vocab_size} ids of which the teacher "
                "says nothing: give the teacher a weight below 1, so that the cross-entropy teaches that they never "
                "come"
            )


class ChunkedDivergence(torch.autograd.Function):
    """A divergence between student and teacher, computed chunk by chunk, and its gradient. x, weight, cap: of the
    student's logits; y, own, own_cap: the teacher's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, softcap: float | None,
        teacher_hidden: Tensor, teacher_weight: Tensor, teacher_softcap: float | None,
        is_target: Bool[Tensor, " N"], beta: float, temperature: float,
    ) -> Tensor:  # fmt: skip
        dtype = autocast_dtype(x) or teacher_hidden.dtype
        W = teacher_weight.to(dtype)

        def teacher_log_probs(rows: slice, sum_dtype: torch.dtype) -> Tensor:
            logits = F.linear(teacher_hidden[rows].to(dtype), W).to(sum_dtype)
            return log_softmax_at(softcap_logits(logits, teacher_softcap), temperature)

        def loss_and_grad(logits: Tensor, rows: slice, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
            each, g = divergence_and_grad(
                teacher_log_probs(rows, logits.dtype), log_softmax_at(logits, temperature), beta
            )
            return torch.where(is_target[rows], each, 0.0).sum(), g.mul_(is_target[rows, None] / temperature)

        total, ctx.gradients = chunked_head_loss(x, weight, softcap, loss_and_grad, ctx.needs_input_grad[:2])
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *scale_saved_gradients(ctx, *upstream), *[None] * 7


def generalized_jsd(
    student: Float[Tensor, "*n V"], teacher: Float[Tensor, "*n V"], beta: float = 0.0, temperature: float = 1.0
) -> Float[Tensor, "*n"]:
    """The generalized Jensen-Shannon divergence from both models' logits: the definition."""
    return divergence_and_grad(log_softmax_at(teacher, temperature), log_softmax_at(student, temperature), beta)[0]


def log_softmax_at(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)


def divergence_and_grad(
    log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"], beta: float
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n V"]]:
    """From the teacher's p and the student's q: how far apart they are, and the gradient in the logits of q (of which
    sum q a is the second divergence itself)."""
    q = log_q.exp()
    if beta == 0:
        p = log_p.exp()
        return weighted_sum(p, log_p - log_q), q - p
    log_m = log_p if beta == 1 else torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    a = log_q - log_m
    reverse_kl = weighted_sum(q, a)
    g = q * (a - reverse_kl[..., None])
    if beta == 1:
        return reverse_kl, g
    return beta * weighted_sum(log_p.exp(), log_p - log_m) + (1 - beta) * reverse_kl, (1 - beta) * g


def weighted_sum(weights: Float[Tensor, "*n V"], values: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    return torch.linalg.vecdot(weights, values)
