"""The laws of image encoders, ViT's own, and parity with transformers through files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import llm_quest as quest
from llm_quest.errors import DataError, UsageError
from llm_quest.models import clip, clip_model, clip_text, vit
from llm_quest.models.build import build, build_meta_model, count_parameters, preset
from llm_quest.models.image_encoder import ImageEncoder
from tests.laws.subjects import randomize_
from tests.models.vision import images, load_ours, their_vit
from tests.oracles import edit_config, save_published, transformers

TINY = ("vit-tiny", "clip-tiny")
every = pytest.mark.parametrize("name", TINY)


def random_model(name: str) -> ImageEncoder:
    return randomize_(build(name)).double()  # type: ignore[arg-type, return-value]


@every
def test_a_row_is_the_row_alone(name: str):
    model, batch = random_model(name), images(3, 16).double()
    alone = torch.cat([model(image[None]) for image in batch])
    torch.testing.assert_close(model(batch), alone, atol=1e-10, rtol=0)


@every
def test_every_parameter_receives_a_gradient(name: str):
    model = random_model(name)
    model(images(2, 16).double()).square().sum().backward()
    assert [path for path, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every
def test_every_patch_has_a_share_in_the_answer(name: str):
    model, batch = random_model(name), images(1, 16).double().requires_grad_()
    model(batch).sum().backward()
    assert (batch.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum(dim=(1, 4, 5)) > 0).all()


@every
def test_patches_that_change_places_change_the_answer(name: str):
    model, batch = random_model(name), images(1, 16).double()
    assert (model(batch) - model(batch.flip(2))).abs().max() > 1e-3


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_answer_in_their_dtype(name: str, dtype: torch.dtype):
    model = build(name)
    exact, answer = model(images(2, 16)), model.to(dtype)(images(2, 16).to(dtype))
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.float(), exact, atol=0.05, rtol=0.05)


@every
def test_checkpointed_activations_give_the_same_gradients(name: str):
    plain, again = random_model(name), random_model(name)
    for block in again.blocks:
        block.forward = lambda *inputs, kept=block.forward: checkpoint(kept, *inputs, use_reentrant=False)
    for model in (plain, again):
        model(images(2, 16).double()).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=0)


@every
def test_export_then_import_is_the_identity(name: str, tmp_path: Path):
    model = randomize_(build(name))  # type: ignore[arg-type]
    again = quest.load(quest.save(model, tmp_path / "model"))  # type: ignore[arg-type]
    assert again.config == model.config
    for (path, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), path


def test_a_fresh_models_loss_is_near_ln_of_the_classes():
    logits = build("vit-tiny")(images(64, 16))
    assert F.cross_entropy(logits, torch.arange(64) % 10).item() == pytest.approx(2.303, abs=0.05)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit-base-patch16-224", 86_567_656),
        ("vit-large-patch16-224", 304_326_632),
        ("clip-vision-large-patch14-336", 303_507_456),
        ("clip-vit-base-patch32", 151_277_313),
        ("clip-vit-base-patch16", 149_620_737),
        ("clip-vit-large-patch14", 427_616_513),
        ("clip-vit-large-patch14-336", 427_944_193),
    ],
)
def test_a_published_size_has_the_published_number_of_parameters(name: str, count: int):
    assert count_parameters(build_meta_model(preset(name).config)) == count == preset(name).num_parameters


@pytest.mark.parametrize(
    "page", [vit.FAMILY, clip.FAMILY, clip_text.FAMILY, clip_model.FAMILY], ids=lambda page: page.name
)
def test_what_is_published_is_read_back_as_it_was(page: Any):
    for size in page.presets:
        assert page.read(page.publish(size.config)) == size.config
    assert vit.FAMILY.read(
        vit.FAMILY.publish(replace(preset("vit-tiny").config, num_labels=2, label_names=("cat", "dog")))
    ).label_names == (
        "cat",
        "dog",
    )


@pytest.mark.parametrize(("page", "eps"), [(vit, 1e-12), (clip, 1e-5)], ids=["vit", "clip"])
def test_where_the_config_is_silent_eps_is_the_familys(page: Any, eps: float):
    published = page.FAMILY.publish(preset(f"{page.FAMILY.name}-tiny").config)
    del published["layer_norm_eps"]
    assert page.FAMILY.read(published).layer_norm_eps == eps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; only 'gelu' is computed"),
        ({"image_size": [32, 16]}, r"image_size is \[32, 16\]; only square images"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label must name every class from 0 on"),
        ({"hidden_size": None}, "has no 'hidden_size', which a vit needs"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused_with_field_and_rule(change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        vit.FAMILY.read({"model_type": "vit"} | vit.FAMILY.publish(preset("vit-tiny").config) | change)


def test_a_folder_whose_patch_does_not_divide_its_image_is_refused(tmp_path: Path):
    quest.save(build("vit-tiny"), tmp_path / "model")
    edit_config(tmp_path / "model", lambda published: published.update(patch_size=5))
    with pytest.raises(DataError, match="cannot be cut into patches of 5"):
        quest.load(tmp_path / "model")


def test_a_mistyped_preset_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean 'vit-tiny'"):
        build("vit-tinny")


def test_logits_equal_transformers():
    theirs = their_vit()
    with torch.no_grad():
        torch.testing.assert_close(
            load_ours(theirs)(images(3)), theirs(pixel_values=images(3)).logits, atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("change", [{"qkv_bias": False}, {"layer_norm_eps": 1e-2}, {"num_channels": 1}], ids=str)
def test_logits_equal_transformers_in_variants(change: dict[str, Any]):
    theirs, batch = their_vit(**change), images(2, channels=change.get("num_channels", 3))
    with torch.no_grad():
        torch.testing.assert_close(load_ours(theirs)(batch), theirs(pixel_values=batch).logits, atol=2e-5, rtol=1e-4)


def test_gradients_equal_transformers():
    theirs = their_vit()
    ours = load_ours(theirs)
    for logits in (ours(images(3)), theirs(pixel_values=images(3)).logits):
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    pairs = {
        "embed.start": "vit.embeddings.cls_token",
        "embed.positions": "vit.embeddings.position_embeddings",
        "embed.patches.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "blocks.0.mixer.layer.out.weight": next(
            n
            for n in their_grads
            if "layer" in n and ".0." in n and ("o_proj.weight" in n or "attention.output.dense.weight" in n)
        ),
        "head.weight": "classifier.weight",
    }
    for name, other in pairs.items():
        mine = ours.get_parameter(name).grad
        torch.testing.assert_close(mine, their_grads[other].reshape(mine.shape), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [16, 48])
def test_an_image_of_another_size_is_read_with_stretched_positions_as_transformers_does(side: int):
    theirs = their_vit()
    ours = vit.resize_images(load_ours(theirs), side)
    with torch.no_grad():
        expected = theirs(pixel_values=images(2, side), interpolate_pos_encoding=True).logits
        torch.testing.assert_close(ours(images(2, side)), expected, atol=2e-5, rtol=1e-4)
    assert ours.config.image_size == side


def test_transformers_loads_what_we_save_and_computes_the_same(tmp_path: Path):
    model = randomize_(build(replace(preset("vit-tiny").config, num_labels=3, label_names=("a", "b", "c"))))
    quest.save(model, tmp_path / "model")  # type: ignore[arg-type]
    theirs, info = transformers.ViTForImageClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        torch.testing.assert_close(
            model(images(2, 16)), theirs(pixel_values=images(2, 16)).logits, atol=2e-5, rtol=1e-4
        )


def test_a_clip_tower_alone_equals_transformers(tmp_path: Path):
    numbers = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
        "num_hidden_layers": 2,
    }
    from tests.oracles import randomize_ as randomize_theirs

    theirs = randomize_theirs(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**numbers)))
    ours = quest.load(save_published(theirs, tmp_path))
    with torch.no_grad():
        expected = theirs(pixel_values=images(2))
    torch.testing.assert_close(
        ours.intermediate_hidden_states(images(2)), expected.last_hidden_state, atol=2e-5, rtol=1e-4
    )  # type: ignore[operator]
    torch.testing.assert_close(ours(images(2)), expected.pooler_output, atol=2e-5, rtol=1e-4)
