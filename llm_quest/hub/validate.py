"""Validates a model folder: finds its content and all of its problems before any weights are read.

Loading requires a folder without problems; `inspect` prints them. Nothing is allocated here: shapes come from the
files' headers and from a model assembled on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.contracts import Technique
from llm_quest.errors import DataError
from llm_quest.hub.config import family_for, parse_hf_config, read_json
from llm_quest.hub.folder_report import FolderReport, TensorSource, read_configs
from llm_quest.hub.layouts import canonical_sources, fused_experts, part_of_several
from llm_quest.hub.locate import ModelLocation
from llm_quest.hub.packed_weights import PackedTensor, join_packed
from llm_quest.hub.safetensors_io import FLOAT_DTYPES, INT_DTYPES, equal_tensors
from llm_quest.hub.weight_files import read_sources
from llm_quest.hub.weight_map import (
    SCORE,
    WeightView,
    compact_names,
    export_weight_map,
    identity_weight_map,
    weight_views,
)
from llm_quest.layers.linear import LMHead
from llm_quest.models import FAMILIES, VISION_FAMILIES
from llm_quest.models.build import SkipInit, build_meta_model
from llm_quest.models.decoder import Decoder
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.weight_names import published_names
from llm_quest.techniques.model_spec import replay_techniques
from llm_quest.techniques.score_head import PROBLEM_TYPES, ScoreHead

LM_HEAD = "lm_head.weight"


def validate_folder(location: ModelLocation, *, allow_pickle: bool = False, vision: bool = False) -> FolderReport:
    """Validate a folder; problems are collected, never raised. vision: keep the image part of a language model that has
    one."""
    report = FolderReport(location)
    steps = (
        read_configs,
        lambda s: read_sources(s, allow_pickle),
        lambda s: build_report_model(s, vision),
        match_names,
        check_shapes,
        check_vocabulary_size,
    )
    for step in steps:
        try:
            step(report)
        except DataError as error:
            report.problems += error.problems
    return report


def build_report_model(report: FolderReport, vision: bool) -> None:
    """Find the family, its config, and the model on the meta device. DataError for more layers than stored tensors."""
    if not report.hf_config:
        return  # read_configs said why
    if quantization := report.hf_config.get("quantization_config"):
        report.sources = join_packed(report.sources, quantization)
    reads_images = any(family.matches(report.hf_config) for family in VISION_FAMILIES)
    part = part_of_several(report.hf_config, (*FAMILIES, *VISION_FAMILIES))
    if part is not None and not (reads_images and (vision or report.location.run_dir is not None)):
        report.hf_config, note = part
        report.notes.append(note)
    report.family = family_for(report.hf_config)
    config, problems = parse_hf_config(report.family, report.hf_config)
    report.problems += problems
    if config is None or problems or not report.sources:
        return
    if config.num_hidden_layers > len(report.sources):
        raise DataError(
            f"config.json: {config.num_hidden_layers:,} layers, but the files hold only {len(report.sources)} tensors"
        )
    is_published = report.location.run_dir is None and report.location.gguf_file is None
    if is_published:
        report.sources, notes = canonical_sources(report.sources, report.family, config)
        report.notes += notes
    exact = not is_published or report.techniques  # our own format, which is explicit
    if not exact:
        config = untie_own_head(report, report.family.resolve_config(config, report.sources))
        report.techniques = find_published_score_head(report)
    try:
        report.model = build_meta_model(config)
        report.model = replay_on_meta(report.model, report.techniques)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        report.model = None
        raise DataError(f"config.json: no model can be made of it: {str(error).splitlines()[0]}") from None


def find_published_score_head(report: FolderReport) -> list[Technique]:
    """The score head of a ...ForSequenceClassification (a reward model has one output), else nothing."""
    score = report.sources.get(SCORE)
    if score is None or len(score.shape) != 2:
        return []
    names = report.hf_config.get("id2label")
    labels = tuple(str(names[key]) for key in names) if isinstance(names, Mapping) else ()
    is_named = len(labels) == score.shape[0] and labels != tuple(f"LABEL_{i}" for i in range(len(labels)))
    head = ScoreHead(score.shape[0], labels if is_named else ())
    kind: Any = report.hf_config.get("problem_type")
    return [replace(head, problem_type=kind) if head.outputs > 1 and kind in PROBLEM_TYPES else head]


def untie_own_head(report: FolderReport, config: Any) -> Any:
    """Untie the config if the files hold a head that differs from the embedding, as transformers does. If they hold the
    head alone, it becomes the embedding."""
    if not getattr(config, "tie_word_embeddings", False) or LM_HEAD not in report.sources:
        return config
    assert report.family is not None
    (embedding,) = published_names([report.family.weight_map(config)["embed.token.weight"]])
    if embedding not in report.sources:
        report.sources[embedding] = report.sources.pop(LM_HEAD)
        return config
    if equal_tensors(report.sources[LM_HEAD], report.sources[embedding]):
        return config
    report.notes.append(
        f"{LM_HEAD} differs from {embedding}, though config.json says that they are tied: it is a head of its own"
    )
    return replace(config, tie_word_embeddings=False)


def replay_on_meta(model: Decoder, techniques: Sequence[Technique]) -> Decoder:
    """Apply the recorded techniques on the meta device."""
    with torch.device("meta"), SkipInit():
        return replay_techniques(model, techniques)


def match_names(report: FolderReport) -> None:
    """Match every published tensor with its view of the model; missing and unexpected ones are problems."""
    if report.model is None or report.family is None:
        return
    if report.location.gguf_file is not None:
        from llm_quest.hub.gguf_load import match_tensors

        report.sources, views = match_tensors(report.model, report.sources)  # type: ignore[assignment, arg-type]
        compare_names(report, views)
        return
    own_format = report.location.run_dir is not None
    names = (
        identity_weight_map(report.model)
        if own_format
        else export_weight_map(report.model, report.family.weight_map(report.model.config))
    )
    if not own_format:
        fused = fused_experts(names)
        names = {ours: fused[ours] if fused.get(ours) in report.sources else name for ours, name in names.items()}
    compare_names(report, weight_views(report.model, names))


def compare_names(report: FolderReport, views: Mapping[str, WeightView]) -> None:
    """Add problems for missing and unexpected tensors."""
    assert report.family is not None
    missing = [name for name in views if name not in report.sources]
    report.weight_views = {name: place for name, place in views.items() if name in report.sources}
    report.duplicates = find_duplicates(report)
    copies = {copy for copy, _ in report.duplicates}
    extra = [n for n in report.sources if n not in views and n not in copies and not report.family.ignores(n)]
    if missing:
        report.problems.append(f"missing: {compact_names(missing)}{headless_hint(missing, report.hf_config)}")
    if extra:
        is_scale = any(name.endswith(("_scale_inv", ".weight_scale")) for name in extra)
        hint = " (scales of fp8 weights, of which config.json says nothing in quantization_config)" if is_scale else ""
        hint += " (a label for each token: ...ForTokenClassification is not computed)" if "score.bias" in extra else ""
        report.problems.append(f"unexpected: {compact_names(extra)}{hint}")


def headless_hint(missing: Sequence[str], hf_config: Mapping[str, Any]) -> str:
    """A hint for files in which only the head is missing."""
    if missing != [LM_HEAD]:
        return ""
    kinds = ", ".join(map(str, hf_config.get("architectures") or ())) or "a class without a head"
    return f" (saved by {kinds}, without an output matrix: save the ...ForCausalLM with transformers)"


def find_duplicates(report: FolderReport) -> tuple[tuple[str, str], ...]:
    """(copy, original) of tensors that are stored twice, such as a tied head; that they are equal is checked when they
    are read."""
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


def check_shapes(report: FolderReport) -> None:
    """Add problems for stored tensors of another shape or kind than the model's."""
    if report.model is None:
        return
    parameters = dict(report.model.named_parameters())
    shapes = {name: place.shape(parameters[place.parameter]) for name, place in report.weight_views.items()}
    shapes |= {copy: shapes[original] for copy, original in report.duplicates}
    wrong: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, expected in shapes.items():
        if (stored := tuple(report.sources[name].shape)) != expected:
            wrong.setdefault((stored, expected), []).append(name)
    for (stored, expected), names in wrong.items():
        verb = "is" if len(names) == 1 else "are"
        report.problems.append(f"mis-shaped: {compact_names(names)} {verb} {stored}, config.json makes it {expected}")
    numbers = {
        name for name, place in report.weight_views.items() if not parameters[place.parameter].is_floating_point()
    }
    report.problems += dtype_problems(report.sources[name] for name in shapes if name not in numbers)
    if odd := [name for name in numbers if report.sources[name].dtype not in INT_DTYPES]:
        report.problems.append(f"stored as floats, but whole numbers were expected: {compact_names(odd)}")


