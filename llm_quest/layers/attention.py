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

from llm_quest.layers.cache import SlotCache
from llm_quest.layers.linear import Linear
from llm_quest.layers.projections import Projections, require_own, scale_rows_
from llm_quest.scope import Band, Plain, Scope, Sight

Visible = Bool[Tensor, "B T S"] | Plain | Band


class Attend(Protocol):
    """q (B,T,H,d), k (B,S,G,d), v (B,S,G,dv), who sees whom -> (B,T,H,dv)."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Sight,
        *,
        scale: float,
        dropout: float = 0.0,
        sink: Tensor | None = None,
    ) -> Tensor: ...


def explicit_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    visible: Visible,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
    cap: float | None = None,
) -> Float[Tensor, "B T H dv"]:
    """softmax(q k^T * scale, over the visible keys) v: the definition, with every score in memory."""
    weights = attention_weights(q, k, visible, scale=scale, sink=sink, cap=cap).to(v.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(q.shape[2] // k.shape[2], dim=2))


def attention_weights(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    visible: Visible,
    *,
    scale: float,
    sink: Float[Tensor, " H"] | None = None,
    cap: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """How each query shares its attention out, softmax in at least float32.

    cap: scores become cap * tanh(score / cap) *before* the mask (Gemma 2; after it, a hidden key would get -cap instead
    of nothing). sink: one more logit per head that takes weight and brings no value (gpt-oss, MiMo)."""
    k_BSHd = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k_BSHd) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if visible is not Plain.ALL:
        scores = scores.masked_fill(~mask_of(visible, q, k)[:, None], float("-inf"))
    if sink is not None:
        drain = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, drain), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., : k.shape[1]]


def capped(cap: float) -> Attend:
    """The explicit form with capped scores; the fused kernel knows no cap."""
    return partial(explicit_attention, cap=cap)


def cap_of(attend: Attend) -> float | None:
    """The cap that `capped` gave, None for other forms."""
    return attend.keywords.get("cap") if isinstance(attend, partial) else None


def mask_of(visible: Visible, q: Tensor, k: Tensor) -> Bool[Tensor, "batch T S"]:
    """The mask, written out where only its kind is known."""
    if isinstance(visible, Tensor):
        return visible
    seen = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    seen = seen if visible is Plain.ALL else seen.tril()
    return seen.triu(1 - visible.window) if isinstance(visible, Band) else seen


def fused_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    visible: Visible,
    *,
    scale: float,
    dropout: float = 0.0,
    sink: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B T H dv"]:
    """The same without holding the scores. A single query's heads are laid out as the rows of its group: one pass over
    k.

    The kernel knows no sink: it becomes one more key, of zeros, whose score is the sink itself, with a value of
    zeros."""
    if isinstance(visible, Band):
        return banded_attention(q, k, v, visible.window, scale=scale, dropout=dropout, sink=sink)
    if sink is not None:
        return sunk_attention(q, k, v, visible, sink, scale=scale, dropout=dropout)
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    k_BGSd, v_BGSd = k.transpose(1, 2), v.transpose(1, 2)
    mask = None if isinstance(visible, Plain) else visible[:, None]
    if length == 1:
        q_BGrd = q.reshape(batch, groups, heads // groups, width)
        out = F.scaled_dot_product_attention(q_BGrd, k_BGSd, v_BGSd, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.reshape(batch, 1, heads, -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BGSd,
        v_BGSd,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=visible is Plain.CAUSAL,
        scale=scale,
        enable_gqa=groups != heads,
    )
    return out.transpose(1, 2)


def banded_attention(
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
    size, length, outs = max(window, 64), q.shape[1], []
    for start in range(0, length, size):
        stop, first = min(start + size, length), max(0, start - window + 1)
        behind = start - first
        seen = torch.ones(stop - start, stop - first, dtype=torch.bool, device=q.device)
        seen = seen.tril(behind).triu(behind - window + 1).expand(q.shape[0], -1, -1)
        block = (q[:, start:stop], k[:, first:stop], v[:, first:stop])
        outs.append(fused_attention(*block, seen, scale=scale, dropout=dropout, sink=sink))
    return torch.cat(outs, dim=1)


def sunk_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    visible: Visible,
    sink: Float[Tensor, " H"],
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H dv"]:
    """Through the kernel, with a key and a value of zeros at the end and the sink in that column of a float mask."""
    length, heads = q.shape[1:3]
    keys = k.shape[1]
    seen = mask_of(visible, q, k)
    mask = q.new_zeros(seen.shape[0], 1, length, keys).masked_fill(~seen[:, None], float("-inf"))
    column = sink.to(q.dtype)[None, :, None, None].expand(mask.shape[0], heads, length, 1)
    mask = torch.cat((mask.expand(-1, heads, -1, -1), column), dim=-1)
    k_BGSd, v_BGSd = (F.pad(part, (0, 0, 0, 0, 0, 1)).transpose(1, 2) for part in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BGSd,
        v_BGSd,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=k.shape[2] != heads,
    )
    return out.transpose(1, 2)


class Meeting(NamedTuple):
    """Queries (B,T,H,d) and keys (B,S,G,d) as they meet in a mixer, and what bears on their scores: what is shown to
    its watchers."""

    q: Tensor
    k: Tensor
    visible: Sight
    scale: float
    sink: Tensor | None
    cap: float | None


class Watch(Protocol):
    """A module in a mixer's `watchers`: it looks and changes nothing (taps, QK-Clip's measure)."""

    def __call__(self, meeting: Meeting, scope: Scope) -> None: ...


Sharing = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""gamma (H,), how many groups -> factors of q (H,) and of k (G,): who gives way where heads share a key."""


