"""Hyper-connections: n residual streams in place of one, and learned weights for what a layer reads of them, how they
mix, and how its output is spread over them.

                      in_j        across_jk       out_k
      h_1 ..h_n  --> sum_j in_j h_j --> F --> y        h'_k = sum_j across_jk h_j + out_k y

`HyperConnection` is that; where the weights come from is a part of its own: `Fixed` and `Dynamic` (Zhu et al. 2024,
arXiv:2409.19606), and `Constrained` (mHC, Xie et al. 2025, arXiv:2512.24880), where `across` is doubly stochastic, by
Sinkhorn and Knopp's iterations or (mHC-lite) as a mixture of permutations, by Birkhoff's theorem. All start as the
plain residual: the streams are copies, each layer reads one of them (mHC: mostly one), which tells them apart, `across`
is near the identity and `out` is 1.

Commonly got wrong: `across` is not symmetric, so its direction matters (from j to k); it all happens in float32; the
dynamic part must start at zero but its scale must not, or neither learns. Differs: plain streams are closed by their
mean, not their sum: the norm that follows makes both one, up to its eps (a DyT in its place would not), and the mean
moves no logit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.norm import RMSNorm

Weights = tuple[Tensor, Tensor, Tensor]
"""in (B,T,n), across (B,T,n,n), out (B,T,n)."""

SMALL, FAR = 0.01, -8.0
NORM_EPS = 1e-6


class HyperConnection(nn.Module):
    """A residual over streams (B,T,n,D); `weights` says how (`WEIGHTS`)."""

    def __init__(self, weights: nn.Module):
        super().__init__()
        self.weights = weights

    def forward(self, x: Float[Tensor, "B T n D"], branch: Callable[[Tensor], Tensor]) -> Float[Tensor, "B T n D"]:
        with torch.autocast(x.device.type, enabled=False):
            inward, across, out = self.weights(x)
            read = (inward[..., None] * x).sum(dim=2).to(x.dtype)
            mixed = across.to(x.dtype).mT @ x
        y = branch(read).to(x.dtype)
        return mixed + out.to(x.dtype)[..., None] * y[:, :, None]


class Copies(nn.Module):
    """Opens the streams: n times the same."""

    def __init__(self, streams: int):
        super().__init__()
        self.streams = streams

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T n D"]:
        return x[:, :, None].expand(-1, -1, self.streams, -1)


class Mean(nn.Module):
    """Closes them: their mean."""

    def forward(self, x: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T D"]:
        return x.mean(dim=2)


class Collapse(nn.Module):
    """Closes them with learned weights: sum_k sigmoid(scale fn_k . u + base_k) h_k, u all streams normed."""

    def __init__(self, width: int, streams: int, eps: float = 1e-12):
        super().__init__()
        self.streams, self.eps = streams, eps
        self.fn = nn.Parameter(torch.empty(streams, streams * width))
        self.base = nn.Parameter(torch.empty(streams))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T D"]:
        with torch.autocast(x.device.type, enabled=False):
            u = flattened(x)
            weights = (F.linear(u, self.fn.to(u)) * self.scale.to(u) + self.base.to(u)).sigmoid() + self.eps
            return (weights[..., None] * x).sum(dim=2).to(x.dtype)

    def fill_(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.fn)
        nn.init.constant_(self.scale, SMALL)
        nn.init.constant_(self.base, logit(1 / self.streams - self.eps))


class Fixed(nn.Module):
    """Weights that are learned and the same for every token. reads: the stream that the layer reads at first. They are
    vectors, so that nothing decays them to zero."""

    def __init__(self, width: int, streams: int, reads: int):
        super().__init__()
        self.streams, self.reads = streams, reads
        self.inward = nn.Parameter(torch.empty(streams))
        self.across = nn.Parameter(torch.empty(streams * streams))
        self.out = nn.Parameter(torch.empty(streams))

    def forward(self, x: Float[Tensor, "B T n D"]) -> Weights:
        wide = torch.promote_types(x.dtype, torch.float32)
        across = self.across.to(wide).view(self.streams, self.streams)
        return tuple(w.expand(*x.shape[:2], *w.shape) for w in (self.inward.to(wide), across, self.out.to(wide)))  # type: ignore[return-value]

    def fill_(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.inward)
        nn.init.ones_(self.out)
        with torch.no_grad():
            self.inward[self.reads] = 1.0
            self.across.copy_(torch.eye(self.streams).flatten())


class Dynamic(nn.Module):
    """The fixed weights plus scale * tanh(fn norm(h_j)), from each stream its own: one number inward, n across, one
    out."""

    def __init__(self, width: int, streams: int, reads: int):
        super().__init__()
        self.fixed = Fixed(width, streams, reads)
        self.norm = RMSNorm(width, NORM_EPS)
        self.fn = nn.Parameter(torch.empty(streams + 2, width))
        self.scale = nn.Parameter(torch.empty(2))

    def forward(self, x: Float[Tensor, "B T n D"]) -> Weights:
        wide = torch.promote_types(x.dtype, torch.float32)
        inward, across, out = self.fixed(x)
        mixing, spreading = self.scale.to(wide).unbind()
        moved = F.linear(self.norm(x.to(wide)), self.fn.to(wide)).tanh()
        return inward + mixing * moved[..., 0], across + mixing * moved[..., 1:-1], out + spreading * moved[..., -1]

    def fill_(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.fn)
        nn.init.constant_(self.scale, SMALL)


class Constrained(nn.Module):
    """mHC: from all streams together, u normed, three groups of numbers scale * fn u + base: in = sigmoid + eps, out =
    2 sigmoid, across = what `mix` makes of its numbers, doubly stochastic.

    Differs: eps is 1e-12 where DeepSeek's files have 1e-6, so that at birth no logit moves; in float32 that is safe."""

    def __init__(self, width: int, streams: int, reads: int, mix: Mix, eps: float = 1e-12):
        super().__init__()
        self.streams, self.reads, self.mix, self.eps = streams, reads, mix, eps
        numbers = 2 * streams + len(mix.start(streams))
        self.fn = nn.Parameter(torch.empty(numbers, streams * width))
        self.base = nn.Parameter(torch.empty(numbers))
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, x: Float[Tensor, "B T n D"]) -> Weights:
        u, n = flattened(x), self.streams
        sizes = [n, n, self.base.shape[0] - 2 * n]
        raw, base = F.linear(u, self.fn.to(u)).split(sizes, dim=-1), self.base.to(u).split(sizes)
        inward, out, across = (r * s + b for r, s, b in zip(raw, self.scale.to(u).unbind(), base, strict=True))
        return inward.sigmoid() + self.eps, self.mix(across, n), 2 * out.sigmoid()

    def fill_(self, generator: torch.Generator | None) -> None:
        """The layer reads `reads` most and the others a little, 1 in all: streams that nobody tells apart would learn
        the same for ever."""
        little = 0.4 / self.streams
        reads = [little if j != self.reads else 1 - little * (self.streams - 1) for j in range(self.streams)]
        base = [logit(part - self.eps) for part in reads] + [0.0] * self.streams + self.mix.start(self.streams)
        nn.init.zeros_(self.fn)
        nn.init.constant_(self.scale, SMALL)
        with torch.no_grad():
            self.base.copy_(torch.tensor(base, dtype=torch.float64))


