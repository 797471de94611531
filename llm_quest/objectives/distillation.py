"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): a student learns the whole distribution that a teacher
gives the next token, not the one token that came. With p the teacher's softmax(logits / temperature) and q the
student's, at every learned token (GKD, Agarwal et al. 2024, arXiv:2306.13649, eq. 1):

      beta = 0      KL(p || q)                                  q covers all that p finds likely
      beta = 1      KL(q || p)                                  q keeps to what p finds likely
      between       beta KL(p || m) + (1 - beta) KL(q || m)     m = beta p + (1 - beta) q

It is one more term of next-token prediction, and takes the place of as much of the main loss:
`NextToken(model, beside=[Distillation(teacher, weight=0.5)])` learns half of each. Both models' logits are made, and
their gradient

      dD/dz = (q - p) / temperature                             beta = 0
      dD/dz = q (a - sum q a) / temperature                     a = log q - log p; between: (1 - beta) (log q - log m)

a few rows at a time, as the cross-entropy's (`cross_entropy.in_pieces`).

Differs: Hinton multiplies the soft loss by temperature^2, so that its gradient keeps its size; GKD, TRL and we do not.

Commonly got wrong: KL's direction (for drafts of speculative decoding the best depends on the task and on how tokens
are drawn, DistillSpec, arXiv:2310.08461); the between forms shrink towards either end, which are not their limits;
vocabularies padded differently; a teacher with dropout, or one that the optimiser, the checkpoint and DDP take for a
part of the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.data.batch import IGNORE, TokenBatch
from llm_quest.errors import UsageError
from llm_quest.objectives.cross_entropy import in_pieces, scaled
from llm_quest.objectives.next_token import scope_of


@dataclass(frozen=True)
class Teacher:
    """A model held where nobody looks for parameters: no submodule of the objective, so neither trained nor saved, nor
    moved: it stands on the student's device already."""

    model: Any

    @torch.no_grad()
    def hidden(self, batch: TokenBatch) -> Float[Tensor, "B T D"]:
        """What its head reads."""
        return self.model.hidden(batch.tokens, scope_of(batch))  # type: ignore[no-any-return]


class Distillation(nn.Module):
    """A term beside next-token prediction. teacher: in evaluation mode, on the student's device; under autocast it
    computes as the student does. weight: of the divergence; what is missing to 1 stays with the main loss. ids: how
    many token ids count (`tokenizer.vocab_size`): what either vocabulary has beyond, padding, stays out of both
    distributions. None: all of the teacher's."""

    name = "distillation"

    def __init__(
        self, teacher: Any, *, weight: float = 1.0, beta: float = 0.0, temperature: float = 1.0, ids: int | None = None
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
        self.teacher, self.weight, self.replaces = Teacher(teacher), weight, weight
        self.beta, self.temperature = beta, temperature
        self.ids = teacher.head.weight.shape[0] if ids is None else ids
        if teacher.head.weight.shape[0] < self.ids:
            raise UsageError(f"the teacher knows {teacher.head.weight.shape[0]} tokens, the tokenizer has {self.ids}")

    def forward(self, h: Float[Tensor, "B T D"], batch: TokenBatch, head: Any) -> tuple[Tensor, Tensor]:
        """The summed divergence over learned tokens, and how many there are."""
        self.require_vocab(head.weight.shape[0])
        learn, own = (batch.targets != IGNORE).flatten(), self.teacher.model.head
        y = self.teacher.hidden(batch).flatten(0, 1)
        seen = (y, own.weight.detach()[: self.ids], own.cap, learn)
        weight = head.weight if len(head.weight) == self.ids else head.weight[: self.ids]
        total = Pieces.apply(h.flatten(0, 1), weight, head.cap, *seen, self.beta, self.temperature)  # type: ignore[no-untyped-call]
        return total, learn.sum(dtype=torch.float32)

    def require_vocab(self, vocab: int) -> None:
        if vocab < self.ids:
            raise UsageError(f"the teacher speaks of {self.ids} tokens, the model knows {vocab}")
        if vocab > self.ids and self.weight == 1:
            raise UsageError(
                f"the model's vocabulary is padded with {vocab - self.ids} ids of which the teacher says nothing: give "
                "the teacher a weight below 1, so that the cross-entropy teaches that they never come"
            )


class Pieces(torch.autograd.Function):
    """x, weight, cap: what the student's logits are made of; y, own, own_cap: the teacher's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cap: float | None, y: Tensor, own: Tensor, own_cap: float | None,
        learn: Bool[Tensor, " N"], beta: float, temperature: float,
    ) -> Tensor:  # fmt: skip
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else y.dtype
        W = own.to(dtype)

        def theirs(rows: slice, wide: torch.dtype) -> Tensor:
            logits = F.linear(y[rows].to(dtype), W).to(wide)
            return log_softmax(logits if own_cap is None else own_cap * torch.tanh(logits / own_cap), temperature)

        def judge(logits: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
            each, g = between(theirs(rows, logits.dtype), log_softmax(logits, temperature), beta)
            return torch.where(learn[rows], each, 0.0).sum(), g.mul_(learn[rows, None] / temperature)

        total, ctx.gradients = in_pieces(x, weight, cap, judge, ctx.needs_input_grad[:2])
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled(ctx, *upstream), *[None] * 7


def divergence(
    student: Float[Tensor, "*n V"], teacher: Float[Tensor, "*n V"], beta: float = 0.0, temperature: float = 1.0
) -> Float[Tensor, "*n"]:
    """The definition, from both models' logits."""
    return between(log_softmax(teacher, temperature), log_softmax(student, temperature), beta)[0]


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)


def between(
    log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"], beta: float
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n V"]]:
    """From the teacher's p and the student's q: how far apart they are, and the gradient in the logits of q (of which
    sum q a is the second divergence itself)."""
    q = log_q.exp()
    if beta == 0:
        p = log_p.exp()
        return inner(p, log_p - log_q), q - p
    log_m = log_p if beta == 1 else torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    a = log_q - log_m
    of_q = inner(q, a)
    g = q * (a - of_q[..., None])
    if beta == 1:
        return of_q, g
    return beta * inner(log_p.exp(), log_p - log_m) + (1 - beta) * of_q, (1 - beta) * g


def inner(weights: Float[Tensor, "*n V"], values: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    return torch.linalg.vecdot(weights, values)
