"""Look at a folder without loading it (`inspect_folder`); prove against transformers that it is computed rightly
(`verify`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.data.tokenizer_files import has_tokenizer
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.hub.config import read_json
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.hub.locate import ModelLocation, locate_model
from llm_quest.hub.safetensors_io import FLOAT_DTYPES
from llm_quest.hub.validate import FolderReport, TensorSource, validate_folder
from llm_quest.hub.weight_map import compact_names
from llm_quest.models.build import count_parameters
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.model_spec import all_exportable

DTYPE_NAMES = {theirs: name for name, theirs in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inspection:
    """What a folder holds. problems: why it cannot be loaded (none: it can). notes: what is odd but harmless.
    flags: conditions in the chat template that look at what a message says, where a backdoor could hide."""

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
        """For people: layers are drawn together."""
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


def inspect_folder(name_or_path: str | Path) -> Inspection:
    """Read the headers and the JSON, not the weights. Raises only where there is no folder to look at."""
    location = locate_model(name_or_path)
    report = validate_folder(location)
    files = {
        str(p.relative_to(location.folder)): p.stat().st_size for p in sorted(location.folder.rglob("*")) if p.is_file()
    }
    published = dict(report.hf_config)
    template = find_chat_template(report)
    if report.techniques:
        names = {kind: name for name, kind in TECHNIQUES.items()}
        report.notes.append(f"techniques, in order: {', '.join(names[type(one)] for one in report.techniques)}")
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
        tensors=tuple(TensorInfo(name, dtype_name(one), tuple(one.shape)) for name, one in report.sources.items()),
        tokenizer=tokenizer_facts(report),
        chat_template=template,
        flags=content_conditions(template or ""),
        notes=tuple(report.notes),
        problems=tuple(report.problems),
    )


def dtype_name(source: TensorSource) -> str:
    return DTYPE_NAMES.get(source.dtype, str(source.dtype)) if isinstance(source, Tensor) else source.dtype


def tokenizer_facts(report: FolderReport) -> dict[str, Any] | None:
    """Kind, size, ends; a tokenizer that cannot be read is a problem of the folder."""
    try:
        tokenizer = load_tokenizer(tokenizer_folder(report.location))
    except DataError as error:
        if has_tokenizer(report.location.folder):
            report.problems.append(str(error))
        return None
    kind, ends = type(tokenizer.backend_tokenizer.model).__name__, list(tokenizer.eos_token_ids)
    return {"kind": kind, "tokens": tokenizer.vocab_size, "bos": tokenizer.bos_token_id, "eos": ends}


def tokenizer_folder(location: ModelLocation) -> Path:
    return location.run_dir or location.folder


def find_chat_template(report: FolderReport) -> str | None:
    """From its own file (new) or from tokenizer_config.json (old)."""
    alone, settings = report.location.folder / "chat_template.jinja", report.location.folder / "tokenizer_config.json"
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")
    try:
        found = read_json(settings).get("chat_template") if settings.exists() else None
    except DataError as error:
        report.notes.append(str(error))
        return None
    if isinstance(found, list):
        found = "\n".join(str(one.get("template")) for one in found if isinstance(one, dict))
    return found if isinstance(found, str) else None


def content_conditions(template: str) -> tuple[str, ...]:
    """Conditions on a message's content: a template may be honest about roles, and still change its mind at a magic
    word."""
    conditions = re.findall(r"\{%-?\s*(?:el)?if\s+(.*?)-?%\}", template, flags=re.DOTALL)
    inline = re.findall(r"\{\{.*?\bif\b(.*?)(?:\belse\b|\}\})", template, flags=re.DOTALL)
    suspicious = r"content[^%]*(==|!=|\bin\b|startswith|endswith|find|match)|(==|!=|\bin\b)[^%]*content"
    return tuple(" ".join(c.split()) for c in [*conditions, *inline] if re.search(suspicious, c))


@dataclass(frozen=True)
class Verification:
    """How far our logits are from transformers' (float32, CPU). allowed: grows with the size of the logits."""

    name: str
    difference: float
    difference_padded: float
    largest_logit: float
    allowed: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    tokenizer: str
    passed: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        keys = [f"transformers misses {name}" for name in self.missing]
        keys += [f"transformers does not expect {name}" for name in self.unexpected]
        size = f"logits up to {self.largest_logit:.1f}, allowed {self.allowed:.1e}"
        return [
            f"{self.name}: {'equal' if self.passed else 'DIFFERENT'}",
            f"  largest logit difference        {self.difference:.2e}   ({size})",
            f"  the same, left-padded batch     {self.difference_padded:.2e}",
            f"  tokenizer                       {self.tokenizer}",
            *(f"  {key}" for key in keys),
        ]


