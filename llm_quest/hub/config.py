"""The JSON beside the weights: config.json in both generations, generation_config.json, and our own model.json."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_quest.contracts import Technique
from llm_quest.errors import DataError
from llm_quest.hub.tensors import parse_json, regular_size
from llm_quest.models import PAGES, VISION_PAGES
from llm_quest.models.build import DTYPES
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.models.page import Page
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.card import is_published, written
from llm_quest.techniques.score_head import ScoreHead

LARGEST = 2**24
OURS = "llm_quest"
SCORED = {
    f"{family}ForCausalLM": f"{family}ForSequenceClassification"
    for family in ("Llama", "Mixtral", "Qwen3", "DeepseekV3")
} | {"GPT2LMHeadModel": "GPT2ForSequenceClassification", "Gemma3ForCausalLM": "Gemma3TextForSequenceClassification"}
"""transformers' classes with a score head, by the class with a head of tokens."""


def read_json(file: Path, limit: int = 16_000_000) -> dict[str, Any]:
    """A JSON object from a regular file of at most `limit` bytes; DataError otherwise."""
    size = regular_size(file)
    if size > limit:
        raise DataError(f"{file.name}: {size:,} bytes are too many for such a file (at most {limit:,})")
    try:
        return parse_json(file.read_bytes())
    except DataError as error:
        raise DataError(f"{file.name}: {error}") from None


def page_for(published: Mapping[str, Any]) -> Page:
    """The page that reads this config.json."""
    kind = published.get("model_type")
    for page in (*PAGES, *VISION_PAGES):
        if page.reads(published):
            return page
    known = [name for page in (*PAGES, *VISION_PAGES) for name in (page.model_type, *page.also)]
    near = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.3)
    parts = [
        part for part in (published.get("text_config"), published.get("vision_config")) if isinstance(part, Mapping)
    ]
    inside = next((part["model_type"] for part in parts if part.get("model_type") in known), None)
    if inside is not None:
        raise DataError(
            f"config.json: model_type {kind!r} is a model of several parts, of which only {inside!r} can be read: save "
            "that part as a model of its own with transformers"
        )
    hint = f"the nearest known is {near[0]!r}" if near else f"known: {', '.join(known)}"
    said = "config.json has no 'model_type'" if kind is None else f"config.json: model_type {kind!r} is unknown here"
    raise DataError(f"{said}; {hint}")


class Watched(dict[str, Any]):
    """Remembers which field was asked for last, so that every missing field can be found, not only the first
    (`model_type` is only asked for by the complaint itself)."""

    last = ""

    def get(self, field: str, default: Any = None) -> Any:
        self.last = self.last if field == "model_type" else field
        return super().get(field, default)


def read_config(page: Page, published: Mapping[str, Any]) -> tuple[Any | None, list[str]]:
    """The page's Config, or None and everything that is wrong with config.json.

    After each complaint the field asked for last is mended (a missing one set to 1, a refused one dropped), then
    reading goes on."""
    problems = list(refusals(published))
    fields = Watched(published)
    while True:
        try:
            config = page.read(fields)
            return (None if problems else config), problems + ([] if problems else implausible(config))
        except DataError as error:
            if str(error) in problems:
                return None, problems
            problems.append(str(error))
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            return None, [*problems, f"config.json: near {fields.last!r}: {error}"]
        if fields.pop(fields.last, None) is None:
            fields[fields.last] = 1


def refusals(published: Mapping[str, Any]) -> list[str]:
    """What no page can read: quantised weights, and numbers nobody could mean."""
    found = []
    if published.get("quantization_config"):
        method = published["quantization_config"]
        method = method.get("quant_method", "an unnamed method") if isinstance(method, dict) else method
        found.append(
            f"config.json: the weights are quantised by {method}, only plain floats are read: take files in "
            "bfloat16, or have them written so first"
        )
    for name, value in published.items():
        if type(value) is int and abs(value) > LARGEST and "theta" not in name:
            found.append(f"config.json: {name} is {value:,}, which is no plausible size")
    return found


MAY_BE_NONE = ("lookahead", "dense", "shared")


