"""From a video to a clip to a batch: temporal sampling (Sec. 3.3), crops and augmentation, datasets, batches.

All randomness of a sample is a function of (seed, epoch, index). So it does not depend on the number of processes or
loader workers, and a resumed run sees what it would have seen. For mixup, drop path and dropout see support/run.py.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms.v2 import functional as TF

from masking import split
from support.config import UserError
from support.processes import ignore_signals
from support.seeds import random_below, sample_generator
from support.video import BrokenVideo, Video

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
TRIES = 100  # videos in a row that may be unreadable before a run gives up

# ---- temporal sampling: which frames of a video are in a clip ----


def dense_clip(length: int, frames: int, stride: int, generator: Generator | None = None) -> list[int]:
    """Indices of `frames` frames, `stride` apart, from a random start (Sec. 3.3, "Temporal downsampling").

    Without a generator the clip is in the middle. A clip that runs past the end of the video starts at 0 and
    repeats the last index that it reaches.
    """
    spare = max(length - frames * stride, 0)
    start = random_below(spare + 1, generator) if generator else spare // 2
    return _clip_from(start, length, frames, stride)


def _clip_from(start: int, length: int, frames: int, stride: int) -> list[int]:
    last = start + (length - 1 - start) // stride * stride  # the authors' code never reaches length - 1
    return [min(start + i * stride, last) for i in range(frames)]


def repeated_clips(length: int, frames: int, stride: int, repeats: int, generator: Generator) -> list[list[int]]:
    """`repeats` clips of one video. The start of each is uniform, as in `dense_clip`, which gives the first.

    Starts are whole strides apart, so that clips that overlap share their frames: the same frames of the video are
    decoded for both. In exchange, the clips of one visit to a video are not independent.
    """
    clips = [dense_clip(length, frames, stride, generator)]
    phase = clips[0][0] % stride
    starts = range(phase, max(length - frames * stride, phase) + 1, stride)
    others = [starts[random_below(len(starts), generator)] for _ in range(repeats - 1)]
    return clips + [_clip_from(start, length, frames, stride) for start in others]


def dense_training_clip(length: int, frames: int, stride: int, generator: Generator) -> list[int]:
    """Dense sampling for fine-tuning on Kinetics, UCF101 and HMDB51, as the authors' code does it (after SlowFast).

    Indices spread evenly over a random span of frames * stride, both ends included: 16 frames with stride 4 are 64/15
    apart, not 4. The last one, just past the span, is clipped. A shorter video is taken whole, its last frame repeated.
    """
    span = frames * stride
    if length > span:
        end = span + random_below(length - span, generator)
        return [min(int(end - span + i * span / max(frames - 1, 1)), end - 1) for i in range(frames)]
    count = length // stride
    indices = [int(i * length / (count - 1)) if count > 1 else 0 for i in range(count)]
    return [min(index, length - 1) for index in indices + [length] * (frames - count)]


def uniform_training_clip(length: int, frames: int, stride: int, generator: Generator) -> list[int]:
    """TSN's uniform sampling (Something-Something): a random frame from each of `frames` equal parts; no stride."""
    part = length // frames
    if part == 0:  # here the authors' code repeats frame 0
        return [i * length // frames for i in range(frames)]
    return [i * part + random_below(part, generator) for i in range(frames)]


def dense_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """`clips` clips of frames exactly `stride` apart, from the first that fits to the last; a single one is central."""
    strided = list(range(0, length, stride))
    strided += [strided[-1]] * (frames - len(strided))
    spare = len(strided) - frames
    starts = [k * spare // (clips - 1) for k in range(clips)] if clips > 1 else [spare // 2]
    return [strided[start : start + frames] for start in starts]


def uniform_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """`clips` interleaved clips over the whole video; no stride. A single one takes the middle of each part."""
    part = length / frames
    offsets = [k * part / clips for k in range(clips)] if clips > 1 else [part / 2]  # the authors' code: [0]
    indices = sorted(int(offset + part * i) for offset in offsets for i in range(frames))
    return [indices[k::clips] for k in range(clips)]


# data.sampling: how clips are sampled for training and for testing
SAMPLING = {"dense": (dense_training_clip, dense_test_clips), "uniform": (uniform_training_clip, uniform_test_clips)}


# ---- crops and augmentation: which pixels ----


def test_crops(frames: Tensor, size: int, crops: int) -> Tensor:
    """`crops` windows along the longer side of frames (T, 3, H, W), whose shorter side is resized to `size`.

    They go from one end to the other; a single one is central. Returns (crops, T, 3, size, size).
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    # antialias=False, here and in finetune.Augmentation: as cv2 and F.interpolate resize in the authors' code
    frames = TF.resize(frames, [height * size // short, width * size // short], antialias=False)
    spare = max(frames.shape[-2:]) - size
    starts = [int(j * spare / (crops - 1)) for j in range(crops)] if crops > 1 else [spare // 2]
    return torch.stack([frames.narrow(-1 if width >= height else -2, start, size) for start in starts])


def multi_scale_crop(height: int, width: int, size: int, scales: list[float], generator: Generator) -> tuple[int, ...]:
    """MultiScaleCrop of TSN (Tables 9 and 11): a random crop (top, left, height, width), to be resized to size x size.

    Its sides are the video's shorter side times one of `scales`, the two at most one scale apart, in one of 13 places.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]  # no resizing by one or two pixels
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[random_below(len(pairs), generator)]
    step_y, step_x = (height - crop_height) // 4, (width - crop_width) // 4
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)]  # corners, middles of the edges, centre
    places += [(y, x) for y in (1, 3) for x in (1, 3)]  # half-way from the centre to each corner
    y, x = places[random_below(len(places), generator)]
    return y * step_y, x * step_x, crop_height, crop_width


