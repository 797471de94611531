"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): a mixer whose memory has a fixed size.

A state S (key width x value width) per head is an associative memory. Each token fades it, looks up what it holds under
its key, and corrects it towards its value:

      S <- e^g S          error = v - S^T k          S <- S + k (beta error)^T          o = S^T q

`recurrent` is that definition, one token after another. `chunked` does 32 tokens at a time: inside a chunk the
corrections depend on each other through a unit lower-triangular matrix, which one triangular solve inverts before any
state is known (section 3.3 there; its eq. 6 to 9 are the same without the decay):

      L = strict_lower(beta k k^T D)        A = (I + L)^-1 diag(beta)       U = A v       W = A (e^G k)
      v' = U - W S      o = e^G q S + lower(q k^T D) v'      S <- e^G_end S + (e^(G_end - G) k)^T v'
      D_ij = e^(G_i - G_j), G = cumsum(g)

Commonly got wrong: e^(G_i - G_j) above the diagonal overflows and poisons the gradients unless it is masked *before*
the exponential; everything here runs in float32; the norm comes before the output gate; padding must neither fade nor
write.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.projections import Projections
from llm_quest.layers.state import Moment, StateCache
from llm_quest.scope import Scope

CHUNK = 32
TOGETHER = 4


class Rule(Protocol):
    """q, k (B,T,H,dk), v (B,T,H,dv), g, beta (B,T,H), state (B,H,dk,dv), segments (B,T) or None -> o (B,T,H,dv), state.
    The state entering belongs to the segment of the first token."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def recurrent(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
    segments: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H dv"], Float[Tensor, "B H dk dv"]]:
    """The definition: one token after another."""
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def chunked(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
    segments: Int[Tensor, "B T"] | None = None,
    size: int = CHUNK,
) -> tuple[Float[Tensor, "B T H dv"], Float[Tensor, "B H dk dv"]]:
    """The same, `size` tokens at a time. Rows are filled up with tokens that neither fade nor write. So many chunks are
    prepared at once as leave what is made of them in the processor's cache until it is used."""
    batch, length, heads = q.shape[:3]
    missing = -length % size
    parts = [filled(part, missing).split(TOGETHER * size, dim=1) for part in (q, k, v, g, beta)]
    if segments is not None:
        parts += [part.split(TOGETHER) for part in boundaries(cut_row(segments, missing, size), heads)]
    outputs, S = [], state.flatten(0, 1)
    for now in zip(*parts, strict=True):
        chunks = [cut(part, size) for part in now[:5]]
        made = prepared(*chunks, same=Boundaries(*now[5:]) if segments is not None else None)
        # unbind, not an index: the backward of `part[n]` builds a gradient of the full size for every chunk
        for U, W, inside, q_in, k_end, fade in zip(*(part.unbind() for part in made), strict=True):
            corrected = torch.baddbmm(U, W, S, alpha=-1)
            outputs.append((q_in @ S).baddbmm_(inside, corrected))
            S = (S * fade).baddbmm_(k_end, corrected)
    o = torch.stack(outputs).unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o[:, :length], S.unflatten(0, (batch, heads))


def prepared(
    q: Float[Tensor, "N R C dk"],
    k: Float[Tensor, "N R C dk"],
    v: Float[Tensor, "N R C dv"],
    g: Float[Tensor, "N R C"],
    beta: Float[Tensor, "N R C"],
    *,
    same: Boundaries | None,
) -> tuple[Tensor, ...]:
    """What N chunks of R rows need of each other before any state is known: U, W, lower(q k^T D), e^G q,
    (e^(G_end - G) k)^T, e^G_end."""
    G = g.cumsum(dim=-1)
    lower = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    kept = lower if same is None else lower & same.pairs
    D = (G[..., :, None] - G[..., None, :]).masked_fill_(~kept, float("-inf")).exp_()
    from_start, to_end = G.exp(), D[..., -1, :]
    fade = from_start[..., -1:, None]
    if same is not None:
        from_start, to_end = from_start * same.entered, to_end * same.continues[..., None]
        fade = from_start[..., -1:, None] * same.continues[..., None, None]
    L = (k @ k.mT) * (D * beta[..., None])
    A = torch.linalg.solve_triangular(L, torch.diag_embed(beta), upper=False, unitriangular=True)
    return (
        A @ v,
        (A * from_start[..., None, :]) @ k,
        (q @ k.mT) * D,
        q * from_start[..., None],
        (k * to_end[..., None]).mT,
        fade,
    )


