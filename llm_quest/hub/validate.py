"""Find out what a folder holds, and everything that is wrong with it, before a byte of weights is read.

Loading believes a folder only if this finds no problem; `inspect` prints what this found. Nothing is allocated here:
shapes come from the files' headers and from a model assembled on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.contracts import Technique
from llm_quest.errors import DataError
from llm_quest.hub.config import family_for, parse_generation_config, parse_hf_config, read_json, split_techniques
from llm_quest.hub.locate import ModelLocation
from llm_quest.hub.pickled import read_pickled
from llm_quest.hub.safetensors_io import FLOAT_DTYPES, INT_DTYPES, StoredTensor, read_header
from llm_quest.hub.weight_map import (
    WeightView,
    compact_names,
    export_weight_map,
    identity_weight_map,
    name_in_file,
    weight_views,
)
from llm_quest.layers.linear import LMHead
from llm_quest.models.build import SkipInit, build_meta_model
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.models.family import Family
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.model_spec import replay_techniques, techniques_from_json

LM_HEAD = "lm_head.weight"
TECHNIQUES_FILE = "techniques.safetensors"
FIRST_VERSION_MODULES = {"ffn": "feed_forward", "lookahead": "mtp_modules", "layer.sink": "layer.attend.sink"}
"""Modules that the first version's own files (checkpoints, techniques.safetensors) name differently: theirs -> ours."""
TensorSource = StoredTensor | Tensor


@dataclass
class FolderReport:
    """What was found. sources: published name -> where its numbers are. model: on the meta device; None if the config
    is unusable. weight_views: name in the files -> its place in the model. duplicates: tensors stored twice, (copy,
    original). techniques: those its config says were applied. problems forbid loading; notes do not."""

    location: ModelLocation
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    family: Family | None = None
    model: Decoder | None = None
    generation_config: GenerationConfig = field(default_factory=GenerationConfig)
    sources: dict[str, TensorSource] = field(default_factory=dict)
    weight_views: dict[str, WeightView] = field(default_factory=dict)
    duplicates: tuple[tuple[str, str], ...] = ()
    techniques: Sequence[Technique] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def validate_folder(location: ModelLocation, *, allow_pickle: bool = False) -> FolderReport:
    """Look at everything; problems are collected, never raised."""
    report = FolderReport(location)
    steps = (
        read_configs,
        lambda s: read_sources(s, allow_pickle),
        build_report_model,
        match_names,
        check_shapes,
        check_vocabulary_size,
    )
    for step in steps:
        try:
            step(report)
        except DataError as error:
            report.problems.append(str(error))
    return report


def read_configs(report: FolderReport) -> None:
    """config.json (or our model.json) and generation_config.json."""
    if report.location.run_dir is not None:
        ours = read_json(report.location.run_dir / "model.json")
        report.hf_config, generation_json = ours.get("config") or {}, ours.get("generation") or {}
        technique_entries = ours.get("techniques") or []
    else:
        report.hf_config, technique_entries = split_techniques(read_json(report.location.folder / "config.json"))
        advice_file = report.location.folder / "generation_config.json"
        generation_json = read_json(advice_file) if advice_file.exists() else {}
    report.generation_config = parse_generation_config(report.hf_config, generation_json)
    report.techniques = techniques_from_json(technique_entries, TECHNIQUES)
    if technique_entries:
        report.notes.append(f"techniques, in order: {', '.join(str(one['name']) for one in technique_entries)}")


def read_sources(report: FolderReport, allow_pickle: bool) -> None:
    """Single file, or shards with their index; pickled ones only if allowed. What techniques added is in a file of
    its own."""
    folder = report.location.folder
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


def read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index, limit=64_000_000).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index.name}: has no 'weight_map' from tensors to files")
    return weight_map


def shard_files(report: FolderReport, folder: Path, weight_map: Mapping[str, str]) -> Iterator[Path]:
    """The files an index names, which must be in the same folder."""
    for name in sorted({str(file) for file in weight_map.values()}):
        if not re.fullmatch(r"[\w.\-]+", name) or name in (".", ".."):
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
    """The old format, or the reason why nothing is read."""
    folder = report.location.folder
    files = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth") and p.name != "training_args.bin")
    if files and not allow_pickle:
        names = ", ".join(p.name for p in files)
        raise DataError(f"only pickled weights here ({names}), which can run code: allow_pickle=True if you trust them")
    if not files:
        raise DataError("no model.safetensors and no model.safetensors.index.json here")
    for file in files:
        report.sources.update(read_pickled(file))


def build_report_model(report: FolderReport) -> None:
    """The family, its config, and the model on the meta device. Every layer has tensors of its own, so there are more
    tensors."""
    report.family = family_for(report.hf_config)
    config, problems = parse_hf_config(report.family, report.hf_config)
    report.problems += problems
    if config is None or problems or not report.sources:
        return
    if config.num_hidden_layers > len(report.sources):
        raise DataError(
            f"config.json: {config.num_hidden_layers:,} layers, but the files hold only {len(report.sources)} tensors"
        )
    try:
        own_format = (
            report.location.run_dir is not None or report.techniques
        )  # our own format, which says exactly what is there
        report.model = build_meta_model(config if own_format else report.family.resolve_config(config, report.sources))
        report.model = replay_on_meta(report.model, report.techniques)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        report.model = None
        raise DataError(f"config.json: no model can be made of it: {str(error).splitlines()[0]}") from None


