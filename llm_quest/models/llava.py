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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.contracts import format_list as format_list
from llm_quest.errors import DataError, UsageError
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.projector import LinearProjector, MLPProjector
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import clip, gpt2, llama, qwen3, vit
from llm_quest.models.family import Family, WeightMap, map_published_names, require_field, require_value
from llm_quest.models.multimodal import VisionLanguageModel

VISION_TOWER_FAMILIES: tuple[Family, ...] = (clip.FAMILY, vit.FAMILY)
TEXT_FAMILIES: tuple[Family, ...] = (llama.FAMILY, qwen3.FAMILY, gpt2.FAMILY)


@dataclass(frozen=True)
class Config:
    """vision_config: of the image encoder (clip or vit); text_config: of the decoder. image_token_id: the placeholder's
    id. num_vision_blocks: after how many of the encoder's blocks the patches are taken. mlp_projector: two matrices in
    the adapter rather than one. multimodal_projector_bias: the adapter's. keep_cls_token: is the class token shown
    too?"""

    vision_config: Any
    text_config: Any
    image_token_id: int
    num_vision_blocks: int
    mlp_projector: bool = True
    multimodal_projector_bias: bool = True
    keep_cls_token: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.num_vision_blocks <= self.vision_config.num_hidden_layers:
            raise ValueError(
                f"depth is {self.num_vision_blocks}, but the image encoder has {self.vision_config.num_hidden_layers} blocks: "
                f"choose 1 to {self.vision_config.num_hidden_layers}"
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token {self.image_token_id} is outside the vocabulary of {self.text_config.vocab_size}: enlarge it"
            )

    @property
    def vocab_size(self) -> int:
        """The decoder's."""
        return self.text_config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The decoder's: images and text together."""
        return self.text_config.max_position_embeddings

    @property
    def num_hidden_layers(self) -> int:
        """The decoder's, which are those that a cache has."""
        return self.text_config.num_hidden_layers

    @property
    def image_seq_length(self) -> int:
        """Placeholders of an image."""
        return self.vision_config.num_patches + self.keep_cls_token


def assemble(config: Config) -> VisionLanguageModel:
    """The model, without first values."""
    tower = family_among(VISION_TOWER_FAMILIES, config.vision_config).assemble(config.vision_config)
    tower.head = nn.Identity()
    adapter = (MLPProjector if config.mlp_projector else LinearProjector)(
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        bias=config.multimodal_projector_bias,
    )
    decoder = family_among(TEXT_FAMILIES, config.text_config).assemble(config.text_config)
    return VisionLanguageModel(ModelSpec("vision_language", config), tower=tower, adapter=adapter, decoder=decoder)  # type: ignore[arg-type]


def family_among(families: Sequence[Family], config: Any) -> Family:
    """The page among these that a config belongs to."""
    for family in families:
        if isinstance(config, family.Config):
            return family
    raise UsageError(
        f"{type(config).__module__}.Config cannot stand here; a config of {format_list(family.name for family in families)} can"
    )


def initialize(model: VisionLanguageModel, generator: torch.Generator | None = None) -> None:
    """Each part as its own page does; the adapter N(0, 1/width), so that an image's vectors are of the size of its
    patches."""
    family_among(VISION_TOWER_FAMILIES, model.config.vision_config).initialize(model.tower, generator)  # type: ignore[arg-type]
    init_normal_(
        model.adapter,
        std=model.config.vision_config.hidden_size**-0.5,
        out_std=model.config.text_config.hidden_size**-0.5,
        generator=generator,
    )
    family_among(TEXT_FAMILIES, model.config.text_config).initialize(model.decoder, generator)


