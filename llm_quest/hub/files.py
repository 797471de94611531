"""Load a model from a published folder, the hub, or a run of ours; save one so that transformers and vLLM load it.

Loading: survey the folder, stop with one error that lists everything wrong, else let each parameter lie in its file
where it can (`mapped`), give the others memory and read each tensor into its place. Saving: write a staged folder,
then one rename, so that a half-written model is never there under its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_quest.disk import replace_json, write_json, write_text
from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.hub import memory
from llm_quest.hub.adapters import load_adapter, underneath
from llm_quest.hub.config import carded, read_json, stored_dtype, write_config, write_generation
from llm_quest.hub.fetch import Found, find, offline
from llm_quest.hub.mapped import lying
from llm_quest.hub.names import added, places, published_names
from llm_quest.hub.readme import Readme
from llm_quest.hub.staging import staged
from llm_quest.hub.survey import ADDED, Source, Survey, common_dtype, survey
from llm_quest.hub.tensors import not_finite, read_into
from llm_quest.layers.initialize import materialize
from llm_quest.models.build import dtype_called, page_of
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.card import written
from llm_quest.tensor_files import nbytes, write_tensors

if TYPE_CHECKING:
    from llm_quest.data.images import Preprocess
    from llm_quest.data.tokenizer import Tokenizer

READERS = 2
WRITTEN = re.compile(
    r"(config|generation_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json|README\.md"
    r"|techniques\.safetensors|model(-\d+-of-\d+)?\.safetensors|chat_template\.jinja|vocab\.json|merges\.txt"
)


def load(
    where: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    aligned: bool = False,
) -> Decoder:
    """A Decoder in eval mode, with `model.generation` as published.

    where: a folder with config.json, a run folder of ours (its newest checkpoint), one of its checkpoints, a PEFT
    adapter (with the base that it names), or a hub id. dtype None: as config.json says, else as the weights are stored.
    On the host and in the stored dtype weights are mapped, not read: replace or delete their file as you like, but
    don't cut it short in place. aligned: weights that do not lie in row order from a 64-byte boundary on are copied
    until they do, as in a model that was built; then the same weights give the same bits, whatever file they come from.
    Raises DataError listing *all* that is wrong (missing, unexpected, mis-shaped, non-finite tensors; damaged files; a
    config no page computes), MissingError offline."""
    device, wanted = usable_device(device), parse_dtype(dtype)
    if (base := underneath(where)) is not None:
        return load_adapter(
            load(base, device=device, dtype=wanted, allow_pickle=allow_pickle, aligned=aligned), where
        ).eval()
    found = find(where, revision=revision, allow_pickle=allow_pickle)
    seen = survey(found, allow_pickle=allow_pickle)
    if found.from_hub and not seen.sources and not allow_pickle:
        raise offline(found.name, "model.safetensors", "")
    stop_at(seen.problems, found.name)
    assert seen.model is not None
    dtype = wanted or stored_dtype(seen.published) or common_dtype(seen.sources)
    parameters = dict(seen.model.named_parameters())
    on_host = device.type == "cpu"
    there = lying(parameters, seen.places, seen.sources, dtype, aligned=aligned) if on_host else {}
    materialize(seen.model, device, dtype, memory.empty, there)
    stop_at(read_all(seen, there), found.name)
    seen.model.generation = seen.generation
    return seen.model.eval()


def read_all(seen: Survey, there: Mapping[str, Tensor]) -> list[str]:
    """Every tensor into its place, and what only the numbers can tell: which are not finite, which second copies
    differ. there: parameters that lie in their files.

    Two at once: one reads while the other checks; both are out of Python's hands."""
    assert seen.model is not None
    parameters = {name: parameter.detach() for name, parameter in seen.model.named_parameters()}
    targets = {name: place.view(parameters[place.parameter]) for name, place in seen.places.items()}

    def read(name: str) -> int:
        lies = seen.places[name].parameter in there
        return not_finite(targets[name]) if lies else read_one(seen.sources[name], targets[name])

    with ThreadPoolExecutor(max_workers=READERS) as pool:
        bad = list(pool.map(read, targets))
    problems = [f"not finite: {name} ({count:,} numbers)" for name, count in zip(targets, bad, strict=True) if count]
    for copy, original in seen.twins:
        again = torch.empty_like(targets[original])
        read_one(seen.sources[copy], again)
        if not torch.equal(again, targets[original]):
            problems.append(f"{copy} differs from {original}, but config.json says that they are tied")
    return problems


def read_one(source: Source, out: Tensor) -> int:
    """Fill one place; how many numbers are not finite."""
    if isinstance(source, Tensor):
        out.copy_(source)
        return not_finite(source)
    return read_into(source, out)


def stop_at(problems: list[str], name: str) -> None:
    """One error for all of them."""
    if problems:
        listed = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n- {problem}" for problem in problems)
        raise DataError(f"{name} cannot be loaded:{listed}")


