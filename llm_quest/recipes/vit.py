"""`quest train vit`: images -> a Vision Transformer -> classes. Held-out accuracy is measured at the end, and nothing
is chosen by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quest.data.classes import Augment, ImageFeed, Labelled, Sides, cifar10, digits, folder, split
from llm_quest.data.images import Preprocess
from llm_quest.errors import UsageError
from llm_quest.hub.files import load
from llm_quest.models import vit
from llm_quest.models.build import build, preset
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.objectives.classification import ImageClassification
from llm_quest.recipes.course import Outcome, company
from llm_quest.recipes.vision import Job, Say, carried_out
from llm_quest.recipes.vision_config import Images, Vit
from llm_quest.recipes.yaml import Settings
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed

AT_ONCE = 256


def train_vit(
    config: Vit, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with company(config, config.batch.rows) as parallel:
        tell = say if parallel.leader else lambda text: None
        return carried_out(assembled(config, parallel, tell), config, out, resume, env or {}, quiet, tell, parallel)


def assembled(config: Vit, parallel: Parallel, say: Say) -> Job:
    """Data, model, objective and feed."""
    preprocess = Preprocess(config.images.size, config.images.mean, config.images.std)
    sides = read_images(config.images, preprocess)
    say(f"images: {len(sides.train):,} to train on, {len(sides.held_out):,} held out, {len(sides.train.names)} classes")
    feed = ImageFeed(
        sides.train,
        preprocess,
        rows=config.batch.rows,
        micro_rows=min(config.batch.micro_rows or config.batch.rows, config.batch.rows // parallel.world),
        seed=derive_seed(config.seed, "order"),
        augment=Augment(**config.images.vary.model_dump()),
        share=parallel.share,
    )
    objective = ImageClassification(first_model(config, sides.train), smoothing=config.smoothing)
    identity = {"train": sides.train.hash, "held_out": sides.held_out.hash}
    facts: dict[str, Any] = {"counted": "images", "corpus": {"name": config.images.folder or config.images.source}}
    facts |= {"train_images": len(sides.train), "val_images": len(sides.held_out), "classes": list(sides.train.names)}
    return Job(
        objective, feed, Accuracy(sides.held_out, preprocess, config.evaluate.every), preprocess, identity, facts
    )


def read_images(part: Images, preprocess: Preprocess) -> Sides:
    """The source's images, in two sides."""
    if part.source == "digits":
        return split(digits(), part.held_out)
    assert part.folder is not None, "the config asks for a folder with every other source"
    return cifar10(part.folder) if part.source == "cifar10" else folder(part.folder, preprocess, part.held_out)


def first_model(config: Vit, images: Labelled) -> ImageEncoder:
    """The model before the first step: loaded, or built with first values from its own stream of chance."""
    part, seed = config.model, derive_seed(config.seed, "init")
    channels, size = images.pixels.shape[1], images.pixels.shape[2]
    labels = () if config.images.source == "digits" else images.names
    if part.load is not None:
        return fitted(load(part.load, dtype="float32", aligned=True), images, labels, seed)  # type: ignore[arg-type]
    if part.preset is not None:
        base = preset(part.preset).config
        assert isinstance(base, vit.Config), "the config refuses other presets"
        numbers = replace(
            base, image=size, channels=channels, classes=len(images.names), labels=labels, dropout=part.dropout
        )
    else:
        sizes = part.model_dump(exclude={"preset", "load"})
        numbers = vit.Config(image=size, channels=channels, classes=len(images.names), labels=labels, **sizes)
    return build(numbers, seed=seed)  # type: ignore[return-value]


def fitted(model: ImageEncoder, images: Labelled, labels: tuple[str, ...], seed: int) -> ImageEncoder:
    """A trained model for these images: positions stretched to their size, and a head of their classes with new
    values."""
    if not isinstance(model, ImageEncoder) or not isinstance(model.config, vit.Config):
        raise UsageError("model.load must name a ViT")
    if images.pixels.shape[1] != model.config.channels:
        raise UsageError(
            f"the images have {images.pixels.shape[1]} channels, the model reads {model.config.channels}: "
            "set as many numbers in images.mean"
        )
    model = vit.resized(model, images.pixels.shape[2])
    if len(images.names) != model.config.classes:
        config = replace(model.config, classes=len(images.names), labels=labels)
        model.card = replace(model.card, config=config)
        model.head = nn.Linear(config.width, config.classes)
        nn.init.normal_(model.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(model.head.bias)
    return model


@dataclass(frozen=True)
class Accuracy:
    """The share of held-out images whose likeliest class is the right one."""

    images: Labelled
    preprocess: Preprocess
    every: int
    name: str = "eval"

    @torch.no_grad()
    def measure(self, model: nn.Module, step: int) -> Mapping[str, float]:
        right, nats, device = 0.0, 0.0, next(model.parameters()).device
        for first in range(0, len(self.images), AT_ONCE):
            here = slice(first, first + AT_ONCE)
            labels = torch.from_numpy(self.images.labels[here]).to(device)
            logits = model(self.preprocess.normalized(self.images.pixels[here]).to(device)).float()
            right += float((logits.argmax(dim=-1) == labels).sum())
            nats += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return {"accuracy": right / len(self.images), "loss": nats / len(self.images)}
