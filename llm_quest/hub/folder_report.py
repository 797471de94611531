"""FolderReport: the content of a model folder; and the reading of its configs, the first step of `hub/validate.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.contracts import Technique
from llm_quest.errors import DataError
from llm_quest.hub.config import parse_generation_config, read_json, split_techniques
from llm_quest.hub.locate import ModelLocation
from llm_quest.hub.packed_weights import PackedTensor
from llm_quest.hub.safetensors_io import StoredTensor
from llm_quest.hub.weight_map import WeightView
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.models.family import Family
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.model_spec import techniques_from_json

TensorSource = StoredTensor | PackedTensor | Tensor


@dataclass
class FolderReport:
    """The content of a model folder and its problems. sources: published name -> the stored tensor. model: on the meta
    device; None if the config is unusable. weight_views: name in the files -> its view of the model. duplicates:
    tensors stored twice, (copy, original). techniques: those its config says were applied. problems forbid loading;
    notes do not."""

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


def read_configs(report: FolderReport) -> None:
    """config.json (or our model.json, or a GGUF file's keys) and generation_config.json."""
    if report.location.gguf_file is not None:
        from llm_quest.hub.gguf_load import file_config, open_model_file

        report.hf_config, report.generation_config = file_config(open_model_file(report.location.gguf_file))
        return
    if report.location.run_dir is not None:
        report.hf_config, generation_json, technique_entries = read_model_json(report.location.run_dir / "model.json")
    else:
        report.hf_config, technique_entries = split_techniques(read_json(report.location.folder / "config.json"))
        advice_file = report.location.folder / "generation_config.json"
        generation_json = read_json(advice_file) if advice_file.exists() else {}
    report.generation_config = parse_generation_config(report.hf_config, generation_json)
    report.techniques = techniques_from_json(technique_entries, TECHNIQUES)


def read_model_json(file: Path) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """config, generation and techniques of a run's model.json. DataError where one is of another type."""
    content = read_json(file)
    parts: list[Any] = []
    for name, kind in (("config", dict), ("generation", dict), ("techniques", list)):
        part = content.get(name) or kind()
        inside = part if kind is list else []
        if not isinstance(part, kind) or not all(isinstance(one, Mapping) for one in inside):
            raise DataError(f"{file}: {name} is {part!r:.80}, expected {'objects' if inside else 'another type'}")
        parts.append(part)
    return parts[0], parts[1], parts[2]
