"""GGUF files of every architecture whose keys are changed: left out, of another type, of a hostile value. (The target
x.gguf changes the bytes of one file, whose keys are those of a Llama.)"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quest.hub.gguf import (
    ARRAY,
    BOOL,
    FLOAT32,
    STRING,
    UINT32,
    StoredTensor,
    TensorData,
    Value,
    encode_string,
    encode_value,
    read_gguf,
    write_gguf,
)
from llm_quest.hub.gguf_export import save_gguf
from llm_quest.models.build import build
from tests.gguf_judge import word_tokenizer
from tests.gguf_models import GGUF_MODELS

VOCAB, MOST_LAYERS = 40, 8
INT32, INT64, FLOAT64 = 5, 11, 12
KINDS = {bool: (BOOL,), int: (UINT32, INT32, INT64), float: (FLOAT32, FLOAT64), str: (STRING,)}
"""The types that a value of another kind gets: the first one that holds it."""


@functools.cache
def example_files() -> dict[str, tuple[Mapping[str, Value], dict[str, TensorData]]]:
    """Architecture -> keys and tensors of a small file."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, make in enumerate(GGUF_MODELS.values()):
            if (config := make()).num_hidden_layers <= MOST_LAYERS:
                file = Path(folder) / f"{number}.gguf"
                save_gguf(build(dataclasses.replace(config, vocab_size=VOCAB)), word_tokenizer(VOCAB), file)
                read = read_gguf(file)
                found[read.architecture] = read.metadata, {name: in_memory(one) for name, one in read.tensors.items()}
    return found


def in_memory(tensor: StoredTensor) -> TensorData:
    with tensor.file.open("rb") as handle:
        handle.seek(tensor.start)
        content = handle.read(tensor.nbytes)
    return TensorData(tensor.dtype, tensor.shape, lambda: iter([content]))


def example_keys() -> list[Any]:
    """The keys of each file as a JSON value."""
    return [
        {"file": name, "keys": {key: one.value for key, one in keys.items()}}
        for name, (keys, _) in example_files().items()
    ]


def write_with_keys(file: Path, target: Path) -> bool:
    """The file that the JSON names, with the JSON's keys; False where that is no file with keys at all."""
    try:
        given = json.loads(file.read_bytes())
        keys, tensors = example_files()[given["file"]]
        wanted = given["keys"].items()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False
    values = {key: make_value(value, keys.get(key)) for key, value in wanted if can_be_written(key, STRING)}
    target.unlink(missing_ok=True)
    write_gguf(target, {key: one for key, one in values.items() if one is not None}, tensors)
    return True


def make_value(value: Any, before: Value | None) -> Value | None:
    """The value with the type that the key had, if that holds it, or another; None for what no type holds."""
    if isinstance(value, list):
        kinds = [before.element] if before is not None and before.kind == ARRAY else [UINT32]
        kinds += KINDS.get(type(value[0]), ()) if value else ()
        found = next((kind for kind in kinds if all(can_be_written(one, kind) for one in value)), None)
        return None if found is None else Value(ARRAY, value, found)
    kinds = [before.kind if before is not None else -1, *KINDS.get(type(value), ())]
    return next((Value(kind, value) for kind in kinds if can_be_written(value, kind)), None)


def can_be_written(value: Any, kind: int) -> bool:
    """Whether a value has this type in a file."""
    try:
        encode_string(value) if kind == STRING else encode_value(Value(kind, value))
    except Exception:
        return False
    return kind != ARRAY and (kind == BOOL) == isinstance(value, bool)
