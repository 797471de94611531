"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): where the chain begins.

A stack of blocks; each adds to the stream what attention found in earlier tokens, then what an MLP made of it.
- Positions are learned vectors, added to the token's; so the context is as long as the table.
- LayerNorm stands *before* each layer and once at the end (the first transformer had it after).
- Every query head has its own key/value head; all projections have biases.
- The MLP is four times as wide as the stream, with a GELU between.
- The output matrix is the token embedding itself.

Commonly got wrong: the GELU is the tanh approximation; LayerNorm's eps lies inside the root; the published matrices are
stored (in, out), and a forgotten transpose of the square `attn.c_proj` raises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.errors import DataError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenPositionEmbedding
from llm_quest.layers.feed_forward import MLP, gelu_tanh
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.lm_head import LMHead
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import NoRotary
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import (
    Family,
    PublishedWeight,
    Transposed,
    WeightMap,
    expand_layers,
    require_field,
    require_value,
)

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Config:
    """GPT-2's numbers. max_position_embeddings: learned positions; dropout: on attention weights, branches and
    embedding, in training."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0


def block(config: Config, layer_idx: int) -> Block:
    """One layer: multi-head attention, then the MLP."""
    head_dim = config.hidden_size // config.num_attention_heads
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=head_dim,
        rotary=NoRotary(),
        bias=True,
        attend=ScaledDotProduct(head_dim**-0.5, dropout=config.dropout),
    )
    mlp = MLP(config.hidden_size, config.intermediate_size, gelu_tanh, bias=True)
    return Block(
        mixer=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), attention, dropout=config.dropout),
        feed_forward=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), mlp, dropout=config.dropout),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = TokenPositionEmbedding(
        config.vocab_size, config.hidden_size, config.max_position_embeddings, dropout=config.dropout
    )
    return Decoder(
        ModelSpec("gpt2", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=LayerNorm(config.hidden_size, config.layer_norm_eps),
        head=LMHead(config.hidden_size, config.vocab_size, tied_embedding=embed.token),
    )


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    table: dict[str, PublishedWeight] = {
        "embed.token.weight": "transformer.wte.weight",
        "embed.position.weight": "transformer.wpe.weight",
        "blocks.{i}.mixer.norm.weight": "transformer.h.{i}.ln_1.weight",
        "blocks.{i}.mixer.norm.bias": "transformer.h.{i}.ln_1.bias",
        "blocks.{i}.mixer.layer.qkv.weight": Transposed("transformer.h.{i}.attn.c_attn.weight"),
        "blocks.{i}.mixer.layer.qkv.bias": "transformer.h.{i}.attn.c_attn.bias",
        "blocks.{i}.mixer.layer.out.weight": Transposed("transformer.h.{i}.attn.c_proj.weight"),
        "blocks.{i}.mixer.layer.out.bias": "transformer.h.{i}.attn.c_proj.bias",
        "blocks.{i}.feed_forward.norm.weight": "transformer.h.{i}.ln_2.weight",
        "blocks.{i}.feed_forward.norm.bias": "transformer.h.{i}.ln_2.bias",
        "blocks.{i}.feed_forward.layer.up.weight": Transposed("transformer.h.{i}.mlp.c_fc.weight"),
        "blocks.{i}.feed_forward.layer.up.bias": "transformer.h.{i}.mlp.c_fc.bias",
        "blocks.{i}.feed_forward.layer.down.weight": Transposed("transformer.h.{i}.mlp.c_proj.weight"),
        "blocks.{i}.feed_forward.layer.down.bias": "transformer.h.{i}.mlp.c_proj.bias",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    }
    return expand_layers(table, config.num_hidden_layers)


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    require_value(hf_config, "scale_attn_weights", True)
    require_value(hf_config, "scale_attn_by_inverse_layer_idx", False)
    require_value(hf_config, "tie_word_embeddings", True)
    dropouts = {field: hf_config.get(field, 0.1) for field in DROPOUTS}
    if len(set(dropouts.values())) > 1:
        told = ", ".join(f"{field} is {value}" for field, value in dropouts.items())
        raise DataError(f"config.json: {told}; this page has one dropout for all three: set them alike")
    hidden_size = require_field(hf_config, "n_embd")
    return Config(
        vocab_size=require_field(hf_config, "vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=require_field(hf_config, "n_layer"),
        num_attention_heads=require_field(hf_config, "n_head"),
        intermediate_size=hf_config.get("n_inner") or 4 * hidden_size,
        max_position_embeddings=hf_config.get("n_positions") or require_field(hf_config, "n_ctx"),
        layer_norm_eps=hf_config.get("layer_norm_epsilon", 1e-5),
        dropout=dropouts["resid_pdrop"],
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    dropouts = dict.fromkeys(DROPOUTS, config.dropout)
    sizes = {
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
    }
    context = {"n_positions": config.max_position_embeddings, "n_ctx": config.max_position_embeddings}
    rest = {"layer_norm_epsilon": config.layer_norm_eps, "activation_function": "gelu_new", "tie_word_embeddings": True}
    return {"vocab_size": config.vocab_size, **sizes, **context, **dropouts, **rest}


def gpt2_config(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> Config:
    """The four published sizes share everything else."""
    return Config(
        vocab_size=50257,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=1024,
    )


FAMILY = Family(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    Config=Config,
    assemble=assemble,
    initialize=init_depth_scaled_,
    names=names,
    read=read,
    publish=publish,
    optional_prefix="transformer.",
    keys_to_ignore=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    presets=(
        Preset("gpt2", gpt2_config(768, 12, 12), 124_439_808, "openai-community/gpt2", eos_token_ids=(50256,)),
        Preset(
            "gpt2-medium",
            gpt2_config(1024, 24, 16),
            354_823_168,
            "openai-community/gpt2-medium",
            eos_token_ids=(50256,),
        ),
        Preset(
            "gpt2-large", gpt2_config(1280, 36, 20), 774_030_080, "openai-community/gpt2-large", eos_token_ids=(50256,)
        ),
        Preset("gpt2-xl", gpt2_config(1600, 48, 25), 1_557_611_200, "openai-community/gpt2-xl", eos_token_ids=(50256,)),
        Preset(
            "gpt2-tiny",
            Config(
                vocab_size=97,
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=192,
                max_position_embeddings=64,
            ),
        ),
    ),
)
