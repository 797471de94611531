"""`quest train vit`: images -> a Vision Transformer -> classes. Held-out accuracy is measured at the end, and nothing
is chosen by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quest.data.image_datasets import (
    AugmentedImages,
    ImageAugmentation,
    ImageDataset,
    ImageSplits,
    load_cifar10,
    load_image_folder,
    load_sklearn_digits,
    split_images,
)
from llm_quest.data.images import ImageProcessor
from llm_quest.data.loader import ShardedLoader
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load
from llm_quest.models import vit
from llm_quest.models.build import build, preset
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.objectives.classification import ImageClassificationLoss
from llm_quest.recipes.run import RunOutcome, init_distributed
from llm_quest.recipes.vision import ImageTrainingJob, LogFn, run_image_job
from llm_quest.recipes.vision_config import ImageDataConfig, VitConfig
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import derive_seed

IMAGE_EVAL_BATCH_SIZE = 256


def train_vit(
    config: VitConfig, settings: RawConfig, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, log: LogFn = print,
) -> RunOutcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with init_distributed(config, config.batch_size) as parallel:
        leader_log = log if parallel.is_main_process else lambda text: None
        return run_image_job(
            build_vit_job(config, parallel, leader_log), config, out, resume, env or {}, quiet, leader_log, parallel
        )


def build_vit_job(config: VitConfig, parallel: DistributedContext, log: LogFn) -> ImageTrainingJob:
    """Data, model, objective and feed."""
    preprocess = ImageProcessor(config.data.image_size, config.data.image_mean, config.data.image_std)
    sides = load_images(config.data, preprocess)
    log(f"images: {len(sides.train):,} to train on, {len(sides.held_out):,} held out, {len(sides.train.names)} classes")
    loader = ShardedLoader(
        AugmentedImages(sides.train, preprocess, ImageAugmentation(**config.data.augment.model_dump())),
        batch_size=config.batch_size,
        micro_batch_size=min(config.micro_batch_size or config.batch_size, config.batch_size // parallel.world_size),
        seed=derive_seed(config.seed, "order"),
        shard=parallel.data_shard,
    )
    objective = ImageClassificationLoss(init_vit(config, sides.train), label_smoothing=config.label_smoothing)
    identity = {"train": sides.train.hash, "held_out": sides.held_out.hash}
    facts: dict[str, Any] = {"counted": "images", "corpus": {"name": config.data.path or config.data.source}}
    facts |= {"train_images": len(sides.train), "val_images": len(sides.held_out), "classes": list(sides.train.names)}
    return ImageTrainingJob(
        objective,
        loader,
        ImageAccuracyEvaluator(sides.held_out, preprocess, config.eval_steps),
        preprocess,
        identity,
        facts,
    )


def load_images(config: ImageDataConfig, preprocess: ImageProcessor) -> ImageSplits:
    """The source's images, in two sides."""
    if config.source == "digits":
        return split_images(load_sklearn_digits(), config.held_out)
    assert config.path is not None, "the config asks for a folder with every other source"
    return (
        load_cifar10(config.path)
        if config.source == "cifar10"
        else load_image_folder(config.path, preprocess, config.held_out)
    )


def init_vit(config: VitConfig, images: ImageDataset) -> ImageEncoder:
    """The model before the first step: loaded, or built with first values from its own stream of chance."""
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
        )
    else:
        sizes = part.model_dump(exclude={"preset", "load"})
        numbers = vit.Config(
            image_size=size, num_channels=channels, num_labels=len(images.names), label_names=labels, **sizes
        )
    return build(numbers, seed=seed)  # type: ignore[return-value]


def adapt_to_images(model: ImageEncoder, images: ImageDataset, labels: tuple[str, ...], seed: int) -> ImageEncoder:
    """A trained model for these images: positions stretched to their size, and a head of their classes with new
    values."""
    if not isinstance(model, ImageEncoder) or not isinstance(model.config, vit.Config):
        raise UsageError("model.load must name a ViT")
    if images.pixels.shape[1] != model.config.num_channels:
        raise UsageError(
            f"the images have {images.pixels.shape[1]} channels, the model reads {model.config.num_channels}: "
            "set as many numbers in data.image_mean"
        )
    model = vit.resize_images(model, images.pixels.shape[2])
    if len(images.names) != model.config.num_labels:
        config = replace(model.config, num_labels=len(images.names), label_names=labels)
        model.spec = replace(model.spec, config=config)
        model.head = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.normal_(model.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(model.head.bias)
    return model


@dataclass(frozen=True)
class ImageAccuracyEvaluator:
    """The share of held-out images whose likeliest class is the right one."""

    images: ImageDataset
    preprocess: ImageProcessor
    interval: int
    name: str = "eval"

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Mapping[str, float]:
        right, nats, device = 0.0, 0.0, next(model.parameters()).device
        for first in range(0, len(self.images), IMAGE_EVAL_BATCH_SIZE):
            here = slice(first, first + IMAGE_EVAL_BATCH_SIZE)
            labels = torch.from_numpy(self.images.labels[here]).to(device)
            logits = model(self.preprocess.normalize(self.images.pixels[here]).to(device)).float()
            right += float((logits.argmax(dim=-1) == labels).sum())
            nats += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return {"accuracy": right / len(self.images), "loss": nats / len(self.images)}
