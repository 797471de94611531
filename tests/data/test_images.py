"""Images in: the model's own statistics, Pillow alone, and files that are no images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llm_quest.data.images import CLIP_STATISTICS, ImageProcessor, load_image, parse_preprocessor_config
from llm_quest.errors import DataError


def photo(width: int = 40, height: int = 28, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
    return Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def test_brightness_0_to_255_becomes_minus_1_to_1():
    image = Image.fromarray(np.array([[0, 255]] * 2, dtype=np.uint8)).convert("RGB")
    assert ImageProcessor(2)(image)[:, 0].tolist() == [[-1, 1]] * 3


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_every_kind_of_image_becomes_three_channels(mode: str):
    assert ImageProcessor(16)(photo(mode=mode)).shape == (3, 16, 16)


def test_one_mean_makes_one_channel():
    assert ImageProcessor(16, (0.5,), (0.5,))(photo()).shape == (1, 16, 16)


def test_a_square_is_cut_from_the_middle_where_the_model_was_trained_so():
    wide = Image.fromarray(np.repeat(np.array([[0] * 10 + [200] * 10 + [0] * 10], dtype=np.uint8), 10, axis=0)).convert(
        "RGB"
    )
    assert (ImageProcessor(10, crop=True).resize_to_pixels(wide)[0] == 200).all()
    assert (ImageProcessor(10).resize_to_pixels(wide)[0] == 200).mean() < 0.5


@pytest.mark.parametrize(
    "preprocess",
    [ImageProcessor(24), ImageProcessor(24, **CLIP_STATISTICS), ImageProcessor(8, (0.1,), (0.3,))],
    ids=str,
)
def test_what_is_published_is_read_back_as_it_was(preprocess: ImageProcessor):
    assert parse_preprocessor_config(preprocess.to_preprocessor_config()) == preprocess


def test_older_spellings_are_read():
    assert parse_preprocessor_config(
        {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    ) == ImageProcessor(224)
    clip = {"size": 336, "crop_size": 336, "do_center_crop": True, "resample": 3}
    assert (parse_preprocessor_config(clip).size, parse_preprocessor_config(clip).crop) == (336, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "big"}, "size is 'big'"),
        ({"resample": 7}, r"resample is 7; known: 2 \(bilinear\), 3"),
        ({"image_std": [0, 1, 1]}, "deviations above 0"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(change: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        parse_preprocessor_config(ImageProcessor(24).to_preprocessor_config() | change)


def test_a_file_that_is_no_image_is_named(tmp_path: Path):
    file = tmp_path / "a.png"
    with pytest.raises(DataError, match=r"a\.png: there is no such image"):
        load_image(file)
    file.write_bytes(b"nothing to see")
    with pytest.raises(DataError, match=r"a\.png: no image that can be read, or a corrupt one"):
        load_image(file)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_that_is_cut_off_is_named(tmp_path: Path, suffix: str):
    file = tmp_path / f"a.{suffix}"
    photo(200, 200).save(file)
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(DataError, match=rf"a\.{suffix}: no image that can be read, or a corrupt one"):
        load_image(file)


def test_an_absurdly_large_image_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photo(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with pytest.raises(DataError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(40, 28), (28, 40), (24, 24), (90, 31)])
def test_numbers_equal_those_of_transformers(size: tuple[int, int]):
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    square = {"height": 24, "width": 24}
    vit = ViTImageProcessorPil(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square)
    for theirs, ours in ((vit, ImageProcessor(24)), (clip, ImageProcessor(24, **CLIP_STATISTICS))):
        expected = torch.as_tensor(np.asarray(theirs(images=photo(*size), return_tensors="np")["pixel_values"][0]))
        torch.testing.assert_close(ours(photo(*size)), expected, atol=1e-5, rtol=0)
