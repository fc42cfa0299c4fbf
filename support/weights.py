"""Weights in and out: this project's, official, mmaction2's, Hugging Face's and those of image models.

    python -m support.weights runs/pretrain/toy/checkpoint.pt exported/    # a folder that transformers' from_pretrained opens
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masking import Grid
from model import (
    SIZES,
    VideoClassifier,
    VideoMAE,
    cube_grid,
    interpolate_positions,
    sincos_positions,
)
from support.config import UserError
from support.run import (
    say,
)

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
