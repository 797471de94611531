"""The settings of the two recipes that look: `vit` (images to classes) and `vlm` (images to words)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.data.images import ImageProcessor
from llm_quest.models import vit
from llm_quest.models.build import preset
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveInt, RunConfig


class ImageBatchConfig(StrictModel):
    """The images of one optimiser step, over all processes."""

    rows: PositiveInt = Field(default=128, description="images in a step")
    micro_rows: PositiveInt | None = Field(default=None, description="images at once on each process; null: all")

    @model_validator(mode="after")
    def check_micro_batch_size(self) -> ImageBatchConfig:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows {self.rows}")
        return self


class ImageTextBatchConfig(ImageBatchConfig):
    """The same, with the room for image and text."""

    rows: PositiveInt = Field(default=64, description="images in a step")
    turns: PositiveInt | None = Field(
        default=None, description="questions of an image in one row at most; null: all that fit"
    )
    captions: NonNegativeInt = Field(
        default=0, description="in so many first steps the caption comes first, where there is one"
    )
    length: int = Field(default=256, ge=8, description="tokens in a row: an image's patches and what is said about it")


class AugmentConfig(StrictModel):
    """Random variation of training images; 0 and false: none."""

    turn: float = Field(default=0.0, ge=0, le=180, description="degrees")
    zoom: float = Field(default=0.0, ge=0, lt=1, description="part of the size")
    shift: float = Field(default=0.0, ge=0, lt=1, description="part of the side")
    flip: bool = Field(default=False, description="left and right")
    erase: float = Field(default=0.0, ge=0, lt=1, description="a square of this part of the side")


EvalFraction = Annotated[float, Field(gt=0, lt=0.9)]
ChannelValues = tuple[float, ...]


class ImageDataConfig(StrictModel):
    """Which images, and the numbers they become: brightness 0..1, less mean, divided by std, one of each per
    channel."""

    source: Literal["digits", "folder", "cifar10"] = Field(
        default="digits", description="digits come with scikit-learn"
    )
    folder: str | None = Field(
        default=None, description="of folder (a sub-folder for each class) and cifar10 (its binary version)"
    )
    size: PositiveInt = Field(default=8, description="pixels of a side")
    mean: ChannelValues = (0.5, 0.5, 0.5)
    std: ChannelValues = (0.5, 0.5, 0.5)
    held_out: EvalFraction = Field(default=0.2, description="the part that is never trained on; cifar10 has its own")
    vary: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def one_mean_and_std_per_channel(self) -> ImageDataConfig:
        ImageProcessor(self.size, self.mean, self.std)
        return self

    @model_validator(mode="after")
    def check_folder(self) -> ImageDataConfig:
        if (self.folder is None) != (self.source == "digits"):
            raise ValueError(f"source {self.source} {'needs a folder' if self.folder is None else 'takes no folder'}")
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


class ImageEvalConfig(StrictModel):
    """When the held-out images are looked at. Nothing is chosen by what is seen there."""

    every: NonNegativeInt = Field(default=0, description="steps; 0: only at the end")


class VisionConfig(RunConfig):
    """What a run on images has beside the course of every run."""

    compile: bool = Field(default=False, description="compile the model; repays itself in long runs")
    activation_checkpointing: bool = Field(
        default=False, description="compute each block twice instead of remembering it"
    )


class VitConfig(VisionConfig):
    """Images in, a classifier out."""

    recipe: Literal["vit"]
    images: ImageDataConfig = ImageDataConfig()
    model: VitModelConfig = VitModelConfig()
    batch: ImageBatchConfig = ImageBatchConfig()
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="label smoothing")
    evaluate: ImageEvalConfig = ImageEvalConfig()

    @model_validator(mode="after")
    def images_fit(self) -> VitConfig:
        part, images = self.model, self.images
        size, channels = images.size, len(images.mean)
        native = {"digits": (8, 1), "cifar10": (32, 3)}.get(images.source, (size, channels))
        if native != (size, channels):
            raise ValueError(
                f"{images.source} are {native[0]} pixels with {native[1]} channels: set images.size={native[0]} "
                f"and {native[1]} numbers in images.mean and images.std"
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

    source: Literal["scenes", "jsonl"] = Field(default="scenes", description="scenes are drawn as they are needed")
    file: str | None = Field(
        default=None, description="of jsonl: lines with image and caption, or image, question and answer"
    )
    size: PositiveInt = Field(default=48, description="pixels of a side")
    held_out: EvalFraction = Field(
        default=0.1, description="of a JSONL file's images; of scenes, every fifth combination is held out"
    )

    @model_validator(mode="after")
    def check_file(self) -> ImageTextDataConfig:
        if (self.file is None) != (self.source == "scenes"):
            raise ValueError(f"source {self.source} {'needs a file' if self.file is None else 'takes no file'}")
        return self


class VisionTowerConfig(StrictModel):
    """The image encoder: your own numbers, or one to go on from (a ViT, a CLIP tower). depth: null: all its blocks."""

    patch: PositiveInt = Field(default=8, description="pixels of a patch's side")
    width: PositiveInt = 128
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    hidden: PositiveInt = 512
    depth: PositiveInt | None = Field(
        default=None, description="after how many blocks the patches are taken; null: all"
    )
    keep_class: bool = Field(default=False, description="is the class token shown to the decoder too?")
    load: str | None = Field(default=None, description="a Hugging Face folder or run folder")


class LanguageModelConfig(StrictModel):
    """The decoder, a Llama: your own numbers, or one to go on from, whose tokenizer is then used."""

    width: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    hidden: PositiveInt = 384
    vocab: int = Field(default=400, ge=280, description="tokens of the tokenizer to train, the placeholder among them")
    load: str | None = Field(default=None, description="a Hugging Face folder or run folder, with its tokenizer")


class VlmEvalConfig(ImageEvalConfig):
    """Held-out sights asked about, each question alone, answered greedily and compared word for word."""

    sights: PositiveInt = Field(default=64, description="held-out images looked at")


class VlmConfig(VisionConfig):
    """Images and words in, a vision-language model out."""

    recipe: Literal["vlm"]
    sights: ImageTextDataConfig = ImageTextDataConfig()
    tower: VisionTowerConfig = VisionTowerConfig()
    adapter: Literal["mlp", "linear"] = "mlp"
    decoder: LanguageModelConfig = LanguageModelConfig()
    load: str | None = Field(
        default=None, description="a whole vision-language model to go on from (LLaVA's layout, or a run)"
    )
    trained: tuple[Literal["tower", "adapter", "decoder"], ...] = Field(
        default=("tower", "adapter", "decoder"), min_length=1
    )
    batch: ImageTextBatchConfig = ImageTextBatchConfig()
    questions_rate: float = Field(
        default=1.0, gt=0, le=1, description="of the rate, how much is left after the first batch.captions steps"
    )
    evaluate: VlmEvalConfig = VlmEvalConfig()

    @model_validator(mode="after")
    def parts_fit(self) -> VlmConfig:
        eye, speaker, size = self.tower, self.decoder, self.sights.size
        if self.load is None and eye.load is None and (size % eye.patch or eye.width % eye.heads):
            raise ValueError(
                f"tower.patch {eye.patch} must divide images of {size} pixels, and tower.heads {eye.heads} "
                f"its width {eye.width}"
            )
        if self.load is None and speaker.load is None and speaker.width % (2 * speaker.heads):
            raise ValueError(
                f"decoder.width {speaker.width} must be an even number of times decoder.heads {speaker.heads}"
            )
        return self