def compare_with_transformers(name_or_path: str | Path, *, seed: int = 0) -> Verification:
    """Load a published folder here and in transformers, compare logits on random tokens and ids on sample texts.

    Raises MissingError without transformers; UsageError for a run folder (export it first)."""
    location = locate_model(name_or_path)
    if location.run_dir is not None:
        raise UsageError(
            f"{name_or_path} is a run of ours, which transformers cannot read: export it, then verify the export"
        )
    transformers = import_transformers()
    ours = load(location.folder, dtype="float32")
    if not all_exportable(ours.spec.techniques):
        made = ", ".join(type(technique).__name__ for technique in ours.spec.techniques)
        raise UsageError(
            f"{name_or_path} was made with {made}, which transformers does not compute: there is no one to compare"
        )
    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = read(location.folder, dtype=torch.float32, output_loading_info=True)
    tokens = random_input_ids(ours, rows=2, seed=seed)
    with torch.no_grad():
        reference = theirs.eval()(input_ids=tokens, use_cache=False).logits
        difference = float((ours(tokens) - reference).abs().max())
        padded = padded_difference(ours, theirs, tokens)
    largest = float(reference.abs().max())
    allowed = 2e-5 * max(1.0, largest / 4)
    missing, unexpected = (tuple(sorted(map(str, info[key]))) for key in ("missing_keys", "unexpected_keys"))
    tokenizer_result = compare_tokenizers(location, transformers)
    good = (
        max(difference, padded) <= allowed and not missing + unexpected and not tokenizer_result.startswith("DIFFERENT")
    )
    return Verification(
        location.name, difference, padded, largest, allowed, missing, unexpected, tokenizer_result, good
    )


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingError("verify compares with transformers, which is missing: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def random_input_ids(model: Decoder, *, rows: int, seed: int) -> Tensor:
    """(rows, T), long enough for scaled rotations to show."""
    length = min(model.config.max_position_embeddings, 96)
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded_difference(ours: Decoder, theirs: Any, input_ids: Tensor) -> float:
    """The second row a third shorter, padded on the left; only real tokens are compared."""
    non_padding = torch.ones_like(input_ids, dtype=torch.bool)
    non_padding[1, : math.ceil(input_ids.shape[1] / 3)] = False
    positions = non_padding.cumsum(dim=1) - 1
    mine = ours(input_ids, Scope(positions.masked_fill(~non_padding, -1)))
    seen = {"attention_mask": non_padding.long(), "position_ids": positions.clamp(min=0)}
    other = theirs(input_ids=input_ids, use_cache=False, **seen).logits
    return float((mine - other)[non_padding].abs().max())


def compare_tokenizers(location: ModelLocation, transformers: Any) -> str:
    """Ids of the sample texts, here and there."""
    if not has_tokenizer(location.folder):
        return "none in this folder"
    ours, theirs = load_tokenizer(location.folder), transformers.AutoTokenizer.from_pretrained(location.folder)
    there: Callable[[str], list[int]] = lambda text: theirs.encode(text, add_special_tokens=False)  # noqa: E731
    wrong = [text for text in SAMPLES if ours.encode(text, add_special_tokens=False) != there(text)]
    return f"DIFFERENT on {wrong[0]!r}" if wrong else f"equal ids on {len(SAMPLES)} sample texts"


SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\nlines \r\n",
    "def f(x):\n    return x ** 2  # comment",
    "3.14159 and 1,000,000 and 2026-11-24",
    "Grüße, naïve café; Ελληνικά; русский; 日本語; العربية",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and zero\u200bwidth",
    "",
    " ",
)
