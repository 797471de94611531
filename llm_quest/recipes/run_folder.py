"""The folder of a run: whether a run may use it, its identity, and the files beside its checkpoints.

The identity of a run is its settings and the hashes of what it loads: models, tokenizers, templates. Every checkpoint
holds it; a resumed run with another one is refused with the name of what differs, and can accept it (`--accept
model.load`).

A run may be made longer or shorter in place: `quest train RUN max_steps=2000`. The learning rate is a function of the
step and of the length of the whole run, so from the next step on it is that of a run of the new length: a cosine or a
line rises again, a constant rate does not change, and the decay of wsd begins anew. The warm-up is not repeated. The
order of the data stays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import BusyError, DataError, MissingError, QuestError, UsageError
from llm_quest.files import atomic_write_json, atomic_write_text, file_sha256
from llm_quest.hub.adapter_config import CONFIG, adapter_base
from llm_quest.hub.load_save import write_model_json
from llm_quest.hub.locate import IMAGE_FILES, locate_local, resolve_checkpoint
from llm_quest.recipes.config import config_differences, config_to_yaml, load_raw_config, parse_recorded_config
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME, RunConfig
from llm_quest.recipes.recipe import Context, Job
from llm_quest.recipes.schema import StrictModel, is_local_path
from llm_quest.recipes.yaml_io import flatten_tree
from llm_quest.techniques.score_head import read_length
from llm_quest.train.checkpoint import checkpoint_step, list_checkpoints
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.run_dir import RunDir, require_free

REFUSALS = {error.exit_code for error in (UsageError, DataError, MissingError)}


def write_run_files(job: Job, folder: Path) -> None:
    """Write the files that loading, exporting and the report need beside the checkpoints."""
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
    """Remove the new folder of a run that is refused inside, unless it holds a checkpoint by then (of a warm-up)."""
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
    """Raise UsageError for a folder that holds something else, BusyError for one with a run of other settings."""
    old = folder / "config.yaml"
    if not old.is_file():
        if folder.is_dir() and not all(map(is_left_by_start, folder.iterdir())):
            raise UsageError(f"{folder} is not empty and no run; choose another --out")
    elif any(map(list_checkpoints, folder.rglob("checkpoints"))):  # also those of a warm-up or an iteration
        settings = load_raw_config(str(old))
        if settings.tree.get("recipe") != config.recipe:
            other = settings.tree.get("recipe")
            raise BusyError(f"{folder} holds a run of another recipe ({other}); choose another --out")
        before = parse_recorded_config(type(config), settings)
        if before.max_steps != config.max_steps and not counts_epochs(config):
            check_new_length(folder, config.max_steps)
        changed = config_differences(before, config, FREE_SETTINGS)
        if changed and "settings" not in accept:
            listing = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
            raise BusyError(
                f"{folder} holds a run of other settings ({listing}).\n"
                f"Go on with its own (quest train {folder}) or choose another --out"
            )


def counts_epochs(config: RunConfig) -> bool:
    """Whether max_steps is not known yet, because it is computed from the rows (`assembly.count_epochs`)."""
    return getattr(config, "num_train_epochs", None) is not None


def is_left_by_start(entry: Path) -> bool:
    """Whether this was left by a run that was killed before it wrote its config.yaml: such a folder may be used."""
    if entry.is_dir():
        return entry.name in ("samples", "checkpoints") and not any(entry.iterdir())
    return entry.name == "run.lock" or entry.name.startswith(".tmp-config.yaml-")


def init_run_dir(config: RunConfig, context: Context) -> None:
    """Make the run's folder with its config, for recipes that write into it before their run begins. Every process
    checks it before the main process writes, and waits until it has. BusyError while another process trains here. A
    config whose length is not known yet does not replace that of an existing run."""
    folder, parallel = context.run_dir, context.parallel
    require_matching_run(config, folder, context.accept)
    parallel.all_gather(None)
    if parallel.is_main_process:
        require_free(folder)
    if parallel.is_main_process and not (counts_epochs(config) and list_checkpoints(folder / "checkpoints")):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "config.yaml", config_to_yaml(config))
    parallel.all_gather(None)


def open_run_dir(job: Job, context: Context) -> RunDir:
    """The run's folder, as a context that locks it."""
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
READ_AS_ROWS = ("source", "path", "validation")
"""Keys that name rows, texts or images: the recipe compares their content, wherever it lies."""
WEIGHTS_GLOBS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
BESIDE_WEIGHTS = ("generation_config.json", *IMAGE_FILES)
"""Files that decide where a sample ends and how an image is read. The tokenizer has a hash of its own."""
SAMPLED_BLOCKS, BLOCK_BYTES = 32, 1 << 16


