"""Parses settings into a recipe's typed config: all mistakes are reported at once, each with its place and the nearest
known name.

A recipe's config is a tree of frozen pydantic models that refuse unknown keys. `load_raw_config` reads a recipe's name
or a file and `key=value` pairs, `parse_config` types them; `config_to_yaml` writes a config that both read back, so a
run folder's config.yaml is itself a recipe.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path as File
from typing import Annotated, Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from llm_quest.data.sources import absolute_source
from llm_quest.errors import UsageError
from llm_quest.recipes import RECIPES
from llm_quest.recipes.dependent_defaults import (
    override_paths,
    replace_data,
    replace_model,
    replace_task,
    replace_toy_settings,
)
from llm_quest.recipes.old_keys import OLD_VALUES, new_key, rename_old_keys
from llm_quest.recipes.schema import ConfigT, StrictModel, describe_field, did_you_mean, short_repr, suggest_choice
from llm_quest.recipes.yaml_io import (
    ConfigProblem,
    KeyPath,
    RawConfig,
    apply_overrides,
    dump_yaml,
    flatten_tree,
    read_yaml_file,
)

RECIPES_DIR = File(__file__).parent


def parse_sources(entry: type[ConfigT], given: Any) -> str | tuple[ConfigT, ...]:
    """Parse the sources of data: a name, or a list of names and groups of keys. Files get their absolute path. entry:
    the schema of a group. ValueError in words for anything else."""
    if isinstance(given, str) and given:
        return given if given.partition(":")[0] == "builtin" else absolute_source(given)
    if isinstance(given, list | tuple) and given:
        return tuple(parse_source_entry(entry, one) for one in given)
    raise ValueError(
        f"{given!r:.60} is no source: name a file, a folder, hf:DATASET or FILE.py:FUNCTION, or write a list "
        "[{path: a.jsonl, weight: 2}, b.jsonl]"
    )


def hold_nothing_out(given: Any) -> Any:
    """Set held_out to 0 in a group of data that has `validation`. ValueError for a held-out part beside it."""
    if not isinstance(given, dict) or given.get("validation") is None:
        return given
    if given.get("held_out"):
        raise ValueError(
            f"held_out={given['held_out']} has no effect beside validation, which is evaluated on: leave one out"
        )
    return {**given, "held_out": 0.0}


def parse_source_entry(entry: type[ConfigT], given: Any) -> ConfigT:
    try:
        return entry.model_validate({"path": given} if isinstance(given, str) else given)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        fault = error.errors()[0]["msg"] if key in entry.model_fields else "unknown key"
        raise ValueError(f"{key}: {fault}; a source has the keys {', '.join(entry.model_fields)}") from None


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in RECIPES_DIR.glob("*.yaml"))


def find_recipe_file(recipe: str) -> File:
    """The file of a recipe: a path, a run folder (its config.yaml), or a name from the package."""
    given = File(recipe)
    if given.suffix in (".yaml", ".yml") or given.is_file():
        if not given.exists():
            raise UsageError(
                f"there is no file {recipe}; recipes that come with the package: {', '.join(recipe_names())}"
            )
        return given
    if recipe in recipe_names():
        return RECIPES_DIR / f"{recipe}.yaml"
    if (given / "config.yaml").is_file():
        return given / "config.yaml"
    from llm_quest.recipes.other_names import method_command

    if (command := method_command(recipe.lower())) is not None:
        raise UsageError(f"no recipe is called {recipe!r}; that method is quest train {command}")
    near = did_you_mean(recipe, recipe_names())
    raise UsageError(
        f"no recipe is called {recipe!r}{near}; known: {', '.join(recipe_names())}, or give a YAML file or a run folder"
    )


def load_raw_config(recipe: str, overrides: Sequence[str] = ()) -> RawConfig:
    """Read the settings of a recipe, with the pairs on top; mistakes are collected in `problems`, not raised."""
    if recipe in RECIPES and recipe not in recipe_names():
        settings = RawConfig({"recipe": recipe}, recipe)  # a recipe without a file runs with its schema's defaults
    else:
        settings = read_yaml_file(find_recipe_file(recipe))
    own = settings.tree.get("model")
    own_family = own.get("family") if isinstance(own, dict) else None
    if overrides:
        apply_overrides(settings, overrides)
        replace_model(settings, override_paths(overrides), own_family)
        replace_data(settings, override_paths(overrides))
        replace_task(settings, override_paths(overrides))
        if recipe in RECIPES:  # a user's own file is taken as it is
            replace_toy_settings(settings, override_paths(overrides))
    return settings


def load_run_config(run: File) -> RawConfig:
    """Read the settings of a run from its folder; those of an earlier version under the present keys."""
    settings = read_yaml_file(run / "config.yaml")
    settings.tree = rename_old_keys(settings.tree)
    return settings


BEFORE_THE_KEY: dict[str, Any] = {"few_row_kernel": {}, "training_kernels": False}
"""Key -> its value in a run from before the key existed, where the default would be another."""


def parse_recorded_config(schema: type[ConfigT], settings: RawConfig) -> ConfigT:
    """The config of a run that is resumed."""
    for key, value in BEFORE_THE_KEY.items():
        if key in schema.model_fields:
            settings.tree.setdefault(key, value)
    return parse_config(schema, settings)


def parse_config(schema: type[ConfigT], settings: RawConfig, more: Sequence[ConfigProblem] = ()) -> ConfigT:
    """The typed config; UsageError with one line per mistake. more: mistakes that the schema cannot find."""
    if settings.problems:
        raise config_error(settings.problems)
    problems = list(find_implausible_numbers(schema, settings))
    implausible = {problem.key for problem in problems}
    try:
        config = schema.model_validate(settings.tree)
    except ValidationError as error:
        refuse_earlier_version(error, settings)
        all_problems = [*explain_validation_error(error, schema, settings), *more]
        raise config_error(
            [*problems, *(problem for problem in all_problems if problem.key not in implausible)]
        ) from None
    if problems := [*problems, *(one for one in more if one.key not in implausible)]:
        raise config_error(problems)
    return config


LARGEST_NUMBER = 10**9
LARGEST = {
    "seed": 2**63 - 1,
    "max_steps": 10**12,
    "threads": 4 * max(16, os.cpu_count() or 1),
    "batch_size": 2**20,
    "micro_batch_size": 2**20,
}
LARGEST |= {"num_generations": 2**16, "sequence_length": 2**27, "prompts_per_rollout": 2**20, "save_total_limit": 10**6}
"""Whole numbers above these are taken for typing mistakes: they would fill the memory or never end."""


def find_implausible_numbers(schema: type[StrictModel], settings: RawConfig) -> Iterator[ConfigProblem]:
    """Find `true` where a number is expected (it would count as 1), and whole numbers that no run can have."""
    for key, value in flatten_tree(settings.tree):
        path = tuple(key.split("."))
        field, most = schema_field(schema, path), LARGEST.get(path[-1], LARGEST_NUMBER)
        if field is None or path[-1] not in schema_fields(schema, path[:-1]):
            continue
        if isinstance(value, bool) and takes_number(field.annotation):
            what = f"{str(value).lower()} is not {describe_field(field)}"
        elif type(value) is int and abs(value) > most:
            digits = int(value.bit_length() * math.log10(2)) + 1  # Python does not print a number of more than 4,300
            shown = f"{value:,}" if digits < 30 else f"a number of about {digits} digits"
            what = f"{shown} is more than {most:,}, the most that is plausible"
        else:
            continue
        yield ConfigProblem(settings.location(path), key, what)


def takes_number(annotation: Any) -> bool:
    """Whether a field of this type holds a number, and no truth value."""
    parts = {annotation, *get_args(annotation)}
    parts |= {inner for part in parts if get_origin(part) is Annotated for inner in get_args(part)[:1]}
    return not parts.isdisjoint((int, float)) and bool not in parts


def refuse_earlier_version(error: ValidationError, settings: RawConfig) -> None:
    """Raise UsageError, in one line, for a run folder whose config.yaml has the keys of an earlier version."""
    file = File(settings.source)
    paths = [".".join(map(str, one["loc"])) for one in error.errors() if one["type"] == "extra_forbidden"]
    old = [path for path in paths if new_key(path) and settings.location(tuple(path.split("."))).startswith(str(file))]
    if old and file.name == "config.yaml" and (file.parent / "checkpoints").is_dir():
        raise UsageError(
            f"{file.parent} was trained by an earlier version, whose keys have changed since ({old[0]} is now "
            f"{new_key(old[0])}), and cannot be resumed: start a new run from its weights with model.load={file.parent}"
        )


def config_error(problems: Sequence[ConfigProblem]) -> UsageError:
    """One error for all problems, one a line."""
    return UsageError("\n".join(map(str, problems)))


def config_to_yaml(config: StrictModel) -> str:
    """The config as YAML text, which reads back as the same config."""
    return dump_yaml(config.model_dump(mode="json"))


def config_differences(old: StrictModel, new: StrictModel, ignored: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for every key with another value, except the ignored keys and groups."""
    before, after = dict(flatten_tree(old.model_dump(mode="json"))), dict(flatten_tree(new.model_dump(mode="json")))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    bound = [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in ignored)]
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in bound]


