"""Builds a model's config from settings: a preset, or a family and the fields of its Config.

Fields that can be derived need not be given: `vocab_size` is the tokenizer's, `num_key_value_heads` are as many as
`num_attention_heads`, `head_dim` is hidden_size / num_attention_heads, `max_position_embeddings` is the length of the
training rows, `tie_word_embeddings` is true. Rotary settings are given as config.json spells them: `rotary:
{rope_theta: 500000, rope_type: llama3, factor: 8, ...}`. A part of a config (Qwen3's `moe`, Qwen3-Next's `delta_net`)
is a group of keys; a pattern of layers (`layer_types`) is a list, by default the family's own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ValidationError

from llm_quest.errors import UsageError
from llm_quest.hub.config import MAY_BE_ZERO
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, family_of, preset
from llm_quest.models.config_fields import default_per_layer, field_values, nested_config, per_layer_kinds
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.models.family import Family
from llm_quest.models.rope_config import ROPE_KEYS, read_rotary
from llm_quest.recipes.config import config_error, nested_schema
from llm_quest.recipes.config_schema import ModelConfig
from llm_quest.recipes.model_config_types import describe_expected, describe_type_error, missing_inside
from llm_quest.recipes.schema import StrictModel, did_you_mean
from llm_quest.recipes.yaml_io import ConfigProblem, RawConfig
from llm_quest.train.rng_state import derive_seed

if TYPE_CHECKING:
    from llm_quest.data.tokenizer import Tokenizer

ConfigValues = Mapping[str, Any]

DERIVED_DEFAULTS: dict[str, Callable[[ConfigValues], Any]] = {
    "num_key_value_heads": lambda sizes: sizes["num_attention_heads"],
    "head_dim": lambda sizes: sizes["hidden_size"] // sizes["num_attention_heads"],
    "tie_word_embeddings": lambda sizes: True,
    "rotary": lambda sizes: {},
    "swa_rotary": lambda sizes: {},
}


def build_model_config(config: ModelConfig, settings: RawConfig, *, vocab: int, context: int) -> Any:
    """Build the config of a model; UsageError with every mistake. vocab: the tokenizer's; context: the length of a
    row."""
    plan = resolve_sizes(config, settings, vocab, context)
    if mistakes := list(find_size_problems(plan, settings)):
        raise config_error(mistakes)
    return make_config(plan)


def make_config(plan: ModelSizes) -> Any:
    """Make the Config of these sizes; ValueError for what the family refuses."""
    rotary = {key: build_rotary(key, plan.sizes, plan.base) for key in rotary_fields(plan.family)}
    return plan.family.Config(**{**convert_values(plan), **rotary})


WARMUP_CONTEXT = 128
"""Positions of a model that a policy recipe warms up."""


def model_config_problems(schema: type[StrictModel], settings: RawConfig) -> list[ConfigProblem]:
    """The problems of `model.config` of a model that is to be built. Its tokenizer does not exist yet: a vocabulary of
    512 is assumed."""
    field = schema.model_fields.get("model")
    part = None if field is None else nested_schema(field.annotation)
    if part is None or not issubclass(part, ModelConfig) or settings.problems:
        return []
    rows = schema.model_fields.get("sequence_length")
    given = settings.tree.get("sequence_length", rows.default) if rows is not None else WARMUP_CONTEXT
    context = given if type(given) is int else WARMUP_CONTEXT
    try:
        chosen = ModelConfig.model_validate(settings.tree.get("model"))
        if chosen.load is not None:
            return []
        return list(find_size_problems(resolve_sizes(chosen, settings, 512, context), settings))
    except ValidationError:  # reported by the schema
        return []
    except ModelConfigError as error:
        return [error.problem]


class ModelConfigError(UsageError):
    """One mistake after which nothing that depends on it can be checked."""

    def __init__(self, problem: ConfigProblem):
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class ModelSizes:
    """A family and the sizes of a model of it. base: the preset's config they change; own: what was given."""

    family: Family
    base: Any
    own: ConfigValues
    sizes: ConfigValues


