"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, whose tensors are named after the
published modules that they edit (`load_adapter.py` reads it).

LoRA-XS and TinyLoRA are written as the plain LoRA they amount to (their core goes into B). Where the published model
has one matrix and we edit its parts apart (GPT-2's c_attn), A's are stacked and B's lie on the diagonal:

      A = [A_q; A_k; A_v]     B = [B_q 0 0; 0 B_k 0; 0 0 B_v]     rank 3 r, and alpha so much larger that s is the same

An expert stack is one parameter in transformers (`mlp.experts.gate_up_proj`), which PEFT names in `target_parameters`;
of two in one module the second wraps the first, whose tensors are then called `experts.base_layer.lora_A`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.atomic_dirs import atomic_dir
from llm_quest.errors import DataError, UsageError
from llm_quest.files import write_json, write_text
from llm_quest.hub.adapter_config import CONFIG
from llm_quest.hub.published_matrices import LoRAPair, PublishedMatrix, base_matrices, experts_module, flatten_experts
from llm_quest.hub.safetensors_io import FLOAT_DTYPES, read_header, read_into
from llm_quest.hub.weight_map import compact_names, export_weight_map, weight_views
from llm_quest.layers.low_rank import (
    AdaptedLinear,
    AdaptedPackedLinear,
    DoRAUpdate,
    LowRankUpdate,
    as_floats,
    row_norms,
)
from llm_quest.models.build import family_of
from llm_quest.models.weight_names import Transposed
from llm_quest.techniques.adapter_merge import require_adapters
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA, is_adapter, whole_modules, whole_parameters
from llm_quest.techniques.score_head import find_score_head
from llm_quest.tensor_files import write_tensors

WEIGHTS, ROOT, CARD = "adapter_model.safetensors", "base_model.model.", "README.md"
EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
"""Names of token embeddings in published files."""


def read_adapter_tensors(file: Path, known: Callable[[str], bool]) -> dict[str, Tensor]:
    """Read the tensors of an adapter's file, by name. DataError for no tensors, unknown names and numbers that are not
    finite."""
    if not file.exists():
        raise DataError(f"{file.parent} has no {file.name}; save the adapter with safe_serialization=True")
    header = read_header(file)
    unknown = [name for name, stored in header.items() if not known(name) or stored.dtype not in FLOAT_DTYPES]
    tensors = {
        name: torch.empty(stored.shape, dtype=FLOAT_DTYPES[stored.dtype])
        for name, stored in header.items()
        if name not in unknown
    }
    bad = [name for name, tensor in tensors.items() if read_into(header[name], tensor)]
    if unknown or bad or not tensors:
        what = (
            f"not finite: {compact_names(bad)}" if bad else f"not read here: {compact_names(unknown) or 'it is empty'}"
        )
        raise DataError(f"{file}: {what}; only adapters of linear layers are")
    return tensors


def save_adapter(
    model: Any, folder: str | Path, *, base: str | None = None, overwrite: bool = False, card: str | None = None
) -> Path:
    """Save the adapter alone, as PEFT's `PeftModel.from_pretrained` reads it. base: the folder or hub id of the base
    model, which the files name. card: the text of README.md.

    Raises UsageError without an adapter, or for one that PEFT has no form for: DoRA of experts, of models that see."""
    pairs = adapter_pairs(model)
    whole = whole_tensors(model)
    tensors = {name: tensor for module, pair in pairs.items() for name, tensor in peft_tensors(module, pair, pairs)}
    tensors |= {ROOT + whole_name(name, pairs): tensor.contiguous() for name, tensor in whole.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_dir(
        folder, overwrite=overwrite, replaceable={CONFIG, WEIGHTS, CARD}.__contains__, required_bytes=size + 2**20
    ) as stage:
        write_json(stage / CONFIG, peft_config(model, pairs, base) | whole_config(model, whole))
        write_tensors(stage / WEIGHTS, tensors, head_metadata(model))
        if card is not None:
            write_text(stage / CARD, card)
    return Path(folder)


def head_metadata(model: Any) -> dict[str, str]:
    """The labels of a classifier, for the header of the file: PEFT's config has no key for them."""
    head = find_score_head(model)
    if head is None or head.outputs == 1:
        return {}
    return {"labels": json.dumps(head.labels), "problem_type": head.problem_type}


@torch.no_grad()
def adapter_pairs(model: Any) -> dict[str, LoRAPair]:
    """Published module -> its adapter."""
    matrices = base_matrices(model.config)
    grouped: dict[str, list[tuple[PublishedMatrix, nn.Module, Tensor]]] = {}
    for address, edit, weight in adapter_edits(model):
        if address not in matrices or (matrices[address].num_experts and isinstance(edit, DoRAUpdate)):
            raise UsageError(f"PEFT has no form for this adapter of {address}: merge, and save the whole model")
        grouped.setdefault(matrices[address].module, []).append((matrices[address], edit, weight))
    return {module: join_lora_parts(parts) for module, parts in grouped.items()}


def whole_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that were trained whole beside the adapter, and a score head, by published names."""
    modules = [name for technique in model.spec.techniques for name in whole_modules(technique)]
    modules += ["head"] if find_score_head(model) is not None else []
    if not modules:
        return {}
    whole = {name for name, _ in whole_parameters(model, modules)}
    adapted = export_weight_map(model, family_of(model.config).weight_map(model.config))
    views = weight_views(model, adapted)
    tensors = {
        name: place.view(model.get_parameter(place.parameter)).detach()
        for name, place in views.items()
        if place.parameter in whole
    }
    return tensors | ({"lm_head.weight": model.head.weight.detach().clone()} if is_tied_whole(model, tensors) else {})


def is_tied_whole(model: Any, whole: Mapping[str, Tensor]) -> bool:
    """Whether a tied embedding was trained whole, which PEFT stores under both names."""
    return model.head.weight is model.embed.token.weight and any(
        name.rpartition(".")[0].endswith(EMBEDDINGS) for name in whole
    )


def whole_name(name: str, pairs: Mapping[str, LoRAPair]) -> str:
    """The name in the file: PEFT keeps an adapted module's own tensors as `base_layer`."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}" if module in pairs else name


def whole_config(model: Any, whole: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of adapter_config.json about the tensors that are stored whole."""
    modules = sorted(name.removesuffix(".weight") for name in whole if name.endswith(".weight"))
    names = [module.rpartition(".")[2] if module.endswith(EMBEDDINGS) else module for module in modules]
    biases = any(name.endswith(".bias") and name.removesuffix(".bias") not in modules for name in whole)
    return {
        "modules_to_save": names or None,
        "bias": "all" if biases else "none",
        "ensure_weight_tying": is_tied_whole(model, whole),
        "task_type": "CAUSAL_LM" if find_score_head(model) is None else "SEQ_CLS",
    }


def adapter_edits(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield address, edit and the layer's whole matrix of every adapted matrix."""
    for path, wrapper in require_adapters(model).items():
        if isinstance(wrapper, AdaptedLinear):
            yield path, wrapper.edit, wrapper.base.weight
        elif isinstance(wrapper, AdaptedPackedLinear):
            yield from ((f"{path}.{part}", edit, wrapper.base.weight) for part, edit in wrapper.edits.items())
        else:
            yield from ((f"{path}.{part}", edit, as_floats(wrapper.base.down)) for part, edit in wrapper.edits.items())


def join_lora_parts(parts: Sequence[tuple[PublishedMatrix, nn.Module, Tensor]]) -> LoRAPair:
    """Join the adapters of the parts of a published matrix, or of a stack."""
    if parts[0][0].is_whole:
        return to_lora_pair(parts[0][1])
    ours, first = [to_lora_pair(edit) for _, edit, _ in parts], parts[0][0]
    A, column = torch.cat([one.A for one in ours], dim=-2), 0
    B = A.new_zeros(*A.shape[:-2], first.out_features, A.shape[-2])
    for (where, _, _), one in zip(parts, ours, strict=True):
        B[..., where.rows, column : column + one.rank] = one.B
        column += one.rank
    return LoRAPair(A, B, join_magnitudes(parts, ours) if ours[0].magnitude is not None else None)


def join_magnitudes(parts: Sequence[tuple[PublishedMatrix, nn.Module, Tensor]], ours: Sequence[LoRAPair]) -> Tensor:
    """DoRA's magnitudes of a published matrix; rows without an edit keep their norm."""
    norms, order = row_norms(parts[0][2]), parts[0][0].order
    magnitude = norms if order is None else torch.empty_like(norms).index_copy_(0, torch.tensor(order), norms)
    for (where, _, _), one in zip(parts, ours, strict=True):
        assert one.magnitude is not None
        magnitude[where.rows] = one.magnitude
    return magnitude


def to_lora_pair(edit: nn.Module) -> LoRAPair:
    """The plain LoRA pair of an edit: the core of LoRA-XS and TinyLoRA goes into B."""
    low: Any = edit.low if isinstance(edit, DoRAUpdate) else edit
    assert isinstance(low, LowRankUpdate)
    identity = torch.eye(low.A.shape[-2], dtype=low.A.dtype, device=low.A.device)
    core = low.core(identity.expand(*low.A.shape[:-2], -1, -1)).mT
    return LoRAPair(low.A, low.B @ core, edit.magnitude if isinstance(edit, DoRAUpdate) else None)


def peft_tensors(module: str, pair: LoRAPair, modules: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter under PEFT's names. modules: all that the adapter edits."""
    if pair.A.dim() == 3:
        module, pair = experts_module(module, modules), flatten_experts(pair)
    yield f"{ROOT}{module}.lora_A.weight", pair.A.contiguous()
    yield f"{ROOT}{module}.lora_B.weight", pair.B.contiguous()
    if pair.magnitude is not None:
        yield f"{ROOT}{module}.lora_magnitude_vector", pair.magnitude.contiguous()


def peft_config(model: Any, pairs: Mapping[str, LoRAPair], base: str | None) -> dict[str, Any]:
    """Build adapter_config.json."""
    technique: Any = next(one for one in model.spec.techniques if is_adapter(one))
    rank, use_rslora = technique.rank, isinstance(technique, RsLoRA)
    rank_pattern = {module: pair.rank for module, pair in pairs.items() if pair.rank != rank}
    modules, stacks = ([name for name, pair in pairs.items() if pair.A.dim() == dims] for dims in (2, 3))
    alpha = LORA_ALPHA[type(technique)](technique)
    root = math.sqrt if use_rslora else float
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": technique.dropout if isinstance(technique, LoRA | RsLoRA | DoRA) else 0.0,
        "target_modules": shortest_names(model.config, modules, stacked=False),
        "target_parameters": shortest_names(model.config, stacks, stacked=True) or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {module: alpha * root(one / rank) for module, one in rank_pattern.items()},
        "use_rslora": use_rslora,
        "use_dora": isinstance(technique, DoRA),
        "fan_in_fan_out": any(
            isinstance(one, Transposed) and one.name.endswith(".weight")
            for one in family_of(model.config).weight_map(model.config).values()
        ),
        "inference_mode": True,
    }


LORA_ALPHA = {
    LoRA: lambda one: one.alpha,
    RsLoRA: lambda one: one.alpha,
    DoRA: lambda one: one.alpha,
    LoRAXS: lambda one: one.scale * one.rank,
    TinyLoRA: lambda one: float(one.rank),
}


def shortest_names(config: Any, names: Sequence[str], *, stacked: bool) -> list[str]:
    """Short names, as PEFT's users write them, if all modules (or, with stacked, all experts' stacks) of those names
    are adapted; else the full names."""
    places = base_matrices(config).values()
    parts = 3 if stacked else 1  # mlp.experts.down_proj
    last = {
        place.module: ".".join(place.module.split(".")[-parts:])
        for place in places
        if bool(place.num_experts) == stacked
    }
    short = sorted({last[module] for module in names})
    return short if {module for module in last if last[module] in short} == set(names) else sorted(names)
