"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, eq. 9-19): keys and values of all heads are projections
of one short vector per token. The cache holds that vector alone, and one rotary key that all heads share.

      c = norm(W_dkv x)  (r)      k_h = [W_uk_h c ; k_rope]      v_h = W_uv_h c      q_h = [q_nope_h ; q_rope_h]

It has two equal forms. `attend_expanded` computes every head's keys and values from the cached c: cheaper for many
queries. `attend_absorbed` applies W_uk to the query and W_uv after the sum (q^T (W_uk c) = (W_uk^T q)^T c): attention
then runs over the c themselves, as if all heads shared one key/value head of width r + rope: cheaper for few queries
and a long context.

Commonly got wrong: the rotary key is not normalized; the norms' eps is 1e-6 whatever the config says; values are
narrower than keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.layers.kv_cache import KVCache, extend_layer_cache
from llm_quest.layers.linear import PackedLinear, require_unwrapped, scale_rows_
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.scope import MaskSpec, Scope

LATENT_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention: keys and values are read from one cached latent vector a token. num_attention_heads:
    H. q_lora_rank: width of the query's own latent; None: queries are projected directly. kv_lora_rank: r, the cached
    latent. qk_nope_head_dim, qk_rope_head_dim: widths of a head's parts without and with rotation; v_head_dim: of its
    value. attend: its scale is that of the whole score."""

    def __init__(
        self,
        dim: int,
        *,
        num_attention_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rotary: Callable[[Tensor, Scope], Tensor],
        attend: ScaledDotProduct,
        bias: bool = False,
    ):
        super().__init__()
        self.num_attention_heads, self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = (
            num_attention_heads,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        )
        self.rotary, self.attend = rotary, attend
        if q_lora_rank is None:
            self.q_down, self.q_norm = nn.Identity(), nn.Identity()
        else:
            self.q_down = nn.Linear(dim, q_lora_rank, bias=bias)  # type: ignore[assignment]
            self.q_norm = RMSNorm(q_lora_rank, LATENT_NORM_EPS)  # type: ignore[assignment]
        self.q_up = nn.Linear(
            q_lora_rank or dim, num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim), bias=False
        )
        self.kv_down = PackedLinear(dim, latent=kv_lora_rank, rotary=qk_rope_head_dim, bias=bias)
        self.kv_norm = RMSNorm(kv_lora_rank, LATENT_NORM_EPS)
        self.kv_up = nn.Linear(kv_lora_rank, num_attention_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.out = nn.Linear(num_attention_heads * v_head_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (self.num_attention_heads, -1))
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        c, k_rope = self.kv_down(x)
        k_rope = self.rotary(k_rope[:, :, None], scope)[:, :, 0]
        q_rope = self.rotary(q_rope, scope)
        latent = torch.cat((self.kv_norm(c), k_rope), dim=-1)
        cached, attention_mask = extend_layer_cache(scope, None, latent=latent)
        latent = cached["latent"]
        attend_form = (
            self.attend_absorbed if self.is_absorbed_cheaper(q.shape[1], latent.shape[1]) else self.attend_expanded
        )
        return self.out(attend_form(q_nope, q_rope, latent, attention_mask, scope).flatten(2))

    def is_absorbed_cheaper(self, num_queries: int, num_keys: int) -> bool:
        """Does the absorbed form take fewer multiplications? Expanding costs each cached token once; absorbing makes
        each score and each sum longer."""
        expand = num_keys * self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim) + num_queries * num_keys * (
            self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        )
        absorb = num_queries * self.kv_lora_rank * (
            self.qk_nope_head_dim + self.v_head_dim
        ) + num_queries * num_keys * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        return absorb < expand

    def attend_expanded(
        self,
        q_nope: Float[Tensor, "B T H n"],
        q_rope: Float[Tensor, "B T H r"],
        latent: Float[Tensor, "B S c"],
        attention_mask: MaskSpec,
        scope: Scope,
    ) -> Float[Tensor, "B T H v"]:
        """Attention with every head's own keys and values."""
        c, k_rope = latent.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_nope, v = (
            self.kv_up(c)
            .unflatten(-1, (self.num_attention_heads, -1))
            .split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        )
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.num_attention_heads, -1)), dim=-1)
        return self.attend(torch.cat((q_nope, q_rope), dim=-1), k, v, attention_mask, scope)

    def attend_absorbed(
        self,
        q_nope: Float[Tensor, "B T H n"],
        q_rope: Float[Tensor, "B T H r"],
        latent: Float[Tensor, "B S c"],
        attention_mask: MaskSpec,
        scope: Scope,
    ) -> Float[Tensor, "B T H v"]:
        """Attention over the latents themselves: one key/value head for all."""
        up = self.kv_up.weight.unflatten(0, (self.num_attention_heads, -1)).to(q_nope.dtype)
        W_uk, W_uv = up.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, W_uk), q_rope), dim=-1)
        k = latent[:, :, None]
        mixed = self.attend(q, k, k[..., : self.kv_lora_rank], attention_mask, scope)
        return torch.einsum("bthc,hvc->bthv", mixed, W_uv)

    def new_cache(self, batch_size: int, capacity: int, max_rewind: int = 0) -> KVCache:
        """kv_lora_rank + qk_rope_head_dim numbers per token, for all heads together."""
        return KVCache(capacity, None, max_rewind)

    def rescale_logits_(self, gamma: Float[Tensor, " H"], key_share: str = "query") -> None:
        """Kimi K2's rule (arXiv:2507.20534): the unrotated parts of q and k times sqrt(gamma) each; the rotated part of
        q alone times gamma, since all heads share that key. No other key is shared: `key_share` has no effect."""
        require_unwrapped(self.q_up, self.kv_up)
        root = gamma.sqrt()[:, None]
        q = torch.cat((root.expand(-1, self.qk_nope_head_dim), gamma[:, None].expand(-1, self.qk_rope_head_dim)), dim=1)
        k = torch.cat(
            (root.expand(-1, self.qk_nope_head_dim), torch.ones_like(root).expand(-1, self.v_head_dim)), dim=1
        )
        scale_rows_(self.q_up.weight, q.flatten())
        scale_rows_(self.kv_up.weight, k.flatten())