def explain_validation_error(
    error: ValidationError, schema: type[StrictModel], settings: RawConfig
) -> Iterator[ConfigProblem]:
    """Translate pydantic's findings into problems with their place and a remedy."""
    from llm_quest.recipes.other_names import our_value

    findings = error.errors()
    for finding in findings:
        path = tuple(str(part) for part in finding["loc"])
        if finding["type"] == "too_short" and has_findings_below(finding["loc"], findings):
            continue  # a list is too short because its entries are mistakes
        fields = schema_fields(schema, path[:-1])
        if finding["type"] == "extra_forbidden" and (renamed := list(renamed_keys(path, finding["input"], settings))):
            yield from renamed
            continue
        if (new_value := OLD_VALUES.get((".".join(path), str(finding["input"])))) is not None:
            what = f"{finding['input']} is now {new_value}"
        elif (ours := our_value(recipe_name(schema), ".".join(path), str(finding["input"]))) is not None:
            what = f"{finding['input']} is called {ours} here"
        elif finding["type"] == "extra_forbidden":
            what = explain_unknown_key(schema, path, list(fields))
        elif finding["type"] == "missing":
            what = f"missing; give {describe_field(fields.get(path[-1]))}"
        elif finding["type"] in ("value_error", "assertion_error"):
            what = str(finding["ctx"]["error"])
        else:
            field = schema_field(schema, path)
            what = f"{short_repr(finding['input'])} is not {describe_field(field)}{suggest_choice(finding, field)}"
        place = name_arguments(what, path, settings) if finding["type"] == "value_error" else ""
        yield ConfigProblem(place or settings.location(path), ".".join(path), what)


