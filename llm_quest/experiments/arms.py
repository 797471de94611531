"""Parses the arms of an experiment: settings on top of the control's (`--vary`, `--arm`), or edited code (`--code`).

--vary optim=adamw,muon         an arm for each value that differs from the control's
--arm big='model.config.hidden_size=96 learning_rate=1e-3'
--code edit.patch               the control's settings, run by an edited package"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.experiments.code_tree import CodeTree, differing_files, open_edit, own_code
from llm_quest.recipes.recipe import load_recipe

CONTROL = "control"
FIXED = {
    "threads": "1", "compile": "false", "precision": "fp32", "few_row_products": "{}", "few_row_kernel": "{}",
    "training_kernels": "false", "muon_form": "float32", "save_steps": "0", "report_to": "[]", "eval_steps": "0",
    "eval_baselines": "false", "samples.every_steps": "0", "seed_per_module": "true",
}  # fmt: skip
"""Settings of all arms unless they are given: those that decide last bits, that pair first weights, or that cost time
and change no result. Keys that a recipe does not have are left out."""
DEV, TEST = "data.eval_part=dev", "data.eval_part=test"
"""The halves of the held-out data: experiments are scored on one, confirmations on the other."""
OWN_KEYS = ("seed", "max_steps", "num_train_epochs", "max_time")
"""Keys that the experiment sets for each run."""
EVALUATION_KEYS = ("held_out", "validation", "eval_part", "eval_tokens", "eval_problems", "eval_num_samples")
EVALUATION_CODE = ("eval/", "data/split.py")
"""Code that scores all arms: an arm that changes it would be scored by another measure."""


@dataclass(frozen=True)
class Arm:
    """name; the settings on top of the control's; the code that it runs; the metric that is read of it, where it is
    another one than the control's."""

    name: str
    pairs: tuple[str, ...]
    code: CodeTree
    metric: str = ""

    def sets(self, key: str) -> bool:
        return any(pair.partition("=")[0].strip() == key for pair in self.pairs)


def default_pairs(recipe: str, pairs: Sequence[str]) -> list[str]:
    """FIXED for a recipe, without the keys that are given."""
    fields = load_recipe(recipe, pairs)[0].Config.model_fields
    given = {pair.partition("=")[0].strip().partition(".")[0] for pair in pairs}
    keys = {key: value for key, value in FIXED.items() if key.partition(".")[0] in fields}
    return [f"{key}={value}" for key, value in keys.items() if key.partition(".")[0] not in given]


def split_values(text: str) -> Iterator[str]:
    """`a,[b, c],d` -> a; [b, c]; d: commas inside of brackets and quotes separate nothing."""
    depth, quote, begin = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
            if letter == "," and depth == 0:
                yield text[begin:place].strip()
                begin = place + 1
    yield text[begin:].strip()


def parse_vary(given: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, settings) of the arms of `--vary key=a,b,c`."""
    key, equals, values = given.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise UsageError(f"--vary {given}: expected key=value,value, such as --vary optim=adamw,muon")
    for value in split_values(values):
        yield f"{key.strip()}={value}", (f"{key.strip()}={value}",)


def parse_arm(given: str) -> tuple[str, tuple[str, ...]]:
    """(name, settings) of `--arm name='key=value key=value'`."""
    name, equals, settings = given.partition("=")
    try:
        pairs = tuple(shlex.split(settings))
    except ValueError as error:
        raise UsageError(f"--arm {given}: {error}; write --arm name='key=value key=value'") from None
    if not equals or not re.fullmatch(r"[\w.+-]+", name) or not pairs or not all("=" in pair for pair in pairs):
        raise UsageError(f"--arm {given}: expected name='key=value key=value', such as --arm wide='batch_size=64'")
    return name, pairs


def parse_arms(vary: Sequence[str], arms: Sequence[str], code: Sequence[str], copies: Path) -> list[Arm]:
    """All arms but the control. UsageError for none, for a name that stands twice, and for a key that the experiment
    sets itself."""
    own = own_code()
    named = [one for given in vary for one in parse_vary(given)] + [parse_arm(given) for given in arms]
    parsed = [Arm(name, pairs, own) for name, pairs in named]
    parsed += [Arm(Path(given).name, (), open_edit(given, copies)) for given in code]
    names = [CONTROL, *(arm.name for arm in parsed)]
    if len(names) == 1:
        raise UsageError("nothing varies: give --vary key=a,b, --arm name='key=value', or --code PATCH|WORKTREE")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two arms are called {twice[0]}; arms need names of their own (the control's is {CONTROL})")
    refuse_own_keys([pair for arm in parsed for pair in arm.pairs])
    for arm in parsed:
        refuse_own_evaluation(arm, own)
    return parsed


def refuse_own_evaluation(arm: Arm, own: CodeTree) -> None:
    """UsageError for an arm that changes what it is scored on, or the code that scores."""
    for pair in arm.pairs:
        if pair.partition("=")[0].strip().rpartition(".")[2] in EVALUATION_KEYS:
            raise UsageError(
                f"{arm.name} sets {pair}: all arms are scored on the same data; set it for the control too"
            )
    edited = [] if arm.code.hash == own.hash else differing_files(own, arm.code)
    for file in edited:
        if file.startswith(EVALUATION_CODE):
            raise UsageError(f"{arm.name} edits {file}, which scores all arms: its numbers could not be compared")


def refuse_own_keys(pairs: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """UsageError for a key that the experiment sets: seeds, and the length of the arms, which the budget decides."""
    for pair in pairs:
        key = pair.partition("=")[0].strip()
        if key in OWN_KEYS and key not in allowed:
            what = "--first-seed says which seeds" if key == "seed" else "max_steps of the control and --budget decide"
            raise UsageError(f"{pair}: an arm can't set {key}; {what}")


def resolve_arms(recipe: str, base: Sequence[str], arms: Sequence[Arm], log: LogFn) -> list[Arm]:
    """The arms that differ from the control; the others are logged. UsageError where none is left, and for settings
    that the recipe refuses."""
    control, own, kept = resolve_settings(recipe, tuple(base)), own_code(), list[Arm]()
    dropped = []
    for arm in arms:
        same_settings = resolve_settings(recipe, (*base, *arm.pairs)) == control
        same_code = arm.code.hash == own.hash or not differing_files(own, arm.code)
        if same_settings and same_code and not arm.metric:
            why = "it is the control" if arm.code.hash == own.hash else "only words, layout or local names"
            dropped.append(f"{arm.name} changes nothing: {why}; not run")
            log(dropped[-1])
        else:
            kept.append(arm)
    if not kept:
        raise UsageError(f"no arm differs from the control: {'; '.join(dropped)}")
    return kept


@functools.cache
def resolve_settings(recipe: str, pairs: tuple[str, ...]) -> Any:
    """All settings after defaults, as plain values."""
    return load_recipe(recipe, pairs)[1].model_dump(mode="json")
