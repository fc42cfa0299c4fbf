"""Weights of any source in this project's models, and what configurations need to know of them (docs/weights.md)."""

import math
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
    model: nn.Module, path: str | Path, fresh: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> None:
    """Load any file that `read_checkpoint` reads into any of this project's models. Say which parts are loaded.

    Each parameter has to be in the file, with its shape, but for names that start with one of `fresh`, which keep their
    initial values, or of `optional`, which keep them if the file has none of this shape. Each tensor has to be used,
    unless it is of a part that the model lacks, such as the decoder. Image models, named as in timm and
    facebookresearch/mae, are inflated (Table 1e). Raises UserError.
    """
    state, content = read_checkpoint(path)
    embedding, grid = model.encoder.patch_embed, model.encoder.grid
    kernel = state.get("encoder.patch_embed.proj.weight", embedding.proj.weight)
    if kernel.ndim == 4:
        say(f"{path}: weights of an image model, inflated to cubes")
        state = inflate(state, embedding.cube[0], grid)
    elif content["clip_size"]:
        grid = cube_grid(content["clip_size"], kernel.shape[2:])
    own = model.state_dict() | dict(model.named_buffers())  # with the position tables
    state |= fit_positions(state, own, grid, model.encoder.grid)

    fitting = {key for key in own if key in state and state[key].shape == own[key].shape}
    loaded = {key for key in fitting if not key.startswith(fresh)}
    if errors := find_misfits(own, state, fitting, fresh + optional):
        more = f" and {len(errors) - 3} more" if len(errors) > 3 else ""
        what = f"this {type(model).__name__} (another model size, model.pretrained_clip or stage?)"
        raise UserError(f"{path} does not fit {what}: {'; '.join(errors[:3])}{more}")
    for key in loaded:
        own[key].copy_(state[key])
    report(path, own, state, fitting, loaded, content["unused"])