class Mix(Protocol):
    """Numbers (B,T,m) -> doubly stochastic matrices (B,T,n,n). `start(n)`: the m numbers that give nearly the
    identity."""

    def __call__(self, numbers: Tensor, streams: int) -> Tensor: ...

    def start(self, streams: int) -> list[float]: ...


@dataclass(frozen=True)
class Sinkhorn:
    """n^2 numbers: softmax of each row, then rows and columns normalised in turn; columns last, so that equal streams
    stay what they are up to rounding, while their mean is kept as well as the rows have converged."""

    iterations: int = 20
    eps: float = 1e-12

    def __call__(self, numbers: Float[Tensor, "B T m"], streams: int) -> Float[Tensor, "B T n n"]:
        across = numbers.unflatten(-1, (streams, streams)).softmax(dim=-1) + self.eps
        across = across / (across.sum(dim=-2, keepdim=True) + self.eps)
        for _ in range(self.iterations - 1):
            across = across / (across.sum(dim=-1, keepdim=True) + self.eps)
            across = across / (across.sum(dim=-2, keepdim=True) + self.eps)
        return across

    def start(self, streams: int) -> list[float]:
        return [0.0 if j == k else FAR for j in range(streams) for k in range(streams)]


@dataclass(frozen=True)
class Birkhoff:
    """mHC-lite: n! numbers, the softmax weights of all permutations. Doubly stochastic up to the rounding
    of the weights' sum (1e-7 in float32), without iterations."""

    def __call__(self, numbers: Float[Tensor, "B T m"], streams: int) -> Float[Tensor, "B T n n"]:
        order = torch.tensor(list(itertools.permutations(range(streams))), device=numbers.device)
        permutations = F.one_hot(order, streams).to(numbers.dtype)
        return torch.einsum("btp,pjk->btjk", numbers.softmax(dim=-1), permutations)

    def start(self, streams: int) -> list[float]:
        return [0.0] + [FAR] * (math.factorial(streams) - 1)


def flattened(x: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T u"]:
    """All streams of a token as one vector of root mean square 1, in at least float32."""
    u = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(u, u.shape[-1:], None, NORM_EPS)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


WEIGHTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "static": Fixed,
    "dynamic": Dynamic,
    "manifold": lambda width, streams, reads: Constrained(width, streams, reads, Sinkhorn()),
    "lite": lambda width, streams, reads: Constrained(width, streams, reads, Birkhoff()),
}
"""width, streams, the stream read at first -> where a layer's weights come from."""
