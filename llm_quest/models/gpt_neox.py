"""GPT-NeoX and Pythia (Black et al. 2022, arXiv:2204.06745; Biderman et al. 2023, arXiv:2304.01373). What is new after
GPT-2:

- Attention and MLP read the same x, each through a norm of its own, and both are added at once:
  x + attention(norm1(x)) + mlp(norm2(x)).
- Rotary positions on the first quarter of each head; the rest of the head is not rotated.
- The output matrix is not tied to the embedding; the GELU is the exact one.
- Pythia: eight sizes from 14M to 12B on the same data in the same order, with checkpoints of the whole training.

Commonly got wrong: the rows of `query_key_value` are q, k, v of head 0, then of head 1, and not all queries first;
there are two norms although the branches are parallel; `use_parallel_residual: false` means GPT-2's order.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block, ParallelLayers, SingleBlock, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import MLP
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, constant_field, json_field, rope_field, spelled, unwritten
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, preset_table
from llm_quest.models.weight_names import OURS, Names, RowsByHead, expand_layers, module_names, parallel_names


@config_dataclass
class Config(llama.Config):
    """GPT-NeoX's numbers, as config.json has them. rms_norm_eps: LayerNorm's."""

    num_key_value_heads: int = json_field(lambda c: c.num_attention_heads, unwritten)
    head_dim: int = json_field(lambda c: c.hidden_size // c.num_attention_heads, unwritten)
    rotary: RotaryEmbedding = rope_field(
        partial=0.25, old_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    )
    rms_norm_eps: float = spelled("layer_norm_eps", default=1e-5)
    attention_bias: bool = True
    mlp_bias: bool = constant_field(default=True)
    use_parallel_residual: bool = True
    hidden_act: Literal["gelu"] = "gelu"  # type: ignore[assignment]


def block(config: Config, layer_idx: int) -> Block | SingleBlock:
    """One layer: attention and MLP in parallel, each behind its own norm; or one after the other."""
    attention = llama.block(config, layer_idx).mixer.layer
    mlp = MLP(config.hidden_size, config.intermediate_size, F.gelu, bias=True)
    first, second = (LayerNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    if not config.use_parallel_residual:
        return Block(Sublayer(first, attention), Sublayer(second, mlp))
    layers = ParallelLayers(attention, mlp, mixer_norm=first, feed_forward_norm=second)
    return SingleBlock(Sublayer(nn.Identity(), layers))


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("gpt_neox", config, block, TokenEmbedding, LayerNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names; queries, keys and values are stored head by head."""
    layer, heads, bias = "gpt_neox.layers.{i}.", config.num_attention_heads, config.attention_bias
    attention = module_names({"qkv": "query_key_value"}, bias=bias)
    table: Names = {
        f"{OURS}mixer.layer.{ours}": RowsByHead(f"{layer}attention.{theirs}", heads)
        for ours, theirs in attention.items()
    }
    table |= module_names({f"{OURS}mixer.layer.out": f"{layer}attention.dense"}, bias=bias)
    table |= module_names({OURS + ours: layer + theirs for ours, theirs in LAYER.items()}, bias=True)
    table = parallel_names(table, one_norm=False) if config.use_parallel_residual else table
    table |= {"embed.token.weight": "gpt_neox.embed_in.weight"}
    table |= module_names({"norm": "gpt_neox.final_layer_norm"}, bias=True)
    table |= {} if config.tie_word_embeddings else {"head.weight": "embed_out.weight"}
    return expand_layers(table, config.num_hidden_layers)


LAYER = {"mixer.norm": "input_layernorm", "feed_forward.norm": "post_attention_layernorm"}
LAYER |= {"feed_forward.layer.up": "mlp.dense_h_to_4h", "feed_forward.layer.down": "mlp.dense_4h_to_h"}


def pythia_config(**numbers: Any) -> Config:
    """The published sizes: an MLP four times as wide, a quarter of each head rotated."""
    shared = {"max_position_embeddings": 2048, "tie_word_embeddings": False} | numbers
    head_dim = numbers["hidden_size"] // numbers["num_attention_heads"]
    shared |= {"intermediate_size": 4 * numbers["hidden_size"], "head_dim": head_dim}
    shared |= {"num_key_value_heads": numbers["num_attention_heads"]}
    return Config(**shared, rotary=RotaryEmbedding(head_dim // 4, 10_000.0))


SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
PRESETS = preset_table(
    "num_hidden_layers hidden_size num_attention_heads vocab_size",
    ("pythia-14m", "EleutherAI/pythia-14m", 14_067_712, 6, 128, 4, 50_304),
    ("pythia-70m", "EleutherAI/pythia-70m", 70_426_624, 6, 512, 8, 50_304),
    ("pythia-160m", "EleutherAI/pythia-160m", 162_322_944, 12, 768, 12, 50_304),
    ("pythia-410m", "EleutherAI/pythia-410m", 405_334_016, 24, 1024, 16, 50_304),
    ("pythia-1b", "EleutherAI/pythia-1b", 1_011_781_632, 16, 2048, 8, 50_304),
    ("pythia-1.4b", "EleutherAI/pythia-1.4b", 1_414_647_808, 24, 2048, 16, 50_304),
    ("pythia-2.8b", "EleutherAI/pythia-2.8b", 2_775_208_960, 32, 2560, 32, 50_304),
    ("pythia-6.9b", "EleutherAI/pythia-6.9b", 6_857_302_016, 32, 4096, 32, 50_432),
    ("pythia-12b", "EleutherAI/pythia-12b", 11_846_072_320, 36, 5120, 40, 50_688),
    ("gpt-neox-20b", "EleutherAI/gpt-neox-20b", 20_554_567_680, 44, 6144, 64, 50_432),
    make=pythia_config,
    eos=(0,),
)

FAMILY = Family(
    name="gpt_neox",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"gpt_neox": "GPTNeoXForCausalLM"},
    keys_to_ignore=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)",),
    presets=(*PRESETS, Preset("pythia-tiny", pythia_config(**SMALL, max_position_embeddings=128))),
)
