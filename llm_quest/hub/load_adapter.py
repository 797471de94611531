"""Loads an adapter in PEFT's format onto a model of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.errors import DataError, UsageError
from llm_quest.hub.config import read_json
from llm_quest.hub.load_tiny_lora import TINY_LORA_TYPE, load_tiny_lora
from llm_quest.hub.save_adapter import (
    CONFIG,
    ROOT,
    WEIGHTS,
    LoRAPair,
    PublishedMatrix,
    adapter_edits,
    base_matrices,
    read_adapter_tensors,
)
from llm_quest.hub.weight_map import compact_names
from llm_quest.layers.low_rank import DoRAUpdate
from llm_quest.techniques.adapter_targets import shortest_targets
from llm_quest.techniques.lora import DoRA, LoRA, RsLoRA

TENSOR_SUFFIXES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}


def load_adapter(model: Any, folder: str | Path) -> Any:
    """The model, adapted as PEFT saved it: LoRA, rsLoRA, DoRA or TinyLoRA, ready to be trained on, merged or saved.

    Raises DataError for what is damaged, of another base or of a kind that is not computed here; UsageError where the
    model has an adapter already."""
    folder = Path(folder)
    config = read_adapter_config(folder / CONFIG)
    if config["peft_type"] == TINY_LORA_TYPE:
        return load_tiny_lora(model, folder, config)
    pairs = read_pairs(folder / WEIGHTS)
    matrices = base_matrices(model.config)
    by_module: dict[str, dict[str, PublishedMatrix]] = {}
    for address, place in matrices.items():
        by_module.setdefault(place.module, {})[address] = place
    if unmatched := [module for module in pairs if module not in by_module]:
        raise DataError(
            f"{folder} is an adapter of another base: this model has no {compact_names(unmatched)} to adapt"
        )
    parts: dict[str, LoRAPair] = {}
    for module, pair in pairs.items():
        check_base(folder, module, pair, next(iter(by_module[module].values())))
        parts |= split_pair(pair, by_module[module], int(config["r"]), module)
    ranks = {pair.A.shape[0] for pair in parts.values()}
    if ranks != {config["r"]}:
        raise DataError(
            f"{folder}: ranks {sorted(ranks)} beside r {config['r']}: one rank is computed; merge it in PEFT"
        )
    technique_from_peft(config, shortest_targets(model, set(parts)))(model)
    copy_adapter_weights(model, parts)
    return model


def read_adapter_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, if it asks for nothing that is not computed here."""
    if not file.exists():
        raise DataError(f"{file.parent} holds no adapter: it has no {file.name}")
    config = read_json(file)
    kind = config.get("peft_type")
    if kind not in ("LORA", TINY_LORA_TYPE):
        raise DataError(
            f"{file}: peft_type is {kind!r}; LORA (with use_rslora or use_dora) and {TINY_LORA_TYPE} are read here, "
            "merge others"
        )
    if type(config.get("r")) is not int or config["r"] < 1:
        raise DataError(f"{file}: r is {config.get('r')!r}; a positive whole number was expected")
    unsupported = [
        name for name, plain in NEUTRAL_SETTINGS.items() if config.get(name, plain) not in (plain, None, False)
    ]
    if unsupported:
        raise DataError(
            f"{file}: {', '.join(unsupported)} is not computed here: merge the adapter in PEFT and load the result"
        )
    return config


NEUTRAL_SETTINGS: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
}
"""Settings of PEFT that change the function, and the values under which they do not."""


def read_pairs(file: Path) -> dict[str, LoRAPair]:
    """Published module -> its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_adapter_tensors(
        file, lambda name: name.startswith(ROOT) and split_tensor_name(name)[1] in TENSOR_SUFFIXES
    ).items():
        module, ending = split_tensor_name(name)
        found.setdefault(module, {})[TENSOR_SUFFIXES[ending]] = tensor
    incomplete = [module for module, pair in found.items() if not {"A", "B"} <= set(pair)]
    if incomplete:
        raise DataError(f"{file}: lora_A or lora_B is missing of {compact_names(incomplete)}")
    return {module: LoRAPair(**pair) for module, pair in found.items()}


def split_tensor_name(name: str) -> tuple[str, str]:
    """'base_model.model.h.0.attn.c_attn', 'lora_A.weight'."""
    name = name.removeprefix(ROOT).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    module, _, ending = name.partition(".lora_")
    return module, f"lora_{ending}"


def check_base(folder: Path, module: str, pair: LoRAPair, matrix: PublishedMatrix) -> None:
    rank = pair.A.shape[0]
    if pair.A.shape != (rank, matrix.in_features) or pair.B.shape != (matrix.out_features, rank):
        raise DataError(
            f"{folder} is an adapter of another base: at {module} it maps {pair.A.shape[-1]} to {pair.B.shape[0]} "
            f"numbers, this model {matrix.in_features} to {matrix.out_features}"
        )


def split_pair(pair: LoRAPair, matrices: Mapping[str, PublishedMatrix], rank: int, module: str) -> dict[str, LoRAPair]:
    """A published matrix's adapter as those of our parts: either as `peft.join_parts` laid them, or with the same A for
    each."""
    if len(matrices) == 1 or pair.A.shape[0] == rank:
        return {address: slice_pair(pair, pair.A, pair.B, place) for address, place in matrices.items()}
    found: dict[str, LoRAPair] = {}
    for A, B in zip(pair.A.split(rank), pair.B.split(rank, dim=1), strict=True):
        free = [address for address in matrices if address not in found]
        touched = [address for address in matrices if B[matrices[address].rows].any()] or free[:1]
        if len(touched) != 1 or touched[0] not in free:
            raise DataError(f"{module}: rank {pair.A.shape[0]} beside r {rank} is not read here: merge it in PEFT")
        found[touched[0]] = slice_pair(pair, A, B, matrices[touched[0]])
    return found


def slice_pair(pair: LoRAPair, A: Tensor, B: Tensor, matrix: PublishedMatrix) -> LoRAPair:
    return LoRAPair(A, B[matrix.rows], None if pair.magnitude is None else pair.magnitude[matrix.rows])


def technique_from_peft(config: Mapping[str, Any], targets: Sequence[str]) -> LoRA | RsLoRA | DoRA:
    rank, alpha, dropout = config["r"], float(config.get("lora_alpha", 8)), float(config.get("lora_dropout") or 0.0)
    use_rslora = bool(config.get("use_rslora"))
    if config.get("use_dora"):
        return DoRA(rank, alpha * (math.sqrt(rank) if use_rslora else 1.0), dropout, tuple(targets))
    return (RsLoRA if use_rslora else LoRA)(rank, alpha, dropout, tuple(targets))


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


def adapter_base(name_or_path: str | Path) -> str | None:
    """The base that an adapter's folder names; None for anything that is not an adapter's folder alone."""
    folder = Path(name_or_path).expanduser()
    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        return None
    base = read_adapter_config(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"{folder} is an adapter that does not say of which model: quest.load the base, then "
            "quest.load_adapter(model, folder)"
        )
    return str(base)
