"""Images: from files to normalized pixels. Pillow and numpy; torch only at the end.

Commonly got wrong: the statistics. Each published model has its own mean and deviation, in
`preprocessor_config.json` beside its weights; those of another model cost accuracy and raise no error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llm_quest.errors import DataError

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".avif", ".ppm", ".pgm"),
)
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's filters, by their numbers in preprocessor_config.json."""
PIL_MODES = {1: "L", 3: "RGB"}
MAX_PIXEL_VALUE, MAX_16_BIT, MAX_SIDE = 255.0, 65_535, 2**14
MAX_ASPECT_RATIO = 200
ImageSize = int | tuple[int, int]
"""A side of a square, or height and width."""


@dataclass(frozen=True)
class PixelBudget:
    """A shape that keeps an image's aspect ratio: both sides are multiples of patch_size x merge_size, the product lies
    between min_pixels and max_pixels (`smart_resize` of Qwen2-VL). temporal_patch_size: frames of a patch.

    Commonly got wrong: sides are rounded to the nearest multiple, and halves to the even one; only where the product
    leaves the budget they are scaled, and then rounded down (or up) alone."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int = 2
    temporal_patch_size: int = 2

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this height and width is resized to."""
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise DataError(f"an image of {width} x {height}: one side is over {MAX_ASPECT_RATIO} times the other")
        rows, columns = (round(side / self.factor) for side in (height, width))
        area = rows * columns * self.factor**2
        if area > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / scale / self.factor)) for side in (height, width))
        elif area < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * scale / self.factor) for side in (height, width))
        return rows * self.factor, columns * self.factor


