"""Put an adapter that lies in PEFT's format on a model of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.errors import DataError, UsageError
from llm_quest.hub.config import read_json
from llm_quest.hub.names import folded
from llm_quest.hub.peft import CONFIG, ROOT, WEIGHTS, Pair, Place, edits, places_of, read_tensors
from llm_quest.hub.tiny_lora import TINY, load_tiny
from llm_quest.layers.low_rank import Directed
from llm_quest.techniques.lora import DoRA, LoRA, RsLoRA
from llm_quest.techniques.targets import targets_of

ENDINGS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}


def load_adapter(model: Any, folder: str | Path) -> Any:
    """The model, adapted as PEFT saved it: LoRA, rsLoRA, DoRA or TinyLoRA, ready to be trained on, merged or saved.

    Raises DataError for what is damaged, of another base or of a kind that is not computed here; UsageError where the
    model has an adapter already."""
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    if config["peft_type"] == TINY:
        return load_tiny(model, folder, config)
    pairs = read_pairs(folder / WEIGHTS)
    where = places_of(model.config)
    by_module: dict[str, dict[str, Place]] = {}
    for address, place in where.items():
        by_module.setdefault(place.module, {})[address] = place
    if strangers := [module for module in pairs if module not in by_module]:
        raise DataError(f"{folder} is an adapter of another base: this model has no {folded(strangers)} to adapt")
    parts: dict[str, Pair] = {}
    for module, pair in pairs.items():
        check(folder, module, pair, next(iter(by_module[module].values())))
        parts |= apart(pair, by_module[module], int(config["r"]), module)
    ranks = {pair.A.shape[0] for pair in parts.values()}
    if ranks != {config["r"]}:
        raise DataError(
            f"{folder}: ranks {sorted(ranks)} beside r {config['r']}: one rank is computed; merge it in PEFT"
        )
    technique_of(config, targets_of(model, set(parts)))(model)
    fill(model, parts)
    return model


def read_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, if it asks for nothing that is not computed here."""
    if not file.exists():
        raise DataError(f"{file.parent} holds no adapter: it has no {file.name}")
    config = read_json(file)
    kind = config.get("peft_type")
    if kind not in ("LORA", TINY):
        raise DataError(
            f"{file}: peft_type is {kind!r}; LORA (with use_rslora or use_dora) and {TINY} are read here, merge others"
        )
    if type(config.get("r")) is not int or config["r"] < 1:
        raise DataError(f"{file}: r is {config.get('r')!r}; a positive whole number was expected")
    odd = [name for name, plain in PLAIN.items() if config.get(name, plain) not in (plain, None, False)]
    if odd:
        raise DataError(f"{file}: {', '.join(odd)} is not computed here: merge the adapter in PEFT and load the result")
    return config


PLAIN: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
}
"""Settings of PEFT that change the function, and the values under which they do not."""


def read_pairs(file: Path) -> dict[str, Pair]:
    """Published module -> its tensors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(file, lambda name: name.startswith(ROOT) and split(name)[1] in ENDINGS).items():
        module, ending = split(name)
        found.setdefault(module, {})[ENDINGS[ending]] = tensor
    halves = [module for module, pair in found.items() if not {"A", "B"} <= set(pair)]
    if halves:
        raise DataError(f"{file}: lora_A or lora_B is missing of {folded(halves)}")
    return {module: Pair(**pair) for module, pair in found.items()}


def split(name: str) -> tuple[str, str]:
    """'base_model.model.h.0.attn.c_attn', 'lora_A.weight'."""
    name = name.removeprefix(ROOT).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    module, _, ending = name.partition(".lora_")
    return module, f"lora_{ending}"


def check(folder: Path, module: str, pair: Pair, place: Place) -> None:
    rank = pair.A.shape[0]
    if pair.A.shape != (rank, place.width) or pair.B.shape != (place.out, rank):
        raise DataError(
            f"{folder} is an adapter of another base: at {module} it maps {pair.A.shape[-1]} to {pair.B.shape[0]} "
            f"numbers, this model {place.width} to {place.out}"
        )


def apart(pair: Pair, places: Mapping[str, Place], rank: int, module: str) -> dict[str, Pair]:
    """A published matrix's adapter as those of our parts: either as `peft.joined` laid them, or with the same A for
    each."""
    if len(places) == 1 or pair.A.shape[0] == rank:
        return {address: rows(pair, pair.A, pair.B, place) for address, place in places.items()}
    found: dict[str, Pair] = {}
    for A, B in zip(pair.A.split(rank), pair.B.split(rank, dim=1), strict=True):
        free = [address for address in places if address not in found]
        touched = [address for address in places if B[places[address].rows].any()] or free[:1]
        if len(touched) != 1 or touched[0] not in free:
            raise DataError(f"{module}: rank {pair.A.shape[0]} beside r {rank} is not read here: merge it in PEFT")
        found[touched[0]] = rows(pair, A, B, places[touched[0]])
    return found


def rows(pair: Pair, A: Tensor, B: Tensor, place: Place) -> Pair:
    return Pair(A, B[place.rows], None if pair.magnitude is None else pair.magnitude[place.rows])


def technique_of(config: Mapping[str, Any], targets: Sequence[str]) -> LoRA | RsLoRA | DoRA:
    rank, alpha, dropout = config["r"], float(config.get("lora_alpha", 8)), float(config.get("lora_dropout") or 0.0)
    stable = bool(config.get("use_rslora"))
    if config.get("use_dora"):
        return DoRA(rank, alpha * (math.sqrt(rank) if stable else 1.0), dropout, tuple(targets))
    return (RsLoRA if stable else LoRA)(rank, alpha, dropout, tuple(targets))


@torch.no_grad()
def fill(model: nn.Module, parts: Mapping[str, Pair]) -> None:
    for address, edit, _ in edits(model):
        one, low = parts[address], edit.low if isinstance(edit, Directed) else edit
        low.A.copy_(one.A)  # type: ignore[union-attr, operator]
        low.B.copy_(one.B)  # type: ignore[union-attr, operator]
        if isinstance(edit, Directed):
            if one.magnitude is None:
                raise UsageError("use_dora is set, but the adapter has no magnitudes; save it again")
            edit.magnitude.copy_(one.magnitude)


def underneath(where: str | Path) -> str | None:
    """The base that an adapter's folder names; None for anything that is not an adapter's folder alone."""
    folder = Path(where).expanduser()
    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        return None
    base = read_config(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"{folder} is an adapter that does not say of which model: quest.load the base, then "
            "quest.load_adapter(model, folder)"
        )
    return str(base)
