"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020, section 2.4): GPT-2's decoder with the layers of CLIP's
image encoder. What is new after GPT-2:

- No logits: the end token's vector after the final norm stands for the text, projected without a bias (`text_embeds`).
- A text has 77 tokens at most, and is lowercase (the tokenizer sees to it).

Commonly got wrong: which token is the end. OpenAI's folders say eos_token_id 2, which is no token of theirs: there it
is the largest id of the row (end of text is the last of the vocabulary); in later folders it is the first eos_token_id,
because padding may be the same token.
"""

from __future__ import annotations

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.embedding import TokenPositionEmbedding
from llm_quest.layers.norm import LayerNorm
from llm_quest.models import clip
from llm_quest.models.clip_encoder import (
    HiddenAct,
    block,
    encoder_names,
    project_if_stored,
    projection,
    projection_field,
)
from llm_quest.models.config_fields import config_dataclass, hf_default
from llm_quest.models.dual_encoder import TextEncoder
from llm_quest.models.family import Family
from llm_quest.models.weight_names import WeightMap, expand_layers


@config_dataclass
class Config:
    """The encoder's numbers, as config.json has them. projection_dim: of the space that images and texts share; 0: the
    end token's vector is not projected."""

    vocab_size: int = hf_default(49_408)
    hidden_size: int = hf_default(512)
    num_hidden_layers: int = hf_default(12)
    num_attention_heads: int = hf_default(8)
    intermediate_size: int = hf_default(2048)
    max_position_embeddings: int = hf_default(77)
    eos_token_id: int = hf_default(49_407, default=49_407)
    layer_norm_eps: float = 1e-5
    hidden_act: HiddenAct = "quick_gelu"
    projection_dim: int = projection_field("CLIPTextModelWithProjection")


def assemble(config: Config) -> TextEncoder:
    """The model, before its weights are initialized."""
    return TextEncoder(
        ModelSpec("clip_text", config),
        embed=TokenPositionEmbedding(config.vocab_size, config.hidden_size, config.max_position_embeddings),
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=LayerNorm(config.hidden_size, config.layer_norm_eps),
        head=projection(config),
    )


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    token, position = (f"embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
    names = {"embed.token.weight": token, "embed.position.weight": position}
    table = encoder_names(config, "text_model.", names, {"norm": "final_layer_norm"}, "text_projection.weight")
    return expand_layers(table, config.num_hidden_layers)


FAMILY = Family(
    name="clip_text",
    Config=Config,
    assemble=assemble,
    initialize=clip.initialize,  # type: ignore[arg-type]
    weight_map=weight_map,
    architectures={"clip_text_model": "CLIPTextModel"},
    pipeline_tag="feature-extraction",
    resolve_config=project_if_stored("text_projection.weight"),
    presets=(Preset("clip-text-tiny", Config(97, 32, 2, 4, 64, 24, 96)),),
)
