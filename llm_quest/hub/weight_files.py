"""Lists the tensors of a folder's weight files: one file, shards with their index, pickled files, a GGUF file. Only
headers are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from llm_quest.errors import DataError
from llm_quest.hub.config import read_json
from llm_quest.hub.folder_report import FolderReport, TensorSource
from llm_quest.hub.pickled import read_pickled
from llm_quest.hub.safetensors_io import read_header
from llm_quest.hub.weight_map import compact_names

TECHNIQUES_FILE = "techniques.safetensors"
FIRST_VERSION_MODULES = {"ffn": "feed_forward", "lookahead": "mtp_modules", "layer.sink": "layer.attend.sink"}
"""Modules that the first version's own files (checkpoints, techniques.safetensors) name differently: theirs -> ours."""
PICKLED_INDEX = "pytorch_model.bin.index.json"
TRAINING_STATES = r"optimizer|optim|scheduler|scaler|training_args|rng_state|random_states|trainer|zero_pp_rank|mp_rank"
"""Prefixes of files that trainers write beside the weights."""


def read_sources(report: FolderReport, allow_pickle: bool) -> None:
    """List the tensors of a single file, or of shards with their index; of pickled files only if allowed. Tensors that
    techniques added are in a file of their own."""
    folder = report.location.folder
    if report.location.gguf_file is not None:
        from llm_quest.hub.gguf_load import open_model_file, tensor_sources

        report.sources = dict(tensor_sources(open_model_file(report.location.gguf_file)))
        return
    if (folder / TECHNIQUES_FILE).exists():
        added = read_header(folder / TECHNIQUES_FILE)
        report.sources.update({current_parameter_name(name): source for name, source in added.items()})
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        report.sources.update(read_header(single))
    elif index.exists():
        weight_map = read_index(index)
        for file in shard_files(report, folder, weight_map):
            add_shard(report, weight_map, file.name, read_header(file))
        report.problems += missing_from_shards(report, weight_map)
    else:
        read_pickles(report, allow_pickle)
    if report.location.run_dir is not None:
        report.sources = {current_parameter_name(name): source for name, source in report.sources.items()}


def current_parameter_name(name: str) -> str:
    """The name that this version gives to a parameter of a file that the first version wrote."""
    path = f".{name}."
    for old, new in FIRST_VERSION_MODULES.items():
        path = path.replace(f".{old}.", f".{new}.")
    return path.strip(".")


MAX_SHARDS = 10_000


def read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index, limit=64_000_000).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index.name}: has no 'weight_map' from tensors to files")
    if (shards := len(set(map(str, weight_map.values())))) > MAX_SHARDS:
        raise DataError(f"{index.name}: names {shards:,} files; no model has more than {MAX_SHARDS:,}")
    return weight_map


def shard_files(report: FolderReport, folder: Path, weight_map: Mapping[str, str]) -> Iterator[Path]:
    """Yield the files that an index names, which must be in the same folder."""
    for name in sorted({str(file) for file in weight_map.values()}):
        if not re.fullmatch(r"[\w.\-]{1,255}", name) or name in (".", ".."):
            report.problems.append(
                f"the index names {name!r}, which is no plain file name: shards are in the same folder"
            )
        elif not (folder / name).exists():
            report.problems.append(f"missing file: {name}")
        else:
            yield folder / name


def add_shard(
    report: FolderReport, weight_map: Mapping[str, str], file: str, tensors: Mapping[str, TensorSource]
) -> None:
    """Add a shard's tensors; each must be where the index says and nowhere else."""
    for name, source in tensors.items():
        if weight_map.get(name) != file:
            report.problems.append(f"{file}: holds {name}, which the index puts into {weight_map.get(name, 'no file')}")
        report.sources.setdefault(name, source)


def missing_from_shards(report: FolderReport, weight_map: Mapping[str, str]) -> list[str]:
    absent = [name for name in weight_map if name not in report.sources]
    return [f"promised by the index but in none of its files: {compact_names(absent)}"] if absent else []


def read_pickles(report: FolderReport, allow_pickle: bool) -> None:
    """Read pickled weights. DataError if there are none, or if they are not allowed."""
    folder = report.location.folder
    files = find_pickled_weights(folder)
    if not files:
        raise DataError(f"no model.safetensors and no model.safetensors.index.json here{lone_weights_hint(folder)}")
    if not allow_pickle:
        names = ", ".join(p.name for p in files)
        raise DataError(
            f"only pickled weights here ({names}), which can run code: load them with allow_pickle=True (quest "
            "--allow-pickle) if you trust them; tensors are read and nothing else"
        )
    index = folder / PICKLED_INDEX
    weight_map = read_index(index) if index.exists() else {}
    for file in shard_files(report, folder, weight_map) if weight_map else files:
        report.sources.update(read_pickled(file))
    report.problems += missing_from_shards(report, weight_map)


def find_pickled_weights(folder: Path) -> list[Path]:
    """The files pytorch_model.bin or its shards; without them, any other pickled files but training states."""
    pickled = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    usual = [p for p in pickled if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", p.name)]
    return usual or [p for p in pickled if not re.match(TRAINING_STATES, p.stem)]


def lone_weights_hint(folder: Path) -> str:
    """A hint that names other files that may be the weights."""
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
    )
    return f", only {', '.join(others[:3])}: rename or convert it to model.safetensors" if others else ""
