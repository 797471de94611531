"""GGUF files: the package `gguf` reads what we write, we read what it writes, and both quantize to the same bits."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from llm_quest.errors import DataError, ResourceError, UsageError
from llm_quest.files import atomic_model_file
from llm_quest.hub.gguf import (
    FLOAT32,
    INT32,
    STRING,
    TENSOR_TYPES,
    TensorData,
    Value,
    array,
    boolean,
    float32,
    read_gguf,
    string,
    uint32,
    write_gguf,
)
from llm_quest.hub.gguf_blocks import EncodedTensor, decode, encode_chunks, read_encoded_into
from llm_quest.hub.gguf_blocks import tensor_data as data
from llm_quest.hub.gguf_dequantize import DEQUANTIZE_ONLY

METADATA = {
    "general.architecture": string("llama"),
    "llama.block_count": uint32(2),
    "llama.eps": float32(1e-5),
    "flag": boolean(True),
    "words": array(STRING, ["a", "é", ""]),
    "types": array(INT32, [1, -3]),
    "scores": array(FLOAT32, [0.5, -1e6]),
    "big": Value(10, 2**40),
}


def numbers(*shape: int) -> torch.Tensor:
    """Numbers of many magnitudes, with zeros, ties and exact halves among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()
    x[0], x[1], x[2] = 0, torch.arange(shape[1]) * 0.5 - 8, torch.tensor([1.0, -1.0]).repeat(shape[1] // 2)
    return x


def test_the_package_reads_what_we_write(tmp_path):
    tensors = {"a": numbers(5, 64), "b": torch.arange(7.0), "c": numbers(3, 4 * 32).view(3, 4, 32)}
    kinds = {"a": "Q8_0", "b": "F32", "c": "BF16"}
    write_gguf(tmp_path / "x.gguf", METADATA, {name: data(one, kinds[name]) for name, one in tensors.items()})
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for name, value in METADATA.items():
        assert reader.fields[name].contents() == pytest.approx(value.value) or value.kind in (STRING, 9)
        assert reader.fields[name].types[0] == value.kind
    assert reader.fields["words"].contents() == ["a", "é", ""]
    for tensor in reader.tensors:
        assert tuple(tensor.shape[::-1]) == tuple(tensors[tensor.name].shape)
        assert gguf.GGMLQuantizationType(tensor.tensor_type).name == kinds[tensor.name]
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensors[tensor.name].shape)
        tolerance = 0.0 if kinds[tensor.name] == "F32" else np.abs(read).max() / 100
        assert np.abs(read - tensors[tensor.name].numpy()).max() <= tolerance


def test_we_read_what_the_package_writes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_uint32("qwen2.block_count", 3)
    writer.add_token_list(["x", "ü"])
    writer.add_float64("qwen2.wide", 0.25)
    x = numbers(4, 64)
    writer.add_tensor("plain", x.numpy())
    packed = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    file = read_gguf(tmp_path / "x.gguf")
    assert file.architecture == "qwen2"
    assert (file.get("qwen2.block_count"), file.get("qwen2.wide")) == (3, 0.25)
    assert file.get("tokenizer.ggml.tokens") == ["x", "ü"]
    out = torch.empty(4, 64)
    assert read_encoded_into(EncodedTensor(file.tensors["packed"]), out) == 0
    assert np.array_equal(out.numpy(), gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0))
    read_encoded_into(EncodedTensor(file.tensors["plain"], lambda y: y + 1), out)
    assert torch.equal(out, x + 1)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_numbers_have_the_bits_of_the_package(name):
    x, kind = numbers(400, 96), getattr(gguf.GGMLQuantizationType, name)
    theirs = np.ascontiguousarray(gguf.quants.quantize(x.numpy(), kind)).view(np.uint8).reshape(-1)
    ours = np.concatenate([np.frombuffer(chunk, np.uint8) for chunk in encode_chunks(x, name)])
    assert np.array_equal(ours, theirs)
    again = decode(torch.from_numpy(ours.copy()), name).view(x.shape)
    assert np.array_equal(again.numpy(), gguf.quants.dequantize(theirs.reshape(400, -1), kind).reshape(x.shape))


@pytest.mark.parametrize("name", [*DEQUANTIZE_ONLY])
def test_every_block_type_is_read_with_the_bits_of_the_package(name, tmp_path):
    """Any bytes, but finite scales: their float16 has no exponent of ones."""
    kind, generator = TENSOR_TYPES[name], torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (257, kind.nbytes), dtype=torch.uint8, generator=generator)
    d = torch.randn(257, 1, generator=generator).to(torch.float16).view(torch.uint8)
    places = {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82], "IQ4_NL": [0], "Q5_0": [0], "MXFP4": []}
    for place in places.get(name, [0, 2]):
        data[:, place : place + 2] = d
    if name == "MXFP4":
        data[:, 0] = torch.arange(257).clamp(max=250).to(torch.uint8)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(decode(data.flatten(), name).view(theirs.shape).numpy(), theirs)
    write_gguf(tmp_path / "x", {}, {"x": TensorData(name, theirs.shape, lambda: iter([data.numpy()]))})
    out = torch.empty(257, kind.size)
    assert read_encoded_into(EncodedTensor(read_gguf(tmp_path / "x").tensors["x"]), out) == 0
    assert np.array_equal(out.numpy(), theirs)
    assert len(np.unique(theirs)) > 1000


