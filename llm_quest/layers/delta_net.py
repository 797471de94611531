"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): a mixer whose memory has a fixed size.

A state S (key dimension x value dimension) per head is an associative memory. Each token decays it, reads what it holds
for its key, and corrects that towards its value:

      S <- e^g S          error = v - S^T k          S <- S + k (beta error)^T          o = S^T q

`recurrent_gated_delta_rule` is that definition, one token after another. `chunk_gated_delta_rule` computes 32 tokens at
a time: inside a chunk the corrections depend on each other through a unit lower-triangular matrix, which one triangular
solve inverts before any state is known (section 3.3 there; its eq. 6 to 9 are the same without the decay):

      L = strict_lower(beta k k^T D)        A = (I + L)^-1 diag(beta)       U = A v       W = A (e^G k)
      v' = U - W S      o = e^G q S + lower(q k^T D) v'      S <- e^G_end S + (e^(G_end - G) k)^T v'
      D_ij = e^(G_i - G_j), G = cumsum(g)

Commonly got wrong: e^(G_i - G_j) above the diagonal overflows and makes the gradients NaN unless it is masked *before*
the exponential; everything here runs in float32; the norm comes before the output gate; padding must neither decay nor
write.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.recurrent_cache import RecurrentStateCache, StateSnapshot
from llm_quest.scope import Scope

CHUNK_SIZE = 32
CHUNKS_AT_ONCE = 4


class DeltaRule(Protocol):
    """q, k (B,T,H,dk), v (B,T,H,dv), g, beta (B,T,H), state (B,H,dk,dv), segments (B,T) or None -> o (B,T,H,dv), state.
    The given state belongs to the segment of the first token."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def recurrent_gated_delta_rule(
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


def chunk_gated_delta_rule(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
    segments: Int[Tensor, "B T"] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Tensor, "B T H dv"], Float[Tensor, "B H dk dv"]]:
    """The same, `size` tokens at a time. Rows are padded with tokens that neither decay nor write. As many chunks are
    prepared at once as keep their intermediate results in the processor's cache."""
    batch, length, heads = q.shape[:3]
    pad_length = -length % chunk_size
    parts = [pad_to_chunks(part, pad_length).split(CHUNKS_AT_ONCE * chunk_size, dim=1) for part in (q, k, v, g, beta)]
    if segments is not None:
        parts += [
            part.split(CHUNKS_AT_ONCE)
            for part in chunk_boundaries(chunk_segment_ids(segments, pad_length, chunk_size), heads)
        ]
    outputs, S = [], state.flatten(0, 1)
    for group in zip(*parts, strict=True):
        chunks = [split_chunks(part, chunk_size) for part in group[:5]]
        chunk_terms = prepare_chunks(*chunks, boundaries=ChunkBoundaries(*group[5:]) if segments is not None else None)
        # unbind, not an index: the backward of `part[n]` builds a gradient of the full size for every chunk
        for U, W, o_intra, q_in, k_end, fade in zip(*(part.unbind() for part in chunk_terms), strict=True):
            corrected = torch.baddbmm(U, W, S, alpha=-1)
            outputs.append((q_in @ S).baddbmm_(o_intra, corrected))
            S = (S * fade).baddbmm_(k_end, corrected)
    o = torch.stack(outputs).unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o[:, :length], S.unflatten(0, (batch, heads))


def prepare_chunks(
    q: Float[Tensor, "N R C dk"],
    k: Float[Tensor, "N R C dk"],
    v: Float[Tensor, "N R C dv"],
    g: Float[Tensor, "N R C"],
    beta: Float[Tensor, "N R C"],
    *,
    boundaries: ChunkBoundaries | None,
) -> tuple[Tensor, ...]:
    """What N chunks of R rows need before any state is known: U, W, lower(q k^T D), e^G q, (e^(G_end - G) k)^T,
    e^G_end."""
    G = g.cumsum(dim=-1)
    lower = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    mask = lower if boundaries is None else lower & boundaries.same_document
    D = (G[..., :, None] - G[..., None, :]).masked_fill_(~mask, float("-inf")).exp_()
    from_start, to_end = G.exp(), D[..., -1, :]
    decay = from_start[..., -1:, None]
    if boundaries is not None:
        from_start, to_end = from_start * boundaries.same_as_first, to_end * boundaries.continues_into_next[..., None]
        decay = from_start[..., -1:, None] * boundaries.continues_into_next[..., None, None]
    L = (k @ k.mT) * (D * beta[..., None])
    A = torch.linalg.solve_triangular(L, torch.diag_embed(beta), upper=False, unitriangular=True)
    return (
        A @ v,
        (A * from_start[..., None, :]) @ k,
        (q @ k.mT) * D,
        q * from_start[..., None],
        (k * to_end[..., None]).mT,
        decay,
    )


