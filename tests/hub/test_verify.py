"""`quest verify`: every kind of model that transformers has too is compared, within transformers' own error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llm_quest.cli.main import app
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import save
from llm_quest.hub.verify import MARGIN, ROUNDING, compare_with_transformers
from llm_quest.models import clip, clip_text, llama, siglip, vit
from llm_quest.models.build import build, preset
from tests.family_oracles import ORACLES
from tests.models.vision import CLIP_TEXT, SIZES, their_clip, their_gemma3, their_llava, their_qwen3_5, their_vit
from tests.oracles import randomize_, save_published, tiny_gpt2, tiny_llama, transformers


def vit_without_classes() -> Any:
    return randomize_(transformers.ViTModel(transformers.ViTConfig(**SIZES, num_hidden_layers=2)))


def clip_tower() -> Any:
    return randomize_(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, num_hidden_layers=2)))


def clip_encoder_with_projection(kind: str) -> Any:
    """An image or text encoder as a model of its own, projected."""
    numbers = {**SIZES, "num_hidden_layers": 2} if kind == "Vision" else CLIP_TEXT
    config = getattr(transformers, f"CLIP{kind}Config")(**numbers, projection_dim=24)
    return randomize_(getattr(transformers, f"CLIP{kind}ModelWithProjection")(config))


def reward_model() -> Any:
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, 7
    return randomize_(transformers.LlamaForSequenceClassification(config))


MODELS = {
    "gpt2": tiny_gpt2,
    "llama": lambda: tiny_llama(rope="yarn", tie_word_embeddings=False),
    "reward model": reward_model,
    "vit": their_vit,
    "vit without classes": vit_without_classes,
    "clip tower": clip_tower,
    "clip tower, projected": lambda: clip_encoder_with_projection("Vision"),
    "clip text, projected": lambda: clip_encoder_with_projection("Text"),
    "whole clip": their_clip,
    "llava": their_llava,
    "llava with a vit": lambda: their_llava("vit"),
    "gemma3": their_gemma3,
    "qwen3.5": their_qwen3_5,
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_is_found_equal_within_the_references_own_error(tmp_path: Path, kind: str):
    found = compare_with_transformers(save_published(MODELS[kind](), tmp_path / "m"))
    assert found.passed, found.lines()
    assert 0 < found.reference_error < 1e-4
    assert found.allowed == pytest.approx(max(MARGIN * found.reference_error, ROUNDING * found.largest_logit))
    assert (found.difference_padded is None) == (kind not in ("gpt2", "llama", "reward model"))


ONE_OF_A_FAMILY = {build.family: name for name, build in reversed(ORACLES.items())}


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY.values())
def test_every_family_of_text_is_compared_from_its_folder(tmp_path: Path, name: str):
    """Whatever transformers' own choice of kernels is: its grouped products of experts know no float64."""
    found = compare_with_transformers(save_published(ORACLES[name](), tmp_path / "m"))
    assert found.passed, found.lines()


@pytest.mark.parametrize(("kind", "module"), [("llama", llama), ("reward model", llama), ("llava", llama)])
def test_a_model_of_text_that_we_compute_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: Any
):
    folder = save_published(MODELS[kind](), tmp_path / "m")
    monkeypatch.setattr(module, "RMSNorm", lambda width, eps: torch.nn.RMSNorm(width, eps=100 * eps))
    found = compare_with_transformers(folder)
    assert not found.passed
    assert "DIFFERENT" in found.lines()[0]


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("vit", vit),
        ("vit without classes", vit),
        ("clip tower", clip),
        ("whole clip", clip_text),
        ("llava", clip),
        ("gemma3", siglip),
    ],
)
def test_an_image_encoder_that_we_compute_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: Any
):
    folder = save_published(MODELS[kind](), tmp_path / "m")
    monkeypatch.setattr(module, "LayerNorm", lambda width, eps: torch.nn.LayerNorm(width, eps=1e-3))
    assert not compare_with_transformers(folder).passed


def test_the_command_says_both_figures(tmp_path: Path):
    folder = save_published(their_vit(), tmp_path / "m")
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == 0
    assert "equal" in result.stdout
    assert "transformers' own error" in result.stdout


def test_a_folder_that_transformers_refuses_is_a_message_with_its_reason(tmp_path: Path):
    config = dataclasses.replace(preset("llama3.2-tiny").config, hidden_size=50)
    save(build(config, seed=0), folder := tmp_path / "m")
    with pytest.raises(
        UsageError, match=r"transformers cannot read .*, which loads here: .*hidden size \(50\)"
    ) as error:
        compare_with_transformers(folder)
    assert "\n" not in str(error.value)
