"""LLaVA (Liu et al. 2023, 2024, "Visual Instruction Tuning", arXiv:2304.08485, 2310.03744): a language model that is
shown images.

- An image encoder reads the image; its patches (not the class token) are taken before the last block,
  unnormalised.
- An adapter, one matrix or two with a GELU between, turns each patch into a vector of the language model's width.
- Early fusion: in the text, one placeholder token stands for every patch. Their embeddings are replaced by those
  vectors, in reading order; from there on image and text are one sequence, with one row of positions, and the decoder
  is any decoder.
- The cache knows nothing of images: they are read once, with the prompt.

      tokens   <s>  <image> <image> <image> <image>  What  colour  ?          4 patches
      vectors   e      v1      v2      v3      v4      e      e    e          positions 0 1 2 3 4 5 6 7

Commonly got wrong: a position embedding for the text and none for the image, or positions in training that generation
does not repeat (here both come from the same scope); the features of the last block, or normalised ones, where the
published model reads the last but one; more placeholders than patches, silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from llm_quest.contracts import ModelSpec, Preset, format_list
from llm_quest.errors import DataError, UsageError
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.vision import LinearProjector, MLPProjector
from llm_quest.models import clip, gpt2, llama, qwen3, vit
from llm_quest.models.config_fields import Json, config_dataclass, json_field, require_field, spelled, unwritten
from llm_quest.models.family import Family
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.models.weight_names import WeightMap, map_published_names

VISION_TOWER_FAMILIES: tuple[Family, ...] = (clip.FAMILY, vit.FAMILY)
TEXT_FAMILIES: tuple[Family, ...] = (llama.FAMILY, qwen3.FAMILY, gpt2.FAMILY)
LINEAR_MODEL_TYPE = "llm_quest_llava_linear"
"""Of one matrix as adapter, which has no published form."""
VISION_DEFAULTS = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
TEXT_DEFAULTS = {
    "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32_000,
}  # fmt: skip


def read_sub_config(hf_config: Json, field: str, families: Sequence[Family], defaults: Json) -> Any:
    """One of the two configs inside, read by the family that its model_type names."""
    sub_config = require_field(hf_config, field)
    if not isinstance(sub_config, Mapping):
        raise DataError(
            f"config.json: {field} is {type(sub_config).__name__}; it must be an object with the numbers of that part"
        )
    kind = sub_config.get("model_type", families[0].model_type)
    for family in families:
        if family.model_type == kind:
            return family.read({**(defaults if family is families[0] else {}), "model_type": kind, **sub_config})
    known = " or ".join(family.model_type for family in families)
    raise DataError(f"config.json: {field} has model_type {kind!r}; here it may be {known}")


def read_vision_config(c: Any) -> Any:
    return read_sub_config(c.json, "vision_config", VISION_TOWER_FAMILIES, VISION_DEFAULTS)


def write_vision_config(value: Any, config: Any) -> dict[str, Any]:
    return {"vision_config": family_among(VISION_TOWER_FAMILIES, value).publish(value)}


def read_text_config(c: Any) -> Any:
    """tie_word_embeddings may stand outside the part or inside it."""
    tied = {"tie_word_embeddings": True} if c.json.get("tie_word_embeddings") else {}
    return read_sub_config(c.json, "text_config", TEXT_FAMILIES, TEXT_DEFAULTS | tied)


def write_text_config(value: Any, config: Any) -> dict[str, Any]:
    published = family_among(TEXT_FAMILIES, value).publish(value)
    return {"text_config": published, "tie_word_embeddings": bool(published.get("tie_word_embeddings", False))}


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
class Config:
    """vision_config: of the image encoder (clip or vit); text_config: of the decoder. image_token_id: the
    placeholder's. num_vision_blocks: after how many of the encoder's blocks the patches are taken. mlp_projector: two
    matrices in the adapter rather than one. keep_cls_token: is the class token shown too? LLaVA's own config.json
    leaves out what transformers takes for granted in either part."""

    vision_config: Any = json_field(read_vision_config, write_vision_config)
    text_config: Any = json_field(read_text_config, write_text_config)
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
        token, rows = self.image_token_id, self.text_config.vocab_size
        if not 0 <= token < rows:
            raise ValueError(f"image_token {token} is outside the vocabulary of {rows}: enlarge it")

    vocab_size = property(lambda config: config.text_config.vocab_size, doc="The decoder's.")
    max_position_embeddings = property(
        lambda config: config.text_config.max_position_embeddings, doc="Images and text."
    )
    num_hidden_layers = property(lambda config: config.text_config.num_hidden_layers, doc="The decoder's.")

    @property
    def image_seq_length(self) -> int:
        """Placeholders of an image."""
        return self.vision_config.num_patches + self.keep_cls_token


def assemble(config: Config) -> VisionLanguageModel:
    """The model, before its weights are initialized."""
    tower: Any = family_among(VISION_TOWER_FAMILIES, config.vision_config).assemble(config.vision_config)
    tower.head = nn.Identity()
    projector = MLPProjector if config.mlp_projector else LinearProjector
    widths = config.vision_config.hidden_size, config.text_config.hidden_size
    adapter = projector(*widths, bias=config.multimodal_projector_bias)
    decoder = family_among(TEXT_FAMILIES, config.text_config).assemble(config.text_config)
    return VisionLanguageModel(ModelSpec("vision_language", config), tower=tower, adapter=adapter, decoder=decoder)


def family_among(families: Sequence[Family], config: Any) -> Family:
    """The family among these that a config belongs to."""
    for family in families:
        if type(config) is family.Config:
            return family
    known = format_list(family.name for family in families)
    raise UsageError(f"{type(config).__module__}.Config cannot stand here; a config of {known} can")


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
    table: dict[str, Any] = {}
    vision = family_among(VISION_TOWER_FAMILIES, config.vision_config)
    text = family_among(TEXT_FAMILIES, config.text_config)
    for ours, theirs in vision.weight_map(config.vision_config).items():
        if not ours.startswith("head."):
            table[f"tower.{ours}"] = map_published_names(
                theirs, lambda name: f"vision_tower.{name.removeprefix('vit.')}"
            )
    layers = {"up": "linear_1", "out": "linear_2"} if config.mlp_projector else {"out": "linear_1"}
    for ours, theirs in layers.items():
        for kind in ("weight", "bias") if config.multimodal_projector_bias else ("weight",):
            table[f"adapter.{ours}.{kind}"] = f"multi_modal_projector.{theirs}.{kind}"
    for ours, theirs in text.weight_map(config.text_config).items():
        table[f"decoder.{ours}"] = map_published_names(theirs, lambda name: f"language_model.{name}")
    return table


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
    renames=(
        (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"(model\.)?vision_tower\.", "vision_tower."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    ),
    keys_to_ignore=(
        r"vision_tower\.(vision_model\.)?embeddings\.position_ids",
        r".*rotary_emb\.inv_freq",
        r"vision_tower\.pooler\..*",
    ),
    presets=(
        Preset("llava-1.5-7b", LLAVA_7B, 7_063_427_072, LLAVA_NAME, eos_token_ids=(2,)),
        Preset("llava-tiny", Config(TINY_VISION, TINY_TEXT, image_token_id=96, num_vision_blocks=2)),
    ),
)
