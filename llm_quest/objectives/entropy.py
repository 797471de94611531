"""The entropy of the model's distribution at each position with a target, with its gradient: for an entropy bonus.

      H = log sum_v e^z_v - sum_v p_v z_v,   z = logits / temperature

(To *watch* entropy, the mean of -log p over what was sampled is enough, and free.)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.objectives.cross_entropy import CHUNK_ROWS


def token_entropies(
    model: Any, h: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"], temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """In nats, at least float32; exactly 0 where the target is -100. No more than a few rows of logits are held."""
    learned, head = targets != IGNORE_INDEX, model.head
    parts = [
        checkpoint(head_entropy, x, head.weight, head.softcap, temperature, use_reentrant=False)
        for x in h[learned].split(CHUNK_ROWS)
    ]
    found = torch.cat(parts)
    return found.new_zeros(targets.shape).masked_scatter(learned, found)


def head_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], softcap: float | None, temperature: float
) -> Float[Tensor, " N"]:
    z = F.linear(x, weight)
    z = z if z.dtype == torch.float64 else z.float()
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    return z.logsumexp(dim=1) - (z.softmax(dim=1) * z).sum(dim=1)
