"""LLaVA (Liu et al. 2023, 2024, "Visual Instruction Tuning", arXiv:2304.08485, 2310.03744): a language model that is
shown images.

- An image encoder reads the image; its patches (not the class token) are taken before the last block,
  unnormalized.
- An adapter, one matrix or two with a GELU between, turns each patch into a vector of the language model's width.
- Early fusion: in the text, one placeholder token stands for every patch. Their embeddings are replaced by those
  vectors, in reading order; from there on image and text are one sequence, with one row of positions, and the decoder
  is any decoder.
- The cache knows nothing of images: they are read once, with the prompt.

      tokens   <s>  <image> <image> <image> <image>  What  color  ?          4 patches
      vectors   e      v1      v2      v3      v4      e      e    e          positions 0 1 2 3 4 5 6 7

Commonly got wrong: a position embedding for the text and none for the image, or positions in training that generation
does not repeat (here both come from the same scope); the features of the last block, or normalized ones, where the
published model reads the last but one; more placeholders than patches, silently.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.errors import DataError
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.vision import LinearProjector, MLPProjector
from llm_quest.models import clip, gpt2, llama, qwen3, vit
from llm_quest.models.config_fields import config_dataclass, json_field, spelled, unwritten
from llm_quest.models.family import Family
from llm_quest.models.multimodal import PatchesOfBlock, VisionLanguageModel
from llm_quest.models.multimodal_config import (
    PART_RENAMES,
    TextWithImages,
    family_among,
    join_weight_maps,
    text_part,
    vision_part,
)
from llm_quest.models.weight_names import WeightMap

VISION_TOWER_FAMILIES: tuple[Family, ...] = (clip.FAMILY, vit.FAMILY)
TEXT_FAMILIES: tuple[Family, ...] = (llama.FAMILY, qwen3.FAMILY, gpt2.FAMILY)
LINEAR_MODEL_TYPE = "llm_quest_llava_linear"
"""Of one matrix as adapter, which has no published form."""
TEXT_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32_000,
}  # fmt: skip


def read_num_vision_blocks(c: Any) -> int:
    """vision_feature_layer counts the embedding as layer 0, and from the end if negative."""
    layer = c.json.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise DataError(f"config.json: vision_feature_layer is {layer!r}; only the patches after one block are read")
    return layer if layer >= 0 else c.vision_config.num_hidden_layers + 1 + layer


def write_num_vision_blocks(value: int, config: Any) -> dict[str, Any]:
    return {"vision_feature_layer": value - config.vision_config.num_hidden_layers - 1}


def write_class_token(value: bool, config: Any) -> dict[str, Any]:
    strategy = "full" if value else "default"
    return {"vision_feature_select_strategy": strategy, "image_seq_length": config.image_seq_length}


def read_class_token(c: Any) -> bool:
    strategy = c.json.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise DataError(f"config.json: vision_feature_select_strategy is {strategy!r}; known: default, full")
    return bool(strategy == "full")


@config_dataclass
class Config(TextWithImages):
    """The numbers of a LLaVA. vision_config: of the image encoder (clip or vit); text_config: of the decoder.
    image_token_id: the placeholder's. num_vision_blocks: after how many of the encoder's blocks the patches are taken.
    mlp_projector: two matrices in the adapter rather than one. keep_cls_token: is the class token shown too? LLaVA's
    own config.json leaves out what transformers takes for granted in either part."""

    vision_config: Any = json_field(*vision_part(VISION_TOWER_FAMILIES, clip.VISION_DEFAULTS))
    text_config: Any = json_field(*text_part(TEXT_FAMILIES, "llama", TEXT_DEFAULTS))
    image_token_id: int = spelled("image_token_index", "image_token_id", hf_default=32_000)
    num_vision_blocks: int = json_field(read_num_vision_blocks, write_num_vision_blocks)
    mlp_projector: bool = json_field(lambda c: c.json.get("model_type") != LINEAR_MODEL_TYPE, unwritten, default=True)
    multimodal_projector_bias: bool = True
    keep_cls_token: bool = json_field(read_class_token, write_class_token, default=False)
    projector_hidden_act: Literal["gelu"] = "gelu"

    def __post_init__(self) -> None:
        depth, blocks = self.num_vision_blocks, self.vision_config.num_hidden_layers
        if not 0 < depth <= blocks:
            raise ValueError(f"depth is {depth}, but the image encoder has {blocks} blocks: choose 1 to {blocks}")
        self.require_image_token()

    marker_token_id = property(lambda config: config.image_token_id, doc="What a prompt has in place of an image.")
    markup_token_ids = property(lambda config: (config.image_token_id,), doc="The same as a template writes it.")

    @property
    def image_seq_length(self) -> int:
        """Placeholders of an image."""
        return self.vision_config.num_patches + self.keep_cls_token

    def num_image_tokens(self, height: int, width: int) -> int:
        """Placeholders of an image of this size: always as many."""
        return self.image_seq_length

    def expand_image(self, num_tokens: int) -> list[int | str]:
        """What the marker stands for."""
        return [self.image_token_id] * num_tokens


def assemble(config: Config) -> VisionLanguageModel:
    """The model, before its weights are initialized."""
    tower: Any = family_among(VISION_TOWER_FAMILIES, config.vision_config).assemble(config.vision_config)
    tower.head = nn.Identity()
    projector = MLPProjector if config.mlp_projector else LinearProjector
    widths = config.vision_config.hidden_size, config.text_config.hidden_size
    return VisionLanguageModel(
        ModelSpec("vision_language", config),
        tower=tower,
        adapter=projector(*widths, bias=config.multimodal_projector_bias),
        decoder=family_among(TEXT_FAMILIES, config.text_config).assemble(config.text_config),
        encode=PatchesOfBlock(config.num_vision_blocks, config.keep_cls_token),
        unused=(*(f"tower.blocks.{i}" for i in range(config.num_vision_blocks, len(tower.blocks))), "tower.norm"),
    )


def initialize(model: VisionLanguageModel, generator: torch.Generator | None = None) -> None:
    """Each part as its own family does; the adapter N(0, 1/width), so that an image's vectors are of the size of its
    patches."""
    family_among(VISION_TOWER_FAMILIES, model.config.vision_config).initialize(model.tower, generator)
    init_normal_(
        model.adapter,
        std=model.config.vision_config.hidden_size**-0.5,
        out_std=model.config.text_config.hidden_size**-0.5,
        generator=generator,
    )
    family_among(TEXT_FAMILIES, model.config.text_config).initialize(model.decoder, generator)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names: the parts' own maps, each behind its prefix."""
    layers = {"up": "linear_1", "out": "linear_2"} if config.mlp_projector else {"out": "linear_1"}
    kinds = ("weight", "bias") if config.multimodal_projector_bias else ("weight",)
    adapter = {
        f"{ours}.{kind}": f"multi_modal_projector.{theirs}.{kind}" for ours, theirs in layers.items() for kind in kinds
    }
    tower = family_among(VISION_TOWER_FAMILIES, config.vision_config).weight_map(config.vision_config)
    text = family_among(TEXT_FAMILIES, config.text_config).weight_map(config.text_config)
    return join_weight_maps(tower=tower, adapter=adapter, decoder=text)


