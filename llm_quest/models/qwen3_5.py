"""Qwen3.5 with images (2026): the language model of `qwen3_next.py` that is shown images by `qwen3_5_vision.py`. What
is new after Gemma 3:

- Images keep their shape: one of (rows, columns) merged patches is rows x columns vectors, so that a prompt may hold
  several images of several sizes.
- Positions have three axes, time, row and column (mRoPE, interleaved): the tokens of an image stand in their grid, and
  text goes on behind its longer side. Attention stays causal over images.
- In the text an image is <|vision_start|><|image_pad|>...<|vision_end|>, written by the chat template.

Commonly got wrong: while it writes, the model's positions are fewer than its tokens, by what its images have saved; the
Gated DeltaNet reads no positions at all.
"""

from __future__ import annotations

from typing import Any

import torch

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.vision import PatchMerger
from llm_quest.models import qwen3_5_vision, qwen3_next
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field
from llm_quest.models.family import Family
from llm_quest.models.multimodal import VisionLanguageModel, three_axis_positions
from llm_quest.models.multimodal_config import TextWithImages, join_weight_maps, text_part, vision_part
from llm_quest.models.weight_names import Names, WeightMap, module_names


def publish_vision(value: Any, config: Any) -> dict[str, Any]:
    """The image encoder is one; its model_type is that of the whole."""
    kind = qwen3_next.choose_model_type(config.text_config).replace("_text", "_vision")
    return {"vision_config": qwen3_5_vision.FAMILY.publish(value) | {"model_type": kind}}


@config_dataclass
class Config(TextWithImages):
    """The numbers of a Qwen3.5 that reads images. vision_config: of the image encoder; text_config: of the decoder.
    image_token_id: the placeholder's."""

    vision_config: Any = json_field(vision_part((qwen3_5_vision.FAMILY,))[0], publish_vision)
    text_config: Any = json_field(*text_part((qwen3_next.FAMILY,), "qwen3_5_text", qwen3_next.DENSE_DEFAULTS))
    image_token_id: int = hf_default(248_056)
    video_token_id: int = hf_default(248_057)
    vision_start_token_id: int = hf_default(248_053)
    vision_end_token_id: int = hf_default(248_054)

    def __post_init__(self) -> None:
        self.require_image_token()
        seen, read = self.vision_config.out_hidden_size, self.text_config.hidden_size
        if seen != read:
            raise ValueError(
                f"out_hidden_size of vision_config is {seen}, hidden_size of text_config {read}: set alike"
            )

    def num_image_tokens(self, height: int, width: int) -> int:
        """Placeholders of an image of this size."""
        factor = self.vision_config.patch_size * self.vision_config.spatial_merge_size
        return (height // factor) * (width // factor)

    marker_token_id = property(lambda config: config.image_token_id, doc="What a prompt has in place of an image.")
    markup_token_ids = property(
        lambda config: (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id),
        doc="The same as a template writes it.",
    )

    def expand_image(self, num_tokens: int) -> list[int | str]:
        """What the marker stands for."""
        return [self.image_token_id] * num_tokens


def assemble(config: Config) -> VisionLanguageModel:
    """The model, before its weights are initialized."""
    vision = config.vision_config
    adapter = PatchMerger(vision.hidden_size, vision.out_hidden_size, vision.spatial_merge_size)
    parts: Any = {"tower": qwen3_5_vision.assemble(vision), "decoder": qwen3_next.assemble(config.text_config)}
    slots: Any = {"encode": qwen3_5_vision.patch_grid, "image_scope": three_axis_positions}
    return VisionLanguageModel(ModelSpec("qwen3_5", config), adapter=adapter, **parts, **slots)


def initialize(model: VisionLanguageModel, generator: torch.Generator | None = None) -> None:
    """Each part as its own family does; the adapter N(0, 1/width)."""
    std = model.config.vision_config.hidden_size**-0.5
    qwen3_5_vision.FAMILY.initialize(model.tower, generator)
    init_normal_(model.adapter, std=std, out_std=std, generator=generator)
    qwen3_next.FAMILY.initialize(model.decoder, generator)


PART_NAMES = {
    "tower": lambda name: f"model.visual.{name}",
    "adapter": lambda name: f"model.visual.merger.{name}",
    "decoder": lambda name: name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name,
}


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names: the parts' own maps, each renamed."""
    adapter: Names = module_names({"norm": "norm", "up": "linear_fc1", "out": "linear_fc2"}, bias=True)
    tower, decoder = (qwen3_5_vision.weight_map(config.vision_config), qwen3_next.weight_map(config.text_config))
    return join_weight_maps(tower, adapter, decoder, PART_NAMES)


BY_NAME = {preset.name: preset.config for preset in qwen3_next.FAMILY.presets}
LARGE = Config(qwen3_5_vision.LARGE, BY_NAME["qwen3.5-27b"], 248_056, 248_057, 248_053, 248_054)
TINY = Config(qwen3_5_vision.Config(3, 48, 4, 96, 48, 36, 4), qwen3_next.DENSE_TINY, 96, 95, 94, 93)

FAMILY = Family(
    name="qwen3_5",
    Config=Config,
    assemble=assemble,
    initialize=initialize,
    weight_map=weight_map,
    architectures={"qwen3_5": "Qwen3_5ForConditionalGeneration", "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration"},
    choose_model_type=lambda config: qwen3_next.choose_model_type(config.text_config).removesuffix("_text"),
    pipeline_tag="image-text-to-text",
    keys_to_ignore=(r"(model\.)?mtp\..*",),
    presets=(
        Preset(
            "qwen3.5-vision-27b", LARGE, 27_356_728_560, "Qwen/Qwen3.5-27B", "without MTP", qwen3_next.EOS_TOKEN_IDS
        ),
        Preset("qwen3.5-vision-tiny", TINY),
    ),
)
