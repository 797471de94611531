"""Values that no publisher means, in every kind of file of a folder: one message that names the file, the field and
what was found; nothing is computed of them, and no complaint follows from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import llm_quest as quest
from llm_quest.data.preprocessor_config import parse_preprocessor_config
from llm_quest.errors import DataError
from llm_quest.hub.load_save import load, save

ODD_ADAPTERS: dict[str, tuple[Any, str]] = {
    "r": ("2", "r is '2'"),
    "lora_alpha": (None, "lora_alpha is None; a number was expected"),
    "rank_pattern": ("x", "rank_pattern is 'x'; a table of module patterns was expected"),
    "alpha_pattern": ({"q_proj": "8"}, r"alpha_pattern\['q_proj'\] is '8'; a number was expected"),
    "lora_alpha ": (float("nan"), "lora_alpha is nan; a number was expected"),
    "rank_pattern ": ({"(": 3}, r"rank_pattern has '\(', which is no regular expression"),
    "rank_pattern  ": ({"q_proj": 0}, r"rank_pattern\['q_proj'\] is 0; a rank was expected"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(quest.build("llama3.2-tiny"), tmp_path_factory.mktemp("base") / "m")


def write_adapter(base: Path, folder: Path, changes: dict[str, Any], dims: int = 2) -> Path:
    tensors = {"lora_A": torch.randn(2, 48), "lora_B": torch.randn(64, 2)}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    held = {f"{module}.{one}.weight": tensor if dims == 2 else tensor[0] for one, tensor in tensors.items()}
    safetensors.torch.save_file(held, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ODD_ADAPTERS)
def test_an_odd_value_of_adapter_config_is_named(base: Path, tmp_path: Path, name: str):
    value, message = ODD_ADAPTERS[name]
    with pytest.raises(DataError, match=message):
        load(write_adapter(base, tmp_path, {name.strip(): value}))


def test_an_adapter_of_vectors_is_named(base: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"lora_A or lora_B is no matrix of model\.layers\.0\.self_attn\.q_proj"):
        load(write_adapter(base, tmp_path, {}, dims=1))


def copy_with_file(base: Path, folder: Path, file: str, content: bytes) -> Path:
    for one in base.iterdir():
        (folder / one.name).write_bytes(one.read_bytes())
    (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf{}", '{"a": 1}'.encode("utf-16"), b'{"a": 1, "a": 2}', b"[1]"])
def test_a_config_that_is_no_json_object_is_the_only_complaint(base: Path, tmp_path: Path, content: bytes):
    with pytest.raises(DataError, match=r"cannot be loaded: config\.json: ") as caught:
        load(copy_with_file(base, tmp_path, "config.json", content))
    assert "model_type" not in str(caught.value)
    assert str(caught.value).count("\n") == 0


ODD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a size": ({"vocab_size": 2**40}, "vocab_size is 1,099,511,627,776, which is no plausible size"),
    "rope list": ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; an object with rope_type"),
    "rope text": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object with rope_type"),
    "theta 0": ({"rope_theta": 0, "rope_parameters": None}, "rope_theta is 0; a number above 0 was expected"),
    "theta -1": (
        {"rope_parameters": {"rope_theta": -1.0}, "rope_scaling": None},
        r"rope_theta is -1\.0",
    ),
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_an_odd_value_of_config_is_named_alone(base: Path, tmp_path: Path, name: str):
    changes, message = ODD_CONFIGS[name]
    whole = json.loads((base / "config.json").read_text()) | changes
    with pytest.raises(DataError, match=message) as caught:
        load(copy_with_file(base, tmp_path, "config.json", json.dumps(whole).encode()))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_that_shows_nothing_is_refused(tmp_path: Path, window: int):
    folder = save(quest.build("mistral-tiny"), tmp_path / "m")
    whole = json.loads((folder / "config.json").read_text()) | {"sliding_window": window}
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=f"sliding_window is {window}; a positive whole number was expected"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 7),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("max_new_tokens", 0),
    ],
)
def test_advice_out_of_its_range_is_named(base: Path, tmp_path: Path, name: str, value: float):
    content = json.dumps({name: value}).encode()
    with pytest.raises(DataError, match=rf"generation_config\.json: {name} is .*; a number (from|of at least) "):
        load(copy_with_file(base, tmp_path, "generation_config.json", content))


def test_images_of_an_absurd_size_are_refused_before_memory_is_asked_for():
    with pytest.raises(DataError, match=r"images of size 1000000000 .* give a size from 1 to 16,384"):
        parse_preprocessor_config({"image_processor_type": "ViTImageProcessor", "size": 10**9})