def test_a_block_of_numbers_too_small_for_its_scale_is_zero():
    x = torch.full((1, 32), 1e-42)
    for name in ("Q8_0", "Q4_0"):
        (chunk,) = encode_chunks(x, name)
        assert not decode(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), name).any()


def test_types_have_the_sizes_of_the_package():
    for name, kind in TENSOR_TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert (theirs.value, gguf.GGML_QUANT_SIZES[theirs]) == (kind.number, (kind.size, kind.nbytes))


def test_a_large_tensor_is_written_in_pieces():
    pieces = [len(chunk) for chunk in encode_chunks(torch.zeros(3000, 4096, dtype=torch.bfloat16), "F32")]
    assert sum(pieces) == 3000 * 4096 * 4
    assert max(pieces) <= 2 * 8 << 20


GOOD = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)


def header(*, version: int = 3, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor_info(name: str, shape: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "no GGUF": (b"SAFE" + GOOD[4:], "begins with"),
    "short": (b"GGUF", "4 bytes"),
    "version 1": (header(version=1), "version 1;"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "more tensors than bytes": (header(tensors=2**60), "are announced"),
    "more pairs than bytes": (header(pairs=2**62), "are announced"),
    "a string beyond the end": (header(pairs=1, rest=struct.pack("<Q", 2**63) + bytes(40)), "bytes of a key"),
    "not UTF-8": (header(pairs=1, rest=struct.pack("<Q", 2) + b"\xff\xff" + bytes(40)), "not UTF-8"),
    "an unknown type": (header(pairs=1, rest=text("k") + struct.pack("<I", 77) + bytes(40)), "value type 77"),
    "an array of arrays": (
        header(pairs=1, rest=text("k") + struct.pack("<II", 9, 9) + bytes(40)),
        "array of the value",
    ),
    "a huge array": (header(pairs=1, rest=text("k") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(40)), "numbers of k"),
    "a key twice": (header(pairs=2, rest=(text("k") + struct.pack("<II", 4, 1)) * 2 + bytes(40)), "appears twice"),
    "no dimensions": (header(tensors=1, rest=text("w") + struct.pack("<I", 0) + bytes(40)), "0 dimensions"),
    "absurd shape": (header(tensors=1, rest=tensor_info("w", (2**50, 1)) + bytes(64)), "cannot have"),
    "half a block": (header(tensors=1, rest=tensor_info("w", (31, 1), 8) + bytes(64)), "cannot have"),
    "an unknown tensor type": (header(tensors=1, rest=tensor_info("w", (2,), 99) + bytes(64)), "tensor type 99"),
    "a gap": (header(tensors=1, rest=tensor_info("w", (2,), 0, 32) + bytes(99)), "offset 32"),
    "a tensor twice": (header(tensors=2, rest=tensor_info("w") * 2 + bytes(99)), "appears twice"),
    "cut off": (header(tensors=1, rest=tensor_info("w", (200,)) + bytes(64)), "cut off"),
    "alignment 3": (
        header(pairs=1, rest=text("general.alignment") + struct.pack("<II", 4, 3) + bytes(40)),
        "power of two",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_file_is_refused_in_one_message(kind, tmp_path):
    content, words = HOSTILE[kind]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(DataError, match=r"^x\.gguf: ") as raised:
        read_gguf(tmp_path / "x.gguf")
    assert words in str(raised.value)


def test_every_cut_of_a_file_is_refused(tmp_path):
    write_gguf(tmp_path / "x.gguf", METADATA, {"a": data(numbers(4, 32), "Q8_0")})
    whole = (tmp_path / "x.gguf").read_bytes()
    assert read_gguf(tmp_path / "x.gguf").tensors["a"].nbytes == 136
    for size in range(0, len(whole) - 24, 7):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_gguf(tmp_path / "cut.gguf")


def test_nothing_half_written_has_the_final_name(tmp_path):
    target = tmp_path / "model.gguf"

    def fail():
        yield b"abcd"
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(ResourceError, match="nothing was changed"),
        atomic_model_file(target, overwrite=False, required_bytes=1) as temporary,
    ):
        write_gguf(temporary, METADATA, {"a": TensorData("F32", (2,), fail)})
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"old")
    with pytest.raises(UsageError, match="--overwrite"), atomic_model_file(target, overwrite=False, required_bytes=1):
        pass
    with atomic_model_file(target, overwrite=True, required_bytes=1) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    with (
        pytest.raises(ResourceError, match="make room"),
        atomic_model_file(target, overwrite=True, required_bytes=2**62),
    ):
        pass