def run_identity(config: RunConfig) -> dict[str, str]:
    """The identity of a run, which a resumed run may not change: `settings`, and a key for each model, tokenizer or
    template that is loaded from a folder or file (`model.load`, `rewards.1.load`), with `.base` for the base of an
    adapter and `.files` for what lies beside the weights."""
    tree = without_paths(config, config.model_dump(mode="json"))
    identity = {"settings": json.dumps({k: v for k, v in flatten_tree(tree) if not is_free(k)}, sort_keys=True)}
    for name, value in iter_paths(config):
        identity |= {name + part: hashed for part, hashed in fingerprint_parts(value) if hashed}
    return identity


def without_paths(config: Any, tree: Any) -> Any:
    """The dumped config without the paths of what is compared by content."""
    if isinstance(config, StrictModel):
        kept = [key for key in tree if not (key in READ_AS_ROWS or is_local_path(type(config).model_fields[key]))]
        return {key: without_paths(getattr(config, key), tree[key]) for key in kept}
    if isinstance(config, list | tuple):
        return [without_paths(*pair) for pair in zip(config, tree, strict=True)]
    return tree


def is_free(key: str) -> bool:
    """Whether a setting may differ on resume."""
    return any(key == name or key.startswith(f"{name}.") for name in FREE_SETTINGS)


def iter_paths(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """The dotted key and the value of everything in a config that is loaded from a folder, a file or the hub."""
    if isinstance(config, StrictModel):
        for key, field in type(config).model_fields.items():
            value = getattr(config, key)
            if is_local_path(field) and key not in READ_AS_ROWS and value is not None:
                yield ".".join((*path, key)), value
            else:
                yield from iter_paths(value, (*path, key))
    elif isinstance(config, list | tuple):
        for number, one in enumerate(config):
            yield from iter_paths(one, (*path, str(number)))


def fingerprint_parts(name_or_path: str) -> Iterator[tuple[str, str]]:
    """(suffix of the name in the identity, hash) of each part of a path; the hash is empty for a part that does not
    exist."""
    place = find_here(name_or_path)
    yield "", fingerprint_path(place)
    yield ".files", fingerprint_beside(place)
    base = adapter_base(place) if place.is_dir() else None
    if base is not None:
        yield ".base", fingerprint_path(find_here(base))


def find_here(name_or_path: str) -> Path:
    """The local file or folder of a name: for a hub id the snapshot in the hub's cache."""
    place = resolve_checkpoint(name_or_path)
    if place.exists():
        return place
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        cached = [try_to_load_from_cache(name_or_path, name) for name in ("config.json", "tokenizer.json", CONFIG)]
        return next((Path(one).parent for one in cached if isinstance(one, str)), place)
    return place


def fingerprint_path(path: Path) -> str:
    """A hash of a file, or of the weights and config of a model's folder, a run or an adapter; empty for anything
    else."""
    if path.is_file() and path.suffix == ".gguf":
        return hashlib.sha256(f"{path.stat().st_size}\n".encode() + sample_bytes(path)).hexdigest()
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return ""
    digest = hashlib.sha256()
    folder = weights_folder(path)
    for file in sorted({file for pattern in WEIGHTS_GLOBS for file in folder.glob(pattern)}):
        if file.name != "optim.safetensors":
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + sample_bytes(file))
    return digest.hexdigest()


def weights_folder(path: Path) -> Path:
    return path if (path / CONFIG).exists() else locate_local(path).folder


def fingerprint_beside(path: Path) -> str:
    """A hash of the small files beside the weights of a folder; empty without any."""
    if not path.is_dir():
        return ""
    files = [folder / name for folder in {path, weights_folder(path)} for name in BESIDE_WEIGHTS]
    hashes = sorted(f"{file.name} {file_sha256(file)}" for file in files if file.is_file())
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else ""


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
    """Raise UsageError for fewer steps than the run has done."""
    done = max(map(checkpoint_step, list_checkpoints(folder / "checkpoints")), default=0)
    if max_steps < done:
        raise UsageError(
            f"{folder} has done {done:,} steps, and max_steps={max_steps} asks for fewer: give {done} or more, or go "
            f"on from an earlier checkpoint in a new run (model.load={folder}@last)"
        )


def describe_new_length(
    folder: Path, before: int, after: int, schedules: tuple[LRSchedule, LRSchedule], log: LogFn
) -> None:
    """Log what changes with another number of steps. schedules: of the old and of the new length."""
    done = checkpoint_step(list_checkpoints(folder / "checkpoints")[-1])
    old, new = (schedule(done) for schedule in schedules)
    log(
        f"the run has {after:,} steps now instead of {before:,}: from step {done:,} on its learning rate is that of a "
        f"run of this length ({new:.3g} of the peak, {old:.3g} before)"
    )
