"""What a model costs to run, counted on the model itself, assembled without memory: FLOPs by PyTorch's counter over a
forward pass, cache bytes by really making a cache and filing a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llm_quest.cli.diagram import draw_block
from llm_quest.layers.initialize import materialize
from llm_quest.models.build import build_meta_model
from llm_quest.models.decoder import Decoder
from llm_quest.models.flops import flop_formulas
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.scope import Scope

LARGE_CAPACITY = 2**18

WEIGHT_PRODUCTS = ("aten.mm", "aten.addmm", "aten._grouped_mm", "llm_quest.grouped_product")
"""Products of tokens with weights; all others are of tokens with tokens."""


@dataclass(frozen=True)
class FakeModel:
    """A model on tensors that have shape, type and device but no memory, with one block of each kind; `block_counts`:
    how many there are of each. Make and call it inside a FakeTensorMode."""

    model: Decoder
    block_counts: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Any) -> FakeModel:
        model = build_meta_model(config).eval()
        kinds: dict[tuple[str, ...], list[nn.Module]] = {}
        for block in model.blocks:
            kinds.setdefault(tuple(draw_block(block)), []).append(block)
        model.blocks = nn.ModuleList(alike[0] for alike in kinds.values())
        materialize(model, "cpu", torch.bfloat16)
        return cls(model, tuple(len(alike) for alike in kinds.values()))

    def count_cache_bytes(self, capacity: int) -> int:
        """Bytes of a real cache for one row, after filing a token. (A slot cache has one spare slot, for padding.)"""
        token = torch.zeros(1, 1, dtype=torch.int64)
        cache = self.model.new_cache(1, capacity)
        with torch.no_grad():
            self.model(token, Scope.unpadded(token, cache=cache))
        return sum(times * part.nbytes() for times, part in zip(self.block_counts, cache.layers, strict=True))

    def count_flops(self, length: int) -> tuple[int, int]:
        """FLOPs of one forward pass over one row: products with weights, products of tokens with tokens."""
        tokens = torch.zeros(1, length, dtype=torch.int64)
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter, torch.no_grad():
            self.model(tokens)
        counts = counter.get_flop_counts()
        parts = [(counts["Global"], 1)]
        parts += [(counts[f"Decoder.blocks.{kind}"], times - 1) for kind, times in enumerate(self.block_counts)]
        whole = sum(times * sum(part.values()) for part, times in parts)
        weights = sum(
            times * count for part, times in parts for op, count in part.items() if str(op) in WEIGHT_PRODUCTS
        )
        return weights, whole - weights


def cache_bytes(config: Any, context: int) -> tuple[int, int, int]:
    """(bytes one more token adds, bytes that do not grow, bytes at `context` tokens) for one row in bfloat16."""
    with FakeTensorMode():
        ghost = FakeModel.from_config(config)
        at_context, once, twice = (
            ghost.count_cache_bytes(capacity) for capacity in (context, LARGE_CAPACITY, 2 * LARGE_CAPACITY)
        )
    growing = (twice - once) // LARGE_CAPACITY
    return growing, once - growing * (LARGE_CAPACITY + 1), at_context


def image_flops(config: Any) -> tuple[int, int]:
    """(products with weights, products of patches with patches) of reading one image, forward: an image encoder with
    its classifier; of a vision-language model the encoder and the adapter, which is before the decoder reads
    anything."""
    with FakeTensorMode():
        model: Any = materialize(build_meta_model(config).eval(), "cpu", torch.bfloat16)
        seen = config.vision_config if isinstance(model, VisionLanguageModel) else config
        images = torch.zeros(1, seen.num_channels, seen.image_size, seen.image_size, dtype=torch.bfloat16)
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter, torch.no_grad():
            model.get_image_features(images) if isinstance(model, VisionLanguageModel) else model(images)
    counts = counter.get_flop_counts()["Global"]
    weights = sum(count for op, count in counts.items() if str(op) in WEIGHT_PRODUCTS)
    return weights, sum(counts.values()) - weights


def flops_per_token(config: Any, length: int) -> tuple[int, int]:
    """(products with weights, products of tokens with tokens) per token, forward, in a row of `length` tokens."""
    with FakeTensorMode():
        weights, tokens = FakeModel.from_config(config).count_flops(length)
    return round(weights / length), round(tokens / length)
