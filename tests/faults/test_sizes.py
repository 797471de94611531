"""A number in a file that is read never leads to an allocation or a loop before it is refused."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.all_targets import ALL_TARGETS
from tests.faults.fuzz import read_once
from tests.faults.mutations import to_hostile_json
from tests.faults.targets import Target, family_configs, inspect_config

HUGE = (2**31, 10**9, 1e30, -(2**31))


def number_leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every number in a value, at any depth."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from number_leaves(inner, (*path, key))
    elif type(value) in (int, float):
        yield path


def replace_leaf(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at this place."""
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = replace_leaf(value[path[0]], path[1:], new)
    return copied


CONFIGS = family_configs()


@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=lambda number: f"{number} {CONFIGS[number]['model_type']}")
def test_no_number_of_a_config_takes_memory_or_time(number: int, tmp_path: Path):
    target = Target("config.json", inspect_config)
    faults = []
    for place, path in enumerate(number_leaves(CONFIGS[number])):
        content = to_hostile_json(replace_leaf(CONFIGS[number], path, HUGE[(place + number) % len(HUGE)]))
        (tmp_path / "config.json").write_bytes(content)
        if fault := read_once(target, tmp_path / "config.json", place, b""):
            faults.append(f"{'.'.join(map(str, path))}: {fault.what} at {fault.place}")
    assert not faults


def gzip_of(content: bytes, times: int) -> bytes:
    """content, so often, compressed."""
    stream = io.BytesIO()
    with gzip.open(stream, "wb", compresslevel=1) as packed:
        for _ in range(times):
            packed.write(content)
    return stream.getvalue()


def parquet_bomb() -> bytes:
    """Two million equal rows."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": pyarrow.repeat("x", 2_000_000)}), stream)
    return stream.getvalue()


def png_bomb() -> bytes:
    """60,000 x 60,000 black pixels in a kilobyte, were they there."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zip_bomb() -> bytes:
    """A file of torch.save whose pickle is compressed zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("archive/data.pkl", "archive/data/0"):
            archive.writestr(name, bytes(20_000_000))
        archive.writestr("archive/version", b"3\n")
    return stream.getvalue()


def npy_bomb() -> bytes:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000,), }"
    header = header.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(32)


def safetensors_bomb() -> bytes:
    entry = {"dtype": "F32", "shape": [2**39, 2**20], "data_offsets": [0, 2**61]}
    text = json.dumps({"model.embed_tokens.weight": entry}).encode()
    return struct.pack("<Q", len(text)) + text


def many_shards() -> bytes:
    names = {f"{number}": f"{number}.safetensors" for number in range(200_000)}
    return json.dumps({"weight_map": names}).encode()


def billion_laughs() -> bytes:
    lines = [b"a0: &a0 [lol, lol]"]
    lines += [b"a%d: &a%d [*a%d, *a%d]" % (n, n, n - 1, n - 1) for n in range(1, 31)]
    return b"recipe: pretrain\n" + b"\n".join(lines)


DEEP = b"[" * 200_000
BOMBS: dict[tuple[str, str], Callable[[], bytes]] = {
    ("rows.jsonl.gz", "an endless line"): lambda: gzip_of(b"x" * 1_000_000, 100),
    ("rows.jsonl.gz", "a deep line"): lambda: gzip.compress(b'{"prompt": ' + DEEP),
    ("rows.json", "deep"): lambda: DEEP,
    ("rows.csv", "an endless cell"): lambda: b'prompt,completion\n"' + b"x" * 1_000_000,
    ("rows.parquet", "equal rows"): parquet_bomb,
    ("picture", "pixels"): png_bomb,
    ("weights.bin", "a compressed entry"): zip_bomb,
    ("train.offsets.npy", "a shape"): npy_bomb,
    ("model.safetensors", "a shape"): safetensors_bomb,
    ("model.safetensors", "a header"): lambda: struct.pack("<Q", 2**62) + b"{}",
    ("model.safetensors.index.json", "too many shards"): many_shards,
    ("recipe.yaml", "a billion laughs"): billion_laughs,
    ("recipe.yaml", "deep"): lambda: b"recipe: " + DEEP,
    ("template arguments", "a billion laughs"): lambda: billion_laughs().replace(b"\n", b", ").join((b"{", b"}")),
    ("template arguments", "deep"): lambda: DEEP,
    ("tokenizer.json", "an id"): lambda: b'{"model": {"type": "BPE", "vocab": {"a": 4294967290}, "merges": []}}',
    ("vocab.json", "an id"): lambda: b'{"a": 2147483648}',
    ("tokenizer.model", "a length"): lambda: b"\n\xff\xff\xff\xff\x7f",
    ("MANIFEST.json", "deep"): lambda: DEEP,
    ("state.json", "deep"): lambda: DEEP,
    ("config.json", "deep"): lambda: b'{"model_type": ' + DEEP,
    ("config.json", "digits"): lambda: b'{"model_type": "llama", "hidden_size": ' + b"9" * 100_000 + b"}",
    ("metrics.jsonl", "digits"): lambda: b'{"step": ' + b"9" * 100_000 + b"}",
    ("positions.json", "deep"): lambda: DEEP,
    ("judge's reply", "deep"): lambda: DEEP,
    ("arguments of a call", "deep"): lambda: DEEP,
    ("tool calls", "deep"): lambda: b'<tool_call>{"name": ' + b"{" * 10_000 + b"}" * 10_000 + b"</tool_call>",
}


@pytest.mark.parametrize(("name", "bomb"), BOMBS, ids=[" ".join(pair) for pair in BOMBS])
def test_a_bomb_is_refused_before_it_takes_memory_or_time(name: str, bomb: str, tmp_path: Path):
    """Refused, and not read: where a target returns (a template fails, a row is skipped), it has done so in time."""
    target = next(one for one in ALL_TARGETS if one.name == name)
    file = tmp_path / (target.file or target.name)
    file.write_bytes(BOMBS[name, bomb]())
    assert read_once(target, file, 0, b"") is None
