"""SigLIP's image encoder (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343); Gemma 3
reads images with it. What is new after CLIP:

- No class token: every token is a patch, and the patches after the final norm are what is read.
- The patches' matrix has a bias, and no norm stands before the first block.
- The GELU is the tanh form; LayerNorm's eps is 1e-6.

Differs: the attention pooling that SigLIP puts on top (`vision_use_head`) is not computed; language models do not read
it. Commonly got wrong: the erf GELU of ViT or the quick one of CLIP in place of the tanh form.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.feed_forward import gelu_tanh
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.vision import PatchPositionEmbedding
from llm_quest.models import clip
from llm_quest.models.clip_encoder import block
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field
from llm_quest.models.family import Family
from llm_quest.models.image_encoder import ImageEncoder, SquareImages
from llm_quest.models.weight_names import WeightMap


def leave_out_head(values: Any) -> bool:
    """Read `vision_use_head` and answer no, whatever it says: the pooling head is never part of the model."""
    values.json.get("vision_use_head")
    return False


@config_dataclass
class Config(SquareImages):
    """The encoder's numbers, as config.json has them. image_size, patch_size: sides in pixels."""

    image_size: int = hf_default(224)
    patch_size: int = hf_default(16)
    num_channels: int = hf_default(3)
    hidden_size: int = hf_default(768)
    num_hidden_layers: int = hf_default(12)
    num_attention_heads: int = hf_default(12)
    intermediate_size: int = hf_default(3072)
    layer_norm_eps: float = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    vision_use_head: bool = json_field(leave_out_head, default=False)
    projection_dim = 0


def assemble(config: Config) -> ImageEncoder:
    """The model, before its weights are initialized."""
    return ImageEncoder(
        ModelSpec("siglip", config),
        embed=PatchPositionEmbedding(config.image_size, config.patch_size, config.num_channels, config.hidden_size),
        blocks=[block(config, layer, gelu_tanh) for layer in range(config.num_hidden_layers)],
        norm=LayerNorm(config.hidden_size, config.layer_norm_eps),
        head=nn.Identity(),
    )


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names: CLIP's, but for the class token, the first norm and the patches' bias."""
    absent = ("embed.start", "enter.")
    names = {ours: theirs for ours, theirs in clip.weight_map(config).items() if not ours.startswith(absent)}  # type: ignore[arg-type]
    return names | {"embed.patches.bias": "vision_model.embeddings.patch_embedding.bias"}


SO400M_14_896 = Config(896, 14, 3, 1152, 27, 16, 4304)
FAMILY = Family(
    name="siglip",
    Config=Config,
    assemble=assemble,
    initialize=clip.initialize,
    weight_map=weight_map,
    architectures={"siglip_vision_model": "SiglipVisionModel"},
    pipeline_tag="image-feature-extraction",
    presets=(
        Preset("siglip-so400m-14-896", SO400M_14_896, 416_866_032),
        Preset("siglip-tiny", Config(16, 4, 3, 48, 3, 4, 96)),
    ),
)
"""A part of Gemma 3; not a model of its own here."""
