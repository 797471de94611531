"""The settings of the two recipes that look: `vit` (images to classes) and `vlm` (images to words)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.data.images import ImageProcessor
from llm_quest.models import vit
from llm_quest.models.build import preset
from llm_quest.recipes.choice import Choice
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import BatchedConfig, NonNegativeInt, PositiveInt


class AugmentConfig(StrictModel):
    """Random variation of training images; 0 and false: none."""

    rotation_degrees: float = Field(default=0.0, ge=0, le=180, description="degrees")
    scale: float = Field(default=0.0, ge=0, lt=1, description="part of the size")
    translate: float = Field(default=0.0, ge=0, lt=1, description="part of the side")
    horizontal_flip: bool = Field(default=False, description="left and right")
    random_erasing: float = Field(default=0.0, ge=0, lt=1, description="a square of this part of the side")


EvalFraction = Annotated[float, Field(gt=0, lt=0.9)]
ChannelValues = tuple[float, ...]


class ImageDataConfig(StrictModel):
    """Which images, and the numbers they become: brightness 0..1, less mean, divided by std, one of each per
    channel."""

    source: Literal["digits", "folder", "cifar10"] = Field(
        default="digits", description="digits come with scikit-learn"
    )
    path: str | None = Field(
        default=None, description="of folder (a sub-folder for each class) and cifar10 (its binary version)"
    )
    image_size: PositiveInt = Field(default=8, description="pixels of a side")
    image_mean: ChannelValues = (0.5, 0.5, 0.5)
    image_std: ChannelValues = (0.5, 0.5, 0.5)
    held_out: EvalFraction = Field(default=0.2, description="the part that is never trained on; cifar10 has its own")
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def one_mean_and_std_per_channel(self) -> ImageDataConfig:
        ImageProcessor(self.image_size, self.image_mean, self.image_std)
        return self

    @model_validator(mode="after")
    def check_folder(self) -> ImageDataConfig:
        if (self.path is None) != (self.source == "digits"):
            raise ValueError(f"source {self.source} {'needs a path' if self.path is None else 'takes no path'}")
        return self


class VitModelConfig(StrictModel):
    """A ViT of your own numbers, or one to go on from: its sizes are then its own, and a head of other classes is made
    anew."""

    patch_size: PositiveInt = Field(default=2, description="pixels of a patch's side")
    hidden_size: PositiveInt = 64
    num_hidden_layers: PositiveInt = 3
    num_attention_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 128
    hidden_dropout_prob: float = Field(default=0.0, ge=0, lt=1)
    preset: str | None = Field(
        default=None, description="a published size instead, with random weights: vit-base-patch16-224"
    )
    load: str | None = Field(default=None, description="a Hugging Face folder, hub id or run folder")

    @model_validator(mode="after")
    def check_single_source(self) -> VitModelConfig:
        if self.preset is not None and self.load is not None:
            raise ValueError("give preset or load, not both")
        return self


class VisionConfig(BatchedConfig):
    """A run on images."""

    micro_batch_size: PositiveInt | None = Field(default=None, description="images at once on each process; null: all")

    compile: bool = Field(default=False, description="compile the model; repays itself in long runs")
    eval_steps: NonNegativeInt = Field(default=0, description="steps between evaluations; 0: only at the end")


class VitConfig(VisionConfig):
    """Images in, a classifier out."""

    recipe: Literal["vit"]
    data: ImageDataConfig = ImageDataConfig()
    model: VitModelConfig = VitModelConfig()
    batch_size: PositiveInt = Field(default=128, description="images in an optimiser step, over all processes")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="label smoothing")

    @model_validator(mode="after")
    def images_fit(self) -> VitConfig:
        part, images = self.model, self.data
        size, channels = images.image_size, len(images.image_mean)
        native = {"digits": (8, 1), "cifar10": (32, 3)}.get(images.source, (size, channels))
        if native != (size, channels):
            raise ValueError(
                f"{images.source} are {native[0]} pixels with {native[1]} channels: set data.image_size={native[0]} "
                f"and {native[1]} numbers in data.image_mean and data.image_std"
            )
        if part.load is not None:
            return self
        sizes = part if part.preset is None else preset(part.preset).config
        if not isinstance(sizes, VitModelConfig | vit.Config):
            raise ValueError(f"model.preset {part.preset} is no ViT; `quest models` lists those that are")
        if size % sizes.patch_size or sizes.hidden_size % sizes.num_attention_heads:
            raise ValueError(
                f"patch_size {sizes.patch_size} must divide images of {size} pixels, and num_attention_heads "
                f"{sizes.num_attention_heads} must divide hidden_size {sizes.hidden_size}"
            )
        return self


class ImageTextDataConfig(StrictModel):
    """Rendered scenes of shapes, or a JSONL file of yours."""

    source: Literal["synthetic_shapes", "jsonl"] = Field(
        default="synthetic_shapes", description="scenes of shapes are drawn as they are needed"
    )
    path: str | None = Field(
        default=None, description="of jsonl: lines with image and caption, or image, question and answer"
    )
    image_size: PositiveInt = Field(default=48, description="pixels of a side")
    held_out: EvalFraction = Field(
        default=0.1, description="of a JSONL file's images; of synthetic shapes, every fifth combination"
    )
    max_questions_per_row: PositiveInt | None = Field(
        default=None, description="questions of an image in one row, at most; null: all that fit"
    )

    @model_validator(mode="after")
    def check_file(self) -> ImageTextDataConfig:
        if (self.path is None) != (self.source == "synthetic_shapes"):
            raise ValueError(f"source {self.source} {'needs a path' if self.path is None else 'takes no path'}")
        return self


class VisionTowerConfig(StrictModel):
    """The image encoder: your own config, or one to load (a ViT, a CLIP tower)."""

    patch_size: PositiveInt = Field(default=8, description="pixels of a patch's side")
    hidden_size: PositiveInt = 128
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 512
    feature_layer: PositiveInt | None = Field(
        default=None, description="the block after which patch features are taken; null: the last"
    )
    keep_class_token: bool = Field(default=False, description="whether the decoder sees the class token too")
    load: str | None = Field(default=None, description="a Hugging Face folder or run folder")


class LanguageModelConfig(StrictModel):
    """The decoder, a Llama: your own config, or one to load, whose tokenizer is then used."""

    hidden_size: PositiveInt = 128
    num_hidden_layers: PositiveInt = 3
    num_attention_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 384
    vocab_size: int = Field(
        default=400, ge=280, description="tokens of the tokenizer to train, the image placeholder among them"
    )
    load: str | None = Field(default=None, description="a Hugging Face folder or run folder, with its tokenizer")


class VlmModelConfig(StrictModel):
    """A whole vision-language model to start from."""

    load: str | None = Field(default=None, description="a LLaVA model's Hugging Face folder or a run folder")


PART_MODULES = {"vision_tower": "tower", "projector": "adapter", "language_model": "decoder"}
"""The key `trainable` names parts as LLaVA does; the model's modules are these."""


class VlmConfig(VisionConfig):
    """Images and words in, a vision-language model out."""

    recipe: Literal["vlm"]
    data: ImageTextDataConfig = ImageTextDataConfig()
    vision_tower: VisionTowerConfig = VisionTowerConfig()
    projector: Literal["mlp", "linear"] = "mlp"
    language_model: LanguageModelConfig = LanguageModelConfig()
    model: VlmModelConfig = VlmModelConfig()
    trainable: tuple[Annotated[str, Choice(PART_MODULES)], ...] = Field(
        default=("vision_tower", "projector", "language_model"), min_length=1
    )
    batch_size: PositiveInt = Field(default=64, description="images in an optimiser step, over all processes")
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
        if self.model.load is not None:
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
