"""CLIP whole: image and text vectors and their logits against transformers, in float64; the folders that OpenAI,
OpenCLIP and transformers write; zero-shot classification by `quest classify`."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import pre_tokenizers, processors
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli.classify import classify_image
from llm_quest.cli.main import app
from llm_quest.data.images import CLIP_STATISTICS, ImageProcessor
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.float64 import computing_in_float64
from llm_quest.hub.load_save import load, save
from llm_quest.models.dual_encoder import CLIPModel
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.scope import Scope
from tests.models.test_float64_parity import BOUND
from tests.models.vision import images, their_clip
from tests.oracles import save_published, transformers


@functools.cache
def pair(hidden_act: str, eos: int) -> tuple[CLIPModel, Any]:
    """Ours, loaded from the folder that theirs wrote, and theirs, in float64."""
    with computing_in_float64(), tempfile.TemporaryDirectory() as folder:
        theirs = their_clip(hidden_act, eos_token_id=eos).double()
        ours: Any = load(save_published(theirs, folder), dtype="float64", vision=True)
        return ours, theirs.eval()


def texts(end: int = 95) -> torch.Tensor:
    """Three texts; the end token stands at 7, and pads."""
    rows = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    rows[:, 7], rows[0, 9] = end, end
    return rows


@pytest.mark.parametrize(
    ("hidden_act", "eos", "end"), [("quick_gelu", 95, 95), ("gelu", 95, 95), ("quick_gelu", 2, 96)]
)
def test_vectors_and_logits_equal_transformers_in_float64(hidden_act: str, eos: int, end: int):
    ours, theirs = pair(hidden_act, eos)
    input_ids, pictures = texts(end), images(2).double()
    with computing_in_float64():
        expected = theirs(input_ids=input_ids, pixel_values=pictures)
        found = {
            "logits_per_image": ours(input_ids, pictures),
            "image_embeds": torch.nn.functional.normalize(ours.get_image_features(pictures), dim=-1),
            "text_embeds": torch.nn.functional.normalize(ours.get_text_features(input_ids), dim=-1),
        }
        gradients = torch.autograd.grad(found["logits_per_image"].square().sum(), list(ours.parameters()))
        expected.logits_per_image.square().sum().backward()
    for name, values in found.items():
        assert float((values - getattr(expected, name)).detach().abs().max()) <= BOUND, name
    by_name = dict(zip([name for name, _ in ours.named_parameters()], gradients, strict=True))
    for name, theirs_at in {
        "logit_scale": theirs.logit_scale,
        "text_encoder.head.weight": theirs.text_projection.weight,
    }.items():
        assert float((by_name[name] - theirs_at.grad).abs().max()) <= BOUND * float(theirs_at.grad.abs().max() + 1)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_a_padded_text_has_the_vector_that_it_has_alone():
    ours, theirs = pair("quick_gelu", 95)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[:, 8:] = 0
    with torch.no_grad(), computing_in_float64():
        padded = ours.get_text_features(texts(), Scope((mask.cumsum(1) - 1).masked_fill(mask == 0, -1)))
        alone = ours.get_text_features(texts()[:, :8])
        reference = theirs.get_text_features(input_ids=texts(), attention_mask=mask).pooler_output
    torch.testing.assert_close(padded, alone, atol=BOUND, rtol=0)
    torch.testing.assert_close(padded, reference, atol=BOUND, rtol=0)


def test_a_text_without_its_end_token_is_refused():
    with pytest.raises(UsageError, match=r"no end token \(95\): encode it with special tokens"):
        pair("quick_gelu", 95)[0].get_text_features(texts()[:, :7])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("spelling", ["_dict beside null", "_dict beside another", "sizes left out"])
def test_either_spelling_of_the_encoders_is_read(tmp_path: Path, spelling: str):
    save(quest.build("clip-model-tiny"), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    if spelling == "_dict beside null":
        edit_config(tmp_path / "m", vision_config=None, vision_config_dict=vision, text_config_dict=text)
    elif spelling == "_dict beside another":
        edit_config(tmp_path / "m", vision_config_dict=vision, vision_config=vision | {"hidden_size": 1})
    else:
        edit_config(tmp_path / "m", text_config={k: v for k, v in text.items() if k != "hidden_act"})
    assert load(tmp_path / "m", vision=True).config == quest.build("clip-model-tiny").config


def test_what_was_exported_is_what_transformers_reads(tmp_path: Path):
    ours, _ = pair("quick_gelu", 95)
    save(ours, tmp_path / "out")
    theirs, info = transformers.CLIPModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float64
    )
    assert not [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    with torch.no_grad(), computing_in_float64():
        expected = theirs.eval()(input_ids=texts(), pixel_values=images(2).double()).logits_per_image
        assert float((ours(texts(), images(2).double()) - expected).abs().max()) <= BOUND


def test_the_projection_of_the_whole_counts_and_llava_reads_none(tmp_path: Path):
    """projection_dim within vision_config may be another number; only the whole's is of tensors."""
    save(quest.build("clip-model-tiny"), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    edit_config(tmp_path / "m", vision_config=config["vision_config"] | {"projection_dim": 512})
    encoder: Any = load(tmp_path / "m")
    assert isinstance(encoder, ImageEncoder)
    assert encoder.config.projection_dim == 24 == encoder(images(1, side=16)).shape[1]
    llava = quest.build("llava-tiny").config
    published = {"vision_config": {**config["vision_config"], "architectures": None, "projection_dim": 768}}
    family = next(one for one in quest.models.VISION_FAMILIES if one.name == "vision_language")
    assert family.read({**family.publish(llava), **published}) == llava


def folder_with_inputs(folder: Path, labels: tuple[str, ...] = ()) -> Path:
    """A whole tiny CLIP with a tokenizer that ends texts, and an image processor."""
    words = {word: i for i, word in enumerate(["a", "photo", "of", "cat", "dog", ".", "[UNK]", *labels])} | {
        "<end>": 95
    }
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_special_tokens(["<end>"])
    engine.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 95)])
    config = quest.build("clip-model-tiny").config
    text = replace(config.text_config, eos_token_id=95)
    model = quest.build(replace(config, text_config=text))
    preprocess = ImageProcessor(16, **CLIP_STATISTICS)  # type: ignore[arg-type]
    return save(model, folder, tokenizer=Tokenizer(engine, eos_tokens=("<end>",)), preprocess=preprocess)


