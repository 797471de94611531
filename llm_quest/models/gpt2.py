"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

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

from typing import Literal

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenPositionEmbedding
from llm_quest.layers.feed_forward import MLP, gelu_tanh
from llm_quest.layers.linear import LMHead
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import NoRotary
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.config_fields import config_dataclass, spelled, spelled_alike
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import Family, preset_table
from llm_quest.models.weight_names import Names, Transposed, WeightMap, expand_layers


@config_dataclass
class Config:
    """GPT-2's numbers; config.json spells most of them its own way. max_position_embeddings: learned positions;
    dropout: on attention weights, branches and embedding, in training."""

    vocab_size: int
    hidden_size: int = spelled("n_embd")
    num_hidden_layers: int = spelled("n_layer")
    num_attention_heads: int = spelled("n_head")
    intermediate_size: int = spelled("n_inner", hf_default=lambda c: 4 * c.hidden_size)
    max_position_embeddings: int = spelled("n_positions", "n_ctx", hf_default=1024)
    layer_norm_eps: float = spelled("layer_norm_epsilon", default=1e-5)
    dropout: float = spelled_alike("resid_pdrop", "embd_pdrop", "attn_pdrop", hf_default=0.1, default=0.0)
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    tie_word_embeddings: bool = True


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
    """The model, before its weights are initialized."""
    V, D, T = config.vocab_size, config.hidden_size, config.max_position_embeddings
    embed = TokenPositionEmbedding(V, D, T, dropout=config.dropout)
    return Decoder(
        ModelSpec("gpt2", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=LayerNorm(D, config.layer_norm_eps),
        head=LMHead(D, V, tied_embedding=embed.token if config.tie_word_embeddings else None),
    )


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names; the matrices are stored the other way round."""
    parts = {
        "mixer.norm": "ln_1",
        "mixer.layer.qkv": "attn.c_attn",
        "mixer.layer.out": "attn.c_proj",
        "feed_forward.norm": "ln_2",
        "feed_forward.layer.up": "mlp.c_fc",
        "feed_forward.layer.down": "mlp.c_proj",
    }
    names: Names = {"embed.token.weight": "transformer.wte.weight", "embed.position.weight": "transformer.wpe.weight"}
    for ours, theirs in parts.items():
        weight, bias = f"transformer.h.{{i}}.{theirs}.weight", f"transformer.h.{{i}}.{theirs}.bias"
        names[f"blocks.{{i}}.{ours}.weight"] = weight if ours.endswith("norm") else Transposed(weight)
        names[f"blocks.{{i}}.{ours}.bias"] = bias
    names |= {"norm.weight": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias"}
    names |= {} if config.tie_word_embeddings else {"head.weight": "lm_head.weight"}
    return expand_layers(names, config.num_hidden_layers)


def gpt2_config(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> Config:
    """The four published sizes share everything else."""
    return Config(50_257, hidden_size, num_hidden_layers, num_attention_heads, 4 * hidden_size, 1024)


FAMILY = Family(
    name="gpt2",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"gpt2": "GPT2LMHeadModel"},
    keys_to_ignore=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    presets=(
        *preset_table(
            "hidden_size num_hidden_layers num_attention_heads",
            ("gpt2", "openai-community/gpt2", 124_439_808, 768, 12, 12),
            ("gpt2-medium", "openai-community/gpt2-medium", 354_823_168, 1024, 24, 16),
            ("gpt2-large", "openai-community/gpt2-large", 774_030_080, 1280, 36, 20),
            ("gpt2-xl", "openai-community/gpt2-xl", 1_557_611_200, 1600, 48, 25),
            make=gpt2_config,
            eos=(50_256,),
        ),
        Preset("gpt2-tiny", Config(97, 48, 2, 4, 192, 64)),
    ),
)
