"""Writes the adapter of a model as a GGUF file, which llama.cpp applies to the base's file (llama-server --lora).

      blk.0.attn_q.weight.lora_a   A (r,in)
      blk.0.attn_q.weight.lora_b   s B (out,r), rows as in the base's file

The scale s is in B, and `adapter.lora.alpha` is 0, for which llama.cpp multiplies by nothing: matrices of one file may
differ in rank. Where the base's file has one matrix and we edit its parts apart (GPT-2's attn_qkv), A's are stacked and
B's lie on the diagonal.

Commonly got wrong: the rows of B are in the order of the base's rows, which is not ours for q and k of Llama.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.files import atomic_model_file
from llm_quest.hub.gguf import TensorData, float32, string, uint32, write_gguf
from llm_quest.hub.gguf_blocks import tensor_data
from llm_quest.hub.gguf_config import layout_for
from llm_quest.hub.gguf_export import FILE_TYPES, GGUFReport, parse_float_type
from llm_quest.hub.gguf_tensors import Place, gguf_places
from llm_quest.hub.save_adapter import adapter_edits, to_lora_pair, whole_tensors
from llm_quest.layers.linear import find_row_slice
from llm_quest.layers.low_rank import (
    AdaptedLinear,
    AdaptedPackedLinear,
    DoRAUpdate,
    adapter_layers,
    as_floats,
    expert_parts,
)
from llm_quest.models.build import build_meta_model

Pieces = dict[str, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def save_gguf_adapter(model: Any, file: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> GGUFReport:
    """Write the adapter alone. dtype: f32, f16 or bf16; None: f32. UsageError without an adapter, or for one that
    llama.cpp does not apply: DoRA, whole parameters beside it, matrices that the base's file does not hold by rows."""
    main, layout = parse_float_type(dtype or "f32"), layout_for(model)
    if whole := whole_tensors(model):
        raise UsageError(
            f"llama.cpp applies low-rank edits alone, and {sorted(whole)[0]} was trained whole: --merge instead"
        )
    places = gguf_places(build_meta_model(model.config), layout)
    pieces: Pieces = {}
    for address, edit, _ in adapter_edits(model):
        for name, pair in tensors_of_edit(model, places, address, edit):
            pieces.setdefault(name, []).append(pair)
    tensors: dict[str, TensorData] = {}
    for name, pairs in pieces.items():
        A, B = (torch.cat(sides, dim=dim) for sides, dim in zip(zip(*pairs, strict=True), (-2, -1), strict=True))
        tensors |= {f"{name}.lora_a": tensor_data(A, main), f"{name}.lora_b": tensor_data(B, main)}
    metadata = {
        "general.architecture": string(layout.architecture),
        "general.type": string("adapter"),
        "general.file_type": uint32(FILE_TYPES[main]),
        "adapter.type": string("lora"),
        "adapter.lora.alpha": float32(0.0),
    }
    total = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_model_file(file, overwrite=overwrite, required_bytes=total + 2**20) as temporary:
        write_gguf(temporary, metadata, tensors)
    return GGUFReport(layout.architecture, main, len(tensors), total, ())


def tensors_of_edit(
    model: Any, places: dict[str, list[Place]], address: str, edit: Any
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The tensors of the base's file that an edit changes, each with A and with B in the order of its rows."""
    if isinstance(edit, DoRAUpdate):
        raise UsageError("llama.cpp applies no DoRA, whose magnitudes scale rows of the base: --merge instead")
    pair = to_lora_pair(edit)
    parameter, start, rows = rows_of_edit(model, address)
    B = pair.B.new_zeros(*pair.B.shape[:-2], rows, pair.rank)
    B.narrow(-2, start, pair.B.shape[-2]).copy_(edit.scale * pair.B)
    mask = torch.zeros_like(B)
    mask.narrow(-2, start, pair.B.shape[-2]).fill_(1.0)
    for name, parts in places.items():
        own = [place for place in parts if place.view.parameter == parameter]
        if own and any(bool(in_file_order(place, mask, address).any()) for place in own):
            yield name, (pair.A, torch.cat([in_file_order(place, B, address) for place in own], dim=-2))


def in_file_order(place: Place, B: Tensor, address: str) -> Tensor:
    """B (rows of the parameter, r) with its rows as a tensor of the file has them."""
    try:
        seen = place.view.view(B)
    except (RuntimeError, IndexError, ValueError):
        seen = B.new_empty(())
    if seen.dim() < 2 or seen.shape[-1] != B.shape[-1]:
        raise UsageError(
            f"llama.cpp holds {address} in another form than by its rows, so that no adapter fits: --merge instead"
        )
    return seen.reshape(*B.shape[:-2], -1, B.shape[-1])


def rows_of_edit(model: Any, address: str) -> tuple[str, int, int]:
    """(parameter, first row, rows of the parameter) of an address."""
    layers: Any = adapter_layers(model)
    if isinstance(layers.get(address), AdaptedLinear):
        return f"{address}.weight", 0, layers[address].base.weight.shape[0]
    path, _, part = address.rpartition(".")
    base = layers[path].base
    if isinstance(layers[path], AdaptedPackedLinear):
        return f"{path}.weight", base.row_slice(part).start, base.out_features
    if part == "down":
        return f"{path}.down", 0, as_floats(base.down).shape[1]
    rows = expert_parts(base)
    return f"{path}.gate_up", find_row_slice(rows, part).start, sum(rows.values())
