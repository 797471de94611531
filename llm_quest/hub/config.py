"""Reads and builds the JSON files beside the weights: config.json in both generations, and generation_config.json."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_quest.contracts import Technique
from llm_quest.errors import DataError
from llm_quest.hub.known_fields import FieldTracker, refuse_unknown_fields
from llm_quest.hub.safetensors_io import parse_unique_json, refuse_lfs_pointer, regular_file_size
from llm_quest.models import FAMILIES, PART_FAMILIES, VISION_FAMILIES
from llm_quest.models.build import DTYPES
from llm_quest.models.config_fields import MAX_PLAUSIBLE_INT
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.models.family import Family
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.model_spec import all_exportable, techniques_to_json
from llm_quest.techniques.score_head import ScoreHead

OUR_MODEL_TYPE = "llm_quest"
MAX_CONFIG_BYTES = 16_000_000


def read_json(file: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a regular file of at most `limit` bytes; DataError otherwise."""
    size = regular_file_size(file)
    if size > limit:
        raise DataError(f"{file.name}: {size:,} bytes are too many for such a file (at most {limit:,})")
    refuse_lfs_pointer(file)
    try:
        return parse_unique_json(file.read_bytes())
    except DataError as error:
        raise DataError(f"{file.name}: {error}") from None


def family_for(hf_config: Mapping[str, Any]) -> Family:
    """The family that reads this config.json."""
    kind = hf_config.get("model_type")
    for family in (*FAMILIES, *VISION_FAMILIES):
        if family.matches(hf_config):
            return family
    known = [name for family in (*FAMILIES, *VISION_FAMILIES) for name in family.model_types]
    inside = next((part["model_type"] for part in sub_configs(hf_config) if part.get("model_type") in known), None)
    if inside is not None:
        raise DataError(
            f"config.json: model_type {kind!r} is a model of several parts, of which only {inside!r} can be read: save "
            "that part as a model of its own with transformers"
        )
    hint = nearest_family_hint(hf_config) or f"known: {', '.join(known)}"
    problem = "config.json has no 'model_type'" if kind is None else f"config.json: model_type {kind!r} is unknown here"
    raise DataError(f"{problem}; {hint}")


ANY_MODELS_FIELDS = re.compile(
    r"_.*|.*_token_id|model_type|architectures|(torch_)?dtype|transformers_version|use_cache|initializer_range|.*drop.*"
    r"|id2label|label2id|problem_type|return_dict|output_.*|is_(encoder_)?decoder|add_cross_attention|chunk_size_feed.*"
)
"""Fields of every config.json, without effect on what a model computes when it generates."""


def nearest_family_hint(hf_config: Mapping[str, Any]) -> str:
    """A hint that names the family with the most similar fields, and the fields that it lacks; empty if every family
    lacks more than it shares. The model_type is no measure: 'mamba' is spelled like 'llama'."""
    own = {name for name in hf_config if not ANY_MODELS_FIELDS.fullmatch(name)}
    fields = {family.model_type: set(family.publish(family.presets[0].config)) for family in FAMILIES}
    nearest = min(fields, key=lambda kind: (len(own - fields[kind]), len(fields[kind] - own)))
    unknown = sorted(own - fields[nearest])
    if len(own & fields[nearest]) <= len(unknown):
        return ""
    beyond = f" (which has no {', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''})" if unknown else ""
    return f"the nearest known is {nearest!r} by its fields{beyond}"


