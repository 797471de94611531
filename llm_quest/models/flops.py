"""What passes over rows cost, counted on the model itself by PyTorch's counter: products with weights, which grow with
the tokens, and products of tokens with tokens, which grow with their pairs.

      a row of T tokens, forward   a T + b T^2       backward: twice that       a token at place t, cached   a + b t

a and b are found from two lengths, 64 and 128, and hold for plain attention. Too large beyond a window of 128 and more,
which is whole at both lengths; too small for a cached step of latent attention (MLA), which costs more for each token
in the cache than a pass over whole rows does. A kernel that skips what a mask hides is counted as if it did not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from llm_quest.models.decoder import Decoder

Shape = Sequence[int]
SHORT_LENGTH, LONG_LENGTH = 64, 128


@dataclass(frozen=True)
class FlopCost:
    """FLOPs: a per token and b per pair of tokens."""

    per_token: float
    per_pair: float

    def forward(self, length: int) -> float:
        return self.per_token * length + self.per_pair * length**2

    def training(self, length: int) -> float:
        """Forward and backward."""
        return 3 * self.forward(length)

    def decoding(self, context_length: int, num_tokens: int) -> float:
        """One after another behind `before` tokens, with a cache. The last token drawn is never read."""
        read = max(num_tokens - 1, 0)
        return self.per_token * read + self.per_pair * (read * context_length + read * (read + 1) / 2)


def measure_flop_cost(model: Decoder) -> FlopCost:
    """Of this model, with whatever techniques it carries."""
    length = min(LONG_LENGTH, model.config.max_position_embeddings)
    half = min(SHORT_LENGTH, length // 2)
    whole, part = count_forward_flops(model, length), count_forward_flops(model, half)
    pair = (whole / length - part / half) / (length - half)
    return FlopCost(whole / length - pair * length, pair)


def count_forward_flops(model: Decoder, length: int) -> float:
    """FLOPs of one row, forward."""
    row = torch.zeros(1, length, dtype=torch.int64, device=next(model.parameters()).device)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter, torch.no_grad():
        model(row)
    return float(counter.get_total_flops())


def grouped_mm_flops(x: Shape, weights: Shape, *rest: Any, **options: Any) -> int:
    """x (N,K) by one of the matrices (E,K,M), each row by its own: 2 N K M."""
    return 2 * math.prod(x) * weights[-1]


def attention_flops(q: Shape, k: Shape, v: Shape, *rest: Any, **options: Any) -> int:
    """q (B,H,T,d), k (B,G,S,d), v (B,G,S,dv): 2 B H T S (d + dv): all pairs, those that a mask hides too."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def flop_formulas() -> dict[Any, Any]:
    """Products that PyTorch's counter does not know, the experts' grouped one among them."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {torch.ops.aten._grouped_mm: grouped_mm_flops, kernel: attention_flops}
    ours = getattr(torch.ops.llm_quest, "grouped_product", None)
    return known if ours is None else known | {ours: grouped_mm_flops}
