"""VideoMAE's networks (Sec. 3.3, Figure 1, Table 8).

    clip (B, 3, T, H, W) -> visible cubes -> cube embedding (B, N_vis, D) -> encoder -> decoder -> masked cubes' pixels

N = T/2 * H/16 * W/16 tokens of width D. Parameters have the names of the official repository, MCG-NJU/VideoMAE.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from masking import Grid
from support.config import UserError, pick

# The encoder is the usual ViT, the decoder half as wide (Sec. 4.2, "Decoder design"). The decoder's depth is not part
# of the size: Table 1a varies it and chooses 4; the authors' scripts and checkpoints have 12 for L and H.
SIZES = {
    "tiny": dict(width=128, depth=4, heads=4, decoder_width=64, decoder_heads=2),  # for the toy videos
    "S": dict(width=384, depth=12, heads=6, decoder_width=192, decoder_heads=3),
    "B": dict(width=768, depth=12, heads=12, decoder_width=384, decoder_heads=6),  # Table 8
    "L": dict(width=1024, depth=24, heads=16, decoder_width=512, decoder_heads=8),
    "H": dict(width=1280, depth=32, heads=16, decoder_width=640, decoder_heads=8),
}


def encoder_size(name: str) -> dict[str, int]:
    """Return width, depth and heads of a size, for models without the decoder. UserError if there is no such size."""
    return {key: pick(SIZES, name, "model.size")[key] for key in ("width", "depth", "heads")}


class CubeEmbedding(nn.Module):
    """Joint space-time cube embedding (Sec. 3.3): each cube of 2 x 16 x 16 pixels becomes one token.

    The usual Conv3d with stride = kernel, written as a linear map so that only the visible cubes are embedded.
    """

    def __init__(self, *, width: int, cube: tuple[int, int, int]) -> None:
        super().__init__()
        self.cube = cube
        self.proj = nn.Conv3d(3, width, kernel_size=cube, stride=cube)

    def forward(self, clip: Tensor, visible: Tensor | None = None) -> Tensor:
        p0, p1, p2 = self.cube
        # (B, N, pixels): pixels is the number of a cube's values, 3 p0 p1 p2 = 1,536
        cubes = rearrange(clip, "B c (t p0) (h p1) (w p2) -> B (t h w) (c p0 p1 p2)", p0=p0, p1=p1, p2=p2)
        if visible is not None:
            cubes = gather_tokens(cubes, visible)  # (B, N_vis, pixels), 10 % of the cubes in the paper (Sec. 3.3)
        return F.linear(cubes, self.proj.weight.flatten(1), self.proj.bias)  # (B, N or N_vis, D)


class Attention(nn.Module):
    """Joint space-time attention (Sec. 3.3): every token attends to all tokens, of all times and places."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # Keys have no bias: q.(k + b) = q.k + q.b adds the same to all of a query's scores, and softmax cancels it.
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])  # (3 D,)
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3 D)
        q, k, v = rearrange(qkv, "B N (three heads d) -> three B heads N d", three=3, heads=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.proj(rearrange(x, "B heads N d -> B N (heads d)"))  # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block of the vanilla ViT. drop_path: probability that a clip skips a branch in training."""

    def __init__(self, *, width: int, heads: int, eps: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width=width, heads=heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        mlp = dict(fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(), fc2=nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.drop_path = StochasticDepth(drop_path, "row")  # "row": each clip by itself

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))  # (B, N, D)
        return x + self.drop_path(self.mlp(self.norm2(x)))  # (B, N, D)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass: the same gradients, much less memory, a third more compute."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


class Encoder(nn.Module):
    """Phi_enc: the vanilla ViT without class token. In pre-training it sees the visible cubes only (Sec. 3.3).

    clip_size: frames, height and width in pre-training. For other clips the position table is interpolated, so
    weights of 16 x 224 x 224 can be fine-tuned on 32 x 320 x 320 (Table 7). drop_path: rate of the last block; it rises
    linearly from 0. norm: whether there is a last LayerNorm. UserError if clip_size is not a whole number of cubes.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        clip_size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        eps: float = 1e-6,
        drop_path: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.options = dict(width=width, depth=depth, heads=heads, clip_size=list(clip_size), cube=list(cube), eps=eps)
        self.grid = cube_grid(clip_size, cube)  # T/2, H/16, W/16
        self.patch_embed = CubeEmbedding(width=width, cube=cube)
        self.register_buffer("pos_embed", sincos_positions(math.prod(self.grid), width), persistent=False)  # (N, D)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, eps=eps, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=eps) if norm else nn.Identity()

    def forward(self, clip: Tensor, visible: Tensor | None = None) -> Tensor:
        grid = cube_grid(clip.shape[2:], self.patch_embed.cube)
        positions = interpolate_positions(self.pos_embed, self.grid, grid)  # (N, D)
        if visible is not None:
            positions = positions[visible]  # (B, N_vis, D)
        x = self.patch_embed(clip, visible) + positions  # (B, N or N_vis, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # (B, N or N_vis, D)


class Decoder(nn.Module):
    """Phi_dec: a narrow, shallow ViT over visible and masked tokens, which predicts pixels (Sec. 4.2, Table 1a)."""

    def __init__(self, *, width: int, depth: int, heads: int, pixels: int, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width=width, heads=heads, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, pixels)

    def forward(self, x: Tensor, masked_count: int) -> Tensor:
        for block in self.blocks:
            x = block(x)  # (B, N_vis + N_mask, D_dec)
        return self.head(self.norm(x[:, -masked_count:]))  # the masked tokens come last: (B, N_mask, pixels)


class VideoMAE(nn.Module):
    """The pre-training model (Figure 1). `VideoMAE(**SIZES["B"], decoder_depth=4)` is that of Table 8.

    frames_per_token: frames that each token predicts, 2, or 4 or 1 in Table 1c. encoder: arguments of `Encoder`.
    """

    def __init__(
        self, *, decoder_width: int, decoder_depth: int, decoder_heads: int, frames_per_token: int = 2, **encoder: Any
    ) -> None:
        super().__init__()
        self.encoder = Encoder(**encoder)
        decoder = dict(decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=decoder_heads)
        self.options = self.encoder.options | decoder | dict(frames_per_token=frames_per_token)
        self.grid = self.encoder.grid
        eps = self.options["eps"]
        self.encoder_to_decoder = nn.Linear(self.options["width"], decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.register_buffer("pos_embed", sincos_positions(math.prod(self.grid), decoder_width), persistent=False)
        pixels = frames_per_token * math.prod(self.options["cube"][1:]) * 3
        self.decoder = Decoder(width=decoder_width, depth=decoder_depth, heads=decoder_heads, pixels=pixels, eps=eps)
        # patch_embed and encoder_to_decoder keep PyTorch's own initialization, as in the authors' code.
        for part in (self.encoder.blocks, self.decoder):
            initialize(part, nn.init.xavier_uniform_)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)  # cut at one std, as in the authors' code

    def forward(self, clip: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked cubes (B, N_mask, pixels), in the order p0, p1, p2, channel, of a clip (B, 3, T, H, W).

        The clip is normalized. visible (B, N_vis) and masked (B, N_mask) are positions: what to see, what to predict.
        """
        latent = self.encoder(clip, visible)  # (B, N_vis, D)
        x_visible = self.encoder_to_decoder(latent) + self.pos_embed[visible]  # (B, N_vis, D_dec)
        x_masked = self.mask_token + self.pos_embed[masked]  # (B, N_mask, D_dec)
        x = torch.cat([x_visible, x_masked], dim=1)  # (B, N_vis + N_mask, D_dec)
        return self.decoder(x, masked.shape[1])  # (B, N_mask, pixels)


class VideoClassifier(nn.Module):
    """The fine-tuning model (Sec. 4): encoder, mean over tokens, LayerNorm, dropout (Table 10), linear.

    The pre-trained decoder is discarded, and so is the encoder's last norm: `fc_norm`, after the mean, starts fresh.
    """

    def __init__(self, *, classes: int, dropout: float = 0.0, **encoder: Any) -> None:
        super().__init__()
        self.encoder = Encoder(**encoder, norm=False)
        self.options = self.encoder.options | dict(classes=classes)
        self.fc_norm = nn.LayerNorm(self.options["width"], eps=self.options["eps"])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.options["width"], classes)
        initialize_from_scratch(self.encoder, self.head)

    def forward(self, clip: Tensor) -> Tensor:
        """Return the class logits (B, classes) of a normalized clip (B, 3, T, H, W)."""
        x = self.encoder(clip)  # (B, N, D)
        x = self.fc_norm(x.mean(dim=1))  # (B, D)
        return self.head(self.dropout(x))  # (B, classes)


