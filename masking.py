"""The masks of Sec. 3.3, Figure 2 and Table 1b.

A mask is a boolean tensor (N,) over the cubes of one clip, in the order time, height, width.
True = masked, hidden from the encoder and predicted by the decoder. False = visible.

Videos change slowly (Sec. 3.2). A cube that is hidden at one time and visible at another can simply be copied, and
at the usual ratios, 50 % to 75 %, enough is visible to fill in the rest. So tubes hide a place at all times, and 90 %
of the places are hidden.

The paper draws from Bernoulli(rho_mask). Here, as in the authors' code, the *number* of masked cubes is exact, so that
every clip of a batch keeps the same number of visible cubes and the batch stays a rectangle.
"""

import torch
from torch import Tensor

from support.config import UserError

Grid = tuple[int, int, int]  # cubes in time, height, width: (8, 14, 14) for 16 x 224 x 224 and cubes of 2 x 16 x 16


def tube_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Tube masking, the paper's proposal (Sec. 3.3, Figure 2d): one spatial mask, I[p_{x,y,.} in Omega], shared by all times."""
    time, height, width = grid
    spatial = _hide(height * width, ratio, generator)  # (H/16 * W/16,)
    return spatial.repeat(time)  # (N,)


def random_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Plain random masking over all cubes of space and time (Figure 2c, Table 1b)."""
    time, height, width = grid
    return _hide(time * height * width, ratio, generator)  # (N,)


def frame_mask(grid: Grid, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Frame masking: whole slices of time are hidden (Figure 2b); 87.5 % hides 14 of 16 frames (Table 1b)."""
    time, height, width = grid
    slices = _hide(time, ratio, generator)  # (T/2,)
    return slices.repeat_interleave(height * width)  # (N,)


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask}


def _hide(count: int, ratio: float, generator: torch.Generator | None) -> Tensor:
    """A mask (count,) that hides exactly int(ratio * count) places, each equally likely; UserError if all or none."""
    hidden = int(ratio * count)
    if not 0 < hidden < count:
        raise UserError(f"a mask ratio of {ratio:g} hides {hidden} of {count} places; some have to be hidden and some visible")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[:hidden]] = True
    return mask


def split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the visible cubes (N_vis,) and of the masked cubes (N_mask,), each in ascending order."""
    return (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
