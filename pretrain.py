"""Self-supervised pre-training (Sec. 3, Table 9): mask most cubes of a clip, reconstruct them.

    laptop:    torchrun pretrain.py                                    # toy videos, tiny model, a few minutes
    one GPU:   torchrun pretrain.py configs/pretrain/ssv2_base.yaml data.root=/data/ssv2
    8 GPUs:    torchrun --nproc_per_node=8 pretrain.py configs/pretrain/k400_base.yaml data.root=/data/k400
    8 nodes:   torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py ...
    pictures:  python pretrain.py --reconstruct VIDEO... --weights runs/pretrain/toy/checkpoint.pt mask.ratio=0.9

The same command resumes from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import masking
from model import SIZES, VideoMAE, checkpoint_activations, cube_grid, gather_tokens, parameter_groups
from support import toy
from support.checkpoint import check_length, describe, load_checkpoint, save_checkpoint
from support.config import UserError, load_config, parse, pick, say
from support.lists import list_videos, named_videos
from support.pictures import copy_visible, estimate_statistics, save_videos, with_captions
from support.processes import Processes, StopSignals, average, compiler, gather, launch, start_processes
from support.run import Log, count_steps, finetune_command, split_batch, warmup_cosine
from support.seeds import sample_generator
from support.video import BrokenVideo, Video
from support.weights import build_from_checkpoint, load_weights, stored_config

DEFAULT = Path(__file__).parent / "configs" / "pretrain" / "toy.yaml"
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}  # Table 1f


class Objective:
    """Eq. 1: the mean of |I(p) - I_hat(p)|^2 over clips, masked cubes p in Omega, and the pixel values of each cube.

    Table 1f has other errors, Table 1c other frames to predict: see `Target`.
    """

    def __init__(self, config: SimpleNamespace) -> None:
        self.error = pick(LOSSES, config.target.loss, "target.loss")
        self.normalize = config.target.normalize
        grid = cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
        self.target = pick(TARGETS, config.target.frames, "target.frames")(config, grid)

    def loss(self, prediction: Tensor, target_frames: Tensor, masked: Tensor) -> Tensor:
        """Compare the decoder's prediction (B, N_mask, pixels) with frames uint8 (B, T_target, 3, H, W): a scalar.

        masked (B, N_mask): the positions of the predicted cubes.
        """
        index, has_target = self.target_index(masked)  # both (B, N_mask)
        # Select before converting: uint8 is a quarter of float32.
        cubes = to_cubes(target_frames, self.target.cube).flatten(2)  # (B, N, pixels), pixels = p0 p1 p2 * 3 values
        cubes = gather_tokens(cubes, index)  # (B, N_mask, pixels)
        cubes = cubes.unflatten(2, (-1, 3)).float().div_(255)  # (B, N_mask, p0 p1 p2, 3), in [0, 1]
        if self.normalize:
            mean, std = cube_statistics(cubes)
            cubes = cubes.sub_(mean).div_(std)
        cubes = cubes.flatten(2)  # I(p): (B, N_mask, pixels)
        prediction = prediction.float()  # I_hat(p): (B, N_mask, pixels)
        if self.target.fraction < 1:  # tokens without a target add the error of equal values, which is 0
            # The fraction corrects the mean: exactly with tubes, on average with other masks.
            cubes = cubes * has_target[:, :, None]
            prediction = prediction * has_target[:, :, None]
        return self.error(prediction, cubes) / self.target.fraction

    def input_and_target(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Choose from loaded frames (B, T', 3, H, W) those of the input and those of the target."""
        return frames[:, :: self.target.input_step], frames[:, self.target.predicted]

    def target_index(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of each masked token's cube in the target, and whether it has one."""
        index = masked - self.target.tokens.start
        has_target = (index >= 0) & (index < len(self.target.tokens))
        return index.clamp(0, len(self.target.tokens) - 1), has_target


def cube_statistics(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std, both (..., 1, 3), of each cube and channel of cubes (..., p0 p1 p2, 3)."""
    mean = cubes.mean(dim=-2, keepdim=True)
    # channels apart, n - 1 and 1e-6 as in the authors' code; cubes.std() is 3 times slower on CPUs
    variance = (cubes - mean).square().sum(dim=-2, keepdim=True) / (cubes.shape[-2] - 1)
    return mean, variance.sqrt() + 1e-6


def to_cubes(frames: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """Cut frames (B, T, 3, H, W) into cubes (B, N, p0 p1 p2, 3)."""
    p0, p1, p2 = cube
    return rearrange(frames, "B (t p0) c (h p1) (w p2) -> B (t h w) (p0 p1 p2) c", p0=p0, p1=p1, p2=p2)


def from_cubes(cubes: Tensor, cube: tuple[int, int, int], size: int) -> Tensor:
    """Undo `to_cubes`, for frames of size x size pixels."""
    p0, p1, p2 = cube
    shape = dict(p0=p0, p1=p1, p2=p2, h=size // p1, w=size // p2)
    return rearrange(cubes, "B (t h w) (p0 p1 p2) c -> B (t p0) c (h p1) (w p2)", **shape)


class Target(NamedTuple):
    """A row of Table 1c: which frames to load, and which of them the encoder sees and the decoder predicts."""

    load_frames: int
    load_stride: int
    cube: tuple[int, int, int]  # what each token predicts: frames, height, width; the model's cube is what it sees
    tokens: range  # positions that have a target
    input_step: int = 1  # the encoder sees every frame, or every other one
    predicted: slice = slice(None)  # the frames to predict
    fraction: float = 1.0  # of all positions, those that have a target


def predict_input(config: SimpleNamespace, grid: masking.Grid) -> Target:
    """T x tau -> T x tau, the default. With half of data.stride it is T x tau/2 -> T x tau/2."""
    return Target(config.data.frames, config.data.stride, config.model.cube, tokens=range(math.prod(grid)))


def predict_double(config: SimpleNamespace, grid: masking.Grid) -> Target:
    """T x tau -> 2T x tau/2: twice the frames in the same time, of which the encoder sees every other one."""
    frames, stride = config.data.frames, config.data.stride
    p0, p1, p2 = config.model.cube
    if stride % 2:
        raise UserError(f"target.frames=double halves the stride, so data.stride={stride} has to be even")
    return Target(2 * frames, stride // 2, (2 * p0, p1, p2), tokens=range(math.prod(grid)), input_step=2)


def predict_center(config: SimpleNamespace, grid: masking.Grid) -> Target:
    """T x tau -> center: frame T/2 alone, by the tokens at its time. The paper does not say which frame is meant."""
    frames, stride = config.data.frames, config.data.stride
    _, p1, p2 = config.model.cube
    time, height, width = grid
    first = time // 2 * height * width
    tokens = range(first, first + height * width)
    center = slice(frames // 2, frames // 2 + 1)
    return Target(frames, stride, (1, p1, p2), tokens, predicted=center, fraction=1 / time)


TARGETS = {"input": predict_input, "double": predict_double, "center": predict_center}


def build(config: SimpleNamespace) -> tuple[VideoMAE, Objective, Callable[[torch.Generator], Tensor]]:
    """Build the model, its objective, and the function that samples a mask (N,). Raises UserError."""
    objective = Objective(config)
    torch.manual_seed(config.run.seed)
    model = VideoMAE(
        **pick(SIZES, config.model.size, "model.size"),
        decoder_depth=config.model.decoder_depth,
        clip_size=(config.data.frames, config.data.size, config.data.size),
        cube=config.model.cube,
        frames_per_token=objective.target.cube[0],
    )
    sample_mask = partial(pick(masking.MASKS, config.mask.type, "mask.type"), model.grid, config.mask.ratio)
    sample_mask(torch.Generator())  # raises UserError if the ratio masks every cube or none
    return model, objective, sample_mask


def train(config: SimpleNamespace) -> None:
    """Pre-train as `config` says (Table 9), or resume; measure and draw reconstructions at the end."""
    model, objective, sample_mask = build(config)
    processes = start_processes(config.run.precision, config.data.workers)
    rank, world_size, device = processes.rank, processes.world_size, processes.device
    compiled = compiler(config.run.compile, device)
    folder = Path(config.run.folder)

    root, train_split, val_split, _ = toy.find(config.data)  # the toy videos if there is no data.root
    videos = list_videos(root, train_split)
    val_videos = list_videos(root, val_split) if val_split else videos
    if config.run.validate_every and not val_split:
        raise UserError("run.validate_every needs videos that are not trained on: name them by data.val")
    if val_split and not any(video.exists() for video in val_videos):
        raise UserError(f"no video of data.val exists, not even {val_videos[0]}: look at data.root and data.val")
    clips = data.PretrainingClips(
        videos,
        frames=objective.target.load_frames,
        stride=objective.target.load_stride,
        size=config.data.size,
        scales=config.data.scales,
        flip=config.data.flip,
        sample_mask=sample_mask,
        repeats=config.data.repeats,
        choose_reconstructed=partial(masking.running_cells, grid=model.grid, ratio=config.mask.decoder_ratio),
        seed=config.run.seed,
    )
    _, visible, masked, _ = clips[0, 0]  # raises UserError if no video can be read

    # batch = processes x accumulation x micro-batch, in videos. Unlike in fine-tuning, optim.batch_size counts clips.
    repeats = config.data.repeats  # R clips of each video
    if config.optim.batch_size % repeats:
        raise UserError(f"optim.batch_size={config.optim.batch_size} is not a multiple of data.repeats={repeats}")
    batch = config.optim.batch_size // repeats
    micro_batch, accumulation = split_batch(len(videos), batch, world_size, config.run.batch_per_device // repeats)
    steps_per_epoch = len(videos) // batch
    total, warmup = count_steps(config.optim, steps_per_epoch)
    peak_lr = config.optim.base_lr * config.optim.batch_size / 256  # Sec. B: the linear scaling rule
    end_lr = config.optim.min_lr * config.optim.batch_size / 256

    stored = dict(videos=describe(videos), model_options=model.options)
    checkpoint = load_checkpoint(config, DEFAULT, videos=stored["videos"])  # the same when a run resumes
    if config.init and not checkpoint:
        load_weights(model, config.init, clip_size=config.model.pretrained_clip)
        say(f"initialized from {config.init}")
    model.to(device)
    if config.run.recompute:
        checkpoint_activations(model)
    groups = parameter_groups(model, config.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=processes.dtype == torch.float16)  # small gradients would be 0

    if config.init:  # may have other positions than the model computes, and state_dict leaves them out
        stored |= dict(positions=model.encoder.pos_embed, decoder_positions=model.pos_embed)
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        if config.init:
            model.encoder.pos_embed.copy_(checkpoint["positions"])
            model.pos_embed.copy_(checkpoint["decoder_positions"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler"):  # {} if the run was not in fp16: the scale starts as in a new run
            scaler.load_state_dict(checkpoint["scaler"])
        start = checkpoint["step"]
        check_length(checkpoint, config, steps_per_epoch)
    cubes = len(model.pos_embed)  # N
    say(
        f"{folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{len(videos):,} videos; clips of {config.data.frames} frames, {config.data.stride} apart, "
        f"{config.data.size} x {config.data.size} pixels\n{config.mask.type} mask: {cubes - visible.shape[-1]:,} of "
        f"{cubes:,} cubes masked, {visible.shape[-1]:,} visible, {masked.shape[-1]:,} reconstructed\n"
        f"peak learning rate {config.optim.base_lr:g} x {config.optim.batch_size} / 256 = {peak_lr:.4g}"
    )
    log = Log(config, processes, start, total, steps_per_epoch, clips_per_step=config.optim.batch_size)
    network = compiled(model)
    loss_of = compiled(objective.loss)
    if world_size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True, broadcast_buffers=False)
    sampler = data.MicroBatchSampler(len(videos), batch, micro_batch, range(start, total), processes, config.run.seed)
    batches = data.Batches(clips, sampler, config.data.workers, folder)

    fixed_clips = FixedClips(val_videos, objective, sample_mask, processes, config)
    loss_sum = torch.zeros((), device=device)
    with StopSignals() as stop:
        for step in log.progress(range(start, total)):
            lr = warmup_cosine(step, total, warmup, peak_lr, end_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for number in range(accumulation):
                # of V videos: frames (V, R, T', 3, H, W), visible (V, R, N_vis), masked (V, R, N_mask)
                tensors = (x.to(device, non_blocking=True) for x in next(batches))
                frames, visible, masked = (rearrange(x, "V R ... -> (V R) ...") for x in tensors)  # B = V R clips
                clip, target_frames = objective.input_and_target(frames)  # (B, T, 3, H, W), (B, T_target, 3, H, W)
                # gradients are averaged over the processes in the last backward pass of the step
                last = number == accumulation - 1
                with nullcontext() if last or world_size == 1 else network.no_sync():
                    with processes.autocast():
                        prediction = network(data.normalize(clip), visible, masked)  # (B, N_mask, pixels)
                    loss = loss_of(prediction, target_frames, masked)
                    scaler.scale(loss / accumulation).backward()
                loss_sum += loss.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            done = step + 1
            if done % config.run.log_every == 0 or done == total:
                mean_loss = average(loss_sum) / ((done - log.step) * accumulation)  # since the last line
                log.write_step(done, mean_loss.item(), batches.waited, lr=lr)
                loss_sum.zero_()
            if log.epoch_ends(done, config.run.validate_every):
                with log.clock_stopped():
                    log.write(step=done, **validate(model, objective, fixed_clips, processes, done // steps_per_epoch))
            stopped = stop.requested()
            kept = log.epoch_ends(done, config.run.keep_every)
            if stopped or done % config.run.checkpoint_every == 0 or kept or done == total:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
                save_checkpoint(log, config, **state, step=done, **stored)
            if stopped and done < total:
                raise UserError(f"stopped by {stopped} after step {done}: the same command resumes there")

    if config.target.frames == "input":
        log.write(step=total, **compare_with_copies(model, objective, fixed_clips))
    if rank == 0:
        for number in data.evenly_spaced(len(val_videos), config.run.pictures):
            path = folder / "pictures" / f"{number:05d}"
            draw(val_videos[number], number, config, model, [config.mask.ratio], path)
        pictures = ", pictures/" if config.run.pictures else ""
        say(
            f"{folder}: {total:,} steps done{log.last_loss()}: checkpoint.pt, loss.png{pictures}. "
            f"Next: {finetune_command(config, folder / 'checkpoint.pt')}"
        )


def middle_clip(video: Path, target: Target, size: int) -> Tensor:
    """Load the middle clip of a video, its central square: (T', 3, H, W). Raises BrokenVideo."""
    with Video(video) as opened:
        indices = data.dense_clip(len(opened), target.load_frames, target.load_stride)
        frames = opened.frames(indices)
    return data.center_crop(frames, size)


@dataclass(frozen=True)
class FixedClips:
    """Middle clips (T', 3, H, W) of up to 200 videos with masks (N,), the same in each iteration.

    The length is that of all processes; each iterates over its own clips. Broken videos are named and left out.
    """

    videos: Sequence[Path]
    objective: Objective
    sample_mask: Callable[[torch.Generator], Tensor]
    processes: Processes
    config: SimpleNamespace

    def __len__(self) -> int:
        return min(200, len(self.videos))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in data.evenly_spaced(len(self.videos), len(self))[self.processes.rank :: self.processes.world_size]:
            try:
                frames = middle_clip(self.videos[number], self.objective.target, self.config.data.size)
            except BrokenVideo as error:
                tqdm.write(f"left out of the fixed clips: {error}", file=sys.stderr)
                continue
            generator = sample_generator(self.config.run.seed, -1, number)  # -1: of pictures, see support/seeds.py
            yield frames, self.sample_mask(generator)


@torch.no_grad()
def validate(
    model: VideoMAE, objective: Objective, clips: FixedClips, processes: Processes, epoch: int
) -> dict[str, float]:
    """Print and return the mean loss of the clips and masks of all processes."""
    model.eval()
    losses = []
    for frames, mask in clips:
        visible, masked = (positions[None].to(processes.device) for positions in masking.split(mask))
        clip, target_frames = objective.input_and_target(frames[None].to(processes.device))
        with processes.autocast():
            prediction = model(data.normalize(clip), visible, masked)  # (1, N_mask, pixels)
        losses.append(objective.loss(prediction, target_frames, masked).item())
    model.train()
    losses = gather(losses)
    val_loss = fmean(losses) if losses else math.nan
    say(f"epoch {epoch}: validation loss {val_loss:.4f}, {len(losses)} of {len(clips)} clips")
    return dict(epoch=epoch, val_loss=val_loss)


def compare_with_copies(model: VideoMAE, objective: Objective, clips: FixedClips) -> dict[str, float]:
    """Print and return the mean squared error of masked cubes' pixels: of the reconstruction and of the best copy."""
    view = "estimated" if objective.normalize else "reconstruction"
    errors = []  # of each clip, by guess
    for frames, mask in clips:
        views = reconstruct(model, objective, frames, mask)
        videos = torch.stack([views["original"], views[view]]) / 255  # (2, T_target, 3, H, W)
        original, reconstruction = to_cubes(videos, objective.target.cube).flatten(2)  # (N, pixels) each
        guesses = copy_visible(original, mask, model.grid) | {"reconstruction": reconstruction[mask]}
        errors.append({name: F.mse_loss(guess, original[mask]).item() for name, guess in guesses.items()})
    errors = gather(errors)
    if not errors:
        return {}
    means = {name: fmean(error[name] for error in errors) for name in errors[0]}
    reconstruction_error = means.pop("reconstruction")
    best = min(means, key=means.get)
    say(f"error of masked cubes {reconstruction_error:.4f}; best copy ({best}) {means[best]:.4f}")
    return dict(reconstruction_error=reconstruction_error, copy_error=means[best], copy=best)


@torch.no_grad()
def reconstruct(model: VideoMAE, objective: Objective, frames: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Reconstruct the masked cubes of loaded frames (T', 3, H, W), as in Figure 10.

    Returns videos uint8 (T_target, 3, H, W): "original", "masked" and "reconstruction". A model with normalized targets
    does not predict a cube's mean and std. For it there are two reconstructions: "estimated" takes them from visible
    cubes nearby, so it shows only what the model sees; "oracle" takes them from the masked cube itself.
    """
    device = model.mask_token.device
    visible, masked = (positions[None].to(device) for positions in masking.split(mask))
    clip, target_frames = objective.input_and_target(frames[None].to(device))
    prediction = model(data.normalize(clip), visible, masked)[0].float().unflatten(1, (-1, 3))  # (N_mask, p0 p1 p2, 3)
    cubes = to_cubes(target_frames / 255, objective.target.cube)[0]  # (N, p0 p1 p2, 3)
    index, has_target = objective.target_index(masked[0])
    index, prediction = index[has_target], prediction[has_target]

    def with_pixels(pixels: Tensor) -> Tensor:
        """Return the target with these pixels in its masked cubes."""
        changed = cubes.index_put((index,), pixels)[None]
        video = from_cubes(changed, objective.target.cube, target_frames.shape[-1])[0]
        return (video.clamp(0, 1) * 255).round().byte().cpu()

    views = {"original": with_pixels(cubes[index]), "masked": with_pixels(torch.full_like(prediction, 0.5))}
    if objective.normalize:
        mean, std = cube_statistics(cubes)  # (N, 1, 3)
        near_mean, near_std = estimate_statistics(mean, std, index, model.grid[1:])  # (N_mask, 1, 3)
        views["estimated"] = with_pixels(prediction * near_std + near_mean)
        views["oracle"] = with_pixels(prediction * std[index] + mean[index])
    else:
        views["reconstruction"] = with_pixels(prediction)
    return views


def draw(video: Path, number: int, config: SimpleNamespace, model: VideoMAE, ratios: list[float], path: Path) -> bool:
    """Draw the middle clip of a video, its central square, at each mask ratio. Return whether it could be read."""
    objective = Objective(config)
    try:
        frames = middle_clip(video, objective.target, config.data.size)  # (T', 3, H, W)
    except BrokenVideo as error:
        say(f"no picture of {error}")
        return False
    mask_function = pick(masking.MASKS, config.mask.type, "mask.type")
    rows = {}
    for ratio in ratios:
        mask = mask_function(model.grid, ratio, sample_generator(config.run.seed, -1, number))  # as FixedClips
        rows |= with_captions(reconstruct(model, objective, frames, mask), ratio)
    save_videos(rows, path)
    return True


def reconstruct_videos(arguments: argparse.Namespace) -> None:
    """Run `--reconstruct`: draw Figure 10 for any videos, with this project's or other pre-trained weights."""
    weights = arguments.weights
    videos = named_videos(arguments.reconstruct)
    if not weights:
        raise UserError("--reconstruct needs --weights FILE, such as runs/pretrain/toy/checkpoint.pt")
    config = stored_config(weights, DEFAULT, arguments.settings)
    clip_size = [config.data.frames, config.data.size, config.data.size]
    frames_per_token = Objective(config).target.cube[0]
    model = build_from_checkpoint(weights, VideoMAE, clip_size)
    if model.options["clip_size"] != clip_size or model.options["frames_per_token"] != frames_per_token:
        what = f"clips of {model.options['clip_size']} or another target than target.frames={config.target.frames}"
        raise UserError(f"{weights} was trained on {what}: leave data.frames, data.size and target.frames out")
    ratios = arguments.ratios or [config.mask.ratio]
    drawn = [draw(video, i, config, model, ratios, arguments.out / video.stem) for i, video in enumerate(videos)]
    if not all(drawn):
        raise UserError(f"{drawn.count(False)} of {len(drawn)} videos cannot be read; see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reconstruct", nargs="+", type=Path, metavar="VIDEO", help="draw reconstructions of videos, folders or lists")
    add("--weights", type=Path, help="pre-training checkpoint: this project's, official or Hugging Face's")
    add("--ratios", nargs="+", type=float, help="mask ratios to draw, such as Figure 10's 0.75 0.9 0.95")
    add("--out", type=Path, default=Path("runs/reconstructions"), help="folder of the pictures")
    arguments = parse(parser, DEFAULT)
    if arguments.weights and not arguments.reconstruct:
        raise UserError("--weights goes with --reconstruct; a run resumes from its own checkpoint by the same command")
    if arguments.reconstruct:
        reconstruct_videos(arguments)
    else:
        train(load_config(DEFAULT, arguments.settings))


if __name__ == "__main__":
    launch(main)
