"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, eq. 9-19): keys and values of all heads are projections
of one short vector per token, and only that vector is remembered, beside one rotary key that all heads share.

      c = norm(W_dkv x)  (r)      k_h = [W_uk_h c ; k_rope]      v_h = W_uv_h c      q_h = [q_nope_h ; q_rope_h]

Two forms, one function. `expanded` makes every head's keys and values from the remembered c's: right for many queries.
`absorbed` moves W_uk to the query and W_uv behind the sum (q^T (W_uk c) = (W_uk^T q)^T c): attention then runs over the
c's themselves, as if all heads shared one key/value head of width r + rope: right for few queries and a long memory.

Commonly got wrong: the rotary key is not normed; the norms' eps is 1e-6 whatever the config says; values are narrower
than keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_quest.layers.attention import Attend, Meeting, cap_of, fused_attention
from llm_quest.layers.cache import SlotCache
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.projections import Projections, require_own, scale_rows_
from llm_quest.scope import Scope, Sight

EPS = 1e-6


class LatentAttention(nn.Module):
    """heads: H. q_rank: width of the query's own latent, None: queries are projected directly. kv_rank: r, the
    remembered latent. nope, rope: widths of a head's part without and with rotation; value: of its value. scale: on the
    whole score."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        q_rank: int | None,
        kv_rank: int,
        nope: int,
        rope: int,
        value: int,
        rotary: Callable[[Tensor, Scope], Tensor],
        scale: float,
        bias: bool = False,
    ):
        super().__init__()
        self.heads, self.kv_rank, self.nope, self.rope, self.value = heads, kv_rank, nope, rope, value
        self.rotary, self.scale = rotary, scale
        self.attend: Attend = fused_attention
        self.watchers = nn.ModuleList()
        if q_rank is None:
            self.q_down, self.q_norm = nn.Identity(), nn.Identity()
        else:
            self.q_down = nn.Linear(width, q_rank, bias=bias)  # type: ignore[assignment]
            self.q_norm = RMSNorm(q_rank, EPS)  # type: ignore[assignment]
        self.q_up = nn.Linear(q_rank or width, heads * (nope + rope), bias=False)
        self.kv_down = Projections(width, latent=kv_rank, rotary=rope, bias=bias)
        self.kv_norm = RMSNorm(kv_rank, EPS)
        self.kv_up = nn.Linear(kv_rank, heads * (nope + value), bias=False)
        self.out = nn.Linear(heads * value, width, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"], scope: Scope) -> Float[Tensor, "B T D"]:
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        c, k_rope = self.kv_down(x)
        k_rope = self.rotary(k_rope[:, :, None], scope)[:, :, 0]
        q_rope = self.rotary(q_rope, scope)
        remembered = torch.cat((self.kv_norm(c), k_rope), dim=-1)
        if scope.memory is None:
            visible = scope.visible()
        else:
            seen, visible = scope.memory.extend(scope, latent=remembered)
            remembered = seen["latent"]
        form = self.absorbed if self.absorbing_pays(q.shape[1], remembered.shape[1]) else self.expanded
        return self.out(form(q_nope, q_rope, remembered, visible, scope).flatten(2))

    def absorbing_pays(self, queries: int, keys: int) -> bool:
        """Fewer multiplications? Expanding costs each remembered token once, absorbing makes each score and sum
        longer."""
        expand = keys * self.kv_rank * (self.nope + self.value) + queries * keys * (self.nope + self.rope + self.value)
        absorb = queries * self.kv_rank * (self.nope + self.value) + queries * keys * (2 * self.kv_rank + self.rope)
        return absorb < expand

    def expanded(
        self,
        q_nope: Float[Tensor, "B T H n"],
        q_rope: Float[Tensor, "B T H r"],
        remembered: Float[Tensor, "B S c"],
        visible: Sight,
        scope: Scope,
    ) -> Float[Tensor, "B T H v"]:
        """Every head's own keys and values."""
        c, k_rope = remembered.split([self.kv_rank, self.rope], dim=-1)
        k_nope, v = self.kv_up(c).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], dim=-1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.heads, -1)), dim=-1)
        return self.meet(torch.cat((q_nope, q_rope), dim=-1), k, v, visible, scope)

    def absorbed(
        self,
        q_nope: Float[Tensor, "B T H n"],
        q_rope: Float[Tensor, "B T H r"],
        remembered: Float[Tensor, "B S c"],
        visible: Sight,
        scope: Scope,
    ) -> Float[Tensor, "B T H v"]:
        """Attention over the latents themselves: one key/value head for all."""
        up = self.kv_up.weight.unflatten(0, (self.heads, -1)).to(q_nope.dtype)
        W_uk, W_uv = up.split([self.nope, self.value], dim=1)
        q = torch.cat((torch.einsum("bthn,hnc->bthc", q_nope, W_uk), q_rope), dim=-1)
        k = remembered[:, :, None]
        mixed = self.meet(q, k, k[..., : self.kv_rank], visible, scope)
        return torch.einsum("bthc,hvc->bthv", mixed, W_uv)

    def meet(self, q: Tensor, k: Tensor, v: Tensor, visible: Sight, scope: Scope) -> Tensor:
        """Attention, under the eyes of the watchers; both forms have the same scores."""
        for watch in self.watchers:
            watch(Meeting(q, k, visible, self.scale, None, cap_of(self.attend)), scope)
        return self.attend(q, k, v, visible, scale=self.scale)

    def new_cache(self, batch: int, capacity: int, slack: int = 0) -> SlotCache:
        """kv_rank + rope numbers per token, for all heads together."""
        return SlotCache(capacity, None, slack)

    def rescale_logits_(self, gamma: Float[Tensor, " H"], shared: str = "query") -> None:
        """Kimi K2's rule (arXiv:2507.20534): the unrotated parts of q and k by sqrt(gamma) each; of the rotated parts q
        alone by gamma, since all heads share that key. No other key is shared, so `shared` has nothing to decide."""
        require_own(self.q_up, self.kv_up)
        root = gamma.sqrt()[:, None]
        q = torch.cat((root.expand(-1, self.nope), gamma[:, None].expand(-1, self.rope)), dim=1)
        k = torch.cat((root.expand(-1, self.nope), torch.ones_like(root).expand(-1, self.value)), dim=1)
        scale_rows_(self.q_up.weight, q.flatten())
        scale_rows_(self.kv_up.weight, k.flatten())
