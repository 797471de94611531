"""Compares a folder loaded here and in transformers, on the same three inputs (`quest verify FOLDER`).

The bound is the reference's own error: transformers computes once more, wholly in float64, and three times the distance
of its float32 outputs from these is allowed. A tolerance chosen by hand is too small where a model amplifies rounding
and proves nothing where it does not.

    text                             logits of random tokens, whole and padded on the left
    ...ForSequenceClassification     scores at the last token, whole and padded on the right
    ViT, CLIP's image encoder        logits, image_embeds, or the class token's vector, of random images
    CLIP, its text encoder           logits_per_image of random images and texts; text_embeds of random texts
    LLaVA, Gemma 3, Qwen3.5          logits of random tokens with an image in each row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_quest.data.tokenizer_files import has_tokenizer
from llm_quest.errors import UsageError, import_extra
from llm_quest.hub.counterparts import Counterpart, Inputs, counterpart_of
from llm_quest.hub.float64 import computing_in_float64
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.locate import ModelLocation, locate_model
from llm_quest.techniques.model_spec import all_exportable
from llm_quest.techniques.score_head import ScoreHead

if TYPE_CHECKING:
    from pathlib import Path

NUM_INPUTS = 3
"""The error of one input is a poor estimate: a recurrence on random weights makes ten times as much on another."""
MARGIN = 3.0
"""Allowed difference, in units of the reference's own error."""
ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Least allowed difference, relative to the largest output: the reference may make no error by chance."""


@dataclass(frozen=True)
class Verification:
    """Differences of our outputs from transformers' (float32, CPU). difference_padded: None for images.
    reference_error: of transformers' float32 outputs from its float64 ones. allowed: three times that."""

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


def compare_with_transformers(name_or_path: str | Path, *, seed: int = 0) -> Verification:
    """Load a published folder here and in transformers; compare outputs on random inputs and ids on sample texts.

    Raises MissingError without transformers; UsageError for a run folder (export it first)."""
    location = locate_model(name_or_path)
    if location.run_dir is not None:
        raise UsageError(
            f"{name_or_path} is a run of ours, which transformers cannot read: export it, then verify the export"
        )
    if location.gguf_file is not None:
        raise UsageError(
            f"{name_or_path} is a GGUF file, which transformers does not compute from: export it as a folder "
            f"(quest export {name_or_path} FOLDER), then verify that"
        )
    transformers = import_transformers()
    ours = load(location.folder, dtype="float32", vision=True)
    refuse_unpublished_techniques(ours, str(name_or_path))
    kind = counterpart_of(ours)
    theirs, info = load_in_transformers(getattr(transformers, kind.auto_class), location.folder)
    several, theirs = [kind.inputs(ours, seed + number) for number in range(NUM_INPUTS)], theirs.eval()
    with torch.no_grad():
        references = [kind.theirs(theirs, inputs) for inputs in several]
        difference = max_difference([kind.ours(ours, inputs) for inputs in several], references)
        padded = None if kind.pad is None else max(difference_with_padding(kind, ours, theirs, one) for one in several)
        error = max_difference([reference.double() for reference in references], float64_outputs(kind, theirs, several))
    largest = max(float(reference.abs().max()) for reference in references)
    allowed = max(MARGIN * error, ROUNDING * largest)
    missing, unexpected = (unread_keys(info[key]) for key in ("missing_keys", "unexpected_keys"))
    tokenizer_result = compare_tokenizers(location, transformers)
    good = max(difference, padded or 0.0) <= allowed and not missing + unexpected
    passed = good and not tokenizer_result.startswith("DIFFERENT")
    return Verification(
        location.name, difference, padded, largest, error, allowed, missing, unexpected, tokenizer_result, passed
    )


def load_in_transformers(auto_class: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a folder in transformers: its model, and its report about keys. UsageError with its reason if it refuses the
    folder."""
    try:
        theirs, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # its checks have errors of many kinds
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UsageError(f"transformers cannot read {folder}, which loads here: {reason[0].strip()}") from error
    return theirs, info


def refuse_unpublished_techniques(model: Any, name: str) -> None:
    """Raise UsageError for a model that transformers does not compute."""
    if not all_exportable(technique for technique in model.spec.techniques if not isinstance(technique, ScoreHead)):
        names = ", ".join(type(technique).__name__ for technique in model.spec.techniques)
        raise UsageError(
            f"{name} was made with {names}, which transformers does not compute: there is no one to compare"
        )


def difference_with_padding(kind: Counterpart, ours: Any, theirs: Any, inputs: Inputs) -> float:
    """The largest difference of the compared outputs, with padding in the second row."""
    assert kind.pad is not None
    padded, counted = kind.pad(ours, inputs)
    return float((kind.ours(ours, padded) - kind.theirs(theirs, padded))[counted].abs().max())


def max_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((ours_one - other).abs().max()) for ours_one, other in zip(ours, theirs, strict=True))


def float64_outputs(kind: Counterpart, theirs: Any, several: Sequence[Inputs]) -> list[Tensor]:
    """transformers' outputs in float64; the model is changed, in place."""
    choose_experts = getattr(theirs, "set_experts_implementation", None)
    if choose_experts is not None:
        choose_experts("eager")  # the other forms know no float64
    theirs = theirs.double()
    double_inputs = [
        {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()} for inputs in several
    ]
    with computing_in_float64():  # else norms and softmax would still be computed in float32
        return [kind.theirs(theirs, inputs).double() for inputs in double_inputs]


def unread_keys(keys: Any) -> tuple[str, ...]:
    """Weights that transformers misses or does not expect. Left out: poolers, which neither side reads."""
    return tuple(sorted(key for key in map(str, keys) if ".pooler." not in f".{key}"))


def import_transformers() -> Any:
    transformers = import_extra("transformers", "verify compares with it: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def compare_tokenizers(location: ModelLocation, transformers: Any) -> str:
    """Compare the ids of the sample texts; the result in words."""
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
