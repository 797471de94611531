"""Locates a model by name: a local folder, a run of ours, or a model on the hub."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.files import load_json, parse_digits, read_pointer
from llm_quest.hub.downloads import fetch_snapshot
from llm_quest.manifest import MANIFEST_FILE, find_fault
from llm_quest.models.build import presets

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?")
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
POOLING_FILES = (
    *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
OTHER_WEIGHTS = ["*/*.safetensors", "*/*.bin"]
"""Weights in folders within a repository, which are not downloaded."""
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class ModelLocation:
    """The location of a model's files. folder: holds the weights. run_dir: the run folder they belong to, if they are
    ours. name: as the user gave it. gguf_file: a GGUF file that is the whole model; nothing else in its folder belongs
    to it."""

    folder: Path
    name: str
    run_dir: Path | None = None
    from_hub: bool = False
    gguf_file: Path | None = None


def locate_model(name_or_path: str | Path, *, revision: str | None = None, allow_pickle: bool = False) -> ModelLocation:
    """Locate a folder with config.json, a run folder (its newest checkpoint) or one checkpoint, a GGUF file, else a hub
    id."""
    folder = resolve_checkpoint(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(
                f"{name_or_path} is a folder here, which has no revisions; leave out revision={revision!r}"
            )
        return locate_local(folder)
    if folder.suffix == ".gguf":
        if not folder.exists():
            raise DataError(f"there is no file {str(name_or_path)!r}")
        return ModelLocation(folder.absolute().parent, str(name_or_path), gguf_file=folder)
    if folder.exists():
        raise DataError(f"{name_or_path} is a file; give the folder that holds it, with its config.json")
    if not HUB_ID.fullmatch(str(name_or_path)) or ".." in str(name_or_path):
        raise DataError(f"there is no folder {str(name_or_path)!r}")
    patterns = [*CONFIG_FILES, *WEIGHT_FILES, *TOKENIZER_FILES, *POOLING_FILES, *IMAGE_FILES]
    patterns += PICKLE_FILES if allow_pickle else ()
    return ModelLocation(download_snapshot(str(name_or_path), patterns, revision), str(name_or_path), from_hub=True)


def locate_adapter(name_or_path: str | Path) -> Path:
    """Locate the folder of an adapter: a local one (of a run its checkpoint), else that of a hub id."""
    folder = resolve_checkpoint(name_or_path)
    if folder.exists() or not HUB_ID.fullmatch(str(name_or_path)):
        return folder
    return download_snapshot(str(name_or_path), [*ADAPTER_FILES], None)


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """Resolve a name to its folder: a checkpoint for `RUN@best` (by metric_for_best_model), `RUN@good` (before the run
    began to fail; the last of a healthy one), `RUN@last` and `RUN@120`, itself for any other. DataError for a missing
    checkpoint."""
    folder = Path(name_or_path).expanduser()
    run, at, chosen = str(folder).rpartition("@")
    if not at or folder.is_dir():
        return result_run(folder)
    steps = result_run(Path(run)) / "checkpoints"
    if not steps.is_dir():
        return folder
    named = {parse_digits(path.name[5:]): path for path in steps.glob("step-*")}
    there = {step: path for step, path in named.items() if step is not None}
    last = max(there, default=None)
    newest = there.get(last or 0)
    if chosen in ("best", "good"):
        step = read_step(newest, chosen)
        step = last if step is None and chosen == "good" else step
    else:
        step = last if chosen == "last" else parse_digits(chosen)
    if step in there:
        return there[step]
    if chosen == "best":
        raise DataError(
            f"{run} has no best checkpoint: train it with metric_for_best_model=eval/loss, or take {run}@last"
        )
    known = ", ".join(f"{run}@{number}" for number in sorted(there)) or "none"
    raise DataError(f"{run} has no checkpoint {chosen}; there are {known}")


RESULT_FILE = "RESULT"
"""A file in the folder of a run of several runs: the relative path of the one with the resulting model."""


def result_run(run: Path) -> Path:
    """The run with the resulting model of a run: the one that RESULT names, of several (`iterative`); else itself."""
    file = run / RESULT_FILE
    if not file.is_file():
        return run
    named = (run / read_pointer(file)).resolve()
    if named == run.resolve() or not named.is_dir() or not named.is_relative_to(run.resolve()):
        raise DataError(f"{file} names no folder of this run; go on with it: quest train {run}")
    return named


def read_step(checkpoint: Path | None, which: str) -> int | None:
    """The step of the best, or of the last good checkpoint, by the state of the newest one."""
    if checkpoint is None:
        return None
    file = checkpoint / "state.json"
    try:
        progress = load_json(file)["progress"]
        step = progress["best_step"] if which == "best" else progress.get("good_step")  # older runs have none
        return None if step is None else int(step)
    except (ValueError, LookupError, TypeError, OverflowError, AttributeError) as error:
        raise DataError(f"{file} does not say which checkpoint is the {which} one ({error}); name a step") from None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run: its parent is called `checkpoints`."""
    return folder.resolve().parent.name == "checkpoints"


