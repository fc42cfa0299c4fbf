"""Load weights of any source into this project's models; find what configurations need of them (docs/weights.md)."""

import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from masking import Grid
from model import SIZES, VideoMAE, cube_grid, encoder_size, interpolate_positions, sincos_positions
from support.config import UserError, as_dict, load_config, say
from support.weight_files import read_checkpoint, weights_file

# Parts of a file that a model without them leaves unused. Any other unused tensor is an error.
PARTS = "encoder.norm. fc_norm. head. encoder_to_decoder. mask_token decoder pos_embed cls_token pre_logits.".split()
PARTS += ["projector.", "predictor."]  # of baselines/moco_v3.py


def load_weights(
    model: nn.Module,
    path: str | Path,
    fresh: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    clip_size: tuple[int, int, int] | None = None,
) -> None:
    """Load any file that `read_checkpoint` reads into any of this project's models. Say which parts are loaded.

    Each parameter has to be in the file, in the same shape. Exceptions are those whose names start with one of `fresh`,
    which keep their initial values, or of `optional`, which keep them if the file has none of this shape. Each tensor
    of the file has to be used, unless it belongs to a part that the model lacks. Image models are inflated (Table 1e).
    clip_size: that of the file's positions, if the file does not say it; None: the model's. Raises UserError.
    """
    state, content = read_checkpoint(path)
    embedding, grid = model.encoder.patch_embed, model.encoder.grid
    kernel = state.get("encoder.patch_embed.proj.weight", embedding.proj.weight)
    if kernel.ndim == 4 and "encoder.pos_embed" in state:  # with the names of timm or facebookresearch/mae
        say(f"{path}: weights of an image model, inflated to cubes")
        state = inflate(state, embedding.cube[0], grid)
    elif clip_size := content["clip_size"] or clip_size:
        grid = cube_grid(clip_size, kernel.shape[2:])
    own = model.state_dict() | dict(model.named_buffers())  # with the position tables
    if "mask_token" in own.keys() - state.keys():
        raise UserError(f"{path} has no decoder of VideoMAE: pre-training continues from pre-trained weights only")
    state |= fit_positions(state, own, grid, model.encoder.grid)

    misfits = {key for key in own if key not in state or state[key].shape != own[key].shape}
    new = misfits | {key for key in own if key.startswith(fresh)}
    left_over = state.keys() - own.keys()
    errors = []
    for key in sorted(misfits):
        if not key.startswith(fresh + optional):
            shape = tuple(state[key].shape) if key in state else "missing"
            errors.append(f"{key} is {shape}, the model's {tuple(own[key].shape)}")
    lacking = tuple(part for part in PARTS if not any(key.startswith(part) for key in own))
    errors += [f"{key} is left over" for key in sorted(left_over) if not key.startswith(lacking)]
    if errors:
        keys = "model.size, model.cube, model.pretrained_clip"
        if "mask_token" in own:
            keys += ", model.decoder_depth, target.frames"
        what = f"this {type(model).__name__} (another {keys} or stage?)"
        if "fc_norm.weight" in misfits and {"encoder.norm.weight", "head.weight"} <= state.keys():
            what += ", as it classifies by the first token (use_mean_pooling=False), which VideoMAE does not"
        raise UserError(f"{path} does not fit {what} in {len(errors)} places: {'; '.join(errors[:3])}")
    for key in own.keys() - new:
        own[key].copy_(state[key])

    words = []
    for keys, what in ((own.keys() - new, "loaded"), (new, "new"), (left_over, "not needed")):
        parts = {re.match(r"encoder\.norm|\w+", key)[0] for key in keys if not key.endswith("pos_embed")}
        if "encoder" in parts:
            parts.discard("encoder.norm")
        if parts:
            words.append(f"{', '.join(sorted(parts))} {what}")
    words += [f"{what} not used" for what in content["unused"]]
    say(f"{path}: {'; '.join(words)}")


