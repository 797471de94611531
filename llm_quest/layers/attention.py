"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) and grouped queries (Ainslie et al. 2023,
arXiv:2305.13245): query head h reads key/value head h // (H/G).

`explicit_attention` is the definition; `fused_attention` is the same through PyTorch's kernel; a law holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.kv_cache import KVCache
from llm_quest.layers.linear import Linear
from llm_quest.layers.packed_linear import PackedLinear, require_unwrapped, scale_rows_
from llm_quest.scope import CausalMask, MaskSpec, Scope, SlidingWindow

AttentionMask = Bool[Tensor, "B T S"] | CausalMask | SlidingWindow


class AttentionFunction(Protocol):
    """q (B,T,H,d), k (B,S,G,d), v (B,S,G,dv), who sees whom -> (B,T,H,dv)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: MaskSpec,
        *,
        scale: float,
        dropout: float = 0.0,
        sink: Tensor | None = None,
    ) -> Tensor: ...


def explicit_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    attention_mask: AttentionMask,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B T H dv"]:
    """softmax(q k^T * scale, over the visible keys) v: the definition, with every score in memory."""
    weights = attention_weights(q, k, attention_mask, scale=scale, sink=sink, softcap=softcap).to(v.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(q.shape[2] // k.shape[2], dim=2))


def attention_weights(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    attention_mask: AttentionMask,
    *,
    scale: float,
    sink: Float[Tensor, " H"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """How each query shares its attention out, softmax in at least float32.

    softcap: scores become cap * tanh(score / cap) *before* the mask (Gemma 2; after it, a hidden key would get -cap
    instead of nothing). sink: one more logit per head that takes weight and brings no value (gpt-oss, MiMo)."""
    k_BSHd = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k_BSHd) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not CausalMask.FULL:
        scores = scores.masked_fill(~dense_mask(attention_mask, q, k)[:, None], float("-inf"))
    if sink is not None:
        sink_column = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink_column), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., : k.shape[1]]


def attention_with_softcap(softcap: float) -> AttentionFunction:
    """The explicit form with capped scores; the fused kernel knows no cap."""
    return partial(explicit_attention, softcap=softcap)


def softcap_of(attend: AttentionFunction) -> float | None:
    """The cap that `attention_with_softcap` gave, None for other forms."""
    return attend.keywords.get("softcap") if isinstance(attend, partial) else None


def dense_mask(attention_mask: AttentionMask, q: Tensor, k: Tensor) -> Bool[Tensor, "batch T S"]:
    """The mask, written out where only its kind is known."""
    if isinstance(attention_mask, Tensor):
        return attention_mask
    allowed = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    allowed = allowed if attention_mask is CausalMask.FULL else allowed.tril()
    return allowed.triu(1 - attention_mask.window) if isinstance(attention_mask, SlidingWindow) else allowed


def fused_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    attention_mask: AttentionMask,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B T H dv"]:
    """The same without holding the scores. A single query's heads are laid out as the rows of its group: one pass over
    k.

    The kernel knows no sink: it becomes one more key, of zeros, whose score is the sink itself, with a value of
    zeros."""
    if isinstance(attention_mask, SlidingWindow):
        return sliding_window_attention(q, k, v, attention_mask.window, scale=scale, dropout=dropout, sink=sink)
    if sink is not None:
        return sink_attention(q, k, v, attention_mask, sink, scale=scale, dropout=dropout)
    batch_size, length, num_attention_heads, head_dim = q.shape
    num_key_value_heads = k.shape[2]
    k_BGSd, v_BGSd = k.transpose(1, 2), v.transpose(1, 2)
    mask = None if isinstance(attention_mask, CausalMask) else attention_mask[:, None]
    if length == 1:
        q_BGrd = q.reshape(batch_size, num_key_value_heads, num_attention_heads // num_key_value_heads, head_dim)
        out = F.scaled_dot_product_attention(q_BGrd, k_BGSd, v_BGSd, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.reshape(batch_size, 1, num_attention_heads, -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BGSd,
        v_BGSd,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=attention_mask is CausalMask.CAUSAL,
        scale=scale,
        enable_gqa=num_key_value_heads != num_attention_heads,
    )
    return out.transpose(1, 2)


def sliding_window_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B T G d"],
    v: Float[Tensor, "B T G dv"],
    window: int,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B T H dv"]:
    """A window's worth of queries at a time, each block with the keys it can reach: T x 2 windows of scores instead of
    T x T."""
    block_size, length, outputs = max(window, 64), q.shape[1], []
    for start in range(0, length, block_size):
        stop, first = min(start + block_size, length), max(0, start - window + 1)
        offset = start - first
        allowed = torch.ones(stop - start, stop - first, dtype=torch.bool, device=q.device)
        allowed = allowed.tril(offset).triu(offset - window + 1).expand(q.shape[0], -1, -1)
        block = (q[:, start:stop], k[:, first:stop], v[:, first:stop])
        outputs.append(fused_attention(*block, allowed, scale=scale, dropout=dropout, sink=sink))
    return torch.cat(outputs, dim=1)


def sink_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    attention_mask: AttentionMask,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H dv"]:
    """Through the kernel, with a key and a value of zeros at the end and the sink in that column of a float mask."""
    length, num_attention_heads = q.shape[1:3]
    keys = k.shape[1]
    allowed = dense_mask(attention_mask, q, k)
    mask = q.new_zeros(allowed.shape[0], 1, length, keys).masked_fill(~allowed[:, None], float("-inf"))
    column = sink.to(q.dtype)[None, :, None, None].expand(mask.shape[0], num_attention_heads, length, 1)
    mask = torch.cat((mask.expand(-1, num_attention_heads, -1, -1), column), dim=-1)
    k_BGSd, v_BGSd = (F.pad(part, (0, 0, 0, 0, 0, 1)).transpose(1, 2) for part in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BGSd,
        v_BGSd,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=k.shape[2] != num_attention_heads,
    )
    return out.transpose(1, 2)


class AttentionInputs(NamedTuple):
    """Queries (B,T,H,d) and keys (B,S,G,d) as they meet in a mixer, and what bears on their scores: what is shown to
    its watchers."""

    q: Tensor
    k: Tensor
    attention_mask: MaskSpec
    scale: float
    sink: Tensor | None
    softcap: float | None


class ScoreObserver(Protocol):
    """A module in a mixer's `observers`: it looks and changes nothing (taps, QK-Clip's measure)."""

    def __call__(self, inputs: AttentionInputs, scope: Scope) -> None: ...


KeyShareRule = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""gamma (H,), how many groups -> factors of q (H,) and of k (G,): who gives way where heads share a key."""


