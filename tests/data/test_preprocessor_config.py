"""preprocessor_config.json: every key is computed as transformers computes it, or refused by its name."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from llm_quest.data.images import CLIP_STATISTICS, ImageProcessor, PixelBudget, load_image
from llm_quest.data.preprocessor_config import (
    PROCESSOR_DEFAULTS,
    PROCESSOR_OF_MODEL,
    build_preprocessor_config,
    parse_preprocessor_config,
)
from llm_quest.errors import DataError

transformers = pytest.importorskip("transformers")


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width * height)
    smooth = Image.fromarray(random.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA")
    large = smooth.resize((width, height), Image.Resampling.BICUBIC)
    return large if mode == "RGBA" else large.convert("RGB").convert(mode) if mode != "LA" else large.convert("LA")


def reference(kind: str, published: dict[str, Any]) -> Any:
    """transformers' processor of this class, in its Pillow implementation."""
    folder = kind.removesuffix("ImageProcessor").lower()
    module = __import__(f"transformers.models.{folder}.image_processing_pil_{folder}", fromlist=[kind])
    return getattr(module, f"{kind}Pil")(**published)


def assert_equal(ours: torch.Tensor, theirs: Any) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(np.asarray(theirs, dtype=np.float32)), atol=2e-6, rtol=1e-6)


def pixels(theirs: Any, image: Any) -> np.ndarray:
    return np.asarray(theirs(images=image, return_tensors="np")["pixel_values"][0])


OF_ONE_SHAPE = [kind for kind in PROCESSOR_DEFAULTS if "merge_size" not in PROCESSOR_DEFAULTS[kind]]
SIZES: tuple[Any, ...] = (None, 24, [20, 24], {"height": 24, "width": 20}, {"shortest_edge": 22})
CROPS: tuple[Any, ...] = (None, 16, {"height": 24, "width": 18}, {"height": 40, "width": 40})
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def configs() -> Iterator[dict[str, Any]]:
    """Every size with every crop; every step off; every filter; other numbers."""
    yield {}
    for size, crop in itertools.product(SIZES, CROPS):
        given = {"size": size, "crop_size": crop, "do_center_crop": crop is not None or None}
        yield {key: value for key, value in given.items() if value is not None}
    for step, on in itertools.product(STEPS, (True, False)):
        yield {"size": {"height": 24, "width": 24}, "crop_size": 20, step: on}
    for number in range(6):
        yield {"size": {"height": 24, "width": 24}, "resample": number}
    yield {
        "size": 24,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 1.1, 0.9],
        "image_std": 0.25,
        "image_seq_length": 4,
    }
    yield {"size": 24, "default_to_square": True, "do_pad": False}
    yield {"size": 24, "crop_size": 24, "image_mean": None, "image_std": None, "do_normalize": None}
    yield {"size": None, "resample": None, "do_resize": None, "crop_size": 24, "do_center_crop": True}
    yield {"do_convert_rgb": None, "do_center_crop": None, "default_to_square": None, "size": 24}


@pytest.mark.parametrize("kind", OF_ONE_SHAPE)
def test_every_config_gives_the_pixels_of_transformers(kind: str):
    images = [photo(*shape) for shape in ((40, 28), (28, 41), (24, 24), (91, 31), (9, 7))]
    compared = 0
    for published in configs():
        theirs, ours = reference(kind, published), parse_preprocessor_config({"image_processor_type": kind} | published)
        for image in images:
            assert_equal(ours(image), pixels(theirs, image))
            compared += 1
    assert compared > 150


@pytest.mark.parametrize("kind", OF_ONE_SHAPE)
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_every_mode_gives_the_pixels_of_transformers(kind: str, mode: str, tmp_path: Path):
    published = {"size": {"height": 24, "width": 24}, "crop_size": 20}
    theirs, ours = reference(kind, published), parse_preprocessor_config({"image_processor_type": kind} | published)
    image = photo(40, 28, mode)
    expected = image if ours.do_convert_rgb else image.convert("RGB")  # otherwise transformers takes RGB alone
    assert_equal(ours(image), pixels(theirs, expected))
    image = image if mode != "YCbCr" else image.convert("RGB")
    image.save(tmp_path / "a.tiff")
    assert_equal(ours(load_image(tmp_path / "a.tiff")), pixels(theirs, str(tmp_path / "a.tiff")))


