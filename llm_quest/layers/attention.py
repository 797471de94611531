"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head h reads key/value head h // (H/G).

Commonly got wrong: key and value heads are repeated (0, 0, 1, 1), not tiled (0, 1, 0, 1); queries and keys are
normalized before the rotation; values are not rotated; one cached query sees all keys, where a causal mask from the
upper left corner would show it the first alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.layers.kv_cache import KVCache, extend_layer_cache
from llm_quest.layers.linear import Linear, PackedLinear, require_unwrapped, scale_rows_
from llm_quest.layers.norm import Identity
from llm_quest.layers.scaled_dot_product import ScaledDotProduct, dense_mask
from llm_quest.scope import CausalMask, MaskSpec, Scope

KeyShareRule = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""gamma (H,), number of key/value heads -> factors of q (H,) and of k (G,), where heads share a key."""


def scale_queries(
    gamma: Float[Tensor, " H"], num_key_value_heads: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """q of each head times its gamma, k unchanged: no head is changed by another's gamma (as Kimi K2 treats MLA's
    shared rotary key)."""
    return gamma, gamma.new_ones(num_key_value_heads)


def scale_groups(
    gamma: Float[Tensor, " H"], num_key_value_heads: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """q and k of a group times the square root of its smallest gamma (Megatron): heads below tau are scaled too."""
    root = gamma.unflatten(0, (num_key_value_heads, -1)).amin(dim=1).sqrt()
    return root.repeat_interleave(gamma.shape[0] // num_key_value_heads), root


def scale_keys_then_queries(
    gamma: Float[Tensor, " H"], num_key_value_heads: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """k times the square root of the group's smallest gamma, q of each head times gamma divided by that: the logits of
    `scale_queries`, with both matrices scaled."""
    root = gamma.unflatten(0, (num_key_value_heads, -1)).amin(dim=1).sqrt()
    return gamma / root.repeat_interleave(gamma.shape[0] // num_key_value_heads), root


KEY_SHARE_RULES: dict[str, KeyShareRule] = {
    "query": scale_queries,
    "group": scale_groups,
    "both": scale_keys_then_queries,
}


class UngatedOutput:
    """No output gate: all rows of a query head are the query."""

    def split(self, q: Float[Tensor, "B T H d"]) -> tuple[Tensor, Tensor]:
        return q, q

    def __call__(self, x: Float[Tensor, "B T H dv"], gate: Tensor) -> Float[Tensor, "B T H dv"]:
        return x


class SigmoidOutputGate(nn.Module):
    """Each head's output times sigmoid(gate) (Qiu et al. 2025, arXiv:2505.06708). The rows of a query head are the
    query and then the gate, as in Qwen3-Next's files."""

    def split(self, q: Float[Tensor, "B T H d2"]) -> tuple[Tensor, Tensor]:
        query, gate = q.chunk(2, dim=-1)
        return query, gate

    def forward(self, x: Float[Tensor, "B T H dv"], gate: Float[Tensor, "B T H dv"]) -> Float[Tensor, "B T H dv"]:
        return x * gate.sigmoid()


class UnscaledQueries:
    """No further scale of the queries."""

    def __call__(self, q: Float[Tensor, "B T H d"], scope: Scope) -> Float[Tensor, "B T H d"]:
        return q


