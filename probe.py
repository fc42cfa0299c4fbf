"""Linear probing: what a linear classifier can read from a frozen pre-trained encoder (Table 11, Table 3).

    laptop:   torchrun probe.py                        # toy videos, from the encoder that `torchrun pretrain.py` leaves
    8 GPUs:   torchrun --nproc_per_node=8 probe.py configs/probe/ssv2_base.yaml data.root=/data/ssv2 init=pretrained.pt
    features: python probe.py --features VIDEO... --weights FILE --out FOLDER      # see docs/features.md

An encoder with random weights, PyTorch's own initialization, can be probed next to it, on the same clips.
The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import data
from finetune import test_and_write
from model import Encoder, VideoClassifier, cube_grid
from support import toy
from support.config import UserError, as_dict, flatten, load_config, parse, pick, say
from support.datasets import labelled_videos
from support.features import KEEP, extract
from support.processes import launch
from support.run import Run, warmup_cosine
from support.weights import check_init, encoder_options, load_weights, read_checkpoint, read_options, stored_config

DEFAULT = Path(__file__).parent / "configs" / "probe" / "toy.yaml"


class LinearProbe(nn.Module):
    """A frozen encoder with its last norm, the mean over its tokens, and a linear layer, which alone learns.

    Table 11 says no more about the model; here there is no batch norm before the linear layer.
    """

    def __init__(self, *, classes: int, **encoder: Any) -> None:
        super().__init__()
        self.encoder = Encoder(**encoder).requires_grad_(False)
        self.options = self.encoder.options | dict(classes=classes)
        self.head = nn.Linear(self.options["width"], classes)
        self.train()

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()  # also while the head is in training
        return self

    def features(self, clip: Tensor) -> Tensor:
        """clip (B, 3, T, H, W), normalized, to (B, D)."""
        with torch.no_grad():
            return self.encoder(clip).mean(dim=1)  # (B, N, D) to (B, D)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.features(clip))  # (B, classes)


def build(config: SimpleNamespace, classes: int) -> dict[str, LinearProbe]:
    """The probes to train side by side: of the pre-trained encoder and, if wanted, of a random one."""
    probes = {}
    for name in ["pre-trained", "random"] if config.model.against_random else ["pre-trained"]:
        torch.manual_seed(config.run.seed)
        probes[name] = LinearProbe(**encoder_options(config, config.init), classes=classes)
    load_weights(probes["pre-trained"], config.init, fresh=("head.",))
    return probes


def train(config: SimpleNamespace) -> None:
    """Probe as `config` says (Table 11), or resume; test at the end."""
    check_init(config.init)
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    pick(data.SAMPLING, config.data.sampling, "data.sampling")
    run = Run(config, DEFAULT)
    videos, val_videos, names = labelled_videos(*toy.find(config.data), config.data.per_class)
    probes = nn.ModuleDict(build(config, len(names))).to(run.device)
    heads = nn.ModuleDict({name: probe.head for name, probe in probes.items()})
    crop = partial(data.resized_multi_scale_crop, size=config.data.size, scales=config.data.scales, flip=False)
    clips = data.LabelledClips(videos, config.run.seed, data_config=config.data, augment=crop)
    clips[0, 0]  # stops here if no video can be read
    run.plan(videos, config.optim.batch_size)

    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0, momentum=config.optim.momentum)  # no weight decay
    say(
        f"{run.folder}: linear probes of ViT-{config.model.size}, {' and '.join(probes)}\n"
        f"{len(videos):,} videos for training, {len(val_videos):,} for testing, {len(names)} classes"
    )
    run.open(dict(heads=heads, optimizer=optimizer), classes=names)
    features = {name: run.compile(probe.features) for name, probe in probes.items()}
    networks = {name: run.parallel(head) for name, head in heads.items()}
    batches = data.training_batches(clips, run)
    peak_lr = config.optim.base_lr * config.optim.batch_size / 256

    for step in run.steps():
        lr = warmup_cosine(step, run.total, run.warmup, peak_lr, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for frames, labels in run.micro_batches(batches):  # (B, 1, T, 3, H, W), (B,)
            clip = data.normalize(frames.squeeze(1))  # (B, 3, T, H, W)
            for name in probes:
                with run.autocast():
                    latent = features[name](clip).float()  # (B, D)
                loss = F.cross_entropy(networks[name](latent), labels)
                (loss / run.accumulation).backward()
                if name == "pre-trained":
                    run.add_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(lr=lr)

    for name, probe in probes.items():
        say(f"{name} encoder:")
        top1 = test_and_write(probe, val_videos, names, run, run.folder / name)
        run.log(step=run.total, encoder=name, test_top1=top1)


# ---- features of long videos ----


def frozen(weights: Path, config: SimpleNamespace) -> tuple[Encoder, nn.Module]:
    """The encoder of any weights, with its last norm, or without one but with the `fc_norm` of fine-tuned weights."""
    state, options = read_checkpoint(weights)[0], read_options(weights, config.model.pretrained_clip)
    sizes = {key: options[key] for key in ("width", "depth", "heads", "clip_size", "eps") if key in options}
    kind = VideoClassifier if "fc_norm.weight" in state else LinearProbe
    model = kind(**sizes, cube=config.model.cube, classes=options.get("classes", 1))
    model.head = model.head if "head.weight" in state else nn.Identity()
    load_weights(model, weights, fresh=("head.",))
    return model.encoder.eval(), getattr(model, "fc_norm", nn.Identity())


def features_of_videos(arguments: argparse.Namespace) -> None:
    """`--features`: what the frozen encoder of any weights makes of long videos, see support/features.py."""
    weights, overrides = arguments.weights, arguments.settings
    trained = flatten(read_checkpoint(weights)[1].get("config", {}))  # in any stage
    stored = {key: trained.get(key, value) for key, value in flatten(as_dict(load_config(DEFAULT, []))).items()}
    config = load_config(DEFAULT, overrides, stored) if trained else stored_config(weights, DEFAULT, overrides)
    if "RANK" in os.environ:  # a process may wait for another's last video for longer than the default allows
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    extract(arguments, Run(config, DEFAULT), *frozen(weights, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--features", nargs="+", type=Path, metavar="VIDEO", help="write features of videos, folders or lists")
    add("--weights", type=Path, help="pre-trained or fine-tuned, of this project or others, see docs/weights.md")
    add("--out", type=Path, help="folder for the features, one .npz file for each video")
    add("--window-stride", type=int, help="frames from window to window; default: data.frames x data.stride")
    add("--keep", choices=KEEP, default="mean", help="of a window's tokens: the mean, the mean over space, or all")
    add("--last", choices=("repeat", "drop"), default="repeat", help="what to do if the last window is not full")
    arguments = parse(parser)
    given = {name for name, value in vars(arguments).items() if value != parser.get_default(name)} - {"settings"}
    if not given:
        train(load_config(DEFAULT, arguments.settings))
    elif not {"features", "weights", "out"} <= given:
        raise UserError("--features VIDEO..., --weights FILE and --out FOLDER go together; training takes init=FILE")
    elif arguments.window_stride is not None and arguments.window_stride < 1:
        raise UserError(f"--window-stride {arguments.window_stride} has to be at least 1")
    else:
        features_of_videos(arguments)


if __name__ == "__main__":
    launch(main)
