"""Masks: counts of the paper, polarity, shape in time, uniformity; which masked cubes are reconstructed."""

import pytest
import torch

from masking import frame_mask, random_mask, running_cells, split, tube_mask

GRID = (8, 14, 14)  # 16 x 224 x 224 in cubes of 2 x 16 x 16
TUBES = {0.75: 1176, 0.85: 1328, 0.9: 1408, 0.95: 1488}  # 85 % of 196 places are 166.6, rounded down
COUNTS = [*((tube_mask, *row) for row in TUBES.items()), (random_mask, 0.9, 1411), (frame_mask, 0.875, 1372)]


@pytest.mark.parametrize("mask_function, ratio, masked", COUNTS)
def test_counts_are_exact_and_true_means_masked(mask_function, ratio, masked):
    for seed in range(5):
        mask = mask_function(GRID, ratio, torch.Generator().manual_seed(seed))
        assert mask.dtype == torch.bool and mask.shape == (1568,)
        assert int(mask.sum()) == masked
        visible, masked_positions = split(mask)
        assert len(visible) == 1568 - masked and not mask[visible].any()
        assert len(masked_positions) == masked and mask[masked_positions].all()
        assert torch.equal(torch.cat([visible, masked_positions]).sort().values, torch.arange(1568))
        generator, unused = torch.Generator(), torch.Generator()
        assert running_cells(masked_positions, GRID, 0, generator) is masked_positions  # all are reconstructed
        assert torch.equal(generator.get_state(), unused.get_state())
        assert torch.equal(mask, mask_function(GRID, ratio, torch.Generator().manual_seed(seed)))
        assert not torch.equal(mask, mask_function(GRID, ratio, torch.Generator().manual_seed(seed + 5)))


def test_what_is_shared_in_a_mask():
    tubes, anywhere = tube_mask(GRID, 0.9).view(GRID), random_mask(GRID, 0.9).view(GRID)
    assert (tubes == tubes[0]).all() and not (anywhere == anywhere[0]).all()
    frames = frame_mask(GRID, 0.875).view(8, 196)
    assert ((frames.sum(1) == 0) | (frames.sum(1) == 196)).all() and int(frames[:, 0].sum()) == 7


def reconstructed(grid, mask, ratio, generator):
    """As a mask (T/2, H/16, W/16)."""
    result = torch.zeros(grid, dtype=torch.bool)
    result.view(-1)[running_cells(split(mask)[1], grid, ratio, generator)] = True
    return result


@pytest.mark.parametrize("mask_function, mask_ratio", [(tube_mask, 0.9), (random_mask, 0.75), (frame_mask, 0.875)])
@pytest.mark.parametrize("grid", [GRID, (6, 5, 7)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.6])
def test_the_number_of_reconstructed_cubes_is_exact(mask_function, mask_ratio, grid, ratio):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        mask = mask_function(grid, mask_ratio, generator)
        kept = running_cells(split(mask)[1], grid, ratio, generator)
        assert mask[kept].all() and torch.equal(kept, kept.unique())  # masked, once each, ascending
        assert len(kept) == round((1 - ratio) * int(mask.sum()))


def v2_patterns(times, height, width, left_out):
    """VideoMAE V2's four decoder masks, written after its paper: a queue that is shifted by one at each time."""
    queue = [True] * left_out + [False] * (4 - left_out)
    for start in range(4):
        cells = [torch.tensor([queue[(place + start + time) % 4] for place in range(4)]) for time in range(times)]
        yield ~torch.stack([cell.view(2, 2).repeat(height // 2, width // 2) for cell in cells])


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid, mask_ratio", [(GRID, 0.9), ((4, 4, 4), 0.75)])
def test_tubes_are_reconstructed_where_v2_does(ratio, grid, mask_ratio):
    """The masked cubes of one of its four patterns, each pattern a quarter of the time."""
    patterns, counts = list(v2_patterns(*grid, round(4 * ratio))), [0] * 4
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        mask = tube_mask(grid, mask_ratio, generator)
        kept = reconstructed(grid, mask, ratio, generator)
        same = [torch.equal(kept, mask.view(grid) & pattern) for pattern in patterns]
        assert sum(same) == 1
        counts[same.index(True)] += 1
    assert min(counts) > 25  # 50 +- 6


@pytest.mark.parametrize("grid", [(4, 4, 4), (6, 4, 6)])
@pytest.mark.parametrize("mask_function, mask_ratio", [(tube_mask, 0.75), (random_mask, 0.75), (frame_mask, 0.5)])
@pytest.mark.parametrize("ratio", [0, 0.5, 0.6])
def test_every_cube_is_masked_and_reconstructed_equally_often(mask_function, mask_ratio, ratio, grid):
    generator, samples = torch.Generator().manual_seed(0), 3000
    rate = torch.zeros(grid)
    for _ in range(samples):
        rate += reconstructed(grid, mask_function(grid, mask_ratio, generator), ratio, generator) / samples
    expected = rate.mean()
    assert (rate - expected).abs().max() < 5 * (expected * (1 - expected) / samples) ** 0.5
