"""Published layouts: the same weights under other names than those of transformers' text class today.

    stored by                                     name                                 read as
    AutoModel.save_pretrained                     layers.0.mlp.up_proj.weight          model.layers.0.mlp...
    torch.compile, DDP, FSDP, checkpointing       _orig_mod.model.layers.0, module.    model.layers.0
    a model of several parts (Gemma 3, Qwen3.5)   language_model.model.layers.0        model.layers.0
                                                  model.language_model.layers.0        model.layers.0
    CLIP with its text encoder                    vision_model.encoder                 as it is; the rest is left out

A name is changed only into one that the family's weight map has, so that no layout can hide a tensor that does not
belong: what has no place keeps its name and is reported by it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from llm_quest.errors import DataError
from llm_quest.hub.weight_map import SCORE, compact_names
from llm_quest.models.family import HEADS, Family, SubConfig
from llm_quest.models.weight_names import ConcatRows, StackTensors, WeightMap, published_names

Source = TypeVar("Source")

WRAPPER_MODULES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Wrapper modules of torch, anywhere in a name."""
TEXT_PREFIXES = (
    (r"(model\.)?language_model\.(lm_head|score)\.", r"\2."),
    (r"(model\.)?language_model\.(model\.)?", "model."),
)
"""Prefix of the language model in multi-part models, and in its own class."""


def part_of_several(hf_config: Mapping[str, Any], families: Iterable[Family]) -> tuple[dict[str, Any], str] | None:
    """The config of the part that is read from a multi-part model (the text of Gemma 3, the images of CLIP), and a note
    about it. None for any other config.json. DataError if the part is missing."""
    kind = str(hf_config.get("model_type"))
    part = next((family.parts[kind] for family in families if kind in family.parts), None)
    if part is None:
        return None
    inner = hf_config.get(f"{part.field}_dict") or hf_config.get(part.field)
    if not isinstance(inner, Mapping):
        raise DataError(
            f"config.json: a {kind} has its numbers in {part.field!r}, which is {type(inner).__name__} here"
        )
    return part_config(hf_config, inner, part), f"of {kind} the {part.field.removesuffix('_config')} part is read"


def part_config(hf_config: Mapping[str, Any], inner: Mapping[str, Any], part: SubConfig) -> dict[str, Any]:
    """The part's config: its own fields, the defaults of its class, and fields that are only outside of it."""
    outside = {name: hf_config[name] for name in OUTSIDE_FIELDS if hf_config.get(name) is not None}
    inside = {name: value for name, value in inner.items() if value is not None or name not in outside}
    tied = (
        {} if hf_config.get("tie_word_embeddings") is None else {"tie_word_embeddings": outside["tie_word_embeddings"]}
    )
    whole = {name: hf_config.get(name) or default for name, default in part.of_whole.items()}
    return {"model_type": part.model_type, **part.defaults, **outside, **inside, **tied, **whole}


OUTSIDE_FIELDS = (
    *("tie_word_embeddings", "dtype", "torch_dtype", "architectures", "quantization_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "num_labels"),
)
"""Fields of a model of several parts that hold for each of them."""


def canonical_sources(
    sources: Mapping[str, Source], family: Family, config: Any
) -> tuple[dict[str, Source], list[str]]:
    """Rename the tensors to the names of the family's weight map; return notes on what was left out. DataError if two
    tensors would have one name."""
    table = family.weight_map(config)
    known = set(published_names([*table.values(), *fused_experts(table).values()]))
    known |= {*family.duplicate_weights(config), SCORE}
    unwrapped = {name: strip_wrapper_modules(name) for name in sources}
    rename = make_renamer(family, known, unwrapped.values())
    renamed = {name: rename(bare) for name, bare in unwrapped.items()}
    left = {name for name, new in renamed.items() if new not in known and belongs_to_other_part(new, family)}
    renamed = {name: new for name, new in renamed.items() if name not in left}
    twice = {new for new, count in Counter(renamed.values()).items() if count > 1}
    if twice:
        both = compact_names(name for name, new in renamed.items() if new in twice)
        raise DataError(f"stored twice under different names: {both}; remove one of each")
    notes = [f"left out, of other parts of the model: {compact_roots(left)}"] if left else []
    return {new: sources[name] for name, new in renamed.items()}, notes


def make_renamer(family: Family, known: Collection[str], stored: Iterable[str]) -> Callable[[str], str]:
    """Make the function from stored names to the family's. Without any prefix (AutoModel) every name but a head's gets
    it, also an unknown one, so that messages use one layout."""
    root, names = family.root_prefix(known), list(stored)
    is_bare = bool(root) and not any(n.startswith(root) for n in names) and any(root + n in known for n in names)

    def rename(name: str) -> str:
        if name in known:
            return name
        known_name = next((one for one in candidate_names(name, family, root) if one in known), None)
        is_head = name.startswith(HEADS) or family.ignores(name)
        return known_name or (
            root + name if is_bare and not is_head and not belongs_to_other_part(name, family) else name
        )

    return rename


def candidate_names(name: str, family: Family, root: str) -> Iterator[str]:
    """The names that a stored name may stand for."""
    for pattern, replacement in (*family.renames, *TEXT_PREFIXES):
        new, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            yield new
    yield root + name


def fused_experts(table: WeightMap) -> dict[str, str]:
    """Our parameters of experts -> the one tensor that some files hold in place of one for each expert:
    `mlp.experts.gate_up_proj` (E,2F,D) and `mlp.experts.down_proj` (E,D,F), as we lay them too."""
    fused = {}
    for ours, entry in table.items():
        if isinstance(entry, StackTensors):
            first, _, _ = next(published_names([entry])).partition(".experts.0.")
            fused[ours] = f"{first}.experts.{'gate_up' if isinstance(entry.entries[0], ConcatRows) else 'down'}_proj"
    return fused


def strip_wrapper_modules(name: str) -> str:
    """The name without the modules that torch put around others (`module.model.norm.weight`)."""
    parts = [part for part in name.split(".") if part not in WRAPPER_MODULES]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def belongs_to_other_part(name: str, family: Family) -> bool:
    """Whether this is a tensor of a part that is not read (the image tower of a language model, the text tower of
    CLIP)."""
    return name.removeprefix("model.").startswith(family.other_parts) if family.other_parts else False


def compact_roots(names: Iterable[str]) -> str:
    """The modules that these tensors belong to: 'vision_tower (437 tensors)'."""
    roots = Counter(name.removeprefix("model.").split(".")[0] for name in names)
    return ", ".join(f"{root} ({count} tensor{'s' * (count > 1)})" for root, count in sorted(roots.items()))
