"""Labeled images: the split is clean, a row of training is a function of its number, augmentation does what it
says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_quest.contracts import DataShard
from llm_quest.data.image_datasets import (
    AugmentedImages,
    ImageAugmentation,
    ImageDataset,
    load_cifar10,
    load_sklearn_digits,
    split_images,
)
from llm_quest.data.images import ImageProcessor
from llm_quest.data.loader import ShardedLoader, epoch_indices, philox_uniforms
from llm_quest.errors import DataError, MissingError, UsageError

RANDOM = np.random.default_rng(0)
IMAGES = ImageDataset(RANDOM.integers(0, 256, (50, 1, 8, 8)).astype(np.uint8), np.arange(50) % 5, tuple("abcde"))
PREPROCESS = ImageProcessor(8, (0.0,), (1.0,))
VARIED = ImageAugmentation(translate=0.2, rotation_degrees=20)


def feed(augmentation: ImageAugmentation | None = VARIED, **changes) -> ShardedLoader[AugmentedImages]:
    sizes = {"batch_size": 12, "micro_batch_size": 12, "seed": 3}
    return ShardedLoader(AugmentedImages(IMAGES, PREPROCESS, augmentation), **(sizes | changes))


def step_of(*feeds: ShardedLoader[AugmentedImages], step: int = 5) -> torch.Tensor:
    return torch.cat([batch.images for one in feeds for batch in one.batches(step)])


def test_a_steps_rows_are_the_same_for_any_micro_batch_and_any_number_of_processes():
    whole = step_of(feed())
    assert torch.equal(step_of(feed(micro_batch_size=5)), whole)
    assert torch.equal(step_of(*(feed(micro_batch_size=4, shard=DataShard(rank, 3)) for rank in range(3))), whole)
    assert not torch.equal(step_of(feed(seed=4)), whole)


def test_an_epoch_shows_every_image_once_and_every_epoch_differently():
    plain = feed(augmentation=None, batch_size=10, micro_batch_size=10)
    order = epoch_indices(50, plain.seed, range(100))
    first = plain.source.collate(range(5), plain.seed).labels
    assert first.tolist() == IMAGES.labels[order[:5]].tolist()
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]


def test_the_split_is_by_content_alone_and_keeps_equal_images_together():
    twice = ImageDataset(np.concatenate((IMAGES.pixels, IMAGES.pixels)), np.tile(IMAGES.labels, 2), IMAGES.names)
    sides = split_images(twice, 0.3)
    train, held_out = ({image.tobytes() for image in side.pixels} for side in (sides.train, sides.held_out))
    assert not train & held_out
    assert len(sides.train) + len(sides.held_out) == 100
    backwards = split_images(twice.subset(np.arange(100)[::-1]), 0.3)
    assert {image.tobytes() for image in backwards.held_out.pixels} == held_out


def test_a_bookmark_of_other_images_is_refused():
    other = feed().state_dict() | {"data": "x"}
    feed().load_state_dict(feed().state_dict())
    with pytest.raises(DataError, match="another stream of data: data was x"):
        feed().load_state_dict(other)


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(UsageError, match="12 rows cannot be shared by 5 processes"):
        feed(shard=DataShard(0, 5))


def test_without_variation_an_image_stays_what_it_is():
    images = torch.rand(3, 1, 8, 8)
    assert ImageAugmentation()(images, torch.rand(3, 8)) is images


def test_flip_mirrors_half_of_the_images():
    images = torch.arange(8.0).expand(2, 1, 8, 8)
    chance = torch.full((2, 8), 0.5)
    chance[0, 4] = 0.1
    flipped = ImageAugmentation(horizontal_flip=True)(images, chance)
    assert flipped[0, 0, 0].tolist() == pytest.approx(list(range(7, -1, -1)), abs=1e-4)
    assert flipped[1, 0, 0].tolist() == pytest.approx(list(range(8)), abs=1e-4)


def test_shift_moves_by_that_part_of_the_side_and_fills_with_the_mean():
    images = torch.ones(1, 1, 8, 8)
    chance = torch.full((1, 8), 0.5)
    chance[0, 2] = 1.0
    assert ImageAugmentation(translate=0.25)(images, chance)[0, 0, 0].tolist() == pytest.approx(
        [1, 1, 1, 1, 1, 1, 0, 0], abs=1e-4
    )


def test_turning_by_90_degrees_is_a_rotation_and_no_mirror_image():
    images = torch.rand(1, 1, 8, 8)
    chance = torch.full((1, 8), 0.5)
    chance[0, 0] = 1.0
    turned = ImageAugmentation(rotation_degrees=90)(images, chance)
    assert torch.allclose(turned, images.rot90(1, (2, 3)), atol=1e-4) or torch.allclose(
        turned, images.rot90(-1, (2, 3)), atol=1e-4
    )


def test_erasing_blanks_one_square():
    erased = ImageAugmentation(random_erasing=0.5)(torch.ones(1, 1, 8, 8), torch.full((1, 8), 0.5))
    assert int((erased == 0).sum()) == 16


def test_chance_is_uniform_and_a_function_of_seed_and_number():
    drawn = np.stack([philox_uniforms(1, number) for number in range(500)])
    assert np.array_equal(drawn[7], philox_uniforms(1, 7))
    assert not np.array_equal(drawn[7], philox_uniforms(2, 7))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)


def write_cifar(path: Path, labels: list[int]) -> None:
    records = [
        bytes([label]) + bytes(np.full(3072, 10 * label + file, dtype=np.uint8)) for file, label in enumerate(labels)
    ]
    path.write_bytes(b"".join(records))


def test_cifar10s_binary_files_are_read_with_the_published_split(tmp_path: Path):
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    for number in range(1, 6):
        write_cifar(root / f"data_batch_{number}.bin", [1, 2])
    write_cifar(root / "test_batch.bin", [9])
    sides = load_cifar10(tmp_path)
    assert sides.train.pixels.shape == (10, 3, 32, 32)
    assert sides.train.labels.tolist() == [1, 2] * 5
    assert sides.held_out.names[sides.held_out.labels[0]] == "truck"
    (root / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"data_batch_3\.bin: 5 bytes are no whole number of CIFAR-10 records"):
        load_cifar10(tmp_path)


def test_absent_data_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MissingError, match=r"data_batch_1\.bin is missing. Unpack cifar-10-binary\.tar\.gz"):
        load_cifar10(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingError, match=r"pip install 'llm-quest\[vision\]'"):
        load_sklearn_digits()


def test_the_digits_are_1797_of_ten_classes():
    pytest.importorskip("sklearn")
    found = load_sklearn_digits()
    assert found.pixels.shape == (1797, 1, 8, 8)
    assert found.pixels.max() == 255
    assert np.bincount(found.labels).min() > 170
