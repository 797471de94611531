"""Hyper-connections: n residual streams instead of one, with learned weights for what a layer reads of them, how they
mix, and how its output is added to them.

                      in_j        across_jk       out_k
      h_1 ..h_n  --> sum_j in_j h_j --> F --> y        h'_k = sum_j across_jk h_j + out_k y

`HyperConnection` computes that. The weights are a module of their own: `StaticWeights` and `DynamicWeights` (Zhu et al.
2024, arXiv:2409.19606), and `ManifoldWeights` (mHC, Xie et al. 2025, arXiv:2512.24880), where `across` is doubly
stochastic, by Sinkhorn and Knopp's iterations or (mHC-lite) as a mixture of permutations, by Birkhoff's theorem. All
begin as the plain residual: the streams are copies, each layer reads one of them (mHC: mostly one), so that they become
different, `across` is near the identity and `out` is 1.

Commonly got wrong: `across` is not symmetric, so its direction matters (from j to k); everything is computed in
float32; the dynamic part must start at zero but its scale must not, or neither learns. Differs: plain streams are
averaged at the end, not summed: the norm that follows makes both equal, up to its eps (a DyT in its place would not),
and the mean changes no logit.
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

from llm_quest.layers.linear import disable_autocast
from llm_quest.layers.norm import RMSNorm

StreamWeights = tuple[Tensor, Tensor, Tensor]
"""in (B,T,n), across (B,T,n,n), out (B,T,n)."""

SCALE_INIT, OFF_LOGIT = 0.01, -8.0
NORM_EPS = 1e-6


class HyperConnection(nn.Module):
    """A residual over streams (B,T,n,D); `weights` computes its weights (`STREAM_WEIGHTS`)."""

    def __init__(self, weights: nn.Module):
        super().__init__()
        self.weights = weights

    def forward(self, x: Float[Tensor, "B T n D"], branch: Callable[[Tensor], Tensor]) -> Float[Tensor, "B T n D"]:
        with disable_autocast(x):
            read_weights, across, out = self.weights(x)
            layer_input = (read_weights[..., None] * x).sum(dim=2).to(x.dtype)
            mixed = across.to(x.dtype).mT @ x
        y = branch(layer_input).to(x.dtype)
        return mixed + out.to(x.dtype)[..., None] * y[:, :, None]


class ExpandStreams(nn.Module):
    """Copy the input to n streams."""

    def __init__(self, num_streams: int):
        super().__init__()
        self.num_streams = num_streams

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T n D"]:
        return x[:, :, None].expand(-1, -1, self.num_streams, -1)


class AverageStreams(nn.Module):
    """The mean of the streams."""

    def forward(self, x: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T D"]:
        return x.mean(dim=2)


class WeightedStreamSum(nn.Module):
    """A learned sum of the streams: sum_k sigmoid(scale fn_k . u + base_k) h_k, u all streams normalized."""

    def __init__(self, dim: int, num_streams: int, eps: float = 1e-12):
        super().__init__()
        self.num_streams, self.eps = num_streams, eps
        self.fn = nn.Parameter(torch.empty(num_streams, num_streams * dim))
        self.base = nn.Parameter(torch.empty(num_streams))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T D"]:
        with disable_autocast(x):
            u = flatten_and_norm(x)
            weights = (F.linear(u, self.fn.to(u)) * self.scale.to(u) + self.base.to(u)).sigmoid() + self.eps
            return (weights[..., None] * x).sum(dim=2).to(x.dtype)

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.fn)
        nn.init.constant_(self.scale, SCALE_INIT)
        nn.init.constant_(self.base, logit(1 / self.num_streams - self.eps))


class StaticWeights(nn.Module):
    """Learned weights, the same for every token. read_stream: the stream that the layer reads at first. They are
    vectors, so that weight decay does not act on them."""

    def __init__(self, dim: int, num_streams: int, read_stream: int):
        super().__init__()
        self.num_streams, self.read_stream = num_streams, read_stream
        self.inward = nn.Parameter(torch.empty(num_streams))
        self.across = nn.Parameter(torch.empty(num_streams * num_streams))
        self.out = nn.Parameter(torch.empty(num_streams))

    def forward(self, x: Float[Tensor, "B T n D"]) -> StreamWeights:
        wide = torch.promote_types(x.dtype, torch.float32)
        across = self.across.to(wide).view(self.num_streams, self.num_streams)
        return tuple(w.expand(*x.shape[:2], *w.shape) for w in (self.inward.to(wide), across, self.out.to(wide)))  # type: ignore[return-value]

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.inward)
        nn.init.ones_(self.out)
        with torch.no_grad():
            self.inward[self.read_stream] = 1.0
            self.across.copy_(torch.eye(self.num_streams).flatten())


class DynamicWeights(nn.Module):
    """The static weights plus scale * tanh(fn norm(h_j)), for each stream from itself: one number inward, n across, one
    out."""

    def __init__(self, dim: int, num_streams: int, read_stream: int):
        super().__init__()
        self.fixed = StaticWeights(dim, num_streams, read_stream)
        self.norm = RMSNorm(dim, NORM_EPS)
        self.fn = nn.Parameter(torch.empty(num_streams + 2, dim))
        self.scale = nn.Parameter(torch.empty(2))

    def forward(self, x: Float[Tensor, "B T n D"]) -> StreamWeights:
        wide = torch.promote_types(x.dtype, torch.float32)
        inward, across, out = self.fixed(x)
        mixing, spreading = self.scale.to(wide).unbind()
        moved = F.linear(self.norm(x.to(wide)), self.fn.to(wide)).tanh()
        return inward + mixing * moved[..., 0], across + mixing * moved[..., 1:-1], out + spreading * moved[..., -1]

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.fn)
        nn.init.constant_(self.scale, SCALE_INIT)


class ManifoldWeights(nn.Module):
    """mHC: from all streams together, u normalized, three groups of numbers scale * fn u + base: in = sigmoid + eps,
    out = 2 sigmoid, across = `mix` of its numbers, doubly stochastic.

    Differs: eps is 1e-12 where DeepSeek's files have 1e-6, so that adding it changes no logit; in float32 that is safe.
    """

    def __init__(self, dim: int, num_streams: int, read_stream: int, mix: DoublyStochasticMap, eps: float = 1e-12):
        super().__init__()
        self.num_streams, self.read_stream, self.mix, self.eps = num_streams, read_stream, mix, eps
        numbers = 2 * num_streams + len(mix.init_logits(num_streams))
        self.fn = nn.Parameter(torch.empty(numbers, num_streams * dim))
        self.base = nn.Parameter(torch.empty(numbers))
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, x: Float[Tensor, "B T n D"]) -> StreamWeights:
        u, n = flatten_and_norm(x), self.num_streams
        sizes = [n, n, self.base.shape[0] - 2 * n]
        raw, base = F.linear(u, self.fn.to(u)).split(sizes, dim=-1), self.base.to(u).split(sizes)
        inward, out, across = (r * s + b for r, s, b in zip(raw, self.scale.to(u).unbind(), base, strict=True))
        return inward.sigmoid() + self.eps, self.mix(across, n), 2 * out.sigmoid()

    def init_weights(self, generator: torch.Generator | None) -> None:
        """The layer reads `read_stream` most and the others a little, 1 in all: streams with equal weights would stay
        equal."""
        little = 0.4 / self.num_streams
        read_weights = [
            little if j != self.read_stream else 1 - little * (self.num_streams - 1) for j in range(self.num_streams)
        ]
        base = (
            [logit(part - self.eps) for part in read_weights]
            + [0.0] * self.num_streams
            + self.mix.init_logits(self.num_streams)
        )
        nn.init.zeros_(self.fn)
        nn.init.constant_(self.scale, SCALE_INIT)
        with torch.no_grad():
            self.base.copy_(torch.tensor(base, dtype=torch.float64))


class DoublyStochasticMap(Protocol):
    """Numbers (B,T,m) -> doubly stochastic matrices (B,T,n,n). `init_logits(n)`: the m numbers that give nearly the
    identity."""

    def __call__(self, logits: Tensor, num_streams: int) -> Tensor: ...

    def init_logits(self, num_streams: int) -> list[float]: ...


@dataclass(frozen=True)
class SinkhornKnopp:
    """n^2 numbers: softmax of each row, then rows and columns are normalized in turn; columns last, so that equal
    streams stay equal up to rounding, while their mean is kept as well as the rows have converged."""

    iterations: int = 20
    eps: float = 1e-12

    def __call__(self, logits: Float[Tensor, "B T m"], num_streams: int) -> Float[Tensor, "B T n n"]:
        across = logits.unflatten(-1, (num_streams, num_streams)).softmax(dim=-1) + self.eps
        across = across / (across.sum(dim=-2, keepdim=True) + self.eps)
        for _ in range(self.iterations - 1):
            across = across / (across.sum(dim=-1, keepdim=True) + self.eps)
            across = across / (across.sum(dim=-2, keepdim=True) + self.eps)
        return across

    def init_logits(self, num_streams: int) -> list[float]:
        return [0.0 if j == k else OFF_LOGIT for j in range(num_streams) for k in range(num_streams)]


@dataclass(frozen=True)
class PermutationMixture:
    """mHC-lite: n! numbers, the softmax weights of all permutations. Doubly stochastic up to the rounding
    of the weights' sum (1e-7 in float32), without iterations."""

    def __call__(self, logits: Float[Tensor, "B T m"], num_streams: int) -> Float[Tensor, "B T n n"]:
        order = torch.tensor(list(itertools.permutations(range(num_streams))), device=logits.device)
        permutations = F.one_hot(order, num_streams).to(logits.dtype)
        return torch.einsum("btp,pjk->btjk", logits.softmax(dim=-1), permutations)

    def init_logits(self, num_streams: int) -> list[float]:
        return [0.0] + [OFF_LOGIT] * (math.factorial(num_streams) - 1)


def flatten_and_norm(x: Float[Tensor, "B T n D"]) -> Float[Tensor, "B T u"]:
    """All streams of a token as one vector of root mean square 1, in at least float32."""
    u = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(u, u.shape[-1:], None, NORM_EPS)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


STREAM_WEIGHTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "static": StaticWeights,
    "dynamic": DynamicWeights,
    "manifold": lambda width, streams, reads: ManifoldWeights(width, streams, reads, SinkhornKnopp()),
    "lite": lambda width, streams, reads: ManifoldWeights(width, streams, reads, PermutationMixture()),
}
"""width, streams, the stream read at first -> where a layer's weights come from."""
