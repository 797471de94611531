"""Loads a model from a published folder, the hub, or a run of ours; saves one so that transformers and vLLM load it.

Loading: validate the folder, stop with one error that has everything wrong, else map each parameter into its file where
possible (`mmap.py`), give the others memory and read each tensor into its place. Saving: write a staged folder, then
one rename, so that a half-written model is never there under its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_quest.atomic_dirs import atomic_dir
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.files import atomic_write_json, write_json, write_text
from llm_quest.hub.adapter_config import adapter_base
from llm_quest.hub.config import add_techniques, build_config_json, build_generation_json, config_dtype, read_json
from llm_quest.hub.folder_report import FolderReport, TensorSource
from llm_quest.hub.load_adapter import load_adapter
from llm_quest.hub.locate import locate_model, offline_error
from llm_quest.hub.mmap import memory_map_parameters
from llm_quest.hub.model_card import Readme
from llm_quest.hub.packed_weights import PackedTensor, read_packed_into
from llm_quest.hub.safetensors_io import FLOAT_DTYPES, StoredTensor, count_non_finite, read_into
from llm_quest.hub.validate import main_dtype, validate_folder
from llm_quest.hub.weight_files import TECHNIQUES_FILE
from llm_quest.hub.weight_map import export_weight_map, technique_parameters, weight_views
from llm_quest.layers.initialize import float32_parameters, materialize, parameter_dtype
from llm_quest.models.build import dtype_from_name, family_of
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.model_spec import techniques_to_json
from llm_quest.techniques.score_head import find_score_head, read_length
from llm_quest.tensor_files import HugePageSlabs, nbytes, write_tensors

if TYPE_CHECKING:
    from llm_quest.data.images import ImageProcessor
    from llm_quest.data.tokenizer import Tokenizer
from llm_quest.hub.load_tokenizer import check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)
NUM_READERS = 2
ALLOW_PICKLE = "LLM_QUEST_ALLOW_PICKLE"
SAVED_FILES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json|README\.md"
    r"|techniques\.safetensors|model(-\d+-of-\d+)?\.safetensors|chat_template\.jinja|vocab\.json|merges\.txt"
)


def load(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    allow_pickle: bool | None = None,
    aligned: bool = False,
    vision: bool = False,
) -> Decoder:
    """Load a model in eval mode, with `model.generation_config` as published.

    name_or_path: a folder with config.json, a run folder of ours (its newest checkpoint), one of its checkpoints, a
    PEFT adapter (with the base that it names), a GGUF file, or a hub id. dtype None: as config.json says, else as the
    weights are stored. On the host and in the stored dtype weights are mapped, not read: replace or delete their file
    as you like, but don't cut it short in place. aligned: weights that do not lie in row order from a 64-byte boundary
    on are copied until they do, as in a model that was built; then the same weights give the same bits, whatever file
    they come from. vision: of a model of several parts (Gemma 3, Qwen3.5) the whole, which reads images; otherwise, and
    with an adapter, its text part. allow_pickle: read pytorch_model.bin where there are no safetensors, with
    weights_only; None: as `quest --allow-pickle` says. Harmless oddities, such as a part that was left out, are logged
    as notes. Raises DataError whose `problems` are *all* that is wrong (missing, unexpected, mis-shaped tensors;
    damaged files; a config no family computes; in a folder where none of these is, non-finite numbers), MissingError
    offline."""
    device, requested_dtype = require_device(device), parse_dtype(dtype)
    allow_pickle = os.environ.get(ALLOW_PICKLE) == "1" if allow_pickle is None else allow_pickle
    if (base := adapter_base(name_or_path)) is not None:
        return load_adapter(
            load(base, device=device, dtype=requested_dtype, allow_pickle=allow_pickle, aligned=aligned), name_or_path
        ).eval()
    location = locate_model(name_or_path, revision=revision, allow_pickle=allow_pickle)
    report = validate_folder(location, allow_pickle=allow_pickle, vision=vision)
    if location.from_hub and not report.sources and not allow_pickle:
        raise offline_error(location.name, "model.safetensors", "")
    raise_problems(report.problems, location.name)
    assert report.model is not None
    for note in report.notes:
        logger.warning("note: %s: %s", location.name, note)
    dtype = requested_dtype or config_dtype(report.hf_config) or main_dtype(report.sources)
    parameters = dict(report.model.named_parameters())
    on_host, float32_names = device.type == "cpu", float32_parameters(report.model)
    dtypes = {name: parameter_dtype(parameter, dtype, float32_names) for name, parameter in parameters.items()}
    mapped = (
        memory_map_parameters(parameters, report.weight_views, report.sources, dtypes, aligned=aligned)
        if on_host
        else {}
    )
    materialize(report.model, device, dtype, HugePageSlabs(), mapped)
    raise_problems(read_weights(report, mapped), location.name, "quest inspect --weights")
    report.model.generation_config = report.generation_config
    return report.model.eval()


def read_weights(report: FolderReport, mapped: Mapping[str, Tensor]) -> list[str]:
    """Read every tensor into its place; return the problems that only numbers show: tensors that are not finite, second
    copies that differ. mapped: parameters that are mapped into their files.

    Two threads: one reads while the other checks; both release the GIL."""
    assert report.model is not None
    parameters = {name: parameter.detach() for name, parameter in report.model.named_parameters()}
    targets = {name: place.view(parameters[place.parameter]) for name, place in report.weight_views.items()}

    def read(name: str) -> int:
        is_mapped = report.weight_views[name].parameter in mapped
        return count_non_finite(targets[name]) if is_mapped else read_source(report.sources[name], targets[name])

    with ThreadPoolExecutor(max_workers=NUM_READERS) as pool:
        bad = list(pool.map(read, targets))
    problems = [f"not finite: {name} ({count:,} numbers)" for name, count in zip(targets, bad, strict=True) if count]
    for copy, original in report.duplicates:
        again = torch.empty_like(targets[original])
        read_source(report.sources[copy], again)
        if not torch.equal(again, targets[original]):
            problems.append(f"{copy} differs from {original}, but config.json says that they are tied")
    return problems


def find_non_finite(sources: Mapping[str, TensorSource]) -> list[str]:
    """Find the stored tensors with numbers that are not finite, whatever else is wrong with their folder."""
    problems = []
    for name, source in sources.items():
        if isinstance(source, StoredTensor) and source.dtype not in FLOAT_DTYPES:
            continue
        with contextlib.suppress(DataError):  # of a damaged file, which is a problem of its own
            if count := read_source(source, torch.empty(tuple(source.shape))):
                problems.append(f"not finite: {name} ({count:,} numbers)")
    return problems


def read_source(source: TensorSource, out: Tensor) -> int:
    """Read a tensor into `out`; return how many of its numbers are not finite."""
    if isinstance(source, Tensor):
        out.copy_(source.reshape(out.shape))
        return count_non_finite(source)
    return read_packed_into(source, out) if isinstance(source, PackedTensor) else read_into(source, out)


def raise_problems(problems: Sequence[str], name: str, listed_by: str = "quest inspect") -> None:
    """Raise one DataError for all problems. listed_by: the command that lists them."""
    if problems:
        head, *others = dict.fromkeys(" ".join(problem.split()) for problem in problems)
        text = "\n".join([f"{name} cannot be loaded: {head}", *(f"- {other}" for other in others)])
        raise DataError(text, list_all=f"{listed_by} {shlex.quote(name)} lists all")


def save(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    preprocess: ImageProcessor | None = None,
    generation_config: GenerationConfig | None = None,
    readme: Readme | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Save a Hugging Face folder: config.json (old and new spelling), model.safetensors or shards with their index,
    generation_config.json, the tokenizer's files, preprocessor_config.json (preprocess: how its images are made),
    README.md. A tied head is left out. generation_config None: the model's own, else the tokenizer's ids. What
    techniques added goes to techniques.safetensors, their list to config.json (`hub.config.add_techniques`).

    Raises UsageError for a folder that is not empty (overwrite=True replaces a saved model, and nothing else), for a
    model whose weights have no published form, for token ids beyond the vocabulary; ResourceError where the disk is
    full."""
    family = family_of(model.config)
    generation_config = generation_config or model.generation_config or generation_config_from_tokenizer(tokenizer)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.vocab_size)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names, techniques = family.weight_map(model.config), model.spec.techniques
    technique_names = technique_parameters(model, names) if techniques else set()
    table = weight_views(model, export_weight_map(model, names))
    stored = {name: place.as_stored(parameters[place.parameter]) for name, place in table.items()}
    extra, tensors = (
        {n: t for n, t in stored.items() if n in technique_names},
        {n: t for n, t in stored.items() if n not in technique_names},
    )
    tensors |= {
        copy: tensors[weight] for copy, weight in family.duplicate_weights(model.config).items() if weight in tensors
    }
    total = sum(map(nbytes, stored.values()))
    dtype = max(tensors.values(), key=nbytes).dtype
    with atomic_dir(
        folder,
        overwrite=overwrite,
        replaceable=lambda name: bool(SAVED_FILES.fullmatch(name)),
        required_bytes=total + 2**20,
    ) as stage:
        write_json(
            stage / "config.json",
            add_techniques(build_config_json(model, family, generation_config, dtype), techniques),
        )
        write_json(stage / "generation_config.json", build_generation_json(generation_config or GenerationConfig()))
        write_text(stage / "README.md", (readme or Readme()).render(model, family, tokenizer))
        if tokenizer is not None:
            tokenizer.save(stage, model_max_length=read_length(model, tokenizer.model_max_length))
        if preprocess is not None:
            from llm_quest.data.preprocessor_config import build_preprocessor_config

            write_json(stage / "preprocessor_config.json", build_preprocessor_config(preprocess))
        write_weights(stage, tensors, parse_size(max_shard_size))
        if extra:
            write_tensors(stage / TECHNIQUES_FILE, extra)
    return Path(folder)


