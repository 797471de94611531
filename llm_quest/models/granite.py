"""Granite 3 (Granite Team 2024, "Granite 3.0 Language Models"). What is new after Llama:

- Four constant multipliers, so that one learning rate serves every size (muP: Yang et al. 2022, arXiv:2203.03466): the
  embedding times 12, every branch times 0.22, the scores times 1/head_dim, the logits divided by 8 or 16.
- The output matrix is tied to the embedding; the multiplier of the embedding is on the input side alone.

Commonly got wrong: `attention_multiplier` stands in place of head_dim^-1/2 and not beside it, and a file without the
field means 1; `logits_scaling` divides; the branch is multiplied before it is added, not the sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import ConstantScale, RMSNorm, ScaledNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, hf_default
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, preset_table
from llm_quest.models.weight_names import Names


@config_dataclass
class Config(llama.Config):
    """Llama's numbers and four multipliers: of the embedding, of each branch, of the scores; logits_scaling divides."""

    rms_norm_eps: float = hf_default(1e-6, default=1e-5)
    embedding_multiplier: float = hf_default(1.0, default=1.0)
    residual_multiplier: float = hf_default(1.0, default=1.0)
    attention_multiplier: float = hf_default(1.0, default=1.0)
    logits_scaling: float = hf_default(1.0, default=1.0)

    def __post_init__(self) -> None:
        if not self.logits_scaling > 0:
            raise ValueError(f"logits_scaling is {self.logits_scaling}; logits are divided by it: above 0")


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer: scores by their own multiplier, each branch multiplied before it is added."""
    layer: Any = llama.block(config, layer_idx)
    layer.mixer.layer.attend = ScaledDotProduct(config.attention_multiplier)
    for sublayer in layer.sublayers:
        sublayer.post_norm = ConstantScale(config.residual_multiplier)
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""

    def final_norm(dim: int, eps: float) -> ScaledNorm:
        return ScaledNorm(RMSNorm(dim, eps), 1 / config.logits_scaling)

    embedding = partial(TokenEmbedding, scale=config.embedding_multiplier)
    return decoder_of_blocks("granite", config, block, embedding, final_norm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names: Llama's."""
    names = dict(llama.weight_map(config))
    return names | {"norm.base.weight": names.pop("norm.weight")}


def granite_config(rope_theta: float, **numbers: Any) -> Config:
    """The published sizes share vocabulary, context, key/value heads and two of the multipliers."""
    shared: dict[str, Any] = {"vocab_size": 49_155, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
    shared |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_word_embeddings": True} | numbers
    shared |= {"attention_multiplier": 1 / shared["head_dim"]}
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], rope_theta))


COLUMNS = "num_hidden_layers hidden_size num_attention_heads head_dim intermediate_size logits_scaling rope_theta"
TINY = granite_config(
    10_000.0, vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=12, intermediate_size=64, max_position_embeddings=128, logits_scaling=2.0,
)  # fmt: skip
PRESETS = preset_table(
    COLUMNS,
    ("granite3-2b", "ibm-granite/granite-3.1-2b-base", 2_533_531_648, 40, 2048, 32, 64, 8192, 8.0, 5_000_000.0),
    ("granite3-8b", "ibm-granite/granite-3.1-8b-base", 8_170_848_256, 40, 4096, 32, 128, 12_800, 16.0, 10_000_000.0),
    make=granite_config,
    eos=(0,),
)

FAMILY = Family(
    name="granite",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"granite": "GraniteForCausalLM"},
    classifiers={"granite": None},
    presets=(*PRESETS, Preset("granite-tiny", TINY)),
)
