"""Runs a race under fixed rules: held-out bits per byte of one corpus, within counted FLOPs and memory: `quest race`.

An entry is a pretraining recipe from random weights. Its FLOPs are counted by `cost/`, not timed, and its memory is
counted too, both before anything runs; the score is the mean of five seeds. A record's 95 % interval lies below the one
before."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import GuardStop, UsageError
from llm_quest.experiments.arms import default_pairs
from llm_quest.experiments.code_tree import CodeTree
from llm_quest.experiments.ledger import Ledger
from llm_quest.experiments.measurements import Measurements, RunRequest, hash_inputs, read_metric
from llm_quest.experiments.scaling_law import student_quantile
from llm_quest.experiments.worker_pool import WorkerPool
from llm_quest.formatting import format_bytes
from llm_quest.recipes.planning import plan_recipe
from llm_quest.recipes.recipe import load_recipe

SCORE = "eval/bits_per_byte"


@dataclass(frozen=True)
class RaceRules:
    """The rules of every entry. record: the score to beat (docs/race.md)."""

    corpus: str = "builtin"
    held_out: float = 0.05
    flops: float = 1e15
    memory: int = 2_000_000_000
    seeds: int = 5
    record: float = 1.388

    @property
    def pairs(self) -> tuple[str, ...]:
        return (f"data.source={self.corpus}", f"data.held_out={self.held_out}")


def prepare_entry(recipe: str, pairs: Sequence[str], rules: RaceRules, log: LogFn) -> tuple[tuple[str, ...], float]:
    """The settings of an entry and its counted FLOPs. UsageError for what the rules do not allow."""
    for pair in pairs:
        key = pair.partition("=")[0].strip()
        if key.partition(".")[0] == "data" or key in ("seed", "model.load", "tokenizer.load", "teacher.load"):
            raise UsageError(f"{pair}: the race decides data and seeds, and an entry learns everything from its text")
    whole = (*default_pairs(recipe, pairs), *pairs, *rules.pairs)
    loaded_recipe, config, settings = load_recipe(recipe, whole)
    if loaded_recipe.name != "pretrain" or config.model.load or config.tokenizer.load or config.teacher:
        raise UsageError("quest race takes a recipe of pretrain that begins with random weights and has no teacher")
    if config.num_train_epochs is not None:
        raise UsageError("quest race counts steps beforehand: give max_steps in place of num_train_epochs")
    with tempfile.TemporaryDirectory() as folder:
        cost = plan_recipe(loaded_recipe, config, settings, Path(folder), measure=False, log=log)
    if cost.flops > rules.flops:
        most = int(rules.flops / cost.flops_per_step)
        remedy = f"set max_steps={most}" if most else "take a smaller model"
        raise UsageError(f"the entry costs {cost.flops:.3g} FLOPs of {rules.flops:.3g}: {remedy}")
    if cost.memory_total > rules.memory:
        raise UsageError(
            f"the entry needs {format_bytes(cost.memory_total)} of {format_bytes(rules.memory)}: set "
            "micro_batch_size=1, or take a smaller model"
        )
    return whole, cost.flops


def run_race(
    recipe: str, pairs: Sequence[str], seeds: int, rules: RaceRules, *, root: Path, code: CodeTree, pool: WorkerPool,
    log: LogFn, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Train an entry's seeds and score it; finished runs are kept. The claim is in the ledger before the first run."""
    whole, flops = prepare_entry(recipe, pairs, rules, log)
    claim = {"recipe": recipe, "settings": list(whole), "code": code.hash, "rules": asdict(rules), "seeds": seeds}
    digest = hashlib.sha256(json.dumps(claim, sort_keys=True).encode()).hexdigest()[:10]
    experiment, ledger = f"race-{Path(recipe).stem}-{digest}", Ledger(root / "ledger.jsonl", log)
    ledger.append("claim", experiment, {**claim, "question": "How few bits per byte?", "command": command})
    about = pool.submit(code, {"do": "describe", "recipe": recipe, "pairs": [*whole, "seed=1"]}).result()
    measurements = Measurements(recipe, root, pool, ledger, experiment, hash_inputs(about))
    requests = [RunRequest("entry", whole, seed, code, "report") for seed in range(1, seeds + 1)]
    scores = [read_metric(record, SCORE, "entry") for record in measurements.measure(requests, "the race's seeds")]
    if None in scores:
        raise GuardStop(f"seed {scores.index(None) + 1} of the entry diverged: an entry counts with all of its seeds")
    result = score_entry([score for score in scores if score is not None], flops, rules)
    ledger.append("outcome", experiment, {"sentence": describe_entry(result), **result, "command": command})
    return {**claim, **result, "experiment": experiment, "data": about["identity"], "command": command}


def score_entry(scores: Sequence[float], flops: float, rules: RaceRules) -> dict[str, Any]:
    """The mean, its 95 % interval, and whether it is a record: all seeds run, and the interval below the record."""
    mean, half = statistics.fmean(scores), None
    if len(scores) > 1:
        half = student_quantile(len(scores) - 1) * statistics.stdev(scores) / len(scores) ** 0.5
    record = len(scores) >= rules.seeds and half is not None and mean + half < rules.record
    return {"scores": list(scores), "mean": mean, "half_width": half, "flops": flops, "is_record": record}


def describe_entry(entry: Mapping[str, Any]) -> str:
    """The score in a sentence."""
    plus = "" if entry["half_width"] is None else f" ± {entry['half_width']:.4f}"
    count = len(entry["scores"])
    word = "a record" if entry["is_record"] else "no record"
    return f"{entry['mean']:.4f}{plus} bits per byte, seeds: {count}, {entry['flops']:.3g} FLOPs each: {word}"
