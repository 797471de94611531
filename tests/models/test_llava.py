"""The laws of vision-language models, LLaVA's own, and parity with transformers through files."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import llm_quest as quest
from llm_quest.errors import DataError, UsageError
from llm_quest.models import llava as page
from llm_quest.models import vit
from llm_quest.models.build import build, build_meta_model, count_parameters, preset
from llm_quest.models.multimodal import PARTS, VisionLanguageModel
from llm_quest.scope import Scope
from tests.laws.subjects import randomize_
from tests.models.vision import IMAGE, PATCHES, images, load_ours, their_llava, tokens_with_images
from tests.oracles import edit_config, save_published, transformers

TINY = preset("llava-tiny").config
GPT2 = replace(preset("gpt2-tiny").config, max_position_embeddings=96)
VARIANTS = {
    "llava-tiny": TINY,
    "a linear adapter": replace(TINY, mlp_projector=False),
    "the class token too, all blocks": replace(TINY, keep_cls_token=True, num_vision_blocks=3),
    "a ViT before GPT-2": page.Config(
        vit.Config(16, 4, 3, 48, 2, 4, 96, 10), GPT2, image_token_id=5, num_vision_blocks=1
    ),
}
every = pytest.mark.parametrize("name", VARIANTS)
NEAR = {"atol": 2e-5, "rtol": 1e-4}


@functools.cache
def model_of(name: str) -> VisionLanguageModel:
    return random_model(name).requires_grad_(False)


def random_model(name: str) -> VisionLanguageModel:
    return randomize_(build(VARIANTS[name])).double()  # type: ignore[arg-type, return-value]


def prompt(model: VisionLanguageModel, length: int, *starts: int) -> torch.Tensor:
    numbers = model.config
    tokens = tokens_with_images(length, *starts, patches=0, vocab=numbers.vocab_size)
    tokens[tokens == numbers.image_token_id] = 1
    for row, start in zip(tokens, starts, strict=True):
        row[start : start + numbers.image_seq_length] = numbers.image_token_id
    return tokens


def pictures(number: int) -> torch.Tensor:
    return images(number, 16).double()


@every
def test_a_row_is_the_row_alone(name: str):
    model = model_of(name)
    tokens, vision = prompt(model, 30, 2, 9), model.get_image_features(pictures(2))
    alone = torch.cat([model(tokens[[row]], image_features=vision[[row]]) for row in (0, 1)])
    torch.testing.assert_close(model(tokens, image_features=vision), alone, atol=1e-10, rtol=0)


@every
def test_cached_and_in_chunks_the_logits_are_those_of_one_pass(name: str):
    """Also where a chunk ends within the image: what remains of it is shown with the next."""
    model = model_of(name)
    tokens, vision = prompt(model, 30, 2, 9), model.get_image_features(pictures(2))
    whole = model(tokens, image_features=vision)
    flat = vision.flatten(0, 1)
    where = (tokens == model.config.image_token_id).flatten().nonzero()[:, 0]
    cache, seen, start = model.new_cache(2, 30), [], 0
    for stop in (7, 8, 15, 28, 29, 30):
        here = ((where % 30) >= start) & ((where % 30) < stop)
        scope = Scope.unpadded(tokens[:, start:stop], cache=cache, start=start)
        seen.append(model(tokens[:, start:stop], scope, flat[here]))
        start = stop
    torch.testing.assert_close(torch.cat(seen, dim=1), whole, atol=1e-10, rtol=0)


@every
def test_padding_before_the_image_changes_nothing(name: str):
    model = model_of(name)
    tokens, vision = prompt(model, 25, 3), model.get_image_features(pictures(1))
    padded = torch.cat((torch.full((1, 4), model.config.image_token_id), tokens), dim=1)
    positions = torch.cat((torch.full((1, 4), -1), torch.arange(25)[None]), dim=1)
    torch.testing.assert_close(
        model(padded, Scope(positions), vision)[:, 4:], model(tokens, image_features=vision), atol=1e-10, rtol=0
    )


@every
def test_a_later_token_never_changes_earlier_logits_and_the_image_changes_later_ones(name: str):
    model = model_of(name)
    tokens, vision = prompt(model, 30, 4), model.get_image_features(pictures(1))
    before, other = model(tokens, image_features=vision), tokens.clone()
    other[0, 27] = 2 if tokens[0, 27] != 2 else 3
    torch.testing.assert_close(model(other, image_features=vision)[:, :27], before[:, :27], atol=1e-10, rtol=0)
    moved = (model(tokens, image_features=vision.flip(1)) - before).abs().amax(dim=-1)[0]
    assert moved[:4].max() < 1e-10
    assert moved[5:].min() > 1e-6


@every
def test_every_parameter_that_the_logits_read_receives_a_gradient_and_no_other_is_trained(name: str):
    model = random_model(name)
    model(prompt(model, 30, 2), image_features=model.get_image_features(pictures(1))).square().sum().backward()
    reached = {path for path, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {path for path, p in model.named_parameters() if p.requires_grad}
    unread = {path for path, _ in model.named_parameters()} - reached
    depth = model.config.num_vision_blocks
    assert all(
        path.startswith("tower.norm") or (path.startswith("tower.blocks.") and int(path.split(".")[2]) >= depth)
        for path in unread
    )


@every
def test_without_images_it_is_its_decoder(name: str):
    model = model_of(name)
    tokens = prompt(model, 20, 20)
    torch.testing.assert_close(model(tokens), model.decoder(tokens), atol=0, rtol=0)


@every
def test_export_then_import_is_the_identity(name: str, tmp_path: Path):
    model = random_model(name)
    again = quest.load(quest.save(model, tmp_path / "model"))  # type: ignore[arg-type]
    assert again.config == model.config
    for (path, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), path


@every
def test_generation_reads_the_prompts_images_and_goes_on_where_they_end(name: str):
    """Ragged prompts, one of them without an image: each text is what repeated whole passes give."""
    model = model_of(name)
    numbers = model.config
    tokens = prompt(model, 30, 2, 5)
    prompts = [tokens[0].tolist(), tokens[1, :24].tolist(), [1, 2, 3]]
    shown_to = [pictures(2)[:1], pictures(2)[1:], pictures(2)[:0]]
    written = quest.generate(model.with_images(shown_to), prompts, max_new_tokens=6, temperature=0.0, eos_token_id=())  # type: ignore[arg-type]
    for start, seen, one in zip(prompts, shown_to, written, strict=True):
        row = list(start)
        for _ in range(6):
            vision = model.get_image_features(seen) if len(seen) else None
            row.append(int(model(torch.tensor([row]), image_features=vision)[0, -1].argmax()) if numbers else 0)
            if row[-1] == numbers.image_token_id:
                pytest.skip("the random model wrote a placeholder")
        assert one.tokens == row[len(start) :]


def test_a_group_of_samples_shares_the_image():
    model = model_of("llava-tiny")
    tokens = prompt(model, 22, 2)[0].tolist()
    alone = quest.generate(
        model.with_images([pictures(1)]), [tokens], max_new_tokens=4, temperature=0.0, eos_token_id=()
    )  # type: ignore[arg-type]
    group = quest.generate(
        model.with_images([pictures(1)]), [tokens], max_new_tokens=4, temperature=0.0, eos_token_id=(), n=3
    )  # type: ignore[arg-type]
    assert [one.tokens for one in group] == [alone[0].tokens] * 3


@pytest.mark.parametrize(("placeholders", "number"), [(PATCHES - 1, 1), (PATCHES + 1, 1), (PATCHES, 2)])
def test_placeholders_and_images_that_do_not_match_are_refused_with_both_counts(placeholders: int, number: int):
    model = model_of("llava-tiny")
    tokens = tokens_with_images(40, 3, patches=placeholders)
    with pytest.raises(
        UsageError, match=rf"{placeholders} placeholders \(image_token 96\), but the images give {16 * number} vectors"
    ):
        model(tokens, image_features=model.get_image_features(pictures(number)))


def test_images_for_another_number_of_prompts_are_refused():
    model = model_of("llava-tiny")
    with pytest.raises(UsageError, match="reads 1 prompts, and images were given for 2"):
        quest.generate(model.with_images([pictures(1), pictures(1)]), [[1, 2, 3]], max_new_tokens=1)  # type: ignore[arg-type]


def test_an_image_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match="images are 3 x 32 x 32; this model reads 3 x 16 x 16"):
        model_of("llava-tiny").get_image_features(images(1, 32).double())


def test_parts_are_frozen_by_choice():
    model = random_model("llava-tiny").train_only(["adapter"])
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"adapter"}
    model.train_only(PARTS)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == set(PARTS)
    assert not any(p.requires_grad for p in [*model.tower.blocks[2].parameters(), *model.tower.norm.parameters()])
    with pytest.raises(UsageError, match="no part is called 'eyes'; parts: tower, adapter, decoder"):
        model.train_only(["eyes"])


def test_gpt2_adds_its_positions_to_an_images_vectors_too():
    """Two equal patches at different places give different logits only by their positions."""
    model = model_of("a ViT before GPT-2")
    tokens = torch.full((1, 2), model.config.image_token_id)
    hidden = model.decoder.embed(tokens, Scope.unpadded(tokens), torch.zeros(1, 2, 48).double())
    assert torch.equal(hidden[0], model.decoder.embed.position.weight[:2])


def test_llava_1_5_has_the_published_number_of_parameters():
    assert count_parameters(build_meta_model(preset("llava-1.5-7b").config)) == 7_063_427_072


def test_what_llavas_own_config_leaves_out_is_filled_in():
    """The hub's config.json of llava-1.5-7b names few of the numbers of its parts."""
    published = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {
            "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 1024,
            "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    assert page.FAMILY.read(published) == preset("llava-1.5-7b").config
    assert page.FAMILY.read({"model_type": "llava"} | page.FAMILY.publish(TINY)) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "vision_config has model_type 'siglip_vision_model'; here it may be clip_vision_model or vit",
        ),
        ({"text_config": None}, "has no 'text_config', which a llava needs"),
        ({"vision_feature_layer": -9}, "depth is -5, but the image encoder has 3 blocks"),
        ({"image_token_index": 500}, "image_token 500 is outside the vocabulary of 97"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_computed_is_refused_with_field_and_rule(
    change: dict[str, Any], message: str, tmp_path: Path
):
    quest.save(build("llava-tiny"), tmp_path / "model")
    edit_config(tmp_path / "model", lambda published: published.update(change))
    with pytest.raises(DataError, match=message):
        quest.load(tmp_path / "model")


@functools.cache
def pair(tied: bool = False, vision: str = "clip") -> tuple[VisionLanguageModel, Any]:
    theirs = their_llava(vision, tie_word_embeddings=tied)
    return load_ours(theirs), theirs


def reference(theirs: Any, tokens: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return theirs(input_ids=tokens, pixel_values=batch, use_cache=False).logits


@pytest.mark.parametrize(("tied", "vision"), [(False, "clip"), (True, "clip"), (False, "vit")])
def test_logits_equal_transformers(tied: bool, vision: str):
    ours, theirs = pair(tied, vision)
    tokens, batch = tokens_with_images(40, 1, 20), images(2)
    torch.testing.assert_close(
        ours(tokens, image_features=ours.get_image_features(batch)), reference(theirs, tokens, batch), **NEAR
    )


@pytest.mark.parametrize(
    "change", [{"vision_feature_layer": -1}, {"vision_feature_layer": 1}, {"multimodal_projector_bias": False}], ids=str
)
def test_logits_equal_transformers_in_variants(change: dict[str, Any]):
    theirs = their_llava(**change)
    ours, tokens, batch = load_ours(theirs), tokens_with_images(30, 5), images(1)
    torch.testing.assert_close(
        ours(tokens, image_features=ours.get_image_features(batch)), reference(theirs, tokens, batch), **NEAR
    )


def test_the_class_token_is_shown_where_the_config_says_full():
    theirs = their_llava(vision_feature_select_strategy="full", image_seq_length=PATCHES + 1)
    ours, tokens = load_ours(theirs), tokens_with_images(30, 5, patches=PATCHES + 1)
    torch.testing.assert_close(
        ours(tokens, image_features=ours.get_image_features(images(1))), reference(theirs, tokens, images(1)), **NEAR
    )


def test_several_images_of_a_row_are_shown_in_their_order():
    ours, theirs = pair()
    tokens, batch = tokens_with_images(50, 2), images(2)
    tokens[0, 25 : 25 + PATCHES] = IMAGE
    torch.testing.assert_close(
        ours(tokens, image_features=ours.get_image_features(batch)), reference(theirs, tokens, batch), **NEAR
    )


def test_gradients_equal_transformers():
    theirs = their_llava()
    ours, tokens, batch = load_ours(theirs).train(), tokens_with_images(30, 5), images(1)
    for logits in (
        ours(tokens, image_features=ours.get_image_features(batch)),
        theirs(input_ids=tokens, pixel_values=batch).logits,
    ):
        F.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for mine, end in {
        "adapter.up.weight": "linear_1.weight",
        "tower.embed.patches.weight": "patch_embedding.weight",
        "decoder.embed.token.weight": "embed_tokens.weight",
        "tower.enter.weight": "pre_layrnorm.weight",
    }.items():
        (other,) = (grad for name, grad in their_grads.items() if name.endswith(end))
        torch.testing.assert_close(
            ours.get_parameter(mine).grad, other.reshape(ours.get_parameter(mine).shape), atol=1e-5, rtol=1e-4
        )


def test_transformers_loads_what_we_save_and_computes_the_same(tmp_path: Path):
    model = randomize_(build("llava-tiny"))
    quest.save(model, tmp_path / "model")  # type: ignore[arg-type]
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, batch = tokens_with_images(30, 5), images(1, 16)
    torch.testing.assert_close(
        model(tokens, image_features=model.get_image_features(batch)), reference(theirs, tokens, batch), **NEAR
    )  # type: ignore[operator]


def test_the_hubs_older_names_are_read_too(tmp_path: Path):
    """The published folder says `vision_tower.vision_model.`, what transformers 5 writes leaves `vision_model.` out."""
    from safetensors import safe_open

    ours, theirs = pair()
    new, old = save_published(theirs, tmp_path / "new"), quest.save(ours, tmp_path / "old")  # type: ignore[arg-type]
    named = []
    for folder in (new, old):
        with safe_open(folder / "model.safetensors", "pt") as file:
            named.append({name for name in file.keys() if name.startswith("vision_tower.")})  # noqa: SIM118
    assert {name.replace("vision_model.", "") for name in named[1]} == named[0] != named[1]
    tokens, batch = tokens_with_images(30, 5), images(1)
    again = quest.load(old)
    torch.testing.assert_close(
        again(tokens, image_features=again.get_image_features(batch)),
        ours(tokens, image_features=ours.get_image_features(batch)),
        atol=0,
        rtol=0,
    )  # type: ignore[operator]
