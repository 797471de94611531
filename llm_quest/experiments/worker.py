"""Runs arms in a process, one after another: requests are JSON lines on stdin, answers JSON lines on stdout. It runs
the package on its PYTHONPATH, which is an edited one for arms of `--code`, and ends when its parent does.

    {"do": "run", "recipe": "tiny", "pairs": ["seed=1"], "folder": "..."}   -> the record, written to record.json too
    {"do": "describe", ...}                  -> parameters, FLOPs, hashes of the first values"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import llm_quest
from llm_quest.cost.profile import time_call
from llm_quest.errors import GuardStop, QuestError, UsageError, shorten_line
from llm_quest.eval.evaluators import LossEvaluator
from llm_quest.experiments.measurements import has_record, read_record
from llm_quest.files import atomic_write_json
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.progress import utc_now
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.planning import open_job, plan_recipe
from llm_quest.recipes.recipe import Job, Recipe, load_recipe
from llm_quest.recipes.run_folder import run_identity
from llm_quest.recipes.yaml_io import RawConfig, flatten_tree
from llm_quest.train.checkpoint import list_checkpoints
from llm_quest.train.rng_state import evaluation_mode
from llm_quest.train.step import autocast

UNIGRAM_STEPS = 50
"""Steps whose targets say how frequent tokens are."""


def run_arm(request: dict[str, Any]) -> dict[str, Any]:
    """Train a run; its record. Of several experiments that want the same run one trains it, and the others wait."""
    folder = Path(request["folder"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        return read_record(folder) if has_record(folder) else train_arm(request, folder)


def train_arm(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a run in its folder; its record. A run that a guard stops has diverged."""
    if not list_checkpoints(folder / "checkpoints"):
        shutil.rmtree(folder, ignore_errors=True)  # what a process that was killed before its first checkpoint left
    recipe, config, settings = load_recipe(request["recipe"], request["pairs"])
    began, start, cpu = utc_now(), time.perf_counter(), time.process_time()
    record: dict[str, Any] = {"status": "diverged", "reason": "", "metrics": {}, "began": began}
    try:
        outcome = run_recipe(recipe, config, settings, folder, quiet=True, log=lambda text: None)
        record |= {"status": outcome.status, "metrics": outcome.as_json()["metrics"], "parameters": outcome.parameters}
        record |= {"steps": outcome.steps}
    except GuardStop as stop:
        record["reason"] = str(stop).splitlines()[0]
    record |= {"cpu_seconds": round(time.process_time() - cpu, 3), "seconds": round(time.perf_counter() - start, 3)}
    record |= {"ended": utc_now(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    if record["status"] in ("finished", "diverged"):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "record.json", record)
        if not request.get("keep_model"):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def describe_arm(request: dict[str, Any]) -> dict[str, Any]:
    """Describe an arm without training it: its data, first weights and the cost of a step. measure: time steps, also
    those of a policy, which draw samples. estimate: time steps, and all of a run that is no step, but of a policy
    nothing."""
    recipe, config, settings = load_recipe(request["recipe"], request["pairs"])
    recipe.check(config, settings)
    quiet: Any = {"log": lambda text: None}
    with (
        tempfile.TemporaryDirectory() as folder,
        open_job(recipe, config, settings, folder=Path(folder), **quiet) as job,
    ):
        description = describe_job(job)
        description["changed_settings"] = compare_settings(config, job.config)
        estimate = request.get("estimate", False) and not isinstance(job.objective, PolicyGradientLoss)
    measure, start, cpu = request.get("measure", False) or estimate, time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            cost = plan_recipe(recipe, config, settings, Path(folder), measure=measure, **quiet)
            description |= {
                "flops_per_step": cost.flops_per_step,
                "units_per_step": cost.units_per_step,
                "step_seconds": cost.step_seconds,
            }
        except UsageError:  # a policy's samples cannot be counted beforehand
            pass
    if estimate:
        description["outside_seconds"] = time_outside_steps(recipe, config, settings)
        description["cpu_share"] = (time.process_time() - cpu) / (time.perf_counter() - start)
    return description


def time_outside_steps(recipe: Recipe, config: RunConfig, settings: RawConfig) -> float:
    """Seconds of a run besides its steps: assembling it, a second time since the first one may train a tokenizer, what
    comes before the first step, and its evaluations."""
    quiet: Any = {"log": lambda text: None}
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        open_job(recipe, config, settings, folder=Path(folder), **quiet) as job,
    ):
        job.prepare()
        job.before()
        return time.perf_counter() - start + time_evaluations(job)


