"""Settings of a recipe that depend on the command line: a model given there replaces the recipe's own, and a shorter
run shortens its warm-up. What is given on the command line itself stays."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quest.recipes.yaml_io import KeyPath, RawConfig

ALTERNATIVES = ("preset", "family", "load")
"""The keys that name a model; one of them is given."""


def require_at_most_one(model: Any) -> None:
    """ValueError for more than one of the alternatives."""
    given = [key for key in ALTERNATIVES if getattr(model, key) is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(ALTERNATIVES)} ({' and '.join(given)} given; null takes one away)")


def override_paths(overrides: Sequence[str]) -> set[KeyPath]:
    """The keys of `key=value` pairs."""
    return {tuple(pair.partition("=")[0].strip().split(".")) for pair in overrides}


def replace_model(settings: RawConfig, given: Collection[KeyPath], own_family: Any) -> None:
    """Replace the recipe's model by one given on the command line (`model.preset=NAME`, `model.family=NAME`,
    `model.load=FOLDER`), and remove what belongs to the recipe's own: its sizes and, if the new one is loaded, the
    warm-up and the tokenizer of a fresh model. own_family: the recipe's own."""
    model = settings.tree.get("model")
    if not isinstance(model, dict):
        return
    chosen = [key for key in ALTERNATIVES if ("model", key) in given and model.get(key)]
    if len(chosen) != 1:
        return
    for key in ALTERNATIVES:
        if ("model", key) not in given:
            model.pop(key, None)
    if chosen != ["family"] or model["family"] != own_family:
        drop_sizes(model, given)
    for key in ("warmup", "tokenizer") if chosen == ["load"] else ():
        if not any(path[0] == key for path in given):
            settings.tree.pop(key, None)


def replace_task(settings: RawConfig, given: Collection[KeyPath]) -> None:
    """Replace a policy's task by rows or an environment given on the command line (`data.source=FILE`,
    `environment=NAME`), and its rows by a task given there."""
    if settings.tree.get("recipe") not in ("grpo", "iterative"):
        return
    chosen = {path[0] for path in given} & {"task", "data", "environment"}
    if "task" in chosen and "data" not in chosen:
        settings.tree.pop("data", None)
    elif chosen and "task" not in chosen:
        settings.tree.pop("task", None)


OPEN_ANSWERS = {
    "max_new_tokens": 64, "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "kl_coef": 0.05,
    "kl_estimator": "unbiased",
}  # fmt: skip
"""Defaults for answers that a model judges: room for one to three sentences, and a policy that stays near its
reference."""


def replace_toy_settings(settings: RawConfig, given: Collection[KeyPath]) -> None:
    """Replace the settings of `grpo`'s toy task by `OPEN_ANSWERS` where the command line gives prompts and a model that
    judges the answers."""
    rewards = settings.tree.get("rewards")
    judged = isinstance(rewards, list) and any(
        isinstance(reward, Mapping) and reward.get("name") in ("model", "judge") for reward in rewards
    )
    if settings.tree.get("recipe") != "grpo" or not judged or not any(path[0] == "data" for path in given):
        return
    for key, value in OPEN_ANSWERS.items():
        if not ({(key,), ("kl_coef",)} if key.startswith("kl_") else {(key,)}) & set(given):
            settings.tree[key] = value


BELONGS_TO = {"validation": "held_out", "source": "num_documents"}
"""A key of `data` -> the recipe's own key that is removed with it: the held-out part, the number of a task's
documents."""


def replace_data(settings: RawConfig, given: Collection[KeyPath]) -> None:
    """Remove the recipe's settings of data that the command line replaces; a path without a source is that of a
    folder."""
    data = settings.tree.get("data")
    if not isinstance(data, dict):
        return
    if settings.tree.get("recipe") == "vit" and ("data", "path") in given and ("data", "source") not in given:
        data["source"] = "folder" if data.get("source") == "digits" else data.get("source")
    for key, own in BELONGS_TO.items():
        if ("data", key) in given and ("data", own) not in given:
            data.pop(own, None)


def drop_sizes(model: dict[str, Any], given: Collection[KeyPath]) -> None:
    """Remove the sizes of the recipe's own model."""
    sizes = model.get("config")
    if isinstance(sizes, dict) and ("model", "config") not in given:
        model["config"] = {key: value for key, value in sizes.items() if ("model", "config", key) in given}


def shorten_warmup(settings: RawConfig, given: Collection[KeyPath], own: Mapping[str, Any], default: WarmupOf) -> None:
    """Shorten the warm-up in proportion to a shorter `max_steps`, unless it is given: of 50 steps in 1,000 one is left
    in 20. own: the file's settings; default: those of the schema."""
    before = WarmupOf(own["warmup_steps"], own.get("max_steps", default.steps)) if "warmup_steps" in own else default
    steps = settings.tree.get("max_steps", before.steps)
    if ("warmup_steps",) in given or not all(type(one) is int for one in (steps, before.steps, before.warmup)):
        return
    if 0 < steps < before.steps and before.warmup:
        settings.tree["warmup_steps"] = math.ceil(before.warmup * steps / before.steps)


@dataclass(frozen=True)
class WarmupOf:
    """Warm-up steps, and the number of steps of the run that they were chosen for."""

    warmup: Any
    steps: Any


def is_own_choice(settings: RawConfig, key: str, packaged: str) -> bool:
    """Whether the user set this key: on the command line, or in a file that is not one of ours. packaged: the folder of
    the recipes that come with the package."""
    place = settings.locations.get((key,))
    return place is not None and not place.startswith(packaged)
