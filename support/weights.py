"""Weights in and out: this project's, official, mmaction2's, Hugging Face's and those of image models.

python -m support.weights CHECKPOINT FOLDER    # a pre-trained or fine-tuned model as a folder for transformers
"""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from masking import Grid
from model import SIZES, VideoClassifier, VideoMAE, cube_grid, encoder_size, interpolate_positions, sincos_positions
from support.checkpoint import load_checkpoint
from support.config import UserError, as_dict, load_config, say
from support.processes import launch

# Where a file's tensors may be.
KEYS = ("model", "module", "state_dict", "model_state_dict", "model_state", "model_ema")
# Parameters have the official names. These are other projects' names for their parts:
HUGGING_FACE = {  # in both directions
    "embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
    "embeddings.position_embeddings": "encoder.pos_embed",
    "position_embeddings": "pos_embed",
    "encoder.layer.": "encoder.blocks.",
    "layernorm.": "encoder.norm.",
    "decoder.decoder_layers.": "decoder.blocks.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.output.dense.": ".attn.proj.",
    ".attention.attention.": ".attn.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
}
NAMES = {  # regular expressions, for reading, replaced one after the other
    r"\b(module|_orig_mod|model|backbone|videomae)\.": "",
    **{re.escape(theirs): ours for theirs, ours in HUGGING_FACE.items()},
    r"^(classifier|cls_head\.fc_cls|roi_heads?(\.\w+)*)\.(weight|bias)$": r"head.\3",  # also official detection
    r"\.attn\.(q|v)(uery|alue)\.bias$": r".attn.\1_bias",  # transformers 5
    r"\bpatch_embed\.projection\.": "patch_embed.proj.",  # mmaction2, also the next two
    r"\.mlp\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.mlp\.layers\.1\.": ".mlp.fc2.",
    r"^(?=patch_embed\.|blocks\.|norm\.)": "encoder.",  # official fine-tuning, image models
    r"^encoder\.(?=head\.|fc_norm\.)": "",
}
# A model without such a part leaves it unused. Anything else that is left over is a mistake.
PARTS = "encoder.norm. fc_norm. encoder_to_decoder. mask_token decoder pos_embed cls_token pre_logits.".split()
PARTS += ["projector.", "predictor."]  # of baselines/moco_v3.py
# Official checkpoints contain their command line and numpy's scalars, whose module numpy 2 renamed: values, no code.
SAFE = [argparse.Namespace, np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64"))]
SAFE += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def weights_file(path: str | Path) -> Path:
    """The file of weights in `path` if that is a run's folder or one of Hugging Face, otherwise `path` itself."""
    files = (Path(path) / name for name in ("checkpoint.pt", "model.safetensors", "pytorch_model.bin"))
    return next((file for file in files if file.is_file()), Path(path))


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file, or of the one in a folder, under this project's names; and all that the file holds.

    Reads this project's, official, mmaction2 and Hugging Face checkpoints, `.safetensors` if that package is installed.
    Never runs code from a file. Reading again costs little: tensors stay in the file until they are used.
    Two keys are added: "config.json", Hugging Face's next to the file, or {}; "clip_size", frames, height and width
    that the model was trained on, if file or config.json say so, or None. Raises UserError.
    """
    path = weights_file(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; give the path of a checkpoint file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals(SAFE):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        described = path.with_name("config.json")
        hub = json.loads(described.read_text("utf-8-sig")) if described.is_file() else {}
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:  # many types for one mistake
        reason = f"it or its config.json is another kind of file, cut off, or would run code ({type(error).__name__})"
        raise UserError(f"{path} is not a checkpoint that can be read safely (weights_only): {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a model's named tensors")
    if "heads" in content:  # a linear probe's checkpoint: its encoder is that of its `init`
        return read_checkpoint(content["config"]["init"])
    state = content
    while inner := next((state[key] for key in KEYS if isinstance(state.get(key), dict)), None):
        state = inner
    state = {str(key): value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors under {', '.join(map(repr, KEYS))} or its top level")
    state = _to_own_names(state)
    if isinstance(content.get("positions"), Tensor):  # in this project's files
        state["encoder.pos_embed"] = content["positions"]
    size = [hub["num_frames"], *np.broadcast_to(hub["image_size"], 2).tolist()] if "num_frames" in hub else None
    size = content.get("model_options", {}).get("clip_size", size)
    return state, content | {"config.json": hub, "clip_size": size}


def _to_own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {}
    for key, value in state.items():
        for theirs, ours in NAMES.items():
            key = re.sub(theirs, ours, key)
        own[key] = value
    for query in [key for key in own if key.endswith(".attn.query.weight")]:  # Hugging Face has three matrices
        three = [query.replace("query", name) for name in ("query", "key", "value")]
        if all(key in own for key in three):
            own[query.replace("query", "qkv")] = torch.cat([own.pop(key) for key in three])  # (3 D, D)
    if "pos_embed" in own and "encoder_to_decoder.weight" not in own:  # otherwise it is the decoder's
        own["encoder.pos_embed"] = own.pop("pos_embed")
    return own


def load_weights(model: nn.Module, path: str | Path, fresh: tuple[str, ...] = ()) -> None:
    """Load any file that `read_checkpoint` reads into any of this project's models.

    Each parameter has to be found, with its shape, unless its name starts with one of `fresh`: those keep their initial
    values. Each tensor has to be used, unless it is of a part that the model lacks, such as the decoder. Both are
    reported. Image models, named as in timm and facebookresearch/mae, are inflated (Table 1e).
    """
    state, content = read_checkpoint(path)
    own = model.state_dict() | dict(model.named_buffers())  # with the position tables
    encoder = model.encoder
    kernel = state.get("encoder.patch_embed.proj.weight", encoder.patch_embed.proj.weight)
    if kernel.ndim == 4:
        say(f"{path}: weights of an image model, inflated to cubes")
        state = inflate(state, encoder.patch_embed.cube[0], encoder.grid)
    # Positions belong to the clips of the training: those that the file names, else those that the model is built for.
    grid = cube_grid(content["clip_size"], kernel.shape[2:]) if content["clip_size"] else encoder.grid
    for key in [key for key in own if key.endswith("pos_embed")]:
        table = state.get(key, sincos_positions(math.prod(grid), own[key].shape[1]))
        table = table.float().reshape(-1, table.shape[-1])  # (N, D)
        state[key] = interpolate_positions(table, grid, encoder.grid) if len(table) == math.prod(grid) else table

    used = [key for key in own if key in state and own[key].shape == state[key].shape]
    initial, unused = sorted(own.keys() - used), sorted(state.keys() - own.keys())
    lacking = tuple(part for part in PARTS if not any(key.startswith(part) for key in own))
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    misfits = [key for key in initial if not key.startswith(fresh)]
    wrong = [f"{key} is {shapes.get(key, 'missing')}, the model's {tuple(own[key].shape)}" for key in misfits]
    wrong += [f"{key} is left over" for key in unused if not key.startswith(lacking)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        what = f"this {type(model).__name__} (another model size, model.pretrained_clip or stage?)"
        raise UserError(f"{path} does not fit {what}: {'; '.join(wrong[:3])}{more}")
    for key in used:
        own[key].copy_(state[key])
    for what, keys in (("not in the file, start fresh", initial), ("left over, not used", unused)):
        if keys:
            say(f"{path}: {what}: {', '.join(sorted({'.'.join(key.split('.')[:2]) for key in keys}))}")


def inflate(state: dict[str, Tensor], frames: int, grid: Grid) -> dict[str, Tensor]:
    """An image ViT's weights as a video model's, as in I3D, with a position table (N, D) for a grid of cubes.

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
    """The arguments of the `VideoMAE` or `VideoClassifier` that a checkpoint holds. Raises UserError.

    This project's checkpoints contain them. For others, sizes are those of the tensors, heads and clip size those of a
    config.json. Without one, the number of heads is that of `SIZES` for this width, `clip_size` the caller's.
    """
    state, content = read_checkpoint(path)
    if "model_options" in content:
        return content["model_options"]
    if "encoder.patch_embed.proj.weight" not in state:
        raise UserError(f"{path} has no encoder.patch_embed.proj.weight: it is no checkpoint of a VideoMAE model")
    width, _, *cube = state["encoder.patch_embed.proj.weight"].shape
    heads = {size["width"]: (size["heads"], size["decoder_heads"]) for size in SIZES.values()}
    hub = content["config.json"]
    if "num_attention_heads" in hub and (width, hub["num_attention_heads"]) != (384, 16):  # the hub's ViT-S have 6
        heads[width] = hub["num_attention_heads"], hub.get("decoder_num_attention_heads")
    if width not in heads:
        raise UserError(f"{path} has an encoder of width {width}; known are {', '.join(map(str, heads))}")
    blocks = {tuple(key.split(".")[:3]) for key in state if ".blocks." in key}
    depth = Counter(part for part, _, _ in blocks)
    options = dict(width=width, depth=depth["encoder"], heads=heads[width][0], cube=cube)
    options |= dict(clip_size=list(content["clip_size"] or clip_size))
    if "decoder.head.weight" in state:
        frames = len(state["decoder.head.weight"]) // (3 * math.prod(cube[1:]))
        options |= dict(decoder_width=state["mask_token"].shape[2], decoder_depth=depth["decoder"])
        options |= dict(decoder_heads=heads[width][1], frames_per_token=frames)
    elif "head.weight" in state:
        options |= dict(classes=len(state["head.weight"]))
    return options


def build_from_checkpoint(
    path: str | Path, kind: type[nn.Module] = VideoMAE, clip_size: tuple[int, int, int] = (16, 224, 224)
) -> Any:
    """A model of this kind with the weights of a checkpoint; for `clip_size` see `read_options`. Raises UserError."""
    options = read_options(path, clip_size)
    if kind is VideoMAE and "decoder_width" not in options:
        raise UserError(f"{path} is not a pre-training checkpoint, with its decoder")
    if kind is not VideoMAE and "classes" not in options:
        raise UserError(f"{path} is not a fine-tuned checkpoint, with its classes")
    model = kind(**options)
    load_weights(model, path)
    return model


def stored_config(path: str | Path, default: Path, settings: list[str]) -> SimpleNamespace:
    """The configuration for weights: a .yaml file in `settings`, else the checkpoint's own, else Kinetics' recipe.

    default: the stage's default file, next to its k400_base.yaml. That recipe takes clip and cube of a config.json.
    """
    content = read_checkpoint(path)[1]
    recipe = [str(default.with_name("k400_base.yaml"))]
    if content["clip_size"]:
        (frames, size, _), cube = content["clip_size"], read_options(path)["cube"]
        recipe += [f"data.frames={frames}", f"data.size={size}", f"model.cube={cube}"]
    return load_config(default, settings, content.get("config") or as_dict(load_config(default, recipe)))


def encoder_options(config: SimpleNamespace, init: str) -> dict[str, Any]:
    """Arguments of `Encoder`: the model's size, and the clip size that the weights `init` were trained on."""
    clip_size = [config.data.frames, config.data.size, config.data.size]
    if init != "scratch":
        clip_size = read_checkpoint(init)[1]["clip_size"] or config.model.pretrained_clip
    return encoder_size(config.model.size) | dict(clip_size=clip_size, cube=config.model.cube)


def find_init(config: SimpleNamespace, default: Path) -> str:
    """The weights that training starts from: `config.init`, a file or "scratch", or the checkpoint of a run to resume.

    So a run resumes without the file it started from. Raises UserError.
    """
    if load_checkpoint(Path(config.run.folder), config, default):
        return config.run.folder
    check_init(config.init, "scratch")
    return config.init


def check_init(init: str, *others: str) -> None:
    """UserError unless `init` is a file of weights or one of the `others`, words that the stage knows."""
    if init not in others and not weights_file(init).is_file():
        start = f", name another file, or start with init={others[0]}" if others else ", or name another file"
        raise UserError(f"no weights at init={init}: make them with pretrain.py{start}")


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `VideoMAE` or `VideoClassifier` state dict under Hugging Face's names, as in the files on its hub."""
    renamed = {}
    for key, value in state.items():
        prefix = "videomae." if key.startswith("encoder.") else ""
        key = re.sub(r"^head\.", "classifier.", key)
        for theirs, ours in HUGGING_FACE.items():
            key = key.replace(ours, theirs)
        parts = value.chunk(3) if key.endswith(".qkv.weight") else [value]
        for name, part in zip(("query", "key", "value"), parts, strict=False):
            renamed[prefix + key.replace(".qkv.", f".{name}.")] = part.clone()
    return renamed


def export_hugging_face(
    model: VideoMAE | VideoClassifier,
    folder: str | Path,
    normalize_target: bool = True,
    classes: list[str] | None = None,
) -> str:
    """Write `config.json`, `preprocessor_config.json` and the weights for transformers' `from_pretrained`.

    The weights are safetensors if that package is installed. classes: a classifier's, numbers if not given. Returns the
    name of transformers' class. Raises UserError for models that it cannot express: frames that are not square, other
    targets of Table 1c, positions that are not the computed ones.
    """
    o, table, folder = model.options, model.encoder.pos_embed, Path(folder)
    (frames, height, side), (p0, p1, p2) = o["clip_size"], o["cube"]
    computed = torch.allclose(table, sincos_positions(*table.shape), atol=1e-5)
    if height != side or p1 != p2 or o.get("frames_per_token", p0) != p0 or not computed:
        what = "square frames and cubes, the target of the paper's default and the computed position table only"
        raise UserError(f"transformers' VideoMAE knows {what}")
    pretrained = isinstance(model, VideoMAE)
    kind = "VideoMAEForPreTraining" if pretrained else "VideoMAEForVideoClassification"
    config = dict(architectures=[kind], model_type="videomae", layer_norm_eps=o["eps"], use_mean_pooling=not pretrained)
    config |= dict(image_size=height, num_frames=frames, patch_size=p1, tubelet_size=p0)
    for prefix in ("", "decoder_") if pretrained else ("",):
        width, depth, heads = (o[f"{prefix}{name}"] for name in ("width", "depth", "heads"))
        config |= {f"{prefix}hidden_size": width, f"{prefix}intermediate_size": 4 * width}
        config |= {f"{prefix}num_hidden_layers": depth, f"{prefix}num_attention_heads": heads}
    if pretrained:
        config |= dict(norm_pix_loss=normalize_target)
    else:
        names = dict(enumerate(classes or map(str, range(o["classes"]))))
        config |= dict(id2label=names, label2id={name: number for number, name in names.items()})
    processor = dict(image_processor_type="VideoMAEImageProcessor", size=dict(shortest_edge=height))
    processor |= dict(crop_size=dict(height=height, width=height))
    processor |= dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])  # the class's default is 0.5
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", config), ("preprocessor_config", processor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), "utf-8")
    state = to_hugging_face(model.state_dict())
    try:
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except ImportError:
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink(missing_ok=True)  # of an earlier export: it would be read instead
    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a pre-trained or fine-tuned model as a Hugging Face folder.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    path, folder = vars(parser.parse_args()).values()
    content, is_classifier = read_checkpoint(path)[1], "classes" in read_options(path)
    model = build_from_checkpoint(path, VideoClassifier if is_classifier else VideoMAE)
    config, labels = content.get("config", {}), content["config.json"].get("id2label", {})
    if "size" in (data := config.get("data", {})) and [data["frames"], data["size"]] != model.options["clip_size"][:2]:
        what = f"{path} was trained on clips of another size than its position table's"
        raise UserError(f"{what}: transformers' VideoMAE, which cannot interpolate the table, has no such model")
    numbers = map(str, range(model.options.get("classes", 0)))
    names = content.get("classes") or [labels.get(number, number) for number in numbers]
    what = f"a fine-tuned classifier of {len(names)} classes" if is_classifier else "a pre-trained model"
    kind = export_hugging_face(model, folder, config.get("target", {}).get("normalize", True), names)
    print(f"{path} is {what}\nwrote {folder}: transformers.{kind}.from_pretrained('{folder}')")


if __name__ == "__main__":
    launch(main)
