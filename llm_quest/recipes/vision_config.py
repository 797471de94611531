"""The settings of the two recipes that look: `vit` (images to classes) and `vlm` (images to words)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.data.images import Preprocess
from llm_quest.models import vit
from llm_quest.models.build import preset
from llm_quest.recipes.config import Strict
from llm_quest.recipes.parts import Count, Course, Few


class ImageRows(Strict):
    """The images of one optimiser step, over all processes."""

    rows: Count = Field(default=128, description="images in a step")
    micro_rows: Count | None = Field(default=None, description="images at once on each process; null: all")

    @model_validator(mode="after")
    def micro_fits(self) -> ImageRows:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows {self.rows}")
        return self


class SightRows(ImageRows):
    """The same, with the room for image and text."""

    rows: Count = Field(default=64, description="images in a step")
    turns: Count | None = Field(
        default=None, description="questions of an image in one row at most; null: all that fit"
    )
    captions: Few = Field(default=0, description="in so many first steps the caption comes first, where there is one")
    length: int = Field(default=256, ge=8, description="tokens in a row: an image's patches and what is said about it")


class Vary(Strict):
    """Random variation of training images; 0 and false: none."""

    turn: float = Field(default=0.0, ge=0, le=180, description="degrees")
    zoom: float = Field(default=0.0, ge=0, lt=1, description="part of the size")
    shift: float = Field(default=0.0, ge=0, lt=1, description="part of the side")
    flip: bool = Field(default=False, description="left and right")
    erase: float = Field(default=0.0, ge=0, lt=1, description="a square of this part of the side")


Part = Annotated[float, Field(gt=0, lt=0.9)]
Numbers = tuple[float, ...]


class Images(Strict):
    """Which images, and the numbers they become: brightness 0..1, less mean, divided by std, one of each per
    channel."""

    source: Literal["digits", "folder", "cifar10"] = Field(
        default="digits", description="digits come with scikit-learn"
    )
    folder: str | None = Field(
        default=None, description="of folder (a sub-folder for each class) and cifar10 (its binary version)"
    )
    size: Count = Field(default=8, description="pixels of a side")
    mean: Numbers = (0.5, 0.5, 0.5)
    std: Numbers = (0.5, 0.5, 0.5)
    held_out: Part = Field(default=0.2, description="the part that is never trained on; cifar10 has its own")
    vary: Vary = Vary()

    @model_validator(mode="after")
    def one_mean_and_std_per_channel(self) -> Images:
        Preprocess(self.size, self.mean, self.std)
        return self

    @model_validator(mode="after")
    def folder_given(self) -> Images:
        if (self.folder is None) != (self.source == "digits"):
            raise ValueError(f"source {self.source} {'needs a folder' if self.folder is None else 'takes no folder'}")
        return self


class Eyes(Strict):
    """A ViT of your own numbers, or one to go on from: its sizes are then its own, and a head of other classes is made
    anew."""

    patch: Count = Field(default=2, description="pixels of a patch's side")
    width: Count = 64
    layers: Count = 3
    heads: Count = 4
    hidden: Count = 128
    dropout: float = Field(default=0.0, ge=0, lt=1)
    preset: str | None = Field(
        default=None, description="a published size instead, with random weights: vit-base-patch16-224"
    )
    load: str | None = Field(default=None, description="a Hugging Face folder, hub id or run folder")

    @model_validator(mode="after")
    def one_of_two(self) -> Eyes:
        if self.preset is not None and self.load is not None:
            raise ValueError("give preset or load, not both")
        return self


class Score(Strict):
    """When the held-out images are looked at. Nothing is chosen by what is seen there."""

    every: Few = Field(default=0, description="steps; 0: only at the end")


class Vision(Course):
    """What a run on images has beside the course of every run."""

    compile: bool = Field(default=False, description="compile the model; repays itself in long runs")
    activation_checkpointing: bool = Field(
        default=False, description="compute each block twice instead of remembering it"
    )


class Vit(Vision):
    """Images in, a classifier out."""

    recipe: Literal["vit"]
    images: Images = Images()
    model: Eyes = Eyes()
    batch: ImageRows = ImageRows()
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="label smoothing")
    evaluate: Score = Score()

    @model_validator(mode="after")
    def images_fit(self) -> Vit:
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
        if not isinstance(sizes, Eyes | vit.Config):
            raise ValueError(f"model.preset {part.preset} is no ViT; `quest models` lists those that are")
        if size % sizes.patch or sizes.width % sizes.heads:
            raise ValueError(
                f"patch {sizes.patch} must divide images of {size} pixels, and heads {sizes.heads} must divide "
                f"width {sizes.width}"
            )
        return self


class Sights(Strict):
    """Rendered scenes of shapes, or a JSONL file of yours."""

    source: Literal["scenes", "jsonl"] = Field(default="scenes", description="scenes are drawn as they are needed")
    file: str | None = Field(
        default=None, description="of jsonl: lines with image and caption, or image, question and answer"
    )
    size: Count = Field(default=48, description="pixels of a side")
    held_out: Part = Field(
        default=0.1, description="of a JSONL file's images; of scenes, every fifth combination is held out"
    )

    @model_validator(mode="after")
    def file_given(self) -> Sights:
        if (self.file is None) != (self.source == "scenes"):
            raise ValueError(f"source {self.source} {'needs a file' if self.file is None else 'takes no file'}")
        return self


class Tower(Strict):
    """The image encoder: your own numbers, or one to go on from (a ViT, a CLIP tower). depth: null: all its blocks."""

    patch: Count = Field(default=8, description="pixels of a patch's side")
    width: Count = 128
    layers: Count = 4
    heads: Count = 4
    hidden: Count = 512
    depth: Count | None = Field(default=None, description="after how many blocks the patches are taken; null: all")
    keep_class: bool = Field(default=False, description="is the class token shown to the decoder too?")
    load: str | None = Field(default=None, description="a Hugging Face folder or run folder")


class Speaker(Strict):
    """The decoder, a Llama: your own numbers, or one to go on from, whose tokenizer is then used."""

    width: Count = 128
    layers: Count = 3
    heads: Count = 4
    hidden: Count = 384
    vocab: int = Field(default=400, ge=280, description="tokens of the tokenizer to train, the placeholder among them")
    load: str | None = Field(default=None, description="a Hugging Face folder or run folder, with its tokenizer")


class Answers(Score):
    """Held-out sights asked about, each question alone, answered greedily and compared word for word."""

    sights: Count = Field(default=64, description="held-out images looked at")


class Vlm(Vision):
    """Images and words in, a vision-language model out."""

    recipe: Literal["vlm"]
    sights: Sights = Sights()
    tower: Tower = Tower()
    adapter: Literal["mlp", "linear"] = "mlp"
    decoder: Speaker = Speaker()
    load: str | None = Field(
        default=None, description="a whole vision-language model to go on from (LLaVA's layout, or a run)"
    )
    trained: tuple[Literal["tower", "adapter", "decoder"], ...] = Field(
        default=("tower", "adapter", "decoder"), min_length=1
    )
    batch: SightRows = SightRows()
    questions_rate: float = Field(
        default=1.0, gt=0, le=1, description="of the rate, how much is left after the first batch.captions steps"
    )
    evaluate: Answers = Answers()

    @model_validator(mode="after")
    def parts_fit(self) -> Vlm:
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
