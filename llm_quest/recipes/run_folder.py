"""The folder of a run: whether this run may use it, what decides its numbers, and the files beside its checkpoints.

What decides the numbers of a run besides its code are its settings and the models and tokenizers that it loads. Every
checkpoint holds them; a resumed run that finds another one is refused, is told which, and can accept it by name
(`--accept model.load`).

A run may be made longer or shorter in place: `quest train RUN max_steps=2000`. The learning rate is a function of the
step and of the length of the whole run, so from the next step on it is that of a run of the new length: of a cosine or
a line it rises again, of a constant rate nothing changes, and of wsd the decay begins anew. The warm-up is not
repeated. What is learned at each step, the order of the data, stays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import BusyError, DataError, MissingError, QuestError, UsageError
from llm_quest.files import atomic_write_json, atomic_write_text, file_sha256
from llm_quest.hub.load_save import write_model_json
from llm_quest.hub.locate import locate_local
from llm_quest.recipes.config import config_differences, config_to_yaml, load_raw_config, parse_recorded_config
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME, RunConfig
from llm_quest.recipes.recipe import Context, Job
from llm_quest.recipes.yaml_io import flatten_tree
from llm_quest.techniques.score_head import read_length
from llm_quest.train.checkpoint import checkpoint_step, list_checkpoints
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir

REFUSALS = {error.exit_code for error in (UsageError, DataError, MissingError)}


def write_run_files(job: Job, folder: Path) -> None:
    """What loading, exporting and the report need beside the checkpoints."""
    write_model_json(folder, job.model)
    if job.tokenizer is not None:
        length = read_length(job.model, job.tokenizer.model_max_length)
        job.tokenizer.save(folder / "tokenizer", model_max_length=length)
    if job.preprocessor is not None:
        from llm_quest.data.preprocessor_config import build_preprocessor_config

        atomic_write_json(folder / "preprocessor_config.json", build_preprocessor_config(job.preprocessor))
    atomic_write_json(folder / "data.json", dict(job.facts))


@contextmanager
def remove_if_refused(folder: Path) -> Iterator[None]:
    """A run that is refused leaves no new folder, unless it holds a checkpoint by then (of a warm-up)."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield
    except QuestError as error:
        if error.exit_code not in REFUSALS:
            raise
        leader = os.environ.get("RANK", "0") == "0"
        if leader and folder in new and not any(folder.rglob("step-*")):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new[1:]:
                with suppress(OSError):  # something else is in it by now
                    parent.rmdir()
        raise


def require_matching_run(config: RunConfig, folder: Path, accept: Sequence[str] = ()) -> None:
    """A folder that holds something else, or a run of other settings, is left alone."""
    old = folder / "config.yaml"
    if not old.is_file():
        if folder.is_dir() and not all(map(is_left_by_start, folder.iterdir())):
            raise UsageError(f"{folder} is not empty and no run; choose another --out")
    elif list_checkpoints(folder / "checkpoints"):
        settings = load_raw_config(str(old))
        if settings.tree.get("recipe") != config.recipe:
            other = settings.tree.get("recipe")
            raise BusyError(f"{folder} holds a run of another recipe ({other}); choose another --out")
        before = parse_recorded_config(type(config), settings)
        if before.max_steps != config.max_steps and not counts_epochs(config):
            check_new_length(folder, config.max_steps)
        changed = config_differences(before, config, (*KEYS_FREE_ON_RESUME, "max_steps", "num_train_epochs"))
        if changed and "settings" not in accept:
            listing = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
            raise BusyError(
                f"{folder} holds a run of other settings ({listing}).\n"
                f"Go on with its own (quest train {folder}) or choose another --out"
            )


def counts_epochs(config: RunConfig) -> bool:
    """Whether max_steps is not known yet: it follows from the rows (`assembly.count_epochs`)."""
    return getattr(config, "num_train_epochs", None) is not None


def is_left_by_start(entry: Path) -> bool:
    """Whether a run that was killed before it wrote its config.yaml has left this: such a folder is begun again."""
    if entry.is_dir():
        return entry.name in ("samples", "checkpoints") and not any(entry.iterdir())
    return entry.name == "run.lock" or entry.name.startswith(".tmp-config.yaml-")


def init_run_dir(config: RunConfig, folder: Path, parallel: DistributedContext) -> None:
    """The run's folder with its config, for recipes that write into it before their run begins. All look before the
    leader writes, and none goes on before the leader has written. A config whose length is not known yet leaves that of
    a run that is there."""
    require_matching_run(config, folder)
    parallel.all_gather(None)
    if parallel.is_main_process and not (counts_epochs(config) and list_checkpoints(folder / "checkpoints")):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "config.yaml", config_to_yaml(config))
    parallel.all_gather(None)