def dtype_problems(sources: Iterable[TensorSource]) -> list[str]:
    kinds = {source.dtype for source in sources if not isinstance(source, PackedTensor)}
    wrong = sorted(str(kind) for kind in kinds if kind not in FLOAT_DTYPES and kind not in FLOAT_DTYPES.values())
    return (
        [f"stored as {', '.join(wrong)}: only plain float weights ({', '.join(FLOAT_DTYPES)}) are read"]
        if wrong
        else []
    )


def check_vocabulary_size(report: FolderReport) -> None:
    """Add problems for token ids without a row in the embedding."""
    if report.model is None or isinstance(report.model, ImageEncoder):
        return
    rows = report.model.config.vocab_size
    if report.location.gguf_file is not None:
        return
    biggest, added = largest_token_ids(report.location.folder / "tokenizer.json")
    ids = f"the embedding has only {rows} rows (ids 0 to {rows - 1})"
    if biggest >= rows:
        report.problems.append(f"tokenizer.json has token id {biggest}, but {ids}")
    elif beyond_rows := {token: name for token, name in added.items() if token >= rows}:
        listed = ", ".join(f"{name} ({token})" for token, name in sorted(beyond_rows.items())[:4])
        report.notes.append(f"added tokens without a row, which a prompt may not hold: {listed}; {ids}")
    if beyond := [token for token in report.generation_config.eos_token_ids if not 0 <= token < rows]:
        report.notes.append(
            f"end-of-text ids {beyond} are outside the vocabulary of {rows}: they will never end a text"
        )


def largest_token_ids(file: Path) -> tuple[int, dict[int, str]]:
    """The largest id of the vocabulary proper of a tokenizer.json (-1 without one), and the added tokens beyond it."""
    if not file.exists():
        return -1, {}
    content = read_json(file, limit=128_000_000)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    largest = max((i for i in ids if type(i) is int), default=-1)
    added = [token for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    numbered = {token["id"]: str(token.get("content")) for token in added if type(token.get("id")) is int}
    return largest, {token: name for token, name in numbered.items() if token > largest}


def main_dtype(sources: Mapping[str, TensorSource]) -> torch.dtype:
    """The dtype of the largest tensor of plain floats."""
    floats = [source for source in sources.values() if isinstance(source, Tensor) or source.dtype in FLOAT_DTYPES]
    largest = max(floats, key=lambda source: source.nbytes)
    return largest.dtype if isinstance(largest, Tensor) else FLOAT_DTYPES[largest.dtype]