class Boundaries(NamedTuple):
    """Where documents meet, for N chunks of R = B H rows: pairs (N,R,C,C) in one document; entered (N,R,C): in the
    document the chunk began with; continues (N,R): the next chunk begins in the document this one ended with."""

    pairs: Bool[Tensor, "N R C C"]
    entered: Bool[Tensor, "N R C"]
    continues: Bool[Tensor, "N R"]


def boundaries(segments: Int[Tensor, "N B C"], heads: int) -> Boundaries:
    following = torch.cat((segments[1:, :, 0], segments[-1:, :, -1]))
    found = Boundaries(
        segments[..., :, None] == segments[..., None, :], segments == segments[..., :1], segments[..., -1] == following
    )
    return Boundaries(*(part.repeat_interleave(heads, dim=1) for part in found))


def cut_row(segments: Int[Tensor, "B T"], missing: int, size: int) -> Int[Tensor, "N B C"]:
    """Filling belongs to the last token's document."""
    row = torch.cat((segments, segments[:, -1:].expand(-1, missing)), dim=1)
    return row.unflatten(1, (-1, size)).transpose(0, 1)


def filled(x: Float[Tensor, "B T *rest"], missing: int) -> Float[Tensor, "B P *rest"]:
    """Rows filled up with zeros."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x


def cut(x: Float[Tensor, "B T H *rest"], size: int) -> Float[Tensor, "N R C *rest"]:
    """R = B H rows of N chunks of C tokens."""
    chunks = x.unflatten(1, (-1, size))
    return chunks.permute(1, 0, 3, 2, *range(4, chunks.dim())).flatten(1, 2).contiguous()


class FlatInputs(nn.Module):
    """q, k, v, z (B,T,...) and b, a (B,T,H) as parts of two products: Qwen3.5's layout."""

    def __init__(self, width: int, *, key_heads: int, value_heads: int, key_width: int, value_width: int):
        super().__init__()
        keys, values = key_heads * key_width, value_heads * value_width
        self.qkvz = Projections(width, qkv=2 * keys + values, z=values)
        self.ba = Projections(width, b=value_heads, a=value_heads)
        self.sizes = [keys, keys, values]

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
        qkv, z = self.qkvz(x)
        return *qkv.split(self.sizes, dim=-1), z, *self.ba(x)


