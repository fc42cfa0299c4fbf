"""MoCo v3 (Chen, Xie and He, ICCV 2021) on videos: the contrastive pre-training of Tables 2, 3 and 4.

    laptop:   torchrun baselines/moco_v3.py                            # toy videos, tiny model, a few minutes
    8 GPUs:   torchrun --nproc_per_node=8 baselines/moco_v3.py configs/baselines/ucf101_base.yaml data.root=/data/ucf101
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
              baselines/moco_v3.py configs/baselines/k400_base.yaml data.root=/data/k400
    next:     torchrun finetune.py init=runs/baselines/toy/checkpoint.pt run.folder=runs/finetune/toy_moco_v3

Two clips of a video are a pair; the clips of the batch's other videos are the negatives. VideoMAE's authors compare
with it (Sec. 4.3), but published no code for it; docs/differences.md says what is chosen here.
The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import sys
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository, which holds all that follows

import data
from model import Encoder, checkpoint_activations, initialize
from support import toy
from support.checkpoint import check_length, describe, load_checkpoint, save_checkpoint
from support.config import UserError, load_config, parse, say
from support.lists import list_videos
from support.processes import StopSignals, average, compiler, launch, start_processes
from support.run import Log, count_steps, finetune_command, split_batch, warmup_cosine
from support.seeds import random_below
from support.video import Video
from support.weights import encoder_options

DEFAULT = Path(__file__).parents[1] / "configs" / "baselines" / "toy.yaml"


def augmentation(config: SimpleNamespace, blur: float, solarize: float) -> nn.Sequential:
    """Return MoCo v3's augmentation of uint8 (T, 3, H, W), alike for all frames. blur, solarize: how often."""
    return nn.Sequential(
        v2.RandomResizedCrop(config.size, config.crop_area),
        v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=blur),  # the kernel ends at 3 sigma
        v2.RandomSolarize(threshold=128, p=solarize),
        v2.RandomHorizontalFlip(p=0.5 if config.flip else 0.0),
    )


@dataclass(eq=False, kw_only=True)
class TwoViews(data.TrainingVideos):
    """Two clips of a video, uint8 (2, T, 3, H, W): each with a random start and an augmentation of its own."""

    config: SimpleNamespace  # the group `data` of a configuration

    def sample(self, video: Path, generator: Generator) -> tuple[Tensor]:
        with Video(video) as opened:
            first = data.dense_clip(len(opened), self.config.frames, self.config.stride, generator)
            second = data.dense_clip(len(opened), self.config.frames, self.config.stride, generator)
            one, two = opened.frames(first + second).chunk(2)  # (T, 3, H_video, W_video)
        with torch.random.fork_rng(devices=[]):  # torchvision samples from PyTorch's global generator
            torch.manual_seed(random_below(2**62, generator))
            one = augmentation(self.config, blur=1.0, solarize=0.0)(one)  # (T, 3, H, W)
            two = augmentation(self.config, blur=0.1, solarize=0.2)(two)
        return (torch.stack([one, two]),)  # (2, T, 3, H, W)


class Average(torch.autograd.Function):
    """Averages x over all processes. Each process's loss depends on x / processes, so gradients are averaged too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return average(x)

    backward = forward


@torch.compiler.disable  # processes exchange tensors outside of compiled graphs
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance, both (width,), of the columns of x (B, width), over the clips of all processes."""
    mean = Average.apply(x.mean(dim=0))
    return mean, Average.apply((x - mean).square().mean(dim=0))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm with the statistics of all processes, on any device; torch.nn.SyncBatchNorm needs GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()  # (B, width)
        mean, variance = moments(x)
        x = (x - mean) * (variance + self.eps).rsqrt()
        return x * self.weight + self.bias if self.affine else x


