"""Writes a model as one GGUF file: numbers, tokenizer, chat template and weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.files import atomic_model_file
from llm_quest.hub.gguf import TENSOR_TYPES, TensorData, Value, float32, string, uint32, write_gguf
from llm_quest.hub.gguf_blocks import PLAIN, QUANTIZE, encode_chunks, tensor_data
from llm_quest.hub.gguf_config import export_keys, layout_for
from llm_quest.hub.gguf_layouts import SAMPLING
from llm_quest.hub.gguf_rope import rope_tensors
from llm_quest.hub.gguf_tensors import ALWAYS_FLOAT32, CHANGES, Place, file_shape, gguf_places
from llm_quest.hub.gguf_tokenizer import tokenizer_keys
from llm_quest.models.decoder import Decoder
from llm_quest.tensor_files import DTYPE_NAMES

FLOAT_TYPES = {name.lower(): name for name in PLAIN}
FLOAT_TYPES |= {str(dtype).removeprefix("torch."): name for name, dtype in PLAIN.items()}
"""--dtype -> a tensor type."""
QUANTIZE_NAMES = {"q8_0": "Q8_0", "q4_0": "Q4_0"}
"""--quantize -> a tensor type."""
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class GGUFReport:
    """The result of a GGUF export. notes: what llama.cpp computes differently, or what was left out."""

    architecture: str
    dtype: str
    tensors: int
    nbytes: int
    notes: tuple[str, ...]


def save_gguf(
    model: Decoder,
    tokenizer: Tokenizer,
    file: str | Path,
    *,
    quantize: str | None = None,
    dtype: str | None = None,
    name: str = "",
    overwrite: bool = False,
) -> GGUFReport:
    """Write a GGUF file that llama.cpp reads. quantize: q8_0 or q4_0, of all matrices whose rows are multiples of 32;
    embedding and head of q4_0 have q8_0. dtype: f32, f16 or bf16; None: the model's own. Norms, biases, routers and
    positions are float32.

    Raises UsageError for a model, or a tokenizer, that llama.cpp does not compute, naming what it lacks; ResourceError
    where the disk is full. At most some megabytes of one tensor are in memory, beside the model."""
    main = choose_type(model, quantize, dtype)
    layout = layout_for(model)
    keys, notes = export_keys(model, layout)
    texts, more = tokenizer_keys(tokenizer, model.config.vocab_size, model.generation_config)
    divisors, own_keys = rope_tensors(model.config, layout)
    tensors = {name: tensor_data(tensor.float(), "F32") for name, tensor in divisors.items()}
    tensors |= model_tensors(model, gguf_places(model, layout), main)
    metadata = general_keys(model, layout.architecture, main, safe_name(name)) | keys | texts | own_keys
    total = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_model_file(file, overwrite=overwrite, required_bytes=total + 2**24) as temporary:
        write_gguf(temporary, metadata, tensors)
    return GGUFReport(layout.architecture, main, len(tensors), total, (*notes, *more))


def can_be_gguf(model: Decoder, tokenizer: Tokenizer) -> bool:
    """Whether a GGUF file can hold a model and its tokenizer."""
    try:
        export_keys(model, layout_for(model))
        tokenizer_keys(tokenizer, model.config.vocab_size, model.generation_config)
    except UsageError:
        return False
    return True


def choose_type(model: Decoder, quantize: str | None, dtype: str | None) -> str:
    """The tensor type of most matrices."""
    if quantize is not None and quantize not in QUANTIZE_NAMES:
        raise UsageError(f"--quantize {quantize!r} is not written; {', '.join(QUANTIZE_NAMES)} are")
    given = None if dtype is None else parse_float_type(dtype)
    if quantize is not None:
        return QUANTIZE_NAMES[quantize]
    embed: Any = model.embed
    own = DTYPE_NAMES[embed.token.weight.dtype]
    return given or (own if own in PLAIN else "F32")


def parse_float_type(dtype: str) -> str:
    """The tensor type that --dtype names. UsageError for a name that is not known."""
    if dtype not in FLOAT_TYPES:
        raise UsageError(f"--dtype {dtype!r} is no type of a GGUF file; {', '.join(FLOAT_TYPES)} are")
    return FLOAT_TYPES[dtype]


def safe_name(name: str) -> str:
    """The value of `general.name`; empty if it has Phi-3 in it, for which llama.cpp expects tokens of Phi-3's
    vocabulary."""
    return "" if "phi-3" in name.lower() or "phi3" in name.lower() else name


def general_keys(model: Decoder, architecture: str, main: str, name: str) -> dict[str, Value]:
    keys = {
        "general.architecture": string(architecture),
        "general.type": string("model"),
        "general.file_type": uint32(FILE_TYPES[main]),
    }
    keys |= {"general.name": string(name)} if name else {}
    keys |= {"general.quantization_version": uint32(2)} if main in QUANTIZE else {}
    generation = model.generation_config
    for ours, theirs in SAMPLING.items():
        value = getattr(generation, ours, None)
        if value is not None:
            keys[f"general.sampling.{theirs}"] = Value(5, int(value)) if ours == "top_k" else float32(value)
    return keys


def model_tensors(model: Decoder, places: dict[str, list[Place]], main: str) -> dict[str, TensorData]:
    """All tensors, in the model's order."""
    parameters: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {}
    for name, parts in places.items():
        shape = file_shape(parts, parameters)
        dtype = tensor_type(name, shape, main)
        chunks = functools.partial(part_chunks, parts, parameters, dtype)
        tensors[name] = TensorData(dtype, shape, chunks)
    return tensors


def part_chunks(parts: Sequence[Place], parameters: dict[str, Tensor], dtype: str) -> Iterator[Any]:
    """The bytes of a tensor, view by view."""
    views = ((place.view.view(parameters[place.view.parameter]), place.change) for place in parts)
    return itertools.chain.from_iterable(
        encode_chunks(view, dtype, CHANGES[change][0] if change else None) for view, change in views
    )


def tensor_type(name: str, shape: tuple[int, ...], main: str) -> str:
    """The type of a tensor: float32 for vectors and for what llama.cpp wants so, float16 for a matrix whose rows no
    block divides."""
    if len(shape) == 1 or ALWAYS_FLOAT32.fullmatch(name) or not name.endswith(".weight"):
        return "F32"
    if main in PLAIN:
        return main
    chosen = "Q8_0" if main == "Q4_0" and name in EMBEDDINGS else main
    return "F16" if shape[-1] % TENSOR_TYPES[chosen].size else chosen