class WovenInputs(nn.Module):
    """The same, the rows of each product grouped by key head, [q k v z] and [b a] for each: Qwen3-Next's layout."""

    def __init__(self, width: int, *, key_heads: int, value_heads: int, key_width: int, value_width: int):
        super().__init__()
        shared = value_heads // key_heads
        self.key_heads = key_heads
        self.sizes = [key_width, key_width, shared * value_width, shared * value_width]
        self.shared = shared
        self.qkvz = nn.Linear(width, key_heads * sum(self.sizes), bias=False)
        self.ba = nn.Linear(width, 2 * value_heads, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
        by_head = self.qkvz(x).unflatten(-1, (self.key_heads, -1)).split(self.sizes, dim=-1)
        b, a = self.ba(x).unflatten(-1, (self.key_heads, -1)).split(self.shared, dim=-1)
        return *(part.flatten(2) for part in by_head), b.flatten(2), a.flatten(2)


class GatedDeltaNet(nn.Module):
    """key_heads heads of width key_width for queries and keys, each serving value_heads // key_heads heads of width
    value_width. kernel: taps of the causal convolution that q, k and v pass first. inputs: FlatInputs or WovenInputs,
    how the published files lay out the projections."""

    def __init__(
        self,
        width: int,
        *,
        key_heads: int,
        value_heads: int,
        key_width: int,
        value_width: int,
        kernel: int,
        eps: float,
        inputs: type[FlatInputs] | type[WovenInputs],
    ):
        super().__init__()
        if value_heads % key_heads:
            raise ValueError(
                f"{value_heads} value heads cannot share {key_heads} key heads evenly: make one divide the other"
            )
        self.key_heads, self.value_heads = key_heads, value_heads
        self.key_width, self.value_width, self.kernel = key_width, value_width, kernel
        sizes = {"key_heads": key_heads, "value_heads": value_heads, "key_width": key_width, "value_width": value_width}
        self.inputs = inputs(width, **sizes)
        self.conv = nn.Parameter(torch.empty(2 * key_heads * key_width + value_heads * value_width, 1, kernel))
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.norm = RMSNorm(value_width, eps)
        self.out = nn.Linear(value_heads * value_width, width, bias=False)
        self.rule: Rule | None = None

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        if scope.is_plain:
            return self.mix(x, scope, None)
        order, back = scope.once("padding last", lambda: padding_last(scope.positions))
        y = self.mix(x.gather(1, order[..., None].expand_as(x)), scope, order)
        return y.gather(1, back[..., None].expand_as(y))

    def mix(self, x: Float[Tensor, "B T D"], scope: Scope, order: Int[Tensor, "B T"] | None) -> Float[Tensor, "B T D"]:
        """The layer on rows whose padding stands at the end."""
        real = None if order is None else (scope.positions >= 0).gather(1, order)
        segments = None if scope.segments is None or order is None else scope.segments.gather(1, order)
        segments = segments if segments is None else follow(segments)
        *qkv, z, b, a = self.inputs(x)
        before, state = self.remembered(x, scope)
        columns = torch.cat((before, torch.cat(qkv, dim=-1)), dim=1)
        q, k, v = self.convolve(columns, segments).split([part.shape[-1] for part in qkv], dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        beta, g = b.to(wide).sigmoid(), -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        if real is not None:
            beta, g = beta * real[..., None], g * real[..., None]
        q, k = (self.spread(unit(part.to(wide).unflatten(-1, (self.key_heads, -1)))) for part in (q, k))
        stepping = scope.memory is not None and 0 < scope.memory.slack >= x.shape[1] - 1
        rule = self.rule or (recurrent if x.shape[1] == 1 else chunked)
        with torch.autocast(x.device.type, enabled=False):
            v_heads = v.to(wide).unflatten(-1, (self.value_heads, -1))
            parts = (q * self.key_width**-0.5, k, v_heads, g, beta)
            o, states = step_by_step(*parts, state) if stepping else one(rule(*parts, state, segments))
        if scope.memory is not None:
            count = None if real is None else real.sum(dim=1)
            scope.memory.put(state=states[-1], columns=last(columns, self.kernel - 1, count))
            if scope.memory.slack:
                scope.memory.walked(self.moments(scope, order, states, columns, count))
        gated = self.norm(o) * F.silu(z.unflatten(-1, (self.value_heads, -1)).to(wide))
        return self.out(gated.flatten(2).to(x.dtype))

    def moments(
        self,
        scope: Scope,
        order: Int[Tensor, "B T"] | None,
        states: list[Tensor],
        columns: Float[Tensor, "B P C"],
        count: Int[Tensor, " B"] | None,
    ) -> list[Moment]:
        """Where every row stood after each state of this pass: after every token, or at its end alone."""
        positions = scope.positions if order is None else scope.positions.gather(1, order)
        stood = scope.memory.trail[-1].ends if scope.memory.trail else torch.zeros_like(positions[:, 0])
        ends = torch.maximum((positions + 1).cummax(dim=1).values, stood[:, None])
        if len(states) < positions.shape[1]:
            return [Moment(ends[:, -1], scope.memory.tensors)]
        before = self.kernel - 1
        moments = []
        for t, state in enumerate(states, start=1):
            until = columns[:, : before + t] if count is None else columns
            latest = last(until, before, None if count is None else count.clamp(max=t))
            moments.append(Moment(ends[:, t - 1], {"state": state, "columns": latest}))
        return moments

    def remembered(self, x: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """The columns before this pass's first token (B,kernel-1,channels) and the state; zeros at the beginning."""
        kept = {} if scope.memory is None else scope.memory.get()
        if kept:
            return kept["columns"], kept["state"]
        columns = x.new_zeros(x.shape[0], self.kernel - 1, self.conv.shape[0])
        shape = (x.shape[0], self.value_heads, self.key_width, self.value_width)
        return columns, x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))

    def convolve(self, columns: Float[Tensor, "B P C"], segments: Int[Tensor, "B T"] | None) -> Float[Tensor, "B T C"]:
        """SiLU of a causal convolution, each channel alone, that does not reach across documents."""
        length = columns.shape[1] - self.kernel + 1
        taps = self.conv[:, 0].to(columns.dtype)
        y = columns[:, self.kernel - 1 :] * taps[:, -1]
        for back in range(1, self.kernel):
            shifted = columns[:, self.kernel - 1 - back : self.kernel - 1 - back + length]
            if segments is not None:
                same = segments == torch.cat((segments[:, :1].expand(-1, back), segments), dim=1)[:, :length]
                shifted = shifted * same[..., None]
            y = y + shifted * taps[:, self.kernel - 1 - back]
        return F.silu(y)

    def spread(self, x: Float[Tensor, "B T K d"]) -> Float[Tensor, "B T H d"]:
        """Each key head serves its value heads."""
        return x.repeat_interleave(self.value_heads // self.key_heads, dim=2)

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> StateCache:
        """A state and the last columns: the same size however long the text, times the tokens it can take back."""
        return StateCache(slack)

    def rescale_logits_(self, gamma: Tensor, shared: str = "query") -> None:
        raise ValueError("Gated DeltaNet has no attention logits to rescale: its keys are normalised; leave it out")

    def fill_(self, generator: torch.Generator | None) -> None:
        """A_log = log U(0,16), so that heads forget at many speeds; dt_bias 1."""
        nn.init.normal_(self.conv, std=self.kernel**-0.5, generator=generator)
        with torch.no_grad():
            self.A_log.uniform_(1e-3, 16, generator=generator).log_()
            self.dt_bias.fill_(1.0)


def padding_last(positions: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The order in which real tokens come first, and the way back. (Gathered, not scattered: see docs/LOG.md.)"""
    order = (positions < 0).to(torch.int8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def step_by_step(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
) -> tuple[Float[Tensor, "B T H dv"], list[Float[Tensor, "B H dk dv"]]]:
    """`recurrent`, with the state after every token."""
    outputs, states = [], []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        o, state = recurrent(q[:, now], k[:, now], v[:, now], g[:, now], beta[:, now], state)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), states


def one(done: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Only the last state is known."""
    return done[0], [done[1]]


def unit(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the head."""
    return x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + 1e-6)


def follow(segments: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Padding (-1, at the end) joins the document before it, so that it starts none of its own."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    latest = torch.where(segments >= 0, index, 0).cummax(dim=1).values
    return segments.gather(1, latest)


def last(columns: Float[Tensor, "B P C"], n: int, count: Int[Tensor, " B"] | None) -> Float[Tensor, "B n C"]:
    """The n columns that end at each row's last real token; columns begin with n of earlier passes."""
    if count is None:
        return columns[:, columns.shape[1] - n :]
    index = count[:, None] + torch.arange(n, device=columns.device)
    return columns.gather(1, index[..., None].expand(-1, -1, columns.shape[2]))