def contrastive_loss(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Return MoCo v3's Eq. 1, InfoNCE, times 2 tau, for q and k (B, dim). Negatives are the keys of all processes."""
    q = F.normalize(q, dim=1)
    k = F.normalize(k, dim=1)
    labels = torch.arange(len(q), device=q.device)
    if dist.is_initialized():
        keys = [torch.empty_like(k) for _ in range(dist.get_world_size())]
        dist.all_gather(keys, k)  # in the order of ranks, without gradients
        k = torch.cat(keys)  # (B x processes, dim)
        labels += dist.get_rank() * len(q)
    logits = q @ k.T / temperature  # (B, B x processes)
    return 2 * temperature * F.cross_entropy(logits, labels)


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers without biases, each with batch norm, and ReLU between; the last norm has no parameters."""
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), BatchNorm(after, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers[:-2], BatchNorm(widths[-1], affine=False, track_running_stats=False))


class QueryNetwork(nn.Module):
    """f_q of MoCo v3's Algorithm 1: encoder, mean over all tokens, projector, predictor. Weights start as in its code.

    The cube embedding is random and fixed, which keeps the training of a ViT stable (MoCo v3, Sec. 4.2).
    """

    def __init__(self, *, mlp_dim: int, dim: int, **encoder: Any) -> None:
        super().__init__()
        self.encoder = Encoder(**encoder)
        self.options = self.encoder.options
        self.projector = perceptron(self.options["width"], mlp_dim, mlp_dim, dim)
        self.predictor = perceptron(dim, mlp_dim, dim)
        initialize(self.encoder.blocks, nn.init.xavier_uniform_)
        embedding = self.encoder.patch_embed.requires_grad_(False).proj
        nn.init.xavier_uniform_(embedding.weight.flatten(1))  # a view: initialized in place, as a linear map
        nn.init.zeros_(embedding.bias)
        for block in self.encoder.blocks:
            for matrix in block.attn.qkv.weight.data.chunk(3):  # queries, keys and values each
                nn.init.xavier_uniform_(matrix)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Turn normalized clips (2 B, 3, T, H, W), first views first, into q (2 B, dim) and features (2 B, D)."""
        features = self.encoder(clips).mean(dim=1)  # (2 B, N, D) to (2 B, D)
        views = features.chunk(2)  # batch norm sees one view at a time, as in MoCo v3's code
        q = torch.cat([self.predictor(self.projector(view)) for view in views])  # (2 B, dim)
        return q, features.detach()  # features are only logged


def key_network(f_q: QueryNetwork) -> QueryNetwork:
    """Return f_k, the momentum encoder: a copy without predictor and gradients."""
    f_k = deepcopy(f_q).requires_grad_(False)
    f_k.predictor = nn.Identity()
    return f_k


@torch.no_grad()
def ema_update(f_k: QueryNetwork, f_q: QueryNetwork, momentum: float) -> None:
    """Compute f_k = m f_k + (1 - m) f_q."""
    learned = dict(f_q.named_parameters())
    for name, parameter in f_k.named_parameters():
        parameter.lerp_(learned[name], 1 - momentum)


def feature_std(features: Tensor) -> Tensor:
    """Return the std of normalized features (B, D): 1 / sqrt(D) if they fill the sphere, 0 if they collapse."""
    # the encoder's: after batch norm, which gives every column a variance of 1, no collapse would show
    _, variance = moments(F.normalize(features.float(), dim=1))  # (D,)
    return variance.sqrt().mean()


def build(config: SimpleNamespace) -> QueryNetwork:
    """Return the network f_q with random weights. Raises UserError."""
    if (area := config.data.crop_area) != sorted(area):
        raise UserError(f"data.crop_area={area} has to name the smaller number first")
    if config.optim.batch_size < 2:
        raise UserError("optim.batch_size=1 leaves a clip without negatives: choose at least 2, better hundreds")
    torch.manual_seed(config.run.seed)
    return QueryNetwork(mlp_dim=config.moco.mlp_dim, dim=config.moco.dim, **encoder_options(config, "scratch"))


def train(config: SimpleNamespace) -> None:
    """Pre-train as `config` says, or resume: MoCo v3's Algorithm 1."""
    f_q = build(config)
    processes = start_processes(config.run.precision, config.data.workers)
    rank, world_size, device = processes.rank, processes.world_size, processes.device
    compiled = compiler(config.run.compile, device)
    root, train_videos, *_ = toy.find(config.data)  # the toy videos if there is no data.root
    videos = list_videos(root, train_videos)
    clips = TwoViews(videos, config.run.seed, config=config.data)
    clips[0, 0]  # raises UserError if no video can be read

    # batch = processes x videos of each: no accumulation, since the negatives are those of one forward pass
    batch = config.optim.batch_size
    micro_batch, accumulation = split_batch(len(videos), batch, world_size, config.run.batch_per_device // 2)
    if accumulation > 1:
        what = f"accumulating {accumulation} micro-batches would leave each clip the negatives of its own alone"
        needed = f"run.batch_per_device={2 * batch // world_size} (with run.recompute=true clips need less memory)"
        raise UserError(f"{what}: set {needed}, or a smaller optim.batch_size")
    steps_per_epoch = len(videos) // batch
    total, warmup = count_steps(config.optim, steps_per_epoch)
    peak_lr = config.optim.base_lr * batch / 256

    f_k = key_network(f_q.to(device))
    if config.run.recompute:
        checkpoint_activations(f_q)
    learned = [parameter for parameter in f_q.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, betas=config.optim.betas, weight_decay=config.optim.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=processes.dtype == torch.float16)  # small gradients would be 0
    start = 0
    stored = dict(videos=describe(videos), model_options=f_q.options)
    if checkpoint := load_checkpoint(config, DEFAULT, videos=stored["videos"]):  # the same when a run resumes
        f_q.load_state_dict(checkpoint["model"])
        f_k.load_state_dict(checkpoint["key_network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):  # {} if the run was not in fp16: the scale starts as in a new run
            scaler.load_state_dict(checkpoint["scaler"])
        start = checkpoint["step"]
        check_length(checkpoint, config, steps_per_epoch)
    say(
        f"{config.run.folder}: MoCo v3, ViT-{config.model.size}, {sum(p.numel() for p in f_q.parameters()):,} "
        f"parameters, {sum(p.numel() for p in f_q.encoder.parameters()):,} of them the encoder's\n"
        f"{len(videos):,} videos; two clips of each, of {config.data.frames} frames, {config.data.stride} apart, "
        f"{config.data.size} x {config.data.size} pixels\n"
        f"peak learning rate {config.optim.base_lr:g} x {batch} / 256 = {peak_lr:.4g}"
    )
    log = Log(config, processes, start, total, steps_per_epoch, clips_per_step=2 * batch)
    queries, keys = compiled(f_q), compiled(f_k)
    if world_size > 1:
        queries = DistributedDataParallel(queries, gradient_as_bucket_view=True, broadcast_buffers=False)
    sampler = data.MicroBatchSampler(len(videos), batch, micro_batch, range(start, total), processes, config.run.seed)
    batches = data.Batches(clips, sampler, config.data.workers, log.folder)

    tau = config.moco.temperature
    loss_sum = torch.zeros((), device=device)
    with StopSignals() as stop:
        for step in log.progress(range(start, total)):
            lr = warmup_cosine(step, total, warmup, peak_lr, 0.0)
            momentum = warmup_cosine(step, total, 0, config.moco.momentum, 1.0)  # half a cosine from 0.99 to 1
            for group in optimizer.param_groups:
                group["lr"] = lr
            ema_update(f_k, f_q, momentum)

            views = next(batches)[0].to(device, non_blocking=True)  # (B, 2, T, 3, H, W)
            clip = data.normalize(rearrange(views, "B views T c H W -> (views B) T c H W"))  # (2 B, 3, T, H, W)
            with processes.autocast():
                q, features = queries(clip)  # (2 B, dim), (2 B, D)
                with torch.no_grad():
                    k, _ = keys(clip)  # (2 B, dim)
            (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)  # (B, dim)
            loss = contrastive_loss(q1, k2, tau) + contrastive_loss(q2, k1, tau)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            done = step + 1
            if done % config.run.log_every == 0 or done == total:
                mean_loss = average(loss_sum) / (done - log.step)  # since the last line
                mean_loss, std = torch.stack([mean_loss, feature_std(features)]).tolist()
                values = dict(lr=lr, momentum=momentum, feature_std=std, uniform_std=f_q.options["width"] ** -0.5)
                log.write_step(done, mean_loss, batches.waited, **values)
                loss_sum.zero_()
            stopped = stop.requested()
            kept = log.epoch_ends(done, config.run.keep_every)
            if stopped or done % config.run.checkpoint_every == 0 or kept or done == total:
                state = dict(model=f_q.state_dict(), key_network=f_k.state_dict(), optimizer=optimizer.state_dict())
                save_checkpoint(log, config, **state, scaler=scaler.state_dict(), step=done, **stored)
            if stopped and done < total:
                raise UserError(f"stopped by {stopped} after step {done}: the same command resumes there")

    if rank == 0:
        say(
            f"{log.folder}: {total:,} steps done{log.last_loss()}: checkpoint.pt, loss.png. Next: "
            f"{finetune_command(config, log.folder / 'checkpoint.pt')} run.folder=runs/finetune/moco_v3"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train(load_config(DEFAULT, parse(parser, DEFAULT).settings))


if __name__ == "__main__":
    launch(main)