def implausible(config: Any) -> list[str]:
    """Sizes must be positive whole numbers (of some parts there may be none), the rest finite."""
    found = []
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        least = 0 if field.name in MAY_BE_NONE else 1
        if kind in ("int", int) and (type(value) is not int or not least <= value <= LARGEST):
            found.append(f"config.json: {field.name} is {value!r}; a positive whole number was expected")
        elif kind in ("float", float) and (type(value) not in (int, float) or not math.isfinite(value) or value < 0):
            found.append(f"config.json: {field.name} is {value!r}; a finite number was expected")
        elif kind in ("bool", bool) and type(value) is not bool:
            found.append(f"config.json: {field.name} is {value!r}; true or false was expected")
    return found


def stored_dtype(published: Mapping[str, Any]) -> torch.dtype | None:
    """`dtype` (new) or `torch_dtype` (old)."""
    name = published.get("dtype") or published.get("torch_dtype")
    return DTYPES.get(str(name).removeprefix("torch."))


def write_config(
    model: Decoder, page: Page, generation: GenerationDefaults | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What config.json shall say: everything explicit, old and new spelling side by side."""
    name = str(dtype).removeprefix("torch.")
    ids = {} if generation is None else write_ids(generation)
    head = {"architectures": [page.architecture], "model_type": page.model_type, "dtype": name, "torch_dtype": name}
    return head | page.publish(model.config) | ids


def carded(config: dict[str, Any], techniques: Sequence[Technique]) -> dict[str, Any]:
    """config.json with the model's techniques. Where the published part alone is not the model, it is wrapped up whole
    under a model_type that nobody else computes, so that no other reader takes the part for the whole."""
    if not techniques:
        return config
    card: dict[str, Any] = {"techniques": written(techniques, TECHNIQUES)}
    if is_published(techniques):
        return config | {OURS: card}
    if scored := as_classifier(config, techniques):
        return config | scored | {OURS: card}
    return {"architectures": [], "model_type": OURS, "dtype": config["dtype"], OURS: card | {"base": config}}


def as_classifier(config: Mapping[str, Any], techniques: Sequence[Technique]) -> dict[str, Any]:
    """What transformers' ForSequenceClassification reads, where a score head is all that was changed; else nothing."""
    heads = [one for one in techniques if isinstance(one, ScoreHead)]
    known = SCORED.get(config["architectures"][0])
    if known is None or len(heads) != 1 or not is_published([one for one in techniques if one is not heads[0]]):
        return {}
    names = heads[0].labels or tuple(f"LABEL_{i}" for i in range(heads[0].outputs))
    told = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return {"architectures": [known], "num_labels": heads[0].outputs, **told}


def uncarded(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The inverse: the published config, and the techniques still as JSON."""
    card = config.get(OURS) or {}
    base = card.get("base") if isinstance(card, Mapping) else None
    if config.get("model_type") == OURS and not isinstance(base, Mapping):
        raise DataError(f"config.json: model_type is {OURS!r}, but there is no {OURS}.base to say what was edited")
    listed = card.get("techniques") or [] if isinstance(card, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
        raise DataError(f"config.json: {OURS}.techniques is no list of techniques")
    whole = dict(base) if isinstance(base, Mapping) else dict(config)
    whole.pop(OURS, None)
    return whole, listed


def read_generation(published: Mapping[str, Any], advice: Mapping[str, Any]) -> GenerationDefaults:
    """From config.json and generation_config.json; the latter wins."""
    ids = {name: advice.get(name, published.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    eos = ids["eos_token_id"]
    sampling = {name: advice.get(name) for name in SAMPLING}
    for name, value in [*ids.items(), *sampling.items()]:
        values = value if name == "eos_token_id" and isinstance(value, list) else [value]
        allowed = (int, type(None)) if name in ids else (bool, int, float, type(None))
        if not all(type(v) in allowed for v in values):
            raise DataError(
                f"config.json or generation_config.json: {name} is {value!r}, which is no number of that kind"
            )
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return GenerationDefaults(ids["bos_token_id"], ends, ids["pad_token_id"], **sampling)


def write_generation(generation: GenerationDefaults) -> dict[str, Any]:
    """What generation_config.json shall say."""
    sampling = {name: getattr(generation, name) for name in SAMPLING}
    return write_ids(generation) | {name: value for name, value in sampling.items() if value is not None}


def write_ids(generation: GenerationDefaults) -> dict[str, Any]:
    eos = generation.eos[0] if len(generation.eos) == 1 else list(generation.eos) or None
    return {"bos_token_id": generation.bos, "eos_token_id": eos, "pad_token_id": generation.pad}


SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
