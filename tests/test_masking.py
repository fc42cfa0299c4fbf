"""Masks: counts of the paper, polarity, shape in time, uniformity."""

import pytest
import torch

from masking import frame_mask, random_mask, split, tube_mask
from support.config import UserError

GRID = (8, 14, 14)  # 16 x 224 x 224 in cubes of 2 x 16 x 16


@pytest.mark.parametrize(
    "mask_function, ratio, masked",
    [
        (tube_mask, 0.75, 1176),
        (tube_mask, 0.85, 1328),  # 166 of 196 places: 166.6 rounded down
        (tube_mask, 0.9, 1408),
        (tube_mask, 0.95, 1488),
        (random_mask, 0.9, 1411),
        (frame_mask, 0.875, 1372),
    ],
)
def test_counts_are_exact_and_true_means_masked(mask_function, ratio, masked):
    for seed in range(5):
        mask = mask_function(GRID, ratio, torch.Generator().manual_seed(seed))
        assert mask.dtype == torch.bool and mask.shape == (1568,)
        assert int(mask.sum()) == masked
        visible, masked_positions = split(mask)
        assert len(visible) == 1568 - masked and not mask[visible].any()
        assert len(masked_positions) == masked and mask[masked_positions].all()
        assert torch.equal(torch.cat([visible, masked_positions]).sort().values, torch.arange(1568))


def test_tube_is_the_same_at_all_times():
    mask = tube_mask(GRID, 0.9).view(GRID)
    assert (mask == mask[0]).all()


def test_random_differs_between_times():
    mask = random_mask(GRID, 0.9).view(GRID)
    assert not (mask == mask[0]).all()


def test_frame_masks_whole_slices_of_time():
    mask = frame_mask(GRID, 0.875).view(8, 196)
    assert ((mask.sum(1) == 0) | (mask.sum(1) == 196)).all()
    assert int(mask[:, 0].sum()) == 7


@pytest.mark.parametrize("mask_function, ratio", [(tube_mask, 0.75), (random_mask, 0.75), (frame_mask, 0.5)])
def test_every_place_is_masked_equally_often(mask_function, ratio):
    generator = torch.Generator().manual_seed(0)
    samples = 4000
    rate = sum(mask_function((4, 4, 4), ratio, generator).float() for _ in range(samples)) / samples
    std = (ratio * (1 - ratio) / samples) ** 0.5
    assert (rate - ratio).abs().max() < 5 * std


def test_same_generator_same_mask():
    first, second = (random_mask(GRID, 0.9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, random_mask(GRID, 0.9, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 0.001])
def test_a_mask_that_masks_all_or_none_is_refused(ratio):
    with pytest.raises(UserError, match="some have to be masked and some visible"):
        tube_mask(GRID, ratio)
