"""The masks of Sec. 3.3, Figure 2 and Table 1b.

A mask is a boolean tensor (N,) over the cubes of one clip, in the order time, height, width.
True = masked: the encoder does not see the cube, the decoder predicts it. False = visible.

Videos change slowly (Sec. 3.2). A cube that is masked at one time and visible at another can simply be copied, and at
the usual ratios of 50 % to 75 % enough is visible to fill in the rest. For this reason tubes mask 90 % of the spatial
positions, the same ones in every frame.

The paper samples from Bernoulli(rho_mask). Here, as in the authors' code, the number of masked cubes is exact, so that
clips can be stacked in a batch. It is rounded down: 90 % of 196 positions are 176.
"""

import torch
from torch import Tensor

from support.config import UserError

Grid = tuple[int, int, int]  # cubes in time, height, width: (8, 14, 14) for 16 x 224 x 224 and cubes of 2 x 16 x 16


def tube_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Mask tubes, the paper's proposal (Sec. 3.3, Figure 2d): one spatial mask for all times."""
    time, height, width = grid
    spatial = _sample(height * width, ratio, generator)  # (H/16 * W/16,)
    return spatial.repeat(time)  # (N,)


def random_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Mask cubes anywhere in space and time (Figure 2c, Table 1b)."""
    time, height, width = grid
    return _sample(time * height * width, ratio, generator)  # (N,)


def frame_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Mask whole frames (Figure 2b): all cubes of some times. 87.5 % masks 14 of 16 frames (Table 1b)."""
    time, height, width = grid
    temporal = _sample(time, ratio, generator)  # (T/2,)
    return temporal.repeat_interleave(height * width)  # (N,)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}


def _sample(count: int, ratio: float, generator: torch.Generator | None) -> Tensor:
    """Sample a mask (count,) with exactly int(ratio * count) masked positions. UserError if it masks none or all."""
    masked_count = int(ratio * count)
    if not 0 < masked_count < count:
        what = f"a mask ratio of {ratio:g} masks {masked_count} of {count} places"
        raise UserError(f"{what}; some have to be masked and some visible")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[:masked_count]] = True
    return mask


def running_cells(masked: Tensor, grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Choose which of the masked cubes (N_mask,) to reconstruct: all but a fraction `ratio`. UserError if none is left.

    This is the decoder mask of VideoMAE V2 (Wang et al., CVPR 2023). Number the positions of a cell of 2 x 2: 0 1
    above, 2 3 below. From each time to the next, those that are reconstructed (x) go down by one, and from 0 to 3:

        x x    x .    . .    . x    x x
        . .    . x    x x    x .    . .    ...    (ratio 1/2)

    The pattern starts at a random time, and on average each cube is reconstructed equally often. The number of cubes is
    exact for every mask and ratio; where the pattern does not decide, the choice is random.
    """
    if ratio == 0:
        return masked
    count = round((1 - ratio) * len(masked))
    if count == 0:
        raise UserError(f"mask.decoder_ratio={ratio:g} leaves none of {len(masked)} masked cubes; choose a smaller one")
    shuffled = masked[torch.randperm(len(masked), generator=generator)]
    time, row, column = torch.unravel_index(shuffled, grid)
    start = torch.randint(4, (), generator=generator)
    number = 2 * (row % 2) + column % 2
    turn = (number + time + start) % 4  # (N_mask,)
    return shuffled[turn.argsort(stable=True)[:count]].sort().values  # ascending


def split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the visible cubes (N_vis,) and of the masked cubes (N_mask,), both ascending."""
    return (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
