"""Linear probing: what a linear classifier can read from a frozen pre-trained encoder (Table 11, Table 3).

    laptop:   torchrun probe.py                        # toy videos, from the encoder that `torchrun pretrain.py` leaves
    8 GPUs:   torchrun --nproc_per_node=8 probe.py configs/probe/ssv2_base.yaml data.root=/data/ssv2 init=pretrained.pt

Encoders with random weights can be probed next to it, on the same clips.
The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import hashlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
from finetune import test_and_write
from model import Encoder, cube_grid, initialize
from support import toy
from support.checkpoint import check_length, describe, load_checkpoint, save_checkpoint
from support.config import UserError, load_config, parse, pick, say
from support.datasets import labelled_videos
from support.processes import StopSignals, average, compiler, launch, start_processes
from support.run import Log, count_steps, finetune_command, split_batch, warmup_cosine
from support.weights import check_init, encoder_options, load_weights

DEFAULT = Path(__file__).parent / "configs" / "probe" / "toy.yaml"


class LinearProbe(nn.Module):
    """A frozen encoder with its last norm, the mean over its tokens, and a linear layer, which alone learns.

    Table 11 says nothing about the model. batch_norm: before the linear layer, without parameters, as in MAE's linear
    probing; the statistics are those of a process's micro-batch.
    """

    def __init__(self, *, classes: int, batch_norm: bool = False, **encoder: Any) -> None:
        super().__init__()
        self.encoder = Encoder(**encoder).requires_grad_(False)
        self.options = self.encoder.options | dict(classes=classes)
        width = self.options["width"]
        self.head = nn.Linear(width, classes)
        if batch_norm:
            self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), self.head)
        self.train()

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()  # also while the head is in training
        return self

    def features(self, clip: Tensor) -> Tensor:
        """Turn normalized clips (B, 3, T, H, W) into features (B, D)."""
        with torch.no_grad():
            return self.encoder(clip).mean(dim=1)  # (B, N, D) to (B, D)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(self.features(clip))  # (B, classes)


def build(config: SimpleNamespace, classes: int) -> dict[str, LinearProbe]:
    """Return the probes to train side by side: of the pre-trained encoder and, if wanted, of two random ones.

    Their weights are PyTorch's ("random") and those with which VideoMAE's pre-training starts ("initial").
    """
    probes = {}
    names = ["pre-trained", "random", "initial"] if config.model.against_random else ["pre-trained"]
    for name in names:
        torch.manual_seed(config.run.seed)  # all heads start alike
        encoder = encoder_options(config, config.init)
        probes[name] = LinearProbe(**encoder, classes=classes, batch_norm=config.model.batch_norm)
    load_weights(probes["pre-trained"], config.init, fresh=("head.",))
    if config.model.against_random:
        initialize(probes["initial"].encoder.blocks, nn.init.xavier_uniform_)
    return probes


def digest_of(encoder: Encoder) -> str:
    """Return a digest of an encoder's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in [*encoder.parameters(), encoder.pos_embed]:
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def train(config: SimpleNamespace) -> None:
    """Probe as `config` says (Table 11), or resume; test at the end."""
    check_init(config.init)
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    pick(data.SAMPLING, config.data.sampling, "data.sampling")
    processes = start_processes(config.run.precision, config.data.workers)
    world_size, device = processes.world_size, processes.device
    compiled = compiler(config.run.compile, device)
    folder = Path(config.run.folder)
    splits = toy.find(config.data)  # the toy videos if there is no data.root
    videos, val_videos, names = labelled_videos(*splits, config.data.per_class)
    probes = nn.ModuleDict(build(config, len(names))).to(device)
    heads = nn.ModuleDict({name: probe.head for name, probe in probes.items()})
    crop = partial(data.resized_multi_scale_crop, size=config.data.size, scales=config.data.scales, flip=False)
    clips = data.LabelledClips(videos, config.run.seed, data_config=config.data, augment=crop)
    clips[0, 0]  # raises UserError if no video can be read

    # batch = processes x accumulation x micro-batch, counted in videos
    batch = config.optim.batch_size
    micro_batch, accumulation = split_batch(len(videos), batch, world_size, config.run.batch_per_device)
    if micro_batch == 1 and config.model.batch_norm:
        what = "model.batch_norm needs two videos at a time"
        raise UserError(f"{what}: raise run.batch_per_device and optim.batch_size, or set model.batch_norm=false")
    steps_per_epoch = len(videos) // batch
    total, warmup = count_steps(config.optim, steps_per_epoch)
    peak_lr = config.optim.base_lr * batch / 256

    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0, momentum=config.optim.momentum)  # no weight decay
    start = 0
    identity = dict(videos=describe(videos), classes=names, encoder=digest_of(probes["pre-trained"].encoder))
    if checkpoint := load_checkpoint(config, DEFAULT, **identity):
        heads.load_state_dict(checkpoint["heads"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
        check_length(checkpoint, config, steps_per_epoch)
    say(
        f"{folder}: linear probes of ViT-{config.model.size}, {' and '.join(probes)}\n"
        f"{len(videos):,} videos for training, {len(val_videos):,} for the test, {len(names)} classes\n"
        f"peak learning rate {config.optim.base_lr:g} x {batch} / 256 = {peak_lr:.4g}"
    )
    log = Log(config, processes, start, total, steps_per_epoch, clips_per_step=batch)
    features = {name: compiled(probe.features) for name, probe in probes.items()}
    networks = dict(heads)
    if world_size > 1:
        networks = {name: DistributedDataParallel(head, gradient_as_bucket_view=True) for name, head in heads.items()}
    sampler = data.MicroBatchSampler(len(videos), batch, micro_batch, range(start, total), processes, config.run.seed)
    batches = data.Batches(clips, sampler, config.data.workers, folder)

    loss_sum = torch.zeros((), device=device)
    with StopSignals() as stop:
        for step in log.progress(range(start, total)):
            lr = warmup_cosine(step, total, warmup, peak_lr, 0.0)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for number in range(accumulation):
                frames, labels = (x.to(device, non_blocking=True) for x in next(batches))  # (B, 1, T, 3, H, W), (B,)
                clip = data.normalize(frames.squeeze(1))  # (B, 3, T, H, W)
                # gradients are averaged over the processes in the last backward pass of the step
                last = number == accumulation - 1
                for name, network in networks.items():
                    with processes.autocast():
                        latent = features[name](clip).float()  # (B, D)
                    # the linear layer computes in float32, so that float16 needs no GradScaler here
                    with nullcontext() if last or world_size == 1 else network.no_sync():
                        loss = F.cross_entropy(network(latent), labels)
                        (loss / accumulation).backward()
                    if name == "pre-trained":  # its loss is in the log
                        loss_sum += loss.detach()
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            if done % config.run.log_every == 0 or done == total:
                mean_loss = average(loss_sum) / ((done - log.step) * accumulation)  # since the last line
                log.write_step(done, mean_loss.item(), batches.waited, lr=lr)
                loss_sum.zero_()
            stopped = stop.requested()
            kept = log.epoch_ends(done, config.run.keep_every)
            if stopped or done % config.run.checkpoint_every == 0 or kept or done == total:
                state = dict(heads=heads.state_dict(), optimizer=optimizer.state_dict(), step=done)
                save_checkpoint(log, config, **state, **identity)
            if stopped and done < total:
                raise UserError(f"stopped by {stopped} after step {done}: the same command resumes there")

        if world_size > 1:
            for buffer in heads.buffers():  # of batch norm: all processes test with rank 0's, as in the checkpoint
                dist.broadcast(buffer, 0)
        results = []
        with stop.at_once():
            for name, probe in probes.items():
                say(f"{name} encoder:")
                top1 = test_and_write(probe, val_videos, names, processes, config, folder / name)
                log.write(step=total, encoder=name, test_top1=top1)
                results.append(f"{top1:.2f} % ({name} encoder)")
    log.draw()
    files = "scores.csv and classes.csv of each encoder, accuracy.png"
    say(f"{folder}: top-1 {' and '.join(results)}: {files}. Next: {finetune_command(config, config.init)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train(load_config(DEFAULT, parse(parser, DEFAULT).settings))


if __name__ == "__main__":
    launch(main)
