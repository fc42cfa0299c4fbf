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

# Files of weights in the folder of a run, of Hugging Face and of DeepSpeed.
FILES = "checkpoint.pt model.safetensors model.safetensors.index.json".split()
FILES += "pytorch_model.bin pytorch_model.bin.index.json mp_rank_00_model_states.pt".split()
# Keys under which a file may keep its tensors.
KEYS = ("model", "module", "state_dict", "model_state_dict", "model_state", "model_ema")
# Parameters have the official repository's names. DistributedDataParallel, torch.compile and others add these parts.
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
OTHERS = {".attn.query.bias": ".attn.q_bias", ".attn.value.bias": ".attn.v_bias"}  # transformers 5
OTHERS |= {".mlp.layers.0.0.": ".mlp.fc1.", ".mlp.layers.1.": ".mlp.fc2."}  # mmaction2
OTHERS["patch_embed.projection."] = "patch_embed.proj."  # mmaction2
HEADS = re.compile(r"classifier|cls_head\.fc_cls|roi_heads?\..+")  # Hugging Face, mmaction2, action detection
# Official checkpoints contain their command line and numpy's scalars, whose module numpy 2 renamed: values, no code.
SAFE = [argparse.Namespace, np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64"))]
SAFE += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def weights_file(path: str | Path) -> Path:
    """Return the file of weights in a folder, the index of one that transformers has split, or `path` itself."""
    path = Path(path)
    index = path.parent / (re.sub(r"-\d+-of-\d+\.", ".", path.name) + ".index.json")
    if index.is_file():
        return index
    if (path / "latest").is_file():  # DeepSpeed's: the name of the folder of the last checkpoint
        path = path / (path / "latest").read_text().strip()
    for name in FILES:
        if (path / name).is_file():
            return path / name
    return path


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of a file, or of the one in a folder, under this project's names, and all that the file holds.

    Tensors stay in the file until they are used. Code in a file never runs. Three keys are added to what the file
    holds: "config.json", the contents of Hugging Face's file next to it, or {}; "clip_size", the frames, height and
    width of the pre-training if one of the two says so, or None; "unused", what is not used of both. Raises UserError.
    """
    path = weights_file(path)
    content = _load(path)
    if "heads" in content:  # a linear probe's checkpoint: its encoder is that of its `init`
        return read_checkpoint(content["config"]["init"])
    state = content
    while inner := next((key for key in KEYS if isinstance(state.get(key), dict)), None):
        state = state[inner]
    state = {str(key): value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no named tensors, at its top level or under {', '.join(KEYS)}")
    state = rename(state)
    for key, table in (("positions", "encoder.pos_embed"), ("decoder_positions", "pos_embed")):
        if isinstance(content.get(key), Tensor):  # in this project's files
            state[table] = content[key]

    hub_config = path.with_name("config.json")
    hub = _load(hub_config) if hub_config.is_file() else {}
    unused = ["model_ema"] if "model_ema" in content and content.keys() & set(KEYS[:-1]) else []
    if hub and not describes(hub, state):
        unused.append("config.json, which does not describe these weights,")
        hub = {}
    clip_size = content.get("model_options", {}).get("clip_size")
    if not clip_size and hub:
        clip_size = [hub["num_frames"], *np.broadcast_to(hub["image_size"], 2).tolist()]
    return state, content | {"config.json": hub, "clip_size": clip_size, "unused": unused}


def _load(path: Path) -> Any:
    """Return what a file holds; of an index, what all its files hold. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no weights at {path}; give the path of a checkpoint file")
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text("utf-8-sig"))
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals(SAFE):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:  # many types for one mistake
        reason = f"another kind of file, cut off, or would run code ({type(error).__name__})"
        raise UserError(f"{path} cannot be read safely (weights_only): it is {reason}") from None
    if path.name.endswith(".index.json"):
        names = set(content.get("weight_map", {}).values())
        content = {}
        for name in names:
            content |= _load(path.with_name(name))
    return content if isinstance(content, dict) else {}


def describes(hub: dict, state: dict[str, Tensor]) -> bool:
    """Return whether the sizes in a config.json of Hugging Face are those of the weights."""
    kernel = state.get("encoder.patch_embed.proj.weight")
    if kernel is None or not {"num_frames", "image_size"} <= set(hub):
        return False
    depth = len({key.split(".")[2] for key in state if key.startswith("encoder.blocks.")})
    cube = [hub.get("tubelet_size"), *np.broadcast_to(hub.get("patch_size"), 2)]
    if [hub.get("hidden_size"), hub.get("num_hidden_layers"), *cube] != [len(kernel), depth, *kernel.shape[2:]]:
        return False
    return not ("id2label" in hub and "head.weight" in state) or len(hub["id2label"]) == len(state["head.weight"])


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
    for theirs, ours in (HUGGING_FACE | OTHERS).items():
        name = name.replace(theirs, ours)
    module, _, parameter = name.rpartition(".")
    if HEADS.fullmatch(module):
        return f"head.{parameter}"
    if name.startswith(("patch_embed.", "blocks.", "norm.")):  # official fine-tuning and image models
        return f"encoder.{name}"
    if name.startswith(("encoder.head.", "encoder.fc_norm.")):
        return name.removeprefix("encoder.")
    return name
