"""Models that look, from the street: what an image is taken for (`quest classify`), what is said about it (`quest
generate --image`, `quest chat --image`), and how often a run is right about what it never saw (`quest eval`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.cli.chat import (
    GenerationOptions,
    load_model_and_tokenizer,
    print_text,
    read_user_line,
    require_room_in_context,
    stream_answer,
    stream_text,
)
from llm_quest.cli.output import print_json
from llm_quest.data.image_text import ImageTextCollator
from llm_quest.data.images import IMAGE_SUFFIXES, ImageProcessor, load_image
from llm_quest.errors import DataError, UsageError
from llm_quest.formatting import align_columns
from llm_quest.generation.generate import generate_completions
from llm_quest.hub.load_save import load, load_preprocess, load_tokenizer
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.vision_config import VitConfig, VlmConfig
from llm_quest.recipes.vit import ImageAccuracyEvaluator, load_images
from llm_quest.recipes.vlm import ImageQuestionEvaluator, load_image_text
from llm_quest.train.parallel import resolve_device

LogFn = Callable[[str], None]


def is_image_path(text: str) -> bool:
    """Is this the name of an image, and no text to be read?"""
    return "\n" not in text and Path(text).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class ImagePrediction:
    """label: the likeliest class. probabilities: of every class, the likeliest first."""

    label: str
    probabilities: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        shown = list(self.probabilities.items())[:10]
        left = len(self.probabilities) - len(shown)
        result = align_columns([(name, f"{p:.4f}") for name, p in shown], right=(1,))
        return result + ([f"(and {left:,} classes less likely)"] if left else [])


@torch.no_grad()
def classify_image(model: str, path: str | Path, *, device: str = "auto") -> ImagePrediction:
    """By an image classifier: a run of `quest train vit`, or a published ViT."""
    torch_device = resolve_device(device)
    loaded: Any = load(model, device=torch_device, dtype="float32")
    if not isinstance(loaded, ImageEncoder) or isinstance(loaded.head, torch.nn.Identity):
        raise UsageError(f"{model} is no classifier of images; make one with quest train vit")
    preprocess = load_matching_preprocess(model, loaded.config)
    probabilities = loaded(preprocess(load_image(Path(path)))[None].to(torch_device))[0].softmax(dim=0).tolist()
    names = loaded.config.label_names or tuple(str(i) for i in range(loaded.config.num_labels))
    ordered = dict(sorted(zip(names, probabilities, strict=True), key=lambda pair: -pair[1]))
    return ImagePrediction(next(iter(ordered)), ordered)


def load_matching_preprocess(name_or_path: str, config: Any) -> ImageProcessor:
    """How the images of a model are made; DataError where what the folder says is not what its model reads."""
    preprocess = load_preprocess(name_or_path)
    declared, expected = (preprocess.size, len(preprocess.mean)), (config.image_size, config.num_channels)
    if declared != expected:
        raise DataError(
            f"{name_or_path}: preprocessor_config.json makes images of {declared[0]} pixels with {declared[1]} channels, "
            f"the model reads {expected[0]} with {expected[1]}; correct the file"
        )
    return preprocess


@dataclass(frozen=True)
class ImagePrompt:
    """A vision-language model in front of one image, its tokenizer, and how its prompts begin."""

    model: VisionLanguageModel
    image: Tensor
    writer: ImageTextCollator

    @classmethod
    def load(cls, name_or_path: str, image: str, device: str, dtype: str, log: LogFn) -> ImagePrompt:
        pixels = load_image(Path(image))
        model, tokenizer = load_model_and_tokenizer(name_or_path, device, dtype, log)
        if not isinstance(model, VisionLanguageModel):
            raise UsageError(
                f"{name_or_path} reads text alone: leave --image out, or make another with quest train vlm"
            )
        numbers = model.config
        seen = load_matching_preprocess(name_or_path, numbers.vision_config)(pixels)[None]
        return cls(
            model,
            seen,
            ImageTextCollator(
                tokenizer, numbers.image_token_id, numbers.image_seq_length, numbers.max_position_embeddings
            ),
        )

    @property
    def decoder(self) -> Any:
        """What `generate` drives."""
        return self.model.with_images([self.image])


def describe_image(
    name_or_path: str,
    image: str,
    prompt: str,
    options: GenerationOptions,
    *,
    device: str,
    dtype: str,
    as_json: bool,
    log: LogFn,
) -> None:
    """Print what is said about an image; with as_json everything at its end."""
    require_image_options(options)
    sampling, gaze = options.sampling, ImagePrompt.load(name_or_path, image, device, dtype, log)
    tokens, until = gaze.writer.encode_prompt(prompt), options.stopping_criteria(gaze.decoder, gaze.writer.tokenizer)
    require_room_in_context(tokens, gaze.decoder, False)
    if as_json:
        done = generate_completions(gaze.decoder, [tokens], sampling, until, seed=options.seed)[0]
        print_json({"image": image, "prompt": prompt, **asdict(done)})
        return
    print_text(prompt)
    for piece in stream_text(gaze.decoder, tokens, sampling, until, options.seed):
        print_text(piece)
    print_text("\n")


def require_image_options(options: GenerationOptions) -> None:
    if options.slide:
        raise UsageError("--slide would leave the image behind; leave one of --slide and --image out")
    if options.compile:
        raise UsageError("--compile is for models that read text: leave one of --compile and --image out")


def chat_about_image(
    name_or_path: str,
    image: str,
    options: GenerationOptions,
    *,
    system: str | None,
    device: str,
    dtype: str,
    log: LogFn,
) -> None:
    """Questions about one image and their answers, each after the earlier ones, as rows of training are laid out."""
    if system is not None:
        raise UsageError("--system has no effect on a model that looks at an image; leave it out")
    sampling, gaze = options.sampling, ImagePrompt.load(name_or_path, image, device, dtype, log)
    tokenizer, until = gaze.writer.tokenizer, options.stopping_criteria(gaze.decoder, gaze.writer.tokenizer)
    log("/reset forgets the conversation, /quit or Ctrl-D leaves; Ctrl-C stops an answer")
    tokens = gaze.writer.row_prefix
    while (line := read_user_line()) is not None:
        if line == "/reset":
            tokens = gaze.writer.row_prefix
        elif line:
            tokens = tokens + tokenizer.encode(line, add_special_tokens=False)
            require_room_in_context(tokens, gaze.decoder, False)
            said = stream_answer(gaze.decoder, tokens, sampling, until, options.seed)
            tokens = [*tokens, *tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]


@dataclass(frozen=True)
class ImageScores:
    """scores: accuracy, or the share of right answers by kind of question; on what."""

    source: str
    scores: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        return align_columns(
            [("held out", self.source), *((name, f"{value:.4f}") for name, value in self.scores.items())]
        )


def evaluate_images(name_or_path: str, *, device: str, log: LogFn) -> ImageScores | None:
    """A run of `quest train vit` or `vlm` on what it held out; None for anything else."""
    run = Path(name_or_path).resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    settings = load_raw_config(str(run)) if (run / "config.yaml").is_file() else None
    if settings is None or settings.tree.get("recipe") not in ("vit", "vlm"):
        return None
    model: Any = load(name_or_path, device=resolve_device(device), dtype="float32")
    log(f"{name_or_path}: {model.spec.family}, {sum(p.numel() for p in model.parameters()):,} parameters")
    if settings.tree["recipe"] == "vit":
        part = parse_config(VitConfig, settings).images
        preprocess = ImageProcessor(part.size, part.mean, part.std)
        images = load_images(part, preprocess).held_out
        return ImageScores(
            f"{len(images):,} images of {part.source}", ImageAccuracyEvaluator(images, preprocess, 0).evaluate(model, 0)
        )
    config, preprocess, numbers = parse_config(VlmConfig, settings), load_preprocess(name_or_path), model.config
    writer = ImageTextCollator(
        load_tokenizer(name_or_path), numbers.image_token_id, numbers.image_seq_length, config.batch.length
    )
    number = config.evaluate.sights
    asking = ImageQuestionEvaluator(load_image_text(config, preprocess), writer, preprocess, number, 0)
    return ImageScores(f"{number:,} {config.sights.source}", asking.evaluate(model, 0))
