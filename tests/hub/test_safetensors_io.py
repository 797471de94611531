"""The safetensors format, against the library and against forged files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from llm_quest.errors import DataError
from llm_quest.hub import safetensors_io
from llm_quest.hub.safetensors_io import read_header, read_into
from llm_quest.tensor_files import write_tensors


def write_safetensors(file: Path, header: dict | str, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def tensors_of_each_dtype(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "half": torch.randn(3, 5, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "plain": torch.randn(4, 6, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "empty": torch.empty(0, 3),
        "turned": torch.randn(6, 4, generator=generator).T,
    }


def test_what_we_write_the_library_reads(tmp_path):
    ours = tensors_of_each_dtype(torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "a.safetensors", ours)
    theirs = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) and theirs[name].dtype == ours[name].dtype for name in ours)


@pytest.mark.parametrize("chunk", [1, 16, 8 << 20])
def test_what_the_library_writes_we_read_into_any_strides_and_dtype(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(safetensors_io, "CHUNK_BYTES", chunk)
    theirs = {name: t.contiguous() for name, t in tensors_of_each_dtype(torch.Generator().manual_seed(1)).items()}
    safetensors.torch.save_file(theirs, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")
    for name, tensor in theirs.items():
        for out in (
            torch.empty_like(tensor),
            torch.empty_like(tensor.double()),
            torch.empty_like(tensor.mT if tensor.dim() > 1 else tensor),
        ):
            out = out.mT if out.shape != tensor.shape else out
            assert read_into(stored[name], out) == 0
            assert torch.equal(out, tensor.to(out.dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_counted(tmp_path, bad):
    tensor = torch.ones(50, 3)
    tensor[7, 1] = tensor[49, 2] = bad
    write_tensors(tmp_path / "a.safetensors", {"x": tensor})
    assert read_into(read_header(tmp_path / "a.safetensors")["x"], torch.empty(50, 3)) == 2


def test_large_finite_numbers_whose_sum_overflows_are_finite(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.full((9,), 3e38), "h": torch.full((9,), 6e4).half()})
    stored = read_header(tmp_path / "a.safetensors")
    assert read_into(stored["x"], torch.empty(9)) == 0
    assert read_into(stored["h"], torch.empty(9).half()) == 0


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error_and_no_crash(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"x": torch.ones(1000)})
    stored = read_header(file)["x"]
    os.truncate(file, 500)
    with pytest.raises(DataError, match="became shorter"):
        read_into(stored, torch.empty(1000))


FORGED = {
    "cut off": ({"x": entry(0, 16, [4])}, bytes(12), "cut off: "),
    "longer": ({"x": entry(0, 16, [4])}, bytes(20), "longer than its header says"),
    "overlap": ({"x": entry(0, 16, [4]), "y": entry(8, 24, [4])}, bytes(24), "y overlaps"),
    "twice the same bytes": ({"x": entry(0, 16, [4]), "y": entry(0, 16, [4])}, bytes(16), "overlaps"),
    "gap": ({"x": entry(0, 16, [4]), "y": entry(20, 36, [4])}, bytes(36), "y leaves a gap"),
    "absurd shape": ({"x": entry(0, 16, [2**40, 2**40])}, bytes(16), "x claims shape"),
    "absurd but empty": ({"x": entry(0, 0, [2**62, 0])}, b"", "x claims shape"),
    "wrong size": ({"x": entry(0, 16, [5])}, bytes(16), "x claims shape"),
    "negative": ({"x": entry(0, 16, [-4])}, bytes(16), "entry of 'x' cannot be read"),
    "backwards": ({"x": entry(16, 0, [4])}, bytes(16), "x claims shape"),
    "unknown dtype": ({"x": entry(0, 16, [4], "F33")}, bytes(16), "entry of 'x' cannot be read"),
    "no entry": ({"x": 3}, b"", "entry of 'x' cannot be read"),
    "duplicate name": ('{"x": %s, "x": %s}' % ((json.dumps(entry(0, 16, [4])),) * 2), bytes(16), "'x' appears twice"),
    "no JSON": ("{never closed", b"", "no valid JSON"),
    "deep JSON": ("[" * 100_000, b"", "no valid JSON"),
    "a list": ("[]", b"", "JSON object was expected"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_or_damaged_file_is_named_with_its_fault(tmp_path, case):
    header, data, message = FORGED[case]
    with pytest.raises(DataError, match=message) as caught:
        read_header(write_safetensors(tmp_path / "bad.safetensors", header, data))
    assert "bad.safetensors" in str(caught.value)


def test_a_header_that_claims_more_than_there_is_or_than_we_read_is_refused_unread(tmp_path):
    file = tmp_path / "bad.safetensors"
    for content in (
        b"",
        b"\0" * 4,
        (2**40).to_bytes(8, "little"),
        (safetensors_io.HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}",
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match="no safetensors file, or cut off"):
            read_header(file)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="no regular file"):
        read_header(tmp_path / "model.safetensors")