def replay_on_meta(model: Decoder, techniques: Sequence[Technique]) -> Decoder:
    """The techniques, applied again on the meta device."""
    with torch.device("meta"), SkipInit():
        return replay_techniques(model, techniques)


def match_names(report: FolderReport) -> None:
    """Every published tensor to its place: what is missing, what is too much."""
    if report.model is None or report.family is None:
        return
    own_format = report.location.run_dir is not None
    names = (
        identity_weight_map(report.model)
        if own_format
        else export_weight_map(report.model, report.family.weight_map(report.model.config))
    )
    views = weight_views(report.model, names)
    views_by_stored_name = {
        name_in_file(name, report.sources, report.family.optional_prefix): place for name, place in views.items()
    }
    missing = [name for name in views_by_stored_name if name not in report.sources]
    report.weight_views = {name: place for name, place in views_by_stored_name.items() if name in report.sources}
    report.duplicates = find_duplicates(report)
    copies = {copy for copy, _ in report.duplicates}
    extra = [
        n
        for n in report.sources
        if n not in views_by_stored_name and n not in copies and not is_ignored(n, report.family)
    ]
    scales = [name for name in extra if name.endswith(("_scale_inv", ".weight_scale"))]
    if missing:
        report.problems.append(f"missing: {compact_names(missing)}")
    if scales:
        report.problems.append(
            f"fp8 weights with scales ({compact_names(scales)}) are not read: use the bf16 version of the model"
        )
    if unexpected := [name for name in extra if name not in scales]:
        report.problems.append(f"unexpected: {compact_names(unexpected)}")


def find_duplicates(report: FolderReport) -> tuple[tuple[str, str], ...]:
    """A tied head may be stored a second time; it must then be equal, which is checked when its numbers are read."""
    assert report.model is not None
    assert report.family is not None
    copies = tuple(
        pair for pair in report.family.duplicate_weights(report.model.config).items() if pair[0] in report.sources
    )
    parameters = dict(report.model.named_parameters())
    heads = {id(module.weight) for module in report.model.modules() if isinstance(module, LMHead)}
    originals = [name for name, place in report.weight_views.items() if id(parameters[place.parameter]) in heads]
    stored = [
        name for name in report.sources if name.endswith(LM_HEAD) and name not in report.weight_views and originals
    ]
    return (*((name, originals[0]) for name in stored), *copies)


def is_ignored(name: str, family: Family) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.keys_to_ignore)


def check_shapes(report: FolderReport) -> None:
    """Each stored tensor must have the shape and kind its place has."""
    if report.model is None:
        return
    parameters = dict(report.model.named_parameters())
    shapes = {name: tuple(place.view(parameters[place.parameter]).shape) for name, place in report.weight_views.items()}
    shapes |= {copy: shapes[original] for copy, original in report.duplicates}
    for name, expected in shapes.items():
        source = report.sources[name]
        if tuple(source.shape) != expected:
            report.problems.append(f"mis-shaped: {name} is {tuple(source.shape)}, config.json makes it {expected}")
    numbers = {
        name for name, place in report.weight_views.items() if not parameters[place.parameter].is_floating_point()
    }
    report.problems += dtype_problems(report.sources[name] for name in shapes if name not in numbers)
    if odd := [name for name in numbers if report.sources[name].dtype not in INT_DTYPES]:
        report.problems.append(f"stored as floats, but whole numbers were expected: {compact_names(odd)}")


def dtype_problems(sources: Iterable[TensorSource]) -> list[str]:
    kinds = {source.dtype for source in sources}
    wrong = sorted(str(kind) for kind in kinds if kind not in FLOAT_DTYPES and kind not in FLOAT_DTYPES.values())
    return (
        [f"stored as {', '.join(wrong)}: only plain float weights ({', '.join(FLOAT_DTYPES)}) are read"]
        if wrong
        else []
    )


def check_vocabulary_size(report: FolderReport) -> None:
    """The embedding needs a row for every token id."""
    if report.model is None or isinstance(report.model, ImageEncoder):
        return
    rows, biggest = report.model.config.vocab_size, largest_token_id(report.location.folder / "tokenizer.json")
    if biggest >= rows:
        ids = f"{rows} rows (ids 0 to {rows - 1})"
        report.problems.append(f"tokenizer.json has token id {biggest}, but the embedding has only {ids}")
    if beyond := [token for token in report.generation_config.eos_token_ids if not 0 <= token < rows]:
        report.notes.append(
            f"end-of-text ids {beyond} are outside the vocabulary of {rows}: they will never end a text"
        )


def largest_token_id(file: Path) -> int:
    """The largest id a tokenizer.json can give, -1 without one."""
    if not file.exists():
        return -1
    content = read_json(file, limit=128_000_000)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [token.get("id") for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    return max((i for i in [*ids, *added] if type(i) is int), default=-1)


def main_dtype(sources: Mapping[str, TensorSource]) -> torch.dtype:
    """The dtype of the largest tensor of plain floats."""
    floats = [source for source in sources.values() if isinstance(source, Tensor) or source.dtype in FLOAT_DTYPES]
    largest = max(floats, key=lambda source: source.nbytes)
    return largest.dtype if isinstance(largest, Tensor) else FLOAT_DTYPES[largest.dtype]
