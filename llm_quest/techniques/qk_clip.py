"""QK-Clip (Kimi K2, arXiv:2507.20534, section 2.1): where a head's largest attention logit S_h of the last step exceeds
tau, its query and key weights are scaled down after the step, so that it would have been tau:

      gamma_h = min(1, tau / S_h)        W_q^h <- sqrt(gamma_h) W_q^h        W_k^h <- sqrt(gamma_h) W_k^h

The step itself is unchanged; the growth of the weights is bounded. With Muon it is MuonClip. Each mixer's
`rescale_logits_` decides which weights that means: heads that share a key, MLA's shared rotary key, biases.

Commonly got wrong: masked (future, padding) keys count; a negative maximum gives a negative gamma and NaN weights;
biases of q and k are forgotten; under q/k norm it does nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from llm_quest.errors import UsageError
from llm_quest.layers.attention import KEY_SHARE_RULES
from llm_quest.layers.scaled_dot_product import ScaledDotProduct, dense_mask
from llm_quest.scope import BlockDiagonalMask, CausalMask, MaskSpec, Scope, SlidingWindow
from llm_quest.techniques.model_spec import Model, attention_layers

QUERY_BLOCK, MAX_SCORES = 128, 2**20


@dataclass(frozen=True)
class QKClip:
    """A technique, which measures the logits of every attention layer, and the callback that clips after each step.

    tau: the largest logit that stays. heads: "each" has its own gamma, or the whole "layer" one (the naive form).
    magnitude: S is the largest absolute value, so that strongly negative logits are bounded too. key_share: who gives
    way where heads share a key, a name in `layers.attention.KEY_SHARE_RULES`."""

    tau: float = 100.0
    heads: str = "each"
    magnitude: bool = False
    key_share: str = "query"
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise UsageError(f"QK-Clip's tau is {self.tau}; it must be positive (the paper's is 100)")
        if self.heads not in ("each", "layer"):
            raise UsageError(f"QK-Clip has no heads {self.heads!r}; known: each, layer")
        if self.key_share not in KEY_SHARE_RULES:
            raise UsageError(f"QK-Clip has no key_share {self.key_share!r}; known: {', '.join(KEY_SHARE_RULES)}")

    def __call__(self, model: Model) -> Model:
        mixers = attention_layers(model, self)
        if any(isinstance(module, MaxLogitMeter) for mixer in mixers for module in mixer.modules()):
            raise ValueError("QK-Clip measures this model already; it is applied once")
        for mixer in mixers:
            try:
                mixer.rescale_logits_(torch.ones(mixer.num_attention_heads), self.key_share)
            except ValueError as error:
                raise UsageError(f"QK-Clip cannot act on this model: {error}") from None
        for mixer in mixers:
            mixer.attend.max_logits = MaxLogitMeter(self.magnitude)
            mixer.attend.register_forward_hook(mixer.attend.max_logits)
        return model

    @torch.no_grad()
    def on_step_end(self, model: nn.Module, step: int) -> Mapping[str, Any] | None:
        """Clip, and reset the measurement. Returns the largest logit before the clip, for the log."""
        meters = [(mixer, meter) for mixer, meter in self.meters(model) if meter.max_logits is not None]
        if not meters:
            return None
        measured = [meter.take() for _, meter in meters]
        largest = all_reduce_max(torch.cat(measured)).split([len(S) for S in measured])
        max_logit = float(torch.cat(largest).amax())
        if max_logit > self.tau:
            for (mixer, _), S in zip(meters, largest, strict=True):
                mixer.rescale_logits_(self.gamma(S), self.key_share)
        return {"max_logit": max_logit}

    def on_step_skipped(self, model: nn.Module) -> None:
        """Reset: a logit that is not finite would hide every later one."""
        for _, meter in self.meters(model):
            meter.max_logits = None

    def meters(self, model: nn.Module) -> list[tuple[Any, MaxLogitMeter]]:
        """Every attention layer with its meter."""
        mixers = attention_layers(model, self)
        return [(mixer, meter) for mixer in mixers for meter in mixer.modules() if isinstance(meter, MaxLogitMeter)]

    def gamma(self, S: Float[Tensor, " H"]) -> Float[Tensor, " H"]:
        """tau / S where S exceeds tau, else exactly 1."""
        S = S if self.heads == "each" else S.amax().expand_as(S)
        return torch.where(self.tau < S, self.tau / S, torch.ones_like(S))


class MaxLogitMeter(nn.Module):
    """A forward hook on `attend`: the largest scaled logit of each head over the training passes since `take`."""

    def __init__(self, magnitude: bool):
        super().__init__()
        self.magnitude = magnitude
        self.max_logits: Tensor | None = None

    @torch.no_grad()
    def forward(self, attend: ScaledDotProduct, inputs: tuple[Any, ...], output: Tensor) -> None:
        if attend.training:
            q, k, _, attention_mask, scope = inputs
            largest = max_attention_logits(q, k, attention_mask, scope, self.magnitude) * attend.scale
            self.max_logits = largest if self.max_logits is None else torch.maximum(self.max_logits, largest)

    def take(self) -> Float[Tensor, " H"]:
        """The measurement, which is then reset."""
        assert self.max_logits is not None, "a training pass comes before take"
        max_logits, self.max_logits = self.max_logits, None
        return max_logits


def max_attention_logits(
    q: Float[Tensor, "B T H d"], k: Float[Tensor, "B S G d"], attention_mask: MaskSpec, scope: Scope, magnitude: bool
) -> Float[Tensor, " H"]:
    """max over rows, real queries and the keys that each of them sees, of q.k (of |q.k| if `magnitude`), before any
    scale or cap. Works on a block of queries at a time, with the keys that it can see, and on few rows, so that the
    scores stay in the processor's cache."""
    (batch, length, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    if isinstance(attention_mask, BlockDiagonalMask):
        attention_mask = dense_mask(attention_mask, q, k)
    q_BGrTd = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()
    k_BGdS = k.transpose(1, 2).contiguous().mT
    rows_at_once = max(1, MAX_SCORES // (heads * QUERY_BLOCK * keys))
    largest = q.new_full((groups, heads // groups), float("-inf"))
    for rows in (slice(first, first + rows_at_once) for first in range(0, batch, rows_at_once)):
        for start in range(0, length, QUERY_BLOCK):
            queries = slice(start, min(start + QUERY_BLOCK, length))
            seen = visible_keys(attention_mask, queries, keys)
            block = q_BGrTd[rows, :, :, queries]
            scores = (block.flatten(2, 3) @ k_BGdS[rows, ..., seen]).unflatten(2, block.shape[2:4])
            scores = scores.abs_() if magnitude else scores
            mask_scores_(scores, attention_mask, scope, rows, queries, seen)
            largest = torch.maximum(largest, scores.amax(dim=-1).amax(dim=(0, 3)))
    return largest.flatten().to(torch.promote_types(largest.dtype, torch.float32))


def visible_keys(attention_mask: MaskSpec, queries: slice, keys: int) -> slice:
    """The keys that any of these queries can see."""
    if attention_mask is CausalMask.FULL or isinstance(attention_mask, Tensor):
        return slice(0, keys)
    return slice(
        max(0, queries.start - attention_mask.window + 1) if isinstance(attention_mask, SlidingWindow) else 0,
        queries.stop,
    )


def mask_scores_(
    scores: Float[Tensor, "B G r T S"], attention_mask: MaskSpec, scope: Scope, rows: slice, queries: slice, keys: slice
) -> None:
    """-inf where the query does not see the key, or is padding (which sees padding alone)."""
    if isinstance(attention_mask, Tensor):
        allowed = attention_mask[rows, queries, keys] & (scope.position_ids[rows, queries, None] >= 0)
        scores.masked_fill_(~allowed[:, None, None], float("-inf"))
    elif attention_mask is not CausalMask.FULL:
        first = queries.start if attention_mask is CausalMask.CAUSAL else keys.start
        i = torch.arange(queries.start, queries.stop, device=scores.device)[:, None]
        j = torch.arange(first, keys.stop, device=scores.device)
        hidden = (j > i) | (i - j >= attention_mask.window) if isinstance(attention_mask, SlidingWindow) else j > i
        scores[..., first - keys.start :] += scores.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def all_reduce_max(S: Tensor) -> Tensor:
    """The largest of all ranks', in place."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(S, op=distributed.ReduceOp.MAX)
    return S
