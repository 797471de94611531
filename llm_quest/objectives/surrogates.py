"""The policy-gradient family as surrogates: per token, what is maximised. Each is a few lines; the table is at the
bottom.

      rho_t = pi(o_t) / pi_old(o_t)            token level
      s = exp(mean_t log rho_t)                sequence level (GSPO): a geometric mean, so that length does not matter

On-policy (rho = 1) all of them have the gradient A * grad log pi: on fresh batches the surrogates cannot be told apart
(the variants can, by their divisors and advantages). Commonly got wrong: max where min is due for A < 0, which leaves a
live gradient where clipping should have taken it; a sequence ratio as a *product*, which no clip range fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LARGEST = 20.0
"""Log-ratios are held within this before they are exponentiated, as in verl."""


class Terms(NamedTuple):
    """What a surrogate reads; 0 where nothing is learned. log_ratio: log_p less the old log-probability."""

    log_p: Float[Tensor, "B T"]
    log_ratio: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    learn: Bool[Tensor, "B T"]


Level = Callable[[Terms], Float[Tensor, "B T"]]
Surrogate = Callable[[Terms], tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]]
"""Terms -> what is maximised, and where the ratio was held: its clip, dual clip or delta took the gradient away (of
CISPO: its cap or floor holds the weight)."""


def token(terms: Terms) -> Tensor:
    return terms.log_ratio.clamp(-LARGEST, LARGEST).exp()


def sequence(terms: Terms) -> Tensor:
    """s, at every token of the sequence (GSPO, arXiv:2507.18071, eq. 7)."""
    return sequence_mean(terms.log_ratio, terms.learn).clamp(-LARGEST, LARGEST).exp().expand_as(terms.log_ratio)


def sequence_token(terms: Terms) -> Tensor:
    """sg[s] pi / sg[pi] (GSPO-token, eq. 14): the same value and gradient where the advantage is one per sequence, and
    right where it is not."""
    return sequence(terms).detach() * (terms.log_p - terms.log_p.detach()).exp()


def sequence_mean(values: Float[Tensor, "B T"], learn: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """Mean over the learned tokens of each row; 0 for a row without any."""
    return (values * learn).sum(dim=1, keepdim=True) / learn.sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Clipped:
    """min(rho A, clip(rho, 1 - low, 1 + high) A) (PPO, arXiv:1707.06347). For A < 0 and a large rho that is unbounded.
    Two remedies: dual, the objective is at least dual * A (arXiv:1912.09729); delta, rho is held at delta in the
    unclipped term (INTELLECT-2). Both take the gradient away there."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    delta: float | None = None
    ratio: Level = token

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        rho, A = self.ratio(terms), terms.advantages
        free = rho if self.delta is None else rho.clamp(max=self.delta)
        clipped = rho.clamp(1 - self.low, 1 + self.high)
        found = torch.minimum(free * A, clipped * A)
        held = (torch.where(free * A <= clipped * A, free, clipped) != rho) & (A != 0)
        if self.dual is not None:
            held = held | ((A < 0) & (found < self.dual * A))
            found = torch.where(A < 0, torch.maximum(found, self.dual * A), found)
        return found, held


@dataclass(frozen=True)
class Soft:
    """SAPO (arXiv:2511.20347): f(rho) A with f(rho) = 4/tau sigmoid(tau (rho - 1)), whose slope is 1 at rho = 1 and
    fades on both sides, sooner where A <= 0. f(1) is 2/tau, so values are not to be compared with the others'."""

    up: float = 1.0
    down: float = 1.05

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        rho, A = token(terms), terms.advantages
        tau = torch.where(A > 0, self.up, self.down)
        return 4 / tau * torch.sigmoid(tau * (rho - 1)) * A, torch.zeros_like(terms.learn)


@dataclass(frozen=True)
class Capped:
    """CISPO (MiniMax-M1, arXiv:2506.13585): sg[clip(rho, floor, cap)] A log pi. No token loses its gradient, only its
    weight is held. cap is an absolute bound on rho, not a distance from 1; 5 is ScaleRL's (arXiv:2510.13786), for
    MiniMax-M1 gives no number, and writes the bound as 1 + eps."""

    cap: float = 5.0
    floor: float = 0.0

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        rho = token(terms).detach()
        return rho.clamp(self.floor, self.cap) * terms.advantages * terms.log_p, (rho > self.cap) | (rho < self.floor)


@dataclass(frozen=True)
class Unclipped:
    """rho A: REINFORCE, weighed by importance where the batch is no longer fresh."""

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        return token(terms) * terms.advantages, torch.zeros_like(terms.learn)


@dataclass(frozen=True)
class Variant:
    """A method of the literature: its surrogate, what its loss is divided by (`policy_gradient.WEIGHTS`), and how its
    advantages are made (`rollouts.advantages.ESTIMATORS`)."""

    surrogate: Surrogate
    count: str
    advantages: str


VARIANTS: dict[str, Variant] = {
    "grpo": Variant(Clipped(0.2, 0.2), "sequences", "std"),  # arXiv:2402.03300; 0.2 is PPO's and TRL's, it names none
    "dr_grpo": Variant(Clipped(0.2, 0.2), "horizon", "mean"),  # arXiv:2503.20783; likewise
    "dapo": Variant(Clipped(0.2, 0.28), "tokens", "std"),  # arXiv:2503.14476
    "gspo": Variant(Clipped(3e-4, 4e-4, ratio=sequence), "sequences", "std"),  # arXiv:2507.18071
    "gspo_token": Variant(Clipped(3e-4, 4e-4, ratio=sequence_token), "sequences", "std"),
    "sapo": Variant(Soft(1.0, 1.05), "sequences", "std"),  # arXiv:2511.20347
    "cispo": Variant(Capped(5.0), "tokens", "std"),  # arXiv:2506.13585, 2510.13786
    "reinforce": Variant(Unclipped(), "sums", "leave_one_out"),  # arXiv:2402.14740
}
