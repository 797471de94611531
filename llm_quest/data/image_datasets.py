"""Labeled images: their sources, the held-out split, and the rows of training with their augmentation.

Sources: scikit-learn's digits (1,797 real handwritten ones, 8 x 8), a folder with a sub-folder per class or a
table of labels (`image_folder.py`), CIFAR-10 as files on disk. What is held out is chosen by the hash of the pixels,
so that equal images stay on one side; nothing but the final score looks at it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from llm_quest.data.batch import split_rows
from llm_quest.data.images import ImageProcessor
from llm_quest.data.loader import epoch_indices, philox_uniforms
from llm_quest.data.stratified_split import choose_held_out
from llm_quest.errors import DataError, MissingError, import_extra, install_command

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_RECORD_BYTES = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class ImageDataset:
    """Labeled images: pixels (N,C,H,W) uint8; labels (N,), indices into names; multi-label: (N,names) of 0 and 1."""

    pixels: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def hash(self) -> str:
        """sha256 of images and labels."""
        digest = hashlib.sha256(f"{self.names} {self.pixels.shape}".encode())
        digest.update(np.ascontiguousarray(self.pixels).data)
        digest.update(np.ascontiguousarray(self.labels, dtype=np.int64).data)
        return digest.hexdigest()

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    def label_names(self, index: int) -> tuple[str, ...]:
        """The labels of one image, by name."""
        numbers = np.flatnonzero(self.labels[index]) if self.is_multi_label else [self.labels[index]]
        return tuple(self.names[number] for number in numbers)

    @property
    def label_counts(self) -> list[int]:
        """How many images each class has."""
        if self.is_multi_label:
            return self.labels.sum(axis=0, dtype=np.int64).tolist()  # type: ignore[no-any-return]
        return np.bincount(self.labels, minlength=len(self.names)).tolist()  # type: ignore[no-any-return]

    def subset(self, indices: np.ndarray) -> ImageDataset:
        """A data set of these images."""
        return ImageDataset(self.pixels[indices], self.labels[indices], self.names)


@dataclass(frozen=True)
class ImageSplits:
    """The training images and the held-out ones."""

    train: ImageDataset
    held_out: ImageDataset


def split_images(images: ImageDataset, held_out: float, *, stratify: bool = True) -> ImageSplits:
    """Hold out about this part of the images, by the hash of their pixels alone: no seed can choose an easy one. 0:
    none of them. stratify: the same part of each class."""
    if held_out == 0:
        return ImageSplits(images, images.subset(np.arange(0)))
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in images.pixels]
    labels = [images.label_names(index) if stratify else ("",) for index in range(len(images))]
    out = np.zeros(len(images), dtype=bool)
    out[choose_held_out(hashes, labels, held_out)] = True
    return ImageSplits(images.subset(np.flatnonzero(~out)), images.subset(np.flatnonzero(out)))


def load_sklearn_digits() -> ImageDataset:
    """The 1,797 digits of scikit-learn (Alpaydin & Kaynak 1998, UCI): 8 x 8, one channel."""
    remedy = f"the digits come with scikit-learn: {install_command('vision')}"
    digits = import_extra("sklearn.datasets", remedy).load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return ImageDataset(pixels, digits.target.astype(np.int64), tuple(str(digit) for digit in range(10)))


def load_cifar10(path: str | Path) -> ImageSplits:
    """CIFAR-10's binary version (Krizhevsky 2009): five files for training, `test_batch.bin` held out, as published."""
    path = Path(path)
    path = path / "cifar-10-batches-bin" if (path / "cifar-10-batches-bin").is_dir() else path
    files = [path / f"data_batch_{number}.bin" for number in range(1, 6)]
    if absent := [file.name for file in (*files, path / "test_batch.bin") if not file.is_file()]:
        raise MissingError(
            f"CIFAR-10 is not in {path}: {absent[0]} is missing. Unpack cifar-10-binary.tar.gz (the binary version; "
            "the Python version is pickled and is not read) and set data.path to its folder"
        )
    return ImageSplits(read_cifar_files(files), read_cifar_files([path / "test_batch.bin"]))