LLAVA_NAME, CONDITIONAL = "llava-hf/llava-1.5-7b-hf", "LlavaForConditionalGeneration"
VICUNA_7B = llama.Config(32064, 4096, 32, 32, 32, 128, 11_008, 4096, RotaryEmbedding(128, 10_000.0), False)
LLAVA_7B = Config(clip.CLIP_LARGE, VICUNA_7B, image_token_id=32_000, num_vision_blocks=23)
TINY_VISION = clip.Config(16, 4, 3, 48, 3, 4, 96)
TINY_TEXT = llama.Config(97, 64, 2, 4, 2, 16, 112, 128, RotaryEmbedding(16, 10_000.0), tie_word_embeddings=True)

FAMILY = Family(
    name="vision_language",
    Config=Config,
    assemble=assemble,
    initialize=initialize,
    weight_map=weight_map,
    architectures={"llava": CONDITIONAL, LINEAR_MODEL_TYPE: "VisionLanguage"},
    choose_model_type=lambda config: "llava" if config.mlp_projector else LINEAR_MODEL_TYPE,
    pipeline_tag="image-text-to-text",
    renames=PART_RENAMES,
    keys_to_ignore=(r"vision_tower\.pooler\..*",),
    presets=(
        Preset("llava-1.5-7b", LLAVA_7B, 7_063_427_072, LLAVA_NAME, eos_token_ids=(2,)),
        Preset("llava-tiny", Config(TINY_VISION, TINY_TEXT, image_token_id=96, num_vision_blocks=2)),
    ),
)