def name_arguments(message: str, path: KeyPath, settings: RawConfig) -> str:
    """The arguments of the command line whose keys a message about several settings names; empty where a key of the
    settings' own file is at fault alone."""
    words = re.findall(r"[a-z][a-z0-9_]*", message)
    places = [settings.locations.get((*path, word), "") for word in dict.fromkeys(words)]
    return " and ".join(dict.fromkeys(place for place in places if place.startswith("argument ")))


MAX_LISTED_KEYS = 150  # characters


def explain_unknown_key(schema: type[StrictModel], path: KeyPath, known: Sequence[str]) -> str:
    """A message for an unknown key: the key to write instead, or the nearest ones."""
    from llm_quest.recipes.other_names import our_setting, setting_remark

    def knows(key: str) -> bool:
        *group, last = key.split(".")
        holder = schema_field(schema, tuple(group)) if group else None
        is_open = holder is not None and get_origin(holder.annotation) is dict  # its keys are not the schema's
        return is_open or last in schema_fields(schema, tuple(group))

    if (ours := our_setting(path[-1], knows)) is not None:
        return f"unknown key; here it is {ours}"
    recipe = recipe_name(schema)
    if (remark := setting_remark(path[-1], recipe)) is not None:
        return f"unknown key; {remark}"
    if ":" in path[-1]:
        return f"no key; a space is missing behind its colon: {path[-1].replace(':', ': ', 1)}"
    listed = f"allowed here: {', '.join(known)}"
    if len(listed) > MAX_LISTED_KEYS:
        listed = f"quest train {recipe or 'RECIPE'} --help lists the {len(known)} keys"
    return f"unknown key{did_you_mean(path[-1], known)}; {listed}"


def recipe_name(schema: type[StrictModel]) -> str:
    """The recipe of a config; empty for a part of one."""
    field = schema.model_fields.get("recipe")
    return str(next(iter(get_args(field.annotation)), "")) if field else ""


def has_findings_below(place: tuple[int | str, ...], findings: Sequence[Any]) -> bool:
    """Whether one of pydantic's findings is about a part of the value at a place."""
    return any(len(finding["loc"]) > len(place) and finding["loc"][: len(place)] == place for finding in findings)


def renamed_keys(path: KeyPath, value: Any, settings: RawConfig) -> Iterator[ConfigProblem]:
    """The problems of keys at a path, or in the group there, that were renamed."""
    leaves = [".".join((*path, key)) for key, _ in flatten_tree(value)] if isinstance(value, dict) and value else []
    for key in leaves or [".".join(path)]:
        if (new := new_key(key)) is not None:
            yield ConfigProblem(settings.location(tuple(key.split("."))), "", f"{key} is now {new}")


def schema_fields(schema: type[StrictModel], path: KeyPath) -> dict[str, FieldInfo]:
    """The fields of the part of the schema at a path, of a list's entry too; none where there is no such part."""
    part: type[StrictModel] | None = schema
    for name in path:
        if name.isdigit() and part is not schema:  # the entry of a list of such parts
            continue
        field = part.model_fields.get(name) if part else None
        part = nested_schema(field.annotation) if field else None
    return dict(part.model_fields) if part else {}


def schema_field(schema: type[StrictModel], path: KeyPath) -> FieldInfo | None:
    """The deepest field named along a path (a finding may point into a list or a choice of types)."""
    for depth in range(len(path), 0, -1):
        if field := schema_fields(schema, path[: depth - 1]).get(path[depth - 1]):
            return field
    return None


def nested_schema(annotation: Any) -> type[StrictModel] | None:
    """The part a field holds, where it holds one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, StrictModel):
            return candidate
    return None
