"""Images in: the model's own statistics, Pillow alone, and files that are no images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from llm_quest.data.images import ImageProcessor, is_image_file, load_image
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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_that_lies_on_its_side_is_turned_upright(tmp_path: Path, orientation: int, suffix: str):
    corner = Image.new("RGB", (64, 48))
    corner.paste((255, 255, 255), (0, 0, 20, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    corner.save(tmp_path / f"a.{suffix}", exif=exif)
    upright = load_image(tmp_path / f"a.{suffix}")
    assert upright.size == ((64, 48) if orientation < 5 else (48, 64))
    np.testing.assert_allclose(np.asarray(upright), np.asarray(TURNED[orientation](corner)), atol=8)


TURNED = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: ImageOps.mirror(image.rotate(-90, expand=True)),
    6: lambda image: image.rotate(-90, expand=True),
    7: lambda image: ImageOps.mirror(image.rotate(90, expand=True)),
    8: lambda image: image.rotate(90, expand=True),
}
"""What EXIF's orientations ask for: the corner that was stored top left goes to where the camera saw it."""


@pytest.mark.parametrize(
    "deep",
    [
        np.arange(256, dtype=np.uint16).reshape(16, 16) * 257,
        np.arange(256, dtype=np.int32).reshape(16, 16) * 257,
        np.arange(256, dtype=np.int32).reshape(16, 16),
        np.arange(256, dtype=np.float32).reshape(16, 16),
        (np.arange(256, dtype=np.float32).reshape(16, 16) + 0.01) / 255.01,
    ],
    ids=["16 bits", "whole numbers to 65535", "whole numbers to 255", "floats to 255", "floats to 1"],
)
def test_gray_of_more_than_8_bits_keeps_its_range(tmp_path: Path, deep: np.ndarray):
    Image.fromarray(deep).save(tmp_path / "a.tiff")
    gray = np.asarray(load_image(tmp_path / "a.tiff"))
    assert (gray == np.arange(256, dtype=np.uint8).reshape(16, 16, 1)).all()


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 300.0], [0.0, float("nan")]])
def test_a_range_that_means_nothing_is_refused(tmp_path: Path, values: list[float]):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: an image of mode F with values from"):
        load_image(tmp_path / "a.tiff")


def test_an_image_is_known_by_what_it_holds(tmp_path: Path):
    photo().save(tmp_path / "photo", "JPEG")
    (tmp_path / "notes").write_text("a text")
    assert [is_image_file(tmp_path / name) for name in ("photo", "notes", "absent", ".")] == [True, False, False, False]