def save(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    preprocess: Preprocess | None = None,
    generation: GenerationDefaults | None = None,
    readme: Readme | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """A Hugging Face folder: config.json (old and new spelling), model.safetensors or shards with their index,
    generation_config.json, the tokenizer's files, preprocessor_config.json (preprocess: how its images are made),
    README.md. A tied head is left out. generation None: the model's own, else the tokenizer's ids.
    What techniques added goes to techniques.safetensors, the card to config.json (`hub.config.carded`).

    Raises UsageError for a folder that is not empty (overwrite=True replaces a saved model, and nothing else), for a
    model whose weights have no published form, for token ids beyond the vocabulary; ResourceError where the disk is
    full."""
    page = page_of(model.config)
    generation = generation or model.generation or from_tokenizer(tokenizer)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.vocab)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names, techniques = page.names(model.config), model.card.techniques
    ours = added(model, names) if techniques else set()
    table = places(model, published_names(model, names))
    stored = {name: place.view(parameters[place.parameter]) for name, place in table.items()}
    extra, tensors = {n: t for n, t in stored.items() if n in ours}, {n: t for n, t in stored.items() if n not in ours}
    tensors |= {copy: tensors[one] for copy, one in page.copies(model.config).items() if one in tensors}
    total = sum(map(nbytes, stored.values()))
    dtype = max(tensors.values(), key=nbytes).dtype
    with staged(
        folder, overwrite=overwrite, ours=lambda name: bool(WRITTEN.fullmatch(name)), needed=total + 2**20
    ) as stage:
        write_json(stage / "config.json", carded(write_config(model, page, generation, dtype), techniques))
        write_json(stage / "generation_config.json", write_generation(generation or GenerationDefaults()))
        write_text(stage / "README.md", (readme or Readme()).render(model, page))
        if tokenizer is not None:
            tokenizer.save(stage, model_max_length=model.config.context)
        if preprocess is not None:
            write_json(stage / "preprocessor_config.json", preprocess.publish())
        write_weights(stage, tensors, parse_size(max_shard_size))
        if extra:
            write_tensors(stage / ADDED, extra)
    return Path(folder)


def write_weights(stage: Path, tensors: Mapping[str, Tensor], limit: int) -> None:
    """One file, or shards of at most `limit` bytes (a larger tensor has one to itself) and an index."""
    parts = list(shards(tensors, limit))
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


def shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, cut where the next one would exceed the limit."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if part and size + nbytes(tensor) > limit:
            yield part
            part, size = [], 0
        part.append(name)
        size += nbytes(tensor)
    yield part


def load_tokenizer(where: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a published folder, a run, or a hub id. DataError where there is none."""
    from llm_quest.data.tokenizer import Tokenizer

    base = underneath(where)
    if base is not None and not (Path(where).expanduser() / "tokenizer.json").exists():
        return load_tokenizer(base)
    found = Found(Path(where), str(where)) if base is not None else find(where, revision=revision)
    homes = [found.folder] if found.run is None else [found.run, found.run / "tokenizer", found.folder]
    for home in homes:
        if (home / "tokenizer.json").exists() or (home / "vocab.json").exists():
            return Tokenizer.load(home)
    raise DataError(f"{where} has no tokenizer (no tokenizer.json, no vocab.json with merges.txt)")


def load_preprocess(where: str | Path, *, revision: str | None = None) -> Preprocess:
    """How the images of a published folder, a run, or a hub id are made. DataError where it is not said."""
    from llm_quest.data.images import read_preprocess

    found = find(where, revision=revision)
    for home in [found.folder] if found.run is None else [found.run, found.folder]:
        if (home / "preprocessor_config.json").exists():
            return read_preprocess(read_json(home / "preprocessor_config.json"))
    raise DataError(f"{where} has no preprocessor_config.json, which says how its images are made")


def write_model_json(run: str | Path, model: Decoder) -> None:
    """model.json of a run folder: which page and numbers its checkpoints belong to. `load(run)` reads it."""
    page = page_of(model.config)
    config = {"model_type": page.model_type, "architectures": [page.architecture]} | page.publish(model.config)
    generation = write_generation(model.generation or GenerationDefaults())
    techniques = written(model.card.techniques, TECHNIQUES)
    content = {"page": page.name, "config": config, "techniques": techniques, "generation": generation}
    replace_json(Path(run) / "model.json", content)


def usable_device(device: torch.device | str) -> torch.device:
    """The device, proved by putting one number there."""
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise MissingError(f"device {str(device)!r} is not there: {reason}; use 'cpu'") from None


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype) or dtype is None:
        return dtype
    return dtype_called(dtype)


def parse_size(size: int | str) -> int:
    """Bytes: 5000000, '5GB' (decimal) or '5GiB' (binary)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"size {size!r} is not understood: a number of bytes, or like '5GB', '500MiB'")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def from_tokenizer(tokenizer: Tokenizer | None) -> GenerationDefaults | None:
    return None if tokenizer is None else GenerationDefaults(bos=tokenizer.bos_id, eos=tuple(tokenizer.eos_ids))


def check_vocabulary(tokenizer: Tokenizer | None, rows: int) -> None:
    if tokenizer is not None and tokenizer.vocab_size > rows:
        largest = tokenizer.vocab_size - 1
        raise UsageError(
            f"the tokenizer has ids up to {largest}, the embedding only {rows} rows: they are not of one model"
        )
