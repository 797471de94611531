"""`quest verify FOLDER`: the same folder loaded here and in transformers, the same inputs, the outputs compared.

What is allowed is the reference's own error: transformers computes once more in float64, and the bound is three times
the distance of its float32 outputs from these. A tolerance chosen by hand is too small where a model amplifies rounding
and proves nothing where it does not.

    text                             logits of random tokens, whole and padded on the left
    ...ForSequenceClassification     scores at the last token, whole and padded on the right
    ViT, CLIP's image encoder        logits, or the class token's vector, of random images
    LLaVA, Gemma 3, Qwen3.5          logits of random tokens with an image in each row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_quest.data.tokenizer_files import has_tokenizer
from llm_quest.errors import MissingError, UsageError
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.hub.locate import ModelLocation, locate_model
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.scope import Scope
from llm_quest.techniques.model_spec import all_exportable
from llm_quest.techniques.score_head import ScoreHead, find_score_head

if TYPE_CHECKING:
    from pathlib import Path

MARGIN = 3.0
"""Of the reference's own error."""
ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Of the largest output: the least that is allowed, where the reference happens to make no error."""
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Verification:
    """How far our outputs are from transformers' (float32, CPU). difference_padded: None for images. reference_error:
    of transformers' float32 outputs from its float64 ones. allowed: three times that."""

    name: str
    difference: float
    difference_padded: float | None
    largest_logit: float
    reference_error: float
    allowed: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    tokenizer: str
    passed: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        keys = [f"transformers misses {name}" for name in self.missing]
        keys += [f"transformers does not expect {name}" for name in self.unexpected]
        padded = (
            []
            if self.difference_padded is None
            else [f"  the same, padded                {self.difference_padded:.2e}"]
        )
        return [
            f"{self.name}: {'equal' if self.passed else 'DIFFERENT'}",
            f"  largest difference              {self.difference:.2e}   (outputs up to {self.largest_logit:.1f})",
            *padded,
            f"  transformers' own error         {self.reference_error:.2e}   (float32 from float64; allowed: "
            f"{self.allowed:.1e})",
            f"  tokenizer                       {self.tokenizer}",
            *(f"  {key}" for key in keys),
        ]


@dataclass(frozen=True)
class Counterpart:
    """How a kind of model is compared. auto_class: transformers'. inputs(model, seed) -> tensors by transformers'
    names. ours, theirs(model, inputs) -> outputs. pad: the inputs with padding in the second row, and which outputs
    count."""

    auto_class: str
    inputs: Callable[[Any, int], Inputs]
    ours: Callable[[Any, Inputs], Tensor]
    theirs: Callable[[Any, Inputs], Tensor]
    pad: Callable[[Any, Inputs], tuple[Inputs, Tensor]] | None = None


def random_input_ids(model: Any, seed: int) -> Inputs:
    """(2,T), long enough for scaled rotations to show."""
    length = min(model.config.max_position_embeddings, 96)
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(model.config.vocab_size, (2, length), generator=generator)}


def random_scored_ids(model: Any, seed: int) -> Inputs:
    """The same, without the padding token, by which transformers finds the last one."""
    ids, pad = random_input_ids(model, seed)["input_ids"], padding_token(model)
    return {"input_ids": ids.where(ids != pad, (pad + 1) % model.config.vocab_size)}


def random_images(config: Any, seed: int) -> Tensor:
    """(2,C,H,W), normalized."""
    shape = (2, config.num_channels, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_illustrated_ids(model: Any, seed: int) -> Inputs:
    """A row for each of two images, its placeholders among random tokens."""
    images = random_images(model.config.vision_config, seed)
    return {"input_ids": random_ids_with_images(model.config, images, seed), "pixel_values": images}


def random_typed_ids(model: Any, seed: int) -> Inputs:
    """The same for Gemma 3, which is told what is an image's: its tokens see each other."""
    inputs = random_illustrated_ids(model, seed)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == model.config.image_token_id).long()}


