from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm_quest.layers.vision import ImageEmbedding, PatchEmbedding, interpolate_pos_encoding


def test_patches_equal_the_convolution_of_the_same_numbers(generator: torch.Generator):
    patches = PatchEmbedding(3, 4, 10)
    images = torch.randn(2, 3, 8, 12, generator=generator)
    by_convolution = F.conv2d(images, patches.weight.view(10, 3, 4, 4), patches.bias, stride=4)
    torch.testing.assert_close(patches(images), by_convolution.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_patches_are_read_row_by_row():
    patches = PatchEmbedding(1, 2, 1, bias=False)
    torch.nn.init.ones_(patches.weight)
    image = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    assert patches(image[None, None]).flatten().tolist() == [4, 8, 12, 16]


def test_the_class_token_stands_first_and_has_a_position():
    embed = ImageEmbedding(4, 2, 1, 3)
    torch.nn.init.zeros_(embed.patches.bias)
    embed.start.data.fill_(5.0)
    embed.positions.data.copy_(torch.arange(5.0)[:, None].expand(5, 3))
    x = embed(torch.zeros(1, 1, 4, 4))
    assert x[0, :, 0].tolist() == [5, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 4), (1, 16, 16)])
def test_an_image_of_another_shape_is_refused_and_both_shapes_are_named(shape: tuple[int, ...]):
    came = " x ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"images are {came}; this model reads 1 x 8 x 8 \(channels, height, width\)"):
        ImageEmbedding(8, 2, 1, 4)(torch.zeros(2, *shape))


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match="images of 10 x 10 cannot be cut into patches of 4"):
        ImageEmbedding(10, 4, 1, 4)


def test_positions_of_the_same_grid_stay_what_they_are(generator: torch.Generator):
    positions = torch.randn(10, 4, generator=generator)
    torch.testing.assert_close(interpolate_pos_encoding(positions, 3), positions)


def test_the_class_tokens_position_is_not_stretched(generator: torch.Generator):
    positions = torch.randn(10, 4, generator=generator)
    assert torch.equal(interpolate_pos_encoding(positions, 7)[0], positions[0])


def test_positions_are_stretched_over_the_whole_image_and_not_cut_off_at_its_first_rows():
    """Each old position holds its row's number: the first and last row of any new grid lie near the first and last old
    row."""
    rows = torch.arange(6.0).repeat_interleave(6)[:, None]
    positions = torch.cat((torch.zeros(1, 1), rows))
    smaller = interpolate_pos_encoding(positions, 3)[1:].view(3, 3)
    assert smaller[:, 0].tolist() == pytest.approx([0.5, 2.5, 4.5], abs=0.3)
    assert smaller[0].std() == pytest.approx(0, abs=1e-5)
