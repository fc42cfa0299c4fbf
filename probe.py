"""Linear probing: how much a linear classifier reads off a frozen pre-trained encoder (Table 11, Table 3).

    laptop:   torchrun probe.py                         # toy videos, from the encoder that `torchrun pretrain.py` leaves
    8 GPUs:   torchrun --nproc_per_node=8 probe.py configs/probe/ssv2_base.yaml data.root=/data/ssv2 init=pretrained.pt

An encoder with random weights, PyTorch's own initialisation, can be probed beside it, on the same clips.
The same command again goes on from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import finetune
from model import (
    Encoder,
    cube_grid,
)
from support.config import as_dict, load_config, parse, pick
from support.run import (
    Progress,
    launch,
    numerics,
    open_folder,
    save_checkpoint,
    say,
    share_batch,
    start_processes,
    warmup_cosine,
)
from support.weights import (
    load_weights,
)

CONFIGS = Path(__file__).parent / "configs" / "probe"
DEFAULT = CONFIGS / "toy.yaml"


class LinearProbe(nn.Module):
    """A frozen encoder with its last norm, the mean over its tokens, and a linear layer, which alone learns.

    Table 11 says no more about the model; here there is no batch normalisation before the linear layer.
    """

    discards = ("encoder_to_decoder.", "mask_token", "decoder", "cls_token", "pre_logits.", "fc_norm.")  # see load_weights

    def __init__(self, *, classes: int, **encoder: Any) -> None:
        super().__init__()
        self.options = dict(encoder, classes=classes)
        self.encoder = Encoder(**encoder, eps=1e-6, norm=True).requires_grad_(False)
        self.head = nn.Linear(encoder["width"], classes)
        self.train()

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()  # also while the head is in training
        return self

    def features(self, clip: Tensor) -> Tensor:
        """clip (B, 3, T, H, W), normalised, to (B, D)."""
        with torch.no_grad():
            return self.encoder(clip).mean(dim=1)  # (B, N, D) to (B, D)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.features(clip))  # (B, classes)


def build(config: SimpleNamespace, classes: int) -> dict[str, LinearProbe]:
    """The probes to train side by side: of the pre-trained encoder and, if wanted, of a random one."""
    options = finetune.encoder_options(config)
    probes = {}
    for name in ["pre-trained", "random"] if config.model.against_random else ["pre-trained"]:
        torch.manual_seed(config.run.seed)
        probes[name] = LinearProbe(**options, classes=classes)
    load_weights(probes["pre-trained"], config.init, fresh=("head.",))
    return probes


def train(config: SimpleNamespace) -> None:
    """Run, or go on with, the experiment that `config` describes; test it at the end."""
    finetune.check_init(config.init)
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    pick(data.SAMPLING, config.data.sampling, "data.sampling")
    bf16, compiled = numerics(config.run)
    rank, world_size, device = start_processes(config.data.workers)
    videos, val_videos, names = finetune.find_videos(config, world_size)
    probes = nn.ModuleDict(build(config, len(names))).to(device)
    clips = data.LabelledClips(
        videos,
        frames=config.data.frames,
        stride=config.data.stride,
        sampling=config.data.sampling,
        augment=partial(data.resized_multi_scale_crop, size=config.data.size, scales=config.data.scales, flip=False),
        repeats=1,
        seed=config.run.seed,
    )
    clips[0, 0]  # stops here if no video can be read

    batch_size = config.optim.batch_size
    per_device, accumulation = share_batch(batch_size, len(videos), world_size, config.run.batch_per_device)
    steps_per_epoch = len(videos) // batch_size
    steps, warmup = config.optim.epochs * steps_per_epoch, config.optim.warmup_epochs * steps_per_epoch
    peak_lr = config.optim.base_lr * batch_size / 256  # Sec. B

    heads = nn.ModuleDict({name: probe.head for name, probe in probes.items()})
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0, momentum=config.optim.momentum)  # Table 11
    folder, checkpoint = open_folder(config)
    start = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        heads.load_state_dict(checkpoint["heads"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    say(
        f"{folder}: linear probes of ViT-{config.model.size}, {' and '.join(probes)}, on {world_size} x {device.type}\n"
        f"{len(videos):,} videos for training, {len(val_videos):,} for testing, {len(names)} classes\n"
        f"batch {batch_size} = {world_size} processes x {accumulation} accumulated x {per_device} videos; "
        f"learning rate {config.optim.base_lr:g} x {batch_size} / 256 = {peak_lr:.4g}\n"
        f"{steps:,} steps = {config.optim.epochs} epochs x {steps_per_epoch:,}; starting at step {start:,}"
    )

    batches = data.training_batches(clips, config.data.workers, batch_size=batch_size, per_device=per_device, start=start, steps=steps)
    features = {name: torch.compile(probe.features) if compiled else probe.features for name, probe in probes.items()}
    predict = {name: DistributedDataParallel(head) if world_size > 1 else head for name, head in heads.items()}
    progress = Progress(config.run, start, steps, batch_size, device)

    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, warmup, peak_lr, 0.0)
        for piece in range(accumulation):
            frames, labels, broken = progress.next(batches)  # (B, 1, T, 3, H, W), (B,)
            progress.report(broken)
            clip = data.normalize(frames.to(device, non_blocking=True).squeeze(1))  # (B, 3, T, H, W)
            labels = labels.to(device, non_blocking=True)
            for name in probes:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    latent = features[name](clip).float()  # (B, D)
                with predict[name].no_sync() if world_size > 1 and piece < accumulation - 1 else nullcontext():
                    loss = F.cross_entropy(predict[name](latent), labels)
                    (loss / accumulation).backward()
                if name == "pre-trained":
                    progress.add(loss)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        progress.done(done, epoch=round(done / steps_per_epoch, 4), lr=optimizer.param_groups[0]["lr"])
        if done % config.run.checkpoint_every == 0 or done == steps:
            progress.flush()
            progress.gather_broken()
            if rank == 0:
                content = dict(heads=heads.state_dict(), optimizer=optimizer.state_dict(), classes=names)
                save_checkpoint(folder / "checkpoint.pt", **content, step=done, config=as_dict(config))

    for name, probe in probes.items():
        say(f"{name} encoder:")
        top1 = finetune.test_and_write(probe, val_videos, names, config, folder / name)
        if rank == 0:
            progress.log.write(step=steps, encoder=name, test_top1=top1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train(load_config(DEFAULT, parse(parser).settings))


if __name__ == "__main__":
    launch(main)
