"""What decides the numbers of a run besides its code: its settings, and the models and tokenizers that it loads. Every
checkpoint holds them; a resumed run that finds another one is refused, is told which, and can accept it by name
(`--accept model.load`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_quest.files import file_sha256
from llm_quest.hub.locate import locate_local
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME, RunConfig
from llm_quest.recipes.yaml_io import flatten_tree

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
