"""VideoMAE's networks (Sec. 3.3, Figure 1, Table 8); loading and exporting their weights.

    clip (B, 3, T, H, W) -> cube embedding -> visible tokens (B, N_vis, D) -> encoder -> decoder -> pixels of masked cubes

N = T/2 * H/16 * W/16 tokens of width D. Modules and parameters are named as in the official repository
(MCG-NJU/VideoMAE), so that checkpoints go from one to the other as they are.

    python model.py runs/pretrain/toy/checkpoint.pt exported/    # a folder that transformers' from_pretrained opens
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from common import UserError, launch, say
from masking import Grid

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


# ---- weights in: this project's and the official naming are the same; Hugging Face's and mmaction2's are renamed ----

_RENAME = [
    (r"^(module|_orig_mod)\.", ""),  # wrappers: DataParallel, torch.compile
    # Hugging Face
    (r"^videomae\.embeddings\.patch_embeddings\.projection\.", "encoder.patch_embed.proj."),
    (r"^videomae\.encoder\.layer\.", "encoder.blocks."),
    (r"^videomae\.layernorm\.", "encoder.norm."),
    (r"^decoder\.decoder_layers\.", "decoder.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|q_bias)(\.bias)?$", ".attn.q_bias"),
    (r"\.attention\.attention\.(value|v_bias)(\.bias)?$", ".attn.v_bias"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^classifier\.", "head."),
    # mmaction2
    (r"^cls_head\.fc_cls\.", "head."),
    (r"^(backbone\.)?patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.mlp\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.mlp\.layers\.1\.", ".mlp.fc2."),
    # official action detection: the head's one layer, wherever it stands
    (r"^roi_heads?\.(\w+\.)*(weight|bias)$", r"head.\2"),
    # official fine-tuning checkpoints and image models: the encoder stands alone
    (r"^backbone\.", ""),
    (r"^(?=patch_embed\.|blocks\.|norm\.)", "encoder."),
    (r"^encoder\.(?=head\.|fc_norm\.)", ""),
]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a checkpoint file under this project's names, and what else the file holds.

    Reads this project's, official (`model`, `module` or bare), mmaction2 (`state_dict`) and Hugging Face files,
    `.safetensors` too where that package is installed. Never runs code from the file. Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; give the path of a checkpoint file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
        try:
            content = load_file(path)
        except Exception as error:  # of that package, which may not be installed
            raise UserError(f"{path} is not a file of safetensors: {error}") from None
    else:
        try:
            # Official checkpoints keep their command line beside the weights: a plain container of values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types for what is one mistake: not a file of weights
            reason = f"it is another kind of file, was cut off, or would run code ({type(error).__name__})"
            raise UserError(f"{path} is not a checkpoint that can be read safely (weights_only): {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a model's named tensors")
    state = next((content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict)), content)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors under 'model', 'module', 'state_dict' or its top level")
    return _to_own_names(state), content


def _to_own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    own, separate = {}, {}
    of_images = any(key.endswith("patch_embed.proj.weight") and value.ndim == 4 for key, value in state.items())
    for key, value in state.items():
        match = re.fullmatch(r"(.*)\.attention\.attention\.(query|key|value)\.weight", key)
        if match:  # Hugging Face keeps three matrices where the official code has one
            separate.setdefault(match[1], {})[match[2]] = value
            continue
        if key.endswith(("pos_embed", "position_embeddings")) and not of_images:
            continue  # a fixed table: every video model computes its own
        own[_rename(key)] = value
    for prefix, qkv in separate.items():
        own[_rename(f"{prefix}.attn.qkv.weight")] = torch.cat([qkv["query"], qkv["key"], qkv["value"]])  # (3 D, D)
    return own


def _rename(key: str) -> str:
    for pattern, replacement in _RENAME:
        key = re.sub(pattern, replacement, key)
    return key


def load_weights(model: nn.Module, path: str | Path, fresh: tuple[str, ...] = ()) -> None:
    """Load a checkpoint file, in any naming that `read_checkpoint` knows, into any of this project's models.

    Every parameter has to be found, with its shape, except those whose name starts with one of `fresh`: they keep
    their initialisation. Every tensor of the file has to be used, except the parts that the model `discards`.
    Prints what was kept fresh and what was left over; raises UserError naming what else is missing or does not fit.
    Weights of 2-D image models, named as in timm and facebookresearch/mae, are inflated (Table 1e).
    """
    state, content = read_checkpoint(path)
    encoder, options = model.encoder, content.get("model_options")
    if options:  # the table that the file's model was trained with, stretched if its clips had another size
        grid = cube_grid(options["clip_size"], options["cube"])
        table = content.get("positions", sincos_positions(math.prod(grid), options["width"]))
        encoder.pos_embed = interpolate_positions(table, grid, encoder.grid).to(encoder.pos_embed.device)
    elif state.get("encoder.patch_embed.proj.weight", torch.empty(0)).ndim == 4:
        say(f"{path}: weights of an image model, inflated to cubes")
        encoder.pos_embed = inflate(state, encoder.patch_embed.cube[0], encoder.grid).to(encoder.pos_embed.device)
    own = model.state_dict()
    misfits = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    missing = sorted(own.keys() - state.keys() | {key for key in misfits if key.startswith(fresh)})
    left_over = sorted(key for key in state if key not in own)
    wrong = [
        *(f"{key} is missing" for key in missing if not key.startswith(fresh)),
        *(f"{key} is left over" for key in left_over if not key.startswith(getattr(model, "discards", ()))),
        *(f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}" for key in sorted(misfits - set(missing))),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} does not fit this {type(model).__name__} (another model size, or another stage?): {'; '.join(wrong[:3])}{more}")
    model.load_state_dict({**own, **{key: value for key, value in state.items() if key in own and key not in missing}})
    for what, keys in (("not in the file, start fresh", missing), ("left over, not used", left_over)):
        if keys:
            say(f"{path}: {what}: {', '.join(sorted({'.'.join(key.split('.')[:2]) for key in keys}))}")


def inflate(state: dict[str, Tensor], frames: int, grid: Grid) -> Tensor:
    """Turn the weights of an image ViT into a video model's, in place, as I3D does; returns positions (N, D).

    The patch kernel is repeated over the cube's frames and divided by their number: a still video gives what the image
    gave (Sec. 4.2, "Pre-training dataset"). Positions in space are the image's; the class token and its position are
    dropped. An image's table does not tell times apart, so a sine-cosine table over time is added to it, scaled to the
    same deviation and with mean 0. The paper says nothing about positions here.
    """
    kernel = state["encoder.patch_embed.proj.weight"]  # (D, 3, 16, 16)
    state["encoder.patch_embed.proj.weight"] = kernel[:, :, None].repeat(1, 1, frames, 1, 1) / frames  # (D, 3, 2, 16, 16)
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        q, _, v = state.pop(key).chunk(3)  # a bias for the keys changes nothing, see Attention
        state[key.replace("qkv.bias", "q_bias")], state[key.replace("qkv.bias", "v_bias")] = q, v
    image = state.pop("encoder.pos_embed", state.pop("pos_embed", None))
    if image is None:
        raise UserError("these weights of an image model hold no position table 'pos_embed'; give ones named as in timm or facebookresearch/mae")
    side = math.isqrt(image.shape[1])  # the class token comes first, if there is one
    image = image[0, -side * side :]  # (14 * 14, D)
    time = sincos_positions(grid[0], image.shape[1])  # (T/2, D)
    time = time - time.mean(dim=0)
    time = time * image.std() / time.std() if grid[0] > 1 else time
    image = interpolate_positions(image, (1, side, side), (1, *grid[1:]))  # (H/16 * W/16, D)
    return (time[:, None] + image[None]).flatten(0, 1)  # (N, D)


def read_options(path: str | Path, clip_size: tuple[int, int, int] = (16, 224, 224)) -> dict[str, Any]:
    """The keyword arguments of the `VideoMAE` or `VideoClassifier` that a checkpoint holds.

    This project's checkpoints contain them. In others the sizes are read off the tensors' shapes. The number of heads
    and `clip_size` cannot be: the former comes from `SIZES` by width, the latter is the caller's.
    """
    state, content = read_checkpoint(path)
    if "model_options" in content:
        return content["model_options"]
    if "encoder.patch_embed.proj.weight" not in state:
        raise UserError(f"{path} has no encoder.patch_embed.proj.weight: it is no checkpoint of a VideoMAE model")
    width, _, *cube = state["encoder.patch_embed.proj.weight"].shape
    size = next((size for size in SIZES.values() if size["width"] == width), None)
    if size is None:
        raise UserError(f"{path} has an encoder of width {width}; known are {', '.join(str(s['width']) for s in SIZES.values())}")

    def depth(part: str) -> int:
        return 1 + max(int(key.split(".")[2]) for key in state if key.startswith(f"{part}.blocks."))

    options = dict(width=width, depth=depth("encoder"), heads=size["heads"], cube=cube, clip_size=list(clip_size))
    if "decoder.head.weight" in state:
        decoder = dict(decoder_width=size["decoder_width"], decoder_heads=size["decoder_heads"], decoder_depth=depth("decoder"))
        return {**options, **decoder, "frames_per_token": state["decoder.head.weight"].shape[0] // (3 * cube[1] * cube[2])}
    return {**options, "classes": len(state["head.weight"])} if "head.weight" in state else options


def build_from_checkpoint(path: str | Path, clip_size: tuple[int, int, int] = (16, 224, 224)) -> VideoMAE:
    """The pre-training model that a checkpoint holds, with its weights; for `clip_size` see `read_options`."""
    return build_from(VideoMAE, "decoder_width", "a pre-training checkpoint, with its decoder", path, clip_size)


def build_classifier(path: str | Path, clip_size: tuple[int, int, int] = (16, 224, 224)) -> VideoClassifier:
    """The fine-tuned model that a checkpoint holds, with its weights; for `clip_size` see `read_options`."""
    return build_from(VideoClassifier, "classes", "a fine-tuned checkpoint, with its classes", path, clip_size)


def build_from(kind: type[nn.Module], needed: str, what: str, path: str | Path, clip_size: tuple[int, int, int]) -> Any:
    """A model of this kind with the weights of a checkpoint. UserError if `read_options` does not find what is `needed`."""
    options = read_options(path, clip_size)
    if needed not in options:
        raise UserError(f"{path} is not {what}")
    model = kind(**options)
    load_weights(model, path)
    return model


# ---- weights out ----


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a `VideoMAE` or `VideoClassifier` state dict to Hugging Face's names, as in the files on its hub."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection.")
        key = re.sub(r"^encoder\.blocks\.", "videomae.encoder.layer.", key)
        key = re.sub(r"^encoder\.norm\.", "videomae.layernorm.", key)
        key = re.sub(r"^decoder\.blocks\.", "decoder.decoder_layers.", key)
        key = re.sub(r"^head\.", "classifier.", key)
        key = key.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        key = key.replace(".attn.proj.", ".attention.output.dense.").replace(".attn.", ".attention.attention.")
        key = key.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        if key.endswith(".qkv.weight"):
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                renamed[key.replace(".qkv.", f".{name}.")] = part.clone()
        else:
            renamed[key] = value
    return renamed


def export_hugging_face(model: VideoMAE, folder: str | Path, normalize_target: bool = True) -> None:
    """Write `config.json`, `preprocessor_config.json` and `pytorch_model.bin` for transformers' `from_pretrained`.

    Raises UserError for models that its classes cannot express: frames that are not square, other targets of Table 1c.
    """
    o = model.options
    frames, height, width = o["clip_size"]
    if height != width or o["cube"][1] != o["cube"][2] or o["frames_per_token"] != o["cube"][0]:
        raise UserError("transformers' VideoMAE knows square frames and cubes and the target of the paper's default only")
    config = {
        "architectures": ["VideoMAEForPreTraining"], "model_type": "videomae", "num_channels": 3, "qkv_bias": True, "use_mean_pooling": False,
        "image_size": height, "num_frames": frames, "patch_size": o["cube"][1], "tubelet_size": o["cube"][0], "hidden_act": "gelu",
        "hidden_size": o["width"], "num_hidden_layers": o["depth"], "num_attention_heads": o["heads"], "intermediate_size": 4 * o["width"],
        "decoder_hidden_size": o["decoder_width"], "decoder_num_hidden_layers": o["decoder_depth"],
        "decoder_num_attention_heads": o["decoder_heads"], "decoder_intermediate_size": 4 * o["decoder_width"],
        "layer_norm_eps": o["eps"], "norm_pix_loss": normalize_target,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02,
    }  # fmt: skip
    processor = {
        "image_processor_type": "VideoMAEImageProcessor", "size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],  # its class's own default, 0.5, is not the paper's
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    torch.save(to_hugging_face(model.state_dict()), folder / "pytorch_model.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a pre-training checkpoint as a Hugging Face model folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    config = read_checkpoint(arguments.checkpoint)[1].get("config", {"target": {"normalize": True}})
    export_hugging_face(build_from_checkpoint(arguments.checkpoint), arguments.folder, config["target"]["normalize"])
    print(f"wrote {arguments.folder}: transformers.VideoMAEForPreTraining.from_pretrained('{arguments.folder}')")


if __name__ == "__main__":
    launch(main)