def read_cifar_files(files: Sequence[Path]) -> ImageDataset:
    """Records of a one-byte label and 3 x 32 x 32 bytes of red, green and blue."""
    parts = []
    for file in files:
        raw = np.fromfile(file, dtype=np.uint8)
        if len(raw) == 0 or len(raw) % CIFAR10_RECORD_BYTES or raw[::CIFAR10_RECORD_BYTES].max() > 9:
            raise DataError(f"{file}: {len(raw):,} bytes are no whole number of CIFAR-10 records; unpack it again")
        parts.append(raw.reshape(-1, CIFAR10_RECORD_BYTES))
    records = np.concatenate(parts)
    return ImageDataset(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64), CIFAR10_CLASSES)


@dataclass(frozen=True)
class ImageBatch:
    """images (B,C,H,W) as the model reads them; labels (B,) int64; multi-label: (B,N), 1 or 0."""

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"] | Float[Tensor, "B N"]

    @property
    def num_tokens(self) -> int:
        """The number of images, for throughput."""
        return self.images.shape[0]

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same batch on another device."""
        return ImageBatch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


@dataclass(frozen=True)
class ImageAugmentation:
    """Random augmentation of training images. scale and translate are fractions of the side; random_erasing erases one
    square of that fraction of the side (DeVries & Taylor 2017, arXiv:1708.04552)."""

    rotation_degrees: float = 0.0
    scale: float = 0.0
    translate: float = 0.0
    horizontal_flip: bool = False
    random_erasing: float = 0.0

    def __call__(self, images: Float[Tensor, "B C H W"], uniforms: Float[Tensor, "B 8"]) -> Float[Tensor, "B C H W"]:
        """uniforms: numbers in 0..1, a row for each image. What lies outside the image is 0, the mean."""
        if self == ImageAugmentation():
            return images
        signed = 2 * uniforms - 1
        angle, scale = signed[:, 0] * self.rotation_degrees * torch.pi / 180, 1 + signed[:, 1] * self.scale
        mirror = torch.where(uniforms[:, 4] < 0.5 * self.horizontal_flip, -1.0, 1.0)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        rows = (
            cos * mirror,
            -sin,
            2 * self.translate * signed[:, 2],
            sin * mirror,
            cos,
            2 * self.translate * signed[:, 3],
        )
        theta = torch.stack(rows, dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return self.erase_square(F.grid_sample(images, grid, align_corners=False), uniforms)

    def erase_square(
        self, images: Float[Tensor, "B C H W"], uniforms: Float[Tensor, "B 8"]
    ) -> Float[Tensor, "B C H W"]:
        if not self.random_erasing:
            return images
        side = images.shape[-1]
        places = (torch.arange(side) + 0.5) / side
        down, across = ((places - uniforms[:, [k]]).abs() < self.random_erasing / 2 for k in (5, 6))
        return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)


class AugmentedImages:
    """A `RowSource` of labeled images: every image once an epoch, each with an augmentation of its own."""

    def __init__(
        self, dataset: ImageDataset, image_processor: ImageProcessor, augmentation: ImageAugmentation | None = None
    ):
        self.dataset, self.image_processor = dataset, image_processor
        self.augmentation = augmentation or ImageAugmentation()

    def micro_batches(self, rows: range, micro_batch_size: int, seed: int) -> list[ImageBatch]:
        return [self.collate(part, seed) for part in split_rows(rows, micro_batch_size)]

    def fingerprint(self) -> dict[str, Any]:
        return {"loader": "images", "data": self.dataset.hash}

    def collate(self, rows: range, seed: int) -> ImageBatch:
        """Rows by their number since the beginning of training."""
        indices = np.array(epoch_indices(len(self.dataset), seed, rows))
        images = self.image_processor.normalize(self.dataset.pixels[indices])
        uniforms = torch.from_numpy(np.stack([philox_uniforms(seed, number) for number in rows]))
        return ImageBatch(self.augmentation(images, uniforms), torch.from_numpy(self.dataset.labels[indices]))
