"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) and grouped queries (Ainslie et al. 2023,
arXiv:2305.13245): query head h reads key/value head h // (H/G).

`explicit_attention` is the definition; `fused_attention` is the same through PyTorch's kernel; a law holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.cache import SlotCache
from llm_quest.layers.projections import Projections
from llm_quest.scope import Plain, Scope

Visible = Bool[Tensor, "B T S"] | Plain


class Attend(Protocol):
    """q (B,T,H,d), k (B,S,G,d), v (B,S,G,dv), who sees whom -> (B,T,H,dv)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | Plain, *, scale: float, dropout: float = 0.0
    ) -> Tensor: ...


def explicit_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    visible: Visible,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H dv"]:
    """softmax(q k^T * scale, over the visible keys) v, softmax in float32: the definition, with every score in memory."""
    groups = q.shape[2] // k.shape[2]
    k_BSHd, v_BSHd = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k_BSHd) * scale
    if visible is Plain.CAUSAL:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None]
    if not isinstance(visible, Plain):
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype), dropout, training=dropout > 0)
    return torch.einsum("bhts,bshd->bthd", weights, v_BSHd)


def fused_attention(
    q: Float[Tensor, "B T H d"],
    k: Float[Tensor, "B S G d"],
    v: Float[Tensor, "B S G dv"],
    visible: Visible,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B T H dv"]:
    """The same without holding the scores. A single query's heads are laid out as the rows of its group: one pass over k."""
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


class GroupedQueryAttention(nn.Module):
    """H query heads share G key/value heads (G = H: multi-head attention; G = 1: multi-query).

    rotary: turns queries and keys by their positions (NoRotary: not at all). window: look back at most that many tokens, the
    token itself included; None: all. bias: on q, k, v; out_bias: on the output projection."""

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
    ):
        super().__init__()
        if heads % groups:
            raise ValueError(f"{heads} query heads cannot share {groups} key/value heads evenly: make one divide the other")
        self.heads, self.groups, self.head_width = heads, groups, head_width
        self.rotary, self.window, self.dropout = rotary, window, dropout
        self.scale = head_width**-0.5
        self.attend: Attend = fused_attention
        self.qkv = Projections(width, q=heads * head_width, k=groups * head_width, v=groups * head_width, bias=bias)
        self.out = nn.Linear(heads * head_width, width, bias=out_bias)

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        q, k, v = (part.unflatten(-1, (-1, self.head_width)) for part in self.qkv(x))
        q, k = self.rotary(q, scope), self.rotary(k, scope)
        visible = scope.visible(self.window) if scope.memory is None else None
        if visible is None:
            seen, visible = scope.memory.extend(scope, k=k, v=v)
            k, v = seen["k"], seen["v"]
        mixed = self.attend(q, k, v, visible, scale=self.scale, dropout=self.dropout if self.training else 0.0)
        return self.out(mixed.flatten(2))

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> SlotCache:
        return SlotCache(capacity, self.window, slack)

    def rescale_logits_(self, gamma: Float[Tensor, " H"]) -> None:
        """q of each head by sqrt(gamma), k likewise where every head has its own; where a group shares k, q alone by gamma."""
        own_keys = self.heads == self.groups
        parts = {"q": gamma.sqrt(), "k": gamma.sqrt()} if own_keys else {"q": gamma}
        with torch.no_grad():
            for name, factor in parts.items():
                for tensor in (self.qkv.weight, self.qkv.bias):
                    if tensor is not None:
                        rows = tensor[self.qkv.rows(name)].unflatten(0, (self.heads, self.head_width))
                        rows.mul_(factor.view(-1, *[1] * (rows.dim() - 1)))
