"""Write a pre-trained or fine-tuned model as a folder for transformers' `from_pretrained` (docs/weights.md).

python -m tools.export_hugging_face runs/finetune/toy/checkpoint.pt exported/
"""

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from data import MEAN, STD
from model import VideoClassifier, VideoMAE, sincos_positions
from support.config import UserError
from support.processes import launch
from support.weight_files import HUGGING_FACE, read_checkpoint
from support.weights import build_from_checkpoint, read_options


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a `VideoMAE` or `VideoClassifier` under Hugging Face's names, as in files on its hub."""
    renamed = {}
    for name, value in state.items():
        prefix = "videomae." if name.startswith("encoder.") else ""
        name = re.sub(r"^head\.", "classifier.", name)
        for theirs, ours in HUGGING_FACE.items():
            name = name.replace(ours, theirs)
        if name.endswith(".qkv.weight"):
            for part, matrix in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[prefix + name.replace(".qkv.", f".{part}.")] = matrix.clone()
        else:
            renamed[prefix + name] = value.clone()
    return renamed


def describe(model: VideoMAE | VideoClassifier, normalize_target: bool, classes: list[str]) -> dict:
    """Return the contents of config.json. UserError for models that transformers cannot express."""
    options, pretrained = model.options, isinstance(model, VideoMAE)
    (frames, height, width), (p0, p1, p2) = options["clip_size"], options["cube"]
    computed = torch.allclose(table := model.encoder.pos_embed, sincos_positions(*table.shape), atol=1e-5)
    if height != width or p1 != p2 or options.get("frames_per_token", p0) != p0 or not computed:
        raise UserError("transformers has only square frames and cubes, the default target and computed positions")
    config = dict(model_type="videomae", layer_norm_eps=options["eps"], use_mean_pooling=not pretrained)
    config |= dict(num_frames=frames, image_size=height, tubelet_size=p0, patch_size=p1)
    for prefix in ("", "decoder_") if pretrained else ("",):
        config[f"{prefix}hidden_size"] = options[f"{prefix}width"]
        config[f"{prefix}intermediate_size"] = 4 * options[f"{prefix}width"]
        config[f"{prefix}num_hidden_layers"] = options[f"{prefix}depth"]
        config[f"{prefix}num_attention_heads"] = options[f"{prefix}heads"]
    if pretrained:
        return config | dict(architectures=["VideoMAEForPreTraining"], norm_pix_loss=normalize_target)
    config["id2label"] = dict(enumerate(classes))
    config["label2id"] = {name: number for number, name in enumerate(classes)}
    return config | dict(architectures=["VideoMAEForVideoClassification"])


def export(model: VideoMAE | VideoClassifier, folder: Path, normalize_target: bool, classes: list[str]) -> str:
    """Write the folder and return the name of transformers' class. classes: names of a classifier's."""
    config = describe(model, normalize_target, classes)
    size = config["image_size"]
    processor = dict(size=dict(shortest_edge=size), crop_size=dict(height=size, width=size))
    processor |= dict(image_processor_type="VideoMAEImageProcessor", image_mean=MEAN, image_std=STD)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), "utf-8")
    state = to_hugging_face(model.state_dict())
    try:
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except ImportError:
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink(missing_ok=True)  # of an earlier export: it would be read instead
    return config["architectures"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="pre-trained or fine-tuned, of any source that --weights reads")
    parser.add_argument("folder", type=Path)
    path, folder = vars(parser.parse_args()).values()
    content = read_checkpoint(path)[1]
    model = build_from_checkpoint(path, VideoClassifier if "classes" in read_options(path) else VideoMAE)
    config = content.get("config", {})
    data = config.get("data", {})
    if "size" in data and [data["frames"], data["size"]] != model.options["clip_size"][:2]:
        what = f"{path} was trained on clips of another size than its position table's"
        raise UserError(f"{what}: transformers' VideoMAE, which cannot interpolate the table, has no such model")
    labels = content["config.json"].get("id2label", {})
    numbers = [str(number) for number in range(model.options.get("classes", 0))]
    names = content.get("classes") or [labels.get(number, number) for number in numbers]
    kind = export(model, folder, config.get("target", {}).get("normalize", True), names)
    what = f"a fine-tuned classifier of {len(names)} classes" if names else "a pre-trained model"
    print(f"{path} is {what}\nwrote {folder}: transformers.{kind}.from_pretrained('{folder}')")


if __name__ == "__main__":
    launch(main)
