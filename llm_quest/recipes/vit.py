"""`quest train vit`: images -> a Vision Transformer -> classes. Held-out accuracy is measured at the end; no choice
depends on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from llm_quest.contracts import LogFn
from llm_quest.data.batch import MULTI_LABEL, SINGLE_LABEL
from llm_quest.data.document import DropReport
from llm_quest.data.image_datasets import (
    AugmentedImages,
    ImageAugmentation,
    ImageDataset,
    ImageSplits,
    load_cifar10,
    load_sklearn_digits,
    split_images,
)
from llm_quest.data.image_folder import load_image_folder
from llm_quest.data.image_labels import LabelOptions
from llm_quest.data.images import ImageProcessor
from llm_quest.errors import UsageError
from llm_quest.eval.classification import ClassifierEvaluator, image_outputs
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import find_preprocess
from llm_quest.models import vit
from llm_quest.models.build import build, preset
from llm_quest.models.image_encoder import ImageEncoder, default_label_names
from llm_quest.objectives.classification import ImageClassificationLoss
from llm_quest.recipes.assembly import apply_techniques, count_epochs, log_remarks, make_sharded_loader
from llm_quest.recipes.auto import resolve_auto
from llm_quest.recipes.class_weights import ClassWeights, make_class_weights
from llm_quest.recipes.config_schema import PositiveInt
from llm_quest.recipes.dependent_defaults import ALTERNATIVES, require_at_most_one
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.image_config import ImageDataConfig, VisionConfig
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.schema import Choice, LocalPath, StrictModel
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.train.rng_state import derive_seed

NATIVE_SHAPES = {"digits": (8, 1), "cifar10": (32, 3)}
"""Pixels of a side and channels of the sources that have them."""
DEFAULT_PROCESSORS = {"folder": ImageProcessor(224), "digits": ImageProcessor(8, (0.0,), (0.4,))}
"""Digits have a black background, which is 0: what augmentation shifts in from outside is background."""


class VitModelConfig(StrictModel):
    """A ViT of these sizes, or one to load: it keeps its sizes, and gets a new head for other classes."""

    patch_size: PositiveInt = Field(default=2, description="pixels of a patch's side")
    hidden_size: PositiveInt = Field(default=64, description="width of a block")
    num_hidden_layers: PositiveInt = Field(default=3, description="blocks")
    num_attention_heads: PositiveInt = Field(default=4, description="attention heads of a block")
    intermediate_size: PositiveInt = Field(default=128, description="width inside the feed-forward layers")
    hidden_dropout_prob: float = Field(
        default=0.0, ge=0, lt=1, description="dropout behind the embedding and in each block"
    )
    family: Annotated[str, Choice({vit.FAMILY.name: vit.FAMILY})] | None = Field(
        default=None, description="the sizes above are a ViT's; null: the same"
    )
    preset: str | None = Field(
        default=None, description="a published size instead, with random weights: vit-base-patch16-224"
    )
    load: LocalPath | None = Field(default=None, description="a Hugging Face folder, hub id or run folder")

    @model_validator(mode="after")
    def check_single_source(self) -> VitModelConfig:
        require_at_most_one(self)
        return self


class VitConfig(VisionConfig):
    """Images in, a classifier out."""

    recipe: Literal["vit"]
    data: ImageDataConfig = ImageDataConfig()
    model: VitModelConfig = VitModelConfig()
    batch_size: PositiveInt = Field(default=128, description="images in an optimizer step, over all processes")
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = Field(
        default=None,
        description="one label of an image, or any number; null: as the table of labels has it (a list: any)",
    )
    class_weights: ClassWeights = None
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="label smoothing")

    @model_validator(mode="after")
    def check_image_size(self) -> VitConfig:
        part, images = self.model, self.data
        native = NATIVE_SHAPES.get(images.source, (images.image_size, images.channels))
        size = native[0] if images.image_size is None else images.image_size
        if native != (size, native[1] if images.channels is None else images.channels):
            raise ValueError(
                f"{images.source} are {native[0]} pixels with {native[1]} channels: set data.image_size={native[0]} "
                f"and {native[1]} numbers in data.image_mean and data.image_std"
            )
        if part.load is not None:
            return self
        if size is None:
            raise ValueError(f"source {images.source} needs data.image_size: the pixels of a side")
        sizes = part if part.preset is None else preset(part.preset).config
        if not isinstance(sizes, VitModelConfig | vit.Config):
            raise ValueError(f"model.preset {part.preset} is no ViT; `quest models` lists those that are")
        if size % sizes.patch_size or sizes.hidden_size % sizes.num_attention_heads:
            raise ValueError(
                f"patch_size {sizes.patch_size} must divide images of {size} pixels, and num_attention_heads "
                f"{sizes.num_attention_heads} must divide hidden_size {sizes.hidden_size}"
            )
        return self


def build_vit(config: VitConfig, context: Context) -> Job:
    """Images, model, classification loss."""
    parallel, log = context.parallel, context.log
    config = resolve_auto(config, context)
    preprocess = make_image_processor(config, log)
    drop_report = DropReport()
    sides = load_images(config.data, preprocess, drop_report, config.problem_type)
    log_remarks(drop_report, log)
    if left_out := {reason: count for reason, (count, _) in drop_report.dropped.items()}:
        log(f"left out: {', '.join(f'{count:,} {reason}' for reason, count in sorted(left_out.items()))}")
    log(f"images: {len(sides.train):,} to train on, {len(sides.held_out):,} held out, {len(sides.train.names)} classes")
    augmented = AugmentedImages(sides.train, preprocess, ImageAugmentation(**config.data.augment.model_dump()))
    config = count_epochs(config, context.settings, len(sides.train), log)
    loader = make_sharded_loader(config, augmented, parallel)
    names, counts = sides.train.names, sides.train.label_counts
    is_multi_label = sides.train.is_multi_label
    weights = make_class_weights(config.class_weights, names, counts, len(sides.train), log, multi_label=is_multi_label)
    objective = ImageClassificationLoss(
        init_vit(config, sides.train), label_smoothing=config.label_smoothing, class_weights=weights
    )
    identity = {"train": sides.train.hash, "held_out": sides.held_out.hash}
    facts: dict[str, Any] = {"counted": "images", "corpus": {"name": config.data.path or config.data.source}}
    facts["corpus"] |= {"drop_report": drop_report.as_json()} if config.data.source == "folder" else {}
    facts["problem_type"] = MULTI_LABEL if is_multi_label else SINGLE_LABEL
    facts |= {"train_images": len(sides.train), "val_images": len(sides.held_out), "classes": list(names)}
    facts["label_counts"] = dict(zip(names, zip(counts, sides.held_out.label_counts, strict=True), strict=True))
    callbacks = apply_techniques(config.all_techniques, objective.model, log)
    outputs = image_outputs(sides.held_out, preprocess)
    return Job(
        config,
        objective,
        loader,
        [ClassifierEvaluator(outputs, config.eval_steps, names, context.samples_dir)] if len(sides.held_out) else [],
        identity,
        facts,
        preprocessor=preprocess,
        callbacks=callbacks,
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
        blocks=fsdp_blocks(objective.model),
    )


def make_image_processor(config: VitConfig, log: LogFn) -> ImageProcessor:
    """Make the image processor: that of model.load, or plain squares; keys of the config override it."""
    part, base = config.data, DEFAULT_PROCESSORS.get(config.data.source, DEFAULT_PROCESSORS["folder"])
    if config.model.load is not None:
        loaded = find_preprocess(config.model.load)
        base, who = (base, "no preprocessor_config.json") if loaded is None else (loaded, config.model.load)
        log(f"images are made as {who} says: mean {base.mean} and deviation {base.std}, where data says nothing")
    size = part.image_size or NATIVE_SHAPES.get(part.source, (None, None))[0]
    base = base if size is None else resize_processor(base, size)
    numbers = {"mean": part.image_mean, "std": part.image_std}
    channels = part.channels or len(base.mean)
    for name, given in numbers.items():
        own: tuple[float, ...] = getattr(base, name)
        numbers[name] = given or (own if len(own) == channels else (0.5,) * channels)
    return replace(base, **numbers)  # type: ignore[arg-type]


def resize_processor(processor: ImageProcessor, size: int) -> ImageProcessor:
    """The processor for squares of another side; the border that its crop cuts away stays in proportion."""
    height, width = processor.shape
    border = processor.resize_size
    if isinstance(border, int):
        border = round(border * size / min(height, width))
    elif isinstance(border, tuple):
        border = (round(border[0] * size / height), round(border[1] * size / width))
    return replace(processor, size=size, resize_size=border)


def fsdp_blocks(model: Any) -> list[nn.Module]:
    """The modules that FSDP shards one by one: every block of every part."""
    return [block for name, part in model.named_modules() if name.endswith("blocks") for block in part]


def load_images(
    config: ImageDataConfig, preprocess: ImageProcessor, drop_report: DropReport, problem_type: str | None = None
) -> ImageSplits:
    """Load the images of the source, training and held-out ones. drop_report: collects files that are left out."""
    if problem_type == MULTI_LABEL and config.source != "folder":
        raise UsageError(
            f"problem_type={MULTI_LABEL} is for data.source=folder: {config.source} has one label an image"
        )
    if config.source == "digits":
        return split_images(load_sklearn_digits(), config.held_out, stratify=config.stratify)
    assert config.path is not None, "the config asks for a folder with every other source"
    return (
        load_cifar10(config.path)
        if config.source == "cifar10"
        else load_image_folder(
            config.path,
            preprocess,
            config.held_out,
            drop_report,
            config.validation,
            stratify=config.stratify,
            options=LabelOptions(config.columns, config.label_separator, problem_type),
        )
    )


def init_vit(config: VitConfig, images: ImageDataset) -> ImageEncoder:
    """Load the model, or build it with initial weights from a seed of their own."""
    part, seed = config.model, derive_seed(config.seed, "init")
    channels, size = images.pixels.shape[1], images.pixels.shape[2]
    labels = () if config.data.source == "digits" else images.names
    if part.load is not None:
        return adapt_to_images(load(part.load, dtype="float32", aligned=True), images, labels, seed)  # type: ignore[arg-type]
    if part.preset is not None:
        base = preset(part.preset).config
        assert isinstance(base, vit.Config), "the config refuses other presets"
        numbers = replace(
            base,
            image_size=size,
            num_channels=channels,
            num_labels=len(images.names),
            label_names=labels,
            hidden_dropout_prob=part.hidden_dropout_prob,
            problem_type=MULTI_LABEL if images.is_multi_label else None,
        )
    else:
        sizes = part.model_dump(exclude=set(ALTERNATIVES))
        numbers = vit.Config(
            image_size=size,
            num_channels=channels,
            num_labels=len(images.names),
            label_names=labels,
            problem_type=MULTI_LABEL if images.is_multi_label else None,
            **sizes,
        )
    return build(numbers, seed=seed)  # type: ignore[return-value]


def adapt_to_images(model: ImageEncoder, images: ImageDataset, labels: tuple[str, ...], seed: int) -> ImageEncoder:
    """Adapt a trained model to these images: interpolate its positions to their size, and give it a head of their
    classes."""
    if not isinstance(model, ImageEncoder) or not isinstance(model.config, vit.Config):
        raise UsageError("model.load must name a ViT")
    if images.pixels.shape[1] != model.config.num_channels:
        raise UsageError(
            f"the images have {images.pixels.shape[1]} channels, the model reads {model.config.num_channels}: "
            "set as many numbers in data.image_mean"
        )
    model = vit.resize_images(model, images.pixels.shape[2])
    known = model.config.label_names or default_label_names(model.config.num_labels)
    wanted = labels or default_label_names(len(images.names))
    if known != wanted:
        replace_head(model, known, wanted, labels, seed)
    problem_type = MULTI_LABEL if images.is_multi_label else None
    model.spec = replace(model.spec, config=replace(model.config, problem_type=problem_type))
    return model


def replace_head(
    model: ImageEncoder, known: tuple[str, ...], wanted: tuple[str, ...], labels: tuple[str, ...], seed: int
) -> None:
    """Replace the head by one of the wanted classes: classes of the same name keep their rows, the others are
    initialized.

    Commonly got wrong: as many classes are not the same classes; without a new head the old names stay."""
    config, before = replace(model.config, num_labels=len(wanted), label_names=labels), cast(nn.Linear, model.head)
    head = nn.Linear(config.hidden_size, config.num_labels)
    nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        for row, name in enumerate(wanted):
            if known.count(name) == 1:
                head.weight[row], head.bias[row] = (p[known.index(name)] for p in (before.weight, before.bias))
    model.spec, model.head = replace(model.spec, config=config), head


RECIPE = Recipe("vit", VitConfig, build_vit)
