"""Which positions are worth thinking about: those where a proxy model does not know what comes next (RPT,
arXiv:2506.08007).

      H = - sum over the 16 likeliest tokens of p log p

The paper does not say whether those 16 are made to sum to one. Here they are: H is then the entropy of a distribution,
at most log 16, whatever the tail weighs. `renormalised=False` is the other reading; where the 16 hold nearly everything
the two agree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm_quest.data.problems.problem import HELD_OUT
from llm_quest.errors import UsageError
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.writer import evaluating

TOP = 16
THRESHOLDS = (0.5, 1.0, 1.5)
"""Easy, medium and hard begin here (RPT), in nats. The paper's sets are nested: hard is in medium too."""


@dataclass(frozen=True)
class Position:
    """tokens[place] of a document is what is to be foretold, from tokens[:place] alone."""

    document: int
    place: int
    entropy: float


def top_entropy(
    logits: Float[Tensor, "*rows V"], top: int = TOP, *, renormalised: bool = True
) -> Float[Tensor, "*rows"]:
    """In nats, at least float32. A token without probability adds nothing (0 log 0 = 0)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    best = z.log_softmax(dim=-1).topk(min(top, z.shape[-1]), dim=-1).values
    best = best.log_softmax(dim=-1) if renormalised else best
    return torch.special.entr(best.exp()).sum(dim=-1)


@torch.no_grad()
def positions(
    proxy: Decoder, documents: Sequence[Sequence[int]], *, above: float = THRESHOLDS[0], renormalised: bool = True
) -> list[Position]:
    """Every place whose next token the proxy finds harder than `above`. A document's first token is never asked for."""
    found, device = [], next(proxy.parameters()).device
    with evaluating(proxy):
        for number, ids in enumerate(documents):
            if len(ids) > proxy.config.context:
                raise UsageError(f"document {number} has {len(ids)} tokens and the proxy sees {proxy.config.context}")
            if len(ids) < 2:
                continue
            logits = proxy(torch.tensor([list(ids[:-1])], device=device))[0]
            for place, entropy in enumerate(top_entropy(logits, renormalised=renormalised).tolist(), start=1):
                if entropy > above:
                    found.append(Position(number, place, entropy))
    return found


def bucket(entropy: float, thresholds: Sequence[float] = THRESHOLDS) -> int:
    """Disjoint buckets: how many thresholds lie below. 0 is trivial, 1 easy, 2 medium, 3 hard."""
    return sum(entropy > threshold for threshold in thresholds)


def is_held_out(ids: Sequence[int]) -> bool:
    """By the document's content: all its positions are on one side, whatever the seed. About a tenth."""
    return hashlib.sha256(np.asarray(ids, "<i8").tobytes()).digest()[0] < HELD_OUT
