"""What the tests of fine-tuning recipes go on from: a tiny model folder with a tokenizer, and rows with a rule in
them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_quest.data.vocabulary import train_bpe
from llm_quest.hub.load_save import save
from llm_quest.models.build import build, preset
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import Context, RunOutcome, get_recipe
from llm_quest.recipes.yaml_io import RawConfig, apply_overrides, read_yaml
from llm_quest.train.parallel import DistributedContext

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "sun", "moon", "star", "tree"]

COMMON = """
warmup_steps: 2
precision: fp32
logging_steps: 1
optim: muon
learning_rate: 2e-2
weight_decay: 0.0
"""


def base(folder: Path, page: str = "llama3.2-tiny", **sizes: Any) -> Path:
    """An untrained model with a tokenizer of our own."""
    tokenizer = train_bpe([" ".join(WORDS) + " user assistant\nsay word\n"] * 9, 330)
    config = dataclasses.replace(preset(page).config, vocab_size=tokenizer.vocab_size, **sizes)
    return save(build(config, seed=1), folder, tokenizer=tokenizer)


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def start_run(name: str, text: str, out: Path, *pairs: str, log: Any = lambda line: None) -> RunOutcome:
    settings = apply_overrides(read_yaml(text + COMMON, "recipe.yaml"), list(pairs))
    recipe = get_recipe(name)
    return run_recipe(recipe, parse_config(recipe.Config, settings), settings, out, quiet=True, log=log)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, step: int) -> bytes:
    return (out / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()


def planning_context(folder: Path = Path()) -> Context:
    """What surrounds a job that is built to be looked at."""
    return Context(folder, DistributedContext(), lambda line: None, RawConfig({}, ""), planning=True)