def time_evaluations(job: Job) -> float:
    """Seconds of all evaluations of a run, by one of each kind: between steps, and after the last, which is whole."""
    device, last = next(job.model.parameters()).device, job.config.max_steps
    seconds = 0.0
    with evaluation_mode(job.model), autocast(job.config.precision, device):
        for evaluator in job.evaluators:
            for number, step in ((count_between(evaluator.interval, last), 1), (1, last)):
                if number:
                    seconds += number * time_call(partial(evaluator.evaluate, job.model, step), device)
    return seconds


def count_between(interval: int, steps: int) -> int:
    """How often an evaluator runs before the last step."""
    return (steps - 1) // interval if interval else 0


def compare_settings(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """The settings that opening a job has changed: key -> (before, after)."""
    one, other = (dict(flatten_tree(config.model_dump(mode="json"))) for config in (before, after))
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def describe_job(job: Job) -> dict[str, Any]:
    """Parameters, hashes of their first values, of all settings (`computes`), of the data's order, of what is read."""
    weights = {name: tensor_hash(value) for name, value in job.model.named_parameters()}
    order = {key: value for key, value in job.loader.state_dict().items() if isinstance(value, str | int | float)}
    return {
        "parameters": sum(value.numel() for value in job.model.parameters()),
        "sizes": {name: value.numel() for name, value in job.model.named_parameters()},
        "weights": weights,
        "computes": text_hash([job.config.model_dump(mode="json") | {"model": repr(job.model.config), "seed": 0}]),
        "order": text_hash(order),
        "identity": dict(job.identity),
        "files": {name: value for name, value in run_identity(job.config).items() if name != "settings"},
        "vocab_size": getattr(job.model.config, "vocab_size", None),
        "unigram_loss": unigram_loss(job),
        "learning_rate": job.config.learning_rate,
        "max_steps": job.config.max_steps,
        "warmup_steps": job.config.warmup_steps,
        "rows": job.config.rows_per_step,
        "micro_batches": "micro_batch_size" in type(job.config).model_fields,
    }


def text_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def tensor_hash(value: torch.Tensor) -> str:
    data = value.detach().float().contiguous().cpu().numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]


def unigram_loss(job: Job) -> float | None:
    """The held-out loss of the frequencies of tokens alone, in nats: what a model reaches that uses no context. None
    for recipes that do not predict the next token of held-out text."""
    held_out = next((evaluator.whole for evaluator in job.evaluators if isinstance(evaluator, LossEvaluator)), None)
    if held_out is None:
        return None
    counts: Counter[int] = Counter()
    for step in range(UNIGRAM_STEPS):
        for batch in job.loader.batches(step):
            counts.update(target_tokens(batch))
    seen = Counter(label for batch in held_out for label in target_tokens(batch))
    total = sum(counts.values()) + job.model.config.vocab_size
    return sum(-n * math.log((counts[label] + 1) / total) for label, n in seen.items()) / sum(seen.values())


def target_tokens(batch: Any) -> list[int]:
    """The tokens that a batch predicts."""
    tokens: list[int] = batch.targets[batch.targets >= 0].tolist()
    return tokens


ACTIONS = {"run": run_arm, "describe": describe_arm}


def handle_request(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return ACTIONS[request["do"]](request)
    except QuestError as error:
        return {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = shorten_line(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        return {"error": f"{what} ({place.filename}, line {place.lineno})", "kind": "QuestError", "exit_code": 1}


def read_requests(requests: queue.Queue[dict[str, Any]]) -> None:
    """Read the parent's requests; end this process with it, also in the middle of a run."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


def main() -> None:
    """Answer requests until stdin ends. What code prints goes to stderr."""
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        threading.Thread(target=read_requests, args=(requests,), daemon=True).start()
        print(json.dumps({"package": str(Path(llm_quest.__file__).parent)}), file=answers, flush=True)
        while True:
            answer = handle_request(requests.get())
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(answer), file=answers, flush=True)
