"""Layers: modules of plain torch. None of them knows a family of models.

Shape letters, in the whole package: B batch, T tokens in this pass, S cached slots, D model dimension, H query heads,
G key/value heads, d head dimension, F feed-forward dimension, E experts, V vocabulary. Where a function reshapes more
than twice, a suffix carries the shape (`q_BTHd`). Every layer of a block is called as `layer(x, scope)`.
"""

from llm_quest.layers.attention import GroupedQueryAttention, SigmoidOutputGate, UngatedOutput
from llm_quest.layers.block import Block, ParallelLayers, Residual, SingleBlock, Sublayer
from llm_quest.layers.delta_net import FlatProjection, GatedDeltaNet, InterleavedProjection
from llm_quest.layers.embedding import ScaledEmbedding, TokenEmbedding, TokenPositionEmbedding
from llm_quest.layers.experts import Experts
from llm_quest.layers.feed_forward import MLP, GatedMLP
from llm_quest.layers.hyper_connections import HyperConnection
from llm_quest.layers.kv_cache import Cache, KVCache, NoCache
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.layers.linear import Linear, LMHead, PackedLinear
from llm_quest.layers.moe import LatentMoE, MixtureOfExperts, SigmoidRouter, SoftmaxRouter
from llm_quest.layers.multi_token_prediction import MTPModule
from llm_quest.layers.norm import DynamicTanh, LayerNorm, RMSNorm, ZeroCenteredRMSNorm
from llm_quest.layers.recurrent_cache import RecurrentStateCache
from llm_quest.layers.rotary import (
    LinearScaling,
    NoRotary,
    NTKScaling,
    RotaryEmbedding,
    YaRNScaling,
)
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.layers.vision import ImageEmbedding, LinearProjector, MLPProjector, PatchEmbedding

__all__ = [
    "MLP", "Block", "Cache", "DynamicTanh", "Experts", "FlatProjection", "GatedDeltaNet", "GatedMLP",
    "GroupedQueryAttention", "HyperConnection", "ImageEmbedding", "InterleavedProjection", "KVCache", "LMHead",
    "LatentMoE", "LayerNorm", "Linear", "LinearProjector", "LinearScaling", "MLPProjector", "MTPModule",
    "MixtureOfExperts", "MultiHeadLatentAttention", "NTKScaling", "NoCache", "NoRotary", "PackedLinear",
    "ParallelLayers", "PatchEmbedding", "RMSNorm", "RecurrentStateCache", "Residual", "RotaryEmbedding",
    "ScaledDotProduct", "ScaledEmbedding", "SigmoidOutputGate", "SigmoidRouter", "SingleBlock", "SoftmaxRouter",
    "Sublayer", "TokenEmbedding", "TokenPositionEmbedding", "UngatedOutput", "YaRNScaling", "ZeroCenteredRMSNorm",
]  # fmt: skip
