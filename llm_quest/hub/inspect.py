"""Inspects a model folder without loading it (`quest inspect`)."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.data.tokenizer_files import has_tokenizer
from llm_quest.errors import DataError
from llm_quest.hub.config import read_json
from llm_quest.hub.folder_report import FolderReport, TensorSource
from llm_quest.hub.load_save import ALLOW_PICKLE, find_non_finite, load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.locate import ModelLocation, locate_model
from llm_quest.hub.validate import validate_folder
from llm_quest.hub.weight_map import compact_names
from llm_quest.models.build import count_parameters
from llm_quest.techniques import TECHNIQUES
from llm_quest.tensor_files import DTYPE_NAMES


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """The content of a model folder. problems: why it cannot be loaded (none: it can). notes: harmless oddities. flags:
    conditions in the chat template that look at what a message says, where a backdoor could hide."""

    name: str
    model_type: str | None
    family: str | None
    parameters: int | None
    config: dict[str, Any]
    generation_config: dict[str, Any]
    files: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    tokenizer: dict[str, Any] | None
    chat_template: str | None
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as lines; equal layers are drawn together."""
        size = "unknown" if self.parameters is None else f"{self.parameters:,}"
        lines = [f"{self.name}: {self.model_type} (family {self.family or 'none'}), {size} parameters", "", "files"]
        lines += [f"  {name:<40} {size:>15,} bytes" for name, size in self.files.items()]
        lines += ["", "config", *(f"  {key}: {value}" for key, value in self.config.items())]
        lines += ["", f"tensors ({len(self.tensors)})", *self.tensor_lines()]
        facts = self.tokenizer or {"none": "no tokenizer.json"}
        lines += ["", "tokenizer", *(f"  {key}: {value}" for key, value in facts.items())]
        if self.chat_template is not None:
            lines += ["", "chat template", *(f"  | {line}" for line in self.chat_template.splitlines())]
            lines += [f"  ! looks at what a message says: {flag}" for flag in self.flags]
        lines += ["", *(f"note: {note}" for note in self.notes)]
        return lines + ([f"problem: {problem}" for problem in self.problems] or ["no problems: this loads"])

    def tensor_lines(self) -> list[str]:
        groups: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
        for tensor in self.tensors:
            kind = re.sub(r"\.\d+\.", ".{}.", tensor.name, count=1)
            groups.setdefault((tensor.dtype, tensor.shape, kind), []).append(tensor.name)
        return [f"  {compact_names(names):<56} {dtype:<5} {list(shape)}" for (dtype, shape, _), names in groups.items()]


def inspect_folder(name_or_path: str | Path, *, check_weights: bool = False) -> Inspection:
    """Read the headers and the JSON, and with check_weights every number. Raises only if there is no folder."""
    location = locate_model(name_or_path)
    report = validate_folder(location, allow_pickle=os.environ.get(ALLOW_PICKLE) == "1", vision=True)
    lone = location.gguf_file
    files = (
        {lone.name: lone.stat().st_size}
        if lone is not None
        else {
            str(p.relative_to(location.folder)): p.stat().st_size
            for p in sorted(location.folder.rglob("*"))
            if p.is_file()
        }
    )
    if check_weights and report.problems:
        report.problems += find_non_finite(report.sources)
    elif check_weights:
        try:
            load(name_or_path, vision=True)
        except DataError as error:
            report.problems += (problem.removeprefix("- ") for problem in error.problems)
    published = dict(report.hf_config)
    template = find_chat_template(report)
    if report.techniques:
        names = {kind: name for name, kind in TECHNIQUES.items()}
        report.notes.append(
            f"techniques, in order: {', '.join(names[type(technique)] for technique in report.techniques)}"
        )
    if "auto_map" in published:
        report.notes.append(
            "config.json names code of its own (auto_map), which is never run: our own family file computes"
        )
    return Inspection(
        name=location.name,
        model_type=published.get("model_type"),
        family=report.family.name if report.family else None,
        parameters=count_parameters(report.model) if report.model else None,
        config=published,
        generation_config=asdict(report.generation_config),
        files=files,
        tensors=tuple(
            TensorInfo(name, dtype_name(source), tuple(source.shape)) for name, source in report.sources.items()
        ),
        tokenizer=tokenizer_facts(report),
        chat_template=template,
        flags=content_conditions(template or ""),
        notes=tuple(report.notes),
        problems=tuple(report.problems),
    )


def dtype_name(source: TensorSource) -> str:
    return DTYPE_NAMES.get(source.dtype, str(source.dtype)) if isinstance(source, Tensor) else source.dtype


def tokenizer_facts(report: FolderReport) -> dict[str, Any] | None:
    """Kind, size and end tokens of the tokenizer; one that cannot be read is a problem of the folder."""
    try:
        tokenizer = load_tokenizer(tokenizer_folder(report.location))
    except DataError as error:
        if report.location.gguf_file is not None or has_tokenizer(report.location.folder):
            report.problems += error.problems
        return None
    kind, ends = type(tokenizer.backend_tokenizer.model).__name__, list(tokenizer.eos_token_ids)
    return {"kind": kind, "tokens": tokenizer.vocab_size, "bos": tokenizer.bos_token_id, "eos": ends}


def tokenizer_folder(location: ModelLocation) -> Path:
    return location.gguf_file or location.run_dir or location.folder


def find_chat_template(report: FolderReport) -> str | None:
    """The chat template: from its own file (new), from tokenizer_config.json (old), or from a GGUF file."""
    if report.location.gguf_file is not None:
        try:
            return load_tokenizer(report.location.gguf_file).chat_template
        except DataError:
            return None
    alone, settings = report.location.folder / "chat_template.jinja", report.location.folder / "tokenizer_config.json"
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")
    try:
        template = read_json(settings).get("chat_template") if settings.exists() else None
    except DataError as error:
        report.notes.append(str(error))
        return None
    if isinstance(template, list):
        template = "\n".join(str(one.get("template")) for one in template if isinstance(one, dict))
    return template if isinstance(template, str) else None


def content_conditions(template: str) -> tuple[str, ...]:
    """Conditions on a message's content, where a template could react to a trigger word."""
    conditions = re.findall(r"\{%-?\s*(?:el)?if\s+(.*?)-?%\}", template, flags=re.DOTALL)
    inline = re.findall(r"\{\{.*?\bif\b(.*?)(?:\belse\b|\}\})", template, flags=re.DOTALL)
    suspicious = r"content[^%]*(==|!=|\bin\b|startswith|endswith|find|match)|(==|!=|\bin\b)[^%]*content"
    return tuple(" ".join(c.split()) for c in [*conditions, *inline] if re.search(suspicious, c))
