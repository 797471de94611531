"""MXFP4: every code with every scale, the order within a byte, transformers' decoder, and a folder as gpt-oss publishes
it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.load_save import load, save
from llm_quest.hub.mxfp4 import decode_mxfp4
from tests.family_oracles import ORACLES
from tests.oracles import edit_config, logits_of, save_published

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The table of the format's specification: E2M1, three bits of exponent and mantissa."""
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def by_hand(code: int, scale: int) -> float:
    return (-1.0 if code & 8 else 1.0) * MAGNITUDES[code & 7] * 2.0 ** (scale - 127)


def test_all_sixteen_codes_with_all_scales_are_the_numbers_of_the_table():
    codes = torch.arange(16).repeat(2).view(16, 2)
    blocks = (codes[:, 0] | codes[:, 1] << 4).to(torch.uint8).expand(255, 1, 16)
    got = decode_mxfp4(blocks, torch.arange(255, dtype=torch.uint8)[:, None])
    expected = torch.tensor([[by_hand(code % 16, scale) for code in range(32)] for scale in range(255)])
    assert expected.dtype == torch.float32
    assert torch.equal(got, expected)
    assert torch.equal(got.signbit(), expected.signbit()), "minus zero is a number of its own"
    assert torch.equal(got.to(torch.bfloat16).float()[:253], expected[:253]), "bfloat16 holds each of them"


def test_the_low_half_of_a_byte_comes_first():
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0], blocks[0, 0, 1] = 0x2F, 0x70
    assert decode_mxfp4(blocks, torch.tensor([[128]], dtype=torch.uint8))[0, :4].tolist() == [-12.0, 2.0, 0.0, 12.0]


def random_blocks(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales of (E,out,in); the scales make numbers of about 1/4."""
    generator, (experts, rows, width) = torch.Generator().manual_seed(seed), shape
    blocks = torch.randint(256, (experts, rows, width // 32, 16), generator=generator).to(torch.uint8)
    return blocks, torch.randint(121, 126, (experts, rows, width // 32), generator=generator).to(torch.uint8)


def test_decoding_is_transformers_own():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_blocks((3, 10, 64), seed=1)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(decode_mxfp4(blocks, scales).mT, theirs.float())


def write_mxfp4_folder(home: Path) -> tuple[Path, Any]:
    """A tiny gpt-oss whose experts are in MXFP4, as in openai/gpt-oss-20b, and transformers' model of the same numbers
    (by its own decoder)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = ORACLES["gpt_oss, wide experts"]()
    folder = save_published(theirs, home / "m")
    held = safetensors.torch.load_file(folder / "model.safetensors")
    for seed, name in enumerate([one for one in held if one.endswith(("gate_up_proj", "down_proj"))]):
        experts, width, rows = held.pop(name).shape
        blocks, scales = random_blocks((experts, rows, width), seed)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        theirs.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    safetensors.torch.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, lambda config: config.update(quantization_config=QUANTIZATION))
    return folder, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_folder_is_decoded_exactly_and_saved_as_plain_numbers(tmp_path: Path, dtype: torch.dtype):
    folder, theirs = write_mxfp4_folder(tmp_path)
    save(load(folder, dtype=dtype), tmp_path / "out")
    ours = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor.to(dtype)), name
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@torch.no_grad()
def test_its_logits_are_those_of_transformers(tmp_path: Path):
    folder, theirs = write_mxfp4_folder(tmp_path)
    tokens = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(2))
    expected = logits_of(theirs, tokens)
    torch.testing.assert_close(load(folder)(tokens), expected, atol=2e-5, rtol=1e-4)
    assert expected.abs().max() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scales", r"experts\.down_proj: .* and no scales are no MXFP4"),
        ("shape", r"experts\.down_proj: \(8, 64, 1, 16\) and \(8, 63, 1\) are no MXFP4"),
        ("nan", r"not finite: model\.layers\.0\.mlp\.experts\.down_proj \(32 numbers\)"),
        ("config", r"stored as U8|unexpected: .*_blocks"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: str, message: str):
    folder, _ = write_mxfp4_folder(tmp_path)
    held = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    if change == "scales":
        del held[name]
    elif change == "shape":
        held[name] = held[name][:, :63].contiguous()
    elif change == "nan":
        held[name][0, 0, 0] = 255
    else:
        edit_config(folder, lambda config: config.pop("quantization_config"))
    safetensors.torch.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=message):
        load(folder)


def test_the_table_of_the_test_is_the_specifications():
    """E2M1: two bits of exponent with bias 1, one of mantissa; subnormal without exponent."""
    for code in range(8):
        exponent, mantissa = code >> 1, code & 1
        value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert value == MAGNITUDES[code]
    assert math.copysign(1, by_hand(8, 127)) == -1