def write_weights(stage: Path, tensors: Mapping[str, Tensor], limit: int) -> None:
    """Write one file, or shards of at most `limit` bytes (a larger tensor has one to itself) and an index."""
    parts = list(split_shards(tensors, limit))
    if len(parts) == 1:
        return write_tensors(stage / "model.safetensors", tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        write_tensors(stage / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = {
        "total_parameters": sum(t.numel() for t in tensors.values()),
        "total_size": sum(map(nbytes, tensors.values())),
    }
    return write_json(stage / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def split_shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Split the names, in order, into shards of at most `limit` bytes."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + nbytes(tensor) > limit:
            yield part
            part, size = [], 0
        part.append(name)
        size += nbytes(tensor)
    yield part


def load_model_and_tokenizer(
    name_or_path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    vision: bool = False,
) -> tuple[Decoder, Tokenizer]:
    """Load a language model with its tokenizer; vision: see `load`. UsageError for a model whose head gives scores
    instead."""
    model = require_language_model(load(name_or_path, device=device, dtype=dtype, vision=vision), name_or_path)
    tokenizer = load_tokenizer(name_or_path)
    if (head := find_score_head(model)) is not None:
        raise UsageError(
            f"{name_or_path} gives {head.outputs} numbers and no text: it is a reward model or a classifier"
        )
    return model, tokenizer


def require_language_model(model: Any, name_or_path: str | Path) -> Any:
    """Return the model; UsageError for one that is no language model (an image encoder, a CLIP)."""
    if not isinstance(model, Decoder | VisionLanguageModel):
        raise UsageError(
            f"{name_or_path} writes no text: it is a {model.spec.family}; quest show {model.spec.family} describes it"
        )
    return model


def read_model_config(name_or_path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The contents of config.json of a published folder or hub id, of a run's model.json, as they stand there, or of a
    GGUF file's keys."""
    location = locate_model(name_or_path, revision=revision)
    if location.gguf_file is not None:
        from llm_quest.hub.gguf_load import file_config, open_model_file

        return file_config(open_model_file(location.gguf_file))[0]
    if location.run_dir is not None:
        return dict(read_json(location.run_dir / "model.json").get("config") or {})
    return read_json(location.folder / "config.json")


def write_model_json(run: str | Path, model: Decoder) -> None:
    """Write model.json of a run folder, the config of its checkpoints. `load(run)` reads it."""
    family = family_of(model.config)
    config = family.publish(model.config)
    generation = build_generation_json(model.generation_config or GenerationConfig())
    techniques = techniques_to_json(model.spec.techniques, TECHNIQUES)
    content = {"family": family.name, "config": config, "techniques": techniques, "generation": generation}
    atomic_write_json(Path(run) / "model.json", content)


def require_device(device: torch.device | str) -> torch.device:
    """The device. MissingError if a tensor cannot be made on it."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise MissingError(f"device {str(device)!r} is not there: {reason}; use 'cpu'") from None


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype) or dtype is None:
        return dtype
    return dtype_from_name(dtype)


def parse_size(size: int | str) -> int:
    """Parse a size in bytes: 5000000, '5GB' (decimal) or '5GiB' (binary)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"size {size!r} is not understood: a number of bytes, or like '5GB', '500MiB'")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def generation_config_from_tokenizer(tokenizer: Tokenizer | None) -> GenerationConfig | None:
    return (
        None
        if tokenizer is None
        else GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_ids=tuple(tokenizer.eos_token_ids))
    )