def resolve_sizes(part: ModelConfig, settings: RawConfig, vocab: int, context: int) -> ModelSizes:
    """Resolve the family and its sizes, derived ones included. A family without sizes takes those of its `-tiny`
    preset."""
    if part.preset is not None:
        try:
            base = preset(part.preset).config
        except UsageError as error:
            raise ModelConfigError(
                ConfigProblem(settings.location(("model", "preset")), "model.preset", str(error))
            ) from None
        family = find_family(family_of(base).name, settings, ("model", "preset"))
        sizes = {**field_values(base), **recompute_derived(base, part.config), **part.config, "vocab_size": vocab}
        if sizes["num_hidden_layers"] != base.num_hidden_layers:
            follow = per_layer_kinds(family.Config).keys() - part.config.keys()
            sizes = {key: value for key, value in sizes.items() if key not in follow}
        return ModelSizes(family, base, part.config, {**sizes, **derive_patterns(family, sizes)})
    family = find_family(part.family or "", settings)
    if not part.config:
        base = next(one.config for one in family.presets if one.name.endswith("-tiny"))
        return ModelSizes(
            family, base, {}, {**field_values(base), "vocab_size": vocab, "max_position_embeddings": context}
        )
    sizes = {"vocab_size": vocab, "max_position_embeddings": context, **part.config}
    for key, derive in DERIVED_DEFAULTS.items():
        if key in config_fields(family) and key not in sizes:
            with suppress(KeyError, TypeError, ZeroDivisionError):  # what it is derived from is missing or wrong
                sizes[key] = derive(sizes)
    return ModelSizes(family, None, part.config, {**sizes, **derive_patterns(family, sizes)})


def derive_patterns(family: Family, sizes: ConfigValues) -> ConfigValues:
    """The family's own pattern of layers, if none is given; empty for an implausible number of layers."""
    layers = sizes.get("num_hidden_layers")
    if type(layers) is not int or layers > LARGEST_SIZES["num_hidden_layers"]:
        return {}
    return default_per_layer(family.Config, sizes)


def find_size_problems(plan: ModelSizes, settings: RawConfig) -> Iterator[ConfigProblem]:
    """Find every number that is unknown, missing, of the wrong type or inconsistent with another."""
    wrong = dict(check_config_keys(plan))
    problems = [*wrong.items(), *(pair for pair in check_relations(plan) if pair[0] not in wrong)]
    reported = {key for key, _ in problems}
    for key in rotary_fields(plan.family):
        if isinstance(plan.sizes.get(key), dict) and not reported & {
            key,
            "head_dim",
            "qk_rope_head_dim",
            "max_position_embeddings",
        }:
            problems += [(key, what) for what in check_rotary(key, plan)]
    for key, what in problems or check_config(plan):
        yield ConfigProblem(settings.location(("model", "config", key)), f"model.config.{key}", what)


def check_config(plan: ModelSizes) -> list[tuple[str, str]]:
    """The error of the family's own class for sizes that are valid by themselves, with the field that it names
    first, or what of them config.json cannot hold."""
    try:
        return list(check_saved(plan, make_config(plan)))
    except ValueError as error:
        named = [word for word in re.findall(r"\w+", str(error)) if word in plan.sizes]
        return [(named[0] if named else "num_hidden_layers", str(error))]


def check_saved(plan: ModelSizes, config: Any) -> Iterator[tuple[str, str]]:
    """Find what was given and config.json cannot hold: the trained model would be saved, and read as another."""
    published = json.loads(json.dumps(plan.family.publish(config)))
    saved = plan.family.read(published)
    for key in [key for key in plan.own if key not in rotary_fields(plan.family)]:
        if (given := getattr(config, key)) != (read := getattr(saved, key)):
            place = f"config.json of model_type {published['model_type']} has no place for it"
            yield key, f"{given!r} cannot be saved: {place}, and is read with {read!r}"


def recompute_derived(base: Any, changed: ConfigValues) -> dict[str, Any]:
    """Recompute the derived numbers of a preset, such as head_dim from hidden_size."""
    before = field_values(base)
    after = {**before, **changed}
    derived = {}
    for key, derive in DERIVED_DEFAULTS.items():
        if key in before:
            with suppress(KeyError, TypeError, ZeroDivisionError):  # what it is derived from is wrong
                if before[key] == derive(before):
                    derived[key] = derive(after)
    return derived


