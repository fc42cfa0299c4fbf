"""VideoMAE's networks (Sec. 3.3, Figure 1, Table 8); loading and exporting their weights.

    clip (B, 3, T, H, W) -> cube embedding -> visible tokens (B, N_vis, D) -> encoder -> decoder -> pixels of masked cubes

N = T/2 * H/16 * W/16 tokens of width D. Modules and parameters are named as in the official repository
(MCG-NJU/VideoMAE), so that checkpoints go from one to the other as they are.

    python -m support.weights runs/pretrain/toy/checkpoint.pt exported/    # a folder that transformers' from_pretrained opens
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from masking import Grid
from support.config import UserError

# The encoder is the usual ViT, the decoder half as wide (Sec. 4.2, "Decoder design"). The decoder's depth is not part
# of the size: Table 1a varies it and chooses 4; the authors' scripts and checkpoints have 12 for L and H.
SIZES = {
    "tiny": dict(width=128, depth=4, heads=4, decoder_width=64, decoder_heads=2),  # for the toy videos
    "S": dict(width=384, depth=12, heads=6, decoder_width=192, decoder_heads=3),
    "B": dict(width=768, depth=12, heads=12, decoder_width=384, decoder_heads=6),  # Table 8
    "L": dict(width=1024, depth=24, heads=16, decoder_width=512, decoder_heads=8),
    "H": dict(width=1280, depth=32, heads=16, decoder_width=640, decoder_heads=8),
}


class CubeEmbedding(nn.Module):
    """Joint space-time cube embedding (Sec. 3.3): each cube of 2 x 16 x 16 pixels becomes one token.

    The weight is that of the usual Conv3d with stride = kernel. It is applied as a linear map,
    so that in pre-training only the visible cubes are embedded.
    """

    def __init__(self, *, width: int, cube: tuple[int, int, int]) -> None:
        super().__init__()
        self.cube = cube
        self.proj = nn.Conv3d(3, width, kernel_size=cube, stride=cube)

    def forward(self, clip: Tensor, visible: Tensor | None = None) -> Tensor:
        p0, p1, p2 = self.cube
        cubes = rearrange(clip, "B c (t p0) (h p1) (w p2) -> B (t h w) (c p0 p1 p2)", p0=p0, p1=p1, p2=p2)  # (B, N, 1536)
        if visible is not None:
            cubes = take(cubes, visible)  # (B, N_vis, 1536): 10 % of them (Sec. 3.3)
        return F.linear(cubes, self.proj.weight.flatten(1), self.proj.bias)  # (B, N or N_vis, D)


class Attention(nn.Module):
    """Joint space-time attention (Sec. 3.3): every token attends to every other, whatever their times and places."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # No bias for the keys: q.(k + b) = q.k + q.b adds the same to all of a query's scores, and softmax cancels it.
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])  # (3 D,)
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3 D)
        q, k, v = rearrange(qkv, "B N (three heads d) -> three B heads N d", three=3, heads=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.proj(rearrange(x, "B heads N d -> B N (heads d)"))  # (B, N, D)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between; four times as wide inside."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block of the vanilla ViT. drop_path: how likely a clip is to skip a branch in training."""

    recompute = False  # see `recompute_blocks`

    def __init__(self, *, width: int, heads: int, eps: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width=width, heads=heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width=width)
        self.drop_path = StochasticDepth(drop_path, "row")  # "row": decided for each clip separately

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self.branches, x, use_reentrant=False)
        return self.branches(x)

    def branches(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def recompute_blocks(model: nn.Module) -> None:
    """In training, let each block keep only its input and compute the rest again for the backward pass.

    Activation checkpointing: the same losses and gradients, drop path included, with a fraction of the memory and a third more work.
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True


class Encoder(nn.Module):
    """Phi_enc: the vanilla ViT without class token. In pre-training it sees the visible cubes only, 10 % of all (Sec. 3.3).

    clip_size: what the position table is made for. Clips of another size get an interpolated one, so that weights
    pre-trained on 16 x 224 x 224 can be fine-tuned on 32 x 320 x 320 (Table 7). drop_path rises linearly with depth.
    """

    def __init__(
        self, *, width: int, depth: int, heads: int, clip_size: tuple[int, int, int], cube: tuple[int, int, int], eps: float, norm: bool,
        drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = cube_grid(clip_size, cube)
        self.patch_embed = CubeEmbedding(width=width, cube=cube)
        self.register_buffer("pos_embed", sincos_positions(math.prod(self.grid), width), persistent=False)  # (N, D)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, eps=eps, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=eps) if norm else nn.Identity()

    def forward(self, clip: Tensor, visible: Tensor | None = None) -> Tensor:
        x = self.patch_embed(clip, visible)  # (B, N or N_vis, D)
        positions = interpolate_positions(self.pos_embed, self.grid, cube_grid(clip.shape[2:], self.patch_embed.cube))  # (N, D)
        x = x + (positions if visible is None else positions[visible])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # (B, N or N_vis, D)


class Decoder(nn.Module):
    """Phi_dec: a narrow, shallow ViT over all tokens that predicts the pixels of the masked ones (Sec. 4.2, Table 1a)."""

    def __init__(self, *, width: int, depth: int, heads: int, pixels: int, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, pixels)

    def forward(self, x: Tensor, masked_count: int) -> Tensor:
        for block in self.blocks:
            x = block(x)  # (B, N, D_dec)
        return self.head(self.norm(x[:, -masked_count:]))  # the masked tokens come last: (B, N_mask, pixels)


class VideoMAE(nn.Module):
    """The pre-training model of Figure 1. `VideoMAE(**SIZES["B"], decoder_depth=4)` is Table 8.

    clip_size: frames, height, width of the encoder's input. frames_per_token: frames that each token predicts,
    the cube's own 2, or another number for the targets of Table 1c. Raises UserError if the clip is not a whole number of cubes.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        clip_size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        frames_per_token: int = 2,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        # What it takes to build this model again; checkpoints carry it.
        self.options = dict(
            width=width, depth=depth, heads=heads, decoder_width=decoder_width, decoder_depth=decoder_depth,
            decoder_heads=decoder_heads, clip_size=list(clip_size), cube=list(cube), frames_per_token=frames_per_token, eps=eps,
        )  # fmt: skip
        self.grid = cube_grid(clip_size, cube)  # T/2, H/16, W/16
        self.encoder = Encoder(width=width, depth=depth, heads=heads, clip_size=clip_size, cube=cube, eps=eps, norm=True)
        self.encoder_to_decoder = nn.Linear(width, decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer("pos_embed", sincos_positions(math.prod(self.grid), decoder_width), persistent=False)  # (N, D_dec)
        pixels = frames_per_token * cube[1] * cube[2] * 3
        self.decoder = Decoder(width=decoder_width, depth=decoder_depth, heads=decoder_heads, pixels=pixels, eps=eps)

        for part in (*self.encoder.blocks, self.decoder):  # patch_embed and encoder_to_decoder keep PyTorch's default, as in the official code
            part.apply(_xavier)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)  # cut at one deviation, as in the official code

    def forward(self, clip: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked cubes.

        clip: (B, 3, T, H, W), normalised with ImageNet's mean and deviation.
        visible (B, N_vis) and masked (B, N_mask): token positions from `masking.split`.
        Returns (B, N_mask, pixels), a cube's pixels in the order p0, p1, p2, channel.
        """
        latent = self.encoder(clip, visible)  # (B, N_vis, D): the encoder sees no masked cube
        x_visible = self.encoder_to_decoder(latent) + self.pos_embed[visible]  # (B, N_vis, D_dec)
        x_masked = self.mask_token + self.pos_embed[masked]  # (B, N_mask, D_dec)
        x = torch.cat([x_visible, x_masked], dim=1)  # (B, N, D_dec)
        return self.decoder(x, masked.shape[1])  # (B, N_mask, pixels)


class VideoClassifier(nn.Module):
    """The fine-tuning model (Sec. 4): encoder, mean over tokens, LayerNorm, linear. The decoder is discarded.

    The pre-trained encoder's last norm is discarded too; `fc_norm`, after the mean, starts fresh.
    clip_size: that of the pre-training, to which the position table belongs; clips of other sizes can be classified.
    drop_path, dropout (before the last layer): Table 10.
    """

    # parts of a checkpoint that this model has no use for, see `load_weights`
    discards = ("encoder.norm.", "encoder_to_decoder.", "mask_token", "decoder", "cls_token", "pre_logits.")

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        clip_size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        eps: float = 1e-6,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # What it takes to build this model again; checkpoints carry it.
        self.options = dict(width=width, depth=depth, heads=heads, classes=classes, clip_size=list(clip_size), cube=list(cube), eps=eps)
        encoder = dict(width=width, depth=depth, heads=heads, clip_size=clip_size, cube=cube, eps=eps)
        self.encoder = Encoder(**encoder, norm=False, drop_path=drop_path)
        self.fc_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)
        self.apply(truncated_normal)
        with torch.no_grad():  # the first predictions are nearly uniform
            self.head.weight.mul_(0.001)

    def forward(self, clip: Tensor) -> Tensor:
        """clip (B, 3, T, H, W), normalised, to class logits (B, classes)."""
        x = self.encoder(clip)  # (B, N, D)
        x = self.fc_norm(x.mean(dim=1))  # (B, D)
        return self.head(self.dropout(x))  # (B, classes)


def cube_grid(clip_size: tuple[int, int, int], cube: tuple[int, int, int]) -> Grid:
    """Number of cubes in time, height and width: (8, 14, 14) for 16 x 224 x 224. UserError if they do not fit."""
    if len(cube) != 3:
        raise UserError(f"a cube has three sides, frames, height and width, not {list(cube)}")
    for size, step, what in zip(clip_size, cube, ("frames", "pixels of height", "pixels of width")):
        if step < 1 or size < step or size % step:
            raise UserError(f"a clip of {size} {what} is not a whole number of cubes of {step}; choose a multiple of {step}")
    return tuple(size // step for size, step in zip(clip_size, cube))


def sincos_positions(count: int, width: int) -> Tensor:
    """Fixed sine-cosine table (count, width) over the flattened token index; computed in float64 as the authors do."""
    index = torch.arange(count, dtype=torch.float64)[:, None]
    angle = index / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)  # (count, width / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()  # (count, width): sin, cos, sin, cos, ...


def interpolate_positions(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """A position table (N, D) stretched from one grid of cubes to another: bicubic in space, linear in time."""
    if new_grid == grid:
        return table
    x = rearrange(table, "(t h w) D -> t D h w", t=grid[0], h=grid[1])
    x = F.interpolate(x, size=new_grid[1:], mode="bicubic")
    x = rearrange(x, "t D h w -> (h w) D t")
    x = F.interpolate(x, size=new_grid[0], mode="linear")
    return rearrange(x, "(h w) D t -> (t h w) D", h=new_grid[1])  # (N', D)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens (B, N, D) at `positions` (B, M): (B, M, D)."""
    return tokens.gather(1, positions[:, :, None].expand(-1, -1, tokens.shape[2]))


def _xavier(module: nn.Module) -> None:
    """Initialise a linear layer as the authors do in pre-training; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # q, k and v as the one matrix they are stored in
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def truncated_normal(module: nn.Module) -> None:
    """Initialise a linear layer as the authors do in fine-tuning; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