class ChunkBoundaries(NamedTuple):
    """Where documents meet, for N chunks of R = B H rows: same_document (N,R,C,C): pairs in one document; same_as_first
    (N,R,C): in the document that the chunk begins with; continues_into_next (N,R): the next chunk begins in the
    document that this one ends with."""

    same_document: Bool[Tensor, "N R C C"]
    same_as_first: Bool[Tensor, "N R C"]
    continues_into_next: Bool[Tensor, "N R"]


def chunk_boundaries(segments: Int[Tensor, "N B C"], num_heads: int) -> ChunkBoundaries:
    following = torch.cat((segments[1:, :, 0], segments[-1:, :, -1]))
    found = ChunkBoundaries(
        segments[..., :, None] == segments[..., None, :], segments == segments[..., :1], segments[..., -1] == following
    )
    return ChunkBoundaries(*(part.repeat_interleave(num_heads, dim=1) for part in found))


def chunk_segment_ids(segments: Int[Tensor, "B T"], pad_length: int, chunk_size: int) -> Int[Tensor, "N B C"]:
    """The segments of the chunks; padding belongs to the last token's document."""
    row = torch.cat((segments, segments[:, -1:].expand(-1, pad_length)), dim=1)
    return row.unflatten(1, (-1, chunk_size)).transpose(0, 1)


def pad_to_chunks(x: Float[Tensor, "B T *rest"], pad_length: int) -> Float[Tensor, "B P *rest"]:
    """Pad rows with zeros to whole chunks."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad_length)) if pad_length else x


def split_chunks(x: Float[Tensor, "B T H *rest"], chunk_size: int) -> Float[Tensor, "N R C *rest"]:
    """Split R = B H rows into N chunks of C tokens."""
    chunks = x.unflatten(1, (-1, chunk_size))
    return chunks.permute(1, 0, 3, 2, *range(4, chunks.dim())).flatten(1, 2).contiguous()


class FlatProjection(nn.Module):
    """q, k, v, z (B,T,...) and b, a (B,T,H) as parts of two products: the layout of Qwen3.5's files."""

    def __init__(self, dim: int, *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int):
        super().__init__()
        keys, values = num_k_heads * head_k_dim, num_v_heads * head_v_dim
        self.qkvz = PackedLinear(dim, qkv=2 * keys + values, z=values)
        self.ba = PackedLinear(dim, b=num_v_heads, a=num_v_heads)
        self.sizes = [keys, keys, values]

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
        qkv, z = self.qkvz(x)
        return *qkv.split(self.sizes, dim=-1), z, *self.ba(x)


class InterleavedProjection(nn.Module):
    """The same with the rows of each product grouped by key head, [q k v z] and [b a] for each: the layout of
    Qwen3-Next's files."""

    def __init__(self, dim: int, *, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int):
        super().__init__()
        v_heads_per_k_head = num_v_heads // num_k_heads
        self.num_k_heads = num_k_heads
        self.sizes = [head_k_dim, head_k_dim, v_heads_per_k_head * head_v_dim, v_heads_per_k_head * head_v_dim]
        self.v_heads_per_k_head = v_heads_per_k_head
        self.qkvz = nn.Linear(dim, num_k_heads * sum(self.sizes), bias=False)
        self.ba = nn.Linear(dim, 2 * num_v_heads, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Tensor, ...]:
        by_head = self.qkvz(x).unflatten(-1, (self.num_k_heads, -1)).split(self.sizes, dim=-1)
        b, a = self.ba(x).unflatten(-1, (self.num_k_heads, -1)).split(self.v_heads_per_k_head, dim=-1)
        return *(part.flatten(2) for part in by_head), b.flatten(2), a.flatten(2)


