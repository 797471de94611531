"""Comparison of each kind of model with transformers: the inputs, and the outputs of both sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_quest.models.dual_encoder import LARGEST_ID, CLIPModel, TextEncoder
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.scope import Scope
from llm_quest.techniques.score_head import find_score_head

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Counterpart:
    """The comparison of a kind of model. auto_class: transformers'. inputs(model, seed) -> tensors by transformers'
    names. ours, theirs(model, inputs) -> outputs. pad: the inputs with padding in the second row, and which outputs
    count."""

    auto_class: str
    inputs: Callable[[Any, int], Inputs]
    ours: Callable[[Any, Inputs], Tensor]
    theirs: Callable[[Any, Inputs], Tensor]
    pad: Callable[[Any, Inputs], tuple[Inputs, Tensor]] | None = None


def random_input_ids(model: Any, seed: int) -> Inputs:
    """Random ids (2,T), long enough for scaled rotary positions to matter."""
    length = min(model.config.max_position_embeddings, 96)
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(model.config.vocab_size, (2, length), generator=generator)}


def random_scored_ids(model: Any, seed: int) -> Inputs:
    """`random_input_ids` without the padding token, by which transformers finds the last one."""
    ids, pad = random_input_ids(model, seed)["input_ids"], padding_token(model)
    return {"input_ids": ids.where(ids != pad, (pad + 1) % model.config.vocab_size)}


def random_images(config: Any, seed: int) -> Tensor:
    """Random normalized images (2,C,H,W)."""
    shape = (2, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_image_text_ids(model: Any, seed: int) -> Inputs:
    """Random ids with image tokens, and two images (2,C,H,W)."""
    images = random_images(model.config.vision_config, seed)
    return {"input_ids": random_ids_with_images(model.config, images, seed), "pixel_values": images}


def random_gemma3_inputs(model: Any, seed: int) -> Inputs:
    """Random ids with image tokens for Gemma 3, with token types: tokens of one image attend to each other."""
    inputs = random_image_text_ids(model, seed)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == model.config.image_token_id).long()}


def random_qwen3_5_inputs(model: Any, seed: int) -> Inputs:
    """Random ids with image tokens for Qwen3.5: patches in blocks of neighbors, each twice in time, and their
    grids."""
    vision = model.config.vision_config
    side, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = 2 * merge, 4 * merge
    shape = (2, vision.num_channels, rows * side, columns * side)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    cut = images.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = cut[:, :, :, :, :, :, None].expand(*cut.shape[:6], frames, side, side).reshape(2 * rows * columns, -1)
    ids = random_ids_with_images(model.config, images, seed)
    kinds, grids = (ids == model.config.image_token_id).long(), torch.tensor([[1, rows, columns]] * 2)
    return {
        "input_ids": ids,
        "images": images,
        "pixel_values": patches,
        "image_grid_thw": grids,
        "mm_token_type_ids": kinds,
    }


def random_ids_with_images(config: Any, images: Tensor, seed: int) -> Tensor:
    """Random ids (2,T) with the image tokens of one of two images in each row."""
    placeholders = config.num_image_tokens(*images.shape[2:])
    length = min(placeholders + 32, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    ids = ids.where(ids != config.image_token_id, (config.image_token_id + 1) % config.vocab_size)
    ids[:, 1 : 1 + placeholders] = config.image_token_id
    return ids


def mask_left_padding(model: Any, inputs: Inputs) -> tuple[Inputs, Tensor]:
    """A third of the second row is padding; only real tokens are compared."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, : math.ceil(mask.shape[1] / 3)] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {**inputs, "attention_mask": mask, "position_ids": positions}, mask.bool()