@dataclass(frozen=True)
class PositionQueryScale:
    """Queries grow with their position p: q (1 + beta ln(1 + floor(p / original))) (Llama 4, Ministral 3). Up to the
    original length the factor is 1. Keys keep their size, so a cache needs no care."""

    beta: float
    original_max_position_embeddings: int

    def __call__(self, q: Float[Tensor, "B T H d"], scope: Scope) -> Float[Tensor, "B T H d"]:
        periods = (scope.position_ids.clamp(min=0) // self.original_max_position_embeddings).float()
        return q * (1 + self.beta * torch.log1p(periods)).to(q.dtype)[..., None, None]


class GroupedQueryAttention(nn.Module):
    """H query heads share G key/value heads (G = H: multi-head attention; G = 1: multi-query attention).

    rotary: rotates queries and keys by their positions (NoRotary: not at all). sliding_window: a query sees that many
    tokens, itself included; None: all. bias: on all four projections. q_norm, k_norm: act on each head before the
    rotation. attend: softmax(q k^T * scale) v; `ScaledDotProduct(head_dim**-0.5)` unless given.

    A model fills further slots itself: `qkv` and `out`, other projections (values of another width, a gate's rows, no
    bias on one of them); `v_norm`, which acts on each value head; `query_scale`, on the rotated queries;
    `output_gate`, on the heads' outputs."""

    def __init__(
        self,
        dim: int,
        *,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rotary: Callable[[Tensor, Scope], Tensor],
        sliding_window: int | None = None,
        bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        attend: ScaledDotProduct | None = None,
    ):
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"{num_attention_heads} query heads cannot share {num_key_value_heads} key/value heads evenly: make "
                "one divide the other"
            )
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.rotary, self.sliding_window = head_dim, rotary, sliding_window
        self.q_norm, self.k_norm = q_norm or Identity(), k_norm or Identity()
        self.v_norm: nn.Module = Identity()
        self.query_scale: UnscaledQueries | PositionQueryScale = UnscaledQueries()
        self.attend = attend or ScaledDotProduct(head_dim**-0.5)
        self.output_gate: UngatedOutput | SigmoidOutputGate = UngatedOutput()
        q_rows, kv_rows = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.qkv = PackedLinear(dim, q=q_rows, k=kv_rows, v=kv_rows, bias=bias)
        self.out = Linear(q_rows, dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], scope: Scope, num_queries: int | None = None
    ) -> Float[Tensor, "B N D"]:
        """Attention over the tokens of this pass and the cached ones. num_queries: only the first N of T positions are
        queries (without a cache); all T are keys."""
        q, k, v = self.qkv(x)
        rows, groups = x.shape[:2], self.num_key_value_heads
        q, gate = self.output_gate.split(q.view(*rows, self.num_attention_heads, -1))
        k, v = k.view(*rows, groups, -1), v.view(*rows, groups, -1)
        q, k, v = self.rotary(self.q_norm(q), scope), self.rotary(self.k_norm(k), scope), self.v_norm(v)
        q = self.query_scale(q, scope)
        cached, attention_mask = extend_layer_cache(scope, self.sliding_window, k=k, v=v)
        if num_queries is not None:
            attention_mask = first_queries(attention_mask, q, k, num_queries)
            q, gate = q[:, :num_queries], gate[:, :num_queries]
        mixed = self.attend(q, cached["k"], cached["v"], attention_mask, scope)
        return self.out(self.output_gate(mixed, gate).flatten(2))

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> KVCache:
        return KVCache(capacity, self.sliding_window, max_rewind)

    def rescale_logits_(self, gamma: Float[Tensor, " H"], key_share: str = "query") -> None:
        """q and k of each head times sqrt(gamma), biases too; where a group shares k, as `KEY_SHARE_RULES[key_share]`
        says. The rows of a gate and of the values stay."""
        if not isinstance(self.q_norm, nn.Identity):
            raise ValueError(
                "rescaling has no effect on this mixer: its queries are normalized after projection; "
                "remove the technique or the q/k norm"
            )
        require_unwrapped(self.qkv)
        q, k = (
            (gamma.sqrt(), gamma.sqrt())
            if self.num_attention_heads == self.num_key_value_heads
            else KEY_SHARE_RULES[key_share](gamma, self.num_key_value_heads)
        )
        sizes = self.qkv.parts
        gate = q.new_ones(self.num_attention_heads, sizes["q"] // self.num_attention_heads - self.head_dim)
        rows = [torch.cat((q[:, None].expand(-1, self.head_dim), gate), dim=1).flatten()]
        rows += [k.repeat_interleave(self.head_dim), q.new_ones(sizes["v"])]
        for tensor in (self.qkv.weight, self.qkv.bias):
            if tensor is not None:
                scale_rows_(tensor, torch.cat(rows))


def first_queries(attention_mask: MaskSpec, q: Tensor, k: Tensor, num_queries: int) -> MaskSpec:
    """The mask of the first queries alone."""
    if attention_mask is CausalMask.FULL:
        return attention_mask
    return dense_mask(attention_mask, q, k)[:, :num_queries].expand(q.shape[0], -1, -1)
