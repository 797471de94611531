"""The model card of a run: what only its folder knows (data, recipe, numbers). `hub.model_card` writes it down."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from llm_quest.errors import DataError
from llm_quest.hub.model_card import Readme
from llm_quest.report.record import RunRecord, read_run

RECIPE_KEYS = (
    "optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "batch_size", "sequence_length",
    "loss_type", "beta", "precision", "seed",
)  # fmt: skip
"""Settings of a recipe that a card names, where it has them."""
CHECKPOINT = re.compile(r"step-(\d+)$")
HUB_SOURCE = "hf:"
MAX_CARD = 200_000
CARD_CELL = r"((?:[^|\n\\]|\\.)*)"
CARD_ROW = re.compile(rf"^\| {CARD_CELL} \| {CARD_CELL} \|$", re.MULTILINE)
"""A row, name and value; what `table_cell` has escaped is still so."""


def run_readme(folder: Path, license: str | None = None) -> Readme:
    """The card of a run, or of one of its checkpoints; of a folder that is no run, what its own card says. Paths of
    this machine are cut to their last part."""
    home = folder.resolve()
    step = int(match[1]) if (match := CHECKPOINT.search(home.name)) else None
    try:
        record = read_run(home.parent.parent if step is not None else home)
        config = yaml.safe_load(record.config) or {}
    except (DataError, yaml.YAMLError, ValueError, RecursionError):
        return folder_readme(home, license)
    if not isinstance(config, dict) or "recipe" not in config:
        return folder_readme(home, license)
    base = find_value(config, "model", "load")
    sources = list(describe_sources(config))
    return Readme(
        title=record.name,
        license=license,
        base_model=base if isinstance(base, str) and is_hub_name(base) else None,
        datasets=[source.removeprefix(HUB_SOURCE) for source in sources if source.startswith(HUB_SOURCE)],
        data=describe_data(record, config, sources),
        training=describe_training(record, config, step, base),
        results=dict(describe_results(record, step)),
    )


def folder_readme(folder: Path, license: str | None) -> Readme:
    """What a card that stands in the folder says of its making: of one of ours all of it, of another the license."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")[:MAX_CARD]
        head = yaml.safe_load(text.split("---\n")[1])
        known = {name: one for name in ("license", "base_model", "language") if isinstance(one := head.get(name), str)}
        if "llm-quest" not in head.get("tags", ()):
            return Readme(license=license or known.get("license"))
        datasets = [one for one in head.get("datasets", ()) if isinstance(one, str)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return Readme(license=license)
    data, training, results = (dict(card_table(text, title)) for title in ("Data", "Training", "Results"))
    known |= {"license": license} if license else {}
    return Readme(datasets=datasets, data=data, training=training, results=results, **known)


def card_table(text: str, title: str) -> Iterator[tuple[str, str]]:
    """The rows of a table of our card."""
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    for name, value in CARD_ROW.findall(section)[1:]:  # the first one is the line below the head
        yield html.unescape(name.replace(r"\|", "|")), html.unescape(value.replace(r"\|", "|"))


def find_value(config: Mapping[str, Any], *keys: str) -> Any:
    """A value below several keys; None where one is missing."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def is_hub_name(name: str) -> bool:
    """Whether a model's name is one of the hub and no path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def describe_sources(config: Mapping[str, Any]) -> Iterator[str]:
    """The sources of a run's rows, without the folders they lie in."""
    source = find_value(config, "data", "source")
    for one in source if isinstance(source, list) else [source]:
        name = one.get("path") if isinstance(one, Mapping) else one
        if isinstance(name, str):
            yield name if name.startswith((HUB_SOURCE, "builtin")) else Path(name.partition(":")[0]).name
    if isinstance(task := config.get("task"), str):
        yield f"the generated task {task}"


def describe_data(record: RunRecord, config: Mapping[str, Any], sources: list[str]) -> dict[str, str]:
    """What the run was trained on."""
    facts = {"source": ", ".join(sources)} if sources else {}
    names = {"train_documents": "documents", "train_bytes": "bytes", "train_tokens": "tokens", "train_rows": "rows"}
    facts |= {word: f"{record.data[key]:,}" for key, word in names.items() if isinstance(record.data.get(key), int)}
    if isinstance(digest := record.data.get("train_sha256"), str):
        facts["sha256 of the training text"] = digest[:16]
    held_out = find_value(config, "data", "held_out")
    return facts | ({"held out for evaluation": f"{held_out:.1%}"} if isinstance(held_out, float) and held_out else {})


def describe_training(
    record: RunRecord, config: Mapping[str, Any], step: int | None, base: Any
) -> dict[str, str | float]:
    """The recipe and its numbers."""
    facts: dict[str, str | float] = {"recipe": str(config["recipe"])}
    if isinstance(base, str):
        facts["starts from"] = base if is_hub_name(base) else Path(base).name
    steps = step if step is not None else record.summary.get("step", record.step)
    facts["steps"] = f"{steps:,}" if isinstance(steps, int) else str(steps)
    tokens = [row["tokens"] for row in record.rows if isinstance(row.get("tokens"), int) and row["step"] <= steps]
    facts |= {record.unit: f"{tokens[-1]:,}"} if tokens else {}
    techniques = config.get("techniques")
    names = [
        str(technique.get("name") if isinstance(technique, Mapping) else technique) for technique in techniques or ()
    ]
    facts |= {"techniques": ", ".join(names)} if names else {}
    return facts | {key: value for key in RECIPE_KEYS if isinstance(value := config.get(key), str | int | float)}


def describe_results(record: RunRecord, step: int | None) -> Iterator[tuple[str, str]]:
    """What was measured on held-out data: at the run's end, or at the step of a checkpoint."""
    if step is None and isinstance(scores := record.summary.get("scores"), Mapping):
        values = dict(scores)
    else:
        at = record.step if step is None else step
        empty: Mapping[str, Any] = {}
        row = next((row for row in reversed(record.rows) if row["step"] == at), empty)
        values = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
    for name, value in values.items():
        if isinstance(value, int | float) and math.isfinite(value):
            yield name, f"{value:.4g}"
