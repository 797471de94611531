"""Images: from files to normalized pixels. Pillow and numpy; torch only at the end.

Commonly got wrong: the statistics. Each published model has its own mean and deviation, in
`preprocessor_config.json` beside its weights; those of another model cost accuracy and raise no error."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from llm_quest.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
RESAMPLING = {2: "bilinear", 3: "bicubic"}
PIL_MODES = {1: "L", 3: "RGB"}
MAX_PIXEL_VALUE = 255.0


@dataclass(frozen=True)
class ImageProcessor:
    """Preprocesses images for a model: resized to `size` x `size` pixels, brightness 0..1, minus `mean`, divided by
    `std`.

    mean, std: one number per channel (1: grey, 3: red, green, blue). crop: keep the aspect ratio, resize the shorter
    side and crop the center (CLIP); otherwise the image is squeezed into the square (ViT)."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bilinear"
    crop: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in PIL_MODES or min(self.std) <= 0 or self.size < 1:
            raise DataError(
                f"images of size {self.size} with mean {self.mean} and deviation {self.std} cannot be made: give a "
                "positive size and 1 or 3 channels, with deviations above 0"
            )
        if self.resample not in RESAMPLING.values():
            raise DataError(f"resampling {self.resample!r} is unknown; known: {', '.join(RESAMPLING.values())}")

    def __call__(self, image: Image.Image) -> Float[Tensor, "C H W"]:
        return self.normalize(self.resize_to_pixels(image)[None])[0]

    def resize_to_pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 (C,H,W), resized and nothing more."""
        image = image.convert(PIL_MODES[len(self.mean)])
        method = Image.Resampling.BILINEAR if self.resample == "bilinear" else Image.Resampling.BICUBIC
        if self.crop:
            image = self.center_crop(image, method)
        elif image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), method)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    def center_crop(self, image: Image.Image, method: Image.Resampling) -> Image.Image:
        """Resize the shorter side to `size`, then crop the square in the middle."""
        short, long = sorted(image.size)
        other = int(self.size * long / short)
        wide = image.size[0] >= image.size[1]
        image = image.resize((other, self.size) if wide else (self.size, other), method)
        left, top = (image.size[0] - self.size) // 2, (image.size[1] - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def normalize(self, pixels: np.ndarray) -> Float[Tensor, "B C H W"]:
        """From uint8 (B,C,H,W) to what the model reads."""
        mean, std = (np.array(numbers, dtype=np.float32)[:, None, None] for numbers in (self.mean, self.std))
        return torch.from_numpy((pixels.astype(np.float32) / MAX_PIXEL_VALUE - mean) / std)

    def to_preprocessor_config(self) -> dict[str, Any]:
        """The contents of preprocessor_config.json."""
        number = next(number for number, name in RESAMPLING.items() if name == self.resample)
        square = {"height": self.size, "width": self.size}
        shape: dict[str, Any] = {"size": square, "image_processor_type": "ViTImageProcessor"}
        if self.crop:
            shape = {"size": {"shortest_edge": self.size}, "crop_size": square, "do_center_crop": True}
            shape |= {"do_convert_rgb": True, "image_processor_type": "CLIPImageProcessor"}
        steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
        numbers = {"image_mean": list(self.mean), "image_std": list(self.std)}
        return {**shape, **steps, **numbers, "resample": number, "rescale_factor": 1 / MAX_PIXEL_VALUE}


CLIP_STATISTICS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "resample": "bicubic",
    "crop": True,
}


def parse_preprocessor_config(published: Mapping[str, Any]) -> ImageProcessor:
    """From the contents of preprocessor_config.json, today's or an older one's (`"size": 224`)."""
    size, crop = published.get("size", 224), bool(published.get("do_center_crop"))
    target_size = published.get("crop_size", size) if crop else size
    if isinstance(target_size, Mapping):
        target_size = target_size.get("height", target_size.get("shortest_edge"))
    if type(target_size) is not int:
        raise DataError(f"preprocessor_config.json: size is {size!r}; a whole number of pixels was expected")
    if published.get("resample", 2) not in RESAMPLING:
        raise DataError(
            f"preprocessor_config.json: resample is {published['resample']!r}; known: "
            + ", ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
        )
    mean, std = published.get("image_mean", (0.5,) * 3), published.get("image_std", (0.5,) * 3)
    return ImageProcessor(target_size, tuple(mean), tuple(std), RESAMPLING[published.get("resample", 2)], crop)


def load_image(file: str | Path) -> Image.Image:
    """A whole image, decoded. DataError names a file that is missing, not an image, truncated or absurdly large."""
    file = Path(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                return image.copy()
    except FileNotFoundError:
        raise DataError(f"{file}: there is no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: no image that can be read, or a corrupt one: {str(error)[:120]}") from None
    except Image.DecompressionBombWarning as error:
        raise DataError(f"{file}: too large to be decoded: {str(error)[:120]}") from None


def list_image_files(folder: Path) -> list[Path]:
    """The images of a folder, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def load_pixels(files: Sequence[Path], image_processor: ImageProcessor) -> np.ndarray:
    """uint8 (N,C,H,W) of the images in these files."""
    return np.stack([image_processor.resize_to_pixels(load_image(file)) for file in files])