def random_gridded_ids(model: Any, seed: int) -> Inputs:
    """The same for Qwen3.5: patches in blocks of neighbours, each twice in time, and their grids."""
    vision = model.config.vision_config
    side, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = 2 * merge, 4 * merge
    shape = (2, vision.num_channels, rows * side, columns * side)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    cut = images.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = cut[:, :, :, :, :, :, None].expand(*cut.shape[:6], frames, side, side).reshape(2 * rows * columns, -1)
    ids = random_ids_with_images(model.config, images, seed)
    kinds, grids = (ids == model.config.image_token_id).long(), torch.tensor([[1, rows, columns]] * 2)
    return {
        "input_ids": ids,
        "images": images,
        "pixel_values": patches,
        "image_grid_thw": grids,
        "mm_token_type_ids": kinds,
    }


def random_ids_with_images(config: Any, images: Tensor, seed: int) -> Tensor:
    """(2,T): a row for each of two images of one size."""
    placeholders = config.num_image_tokens(*images.shape[2:])
    length = min(placeholders + 32, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    ids = ids.where(ids != config.image_token_id, (config.image_token_id + 1) % config.vocab_size)
    ids[:, 1 : 1 + placeholders] = config.image_token_id
    return ids


def pad_left(model: Any, inputs: Inputs) -> tuple[Inputs, Tensor]:
    """A third of the second row is padding; only real tokens are compared."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, : math.ceil(mask.shape[1] / 3)] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {**inputs, "attention_mask": mask, "position_ids": positions}, mask.bool()


def pad_right(model: Any, inputs: Inputs) -> tuple[Inputs, Tensor]:
    """A third of the second row is padding; both rows' scores are compared."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, -math.ceil(mask.shape[1] / 3) :] = 0
    ids = inputs["input_ids"].where(mask.bool(), padding_token(model))
    return {"input_ids": ids, "attention_mask": mask}, torch.ones(2, dtype=torch.bool)


def padding_token(model: Any) -> int:
    """The id that pads; 0 where the model names none."""
    generation = model.generation_config
    return 0 if generation is None or generation.pad_token_id is None else generation.pad_token_id


def scope_of(inputs: Inputs) -> Scope:
    mask = inputs.get("attention_mask")
    if mask is None:
        return Scope.unpadded(inputs["input_ids"])
    return Scope((mask.cumsum(dim=1) - 1).masked_fill(mask == 0, -1))


def our_logits(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs["input_ids"], scope_of(inputs))


def our_scores(model: Any, inputs: Inputs) -> Tensor:
    scope = scope_of(inputs)
    last = scope.position_ids.argmax(dim=1)
    return model(inputs["input_ids"], scope)[torch.arange(len(last)), last]


def our_illustrated_logits(model: Any, inputs: Inputs) -> Tensor:
    features = model.get_image_features(inputs["images"] if "images" in inputs else inputs["pixel_values"])
    return model(inputs["input_ids"], image_features=features)


def their_logits(model: Any, inputs: Inputs) -> Tensor:
    return model(**{name: value for name, value in inputs.items() if name != "images"}, use_cache=False).logits


def their_scores(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs).logits


def their_class_vector(model: Any, inputs: Inputs) -> Tensor:
    """The class token after the final norm: CLIP norms it alone, ViT all tokens."""
    output = model(**inputs)
    is_clip = type(model).__name__.startswith("CLIP")
    return output.pooler_output if is_clip else output.last_hidden_state[:, 0]


TEXT = Counterpart("AutoModelForCausalLM", random_input_ids, our_logits, their_logits, pad_left)
SCORES = Counterpart("AutoModelForSequenceClassification", random_scored_ids, our_scores, their_scores, pad_right)
TEXT_WITH_IMAGES = {
    family: Counterpart("AutoModelForImageTextToText", inputs, our_illustrated_logits, their_logits)
    for family, inputs in {
        "vision_language": random_illustrated_ids,
        "gemma3": random_typed_ids,
        "qwen3_5": random_gridded_ids,
    }.items()
}
"""By family: what each is told about its images differs."""


def counterpart_of(model: Any) -> Counterpart:
    """How this model is compared."""
    if isinstance(model, VisionLanguageModel):
        return TEXT_WITH_IMAGES[model.spec.family]
    if not isinstance(model, ImageEncoder):
        return TEXT if find_score_head(model) is None else SCORES
    inputs = lambda model, seed: {"pixel_values": random_images(model.config, seed)}  # noqa: E731
    ours = lambda model, inputs: model(inputs["pixel_values"])  # noqa: E731
    if getattr(model.config, "num_labels", 0):
        return Counterpart("AutoModelForImageClassification", inputs, ours, their_scores)
    auto_class = "CLIPVisionModel" if model.spec.family == "clip" else "AutoModel"
    return Counterpart(auto_class, inputs, ours, their_class_vector)


def compare_with_transformers(name_or_path: str | Path, *, seed: int = 0) -> Verification:
    """Load a published folder here and in transformers; compare outputs on random inputs and ids on sample texts.

    Raises MissingError without transformers; UsageError for a run folder (export it first)."""
    location = locate_model(name_or_path)
    if location.run_dir is not None:
        raise UsageError(
            f"{name_or_path} is a run of ours, which transformers cannot read: export it, then verify the export"
        )
    transformers = import_transformers()
    ours = load(location.folder, dtype="float32", vision=True)
    refuse_unpublished_techniques(ours, str(name_or_path))
    kind = counterpart_of(ours)
    read = getattr(transformers, kind.auto_class).from_pretrained
    theirs, info = read(location.folder, dtype=torch.float32, output_loading_info=True)
    inputs, theirs = kind.inputs(ours, seed), theirs.eval()
    with torch.no_grad():
        reference = kind.theirs(theirs, inputs)
        difference = float((kind.ours(ours, inputs) - reference).abs().max())
        padded = None if kind.pad is None else difference_with_padding(kind, ours, theirs, inputs)
        error = float((reference.double() - float64_outputs(kind, theirs, inputs)).abs().max())
    largest = float(reference.abs().max())
    allowed = max(MARGIN * error, ROUNDING * largest)
    missing, unexpected = (unread_keys(info[key], ours) for key in ("missing_keys", "unexpected_keys"))
    tokenizer_result = compare_tokenizers(location, transformers)
    good = max(difference, padded or 0.0) <= allowed and not missing + unexpected
    passed = good and not tokenizer_result.startswith("DIFFERENT")
    return Verification(
        location.name, difference, padded, largest, error, allowed, missing, unexpected, tokenizer_result, passed
    )


def refuse_unpublished_techniques(model: Any, name: str) -> None:
    """UsageError for a model that transformers does not compute."""
    if not all_exportable(one for one in model.spec.techniques if not isinstance(one, ScoreHead)):
        made = ", ".join(type(technique).__name__ for technique in model.spec.techniques)
        raise UsageError(
            f"{name} was made with {made}, which transformers does not compute: there is no one to compare"
        )


def difference_with_padding(kind: Counterpart, ours: Any, theirs: Any, inputs: Inputs) -> float:
    """The largest difference of the outputs that count, with padding in the second row."""
    assert kind.pad is not None
    padded, counted = kind.pad(ours, inputs)
    return float((kind.ours(ours, padded) - kind.theirs(theirs, padded))[counted].abs().max())


def float64_outputs(kind: Counterpart, theirs: Any, inputs: Inputs) -> Tensor:
    """transformers' outputs in float64; the model is changed, in place."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return kind.theirs(theirs.double(), wide).double()


def unread_keys(keys: Any, model: Any) -> tuple[str, ...]:
    """Weights that transformers misses or does not expect. Left out: poolers, which neither side reads, and of a whole
    CLIP the text tower and what belongs to it."""
    other = (
        ("text_model.", "text_projection", "visual_projection", "logit_scale") if model.spec.family == "clip" else ()
    )
    return tuple(sorted(key for key in map(str, keys) if not key.startswith(other) and ".pooler." not in f".{key}"))


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingError("verify compares with transformers, which is missing: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def compare_tokenizers(location: ModelLocation, transformers: Any) -> str:
    """Ids of the sample texts, here and there."""
    if not has_tokenizer(location.folder):
        return "none in this folder"
    ours, theirs = load_tokenizer(location.folder), transformers.AutoTokenizer.from_pretrained(location.folder)
    there: Callable[[str], list[int]] = lambda text: theirs.encode(text, add_special_tokens=False)  # noqa: E731
    wrong = [text for text in SAMPLES if ours.encode(text, add_special_tokens=False) != there(text)]
    return f"DIFFERENT on {wrong[0]!r}" if wrong else f"equal ids on {len(SAMPLES)} sample texts"


SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\nlines \r\n",
    "def f(x):\n    return x ** 2  # comment",
    "3.14159 and 1,000,000 and 2026-11-24",
    "Grüße, naïve café; Ελληνικά; русский; 日本語; العربية",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and zero\u200bwidth",
    "",
    " ",
)
