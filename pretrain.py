"""Self-supervised pre-training (Sec. 3, Table 9): hide most cubes of a clip, reconstruct them.

    laptop:    torchrun pretrain.py                                    # toy videos, tiny model, a few minutes
    one GPU:   torchrun pretrain.py configs/pretrain/ssv2_base.yaml data.root=/data/ssv2
    8 GPUs:    torchrun --nproc_per_node=8 pretrain.py configs/pretrain/k400_base.yaml data.root=/data/k400
    8 nodes:   torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py ...
    pictures:  python pretrain.py --reconstruct VIDEO... --weights runs/pretrain/toy/checkpoint.pt mask.ratio=0.9

The same command again goes on from the last checkpoint. Any value of the YAML file can be given as group.key=value.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import masking
from model import (
    SIZES,
    VideoMAE,
    cube_grid,
    recompute_blocks,
    take,
)
from support import toy
from support.config import UserError, as_dict, load_config, parse, pick
from support.datasets import (
    list_videos,
)
from support.pictures import save_pictures
from support.run import (
    Progress,
    launch,
    numerics,
    open_folder,
    sample_generator,
    save_checkpoint,
    say,
    share_batch,
    start_processes,
    warmup_cosine,
)
from support.video import (
    BrokenVideo,
    Video,
)
from support.weights import (
    build_from,
    read_checkpoint,
)

CONFIGS = Path(__file__).parent / "configs" / "pretrain"
DEFAULT = CONFIGS / "toy.yaml"
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}  # Table 1f


# ---- what is to be reconstructed, and the loss ----


class Objective:
    """Which frames are the target (Table 1c), normalised or not (Sec. 3.1), and how the error is measured (Eq. 1, Table 1f)."""

    def __init__(self, config: SimpleNamespace) -> None:
        frames, stride, cube = config.data.frames, config.data.stride, config.model.cube
        slices, height, width = cube_grid((frames, config.data.size, config.data.size), cube)
        # Table 1c: number and stride of the frames to load, how many of them each token predicts, which tokens have a target.
        # Its row T x tau/2 -> T x tau/2 needs no target of its own: it is "input" with half of data.stride.
        everywhere, middle = range(slices * height * width), slices // 2 * height * width
        targets = {
            "input": (frames, stride, cube[0], everywhere),  # T x tau -> T x tau, the default
            "double": (2 * frames, stride // 2, 2 * cube[0], everywhere),  # T x tau -> 2T x tau/2
            "center": (frames, stride, 1, range(middle, middle + height * width)),  # T x tau -> center
        }
        self.name = config.target.frames
        self.load_frames, self.load_stride, frames_per_token, self.tokens = pick(targets, self.name, "target.frames")
        if self.name == "double" and stride % 2:
            raise UserError(f"target.frames=double halves the stride, so data.stride={stride} has to be even")
        self.cube = (frames_per_token, *cube[1:])
        self.share = len(self.tokens) / len(everywhere)  # of all tokens, those that have a target
        self.normalize = config.target.normalize
        self.error = pick(LOSSES, config.target.loss, "target.loss")

    def split(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Loaded frames (B, T', 3, H, W) to the encoder's input (B, T, 3, H, W) and the target (B, T_target, 3, H, W)."""
        if self.name == "double":
            return frames[:, ::2], frames
        if self.name == "center":
            middle = frames.shape[1] // 2
            return frames, frames[:, middle : middle + 1]
        return frames, frames

    def target_index(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """For each masked token the index of its cube among the target's, and whether it has one there: both (B, N_mask)."""
        index = masked - self.tokens.start
        has_target = (index >= 0) & (index < len(self.tokens))
        return index.clamp(0, len(self.tokens) - 1), has_target  # without a target: any index, its error does not count

    def loss(self, prediction: Tensor, target: Tensor, masked: Tensor) -> Tensor:
        """Eq. 1: the mean of |I(p) - I_hat(p)|^2 over the masked cubes p in Omega and the pixels of each.

        prediction (B, N_mask, pixels), target uint8 (B, T_target, 3, H, W), masked (B, N_mask).
        """
        prediction = prediction.float()
        index, has_target = self.target_index(masked)
        cubes = take(to_cubes(target, self.cube).flatten(2), index)  # (B, N_mask, pixels), uint8, channel fastest
        cubes = cubes.unflatten(2, (-1, 3)).float().div_(255)  # (B, N_mask, p0 p1 p2, 3), in [0, 1]
        if self.normalize:
            mean, deviation = cube_statistics(cubes)
            cubes = cubes.sub_(mean).div_(deviation)
        cubes = cubes.flatten(2)  # (B, N_mask, pixels)
        if self.share < 1:
            # Tokens without a target add no error. Dividing by `share` takes them out of the mean: exactly for tubes, else on average.
            prediction, cubes = prediction * has_target[:, :, None], cubes * has_target[:, :, None]
        return self.error(prediction, cubes) / self.share  # F.mse_loss is Eq. 1, the others are Table 1f


def to_cubes(frames: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """Cut frames (B, T, 3, H, W) into cubes (B, N, p0 p1 p2, 3)."""
    p0, p1, p2 = cube
    return rearrange(frames, "B (t p0) c (h p1) (w p2) -> B (t h w) (p0 p1 p2) c", p0=p0, p1=p1, p2=p2)


def from_cubes(cubes: Tensor, cube: tuple[int, int, int], size: int) -> Tensor:
    """The inverse of `to_cubes`: cubes (B, N, p0 p1 p2, 3) to frames (B, T, 3, size, size)."""
    p0, p1, p2 = cube
    return rearrange(cubes, "B (t h w) (p0 p1 p2) c -> B (t p0) c (h p1) (w p2)", p0=p0, p1=p1, p2=p2, h=size // p1, w=size // p2)


def cube_statistics(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels of each cube and channel: (..., p0 p1 p2, 3) to twice (..., 1, 3)."""
    mean = cubes.mean(dim=-2, keepdim=True)
    variance = (cubes - mean).square().sum(dim=-2, keepdim=True) / (cubes.shape[-2] - 1)  # three times as fast as std() on a CPU
    return mean, variance.sqrt() + 1e-6  # n - 1 and 1e-6 as in the authors' code


# ---- training ----


def build(config: SimpleNamespace) -> tuple[VideoMAE, Objective, Callable[[torch.Generator], Tensor]]:
    """The model, its objective and the function that draws a mask (N,). Most mistakes in a configuration are found here."""
    objective = Objective(config)
    torch.manual_seed(config.run.seed)
    model = VideoMAE(
        **pick(SIZES, config.model.size, "model.size"),
        decoder_depth=config.model.decoder_depth,
        clip_size=(config.data.frames, config.data.size, config.data.size),
        cube=config.model.cube,
        frames_per_token=objective.cube[0],
    )
    draw_mask = partial(pick(masking.MASKS, config.mask.type, "mask.type"), model.grid, config.mask.ratio)
    draw_mask(torch.Generator())  # stops here if the ratio hides every cube or none
    return model, objective, draw_mask


def parameter_groups(model: VideoMAE, weight_decay: float) -> list[dict]:
    """Weights decay; biases, norms and the mask token do not, as in the authors' code."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim == 1 or name == "mask_token" else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def train(config: SimpleNamespace) -> None:
    """Run, or go on with, the experiment that `config` describes: AdamW, warm-up, then half a cosine (Table 9)."""
    bf16, compiled = numerics(config.run)
    model, objective, draw_mask = build(config)
    rank, world_size, device = start_processes(config.data.workers)
    chief = rank == 0
    root, train, val = toy.find(config.data, world_size)
    videos = list_videos(root, train)
    val_videos = list_videos(root, val) if val else videos
    clips = data.PretrainingClips(
        videos,
        frames=objective.load_frames,
        stride=objective.load_stride,
        size=config.data.size,
        scales=config.data.scales,
        flip=config.data.flip,
        draw_mask=draw_mask,
        seed=config.run.seed,
    )
    _, visible, masked, _ = clips[0, 0]  # stops here if no video can be read

    batch_size = config.optim.batch_size
    per_device, accumulation = share_batch(batch_size, len(videos), world_size, config.run.batch_per_device)
    steps_per_epoch = len(videos) // batch_size
    steps, warmup = config.optim.epochs * steps_per_epoch, config.optim.warmup_epochs * steps_per_epoch
    peak_lr, end_lr = config.optim.base_lr * batch_size / 256, config.optim.min_lr * batch_size / 256  # Sec. B

    model.to(device)
    if config.run.recompute:
        recompute_blocks(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim.weight_decay), betas=config.optim.betas, fused=True)
    folder, checkpoint = open_folder(config)
    start = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    say(
        f"{folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters, on {world_size} x {device.type}\n"
        f"{len(videos):,} videos; clips of {config.data.frames} frames, {config.data.stride} apart, {config.data.size} x {config.data.size} pixels\n"
        f"{config.mask.type} mask: {len(masked):,} of {len(masked) + len(visible):,} cubes masked, {len(visible):,} visible\n"
        f"batch {batch_size} = {world_size} processes x {accumulation} accumulated x {per_device} clips; "
        f"learning rate {config.optim.base_lr:g} x {batch_size} / 256 = {peak_lr:.4g}\n"
        f"{steps:,} steps = {config.optim.epochs} epochs x {steps_per_epoch:,}; starting at step {start:,}"
    )

    predict, loss_of = (torch.compile(model), torch.compile(objective.loss)) if compiled else (model, objective.loss)
    if world_size > 1:
        predict = DistributedDataParallel(predict, gradient_as_bucket_view=True, broadcast_buffers=False)
    batches = data.training_batches(clips, config.data.workers, batch_size=batch_size, per_device=per_device, start=start, steps=steps)
    progress = Progress(config.run, start, steps, batch_size, device)

    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, warmup, peak_lr, end_lr)
        for piece in range(accumulation):
            *tensors, broken = progress.next(batches)
            progress.report(broken)
            frames, visible, masked = (x.to(device, non_blocking=True) for x in tensors)
            clip, target = objective.split(frames)  # (B, T, 3, H, W), (B, T_target, 3, H, W)
            # Processes exchange gradients once a step, with the last piece.
            with predict.no_sync() if world_size > 1 and piece < accumulation - 1 else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    prediction = predict(data.normalize(clip), visible, masked)  # (B, N_mask, pixels)
                loss = loss_of(prediction, target, masked)
                (loss / accumulation).backward()
            progress.add(loss)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        progress.done(done, epoch=round(done / steps_per_epoch, 4), lr=optimizer.param_groups[0]["lr"])
        if done % config.run.checkpoint_every == 0 or done == steps:
            progress.flush()
            progress.gather_broken()
            if chief:
                content = dict(model=model.state_dict(), model_options=model.options, optimizer=optimizer.state_dict())
                save_checkpoint(folder / "checkpoint.pt", **content, step=done, config=as_dict(config))

    if chief:
        if progress.broken:
            say(f"{len(progress.broken)} broken videos were replaced by others: {folder / 'broken_videos.txt'}")
        for index in torch.linspace(0, len(val_videos) - 1, min(config.run.pictures, len(val_videos))).long().tolist():
            masks = {f"{config.mask.ratio:.0%} masked": draw_mask(sample_generator(config.run.seed, -1, index))}
            try:
                draw(val_videos[index], config, model, masks, folder / "pictures" / f"{index:05d}")
            except BrokenVideo as error:
                say(f"no picture of {error}")
        say(f"{folder}: {steps:,} steps done; see checkpoint.pt, log.jsonl and pictures/")


# ---- pictures (Figures 10 and 11) ----


@torch.no_grad()
def reconstruct(model: VideoMAE, objective: Objective, frames: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Named videos, uint8 (T, 3, H, W), that show what the model makes of loaded frames (T', 3, H, W) under a mask (N,).

    A model with normalised targets says nothing about a cube's mean and deviation. The honest reconstruction guesses
    them from the visible cubes nearby; the other one borrows them from the hidden cube itself.
    """
    device = model.mask_token.device
    visible, masked = (positions[None].to(device) for positions in masking.split(mask))
    clip, target = objective.split(frames[None].to(device))
    prediction = model(data.normalize(clip), visible, masked)[0].float().unflatten(1, (-1, 3))  # (N_mask, p0 p1 p2, 3)

    cubes = to_cubes(target / 255, objective.cube)[0]  # (N, p0 p1 p2, 3)
    index, has_target = objective.target_index(masked[0])
    index, prediction = index[has_target], prediction[has_target]

    def video(hidden_cubes: Tensor) -> Tensor:
        shown = cubes.clone()
        shown[index] = hidden_cubes
        return (from_cubes(shown[None], objective.cube, target.shape[-1])[0].clamp(0, 1) * 255).round().byte().cpu()  # (T, 3, H, W)

    views = {"original": video(cubes[index]), "masked": video(torch.full_like(cubes[index], 0.5))}
    if not objective.normalize:
        return views | {"reconstruction": video(prediction)}
    mean, deviation = cube_statistics(cubes)  # (N, 1, 3)
    nearness = cube_nearness(len(cubes), model.grid[1:], device)  # (N, N)
    nearness[:, index] = 0  # nothing is taken from hidden cubes
    if len(index) == len(cubes):  # no cube of the target is visible to guess from: mid-grey, and a contrast as usual
        guessed = torch.full_like(prediction, 0.5), torch.full_like(prediction, 0.2)
    else:
        weights = nearness[index] / nearness[index].sum(dim=1, keepdim=True)  # (N_mask, N)
        guessed = tuple(torch.einsum("mn,nkc->mkc", weights, statistic) for statistic in (mean, deviation))
    return views | {
        "reconstruction (mean and deviation guessed from visible cubes)": video(prediction * guessed[1] + guessed[0]),
        "reconstruction (mean and deviation borrowed from the original)": video(prediction * deviation[index] + mean[index]),
    }


def cube_nearness(count: int, plane: tuple[int, int], device: torch.device) -> Tensor:
    """How near each of `count` cubes is to every other: (N, N), one over the fourth power of their distance in cubes."""
    axes = [torch.arange(length, device=device).float() for length in (count // (plane[0] * plane[1]), *plane)]
    position = torch.cartesian_prod(*axes)  # (N, 3)
    return 1 / (torch.cdist(position, position) ** 4 + 1e-6)


def draw(video: Path, config: SimpleNamespace, model: VideoMAE, masks: dict[str, Tensor], path: Path) -> None:
    """Picture the middle clip of a video, its central square, under each of the named masks. Raises BrokenVideo."""
    objective = Objective(config)
    with Video(video) as opened:
        frames = opened.frames(data.dense_clip(len(opened), objective.load_frames, objective.load_stride))  # (T', 3, H, W)
    frames = data.center_crop(frames, config.data.size)
    rows = {}
    for name, mask in masks.items():
        views = reconstruct(model, objective, frames, mask)
        rows |= {label if label == "original" else f"{name}: {label}": view for label, view in views.items()}
    save_pictures(rows, path)


def draw_videos(arguments: argparse.Namespace) -> None:
    """`--reconstruct`: Figure 10 for any videos, from this project's or other pre-trained weights."""
    if not arguments.weights:
        raise UserError("--reconstruct needs --weights FILE, a pre-training checkpoint such as runs/pretrain/toy/checkpoint.pt")
    stored = read_checkpoint(arguments.weights)[1].get("config")
    if not stored:  # weights from elsewhere do not say how they were trained; assume Table 9
        stored = as_dict(load_config(DEFAULT, [str(CONFIGS / "k400_base.yaml")]))
    config = load_config(DEFAULT, arguments.settings, stored)
    model = build_from(VideoMAE, arguments.weights, (config.data.frames, config.data.size, config.data.size))
    if Objective(config).cube[0] != model.options["frames_per_token"]:
        raise UserError(f"{arguments.weights} was trained for another target than target.frames={config.target.frames}: leave that key out")
    if model.options["clip_size"] != [config.data.frames, config.data.size, config.data.size]:
        raise UserError(f"{arguments.weights} was trained on clips of {model.options['clip_size']}: leave data.frames and data.size out")
    draw_mask = pick(masking.MASKS, config.mask.type, "mask.type")
    for number, video in enumerate(arguments.reconstruct):
        masks = {
            f"{config.mask.type} mask {ratio:.0%}": draw_mask(model.grid, ratio, sample_generator(config.run.seed, -1, number))
            for ratio in arguments.ratios or [config.mask.ratio]
        }
        try:
            draw(video, config, model, masks, arguments.out / video.stem)
        except BrokenVideo as error:
            raise UserError(f"no clip can be read from {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reconstruct", nargs="+", type=Path, metavar="VIDEO", help="draw reconstructions of these videos instead of training")
    parser.add_argument("--weights", type=Path, help="pre-training checkpoint: this project's, official or Hugging Face's")
    parser.add_argument("--ratios", nargs="+", type=float, help="mask ratios to draw, such as Figure 10's 0.75 0.9 0.95; default: mask.ratio")
    parser.add_argument("--out", type=Path, default=Path("runs/reconstructions"), help="folder of the drawings")
    arguments = parse(parser)
    if arguments.weights and not arguments.reconstruct:
        raise UserError("--weights goes with --reconstruct; a run goes on from its own checkpoint by the same command")
    if arguments.reconstruct:
        draw_videos(arguments)
    else:
        train(load_config(DEFAULT, arguments.settings))


if __name__ == "__main__":
    launch(main)
