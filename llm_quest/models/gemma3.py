"""Gemma 3 with images (4b to 27b; arXiv:2503.19786): the language model of `gemma.py` that is shown images by SigLIP.
What is new after LLaVA:

- The image encoder is SigLIP at 896 x 896: 4,096 patches after its final norm, which stays frozen in Gemma's training.
- The patches are averaged in squares of 4 x 4 to 256 vectors, whatever the image, then normalized and projected by one
  matrix.
- The tokens of one image attend to each other; everything else is causal. In a windowed layer the window acts as well.
- In the text an image is a line of its own: <start_of_image>, 256 placeholders, <end_of_image>.

Commonly got wrong: the embeddings' scale sqrt(D) is for tokens, not for an image's vectors; the prompt's template
writes <start_of_image>, and the placeholder is another token; without the two-way attention every number looks sound.
"""

from __future__ import annotations

from typing import Any

import torch

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.vision import PooledProjector
from llm_quest.models import gemma, siglip
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field, spelled
from llm_quest.models.family import Family
from llm_quest.models.multimodal import VisionLanguageModel, bidirectional_images, final_patches
from llm_quest.models.multimodal_config import PART_RENAMES, TextWithImages, join_weight_maps, text_part, vision_part
from llm_quest.models.weight_names import Names, Transposed, WeightMap


@config_dataclass
class Config(TextWithImages):
    """The numbers of a Gemma 3 that reads images. vision_config: of SigLIP; text_config: of Gemma. image_token_id: the
    placeholder's. boi_token_index, eoi_token_index: the tokens around an image. mm_tokens_per_image: vectors of an
    image."""

    vision_config: Any = json_field(*vision_part((siglip.FAMILY,)))
    text_config: Any = json_field(*text_part((gemma.FAMILY,), "gemma3_text", gemma.TEXT_DEFAULTS))
    image_token_id: int = spelled("image_token_index", "image_token_id", hf_default=262_144)
    boi_token_index: int = hf_default(255_999)
    eoi_token_index: int = hf_default(256_000)
    mm_tokens_per_image: int = hf_default(256)

    def __post_init__(self) -> None:
        self.require_image_token()

    def num_image_tokens(self, height: int, width: int) -> int:
        """Placeholders of an image of this size: always as many."""
        return self.mm_tokens_per_image

    marker_token_id = property(lambda config: config.boi_token_index, doc="What a prompt has in place of an image.")
    markup_token_ids = property(lambda config: (config.boi_token_index,), doc="The same as a template writes it.")

    def expand_image(self, num_tokens: int) -> list[int | str]:
        """What the marker stands for: ids and text."""
        return ["\n\n", self.boi_token_index, *[self.image_token_id] * num_tokens, self.eoi_token_index, "\n\n"]


def assemble(config: Config) -> VisionLanguageModel:
    """The model, before its weights are initialized."""
    vision, text = config.vision_config, config.text_config
    return VisionLanguageModel(
        ModelSpec("gemma3", config),
        tower=siglip.assemble(vision),
        adapter=PooledProjector(
            vision.hidden_size, text.hidden_size, num_patches=vision.num_patches,
            num_tokens=config.mm_tokens_per_image, eps=vision.layer_norm_eps,
        ),
        decoder=gemma.assemble(text),
        encode=final_patches,
        image_scope=bidirectional_images,
    )  # fmt: skip


def initialize(model: VisionLanguageModel, generator: torch.Generator | None = None) -> None:
    """Each part as its own family does; the adapter N(0, 1/width)."""
    siglip.FAMILY.initialize(model.tower, generator)
    std = model.config.vision_config.hidden_size**-0.5
    init_normal_(model.adapter, std=std, out_std=std, generator=generator)
    gemma.FAMILY.initialize(model.decoder, generator)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names: the parts' own maps, each behind its prefix."""
    projector = "multi_modal_projector."
    adapter: Names = {
        "norm.weight": f"{projector}mm_soft_emb_norm.weight",
        "out.weight": Transposed(f"{projector}mm_input_projection_weight"),
    }
    return join_weight_maps(siglip.weight_map(config.vision_config), adapter, gemma.weight_map(config.text_config))


def with_images(size: str, num_parameters: int) -> Preset:
    """A published size, of the models that are tuned for chats."""
    text = next(preset.config for preset in gemma.FAMILY.presets if preset.name == f"gemma3-{size}")
    config = Config(siglip.SO400M_14_896, text, 262_144, 255_999, 256_000, 256)
    return Preset(f"gemma3-vision-{size}", config, num_parameters, f"google/gemma-3-{size}-it", "", (1, 106))


TINY = Config(siglip.Config(16, 4, 3, 48, 3, 4, 96), gemma.GEMMA3_TINY, 96, 94, 95, 4)

FAMILY = Family(
    name="gemma3",
    Config=Config,
    assemble=assemble,
    initialize=initialize,
    weight_map=weight_map,
    architectures={"gemma3": "Gemma3ForConditionalGeneration"},
    pipeline_tag="image-text-to-text",
    renames=PART_RENAMES,
    keys_to_ignore=(r"vision_tower\.(vision_model\.)?head\b.*",),
    presets=(
        with_images("4b", 4_300_079_472),
        with_images("12b", 12_187_325_040),
        with_images("27b", 27_432_406_640),
        Preset("gemma3-vision-tiny", TINY),
    ),
)