def fit_positions(state: dict[str, Tensor], own: dict[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
    """Return position tables for `new_grid`: those of the file, which are for its `grid` of cubes.

    If the file has none, a sine-cosine table of the model becomes that of the file's grid; any other table is kept.
    """
    tables = {}
    for key in [key for key in own if key.endswith("pos_embed")]:
        if key not in state and not torch.equal(own[key], sincos_positions(*own[key].shape)):
            tables[key] = own[key]
            continue
        table = state.get(key, sincos_positions(math.prod(grid), own[key].shape[1])).float()
        table = table.reshape(-1, table.shape[-1])  # (N, D)
        if len(table) == math.prod(grid):
            table = interpolate_positions(table, grid, new_grid)
        tables[key] = table
    return tables


def inflate(state: dict[str, Tensor], frames: int, grid: Grid) -> dict[str, Tensor]:
    """Return an image ViT's weights as a video model's, as in I3D, with a position table (N, D) for a grid of cubes.

    A still video gives what the image gave (Sec. 4.2, "Pre-training dataset"). The paper does not say what becomes of
    the positions. Here a sine-cosine table over time, of mean 0 and the same std, is added to the image's.
    """
    video = dict(state)
    kernel = video["encoder.patch_embed.proj.weight"]  # (D, 3, 16, 16)
    video["encoder.patch_embed.proj.weight"] = kernel[:, :, None].repeat(1, 1, frames, 1, 1) / frames
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        q, _, v = video.pop(key).chunk(3)  # a bias of the keys changes nothing, see Attention
        video |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
    image = video["encoder.pos_embed"]  # (1, 1 + 14 * 14, D)
    side = math.isqrt(image.shape[1])
    image = image[0, -side * side :]  # (14 * 14, D)
    time = sincos_positions(grid[0], image.shape[1])  # (T/2, D)
    time = time - time.mean(dim=0)
    time = time * image.std() / time.std().clamp(min=1e-6)  # 0 if there is only one
    image = interpolate_positions(image, (1, side, side), (1, *grid[1:]))  # (H/16 * W/16, D)
    return video | {"encoder.pos_embed": (time[:, None] + image[None]).flatten(0, 1)}  # (N, D)


def read_options(path: str | Path, clip_size: tuple[int, int, int] = (16, 224, 224)) -> dict[str, Any]:
    """Return the arguments of the `VideoMAE` or `VideoClassifier` that a checkpoint holds. Raises UserError.

    This project's checkpoints contain them. For others, sizes are inferred from the tensors; heads and clip size are
    read from config.json. Without one, heads are those of `SIZES` for this width, and `clip_size` is the caller's.
    """
    state, content = read_checkpoint(path)
    if "model_options" in content:
        return content["model_options"]
    if "encoder.patch_embed.proj.weight" not in state:
        raise UserError(f"{path} has no encoder.patch_embed.proj.weight: it is no checkpoint of a VideoMAE model")
    width, _, *cube = state["encoder.patch_embed.proj.weight"].shape
    heads = {size["width"]: (size["heads"], size["decoder_heads"]) for size in SIZES.values()}
    hub = content["config.json"]
    if "num_attention_heads" in hub and (width, hub["num_attention_heads"]) != (384, 16):
        # The hub's ViT-S configurations wrongly say 16 heads; the models have 6.
        heads[width] = hub["num_attention_heads"], hub.get("decoder_num_attention_heads")
    if width not in heads:
        raise UserError(f"{path} has an encoder of width {width}; known are {', '.join(map(str, heads))}")
    blocks = {tuple(key.split(".")[:3]) for key in state if ".blocks." in key}
    depth = Counter(part for part, _, _ in blocks)
    options = dict(width=width, depth=depth["encoder"], heads=heads[width][0], cube=cube)
    options["clip_size"] = list(content["clip_size"] or clip_size)
    if "decoder.head.weight" in state:
        frames = len(state["decoder.head.weight"]) // (3 * math.prod(cube[1:]))
        options |= dict(decoder_width=state["mask_token"].shape[2], decoder_depth=depth["decoder"])
        options |= dict(decoder_heads=heads[width][1], frames_per_token=frames)
    elif "head.weight" in state:
        options["classes"] = len(state["head.weight"])
    return options


def build_from_checkpoint(
    path: str | Path, kind: type[nn.Module] = VideoMAE, clip_size: tuple[int, int, int] = (16, 224, 224)
) -> Any:
    """Return a model of this kind with a checkpoint's weights; for `clip_size` see `read_options`. Raises UserError."""
    options = read_options(path, clip_size)
    stage, part = ("pre-training", "decoder_width") if kind is VideoMAE else ("fine-tuned", "classes")
    if part not in options:
        raise UserError(f"{path} is not a {stage} checkpoint: it has no {part}")
    model = kind(**options)
    load_weights(model, path)
    return model


def stored_config(path: str | Path, default: Path, settings: list[str]) -> SimpleNamespace:
    """Return the configuration for weights: a .yaml file in `settings`, else the checkpoint's, else Kinetics' recipe.

    Kinetics' recipe is the k400_base.yaml next to `default`, with the clip size of a config.json and the file's cube.
    """
    content = read_checkpoint(path)[1]
    recipe = [str(default.with_name("k400_base.yaml"))]
    if content["clip_size"]:
        frames, size, _ = content["clip_size"]
        recipe += [f"data.frames={frames}", f"data.size={size}", f"model.cube={read_options(path)['cube']}"]
    return load_config(default, settings, content.get("config") or as_dict(load_config(default, recipe)))


def encoder_options(config: SimpleNamespace, init: str) -> dict[str, Any]:
    """Return arguments of `Encoder`: the model's size, and the clip size of the pre-training of the weights `init`."""
    clip_size = [config.data.frames, config.data.size, config.data.size]
    if init != "scratch":
        clip_size = read_checkpoint(init)[1]["clip_size"] or config.model.pretrained_clip
    return encoder_size(config.model.size) | dict(clip_size=clip_size, cube=config.model.cube)


def check_init(init: str, *keywords: str) -> None:
    """Raise UserError unless `init` is a file of weights or one of the keywords."""
    if init not in keywords and not weights_file(init).is_file():
        start = "".join(f", or start with init={keyword}" for keyword in keywords)
        raise UserError(f"no weights at init={init}: make them with pretrain.py, or name another file{start}")
