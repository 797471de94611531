"""Loads an adapter in PEFT's format onto a model of ours.

Adapters beyond one rank and one scale are converted exactly:

- rank_pattern, alpha_pattern: A and B are padded with zeros to the largest rank, and B is multiplied by the ratio of
  the scales. Padding stays zero in training, for either gradient is a product with the other's zeros.
- PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775): the base that they were trained on is W - s B0 A0, where A0 and
  B0 are computed from W (its largest singular directions; the first columns of its QR decomposition). So the adapter is
  the plain LoRA A' = [A; A0], B' = [B, -B0] of twice the rank.
- Of experts PEFT has all of a layer in one matrix: A (E r,in), B (out,r E), the expert's number running slowest in A
  and fastest in B (`published_matrices.py`); or, from older models, a pair for each expert (`single_experts.py`).
- Of the embedding and the output matrix, whose losses read them directly: the adapter is merged into the matrix, which
  then belongs to the whole parameters that `modules_to_save` names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.errors import DataError, UsageError
from llm_quest.hub.adapter_config import CONFIG, TINY_LORA_TYPE, module_scale, read_adapter_config
from llm_quest.hub.layouts import make_renamer
from llm_quest.hub.load_tiny_lora import load_tiny_lora
from llm_quest.hub.published_matrices import (
    LoRAPair,
    PublishedMatrix,
    base_matrices,
    check_rank,
    experts_parameters,
    stack_experts_pair,
)
from llm_quest.hub.save_adapter import ROOT, WEIGHTS, adapter_edits, read_adapter_tensors
from llm_quest.hub.single_experts import expert_places, stack_expert_pairs
from llm_quest.hub.weight_map import compact_names
from llm_quest.hub.whole_parameters import LM_HEAD, WholeParameters
from llm_quest.layers.low_rank import DoRAUpdate
from llm_quest.models.build import family_of
from llm_quest.techniques.adapter_targets import shortest_targets
from llm_quest.techniques.lora import DoRA, LoRA, RsLoRA

TENSOR_SUFFIXES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass
class AdapterTensors:
    """The tensors of an adapter's file, under published names. pairs: module -> its low-rank matrices. rows: module ->
    new rows of chosen tokens. whole: parameters that replace the base's."""

    pairs: dict[str, LoRAPair] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


def load_adapter(model: Any, folder: str | Path, *, adapter_name: str | None = None) -> Any:
    """Load an adapter (LoRA, rsLoRA, DoRA or TinyLoRA) onto a model, which can then be trained, merged or saved.
    adapter_name: of a folder that holds several.

    Raises DataError for an adapter that is damaged, of another base or of an unsupported kind; UsageError if the model
    has an adapter already."""
    folder = Path(folder) / (adapter_name or "")
    config = read_adapter_config(folder / CONFIG)
    if config["peft_type"] == TINY_LORA_TYPE:
        return load_tiny_lora(model, folder, config)
    tensors = read_tensors(folder, config, family_of(model.config), model.config)
    tie = bool(config.get("ensure_weight_tying")) and f"{LM_HEAD}.weight" in tensors.whole
    whole = WholeParameters(model, folder, tie=tie)
    whole.replace(tensors.whole)
    whole.replace_rows(tensors.rows, config.get("trainable_token_indices"))
    by_module: dict[str, dict[str, PublishedMatrix]] = {}
    for address, place in base_matrices(model.config).items():
        by_module.setdefault(place.module, {})[address] = place
    singles = expert_places(model.config)
    stacks = stack_expert_pairs(folder, config, tensors.pairs, singles)
    by_module |= {address: {address: matrix} for address, _, matrix in singles.values()}
    tensors.pairs = {module: pair for module, pair in tensors.pairs.items() if module not in singles} | stacks
    merged = {module: pair for module, pair in tensors.pairs.items() if whole.is_embedding_or_head(module)}
    for module, pair in merged.items():
        if tie and module == LM_HEAD and whole.embedding in merged:
            continue  # the embedding's again
        whole.add(module, pair, module_scale(config, module, pair.rank), is_dora=bool(config.get("use_dora")))
    pairs = {module: pair for module, pair in tensors.pairs.items() if module not in merged}
    if unmatched := [module for module in pairs if module not in by_module]:
        raise DataError(
            f"{folder} is an adapter of another base: this model has no {compact_names(unmatched)} to adapt"
        )
    if not pairs:
        raise DataError(f"{folder} adapts no matrix within the layers: merge it in PEFT and load the result")
    apply_pairs(model, folder, config, pairs, by_module, whole)
    return model


