"""Schemas of `quest train vlm`: images with words, an image encoder, a projector and a Llama."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llm_quest.data.row_forms import IMAGE_TEXT_FORMS
from llm_quest.models import llava
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveInt
from llm_quest.recipes.dependent_defaults import require_at_most_one
from llm_quest.recipes.image_config import EvalFraction, VisionConfig
from llm_quest.recipes.old_keys import OLD_VALUES
from llm_quest.recipes.row_source import RowsConfig, Sources
from llm_quest.recipes.schema import Choice, LocalPath, StrictModel

PART_MODULES = {"vision_tower": "tower", "projector": "adapter", "language_model": "decoder"}
"""The key `trainable` names parts as LLaVA does; the model's modules are these."""


class ImageTextDataConfig(RowsConfig):
    """Rendered scenes of shapes, or rows with images."""

    forms = IMAGE_TEXT_FORMS
    source: Sources = Field(
        default="synthetic_shapes",
        description="synthetic_shapes: scenes that are drawn as they are needed; or rows with image and caption, or "
        "image, question and answer: a file, a folder, FILE.py:FUNCTION, or a list of them with weights",
    )
    image_size: PositiveInt = Field(default=48, description="pixels of a side")
    held_out: EvalFraction = Field(
        default=0.1, description="of the rows' images, 0: none; of synthetic shapes, every fifth combination"
    )
    max_questions_per_row: PositiveInt | None = Field(
        default=None, description="questions of an image in one row, at most; null: all that fit"
    )

    @model_validator(mode="before")
    @classmethod
    def read_old_source(cls, given: Any) -> Any:
        """{source: jsonl, path: FILE} is {source: FILE}."""
        if isinstance(given, dict) and given.get("source") == "jsonl" and "path" in given:
            return {key: value for key, value in given.items() if key != "path"} | {"source": given["path"]}
        return given

    @field_validator("source")
    @classmethod
    def check_source_name(cls, source: Any) -> Any:
        if ("data.source", source) in OLD_VALUES:
            raise ValueError(f"{source} is now {OLD_VALUES['data.source', source]}")
        return source

    @property
    def is_synthetic(self) -> bool:
        return self.source == "synthetic_shapes"

    @model_validator(mode="after")
    def check_columns_are_read(self) -> ImageTextDataConfig:
        if self.is_synthetic and (self.columns or self.strict or self.validation or self.eval_part != "all"):
            raise ValueError(
                "columns, strict, validation and eval_part have no effect on synthetic_shapes; leave them out"
            )
        return self


class VisionTowerConfig(StrictModel):
    """The image encoder: your own config, or one to load (a ViT, a CLIP tower)."""

    patch_size: PositiveInt = Field(default=8, description="pixels of a patch's side")
    hidden_size: PositiveInt = Field(default=128, description="width of a block")
    num_hidden_layers: PositiveInt = Field(default=4, description="blocks")
    num_attention_heads: PositiveInt = Field(default=4, description="attention heads of a block")
    intermediate_size: PositiveInt = Field(default=512, description="width inside the feed-forward layers")
    feature_layer: PositiveInt | None = Field(
        default=None, description="the block after which patch features are taken; null: the last"
    )
    keep_class_token: bool = Field(default=False, description="whether the decoder sees the class token too")
    load: LocalPath | None = Field(default=None, description="a Hugging Face folder or run folder")


class LanguageModelConfig(StrictModel):
    """The decoder, a Llama: your own config, or one to load, whose tokenizer is then used."""

    hidden_size: PositiveInt = Field(default=128, description="width of a block")
    num_hidden_layers: PositiveInt = Field(default=3, description="blocks")
    num_attention_heads: PositiveInt = Field(default=4, description="attention heads of a block")
    intermediate_size: PositiveInt = Field(default=384, description="width inside the feed-forward layers")
    vocab_size: int = Field(
        default=400, ge=280, description="tokens of the tokenizer to train, the image placeholder among them"
    )
    load: LocalPath | None = Field(default=None, description="a Hugging Face folder or run folder, with its tokenizer")


class VlmModelConfig(StrictModel):
    """A whole vision-language model to start from; without one it is assembled from parts."""

    preset: Annotated[str, Choice({one.name: one for one in llava.FAMILY.presets})] | None = Field(
        default=None, description="a published size, with random weights and its own image size"
    )
    family: Annotated[str, Choice({llava.FAMILY.name: llava.FAMILY})] | None = Field(
        default=None, description="a tower, a projector and a language model of the sizes above; null: the same"
    )

    load: LocalPath | None = Field(default=None, description="a LLaVA model's Hugging Face folder or a run folder")

    @model_validator(mode="after")
    def check_single_source(self) -> VlmModelConfig:
        require_at_most_one(self)
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the model is loaded whole, so that the settings of its parts have no effect."""
        return self.load is not None or self.preset is not None


class VlmConfig(VisionConfig):
    """Images and words in, a vision-language model out."""

    recipe: Literal["vlm"]
    data: ImageTextDataConfig = ImageTextDataConfig()
    vision_tower: VisionTowerConfig = VisionTowerConfig()
    projector: Literal["mlp", "linear"] = Field(
        default="mlp", description="between image encoder and decoder: one matrix, or two with a GELU"
    )
    language_model: LanguageModelConfig = LanguageModelConfig()
    model: VlmModelConfig = VlmModelConfig()
    trainable: tuple[Annotated[str, Choice(PART_MODULES)], ...] = Field(
        default=("vision_tower", "projector", "language_model"),
        min_length=1,
        description="the parts that learn; the others are frozen",
    )
    batch_size: PositiveInt = Field(default=64, description="images in an optimizer step, over all processes")
    sequence_length: int = Field(default=256, ge=8, description="tokens in a row: an image's patches and its text")
    caption_first_steps: NonNegativeInt = Field(
        default=0, description="in so many first steps the caption comes first, where there is one"
    )
    question_lr_scale: float = Field(
        default=1.0, gt=0, le=1, description="factor of the learning rate after the first caption_first_steps steps"
    )
    eval_images: PositiveInt = Field(default=64, description="held-out images whose questions are asked")

    @model_validator(mode="after")
    def check_parts_fit(self) -> VlmConfig:
        tower, text, size = self.vision_tower, self.language_model, self.data.image_size
        if self.model.is_whole:
            return self
        if tower.load is None and (size % tower.patch_size or tower.hidden_size % tower.num_attention_heads):
            raise ValueError(
                f"vision_tower.patch_size {tower.patch_size} must divide images of {size} pixels, and "
                f"vision_tower.num_attention_heads {tower.num_attention_heads} its hidden_size {tower.hidden_size}"
            )
        if text.load is None and text.hidden_size % (2 * text.num_attention_heads):
            raise ValueError(
                f"language_model.hidden_size {text.hidden_size} must be an even multiple of "
                f"language_model.num_attention_heads {text.num_attention_heads}"
            )
        return self
