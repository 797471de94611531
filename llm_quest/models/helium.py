"""Helium 1 (Kyutai 2025, "Helium 1: a modular and multilingual LLM"). What is new after Llama:

- The rotated pairs are neighbors: the files keep the order of the rows in which the model was trained.
- eps 1e-8; base 100,000; every query head has its own key/value head.

Commonly got wrong: rotating halves, which loads without a word and reads nonsense; `attention_bias` does not reach the
output projection. Differs: in bfloat16 the published code multiplies by a norm's weight before it casts back; here the
cast comes first, as in Llama.
"""

from __future__ import annotations

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama, seed_oss
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, rope_field
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family


@config_dataclass
class Config(llama.Config):
    """Llama's numbers, as Helium's config.json has them. attention_bias: of queries, keys and values."""

    num_key_value_heads: int = hf_default(20)
    head_dim: int = hf_default(128)
    max_position_embeddings: int = hf_default(4096)
    rotary: RotaryEmbedding = rope_field(theta=100_000.0, interleaved=True)
    rms_norm_eps: float = 1e-8
    attention_out_bias: bool = constant_field(default=False)

    def __post_init__(self) -> None:
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"{self.num_attention_heads} heads of {self.head_dim} are not {self.hidden_size} wide; Helium's output "
                "projection is square"
            )


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer; a bias, where there is one, is not on the output projection."""
    return seed_oss.block(config, layer_idx)  # type: ignore[arg-type]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("helium", config, block, TokenEmbedding, RMSNorm)


ROTARY, TINY_ROTARY = (RotaryEmbedding(width, 100_000.0, interleaved=True) for width in (128, 12))
HELIUM = Config(48_000, 2560, 24, 20, 20, 128, 7040, 4096, ROTARY, False)
TINY = Config(97, 48, 2, 4, 4, 12, 64, 128, TINY_ROTARY, False)
FAMILY = Family(
    name="helium",
    Config=Config,
    assemble=assemble,
    weight_map=seed_oss.weight_map,
    architectures={"helium": "HeliumForCausalLM"},
    presets=(
        Preset("helium-1-2b", HELIUM, 2_172_643_840, "kyutai/helium-1-preview-2b", eos_token_ids=(2,)),
        Preset("helium-tiny", TINY),
    ),
)
