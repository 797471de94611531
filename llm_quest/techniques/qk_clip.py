"""QK-Clip (Kimi K2, arXiv:2507.20534, section 2.1): where a head's largest attention logit S_h of the last step exceeds
tau, its query and key weights are scaled down after the step, so that it would have been tau:

      gamma_h = min(1, tau / S_h)        W_q^h <- sqrt(gamma_h) W_q^h        W_k^h <- sqrt(gamma_h) W_k^h

The step itself is untouched; what is bounded is the growth of the weights. With Muon it is MuonClip. Which weights that
means is the mixer's own business (`rescale_logits_`): heads that share a key, MLA's shared rotary key, biases.

Commonly got wrong: hidden (future, padding) keys count; a negative maximum gives a negative gamma and NaN weights;
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
from llm_quest.layers.attention import SHARING, Meeting
from llm_quest.scope import Band, Plain, Scope, Sight
from llm_quest.techniques.attending import attending
from llm_quest.techniques.card import Model

BLOCK, SCORES = 128, 2**20


@dataclass(frozen=True)
class QKClip:
    """A technique (it puts a measure beside every mixer) and the callback that clips after each step.

    tau: the largest logit that stays. heads: "each" has its own gamma, or the whole "layer" one (the naive form).
    magnitude: S is the largest absolute value, so that strongly negative logits are bounded too. shared: who gives way
    where heads share a key, a name in `layers.attention.SHARING`."""

    tau: float = 100.0
    heads: str = "each"
    magnitude: bool = False
    shared: str = "query"
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise UsageError(f"QK-Clip's tau is {self.tau}; it must be positive (the paper's is 100)")
        if self.heads not in ("each", "layer"):
            raise UsageError(f"QK-Clip knows no heads {self.heads!r}; known: each, layer")
        if self.shared not in SHARING:
            raise UsageError(f"QK-Clip knows no way {self.shared!r} to share a key; known: {', '.join(SHARING)}")

    def __call__(self, model: Model) -> Model:
        mixers = attending(model, self)
        if any(isinstance(watch, LargestLogit) for mixer in mixers for watch in mixer.watchers):
            raise ValueError("QK-Clip measures this model already; it is applied once")
        for mixer in mixers:
            try:
                mixer.rescale_logits_(torch.ones(mixer.heads), self.shared)
            except ValueError as error:
                raise UsageError(f"QK-Clip cannot act on this model: {error}") from None
        for mixer in mixers:
            mixer.watchers.append(LargestLogit(self.magnitude).train(mixer.training))
        return model

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> Mapping[str, Any] | None:
        """Clip, and forget what was measured. The number for the log is the largest logit before the clip."""
        watched = [(mixer, watch) for mixer in attending(model, self) for watch in mixer.watchers]
        seen = [(mixer, watch.take()) for mixer, watch in watched if isinstance(watch, LargestLogit) and watch.looked]
        if not seen:
            return None
        sizes = [S.shape[0] for _, S in seen]
        largest = over_all_processes(torch.cat([S for _, S in seen])).split(sizes)
        max_logit = float(torch.cat(largest).amax())
        if max_logit > self.tau:
            for (mixer, _), S in zip(seen, largest, strict=True):
                mixer.rescale_logits_(self.gamma(S), self.shared)
        return {"max_logit": max_logit}

    def after_refusal(self, model: nn.Module) -> None:
        """A logit that is not finite would hide every later one."""
        for mixer in attending(model, self):
            for watch in mixer.watchers:
                if isinstance(watch, LargestLogit):
                    watch.seen = None

    def gamma(self, S: Float[Tensor, " H"]) -> Float[Tensor, " H"]:
        """tau / S where S exceeds tau, else exactly 1."""
        S = S if self.heads == "each" else S.amax().expand_as(S)
        return torch.where(self.tau < S, self.tau / S, torch.ones_like(S))


class LargestLogit(nn.Module):
    """A watch: the largest scaled logit of each head over the training passes since it was last taken."""

    def __init__(self, magnitude: bool):
        super().__init__()
        self.magnitude = magnitude
        self.seen: Tensor | None = None

    @torch.no_grad()
    def forward(self, meeting: Meeting, scope: Scope) -> None:
        if self.training:
            now = largest_logits(meeting, scope, self.magnitude)
            self.seen = now if self.seen is None else torch.maximum(self.seen, now)

    @property
    def looked(self) -> bool:
        """Was there a training pass?"""
        return self.seen is not None

    def take(self) -> Float[Tensor, " H"]:
        """What was seen, once."""
        assert self.seen is not None, "a pass comes before taking"
        seen, self.seen = self.seen, None
        return seen


def largest_logits(meeting: Meeting, scope: Scope, magnitude: bool) -> Float[Tensor, " H"]:
    """max over rows, real queries and the keys each of them sees, of q.k * scale (before any cap; of its absolute value
    if `magnitude`): a block of queries at a time, with the keys it can reach, and few rows, so that the scores stay in
    the processor's cache."""
    (batch, length, heads, _), (keys, groups) = meeting.q.shape, meeting.k.shape[1:3]
    q_BGrTd = meeting.q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()
    k_BGdS = meeting.k.transpose(1, 2).contiguous().mT
    some = max(1, SCORES // (heads * BLOCK * keys))
    largest = meeting.q.new_full((groups, heads // groups), float("-inf"))
    for rows in (slice(first, first + some) for first in range(0, batch, some)):
        for start in range(0, length, BLOCK):
            queries = slice(start, min(start + BLOCK, length))
            seen = reach(meeting.visible, queries, keys)
            block = q_BGrTd[rows, :, :, queries]
            scores = (block.flatten(2, 3) @ k_BGdS[rows, ..., seen]).unflatten(2, block.shape[2:4])
            scores = scores.abs_() if magnitude else scores
            hide_(scores, meeting.visible, scope, rows, queries, seen)
            largest = torch.maximum(largest, scores.amax(dim=-1).amax(dim=(0, 3)))
    return largest.flatten().to(torch.promote_types(largest.dtype, torch.float32)) * meeting.scale


def reach(visible: Sight, queries: slice, keys: int) -> slice:
    """The keys that some of these queries may see."""
    if visible is Plain.ALL or isinstance(visible, Tensor):
        return slice(0, keys)
    return slice(max(0, queries.start - visible.window + 1) if isinstance(visible, Band) else 0, queries.stop)


def hide_(
    scores: Float[Tensor, "B G r T S"], visible: Sight, scope: Scope, rows: slice, queries: slice, keys: slice
) -> None:
    """-inf where the query does not see the key, or is padding (padding sees padding, which is nobody's logit)."""
    if isinstance(visible, Tensor):
        seen = visible[rows, queries, keys] & (scope.positions[rows, queries, None] >= 0)
        scores.masked_fill_(~seen[:, None, None], float("-inf"))
    elif visible is not Plain.ALL:
        first = queries.start if visible is Plain.CAUSAL else keys.start
        i = torch.arange(queries.start, queries.stop, device=scores.device)[:, None]
        j = torch.arange(first, keys.stop, device=scores.device)
        gone = (j > i) | (i - j >= visible.window) if isinstance(visible, Band) else j > i
        scores[..., first - keys.start :] += scores.new_zeros(gone.shape).masked_fill_(gone, float("-inf"))


def over_all_processes(S: Tensor) -> Tensor:
    """The largest of all ranks', in place."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(S, op=distributed.ReduceOp.MAX)
    return S
