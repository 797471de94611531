"""`quest classify MODEL TEXT|IMAGE`: the probability of each label by a classifier."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.cli.vision import load_matching_preprocess
from llm_quest.data.batch import MULTI_LABEL
from llm_quest.data.images import IMAGE_SUFFIXES, is_image_file, load_image
from llm_quest.data.text_classification import encode_truncated
from llm_quest.errors import UsageError
from llm_quest.formatting import align_columns
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.models.dual_encoder import CLIPModel
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.objectives.classification import last_token_outputs, pad_rows
from llm_quest.scope import Scope
from llm_quest.techniques.score_head import find_score_head, read_length
from llm_quest.train.parallel import resolve_device

MAX_PATH_LENGTH = 4096
PROMPT_TEMPLATE = "a photo of a {}."
"""CLIP's own (section 3.1.4)."""


def classify_input(
    model: str, text: str, *, labels: Sequence[str] = (), template: str | None = None, device: str = "auto"
) -> TextPrediction | ImagePrediction:
    """Classify a text (-: the one on stdin), or the image file that it names. labels, template: see
    `classify_image`."""
    if is_image_path(text):
        return classify_image(model, text, labels=labels, template=template or PROMPT_TEMPLATE, device=device)
    if labels or template is not None:
        raise UsageError("--label and --template are for images: a text classifier has labels of its own")
    return classify_text(model, sys.stdin.read() if text == "-" else text, device=device)


@dataclass(frozen=True)
class TextPrediction:
    """A text classification. labels: the most probable one, or of a multi-label classifier all above 0.5.
    probabilities: of every label, the most probable first. tokens: how many of the text were read. cut: how many were
    left out, as in training."""

    labels: tuple[str, ...]
    probabilities: dict[str, float]
    tokens: int
    cut: int
    is_multi_label: bool = False

    @property
    def label(self) -> str:
        """The most probable label."""
        return next(iter(self.probabilities))

    def as_json(self) -> dict[str, Any]:
        return {"label": self.label, **asdict(self)}

    def lines(self) -> list[str]:
        result = align_columns([(name, f"{p:.4f}") for name, p in self.probabilities.items()], right=(1,))
        if self.is_multi_label:
            result.append(labels_line(self.labels))
        return result + (
            [f"(read: the first {self.tokens:,} tokens, as in training; left out: {self.cut:,})"] if self.cut else []
        )


def labels_line(labels: Sequence[str]) -> str:
    return f"labels: {', '.join(labels) or 'none (no probability is above 0.5)'}"


@torch.no_grad()
def classify_text(name_or_path: str, text: str, *, device: str = "auto") -> TextPrediction:
    """Classify a text with a model of `quest train classify`."""
    torch_device = resolve_device(device)
    model = load(name_or_path, device=torch_device, dtype="float32")
    if isinstance(model, ImageEncoder):
        raise UsageError(f"{name_or_path} classifies images, and {text[:60]!r} is no image file: give the path of one")
    head = find_score_head(model) if isinstance(model, Decoder) else None
    if head is None or head.outputs < 2:
        raise UsageError(
            f"{name_or_path} is not a text classifier; train one with quest train classify model.load={name_or_path}"
        )
    tokenizer = load_tokenizer(name_or_path)
    whole = encode_truncated(tokenizer, text, 10**9)
    tokens, positions = pad_rows([whole[: read_length(model, tokenizer.model_max_length)]])
    if head.problem_type == "regression":
        raise UsageError(f"{name_or_path} predicts numbers (problem_type regression in its config.json), no labels")
    logits = last_token_outputs(model, tokens.to(torch_device), positions.to(torch_device))[0]
    names = unique_names(head.labels or tuple(f"LABEL_{i}" for i in range(head.outputs)))
    labels, probabilities = rank_labels(logits, names, is_multi_label=head.is_multi_label)
    read = tokens.shape[1]
    return TextPrediction(labels, probabilities, read, len(whole) - read, head.is_multi_label)