def run_of_checkpoint(folder: Path) -> Path:
    """The run folder of a checkpoint; any other folder as it is."""
    return folder.resolve().parent.parent if is_checkpoint(folder) else folder


def locate_local(folder: Path) -> ModelLocation:
    """Locate a published folder, a run, or a checkpoint within a run."""
    if (folder / "config.json").exists():
        return ModelLocation(folder, str(folder))
    if (folder / "model.json").exists():
        return ModelLocation(usable_checkpoint(folder), str(folder), run_dir=folder)
    run = run_of_checkpoint(folder)
    if is_checkpoint(folder) and (run / "model.json").exists():
        if fault := find_weights_fault(require_whole(folder)):
            raise DataError(f"{folder} is damaged: {fault}; name the run, whose last undamaged checkpoint is used")
        return ModelLocation(folder, str(folder), run_dir=run)
    raise DataError(f"{folder} is neither a published folder (no config.json) nor a run of ours (no model.json)")


def require_whole(checkpoint: Path) -> Path:
    """Return the checkpoint; DataError for one in the shards of several processes."""
    if (checkpoint / "shards").is_dir():
        raise DataError(
            f"{checkpoint} is in shards, as FSDP2 wrote it; make it whole first: quest consolidate {checkpoint}"
        )
    return checkpoint


def usable_checkpoint(run: Path) -> Path:
    """The newest checkpoint whose weights are as its manifest says. A newer one that is damaged is named in a warning;
    DataError if none is left. Nothing is renamed: the run may be training, or somebody else's."""
    damaged: list[str] = []
    for checkpoint in checkpoints_newest_first(run):
        fault = find_weights_fault(require_whole(checkpoint))
        if not fault:
            if damaged:
                logger.warning("note: %s; %s is used", "; ".join(damaged), checkpoint.name)
            return checkpoint
        damaged.append(f"{checkpoint} is damaged: {fault}")
    if damaged:
        raise DataError(f"{run} has no usable checkpoint: " + "; ".join(damaged))
    raise DataError(f"{run} has no checkpoint yet; let the run reach its first save")


def find_weights_fault(checkpoint: Path) -> str:
    """A message about damaged weights of a checkpoint, by its manifest; empty if they are right. One without its
    manifest (our writer never leaves such a folder) cannot be verified, which a warning says."""
    if not (checkpoint / MANIFEST_FILE).exists() and (checkpoint / "model.safetensors").exists():
        logger.warning("note: %s has no %s: its weights are read unverified", checkpoint, MANIFEST_FILE)
        return ""
    return find_fault(checkpoint, only=("model.safetensors",))


def checkpoints_newest_first(run: Path) -> list[Path]:
    """The one that BEST names (load_best_model_at_end) or LATEST, then the others from the highest step down."""
    checkpoints = run / "checkpoints"
    files = (checkpoints / "BEST", run / "LATEST", checkpoints / "LATEST")
    named = next(filter(None, map(read_pointer, files)), "")
    latest = checkpoints / named.removeprefix("checkpoints/")
    numbers = {p: parse_digits(p.name[5:]) for p in checkpoints.glob("step-*") if p.is_dir()}
    steps = sorted((step, p) for p, step in numbers.items() if step is not None)
    folders = [folder for _, folder in reversed(steps)]
    return sorted(folders, key=lambda folder: folder != latest)


def download_snapshot(name: str, patterns: list[str], revision: str | None) -> Path:
    """The hub's files in the local cache, downloaded where needed (HF_HOME and HF_HUB_OFFLINE are honored)."""
    from huggingface_hub import errors

    try:
        return fetch_snapshot(name, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_WEIGHTS)
    except errors.GatedRepoError:
        raise MissingError(
            f"{name} is gated: accept its license on its hub page, then log in by `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise DataError(f"the hub's {name} has no revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise DataError(f"{name!r} is no hub id: {error}") from None
    except errors.RepositoryNotFoundError:
        raise DataError(f"there is no folder {name!r} here and no such model on the hub{preset_hint(name)}") from None
    except Exception as error:  # also what the packages below raise: httpx's errors, a portal's page that is no JSON
        raise offline_error(name, patterns[0], describe_download_failure(error)) from None


def describe_download_failure(error: Exception) -> str:
    """The error of a failed download, in a line."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def is_hub_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, as `huggingface_hub` reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def unreachable_reason(reason: str) -> str:
    """The reason why the hub was not reached, in words."""
    if is_hub_offline():
        return "HF_HUB_OFFLINE is set"
    return f"the hub cannot be reached ({(reason or 'no network').splitlines()[0][:100]})"


def offline_error(name: str, file: str, reason: str) -> MissingError:
    """The error for a file that is not in the cache while the hub cannot be reached."""
    return MissingError(
        f"there is no folder {name!r} here, and the hub's {name} lacks {file} in the local cache while "
        f"{unreachable_reason(reason)}{preset_hint(name)}; run `hf download {name}` where there is a network (same "
        "HF_HOME; files that are complete are kept), or give a folder"
    )


def preset_hint(name: str) -> str:
    return f" ({name!r} is a preset: build it with random weights by quest.build)" if name in presets() else ""
