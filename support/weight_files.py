"""Read files of weights: this project's, official, mmaction2's, Hugging Face's and those of image models."""

import argparse
import json
import re
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor

from support.config import UserError

# Keys under which a file may keep its tensors.
KEYS = ("model", "module", "state_dict", "model_state_dict", "model_state", "model_ema")
# Parameters have the official repository's names. DistributedDataParallel, torch.compile and others add these to them.
WRAPPERS = {"module", "_orig_mod", "model", "backbone", "videomae"}

# Parts of other projects' names, in the order in which they are replaced, and the official ones.
HUGGING_FACE = {  # also used in the other direction, by tools/export_hugging_face.py
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
TRANSFORMERS_5 = {".attn.query.bias": ".attn.q_bias", ".attn.value.bias": ".attn.v_bias"}  # after HUGGING_FACE
MMACTION2 = {
    "patch_embed.projection.": "patch_embed.proj.",
    ".mlp.layers.0.0.": ".mlp.fc1.",
    ".mlp.layers.1.": ".mlp.fc2.",
}
HEADS = re.compile(
    r"classifier"  # Hugging Face
    r"|cls_head\.fc_cls"  # mmaction2
    r"|roi_heads?\..+"  # action detection, official and mmaction2
)
# Official checkpoints contain their command line and numpy's scalars, whose module numpy 2 renamed: values, no code.
SAFE = [argparse.Namespace, np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64"))]
SAFE += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def weights_file(path: str | Path) -> Path:
    """Return the file of weights in `path` if that is a run's folder or one of Hugging Face, otherwise `path`."""
    for name in ("checkpoint.pt", "model.safetensors", "pytorch_model.bin"):
        if Path(path, name).is_file():
            return Path(path, name)
    return Path(path)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of a file, or of the one in a folder, under this project's names, and all that the file holds.

    Tensors of .pt, .pth and .bin files are mapped: they stay in the file until they are used. Code in a file never
    runs. Two keys are added to what the file holds: "config.json", the contents of Hugging Face's file next to it or
    {}; "clip_size", the frames, height and width that the model was pre-trained on if one of the two says so, or None.
    Raises UserError.
    """
    path = weights_file(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; give the path of a checkpoint file")
    try:
        content, hub = _load(path), {}
        if path.with_name("config.json").is_file():
            hub = json.loads(path.with_name("config.json").read_text("utf-8-sig"))
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
    state = rename(state)
    if isinstance(content.get("positions"), Tensor):  # in this project's files
        state["encoder.pos_embed"] = content["positions"]

    clip_size = content.get("model_options", {}).get("clip_size")
    if not clip_size and "num_frames" in hub:
        clip_size = [hub["num_frames"], *np.broadcast_to(hub["image_size"], 2).tolist()]
    return state, content | {"config.json": hub, "clip_size": clip_size}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals(SAFE):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of any source under this project's names."""
    own = {own_name(key): value for key, value in state.items()}
    for query in [key for key in own if key.endswith(".attn.query.weight")]:  # Hugging Face has three matrices
        parts = [query.replace("query", name) for name in ("query", "key", "value")]
        if all(part in own for part in parts):
            own[query.replace("query", "qkv")] = torch.cat([own.pop(part) for part in parts])  # (3 D, D)
    if "pos_embed" in own and "encoder_to_decoder.weight" not in own:  # otherwise it is the decoder's
        own["encoder.pos_embed"] = own.pop("pos_embed")
    return own


def own_name(name: str) -> str:
    """Return this project's name of a parameter."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    for table in (HUGGING_FACE, TRANSFORMERS_5, MMACTION2):
        for theirs, ours in table.items():
            name = name.replace(theirs, ours)
    module, _, parameter = name.rpartition(".")
    if HEADS.fullmatch(module):
        return f"head.{parameter}"
    if name.startswith(("patch_embed.", "blocks.", "norm.")):  # official fine-tuning and image models
        return f"encoder.{name}"
    if name.startswith(("encoder.head.", "encoder.fc_norm.")):
        return name.removeprefix("encoder.")
    return name