def resized_multi_scale_crop(frames: Tensor, generator: Generator, size: int, scales: list, flip: bool) -> Tensor:
    """One MultiScaleCrop of all frames (T, 3, H, W), flipped half the time if `flip`. Returns (T, 3, size, size)."""
    box = multi_scale_crop(*frames.shape[-2:], size, scales, generator)
    clip = TF.resized_crop(frames, *box, [size, size], antialias=True)
    return (clip.flip(-1) if flip and random_below(2, generator) else clip).contiguous()


def center_crop(frames: Tensor, size: int) -> Tensor:
    """The largest central square of frames (T, 3, H, W), resized to size x size."""
    side = min(frames.shape[-2:])
    return TF.resize(TF.center_crop(frames, [side, side]), [size, size], antialias=True)


def normalize(clip: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 (B, T, 3, H, W), as the loader returns it, to the model's input: float (B, 3, T, H, W)."""
    mean, std = _statistics(clip.device, tuple(mean), tuple(std))
    return clip.transpose(1, 2).float().sub_(mean).div_(std)


@functools.cache  # copied to a GPU once: every copy would make the loop wait
def _statistics(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (mean, std))


# ---- datasets: from a video to a clip ----


@dataclass(eq=False)
class TrainingVideos(Dataset, ABC):
    """Samples by (epoch, index). The last item of each is a list of the broken videos that it replaces."""

    videos: list
    seed: int

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        generator = sample_generator(self.seed, epoch, index)
        broken = []
        while len(broken) < TRIES:
            try:
                return *self.sample(self.videos[index], generator), broken
            except BrokenVideo as error:
                broken.append(str(error))
                index = random_below(len(self), generator)
        advice = f"look at data.root and at the last one, {broken[-1]}"
        raise UserError(f"{TRIES} videos in a row could not be read; {advice}")

    @abstractmethod
    def sample(self, video: Any, generator: Generator) -> tuple:
        """A sample of one video. Raises BrokenVideo."""


@dataclass(eq=False, kw_only=True)
class PretrainingClips(TrainingVideos):
    """Random clips and masks: clip uint8 (T, 3, H, W), positions of visible (N_vis,) and masked (N_mask,) cubes.

    If `repeats` is above 1, all three have a first axis: clips of one video, opened and decoded once, each with
    its own start, crop and mask.
    """

    frames: int  # T
    stride: int
    size: int  # H = W
    scales: list[float]  # of multi_scale_crop
    flip: bool
    draw_mask: Callable[[Generator], Tensor]
    repeats: int = 1
    choose_reconstructed: Callable[..., Tensor] | None = None  # which masked ones: masking.running_cells

    def sample(self, video: Path, generator: Generator) -> tuple[Tensor, ...]:
        with Video(video) as opened:
            clips = repeated_clips(len(opened), self.frames, self.stride, self.repeats, generator)
            wanted = sorted({index for clip in clips for index in clip})
            frames = opened.frames(wanted)  # (len(wanted), 3, H_video, W_video)
        samples = []
        for indices in clips:
            clip = frames[[wanted.index(i) for i in indices]]  # (T, 3, H_video, W_video)
            clip = resized_multi_scale_crop(clip, generator, self.size, self.scales, self.flip)  # (T, 3, H, W)
            visible, masked = split(self.draw_mask(generator))
            if self.choose_reconstructed:
                masked = self.choose_reconstructed(masked, generator=generator)
            samples.append((clip, visible, masked))
        return tuple(map(torch.stack, zip(*samples, strict=True))) if self.repeats > 1 else samples[0]


@dataclass(eq=False, kw_only=True)
class LabelledClips(TrainingVideos):
    """Clips uint8 (repeats, T, 3, H, W) with their class, for videos [(path, class), ...].

    Repeated augmentation (Table 10): the same frames, decoded once, in `repeats` independent augmentations.
    """

    config: SimpleNamespace  # the group `data` of a configuration: frames, stride and sampling
    augment: Callable[[Tensor, Generator], Tensor]
    repeats: int = 1

    def sample(self, video: tuple[Path, int], generator: Generator) -> tuple[Tensor, Tensor]:
        path, label = video
        choose_frames, _ = SAMPLING[self.config.sampling]
        with Video(path) as opened:
            indices = choose_frames(len(opened), self.config.frames, self.config.stride, generator)
            frames = opened.frames(indices)  # (T, 3, H_video, W_video)
        return torch.stack([self.augment(frames, generator) for _ in range(self.repeats)]), torch.tensor(label)


@dataclass(eq=False)
class TestViews(Dataset):
    """Items (index, views, reason): all views of a video, uint8 (clips * crops, T, 3, H, W), or None and the reason.

    Every frame is decoded once. Nothing is random, and a broken video is not replaced.
    """

    videos: list[Path]
    frames: int
    stride: int
    sampling: str
    size: int
    clips: int
    crops: int

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        _, choose_frames = SAMPLING[self.sampling]
        try:
            with Video(self.videos[index]) as video:
                clips = choose_frames(len(video), self.frames, self.stride, self.clips)
                wanted = sorted({index for clip in clips for index in clip})
                crops = test_crops(video.frames(wanted), self.size, self.crops)  # (crops, len(wanted), 3, H, W)
        except BrokenVideo as error:
            return index, None, str(error)
        views = [crops[:, [wanted.index(i) for i in clip]] for clip in clips]  # clips times (crops, T, 3, H, W)
        return index, torch.cat(views), ""


# ---- batches ----


def collate(samples: list[tuple]) -> tuple:
    """Stack the tensors of samples; join the reports of broken videos, which come last.

    In a worker, default_collate stacks in shared memory. If that is full, this raises; torch.stack would wait forever.
    """
    *tensors, broken = zip(*samples, strict=True)
    return *(default_collate(column) for column in tensors), sum(broken, [])


def collate_views(items: list[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor | None, list]:
    """Indices and views (B, V, T, 3, H, W) of readable videos, None without any; (index, reason) of the others."""
    readable = [(index, views) for index, views, _ in items if views is not None]
    broken = [(index, reason) for index, views, reason in items if views is None]
    views = default_collate([views for _, views in readable]) if readable else None
    return [index for index, _ in readable], views, broken


def loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """A DataLoader with `workers` processes of its own, 0 for none; for a GPU, batches come in pinned memory."""
    ahead = dict(num_workers=workers, prefetch_factor=4) if workers else {}
    pinned = torch.cuda.is_available() or torch.xpu.is_available()
    return DataLoader(dataset, pin_memory=pinned, worker_init_fn=ignore_signals, **ahead, **options)


class GlobalBatches(Sampler):
    """This process's micro-batches of the remaining steps of a run: lists of (epoch, index).

    Every epoch is a new shuffle of the `length` videos, the last incomplete batch dropped. Which videos form a step's
    batch does not depend on the number of processes. run: a support.run.Run.
    """

    def __init__(self, length: int, run: Any) -> None:
        self.length, self.run = length, run

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        run, batch_size = self.run, self.run.batch_size
        for step in range(run.start, run.total):
            epoch, batch = divmod(step, self.length // batch_size)
            if batch == 0 or step == run.start:
                generator = sample_generator(run.config.run.seed, epoch, -1)
                shuffled = torch.randperm(self.length, generator=generator)
            mine = shuffled[batch * batch_size : (batch + 1) * batch_size][run.rank :: run.world_size]
            for indices in mine.split(run.per_device):
                yield [(epoch, index) for index in indices.tolist()]


def training_batches(videos: TrainingVideos, run: Any, collate_fn: Callable = collate) -> Iterator[tuple]:
    """The micro-batches of GlobalBatches, collated."""
    batches = GlobalBatches(len(videos), run)
    return iter(loader(videos, run.config.data.workers, batch_sampler=batches, collate_fn=collate_fn))
