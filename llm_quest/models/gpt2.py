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

from llm_quest.contracts import Card, Preset
from llm_quest.errors import DataError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import LearnedPositions
from llm_quest.layers.feed_forward import MLP, gelu_tanh
from llm_quest.layers.head import Unembed
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import NoRotary
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import Names, Page, Published, Transposed, need, only, per_layer

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Config:
    """GPT-2's numbers. context: learned positions; dropout: on attention weights, branches and embedding, in
    training."""

    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int
    context: int
    eps: float = 1e-5
    dropout: float = 0.0


def block(config: Config, layer: int) -> Block:
    """One layer: multi-head attention, then the MLP."""
    attention = GroupedQueryAttention(
        config.width,
        heads=config.heads,
        groups=config.heads,
        head_width=config.width // config.heads,
        rotary=NoRotary(),
        bias=True,
        out_bias=True,
        dropout=config.dropout,
    )
    mlp = MLP(config.width, config.hidden, gelu_tanh, bias=True)
    return Block(
        mixer=Sublayer(LayerNorm(config.width, config.eps), attention, dropout=config.dropout),
        ffn=Sublayer(LayerNorm(config.width, config.eps), mlp, dropout=config.dropout),
    )


def assemble(config: Config) -> Decoder:
    """The model, without first values."""
    embed = LearnedPositions(config.vocab, config.width, config.context, dropout=config.dropout)
    return Decoder(
        Card("gpt2", config),
        embed=embed,
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=LayerNorm(config.width, config.eps),
        head=Unembed(config.width, config.vocab, tied=embed.token),
    )


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    table: dict[str, Published] = {
        "embed.token.weight": "transformer.wte.weight",
        "embed.position.weight": "transformer.wpe.weight",
        "blocks.{i}.mixer.norm.weight": "transformer.h.{i}.ln_1.weight",
        "blocks.{i}.mixer.norm.bias": "transformer.h.{i}.ln_1.bias",
        "blocks.{i}.mixer.layer.qkv.weight": Transposed("transformer.h.{i}.attn.c_attn.weight"),
        "blocks.{i}.mixer.layer.qkv.bias": "transformer.h.{i}.attn.c_attn.bias",
        "blocks.{i}.mixer.layer.out.weight": Transposed("transformer.h.{i}.attn.c_proj.weight"),
        "blocks.{i}.mixer.layer.out.bias": "transformer.h.{i}.attn.c_proj.bias",
        "blocks.{i}.ffn.norm.weight": "transformer.h.{i}.ln_2.weight",
        "blocks.{i}.ffn.norm.bias": "transformer.h.{i}.ln_2.bias",
        "blocks.{i}.ffn.layer.up.weight": Transposed("transformer.h.{i}.mlp.c_fc.weight"),
        "blocks.{i}.ffn.layer.up.bias": "transformer.h.{i}.mlp.c_fc.bias",
        "blocks.{i}.ffn.layer.down.weight": Transposed("transformer.h.{i}.mlp.c_proj.weight"),
        "blocks.{i}.ffn.layer.down.bias": "transformer.h.{i}.mlp.c_proj.bias",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    }
    return per_layer(table, config.layers)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    only(published, "scale_attn_weights", True)
    only(published, "scale_attn_by_inverse_layer_idx", False)
    only(published, "tie_word_embeddings", True)
    dropouts = {field: published.get(field, 0.1) for field in DROPOUTS}
    if len(set(dropouts.values())) > 1:
        told = ", ".join(f"{field} is {value}" for field, value in dropouts.items())
        raise DataError(f"config.json: {told}; this page has one dropout for all three: set them alike")
    width = need(published, "n_embd")
    return Config(
        vocab=need(published, "vocab_size"),
        width=width,
        layers=need(published, "n_layer"),
        heads=need(published, "n_head"),
        hidden=published.get("n_inner") or 4 * width,
        context=published.get("n_positions") or need(published, "n_ctx"),
        eps=published.get("layer_norm_epsilon", 1e-5),
        dropout=dropouts["resid_pdrop"],
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    dropouts = dict.fromkeys(DROPOUTS, config.dropout)
    sizes = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads, "n_inner": config.hidden}
    context = {"n_positions": config.context, "n_ctx": config.context}
    rest = {"layer_norm_epsilon": config.eps, "activation_function": "gelu_new", "tie_word_embeddings": True}
    return {"vocab_size": config.vocab, **sizes, **context, **dropouts, **rest}


def sized(width: int, layers: int, heads: int) -> Config:
    """The four published sizes share everything else."""
    return Config(vocab=50257, width=width, layers=layers, heads=heads, hidden=4 * width, context=1024)


PAGE = Page(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    Config=Config,
    assemble=assemble,
    initialize=fill_by_depth_,
    names=names,
    read=read,
    publish=publish,
    optional_prefix="transformer.",
    ignore=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    presets=(
        Preset("gpt2", sized(768, 12, 12), 124_439_808, "openai-community/gpt2", eos=(50256,)),
        Preset("gpt2-medium", sized(1024, 24, 16), 354_823_168, "openai-community/gpt2-medium", eos=(50256,)),
        Preset("gpt2-large", sized(1280, 36, 20), 774_030_080, "openai-community/gpt2-large", eos=(50256,)),
        Preset("gpt2-xl", sized(1600, 48, 25), 1_557_611_200, "openai-community/gpt2-xl", eos=(50256,)),
        Preset("gpt2-tiny", Config(vocab=97, width=48, layers=2, heads=4, hidden=192, context=64)),
    ),
)