def test_zero_shot_classification_is_that_of_transformers(tmp_path: Path):
    folder, file = folder_with_inputs(tmp_path / "m"), tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer, pixels = quest.Tokenizer.load(folder), ImageProcessor(16, **CLIP_STATISTICS)(Image.open(file))  # type: ignore[arg-type]
    rows = torch.tensor([tokenizer.encode(f"a photo of a {label}.") for label in ("cat", "dog")])
    with torch.no_grad():
        expected = theirs(input_ids=rows, pixel_values=pixels[None]).logits_per_image.softmax(dim=1)[0]
    found = classify_image(str(folder), file, labels=("cat", "dog"))
    assert found.probabilities == pytest.approx(dict(zip(("cat", "dog"), expected.tolist(), strict=True)), abs=1e-5)
    assert found.label == max(found.probabilities, key=found.probabilities.__getitem__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "is a CLIP, which chooses among texts: name two or more classes, --label cat --label dog"),
        (["--label", "cat"], "name two or more classes"),
        (["--label", "a", "--label", "b", "--template", "photo"], "has no place for a label: write {} there"),
        (["--label", "a", "--label", "b " * 40], "has 46 tokens, and this model reads 24: shorten the label"),
    ],
)
def test_what_classify_needs_of_a_clip_is_said(tmp_path: Path, options: list[str], message: str):
    folder = folder_with_inputs(tmp_path / "m")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["classify", str(folder), str(tmp_path / "a.png"), *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["eval", "--data", "f.txt"], ["chat"]])
def test_a_model_that_writes_no_text_is_named(tmp_path: Path, command: list[str]):
    folder = folder_with_inputs(tmp_path / "m")
    (tmp_path / "f.txt").write_text("a photo of a cat. " * 40)
    words = [word if word != "f.txt" else str(tmp_path / word) for word in command[1:]]
    result = CliRunner().invoke(app, [command[0], str(folder), *words])
    assert "writes no text: it is a clip" in str(result.exception)