def fit_positions(state: dict[str, Tensor], own: dict[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
    """Return position tables for `new_grid`: those of the file, which are for its `grid` of cubes.

    A model keeps its own table if the file has none, but if that is the flat sine-cosine table, it becomes the one of
    the file's grid, interpolated.
    """
    tables = {}
    for key, own_table in own.items():
        if not key.endswith("pos_embed"):
            continue
        table = state.get(key)
        if table is None and torch.equal(own_table, sincos_positions(*own_table.shape)):
            table = sincos_positions(math.prod(grid), own_table.shape[1])
        if table is None:
            tables[key] = own_table
            continue
        table = table.float().reshape(-1, table.shape[-1])  # (N, D)
        if len(table) == math.prod(grid):
            table = interpolate_positions(table, grid, new_grid)
        tables[key] = table
    return tables


def find_misfits(own: dict, state: dict, fitting: set[str], may_differ: tuple[str, ...]) -> list[str]:
    """Return a few words on each parameter that is not in the file and each tensor that the model has no use for."""
    errors = []
    for key in sorted(own.keys() - fitting):
        if not key.startswith(may_differ):
            shape = tuple(state[key].shape) if key in state else "missing"
            errors.append(f"{key} is {shape}, the model's {tuple(own[key].shape)}")
    lacking = tuple(part for part in PARTS if not any(key.startswith(part) for key in own))
    for key in sorted(state.keys() - own.keys()):
        if not key.startswith(lacking):
            errors.append(f"{key} is left over")
    return errors


def report(path: str | Path, own: dict, state: dict, fitting: set[str], loaded: set[str], unused: list[str]) -> None:
    """Print which parts of a model are loaded, which are new and why, and what of the file is not used."""
    words = []
    for what, keys in (
        ("loaded", loaded),
        ("new", own.keys() - state.keys()),
        ("new, since the file's has another shape", (own.keys() & state.keys()) - fitting),
        ("new, the file's not used", fitting - loaded),
        ("not needed", state.keys() - own.keys()),
    ):
        # A part is named by its first word, or by two, such as "encoder.norm", if the rest of it is loaded.
        parts = set()
        for key in keys:
            if key.endswith("pos_embed"):
                continue
            first, _, rest = key.partition(".")
            is_split = key not in loaded and any(other.startswith(f"{first}.") for other in loaded)
            parts.add(f"{first}.{rest.partition('.')[0]}" if is_split else first)
        if parts:
            words.append(f"{', '.join(sorted(parts))} {what}")
    say(f"{path}: {'; '.join([*words, *(f'{what} not used' for what in unused)])}")


def inflate(state: dict[str, Tensor], frames: int, grid: Grid) -> dict[str, Tensor]:
    """Return an image ViT's weights as a video model's, as in I3D, with a position table (N, D) for a grid of cubes.

    The patch kernel is repeated over frames and divided by their number: a still video gives what the image gave
    (Sec. 4.2, "Pre-training dataset"). The paper does not say what becomes of the positions. Here the image's, without
    the class token's, serve for all times; a sine-cosine table over time, of mean 0 and the same std, is added.
    """
    video = dict(state)
    kernel = video["encoder.patch_embed.proj.weight"]  # (D, 3, 16, 16)
    video["encoder.patch_embed.proj.weight"] = kernel[:, :, None].repeat(1, 1, frames, 1, 1) / frames
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        q, _, v = video.pop(key).chunk(3)  # a bias of the keys changes nothing, see Attention
        video |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
    image = video.get("encoder.pos_embed")  # (1, 1 + 14 * 14, D)
    if image is None:
        what = "these weights of an image model hold no position table 'pos_embed'"
        raise UserError(f"{what}; give ones named as in timm or facebookresearch/mae")
    side = math.isqrt(image.shape[1])
    image = image[0, -side * side :]  # (14 * 14, D)
    time = sincos_positions(grid[0], image.shape[1])  # (T/2, D)
    time = time - time.mean(dim=0)
    time = time * image.std() / time.std().clamp(min=1e-6)  # 0 if there is only one
    image = interpolate_positions(image, (1, side, side), (1, *grid[1:]))  # (H/16 * W/16, D)
    return video | {"encoder.pos_embed": (time[:, None] + image[None]).flatten(0, 1)}  # (N, D)


def read_options(path: str | Path, clip_size: tuple[int, int, int] = (16, 224, 224)) -> dict[str, Any]:
    """Return the arguments of the `VideoMAE` or `VideoClassifier` that a checkpoint holds. Raises UserError.

    This project's checkpoints contain them. For others, sizes are inferred from the tensors, and heads and clip size
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
    if kind is VideoMAE and "decoder_width" not in options:
        raise UserError(f"{path} is not a pre-training checkpoint, with its decoder")
    if kind is not VideoMAE and "classes" not in options:
        raise UserError(f"{path} is not a fine-tuned checkpoint, with its classes")
    model = kind(**options)
    if hasattr(model, "fc_norm") and "fc_norm.weight" not in read_checkpoint(path)[0]:
        what = "its head sees the first token (transformers' use_mean_pooling=False) or detects actions"
        raise UserError(f"{path} has no fc_norm, so {what}: only init= and tools.extract_features can use it")
    load_weights(model, path)
    return model


# ---- what configurations need to know of weights ----


def stored_config(path: str | Path, default: Path, settings: list[str]) -> SimpleNamespace:
    """Return the configuration for weights: a .yaml file in `settings`, else the checkpoint's, else Kinetics' recipe.

    default: the stage's default file. Kinetics' recipe is the k400_base.yaml next to it, with the clip size of the
    file's config.json and its cube, if there is one.
    """
    content = read_checkpoint(path)[1]
    recipe = [str(default.with_name("k400_base.yaml"))]
    if content["clip_size"]:
        frames, size, _ = content["clip_size"]
        recipe += [f"data.frames={frames}", f"data.size={size}", f"model.cube={read_options(path)['cube']}"]
    return load_config(default, settings, content.get("config") or as_dict(load_config(default, recipe)))


def encoder_options(config: SimpleNamespace, init: str) -> dict[str, Any]:
    """Return arguments of `Encoder`: the model's size, and the clip size of the pre-training of the weights `init`."""
    check_init(init, "scratch")
    clip_size = [config.data.frames, config.data.size, config.data.size]
    if init != "scratch":
        clip_size = read_checkpoint(init)[1]["clip_size"] or config.model.pretrained_clip
    return encoder_size(config.model.size) | dict(clip_size=clip_size, cube=config.model.cube)


def check_init(init: str, *keywords: str) -> None:
    """Raise UserError unless `init` is a file of weights or one of the keywords."""
    if init not in keywords and not weights_file(init).is_file():
        start = f", name another file, or start with init={keywords[0]}" if keywords else ", or name another file"
        raise UserError(f"no weights at init={init}: make them with pretrain.py{start}")
