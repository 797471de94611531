"""Who the laws are for: every page's `-tiny` preset, so that a family is tested the moment it is listed, and variants
that stress what no tiny preset has (biases, one key/value head, YaRN, windows of several sizes side by side)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.contracts import ModelSpec
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, ParallelLayers, SingleBlock, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts, relu_squared
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.initialize import copy_module, init_normal_
from llm_quest.layers.linear import LMHead
from llm_quest.layers.moe import LatentMoE, SigmoidRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import NTKScaling, RotaryEmbedding, YaRNScaling
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope


@dataclass(frozen=True)
class Windowed:
    """A small decoder whose layers look back differently far; no page yet has windows, but rings have laws."""

    windows: tuple[int | None, ...]
    vocab_size: int = 61
    hidden_size: int = 32
    max_position_embeddings: int = 128

    @property
    def num_hidden_layers(self) -> int:
        return len(self.windows)


def window_decoder(config: Windowed) -> Decoder:
    embed = TokenEmbedding(config.vocab_size, config.hidden_size)
    model = Decoder(
        ModelSpec("windowed", config),
        embed=embed,
        blocks=[window_block(config.hidden_size, window) for window in config.windows],
        norm=RMSNorm(config.hidden_size, 1e-5),
        head=LMHead(config.hidden_size, config.vocab_size),
    )
    init_normal_(model, std=0.02, out_std=0.01, generator=torch.Generator().manual_seed(0))
    return model.eval()


def window_block(width: int, window: int | None) -> Block:
    mlp = GatedMLP(width, 2 * width, F.silu)
    return Block(Sublayer(RMSNorm(width, 1e-5), attention(width, window)), Sublayer(RMSNorm(width, 1e-5), mlp))


def attention(width: int, window: int | None) -> GroupedQueryAttention:
    return GroupedQueryAttention(
        width,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rotary=RotaryEmbedding(8, 10000.0),
        sliding_window=window,
    )


class HashedTokens(nn.Module):
    """A layer that reads the tokens themselves: a second embedding, by a hash of the token, gates x."""

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Embedding(7, width)

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        assert scope.input_ids is not None, "the decoder sets input_ids"
        return x * self.table(scope.input_ids * 31 % 7)


def single_blocks(config: Windowed) -> Decoder:
    """A small decoder of single sublayers (as Mamba hybrids have), of both in parallel (as Cohere has), and of a layer
    that reads the tokens."""
    model = window_decoder(config)
    width = config.hidden_size
    layers: list[nn.Module] = [
        attention(width, config.windows[0]),
        GatedMLP(width, 2 * width, F.silu),
        ParallelLayers(attention(width, config.windows[1]), GatedMLP(width, 2 * width, F.silu)),
        HashedTokens(width),
    ]
    model.blocks = nn.ModuleList(SingleBlock(Sublayer(RMSNorm(width, 1e-5), layer)) for layer in layers)
    init_normal_(model, std=0.02, out_std=0.01, generator=torch.Generator().manual_seed(0))
    return model.eval()


def latent(config: Windowed) -> Decoder:
    """A small decoder with LatentMoE feed-forward layers, which no page has yet."""
    model = window_decoder(config)
    for block in model.blocks:
        router = SigmoidRouter(config.hidden_size, 8, top_k=3, routed_scaling_factor=2.5)
        experts = Experts(8, 16, 16, expert_activation=relu_squared)
        shared = GatedMLP(config.hidden_size, 32, F.silu)
        block.feed_forward.layer = LatentMoE(config.hidden_size, 16, router, experts, shared)
    init_normal_(model, std=0.02, out_std=0.01, generator=torch.Generator().manual_seed(0))
    return model.eval()


TINY = tuple(preset.name for page in FAMILIES for preset in page.presets if preset.name.endswith("-tiny"))
LLAMA = preset("llama3.2-tiny").config
VARIANTS: dict[str, Callable[[], Decoder]] = {
    "llama, untied, biases, YaRN": lambda: build(
        replace(
            LLAMA,
            tie_word_embeddings=False,
            attention_bias=True,
            mlp_bias=True,
            rotary=RotaryEmbedding(16, 10000.0, YaRNScaling(4.0, 64)),
        )
    ),
    "llama, one key/value head, 4 x 24 != 48, NTK": lambda: build(
        replace(LLAMA, num_key_value_heads=1, head_dim=24, rotary=RotaryEmbedding(24, 10000.0, NTKScaling(4.0)))
    ),
    "windows 5, all, 3, 5": lambda: window_decoder(Windowed((5, None, 3, 5))),
    "window 4": lambda: window_decoder(Windowed((4, 4))),
    "latent experts": lambda: latent(Windowed((None, None))),
    "single and parallel sublayers": lambda: single_blocks(Windowed((None, 5))),
}
EVERYBODY = (*TINY, *VARIANTS)
PUBLISHED = tuple(name for name in EVERYBODY if name in TINY or name.startswith("llama"))
RINGS = ("windows 5, all, 3, 5", "window 4")


def randomize_(model: Decoder, seed: int = 0) -> Decoder:
    """Every tensor matters: matrices of std 1/sqrt(fan_in), noise on vectors (fresh biases and norms hide mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if path.endswith("A_log"):  # heads that forget at once leave nothing but rounding for their norm to magnify
                parameter.copy_(0.5 * noise - 1)
            else:
                parameter.copy_(noise / noise.shape[-1] ** 0.5 if noise.dim() > 1 else parameter + 0.3 * noise)
    return model


def fresh(name: str) -> Decoder:
    """A model of one's own, in float32, with the page's first values."""
    return VARIANTS[name]() if name in VARIANTS else build(name)


@functools.cache
def random_original(name: str, dtype: torch.dtype) -> Decoder:
    """What `own` copies, which takes a third of building it."""
    return randomize_(fresh(name)).to(dtype)


def own(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """A model of one's own with every tensor random: free to be changed."""
    return copy_module(random_original(name, dtype))


@functools.cache
def shared(name: str) -> Decoder:
    """The same in float64, made once: for tests that only look. Equal then means equal: 1e-10, and never flaky."""
    return own(name).requires_grad_(False)


def keep_block_kinds_(model: Decoder) -> Decoder:
    """The last block of each kind alone, for what takes seconds a block: equal blocks are the same code."""
    model.blocks = nn.ModuleList({block_kind(block): block for block in model.blocks}.values())
    return model


def block_kind(block: nn.Module) -> str:
    """What tells blocks apart: equal blocks are the same code, and one of them is traced."""
    details = [(getattr(part, "sliding_window", None), getattr(part, "rotary", None)) for part in block.modules()]
    return re.sub(r" at 0x\w+", "", f"{block} {details}")  # of an object without a text of its own


def random_tokens(model: Decoder, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of_rows(model: Decoder, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits (T,V) of each row, without a cache. One pass reads all, each from the first column on: what is behind
    a row's end changes nothing before it, nor does another row (test_decoder.py)."""
    tokens = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    return [logits[: len(ids)] for logits, ids in zip(model(tokens), rows, strict=True)]
