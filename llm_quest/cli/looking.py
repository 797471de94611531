"""Models that look, from the street: what an image is taken for (`quest classify`), what is said about it (`quest
generate --image`, `quest chat --image`), and how often a run is right about what it never saw (`quest eval`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.cli.screen import show_json
from llm_quest.cli.talk import Manner, answer, asked, fits, opened, put, written
from llm_quest.data.images import SUFFIXES, Preprocess, open_image
from llm_quest.data.sights import Writer
from llm_quest.errors import DataError, UsageError
from llm_quest.generation.generate import complete
from llm_quest.hub.files import load, load_preprocess, load_tokenizer
from llm_quest.models.fusion import VisionLanguage
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.recipes.config import gather, resolve
from llm_quest.recipes.vision_config import Vit, Vlm
from llm_quest.recipes.vit import Accuracy, read_images
from llm_quest.recipes.vlm import Answering, read_sights
from llm_quest.report.words import aligned
from llm_quest.train.parallel import pick_device

Say = Callable[[str], None]


def is_image(text: str) -> bool:
    """Is this the name of an image, and no text to be read?"""
    return "\n" not in text and Path(text).suffix.lower() in SUFFIXES


@dataclass(frozen=True)
class Likeness:
    """label: the likeliest class. probabilities: of every class, the likeliest first."""

    label: str
    probabilities: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        shown = list(self.probabilities.items())[:10]
        left = len(self.probabilities) - len(shown)
        told = aligned([(name, f"{p:.4f}") for name, p in shown], right=(1,))
        return told + ([f"(and {left:,} classes less likely)"] if left else [])


@torch.no_grad()
def classify_image(model: str, path: str | Path, *, device: str = "auto") -> Likeness:
    """By an image classifier: a run of `quest train vit`, or a published ViT."""
    place = pick_device(device)
    loaded: Any = load(model, device=place, dtype="float32")
    if not isinstance(loaded, ImageEncoder) or isinstance(loaded.head, torch.nn.Identity):
        raise UsageError(f"{model} is no classifier of images; make one with quest train vit")
    preprocess = fitting(model, loaded.config)
    p = loaded(preprocess(open_image(Path(path)))[None].to(place))[0].softmax(dim=0).tolist()
    names = loaded.config.labels or tuple(str(i) for i in range(loaded.config.classes))
    ordered = dict(sorted(zip(names, p, strict=True), key=lambda pair: -pair[1]))
    return Likeness(next(iter(ordered)), ordered)


def fitting(where: str, config: Any) -> Preprocess:
    """How the images of a model are made; DataError where what the folder says is not what its model reads."""
    preprocess = load_preprocess(where)
    said, read = (preprocess.size, len(preprocess.mean)), (config.image, config.channels)
    if said != read:
        raise DataError(
            f"{where}: preprocessor_config.json makes images of {said[0]} pixels with {said[1]} channels, "
            f"the model reads {read[0]} with {read[1]}; correct the file"
        )
    return preprocess


@dataclass(frozen=True)
class Gaze:
    """A vision-language model in front of one image, its tokenizer, and how its prompts begin."""

    model: VisionLanguage
    image: Tensor
    writer: Writer

    @classmethod
    def of(cls, where: str, image: str, device: str, dtype: str, say: Say) -> Gaze:
        pixels = open_image(Path(image))
        model, tokenizer = opened(where, device, dtype, say)
        if not isinstance(model, VisionLanguage):
            raise UsageError(f"{where} reads text alone: leave --image out, or make another with quest train vlm")
        numbers = model.config
        seen = fitting(where, numbers.vision)(pixels)[None]
        return cls(model, seen, Writer(tokenizer, numbers.image_token, numbers.image_tokens, numbers.context))

    @property
    def decoder(self) -> Any:
        """What `generate` drives."""
        return self.model.looking([self.image])


def describe(
    where: str, image: str, prompt: str, manner: Manner, *, device: str, dtype: str, as_json: bool, say: Say
) -> None:
    """Print what is said about an image; with as_json everything at its end."""
    stays(manner)
    sampling, gaze = manner.sampling, Gaze.of(where, image, device, dtype, say)
    tokens, until = gaze.writer.prompt(prompt), manner.until(gaze.decoder, gaze.writer.tokenizer)
    fits(tokens, gaze.decoder, False)
    if as_json:
        done = complete(gaze.decoder, [tokens], sampling, until, seed=manner.seed)[0]
        show_json({"image": image, "prompt": prompt, **asdict(done)})
        return
    put(prompt)
    for piece in written(gaze.decoder, tokens, sampling, until, manner.seed):
        put(piece)
    put("\n")


def stays(manner: Manner) -> None:
    if manner.slide:
        raise UsageError("--slide would leave the image behind; leave one of --slide and --image out")
    if manner.compile:
        raise UsageError("--compile is for models that read text: leave one of --compile and --image out")


def converse_about(
    where: str, image: str, manner: Manner, *, system: str | None, device: str, dtype: str, say: Say
) -> None:
    """Questions about one image and their answers, each after the earlier ones, as rows of training are laid out."""
    if system is not None:
        raise UsageError("--system has no effect on a model that looks at an image; leave it out")
    sampling, gaze = manner.sampling, Gaze.of(where, image, device, dtype, say)
    tokenizer, until = gaze.writer.tokenizer, manner.until(gaze.decoder, gaze.writer.tokenizer)
    say("/reset forgets the conversation, /quit or Ctrl-D leaves; Ctrl-C stops an answer")
    tokens = gaze.writer.start
    while (line := asked()) is not None:
        if line == "/reset":
            tokens = gaze.writer.start
        elif line:
            tokens = tokens + tokenizer.encode(line, template=False)
            fits(tokens, gaze.decoder, False)
            said = answer(gaze.decoder, tokens, sampling, until, manner.seed)
            tokens = [*tokens, *tokenizer.encode(said, template=False), tokenizer.end_id]


@dataclass(frozen=True)
class Marks:
    """scores: accuracy, or the share of right answers by kind of question; on what."""

    source: str
    scores: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        return aligned([("held out", self.source), *((name, f"{value:.4f}") for name, value in self.scores.items())])


def looked(where: str, *, device: str, say: Say) -> Marks | None:
    """A run of `quest train vit` or `vlm` on what it held out; None for anything else."""
    run = Path(where).resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    settings = gather(str(run)) if (run / "config.yaml").is_file() else None
    if settings is None or settings.tree.get("recipe") not in ("vit", "vlm"):
        return None
    model: Any = load(where, device=pick_device(device), dtype="float32")
    say(f"{where}: {model.card.page}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if settings.tree["recipe"] == "vit":
        part = resolve(Vit, settings).images
        preprocess = Preprocess(part.size, part.mean, part.std)
        images = read_images(part, preprocess).held_out
        return Marks(f"{len(images):,} images of {part.source}", Accuracy(images, preprocess, 0).measure(model, 0))
    config, preprocess, numbers = resolve(Vlm, settings), load_preprocess(where), model.config
    writer = Writer(load_tokenizer(where), numbers.image_token, numbers.image_tokens, config.batch.length)
    number = config.evaluate.sights
    asking = Answering(read_sights(config, preprocess), writer, preprocess, number, 0)
    return Marks(f"{number:,} {config.sights.source}", asking.measure(model, 0))