@dataclass(frozen=True)
class ImageProcessor:
    """Preprocesses images for a model: converted to its channels, padded, resized, cropped; then
    out = (pixel x rescale_factor - mean) / std.

    size: of what comes out, a side or (height, width). mean, std: one number per channel (1: gray, 3: red, green,
    blue). crop: keep the aspect ratio, resize the shorter side and crop the center (CLIP); otherwise the image is
    squeezed into the square (ViT). resize_size: what is resized to before the crop, where that is not `size`; an
    integer is the shorter side, (height, width) the exact shape, a PixelBudget one that follows from the image (`size`
    is then its least side). do_convert_rgb: transparent pixels are shown on white
    (otherwise alpha is dropped). pad_to_square: first pad the shorter side with the mean color (LLaVA's training)."""

    size: ImageSize
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bilinear"
    crop: bool = False
    resize_size: ImageSize | PixelBudget | None = None
    do_resize: bool = True
    rescale_factor: float = 1 / MAX_PIXEL_VALUE
    do_convert_rgb: bool = False
    pad_to_square: bool = False

    def __post_init__(self) -> None:
        border = self.resize_size.factor if isinstance(self.resize_size, PixelBudget) else self.resize_size
        sides = (*self.shape, *as_shape(1 if border is None else border))
        channels = len(self.mean) == len(self.std) and len(self.mean) in PIL_MODES and min(self.std) > 0
        if not channels or not 1 <= min(sides) <= max(sides) <= MAX_SIDE:
            raise DataError(
                f"images of size {self.size} with mean {self.mean} and deviation {self.std} cannot be made: give a "
                f"size from 1 to {MAX_SIDE:,} and 1 or 3 channels, with deviations above 0"
            )
        if self.resample not in RESAMPLING.values():
            raise DataError(f"resampling {self.resample!r} is unknown; known: {', '.join(RESAMPLING.values())}")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return as_shape(self.size)

    def __call__(self, image: Image.Image) -> Float[Tensor, "C H W"]:
        return self.normalize(self.resize_to_pixels(image)[None])[0]

    def resize_to_pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 (C,H,W): converted, resized, cropped and nothing more."""
        image = convert_mode(image, PIL_MODES[len(self.mean)], alpha_on_white=self.do_convert_rgb)
        if self.pad_to_square:
            image = pad_image_to_square(image, self.mean)
        if self.do_resize:
            height, width = self.resized_shape(image)
            image = image.resize((width, height), getattr(Image.Resampling, self.resample.upper()))
        if self.crop:
            image = self.center_crop(image)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    def resized_shape(self, image: Image.Image) -> tuple[int, int]:
        """Height and width after resizing; the longer side is rounded down, as in transformers."""
        target = self.resize_size
        if target is None:
            target = self.size if self.crop else self.shape
        if isinstance(target, PixelBudget):
            return target.shape(image.size[1], image.size[0])
        if not isinstance(target, int):
            return target
        width, height = image.size
        longer = int(target * max(image.size) / min(image.size))
        return (longer, target) if width <= height else (target, longer)

    def center_crop(self, image: Image.Image) -> Image.Image:
        """The middle of the image, (height, width) as `size`; what lies outside of it is black."""
        height, width = self.shape
        left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
        return image.crop((left, top, left + width, top + height))

    def normalize(self, pixels: np.ndarray) -> Float[Tensor, "B C H W"]:
        """From uint8 (B,C,H,W) to what the model reads."""
        mean, std = (np.array(numbers, dtype=np.float32)[:, None, None] for numbers in (self.mean, self.std))
        scaled = (np.arange(MAX_PIXEL_VALUE + 1) * self.rescale_factor).astype(np.float32)
        return torch.from_numpy((scaled[pixels] - mean) / std)


def as_shape(size: ImageSize) -> tuple[int, int]:
    """(height, width); an integer is the side of a square."""
    return (size, size) if isinstance(size, int) else size


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_STATISTICS: dict[str, Any] = {
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "resample": "bicubic",
    "crop": True,
    "do_convert_rgb": True,
}


def convert_mode(image: Image.Image, mode: str, *, alpha_on_white: bool) -> Image.Image:
    """The image in mode L or RGB. More than 8 bits are scaled to 8 first.

    alpha_on_white: transparent pixels are shown on white; otherwise their hidden color is."""
    image = scale_to_8_bits(image)
    if alpha_on_white and ("A" in image.getbands() or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Gray images of 16 bits, whole numbers or floats, in mode L: white stays white.

    Differs: transformers leaves this to Pillow, whose `convert` clips at 255, so that a 16-bit photo comes out white.
    Floats are 0..1 or 0..255, as `transformers.image_transforms.to_pil_image` takes them."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    pixels = np.asarray(image).astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite(pixels).all() or low < 0 or high > (MAX_PIXEL_VALUE if image.mode == "F" else MAX_16_BIT):
        raise DataError(
            f"an image of mode {image.mode} with values from {low:g} to {high:g}: gray of 0..65535, or floats of 0..1 "
            "or 0..255, were expected; convert it to 8 bits first"
        )
    if image.mode == "F":
        scale = MAX_PIXEL_VALUE if high <= 1 and not np.array_equal(pixels, np.rint(pixels)) else 1.0
        return Image.fromarray((pixels * scale).astype(np.uint8))
    is_8_bit = image.mode == "I" and high <= MAX_PIXEL_VALUE
    return Image.fromarray(np.rint(pixels if is_8_bit else pixels * (MAX_PIXEL_VALUE / MAX_16_BIT)).astype(np.uint8))


def pad_image_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the middle of a square of the mean color."""
    side = max(image.size)
    color = tuple(int(value * MAX_PIXEL_VALUE) for value in mean)
    square = Image.new(image.mode, (side, side), color if len(color) > 1 else color[0])
    square.paste(image, ((side - image.size[0]) // 2, (side - image.size[1]) // 2))
    return square


def load_image(file: str | Path) -> Image.Image:
    """An image of RGB, decoded whole and turned upright by its EXIF orientation, as transformers' `load_image` gives
    it. DataError names a file that is missing, not an image, truncated or absurdly large.

    Commonly got wrong: a phone stores a portrait lying on its side with a note how to turn it, which `Image.open` does
    not do."""
    return decode_image(Path(file), str(Path(file)))


def decode_image(source: Path | BytesIO, name: str) -> Image.Image:
    """What `load_image` gives, of a file or of its bytes. DataError, which says `name`, for what is no image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return convert_mode(ImageOps.exif_transpose(image), "RGB", alpha_on_white=False).copy()
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such image") from None
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: no image that can be read, or a corrupt one: {str(error)[:120]}") from None
    except Image.DecompressionBombWarning as error:
        raise DataError(f"{name}: too large to be decoded: {str(error)[:120]}") from None


def is_file(file: Path) -> bool:
    """Whether a file is there; also for a name in a row that no file can have, such as one of 5,000 characters."""
    try:
        return file.is_file()
    except OSError:
        return False


def is_image_file(file: str | Path) -> bool:
    """Whether this is a file that begins as an image does, whatever its name ends in."""
    try:
        with Image.open(file):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def load_pixels(files: Sequence[Path], image_processor: ImageProcessor) -> np.ndarray:
    """uint8 (N,C,H,W) of the images in these files. DataError names one whose shape differs from the others'."""
    pixels = [image_processor.resize_to_pixels(load_image(file)) for file in files]
    for file, image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            raise DataError(
                f"{file}: becomes {image.shape[2]} x {image.shape[1]} pixels, {files[0]} {pixels[0].shape[2]} x "
                f"{pixels[0].shape[1]}: this processor keeps the aspect ratio and crops nothing; crop the images alike"
            )
    return np.stack(pixels)
