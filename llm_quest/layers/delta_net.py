"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): a mixer whose memory has a fixed size, a matrix
per head that the delta rule (`layers/delta_rule.py`) writes and reads. A short causal convolution over the projections
comes before it, a norm and an output gate after it.

Commonly got wrong: the norm comes before the output gate; padding must neither decay nor write; the convolution must
not reach over the border of two documents.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.delta_rule import (
    DeltaRule,
    chunk_gated_delta_rule,
    l2norm,
    recurrent_gated_delta_rule,
    recurrent_with_states,
    single_state,
)
from llm_quest.layers.linear import PackedLinear, disable_autocast
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.recurrent_cache import RecurrentStateCache, StateSnapshot
from llm_quest.scope import Scope


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
    """A projection with the rows of each product grouped by key head, [q k v z] and [b a] for each: the layout of
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
        with disable_autocast(x):
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
        raise ValueError("Gated DeltaNet has no attention logits to rescale: its keys are normalized; leave it out")

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