def cube_grid(clip_size: tuple[int, int, int], cube: tuple[int, int, int]) -> Grid:
    """Count the cubes in time, height and width: (8, 14, 14) for 16 x 224 x 224. UserError if they do not fit."""
    if len(cube) != 3:
        raise UserError(f"a cube has three sides, frames, height and width, not {list(cube)}")
    for n, p, unit in zip(clip_size, cube, ("frames", "pixels of height", "pixels of width"), strict=True):
        if p < 1 or n < p or n % p:
            raise UserError(f"a clip of {n} {unit} is not a whole number of cubes of {p}; choose a multiple of {p}")
    return tuple(n // p for n, p in zip(clip_size, cube, strict=True))


def sincos_positions(count: int, width: int) -> Tensor:
    """Compute the fixed sine-cosine table (count, width) over the flattened index in float64, as the authors do."""
    index = torch.arange(count, dtype=torch.float64)[:, None]
    angle = index / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)  # (count, width / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()  # (count, width): sin, cos, sin, cos, ...


def interpolate_positions(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Resize a position table (N, D) from one grid of cubes to another: bicubic in space, linear in time."""
    if new_grid == grid:
        return table
    x = rearrange(table, "(t h w) D -> t D h w", t=grid[0], h=grid[1])
    x = F.interpolate(x, size=new_grid[1:], mode="bicubic")
    x = rearrange(x, "t D h w -> (h w) D t")
    x = F.interpolate(x, size=new_grid[0], mode="linear")
    return rearrange(x, "(h w) D t -> (t h w) D", h=new_grid[1])  # (N', D)


def gather_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Select from tokens (B, N, D) those at `positions` (B, M). Returns (B, M, D)."""
    return tokens.gather(1, repeat(positions, "B M -> B M D", D=tokens.shape[2]))


def initialize(model: nn.Module, init_weight: Callable[[Tensor], Any]) -> None:
    """Initialize all linear layers: weights with a function of torch.nn.init, biases with zeros."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_weight(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_from_scratch(encoder: Encoder, head: nn.Linear) -> None:
    """Initialize a classifier. The std is the authors' 0.02 for ViT-B and scaled by sqrt(768 / width) for others."""
    # With 0.02 the toy's model, of width 128, takes far longer to learn.
    initialize(encoder, partial(nn.init.trunc_normal_, std=0.02 * (768 / encoder.options["width"]) ** 0.5))
    initialize(head, partial(nn.init.trunc_normal_, std=0.02))
    head.weight.data.mul_(0.001)  # the first predictions are nearly uniform


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW. Biases, norms and the mask token have no weight decay.

    Layer i learns at "lr_scale" = layer_decay^(L + 1 - i) times the learning rate: 0 is the cube embedding, i + 1 is
    `blocks.i`, L + 1 is what follows. Table 10: a layer_decay of 0.75 for ViT-B on SSV2 and Kinetics.
    """
    last = len(model.encoder.blocks) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        layer = last
        if name.startswith("encoder.patch_embed."):
            layer = 0
        elif name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        lr_scale = layer_decay ** (last - layer)
        decays = parameter.ndim > 1 and name != "mask_token"
        key = lr_scale, not decays
        if key not in groups:
            groups[key] = dict(params=[], lr_scale=lr_scale, weight_decay=weight_decay if decays else 0.0)
        groups[key]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]  # the cube embedding's first