def rank_labels(
    logits: Tensor, names: Sequence[str], *, is_multi_label: bool
) -> tuple[tuple[str, ...], dict[str, float]]:
    """(predicted labels, probability of each label, the most probable first) of logits (V,): a sigmoid each and all
    above 0.5 with is_multi_label, otherwise a softmax and the most probable one."""
    probabilities = (logits.sigmoid() if is_multi_label else logits.softmax(dim=0)).tolist()
    ranked = dict(sorted(zip(names, probabilities, strict=True), key=lambda pair: -pair[1]))
    return tuple(name for name, p in ranked.items() if p > 0.5) if is_multi_label else tuple(ranked)[:1], ranked


def is_image_path(text: str) -> bool:
    """Whether the argument names an image file and is not a text: by its suffix, or by how the file begins."""
    if "\n" in text or "\0" in text or len(text) > MAX_PATH_LENGTH:
        return False
    return Path(text).suffix.lower() in IMAGE_SUFFIXES or (Path(text).is_file() and is_image_file(text))


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of classes; those that occur twice (ImageNet's two cranes) with their number: 'crane (134)'."""
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names))


@dataclass(frozen=True)
class ImagePrediction:
    """An image classification. label: the most probable. probabilities: of every class, the most probable first.
    labels: the most probable, or of a multi-label classifier all above 0.5."""

    label: str
    probabilities: dict[str, float]
    labels: tuple[str, ...] = ()
    is_multi_label: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        shown = list(self.probabilities.items())[:10]
        left = len(self.probabilities) - len(shown)
        result = align_columns([(name, f"{p:.4f}") for name, p in shown], right=(1,))
        result += [f"(and {left:,} less probable classes)"] if left else []
        return result + ([labels_line(self.labels)] if self.is_multi_label else [])


@torch.no_grad()
def classify_image(
    model: str, path: str | Path, *, labels: Sequence[str] = (), template: str = PROMPT_TEMPLATE, device: str = "auto"
) -> ImagePrediction:
    """Classify an image: with a run of `quest train vit` or a published ViT among its classes, with a whole CLIP among
    `labels`, each of which is put into the template's braces."""
    torch_device, image = resolve_device(device), load_image(Path(path))
    loaded: Any = load(model, device=torch_device, dtype="float32", vision=True)
    if isinstance(loaded, CLIPModel):
        names, texts = unique_names(labels), label_prompts(model, labels, template)
        preprocess = load_matching_preprocess(model, loaded.config.vision_config)
        input_ids, position_ids = (part.to(torch_device) for part in encode_label_prompts(model, loaded, texts))
        images = preprocess(image)[None].to(torch_device)
        logits = loaded(input_ids, images, Scope(position_ids))[0]
    elif labels:
        raise UsageError(f"{model} answers with its own classes: leave --label out, or give a whole CLIP")
    elif not isinstance(loaded, ImageEncoder) or not getattr(loaded.config, "num_labels", 0):
        raise UsageError(f"{model} is not an image classifier; train one with quest train vit")
    else:
        preprocess = load_matching_preprocess(model, loaded.config)
        logits = loaded(preprocess(image)[None].to(torch_device))[0]
        names = unique_names(loaded.config.label_names or tuple(str(i) for i in range(loaded.config.num_labels)))
    is_multi_label = getattr(loaded.config, "problem_type", None) == MULTI_LABEL
    predicted, probabilities = rank_labels(logits, names, is_multi_label=is_multi_label)
    return ImagePrediction(next(iter(probabilities)), probabilities, predicted, is_multi_label)


def label_prompts(model: str, labels: Sequence[str], template: str) -> list[str]:
    """The text that stands for each label. UsageError for fewer than two labels and for a template without braces."""
    if len(labels) < 2:
        raise UsageError(
            f"{model} is a CLIP, which chooses among texts: name two or more classes, --label cat --label dog"
        )
    if "{}" not in template:
        raise UsageError(f"the template {template!r} has no place for a label: write {{}} there")
    return [template.replace("{}", label) for label in labels]


def encode_label_prompts(name_or_path: str, model: CLIPModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """input_ids, position_ids (N,T). UsageError for a text that is too long to be read whole."""
    tokenizer, max_length = load_tokenizer(name_or_path), model.config.max_position_embeddings
    rows = [tokenizer.encode(text) for text in texts]
    longest, text = max(zip(map(len, rows), texts, strict=True))
    if longest > max_length:
        raise UsageError(f"{text[:60]!r} has {longest} tokens, and this model reads {max_length}: shorten the label")
    return pad_rows(rows)