def open_run_dir(job: Job, context: Context) -> RunDir:
    """The run's folder, to be entered."""
    identity = {**job.identity, **run_identity(job.config)}
    hashes = {name: value for name, value in identity.items() if name != "settings"}
    return RunDir(
        context.run_dir,
        config=config_to_yaml(job.config),
        env={**context.env, "hashes": hashes},
        identity=identity,
        resume=context.resume,
        is_main_process=context.parallel.is_main_process,
        accept=context.accept,
    )


FREE_SETTINGS = (*KEYS_FREE_ON_RESUME, "max_steps", "num_train_epochs")
PATHS = ("load", "source", "path", "validation")
WEIGHTS_GLOBS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
SAMPLED_BLOCKS, BLOCK_BYTES = 32, 1 << 16


def run_identity(config: RunConfig) -> dict[str, str]:
    """Name -> what a resumed run may not find changed: `settings`, and a key for each model or tokenizer that is
    loaded from a folder or file here (`model.load`, `rewards.1.load`)."""
    tree = config.model_dump(mode="json")
    settings = {key: value for key, value in flatten_tree(without_paths(tree)) if not is_free(key)}
    loaded = {name: fingerprint_path(Path(value)) for name, value in iter_loaded(tree)}
    return {"settings": json.dumps(settings, sort_keys=True)} | {name: found for name, found in loaded.items() if found}


def without_paths(tree: Any) -> Any:
    """The config without the paths of what is compared by content: `load`s here, rows and texts by their loader."""
    if isinstance(tree, Mapping):
        return {key: without_paths(value) for key, value in tree.items() if key not in PATHS}
    return [without_paths(one) for one in tree] if isinstance(tree, list | tuple) else tree


def is_free(key: str) -> bool:
    """Whether a setting may differ on resume."""
    return any(key == name or key.startswith(f"{name}.") for name in FREE_SETTINGS)


def iter_loaded(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The dotted key and the value of every `load` in a config."""
    children = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in children:
        if key == "load" and isinstance(value, str):
            yield ".".join((*path, "load")), value
        else:
            yield from iter_loaded(value, (*path, str(key)))


def fingerprint_path(path: Path) -> str:
    """A hash of a file, or of the weights and config of a model's folder, a run or an adapter; empty for anything else
    (a hub id, whose files the hub's cache keeps by their hash)."""
    path = path.expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return hashlib.sha256(f"{path.stat().st_size}\n".encode() + sample_bytes(path)).hexdigest()
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return ""
    folder = path if (path / "adapter_config.json").exists() else locate_local(path).folder
    digest = hashlib.sha256()
    for file in sorted({file for pattern in WEIGHTS_GLOBS for file in folder.glob(pattern)}):
        if file.name != "optim.safetensors":
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + sample_bytes(file))
    return digest.hexdigest()


def sample_bytes(file: Path) -> bytes:
    """SAMPLED_BLOCKS blocks of a file, from its first bytes to its last: training moves nearly every byte of a file of
    weights, and reading all of a large one at every start would take longer than loading it."""
    size = file.stat().st_size
    last = max(0, size - BLOCK_BYTES)
    with file.open("rb") as handle:
        parts = []
        for number in range(SAMPLED_BLOCKS if last else 1):
            handle.seek(last * number // (SAMPLED_BLOCKS - 1))
            parts.append(handle.read(BLOCK_BYTES))
    return b"".join(parts)


def check_new_length(folder: Path, max_steps: int) -> None:
    """UsageError for fewer steps than the run has done."""
    done = checkpoint_step(list_checkpoints(folder / "checkpoints")[-1])
    if max_steps < done:
        raise UsageError(
            f"{folder} has done {done:,} steps, and max_steps={max_steps} asks for fewer: give {done} or more, or go "
            f"on from an earlier checkpoint in a new run (model.load={folder}@last)"
        )


def describe_new_length(
    folder: Path, before: int, after: int, schedules: tuple[LRSchedule, LRSchedule], log: LogFn
) -> None:
    """What changes with another number of steps. schedules: of the old and of the new length."""
    done = checkpoint_step(list_checkpoints(folder / "checkpoints")[-1])
    old, new = (schedule(done) for schedule in schedules)
    log(
        f"the run has {after:,} steps now instead of {before:,}: from step {done:,} on its learning rate is that of a "
        f"run of this length ({new:.3g} of the peak, {old:.3g} before)"
    )