def find_family(name: str, settings: RawConfig, key: tuple[str, str] = ("model", "family")) -> Family:
    """The family of that name. key: the one that names it."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = [family.name for family in FAMILIES]
    what = f"no family is called {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
    if image_recipe := IMAGE_RECIPES.get(name):
        what = f"{name} reads images: quest train {image_recipe} trains it, and this recipe {', '.join(known)}"
    raise ModelConfigError(ConfigProblem(settings.location(key), ".".join(key), what))


IMAGE_RECIPES = {"vit": "vit", "clip": "vlm", "vision_language": "vlm"}
"""The recipe of each family that reads images."""


def init_model(
    config: ModelConfig,
    settings: RawConfig,
    tokenizer: Tokenizer,
    *,
    context: int,
    seed: int,
    seed_per_module: bool = False,
) -> Decoder:
    """A model of the recipe's config with random weights. context: the length of a row."""
    numbers: Any = build_model_config(config, settings, vocab=tokenizer.vocab_size, context=context)
    model = build(numbers, seed=derive_seed(seed, "init"), seed_per_module=seed_per_module)
    model.generation_config = make_generation_config(tokenizer)
    return model


def make_generation_config(tokenizer: Tokenizer) -> GenerationConfig:
    """The tokens that begin, end and pad a text, as the tokenizer has them."""
    return GenerationConfig(tokenizer.bos_token_id, tuple(tokenizer.eos_token_ids), tokenizer.pad_token_id)


def check_config_keys(plan: ModelSizes) -> Iterator[tuple[str, str]]:
    """Find every number that is unknown, missing or of the wrong type."""
    family, fields = plan.family, config_fields(plan.family)
    for key, value in plan.own.items():
        if key == "vocab_size":
            yield key, "the tokenizer decides it; set tokenizer.vocab_size"
        elif key not in fields:
            yield key, f"unknown number{did_you_mean(key, list(fields))}; {family.name} has: {', '.join(fields)}"
        elif wrong := describe_type_error(value, fields[key], least=0 if key in MAY_BE_ZERO else 1):
            yield key, wrong
        elif (number := largest_number(value)) > (most := LARGEST_SIZES.get(key, LARGEST_SIZE)):
            yield key, f"{number:,} is more than {most:,}, the most that is plausible"
        elif missing := missing_inside(value, fields[key], None if plan.base is None else getattr(plan.base, key)):
            yield key, f"missing in it: {', '.join(missing)}"
    if plan.base is None:
        given = {*plan.sizes, *DERIVED_DEFAULTS, "vocab_size", "max_position_embeddings"}
        for key in [field.name for field in dataclasses.fields(family.Config) if field.default is dataclasses.MISSING]:
            if key not in given:
                yield key, f"missing; {family.name} needs {describe_expected(fields[key])}"


LARGEST_SIZE = 2**22
LARGEST_SIZES = {"num_hidden_layers": 1024, "max_position_embeddings": 2**30}
"""Sizes above these are typing mistakes; the largest published model has 126 layers of width 16,384."""


