"""Parity of models that read images in float64: within 1e-11 of transformers where both sides compute wholly in float64
(tests/float64.py), every tensor random: image encoders, and language models with images in whole, ragged and cached
rows, with the gradient of every weight."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from llm_quest.hub.float64 import computing_in_float64
from llm_quest.hub.load_save import save
from llm_quest.scope import Scope
from tests.models.test_float64_parity import BOUND
from tests.models.vision import (
    IMAGE,
    PATCHES,
    SIZES,
    images,
    load_ours,
    qwen_patches,
    their_gemma3,
    their_llava,
    their_qwen3_5,
    their_vit,
    tokens_with_images,
)
from tests.oracles import randomize_, transformers


def their_clip() -> Any:
    config = transformers.CLIPVisionConfig(**SIZES, num_hidden_layers=3)
    return randomize_(transformers.CLIPVisionModel(config))


ENCODERS: dict[str, tuple[Callable[[], Any], str]] = {
    "vit": (their_vit, "logits"),
    "clip": (their_clip, "pooler_output"),
}
"""Theirs, and which of its outputs ours is."""


@functools.cache
def pair(make: Callable[[], Any]) -> tuple[Any, Any]:
    """Ours, loaded from the folder that theirs wrote; and theirs: every weight and constant in float64."""
    with computing_in_float64():
        theirs = make().double()
        return load_ours(theirs, dtype="float64"), theirs


def close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype == torch.float64
    assert float((got - expected).detach().abs().max()) <= BOUND


@pytest.mark.parametrize("name", ENCODERS)
def test_an_image_encoder_equals_transformers_in_float64(name: str):
    make, output = ENCODERS[name]
    ours, theirs = pair(make)
    with computing_in_float64():
        close(ours(images(3).double()), getattr(theirs(pixel_values=images(3).double()), output))


def causal_logits(theirs: Any, ids: Tensor, pictures: Sequence[Tensor]) -> Tensor:
    shown_pixels = {"pixel_values": torch.stack(list(pictures))} if len(pictures) else {}
    return theirs(input_ids=ids, **shown_pixels, use_cache=False).logits  # type: ignore[no-any-return]


def logits_with_token_types(theirs: Any, ids: Tensor, pictures: Sequence[Tensor]) -> Tensor:
    """Gemma 3's processor says which tokens are an image's."""
    shown_pixels = {"pixel_values": torch.stack(list(pictures))} if len(pictures) else {}
    kinds = (ids == IMAGE).long()
    return theirs(input_ids=ids, token_type_ids=kinds, **shown_pixels, use_cache=False).logits  # type: ignore[no-any-return]


def logits_with_grid(theirs: Any, ids: Tensor, pictures: Sequence[Tensor]) -> Tensor:
    """Qwen3.5's processor says which tokens are an image's, and how many rows and columns of patches it has."""
    seen = qwen_patches(pictures) if len(pictures) else {}
    if hasattr(theirs.config.text_config, "num_experts"):
        theirs.set_experts_implementation("eager")  # the others know no float64
    kinds = (ids == IMAGE).long()
    return theirs(input_ids=ids, mm_token_type_ids=kinds, **seen, use_cache=False).logits  # type: ignore[no-any-return]


LANGUAGE_MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor, Sequence[Tensor]], Tensor]]] = {
    "llava": (their_llava, causal_logits),
    "llava with a vit": (functools.partial(their_llava, "vit"), causal_logits),
    "gemma3": (their_gemma3, logits_with_token_types),
    "qwen3.5": (their_qwen3_5, logits_with_grid),
    "qwen3.5 moe": (functools.partial(their_qwen3_5, "Qwen3_5Moe"), logits_with_grid),
}
every = pytest.mark.parametrize("name", LANGUAGE_MODELS)
LENGTH, PADDING = 48, 9


def rows(name: str) -> tuple[Tensor, list[list[Tensor]]]:
    """Two rows: one with two images, one with one that stands near its end; of several sizes, where a model reads
    several: 16 vectors each."""
    ids = tokens_with_images(LENGTH, 2, 29)
    ids[0, 25 : 25 + PATCHES] = IMAGE
    shapes = [(64, 16), (32, 32), (16, 64)] if name.startswith("qwen") else [(32, 32)] * 3
    pictures = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(7)).double() for shape in shapes]
    return ids, [pictures[:2], pictures[2:]]


def features(ours: Any, pictures: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [ours.get_image_features(image[None])[0] for row in pictures for image in row]


@every
@torch.no_grad()
def test_ragged_rows_with_images_equal_each_row_alone_in_transformers(name: str):
    ours, theirs = pair(LANGUAGE_MODELS[name][0])
    ids, pictures = rows(name)
    positions = torch.arange(LENGTH).repeat(2, 1)
    positions[1] = (positions[1] - PADDING).clamp(min=-1)
    with computing_in_float64():
        alone = [
            LANGUAGE_MODELS[name][1](theirs, row[places >= 0][None], seen)[0]
            for row, places, seen in zip(ids, positions, pictures, strict=True)
        ]
        close(ours(ids, Scope(positions), features(ours, pictures))[positions >= 0], torch.cat(alone))


@every
@torch.no_grad()
def test_cached_rows_with_images_equal_one_pass_of_transformers(name: str):
    """The prompts with their images in one pass, then one token a pass, and several: the images are in the cache."""
    ours, theirs = pair(LANGUAGE_MODELS[name][0])
    ids, pictures = rows(name)
    cache, outs, start = ours.new_cache(2, LENGTH), [], 0
    with computing_in_float64():
        expected = [LANGUAGE_MODELS[name][1](theirs, row[None], seen) for row, seen in zip(ids, pictures, strict=True)]
        for piece in ids.split((45, 1, 1, LENGTH - 47), dim=1):
            seen = features(ours, pictures) if start == 0 else None
            outs.append(ours(piece, Scope.unpadded(piece, cache=cache, start=start), seen))
            start += piece.shape[1]
        close(torch.cat(outs, dim=1), torch.cat(expected))


@every
def test_gradients_of_every_weight_equal_transformers(name: str):
    """Of a cross-entropy, matched by published names: both save a model whose weights are their gradients."""
    ours, theirs = copy.deepcopy(pair(LANGUAGE_MODELS[name][0]))
    ids, pictures = rows(name)
    with computing_in_float64(), tempfile.TemporaryDirectory() as folder:
        for parameter in theirs.parameters():
            parameter.requires_grad_(True)
        loss_of(
            torch.cat([LANGUAGE_MODELS[name][1](theirs, r[None], p) for r, p in zip(ids, pictures, strict=True)]), ids
        )
        loss_of(ours.train()(ids, image_features=features(ours, pictures)), ids)
        again = load_ours(gradients_for_weights(theirs), dtype="float64")
        got = load_file(save(gradients_for_weights(ours), f"{folder}/ours") / "model.safetensors")
        expected = load_file(save(again, f"{folder}/theirs") / "model.safetensors")
    assert got.keys() == expected.keys()
    close(*(torch.cat([tensors[key].flatten() for key in got]) for tensors in (got, expected)))
    assert sum(float(tensor.abs().max()) > 0 for tensor in got.values()) > len(got) // 2


def loss_of(logits: Tensor, ids: Tensor) -> None:
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def gradients_for_weights(model: Any) -> Any:
    """The model with its gradients as weights, zero where there is none."""
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return model


@every
def test_what_is_saved_loads_in_transformers_with_the_same_logits(name: str, tmp_path: Any):
    ours, theirs = pair(LANGUAGE_MODELS[name][0])
    ids, pictures = rows(name)
    with computing_in_float64(), torch.no_grad():
        save(ours, tmp_path / "m")
        again, info = type(theirs).from_pretrained(tmp_path / "m", output_loading_info=True, dtype=torch.float64)
        absent = [key for key in info["missing_keys"] if ".pooler." not in key]  # of a ViT, which no one reads
        assert not [*absent, *info["unexpected_keys"], *info["mismatched_keys"]], info
        logits = LANGUAGE_MODELS[name][1]
        close(logits(again.eval(), ids[:1], pictures[0]), logits(theirs, ids[:1], pictures[0]))