def by_query(gamma: Float[Tensor, " H"], groups: int) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """q of each head by gamma, the shared k stays: no head is moved by another's gamma (Kimi K2's way with MLA's shared
    rotary key)."""
    return gamma, gamma.new_ones(groups)


def by_group(gamma: Float[Tensor, " H"], groups: int) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """Megatron's: the group's smallest gamma for all its heads, half on q and half on k. Heads are moved that needed
    not be."""
    root = gamma.unflatten(0, (groups, -1)).amin(dim=1).sqrt()
    return root.repeat_interleave(gamma.shape[0] // groups), root


def by_both(gamma: Float[Tensor, " H"], groups: int) -> tuple[Float[Tensor, " H"], Float[Tensor, " G"]]:
    """k by the root of the group's smallest gamma, q of each head by what is then left of its own: the logits of
    `by_query`, reached from both sides."""
    root = gamma.unflatten(0, (groups, -1)).amin(dim=1).sqrt()
    return gamma / root.repeat_interleave(gamma.shape[0] // groups), root


SHARING: dict[str, Sharing] = {"query": by_query, "group": by_group, "both": by_both}


class GroupedQueryAttention(nn.Module):
    """H query heads share G key/value heads (G = H: multi-head attention; G = 1: multi-query).

    rotary: turns queries and keys by their positions (NoRotary: not at all). window: look back at most that many
    tokens, the token itself included; None: all. bias: on q, k, v; out_bias: on the output projection. q_norm, k_norm:
    act on each head before the rotation; v_norm on each value head. scale: of the scores, head_width^-0.5 unless given.
    value_width: of a value head, head_width unless given. gated: the output times sigmoid of a gate, made beside the
    query (arXiv:2505.06708). sinks: a learned logit per head that takes weight and brings nothing. attend: fused, or
    the explicit definition. Techniques put watchers beside it, which look on."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int,
        head_width: int,
        rotary: Callable[[Tensor, Scope], Tensor],
        window: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        v_norm: nn.Module | None = None,
        scale: float | None = None,
        value_width: int | None = None,
        gated: bool = False,
        sinks: bool = False,
        attend: Attend = fused_attention,
    ):
        super().__init__()
        if heads % groups:
            raise ValueError(
                f"{heads} query heads cannot share {groups} key/value heads evenly: make one divide the other"
            )
        self.heads, self.groups, self.head_width = heads, groups, head_width
        self.value_width = value_width or head_width
        self.rotary, self.window, self.dropout, self.gated = rotary, window, dropout, gated
        self.scale = head_width**-0.5 if scale is None else scale
        self.attend = attend
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.v_norm = v_norm or nn.Identity()
        self.sink = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.watchers = nn.ModuleList()
        queries = heads * head_width * (2 if gated else 1)
        self.qkv = Projections(width, q=queries, k=groups * head_width, v=groups * self.value_width, bias=bias)
        self.out = Linear(heads * self.value_width, width, bias=out_bias)

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope, wanted: int | None = None) -> Float[Tensor, "B N D"]:
        """wanted: only so many first positions ask (N of T; there is no cache then); all are looked at."""
        heads = (self.heads, self.groups, self.groups)
        q, k, v = (part.unflatten(-1, (count, -1)) for part, count in zip(self.qkv(x), heads, strict=True))
        q, gate = q.chunk(2, dim=-1) if self.gated else (q, None)
        q, k, v = self.rotary(self.q_norm(q), scope), self.rotary(self.k_norm(k), scope), self.v_norm(v)
        if scope.memory is None:
            visible = scope.visible(self.window)
        else:
            seen, visible = scope.memory.extend(scope, k=k, v=v)
            k, v = seen["k"], seen["v"]
        if wanted is not None and visible is not Plain.ALL:
            visible = mask_of(visible, q, k)[:, :wanted].expand(q.shape[0], -1, -1)
        q, gate = q[:, :wanted], None if gate is None else gate[:, :wanted]
        for watch in self.watchers:
            watch(Meeting(q, k, visible, self.scale, self.sink, cap_of(self.attend)), scope)
        dropout = self.dropout if self.training else 0.0
        mixed = self.attend(q, k, v, visible, scale=self.scale, dropout=dropout, sink=self.sink)
        return self.out((mixed if gate is None else mixed * gate.sigmoid()).flatten(2))

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> SlotCache:
        return SlotCache(capacity, self.window, slack)

    def rescale_logits_(self, gamma: Float[Tensor, " H"], shared: str = "query") -> None:
        """q and k of each head by sqrt(gamma), biases too; where a group shares k, as `SHARING` names it. A gate's and
        the values' rows stay."""
        if not isinstance(self.q_norm, nn.Identity):
            raise ValueError(
                "rescaling has no effect on this mixer: its queries are normalised after projection; "
                "remove the technique or the q/k norm"
            )
        require_own(self.qkv)
        q, k = (gamma.sqrt(), gamma.sqrt()) if self.heads == self.groups else SHARING[shared](gamma, self.groups)
        gate = [q.new_ones(self.heads, self.head_width)] if self.gated else []
        rows = [torch.cat((q[:, None].expand(-1, self.head_width), *gate), dim=1).flatten()]
        rows += [k.repeat_interleave(self.head_width), q.new_ones(self.groups * self.value_width)]
        for tensor in (self.qkv.weight, self.qkv.bias):
            if tensor is not None:
                scale_rows_(tensor, torch.cat(rows))

    def fill_(self, generator: torch.Generator | None) -> None:
        """A sink starts at 0: one more key that scores nothing."""
        if self.sink is not None:
            nn.init.zeros_(self.sink)