class GatedDeltaNet(nn.Module):
    """num_k_heads heads of head_k_dim for queries and keys, each serving num_v_heads // num_k_heads value heads of
    head_v_dim. conv_kernel_size: of the causal convolution that q, k and v pass first. inputs: FlatProjection or
    InterleavedProjection, the layout of the published files."""

    def __init__(
        self,
        dim: int,
        *,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        conv_kernel_size: int,
        eps: float,
        inputs: type[FlatProjection] | type[InterleavedProjection],
    ):
        super().__init__()
        if num_v_heads % num_k_heads:
            raise ValueError(
                f"{num_v_heads} value heads cannot share {num_k_heads} key heads evenly: make one divide the other"
            )
        self.num_k_heads, self.num_v_heads = num_k_heads, num_v_heads
        self.head_k_dim, self.head_v_dim, self.conv_kernel_size = head_k_dim, head_v_dim, conv_kernel_size
        sizes = {
            "num_k_heads": num_k_heads,
            "num_v_heads": num_v_heads,
            "head_k_dim": head_k_dim,
            "head_v_dim": head_v_dim,
        }
        self.inputs = inputs(dim, **sizes)
        self.conv = nn.Parameter(
            torch.empty(2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim, 1, conv_kernel_size)
        )
        self.A_log = nn.Parameter(torch.empty(num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads))
        self.norm = RMSNorm(head_v_dim, eps)
        self.out = nn.Linear(num_v_heads * head_v_dim, dim, bias=False)
        self.delta_rule: DeltaRule | None = None

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        if scope.is_unpadded:
            return self.mix_padding_last(x, scope, None)
        order, back = scope.cached("padding last", lambda: order_padding_last(scope.position_ids))
        y = self.mix_padding_last(x.gather(1, order[..., None].expand_as(x)), scope, order)
        return y.gather(1, back[..., None].expand_as(y))

    def mix_padding_last(
        self, x: Float[Tensor, "B T D"], scope: Scope, order: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T D"]:
        """The layer for rows whose padding is at the end."""
        real = None if order is None else (scope.position_ids >= 0).gather(1, order)
        segments = None if scope.segment_ids is None or order is None else scope.segment_ids.gather(1, order)
        segments = segments if segments is None else extend_segments_over_padding(segments)
        *qkv, z, b, a = self.inputs(x)
        before, state = self.previous_state(x, scope)
        columns = torch.cat((before, torch.cat(qkv, dim=-1)), dim=1)
        q, k, v = self.convolve(columns, segments).split([part.shape[-1] for part in qkv], dim=-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        beta, g = b.to(wide).sigmoid(), -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        if real is not None:
            beta, g = beta * real[..., None], g * real[..., None]
        q, k = (self.repeat_key_heads(l2norm(part.to(wide).unflatten(-1, (self.num_k_heads, -1)))) for part in (q, k))
        keep_all_states = scope.layer_cache is not None and 0 < scope.layer_cache.max_rewind >= x.shape[1] - 1
        rule = self.delta_rule or (recurrent_gated_delta_rule if x.shape[1] == 1 else chunk_gated_delta_rule)
        with torch.autocast(x.device.type, enabled=False):
            v_heads = v.to(wide).unflatten(-1, (self.num_v_heads, -1))
            parts = (q * self.head_k_dim**-0.5, k, v_heads, g, beta)
            o, states = (
                recurrent_with_states(*parts, state) if keep_all_states else single_state(rule(*parts, state, segments))
            )
        if scope.layer_cache is not None:
            count = None if real is None else real.sum(dim=1)
            scope.layer_cache.put(state=states[-1], columns=last_columns(columns, self.conv_kernel_size - 1, count))
            if scope.layer_cache.max_rewind:
                scope.layer_cache.extend_history(self.state_snapshots(scope, order, states, columns, count))
        gated = self.norm(o) * F.silu(z.unflatten(-1, (self.num_v_heads, -1)).to(wide))
        return self.out(gated.flatten(2).to(x.dtype))

    def state_snapshots(
        self,
        scope: Scope,
        order: Int[Tensor, "B T"] | None,
        states: list[Tensor],
        columns: Float[Tensor, "B P C"],
        count: Int[Tensor, " B"] | None,
    ) -> list[StateSnapshot]:
        """The position of every row after each state of this pass: after every token, or at its end alone."""
        positions = scope.position_ids if order is None else scope.position_ids.gather(1, order)
        previous_ends = (
            scope.layer_cache.history[-1].positions if scope.layer_cache.history else torch.zeros_like(positions[:, 0])
        )
        ends = torch.maximum((positions + 1).cummax(dim=1).values, previous_ends[:, None])
        if len(states) < positions.shape[1]:
            return [StateSnapshot(ends[:, -1], scope.layer_cache.tensors)]
        before = self.conv_kernel_size - 1
        moments = []
        for t, state in enumerate(states, start=1):
            until = columns[:, : before + t] if count is None else columns
            latest = last_columns(until, before, None if count is None else count.clamp(max=t))
            moments.append(StateSnapshot(ends[:, t - 1], {"state": state, "columns": latest}))
        return moments

    def previous_state(self, x: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """The columns before this pass's first token (B,kernel-1,channels) and the state; zeros at the beginning."""
        stored = {} if scope.layer_cache is None else scope.layer_cache.get()
        if stored:
            return stored["columns"], stored["state"]
        columns = x.new_zeros(x.shape[0], self.conv_kernel_size - 1, self.conv.shape[0])
        shape = (x.shape[0], self.num_v_heads, self.head_k_dim, self.head_v_dim)
        return columns, x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))

    def convolve(self, columns: Float[Tensor, "B P C"], segments: Int[Tensor, "B T"] | None) -> Float[Tensor, "B T C"]:
        """SiLU of a causal convolution of each channel alone, which does not reach across documents."""
        length = columns.shape[1] - self.conv_kernel_size + 1
        taps = self.conv[:, 0].to(columns.dtype)
        y = columns[:, self.conv_kernel_size - 1 :] * taps[:, -1]
        for back in range(1, self.conv_kernel_size):
            shifted = columns[:, self.conv_kernel_size - 1 - back : self.conv_kernel_size - 1 - back + length]
            if segments is not None:
                same = segments == torch.cat((segments[:, :1].expand(-1, back), segments), dim=1)[:, :length]
                shifted = shifted * same[..., None]
            y = y + shifted * taps[:, self.conv_kernel_size - 1 - back]
        return F.silu(y)

    def repeat_key_heads(self, x: Float[Tensor, "B T K d"]) -> Float[Tensor, "B T H d"]:
        """Repeat each key head for its value heads."""
        return x.repeat_interleave(self.num_v_heads // self.num_k_heads, dim=2)

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> RecurrentStateCache:
        """A state and the last columns: the same size however long the text, times the tokens that can be rewound."""
        return RecurrentStateCache(max_rewind)

    def rescale_logits_(self, gamma: Tensor, key_share: str = "query") -> None:
        raise ValueError("Gated DeltaNet has no attention logits to rescale: its keys are normalised; leave it out")

    def init_weights(self, generator: torch.Generator | None) -> None:
        """A_log = log U(0,16), so that heads decay at many rates; dt_bias 1."""
        nn.init.normal_(self.conv, std=self.conv_kernel_size**-0.5, generator=generator)
        with torch.no_grad():
            self.A_log.uniform_(1e-3, 16, generator=generator).log_()
            self.dt_bias.fill_(1.0)


def order_padding_last(positions: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The order in which real tokens come first, and its inverse. (Gathered, not scattered: see docs/LOG.md.)"""
    order = (positions < 0).to(torch.int8).argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def recurrent_with_states(
    q: Float[Tensor, "B T H dk"],
    k: Float[Tensor, "B T H dk"],
    v: Float[Tensor, "B T H dv"],
    g: Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H dk dv"],
) -> tuple[Float[Tensor, "B T H dv"], list[Float[Tensor, "B H dk dv"]]]:
    """`recurrent_gated_delta_rule`, with the state after every token."""
    outputs, states = [], []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        o, state = recurrent_gated_delta_rule(q[:, now], k[:, now], v[:, now], g[:, now], beta[:, now], state)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, dim=1), states


def single_state(result: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The last state alone."""
    return result[0], [result[1]]


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the head."""
    return x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + 1e-6)


def extend_segments_over_padding(segments: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Padding (-1, at the end) joins the document before it, so that it begins none of its own."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    latest = torch.where(segments >= 0, index, 0).cummax(dim=1).values
    return segments.gather(1, latest)


def last_columns(columns: Float[Tensor, "B P C"], n: int, count: Int[Tensor, " B"] | None) -> Float[Tensor, "B n C"]:
    """The n columns that end at each row's last real token; the given columns begin with n of earlier passes."""
    if count is None:
        return columns[:, columns.shape[1] - n :]
    index = count[:, None] + torch.arange(n, device=columns.device)
    return columns.gather(1, index[..., None].expand(-1, -1, columns.shape[2]))