def names(config: Config) -> WeightMap:
    """Our parameters and their published names: the parts' own tables, each behind its prefix."""
    table: dict[str, Any] = {}
    vision, text = (
        family_among(VISION_TOWER_FAMILIES, config.vision_config),
        family_among(TEXT_FAMILIES, config.text_config),
    )
    for ours, theirs in vision.names(config.vision_config).items():
        if not ours.startswith("head."):
            table[f"tower.{ours}"] = map_published_names(
                theirs, lambda name: "vision_tower." + name.removeprefix("vit.")
            )
    layers = {"up": "linear_1", "out": "linear_2"} if config.mlp_projector else {"out": "linear_1"}
    for ours, theirs in layers.items():
        for kind in ("weight", "bias") if config.multimodal_projector_bias else ("weight",):
            table[f"adapter.{ours}.{kind}"] = f"multi_modal_projector.{theirs}.{kind}"
    for ours, theirs in text.names(config.text_config).items():
        table[f"decoder.{ours}"] = map_published_names(theirs, lambda name: f"language_model.{name}")
    return table


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json. LLaVA's own leaves out what transformers takes for granted in either part."""
    require_value(hf_config, "projector_hidden_act", "gelu")
    require_value(hf_config, "vision_feature_select_strategy", "default", "full")
    vision = read_sub_config(hf_config, "vision_config", VISION_TOWER_FAMILIES, VISION_DEFAULTS)
    text = read_sub_config(hf_config, "text_config", TEXT_FAMILIES, TEXT_DEFAULTS | tie_setting(hf_config))
    layer = hf_config.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise DataError(
            f"config.json: vision_feature_layer is {layer!r}; this page reads the patches after one block only"
        )
    return Config(
        vision_config=vision,
        text_config=text,
        image_token_id=hf_config.get("image_token_index", hf_config.get("image_token_id", 32000)),
        num_vision_blocks=layer if layer >= 0 else vision.num_hidden_layers + 1 + layer,
        mlp_projector=hf_config.get("model_type") != LINEAR_MODEL_TYPE,
        multimodal_projector_bias=hf_config.get("multimodal_projector_bias", True),
        keep_cls_token=hf_config.get("vision_feature_select_strategy") == "full",
    )


def read_sub_config(
    hf_config: Mapping[str, Any], field: str, families: Sequence[Family], defaults: Mapping[str, Any]
) -> Any:
    """One of the two configs inside, by the page it names."""
    sub_config = require_field(hf_config, field)
    if not isinstance(sub_config, Mapping):
        raise DataError(
            f"config.json: {field} is {type(sub_config).__name__}; it must be an object with the numbers of that part"
        )
    kind = sub_config.get("model_type", families[0].model_type)
    for family in families:
        if family.model_type == kind:
            return family.read({**(defaults if family is families[0] else {}), "model_type": kind, **sub_config})
    raise DataError(
        f"config.json: {field} has model_type {kind!r}; here it may be {' or '.join(family.model_type for family in families)}"
    )


def tie_setting(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Said outside the part or inside it."""
    return {"tie_word_embeddings": True} if hf_config.get("tie_word_embeddings") else {}


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json. One matrix as adapter has no published form; it is written under a model_type of
    ours."""
    vision, text = (
        family_among(VISION_TOWER_FAMILIES, config.vision_config),
        family_among(TEXT_FAMILIES, config.text_config),
    )
    kind = {} if config.mlp_projector else {"model_type": LINEAR_MODEL_TYPE, "architectures": ["VisionLanguage"]}
    text_config = text.publish(config.text_config)
    return kind | {
        "vision_config": {"model_type": vision.model_type} | vision.publish(config.vision_config),
        "text_config": {"model_type": text.model_type, "architectures": [text.architecture]} | text_config,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_seq_length,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "vision_feature_layer": config.num_vision_blocks - config.vision_config.num_hidden_layers - 1,
        "vision_feature_select_strategy": "full" if config.keep_cls_token else "default",
        "tie_word_embeddings": bool(text_config.get("tie_word_embeddings", False)),
    }


LINEAR_MODEL_TYPE = "llm_quest_llava_linear"
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEXT_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}

VICUNA_7B = llama.Config(
    32064, 4096, 32, 32, 32, 128, 11008, 4096, RotaryEmbedding(128, 10_000.0), tie_word_embeddings=False
)
TINY_VISION = clip.Config(16, 4, 3, 48, 3, 4, 96)
TINY_TEXT = llama.Config(97, 64, 2, 4, 2, 16, 112, 128, RotaryEmbedding(16, 10_000.0), tie_word_embeddings=True)

FAMILY = Family(
    name="vision_language",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    Config=Config,
    assemble=assemble,  # type: ignore[arg-type]
    initialize=initialize,  # type: ignore[arg-type]
    names=names,
    read=read,
    publish=publish,
    pipeline_tag="image-text-to-text",
    optional_prefix="vision_model.",
    extra_model_types=(LINEAR_MODEL_TYPE,),
    keys_to_ignore=(
        r"vision_tower\.(vision_model\.)?embeddings\.position_ids",
        r".*rotary_emb\.inv_freq",
        r"vision_tower\.pooler\..*",
    ),
    presets=(
        Preset(
            "llava-1.5-7b",
            Config(clip.CLIP_LARGE, VICUNA_7B, image_token_id=32000, num_vision_blocks=23),
            7_063_427_072,
            "llava-hf/llava-1.5-7b-hf",
            eos_token_ids=(2,),
        ),
        Preset("llava-tiny", Config(TINY_VISION, TINY_TEXT, image_token_id=96, num_vision_blocks=2)),
    ),
)