def scale_queries(
    gamma: Float[Tensor, " H"], num_key_value_heads: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """q of each head by gamma, the shared k stays: no head is moved by another's gamma (Kimi K2's way with MLA's shared
    rotary key)."""
    return gamma, gamma.new_ones(num_key_value_heads)


def scale_groups(
    gamma: Float[Tensor, " H"], num_key_value_heads: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """Megatron's: the group's smallest gamma for all its heads, half on q and half on k. Heads are moved that needed
    not be."""
    root = gamma.unflatten(0, (num_key_value_heads, -1)).amin(dim=1).sqrt()
    return root.repeat_interleave(gamma.shape[0] // num_key_value_heads), root


def scale_keys_then_queries(
    gamma: Float[Tensor, " H"], num_key_value_heads: int
) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """k by the root of the group's smallest gamma, q of each head by what is then left of its own: the logits of
    `scale_queries`, reached from both sides."""
    root = gamma.unflatten(0, (num_key_value_heads, -1)).amin(dim=1).sqrt()
    return gamma / root.repeat_interleave(gamma.shape[0] // num_key_value_heads), root


KEY_SHARE_RULES: dict[str, KeyShareRule] = {
    "query": scale_queries,
    "group": scale_groups,
    "both": scale_keys_then_queries,
}


class GroupedQueryAttention(nn.Module):
    """H query heads share G key/value heads (G = H: multi-head attention; G = 1: multi-query).

    rotary: turns queries and keys by their positions (NoRotary: not at all). sliding_window: look back at most that
    many tokens, the token itself included; None: all. qkv_bias: on q, k, v; out_bias: on the output projection. q_norm,
    k_norm: act on each head before the rotation; v_norm on each value head. scale: of the scores, head_width^-0.5
    unless given. v_head_dim: of a value head, head_width unless given. output_gate: the output times sigmoid of a gate,
    made beside the query (arXiv:2505.06708). use_sinks: a learned logit per head that takes weight and brings nothing.
    attend: fused, or the explicit definition. Techniques put watchers beside it, which look on."""

    def __init__(
        self,
        dim: int,
        *,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rotary: Callable[[Tensor, Scope], Tensor],
        sliding_window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        v_norm: nn.Module | None = None,
        scale: float | None = None,
        v_head_dim: int | None = None,
        output_gate: bool = False,
        use_sinks: bool = False,
        attend: AttentionFunction = fused_attention,
    ):
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"{num_attention_heads} query heads cannot share {num_key_value_heads} key/value heads evenly: make one divide the other"
            )
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = (
            num_attention_heads,
            num_key_value_heads,
            head_dim,
        )
        self.v_head_dim = v_head_dim or head_dim
        self.rotary, self.sliding_window, self.dropout, self.output_gate = rotary, sliding_window, dropout, output_gate
        self.scale = head_dim**-0.5 if scale is None else scale
        self.attend = attend
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.v_norm = v_norm or nn.Identity()
        self.sink = nn.Parameter(torch.zeros(num_attention_heads)) if use_sinks else None
        self.observers = nn.ModuleList()
        q_rows = num_attention_heads * head_dim * (2 if output_gate else 1)
        self.qkv = PackedLinear(
            dim, q=q_rows, k=num_key_value_heads * head_dim, v=num_key_value_heads * self.v_head_dim, bias=qkv_bias
        )
        self.out = Linear(num_attention_heads * self.v_head_dim, dim, bias=out_bias)

    def forward(
        self, x: Float[Tensor, "B T D"], scope: Scope, num_queries: int | None = None
    ) -> Float[Tensor, "B N D"]:
        """num_queries: only so many first positions ask (N of T; there is no cache then); all are looked at."""
        head_counts = (self.num_attention_heads, self.num_key_value_heads, self.num_key_value_heads)
        q, k, v = (part.unflatten(-1, (count, -1)) for part, count in zip(self.qkv(x), head_counts, strict=True))
        q, gate = q.chunk(2, dim=-1) if self.output_gate else (q, None)
        q, k, v = self.rotary(self.q_norm(q), scope), self.rotary(self.k_norm(k), scope), self.v_norm(v)
        if scope.layer_cache is None:
            attention_mask = scope.attention_mask(self.sliding_window)
        else:
            cached, attention_mask = scope.layer_cache.extend(scope, k=k, v=v)
            k, v = cached["k"], cached["v"]
        if num_queries is not None and attention_mask is not CausalMask.FULL:
            attention_mask = dense_mask(attention_mask, q, k)[:, :num_queries].expand(q.shape[0], -1, -1)
        q, gate = q[:, :num_queries], None if gate is None else gate[:, :num_queries]
        for observer in self.observers:
            observer(AttentionInputs(q, k, attention_mask, self.scale, self.sink, softcap_of(self.attend)), scope)
        dropout = self.dropout if self.training else 0.0
        mixed = self.attend(q, k, v, attention_mask, scale=self.scale, dropout=dropout, sink=self.sink)
        return self.out((mixed if gate is None else mixed * gate.sigmoid()).flatten(2))

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> KVCache:
        return KVCache(capacity, self.sliding_window, max_rewind)

    def rescale_logits_(self, gamma: Float[Tensor, " H"], key_share: str = "query") -> None:
        """q and k of each head by sqrt(gamma), biases too; where a group shares k, as `KEY_SHARE_RULES` names it. A
        gate's and the values' rows stay."""
        if not isinstance(self.q_norm, nn.Identity):
            raise ValueError(
                "rescaling has no effect on this mixer: its queries are normalised after projection; "
                "remove the technique or the q/k norm"
            )
        require_unwrapped(self.qkv)
        q, k = (
            (gamma.sqrt(), gamma.sqrt())
            if self.num_attention_heads == self.num_key_value_heads
            else KEY_SHARE_RULES[key_share](gamma, self.num_key_value_heads)
        )
        gate = [q.new_ones(self.num_attention_heads, self.head_dim)] if self.output_gate else []
        rows = [torch.cat((q[:, None].expand(-1, self.head_dim), *gate), dim=1).flatten()]
        rows += [k.repeat_interleave(self.head_dim), q.new_ones(self.num_key_value_heads * self.v_head_dim)]
        for tensor in (self.qkv.weight, self.qkv.bias):
            if tensor is not None:
                scale_rows_(tensor, torch.cat(rows))

    def init_weights(self, generator: torch.Generator | None) -> None:
        """A sink starts at 0: one more key that scores nothing."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)