def apply_pairs(
    model: Any,
    folder: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, LoRAPair],
    by_module: Mapping[str, Mapping[str, PublishedMatrix]],
    whole: WholeParameters,
) -> None:
    """Apply one technique to all matrices, and copy the adapter's weights into it."""
    scales, parts = {}, {}
    for module, pair in pairs.items():
        check_base(folder, module, pair, next(iter(by_module[module].values())))
        if pair.scale is None:
            check_rank(folder, config, module, pair)
        scale = module_scale(config, module, pair.rank) if pair.scale is None else pair.scale
        full = residual_pair(config.get("init_lora_weights"), pair, scale, lambda m=module: whole.matrix(m))
        for address, part in split_pair(full, by_module[module], int(config["r"])).items():
            parts[address], scales[address] = part, scale
    rank = max(pair.rank for pair in parts.values())
    (scale, _), *_ = Counter(scales.values()).most_common(1)
    technique = technique_from_peft(config, rank, scale, shortest_targets(model, set(parts)))
    replace(technique, modules_to_save=whole.changed())(model)
    copy_adapter_weights(model, {one: unify(part, rank, scales[one] / scale) for one, part in parts.items()})


def read_tensors(folder: Path, config: Mapping[str, Any], family: Any, model_config: Any) -> AdapterTensors:
    """Read the tensors of an adapter's file, sorted by kind, under the names of the family's weight map."""
    places = {place.module: place for place in base_matrices(model_config).values()}
    stored = read_adapter_tensors(folder / WEIGHTS, lambda name: name.startswith(ROOT))
    bare = {name: name.removeprefix(ROOT).replace(".modules_to_save.", ".") for name in stored}
    rename = make_renamer(
        family, {*places, *expert_places(model_config)}, [name.partition(".lora_")[0] for name in bare.values()]
    )
    stacks = experts_parameters([split_tensor_name(name)[0] for name in bare.values()], config)
    low_rank: dict[str, dict[str, Tensor]] = {}
    tensors = AdapterTensors()
    for name, tensor in stored.items():
        module, ending = split_tensor_name(bare[name])
        if ending in TENSOR_SUFFIXES:
            low_rank.setdefault(rename(stacks.get(module, module)), {})[TENSOR_SUFFIXES[ending]] = tensor
        elif bare[name].endswith(TOKEN_ROWS):
            tensors.rows[rename(bare[name].removesuffix(TOKEN_ROWS))] = tensor
        elif ".lora_" in bare[name] or not bare[name].endswith((".weight", ".bias")):
            raise DataError(f"{folder / WEIGHTS}: not read here: {name}; merge the adapter in PEFT and load the result")
        else:
            module, _, kind = bare[name].replace(".base_layer.", ".").rpartition(".")
            tensors.whole[f"{rename(module)}.{kind}"] = tensor
    incomplete = [module for module, pair in low_rank.items() if not {"A", "B"} <= set(pair)]
    if incomplete:
        raise DataError(f"{folder / WEIGHTS}: lora_A or lora_B is missing of {compact_names(incomplete)}")
    if odd := [module for module, pair in low_rank.items() if pair["A"].dim() != 2 or pair["B"].dim() != 2]:
        raise DataError(f"{folder / WEIGHTS}: lora_A or lora_B is no matrix of {compact_names(odd)}")
    tensors.pairs = {module: LoRAPair(pair["A"], pair["B"], pair.get("magnitude")) for module, pair in low_rank.items()}
    for module, pair in tensors.pairs.items():
        if module in places and places[module].num_experts:
            tensors.pairs[module] = stack_experts_pair(pair, places[module].num_experts)
    return tensors