def sub_configs(hf_config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configs of the parts of a multi-part model. (Old CLIPs have a second spelling, which is read first.)"""
    parts = [hf_config.get(f"{name}_dict") or hf_config.get(name) for name in ("text_config", "vision_config")]
    return [part for part in parts if isinstance(part, Mapping)]


def list_unknown_fields(family: Family, hf_config: Mapping[str, Any], config: Any) -> list[str]:
    """Problems for unknown fields, of the model and of its parts."""
    unknown = refuse_unknown_fields(family, hf_config, config)
    for part in sub_configs(hf_config) if family in VISION_FAMILIES else []:
        inner = next((one for one in PART_FAMILIES if one.matches(part)), None)
        unknown += refuse_unknown_fields(inner, part) if inner is not None else []
    return unknown


def parse_hf_config(family: Family, hf_config: Mapping[str, Any]) -> tuple[Any | None, list[str]]:
    """Parse config.json: the family's Config, or None and every problem.

    After each error the field read last is replaced (a missing one by 1, a refused one dropped), then reading
    continues, unless the error is of a part, without which later errors mean nothing."""
    problems: list[str] = []
    fields, dropped, replaced = FieldTracker(hf_config), set[str](), set[str]()
    while True:
        try:
            config = family.read(fields)
            problems += [] if problems else list_unknown_fields(family, hf_config, config) + implausible_fields(config)
            return (None if problems else config), problems
        except DataError as error:
            if str(error) in problems:
                return None, problems
            if fields.last in replaced:
                return None, problems
            if fields.last in dropped:  # that it is missing now is our doing
                replaced.add(fields.last)
                fields[fields.last] = 1
                continue
            problems.append(str(error))
            if fields.last.endswith("_config"):
                return None, problems
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            return None, [*problems, f"config.json: near {fields.last!r}: {error}"]
        if fields.pop(fields.last, None) is None:
            fields[fields.last] = 1
        else:
            dropped.add(fields.last)


MAY_BE_ZERO = (
    "num_labels",
    "projection_dim",
    "num_nextn_predict_layers",
    "first_k_dense_replace",
    "n_shared_experts",
    "intermediate_size",
)


def implausible_fields(config: Any) -> list[str]:
    """Problems for sizes that are no positive whole numbers (some may be 0), and numbers that are not finite."""
    implausible = []
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        kind = kind.removesuffix(" | None") if isinstance(kind, str) and value is not None else kind
        least = 0 if field.name in MAY_BE_ZERO else 1
        if kind in ("int", int) and (type(value) is not int or not least <= value <= MAX_PLAUSIBLE_INT):
            implausible.append(f"config.json: {field.name} is {value!r}; a positive whole number was expected")
        elif kind in ("float", float) and (type(value) not in (int, float) or not math.isfinite(value) or value < 0):
            implausible.append(f"config.json: {field.name} is {value!r}; a finite number was expected")
        elif kind in ("bool", bool) and type(value) is not bool:
            implausible.append(f"config.json: {field.name} is {value!r}; true or false was expected")
    return implausible


def config_dtype(hf_config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names, as `dtype` (new) or `torch_dtype` (old); None if it names none."""
    name = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return DTYPES.get(str(name).removeprefix("torch."))


def build_config_json(
    model: Decoder, family: Family, generation_config: GenerationConfig | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Build config.json: every field explicit, with old and new spelling."""
    name = str(dtype).removeprefix("torch.")
    ids = {} if generation_config is None else special_token_ids(generation_config)
    return family.publish(model.config) | {"dtype": name, "torch_dtype": name} | ids


def add_techniques(config: dict[str, Any], techniques: Sequence[Technique]) -> dict[str, Any]:
    """Add the model's techniques to config.json. If the published part alone is not the model, it is nested under a
    model_type of our own, so that no other reader loads it as the whole."""
    if not techniques:
        return config
    extra: dict[str, Any] = {"techniques": techniques_to_json(techniques, TECHNIQUES)}
    if all_exportable(techniques):
        return config | {OUR_MODEL_TYPE: extra}
    if classifier := classifier_config(config, techniques):
        return config | classifier | {OUR_MODEL_TYPE: extra}
    return {
        "architectures": [],
        "model_type": OUR_MODEL_TYPE,
        "dtype": config["dtype"],
        OUR_MODEL_TYPE: extra | {"base": config},
    }


def classifier_config(config: Mapping[str, Any], techniques: Sequence[Technique]) -> dict[str, Any]:
    """The fields of transformers' ForSequenceClassification, if a score head is the only change; else empty."""
    heads = [technique for technique in techniques if isinstance(technique, ScoreHead)]
    if not heads:
        return {}
    architecture = family_for(config).classifier(config["model_type"])
    if (
        architecture is None
        or len(heads) != 1
        or heads[0].readout != "last_token"
        or not all_exportable([technique for technique in techniques if technique is not heads[0]])
    ):
        return {}
    names = heads[0].labels or tuple(f"LABEL_{i}" for i in range(heads[0].outputs))
    label_maps = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    kind = {"problem_type": heads[0].problem_type} if heads[0].outputs > 1 else {}
    return {"architectures": [architecture], "num_labels": heads[0].outputs, **label_maps, **kind}


def split_techniques(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The inverse of `add_techniques`: the published config, and the techniques still as JSON."""
    extra = config.get(OUR_MODEL_TYPE) or {}
    base = extra.get("base") if isinstance(extra, Mapping) else None
    if config.get("model_type") == OUR_MODEL_TYPE and not isinstance(base, Mapping):
        raise DataError(
            f"config.json: model_type is {OUR_MODEL_TYPE!r}, but there is no {OUR_MODEL_TYPE}.base to say what was "
            "edited"
        )
    techniques = extra.get("techniques") or [] if isinstance(extra, Mapping) else None
    if not isinstance(techniques, list) or not all(isinstance(technique, Mapping) for technique in techniques):
        raise DataError(f"config.json: {OUR_MODEL_TYPE}.techniques is no list of techniques")
    whole = dict(base) if isinstance(base, Mapping) else dict(config)
    whole.pop(OUR_MODEL_TYPE, None)
    return whole, techniques


def parse_generation_config(hf_config: Mapping[str, Any], generation_json: Mapping[str, Any]) -> GenerationConfig:
    """Parse a GenerationConfig from config.json and generation_config.json, which takes precedence."""
    ids = {
        name: generation_json.get(name, hf_config.get(name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    eos = ids["eos_token_id"]
    sampling = {name: generation_json.get(name) for name in SAMPLING_FIELDS}
    for name, value in [*ids.items(), *sampling.items()]:
        values = value if name == "eos_token_id" and isinstance(value, list) else [value]
        allowed = (int, *(() if value is eos and isinstance(eos, list) else (type(None),)))
        allowed = allowed if name in ids else (bool, int, float, type(None))
        if not all(type(v) in allowed for v in values):
            raise DataError(
                f"config.json or generation_config.json: {name} is {value!r}, which is no number of that kind"
            )
    for name, (least, most) in SAMPLING_RANGES.items():
        value = sampling[name]
        if value is not None and not least <= value <= most:
            raise DataError(
                f"generation_config.json: {name} is {value!r}; a number from {least} to {most} was expected"
                if most < math.inf
                else f"generation_config.json: {name} is {value!r}; a number of at least {least} was expected"
            )
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return GenerationConfig(ids["bos_token_id"], ends, ids["pad_token_id"], **sampling)


def build_generation_json(generation_config: GenerationConfig) -> dict[str, Any]:
    """Build generation_config.json."""
    sampling = {name: getattr(generation_config, name) for name in SAMPLING_FIELDS}
    return special_token_ids(generation_config) | {name: value for name, value in sampling.items() if value is not None}


def special_token_ids(generation_config: GenerationConfig) -> dict[str, Any]:
    eos = (
        generation_config.eos_token_ids[0]
        if len(generation_config.eos_token_ids) == 1
        else list(generation_config.eos_token_ids) or None
    )
    return {
        "bos_token_id": generation_config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": generation_config.pad_token_id,
    }


SAMPLING_FIELDS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
SAMPLING_RANGES = {
    "temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1), "min_p": (0, 1),
    "repetition_penalty": (0, math.inf), "max_new_tokens": (1, math.inf),
}  # fmt: skip
"""Least and most of the numbers among them."""