@pytest.mark.parametrize("kind", OF_ONE_SHAPE)
def test_a_palette_with_a_transparent_color_gives_the_pixels_of_transformers(kind: str, tmp_path: Path):
    stored = photo(40, 28).quantize(8)
    stored.save(tmp_path / "a.png", transparency=3)
    theirs, ours = reference(kind, {}), parse_preprocessor_config({"image_processor_type": kind})
    assert_equal(ours(load_image(tmp_path / "a.png")), pixels(theirs, str(tmp_path / "a.png")))
    with Image.open(tmp_path / "a.png") as image:
        assert_equal(ours(image), pixels(theirs, image if ours.do_convert_rgb else image.convert("RGB")))


QWEN_CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
    {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}, "do_convert_rgb": False},
    {"patch_size": 4, "min_pixels": 256, "max_pixels": 1024, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    {"patch_size": 4, "merge_size": 1, "resample": 2, "size": {"shortest_edge": 256, "longest_edge": 2048}},
    {"patch_size": 4, "do_normalize": False, "do_rescale": False, "min_pixels": 64},
)


@pytest.mark.parametrize("published", QWEN_CONFIGS)
def test_images_of_their_own_shape_give_the_patches_of_transformers(published: dict[str, Any]):
    """Qwen's: the shape, and the pixels as patches in blocks, each twice in time."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil(**published)
    ours = parse_preprocessor_config({"image_processor_type": "Qwen2VLImageProcessorFast"} | published)
    budget = ours.resize_size
    for shape in ((40, 28), (28, 41), (24, 24), (91, 31), (9, 7), (12, 300), (620, 410), (20, 36), (70, 126)):
        found, expected = ours(photo(*shape)), theirs(images=photo(*shape), return_tensors="np")
        rows, columns = (side // budget.patch_size for side in found.shape[1:])
        assert expected["image_grid_thw"].tolist() == [[1, rows, columns]]
        merge, side = budget.merge_size, budget.patch_size
        cut = found.reshape(3, rows // merge, merge, side, columns // merge, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
        twice = cut[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, 2, -1, -1)
        assert_equal(twice.reshape(rows * columns, -1), expected["pixel_values"])


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"patch_size": 0}, "patch_size is 0; a positive whole number was expected"),
        ({"size": {"height": 24, "width": 24}}, "min_pixels is None; a positive whole number was expected, or size"),
        ({"window_size": 7}, "window_size is 7, which Qwen2VLImageProcessor does not compute"),
    ],
)
def test_a_budget_that_is_none_is_refused(published: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        parse_preprocessor_config({"image_processor_type": "Qwen2VLImageProcessor"} | published)


def test_an_image_that_is_a_line_is_refused():
    with pytest.raises(DataError, match="one side is over 200 times the other"):
        parse_preprocessor_config({}, "qwen3_5")(Image.new("RGB", (402, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_gives_the_pixels_of_transformers(orientation: int, tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    photo(64, 48).save(tmp_path / "a.png", exif=exif)
    theirs, ours = reference("CLIPImageProcessor", {}), parse_preprocessor_config({}, "clip")
    assert_equal(ours(load_image(tmp_path / "a.png")), pixels(theirs, str(tmp_path / "a.png")))


@pytest.mark.parametrize("size", [(40, 28), (28, 41), (24, 24)])
def test_llava_pads_to_a_square_of_the_mean_color(size: tuple[int, int]):
    published = {"do_pad": True, "size": 24, "crop_size": 24, "image_mean": [0.2, 0.5, 0.8]}
    theirs = reference("LlavaImageProcessor", published)
    assert_equal(parse_preprocessor_config(published, "llava")(photo(*size)), pixels(theirs, photo(*size)))


@pytest.mark.parametrize("model_type", PROCESSOR_OF_MODEL)
def test_a_file_that_names_no_class_has_the_defaults_of_its_model(model_type: str):
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    named = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type.removesuffix("_vision_model"))["pil"]
    assert PROCESSOR_OF_MODEL[model_type] == named.removesuffix("Pil")
    if PROCESSOR_OF_MODEL[model_type] in OF_ONE_SHAPE:
        assert_equal(
            parse_preprocessor_config({}, model_type)(photo(40, 28)), pixels(reference(named[:-3], {}), photo(40, 28))
        )


@pytest.mark.parametrize(
    "preprocess",
    [
        ImageProcessor(24),
        ImageProcessor(24, **CLIP_STATISTICS),
        ImageProcessor(8, (0.1,), (0.3,)),
        ImageProcessor((20, 24), crop=True, resize_size=30, rescale_factor=1.0),
        ImageProcessor(24, crop=True, resize_size=(24, 24), do_resize=False),
        ImageProcessor(24, resize_size=24, resample="lanczos"),
        ImageProcessor(24, **CLIP_STATISTICS, pad_to_square=True),
        ImageProcessor(32, resize_size=PixelBudget(4096, 65_536, 16), resample="bicubic", do_convert_rgb=True),
    ],
    ids=str,
)
def test_what_is_published_is_read_back_as_it_was(preprocess: ImageProcessor):
    assert parse_preprocessor_config(build_preprocessor_config(preprocess)) == preprocess


def test_what_is_published_gives_transformers_the_same_pixels():
    for ours in (
        ImageProcessor(24),
        ImageProcessor((20, 24), crop=True, resize_size=30),
        ImageProcessor(24, **CLIP_STATISTICS),
    ):
        published = build_preprocessor_config(ours)
        theirs = reference(published["image_processor_type"], published)
        assert_equal(ours(photo(40, 28)), pixels(theirs, photo(40, 28)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "big"}, "size is 'big'; whole numbers of pixels"),
        ({"size": {"longest_edge": 30}}, "size is"),
        ({"size": {"height": 0, "width": 4}}, "size is"),
        ({"resample": 7}, r"resample is 7; known: 0 \(nearest\)"),
        ({"image_std": [0, 1, 1]}, "deviations above 0"),
        ({"image_mean": "imagenet"}, "image_mean is 'imagenet'; a number for each channel"),
        ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'; a number"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; true or false"),
        ({"image_mean": None}, "image_mean is None; a number for each channel"),
        ({"size": None}, "size is None; whole numbers of pixels"),
        ({"crop_pct": 0.875}, "crop_pct is 0.875, which ViTImageProcessor does not compute here"),
        ({"do_pad": True}, "do_pad is True, which ViTImageProcessor does not compute"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan is True"),
        ({"data_format": "channels_last"}, "data_format is 'channels_last'"),
        (
            {"image_processor_type": "PixtralImageProcessor"},
            "'PixtralImageProcessor', which is not computed here; known",
        ),
    ],
)
def test_a_value_that_is_not_computed_is_refused_by_its_name(change: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        parse_preprocessor_config(build_preprocessor_config(ImageProcessor(24)) | change)


@pytest.mark.parametrize("name", ["ViTFeatureExtractor", "ViTImageProcessorFast", "ViTImageProcessorPil"])
def test_names_of_older_and_other_implementations_are_read(name: str):
    for key in ("image_processor_type", "feature_extractor_type"):
        assert parse_preprocessor_config({key: name, "data_format": "channels_first"}) == ImageProcessor(224)


def test_the_first_file_of_google_vit_is_read():
    old = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
    assert parse_preprocessor_config(old, "vit") == ImageProcessor(224)


def test_a_16_bit_image_is_that_of_its_8_bits(tmp_path: Path):
    gray = photo(40, 28, "L")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / "a.png")
    buffer = io.BytesIO()
    gray.save(buffer, "PNG")
    theirs = reference("CLIPImageProcessor", {})
    ours = parse_preprocessor_config({}, "clip")(load_image(tmp_path / "a.png"))
    assert_equal(ours, pixels(theirs, Image.open(buffer)))
