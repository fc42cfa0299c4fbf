"""The masks of Sec. 3.3, Figure 2 and Table 1b.

A mask is a boolean tensor (N,) over the cubes of one clip, in the order time, height, width.
True = masked: the encoder does not see the cube, the decoder predicts it. False = visible.

Videos change slowly (Sec. 3.2). A cube that is masked at one time and visible at another can simply be copied, and at
the usual ratios of 50 % to 75 % enough is visible to fill in the rest. So tubes mask 90 % of the spatial places, in
every frame.

The paper samples from Bernoulli(rho_mask). Here, as in the authors' code, the *number* of masked cubes is exact, the
ratio rounded down to whole ones, so that clips can be stacked: 90 % of 196 places are 176.
"""

import torch
from torch import Tensor

from support.config import UserError

Grid = tuple[int, int, int]  # cubes in time, height, width: (8, 14, 14) for 16 x 224 x 224 and cubes of 2 x 16 x 16


def tube_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Tube masking, the paper's proposal (Sec. 3.3, Figure 2d): one spatial mask, shared by all times."""
    time, height, width = grid
    spatial = _sample(height * width, ratio, generator)  # (H/16 * W/16,)
    return spatial.repeat(time)  # (N,)


def random_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Plain random masking over all cubes of space and time (Figure 2c, Table 1b)."""
    time, height, width = grid
    return _sample(time * height * width, ratio, generator)  # (N,)


def frame_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Frame masking: all cubes of some times (Figure 2b). 87.5 % masks 14 of 16 frames (Table 1b)."""
    time, height, width = grid
    temporal = _sample(time, ratio, generator)  # (T/2,)
    return temporal.repeat_interleave(height * width)  # (N,)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}


def _sample(count: int, ratio: float, generator: torch.Generator | None) -> Tensor:
    """A mask (count,) of exactly int(ratio * count) places, each equally likely. UserError if that is none or all."""
    masked = int(ratio * count)
    if not 0 < masked < count:
        raise UserError(
            f"a mask ratio of {ratio:g} masks {masked} of {count} places; some have to be masked and some visible"
        )
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[:masked]] = True
    return mask


def running_cells(masked: Tensor, grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Of the masked positions (N_mask,), those to reconstruct, ascending: the decoder leaves out a fraction `ratio`.

    Dual masking with running cells (VideoMAE V2, Wang et al., CVPR 2023): the places of each cell of 2 x 2 take turns,
    which move on with time from a random start. The number is exact for every mask; what does not make a whole turn is
    chosen at random. On average each cube is reconstructed equally often. With tubes, T/2 a multiple of 4 and `ratio`
    a multiple of 1/4, each masked place is reconstructed at exactly 1 - ratio of the times. UserError if none is left.
    """
    if ratio == 0:
        return masked
    count = round((1 - ratio) * len(masked))
    if count == 0:
        raise UserError(f"mask.decoder_ratio={ratio:g} leaves none of {len(masked)} masked cubes; choose a smaller one")
    shuffled = masked[torch.randperm(len(masked), generator=generator)]
    time, row, column = torch.unravel_index(shuffled, grid)
    start = torch.randint(4, (), generator=generator)
    turn = (2 * (row % 2) + column % 2 + time + start) % 4  # (N_mask,)
    return shuffled[turn.argsort(stable=True)[:count]].sort().values


def split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the visible cubes (N_vis,) and of the masked cubes (N_mask,), each in ascending order."""
    return (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