def mask_right_padding(model: Any, inputs: Inputs) -> tuple[Inputs, Tensor]:
    """A third of the second row is padding; both rows' scores are compared."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, -math.ceil(mask.shape[1] / 3) :] = 0
    ids = inputs["input_ids"].where(mask.bool(), padding_token(model))
    return {"input_ids": ids, "attention_mask": mask}, torch.ones(2, dtype=torch.bool)


def padding_token(model: Any) -> int:
    """The id that pads; 0 where the model names none."""
    generation = model.generation_config
    return 0 if generation is None or generation.pad_token_id is None else generation.pad_token_id


def scope_of(inputs: Inputs) -> Scope:
    mask = inputs.get("attention_mask")
    if mask is None:
        return Scope.unpadded(inputs["input_ids"])
    return Scope((mask.cumsum(dim=1) - 1).masked_fill(mask == 0, -1))


def our_logits(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs["input_ids"], scope_of(inputs))


def our_scores(model: Any, inputs: Inputs) -> Tensor:
    scope = scope_of(inputs)
    last = scope.position_ids.argmax(dim=1)
    return model(inputs["input_ids"], scope)[torch.arange(len(last)), last]


def our_image_text_logits(model: Any, inputs: Inputs) -> Tensor:
    features = model.get_image_features(inputs["images"] if "images" in inputs else inputs["pixel_values"])
    return model(inputs["input_ids"], image_features=features)


def their_logits(model: Any, inputs: Inputs) -> Tensor:
    return model(**{name: value for name, value in inputs.items() if name != "images"}, use_cache=False).logits


def their_scores(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs).logits


def their_class_vector(model: Any, inputs: Inputs) -> Tensor:
    """The class token after the final norm: CLIP norms it alone, ViT all tokens."""
    output = model(**inputs)
    is_clip = type(model).__name__.startswith("CLIP")
    return output.pooler_output if is_clip else output.last_hidden_state[:, 0]


def random_ids_with_eos(config: Any, seed: int) -> Tensor:
    """Random ids (3,T) whose last two are the end token."""
    generator = torch.Generator().manual_seed(seed)
    end = config.vocab_size - 1 if config.eos_token_id == LARGEST_ID else config.eos_token_id
    ids = torch.randint(config.vocab_size - 1, (3, config.max_position_embeddings), generator=generator)
    ids = ids.where(ids != end, (end + 1) % (config.vocab_size - 1))
    ids[:, -2:] = end
    return ids


def random_texts(model: Any, seed: int) -> Inputs:
    return {"input_ids": random_ids_with_eos(model.config, seed)}


def random_texts_and_images(model: Any, seed: int) -> Inputs:
    """Three texts, and the images to which they may belong."""
    images = random_images(model.config.vision_config, seed)
    return {"input_ids": random_ids_with_eos(model.config.text_config, seed), "pixel_values": images}


def our_text_embeds(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs["input_ids"])


def our_image_logits(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs["input_ids"], inputs["pixel_values"])


def read_output(name: str) -> Callable[[Any, Inputs], Tensor]:
    """The output of this name among transformers' outputs."""
    return lambda model, inputs: getattr(model(**inputs), name)  # type: ignore[no-any-return]


TEXT = Counterpart("AutoModelForCausalLM", random_input_ids, our_logits, their_logits, mask_left_padding)
SCORES = Counterpart(
    "AutoModelForSequenceClassification", random_scored_ids, our_scores, their_scores, mask_right_padding
)
TEXT_WITH_IMAGES = {
    family: Counterpart("AutoModelForImageTextToText", inputs, our_image_text_logits, their_logits)
    for family, inputs in {
        "vision_language": random_image_text_ids,
        "gemma3": random_gemma3_inputs,
        "qwen3_5": random_qwen3_5_inputs,
    }.items()
}
"""By family: the inputs about images differ."""


def counterpart_of(model: Any) -> Counterpart:
    """The comparison for this model."""
    if isinstance(model, VisionLanguageModel):
        return TEXT_WITH_IMAGES[model.spec.family]
    if isinstance(model, CLIPModel):
        return Counterpart("CLIPModel", random_texts_and_images, our_image_logits, read_output("logits_per_image"))
    suffix = "WithProjection" if getattr(model.config, "projection_dim", 0) else ""
    if isinstance(model, TextEncoder):
        theirs = read_output("text_embeds" if suffix else "pooler_output")
        return Counterpart(f"CLIPTextModel{suffix}", random_texts, our_text_embeds, theirs)
    if not isinstance(model, ImageEncoder):
        return TEXT if find_score_head(model) is None else SCORES
    inputs = lambda model, seed: {"pixel_values": random_images(model.config, seed)}  # noqa: E731
    ours = lambda model, inputs: model(inputs["pixel_values"])  # noqa: E731
    if getattr(model.config, "num_labels", 0):
        return Counterpart("AutoModelForImageClassification", inputs, ours, their_scores)
    if suffix:
        return Counterpart("CLIPVisionModelWithProjection", inputs, ours, read_output("image_embeds"))
    auto_class = "CLIPVisionModel" if model.spec.family == "clip" else "AutoModel"
    return Counterpart(auto_class, inputs, ours, their_class_vector)