def largest_number(value: Any) -> int:
    """The largest whole number in a value or in the lists and groups that it holds."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return max(map(largest_number, value), default=0)
    return value if type(value) is int else 0


DIVIDED_IN_TRANSFORMERS = ("llama", "gemma", "deepseek_v2")
"""Families whose config in transformers refuses a hidden_size that is no multiple of num_attention_heads, although
head_dim is a number of its own."""


def check_relations(plan: ModelSizes) -> Iterator[tuple[str, str]]:
    """Find numbers that are inconsistent with each other."""
    sizes = {key: value for key, value in plan.sizes.items() if type(value) is int and value > 0}
    for key in ("num_key_value_heads", "swa_num_key_value_heads"):
        if {"num_attention_heads", key} <= sizes.keys() and sizes["num_attention_heads"] % sizes[key]:
            yield key, f"num_attention_heads {sizes['num_attention_heads']} must be a multiple of {key} {sizes[key]}"
    for key, kinds in per_layer_kinds(plan.family.Config).items():
        given = plan.sizes.get(key)
        if isinstance(given, list | tuple) and len(given) != sizes.get("num_hidden_layers", len(given)):
            needed = f"needs one entry for each of the {sizes['num_hidden_layers']} layers and has {len(given)}"
            yield key, f"{needed}; leave it out for the family's own pattern"
        elif isinstance(given, list | tuple) and (unknown := [one for one in given if one not in kinds]):
            yield key, f"{unknown[0]!r:.60} is no kind of layer; known: {', '.join(map(str, kinds))}"
    free = {"head_dim", "qk_nope_head_dim"} & set(config_fields(plan.family))
    divided = plan.family.name in DIVIDED_IN_TRANSFORMERS
    if (
        (divided or not free)
        and {"hidden_size", "num_attention_heads"} <= sizes.keys()
        and sizes["hidden_size"] % sizes["num_attention_heads"]
    ):
        yield (
            "hidden_size",
            f"hidden_size {sizes['hidden_size']} must be a multiple of num_attention_heads "
            f"{sizes['num_attention_heads']}{', or transformers refuses the export' if divided else ''}",
        )
    for key in ("head_dim", "qk_rope_head_dim"):
        if sizes.get(key, 2) % 2:
            yield key, f"{key} {sizes[key]} must be even: rotary positions turn pairs"


def config_fields(family: Family) -> dict[str, Any]:
    """The fields of a family's Config and their types."""
    hints = get_type_hints(family.Config)
    return {field.name: hints[field.name] for field in dataclasses.fields(family.Config)}


def convert_values(plan: ModelSizes) -> dict[str, Any]:
    """Convert lists to tuples, and groups of keys to nested configs."""
    kinds, fitted = config_fields(plan.family), dict(plan.sizes)
    for key, value in plan.sizes.items():
        part = nested_config(kinds[key])
        if isinstance(value, list):
            fitted[key] = tuple(value)
        elif part is not None and isinstance(value, dict):
            inside = {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
            before = None if plan.base is None else getattr(plan.base, key)
            fitted[key] = part(**{**({} if before is None else field_values(before)), **inside})
    return fitted


def rotary_fields(family: Family) -> list[str]:
    """The fields that hold rotary positions."""
    return [key for key, kind in config_fields(family).items() if kind is RotaryEmbedding]


def check_rotary(key: str, plan: ModelSizes) -> list[str]:
    """The problems of rotary settings."""
    given = plan.sizes[key]
    unknown = [name for name in given if name not in ROPE_KEYS]
    if unknown:
        return [
            f"unknown key {name!r}{did_you_mean(name, ROPE_KEYS)}; known: {', '.join(ROPE_KEYS)}" for name in unknown
        ]
    try:
        build_rotary(key, plan.sizes, plan.base)
    except KeyError:  # a number it follows from is missing, and reported
        return []
    except (TypeError, ValueError) as error:
        return [str(error).removeprefix("config.json: ")]
    return []


def build_rotary(key: str, sizes: ConfigValues, base: Any) -> RotaryEmbedding:
    """Build the rotary positions of a field, from config.json's spelling or the preset."""
    given = sizes[key]
    before: RotaryEmbedding | None = None if base is None else getattr(base, key)
    if isinstance(given, RotaryEmbedding):
        return dataclasses.replace(given, dim=derived_rotary_dim(sizes, {}, before, base))
    width = derived_rotary_dim(sizes, given, before, base)
    read = read_rotary({"rope_parameters": given, "max_position_embeddings": sizes["max_position_embeddings"]}, width)
    return dataclasses.replace(read, interleaved=before is not None and before.interleaved)


def derived_rotary_dim(sizes: ConfigValues, given: ConfigValues, before: RotaryEmbedding | None, base: Any) -> int:
    """The rotated dimensions of a head: as given, else the same part as in the preset, else all."""
    if "qk_rope_head_dim" in sizes:
        return int(sizes["qk_rope_head_dim"])
    if "partial_rotary_factor" in given or before is None:
        return int(sizes["head_dim"] * given.get("partial_rotary_factor", 1.0))
    return max(2, before.dim * sizes["head_dim"] // base.head_dim // 2 * 2)