def split_tensor_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into module and suffix: 'h.0.attn.c_attn', 'lora_A.weight'."""
    module, _, ending = name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector").partition(".lora_")
    return module, f"lora_{ending}"


def check_base(folder: Path, module: str, pair: LoRAPair, matrix: PublishedMatrix) -> None:
    rank, stack = pair.rank, (matrix.num_experts,) if matrix.num_experts else ()
    if pair.A.shape != (*stack, rank, matrix.in_features) or pair.B.shape != (*stack, matrix.out_features, rank):
        raise DataError(
            f"{folder} is an adapter of another base: at {module} it maps {pair.A.shape[-1]} to {pair.B.shape[-2]} "
            f"numbers, this model {matrix.in_features} to {matrix.out_features}"
        )


def residual_pair(start: Any, pair: LoRAPair, scale: float, weight: Any) -> LoRAPair:
    """The equivalent pair on the published base (PiSSA, OLoRA). start: init_lora_weights. weight(): the matrix
    (out,in)."""
    if str(start).lower() not in ("pissa", "olora"):
        return pair
    W, rank = weight().to(torch.promote_types(weight().dtype, torch.float32)), pair.A.shape[0]
    if str(start).lower() == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[:rank] / scale).sqrt()
        A0, B0 = root[:, None] * Vh[:rank], U[:, :rank] * root
    else:
        Q, R = torch.linalg.qr(W)
        A0, B0 = R[:rank], Q[:, :rank]
    A, B = torch.cat([pair.A.to(W), A0]), torch.cat([pair.B.to(W), -B0], dim=1)
    return LoRAPair(A, B, pair.magnitude)


def split_pair(pair: LoRAPair, matrices: Mapping[str, PublishedMatrix], rank: int) -> dict[str, LoRAPair]:
    """Split a published matrix's adapter into those of our parts: the inverse of `save_adapter.join_lora_parts`, or the
    same A for all parts."""
    alike = {address: slice_pair(pair, pair.A, pair.B, place) for address, place in matrices.items()}
    if len(matrices) == 1 or pair.rank == rank or pair.rank % rank:
        return alike
    pairs: dict[str, LoRAPair] = {}
    for A, B in zip(pair.A.split(rank, dim=-2), pair.B.split(rank, dim=-1), strict=True):
        free = [address for address in matrices if address not in pairs]
        touched = [address for address in matrices if B[..., matrices[address].rows, :].any()] or free[:1]
        if len(touched) != 1 or touched[0] not in free:
            return alike
        pairs[touched[0]] = slice_pair(pair, A, B, matrices[touched[0]])
    return pairs


def slice_pair(pair: LoRAPair, A: Tensor, B: Tensor, matrix: PublishedMatrix) -> LoRAPair:
    return LoRAPair(A, B[..., matrix.rows, :], None if pair.magnitude is None else pair.magnitude[matrix.rows])


def unify(pair: LoRAPair, rank: int, gain: float) -> LoRAPair:
    """Pad a pair to a rank, and multiply B by a gain."""
    A, B = pair.A, pair.B if gain == 1 else pair.B * gain
    if missing := rank - pair.rank:
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    return LoRAPair(A, B, pair.magnitude)


def technique_from_peft(
    config: Mapping[str, Any], rank: int, scale: float, targets: Sequence[str]
) -> LoRA | RsLoRA | DoRA:
    """The technique whose scale at this rank is `scale`."""
    dropout, use_dora = float(config.get("lora_dropout") or 0.0), bool(config.get("use_dora"))
    kind = DoRA if use_dora else RsLoRA if config.get("use_rslora") else LoRA
    alpha = scale * (math.sqrt(rank) if kind is RsLoRA else rank)
    return kind(rank, alpha, dropout, tuple(targets))


@torch.no_grad()
def copy_adapter_weights(model: nn.Module, parts: Mapping[str, LoRAPair]) -> None:
    for address, edit, _ in adapter_edits(model):
        one, low = parts[address], edit.low if isinstance(edit, DoRAUpdate) else edit
        low.A.copy_(one.A)  # type: ignore[union-attr, operator]
        low.B.copy_(one.B)  # type: ignore[union-attr, operator]
        if isinstance(edit, DoRAUpdate):
            if one.magnitude is None:
                raise UsageError("use_dora is set, but the adapter has no magnitudes; save it again")
            edit.magnitude.copy_(one.magnitude)
