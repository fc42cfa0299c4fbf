"""From video files to clips: exact frames, clip sampling (Sec. 3.3), MultiScaleCrop (Table 9), batches.

Everything random about a sample is a function of (seed, epoch, index) alone, so results depend neither on the number
of loader workers nor on the number of processes, and a resumed run sees what it would have seen.

    python -m support.datasets configs/finetune/ucf101_base.yaml data.root=/data/ucf101    # before days of training
    python -m support.prepare data.root=/data/ucf101 --to /data/ucf101_256              # encoded once: clips load many times as fast
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from masking import split
from support.config import UserError
from support.datasets import LabelledVideos
from support.run import pick_below, position, sample_generator
from support.video import BrokenVideo, Video

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
TRIES = 100  # videos in a row that may be unreadable before a run gives up


def dense_clip(length: int, frames: int, stride: int, generator: torch.Generator | None = None) -> list[int]:
    """Indices of `frames` frames, `stride` apart (Sec. 3.3, "Temporal downsampling"), from a uniformly random start.

    Without a generator the clip is the one in the middle. In a video of `length` < frames * stride it starts at 0 and
    repeats the last index that it reaches.
    """
    spare = max(length - frames * stride, 0)
    start = pick_below(spare + 1, generator) if generator else spare // 2
    last = start + (length - 1 - start) // stride * stride
    return [min(start + i * stride, last) for i in range(frames)]


def dense_training_clip(length: int, frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """Dense sampling for fine-tuning on Kinetics, UCF101 and HMDB51, as the authors' code does it (after SlowFast).

    `frames` indices spread evenly over a random stretch of frames * stride, from its first frame to its end: 16 frames
    with stride 4 are 64/15 apart, not 4. The last one, just past the stretch, is clipped. A shorter video is taken whole.
    """
    span = frames * stride
    if length > span:
        end = span + pick_below(length - span, generator)
        return [min(int(end - span + i * span / max(frames - 1, 1)), end - 1) for i in range(frames)]
    count = length // stride
    indices = [int(i * length / (count - 1)) if count > 1 else 0 for i in range(count)]
    return [min(index, length - 1) for index in indices + [length] * (frames - count)]


def uniform_training_clip(length: int, frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """TSN's uniform sampling (Something-Something): a random frame from each of `frames` equal parts; no stride."""
    part = length // frames
    if part == 0:  # here the authors' code takes frame 0 throughout
        return [i * length // frames for i in range(frames)]
    return [i * part + pick_below(part, generator) for i in range(frames)]


def dense_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """`clips` clips of frames exactly `stride` apart, from the first that fits to the last; one alone in the middle."""
    strided = list(range(0, length, stride))
    strided += [strided[-1]] * (frames - len(strided))
    spare = len(strided) - frames
    starts = [k * spare // (clips - 1) for k in range(clips)] if clips > 1 else [spare // 2]
    return [strided[start : start + frames] for start in starts]


def uniform_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """`clips` interleaved clips over the whole video; no stride. One alone takes the middle of each part."""
    tick = length / frames
    offsets = [k * tick / clips for k in range(clips)] if clips > 1 else [tick / 2]
    indices = sorted(int(offset + tick * i) for offset in offsets for i in range(frames))
    return [indices[k::clips] for k in range(clips)]


SAMPLING = {"dense": (dense_training_clip, dense_test_clips), "uniform": (uniform_training_clip, uniform_test_clips)}


def test_crops(frames: Tensor, size: int, crops: int) -> Tensor:
    """`crops` windows size x size along the longer side of frames (T, 3, H, W) with the shorter side resized to `size`.

    They go from one end to the other, one alone stands in the middle. Returns (crops, T, 3, size, size).
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    frames = TF.resize(frames, [height * size // short, width * size // short], antialias=True)
    long = max(frames.shape[-2:])
    starts = [int(j * (long - size) / (crops - 1)) for j in range(crops)] if crops > 1 else [(long - size) // 2]
    return torch.stack([frames.narrow(-1 if width >= height else -2, start, size) for start in starts])


def multi_scale_crop(
    height: int, width: int, size: int, scales: list[float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """MultiScaleCrop of TSN (Tables 9 and 11): a random crop as (top, left, height, width), to be resized to size x size.

    Side lengths are the shorter side times one of `scales`, the two at most one scale apart; the place is one of 13.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]  # no resizing by one or two pixels
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[pick_below(len(pairs), generator)]
    step_y, step_x = (height - crop_height) // 4, (width - crop_width) // 4
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)]  # corners, middles of the edges, centre
    places += [(y, x) for y in (1, 3) for x in (1, 3)]  # half-way from the centre to each corner
    y, x = places[pick_below(len(places), generator)]
    return y * step_y, x * step_x, crop_height, crop_width


def resized_multi_scale_crop(frames: Tensor, generator: torch.Generator, size: int, scales: list[float], flip: bool) -> Tensor:
    """One MultiScaleCrop for all frames (T, 3, H_video, W_video), and a flip in half of the cases: (T, 3, size, size)."""
    top, left, height, width = multi_scale_crop(*frames.shape[-2:], size, scales, generator)
    clip = TF.resized_crop(frames, top, left, height, width, [size, size], antialias=True)
    return (clip.flip(-1) if flip and pick_below(2, generator) else clip).contiguous()


def center_crop(frames: Tensor, size: int) -> Tensor:
    """The largest central square of frames (T, 3, H, W), resized to size x size."""
    side = min(frames.shape[-2:])
    return TF.resize(TF.center_crop(frames, [side, side]), [size, size], antialias=True)


class Augmentation:
    """RandAugment, random resized crop, flip, erasing: what fine-tuning does to a clip (Table 10, order of the authors' code).

    randaugment: number of operations, magnitude (of 10), its standard deviation; each operation is done half the time.
    Each choice holds for all frames of the clip. Called with frames uint8 (T, 3, H, W) it returns uint8 (T, 3, size, size).
    """

    def __init__(
        self, *, size: int, randaugment: tuple[int, float, float], area: tuple[float, float], aspect: tuple[float, float],
        flip: bool, erase: float
    ) -> None:  # fmt: skip
        self.operations, self.magnitude, self.deviation = randaugment
        self.crop = v2.RandomResizedCrop(size, area, aspect, antialias=True)
        self.flip = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.erase = erase

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's global source of randomness
            torch.manual_seed(pick_below(2**62, generator))
            clip = tv_tensors.Video(frames)
            for _ in range(int(self.operations)):
                if torch.rand(()) < 0.5:
                    level = (self.magnitude + self.deviation * torch.randn(())).clamp(0, 10)
                    magnitude = round(float(level) * 3)  # torchvision counts to 30
                    mean_colour = [int(255 * mean) for mean in MEAN]
                    clip = v2.RandAugment(1, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=mean_colour)(clip)
            clip = self.flip(self.crop(clip)).as_subclass(Tensor).contiguous()  # (T, 3, size, size)
            if torch.rand(()) < self.erase:
                clip = clip.clone()  # a crop that changes nothing returns the decoded frames, which other repeats use too
                top, left, height, width, _ = v2.RandomErasing.get_params(clip[0].float(), (0.02, 1 / 3), (0.3, 10 / 3), [0.0])
                noise = torch.randn(len(clip), 3, height, width) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
                clip[:, :, top : top + height, left : left + width] = noise.mul(255).clamp(0, 255).byte()
        return clip


def normalize(clip: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 (B, T, 3, H, W), as the loader hands it over, to the model's input: float (B, 3, T, H, W)."""
    mean, std = _statistics(clip.device, tuple(mean), tuple(std))
    return clip.transpose(1, 2).float().sub_(mean).div_(std)


@functools.cache  # copied to a GPU once: every copy would make the loop wait
def _statistics(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (mean, std))


# ---- datasets and batches ----


class TrainingVideos(Dataset, ABC):
    """Samples by (epoch, index). A broken video is replaced by another one, chosen by the sample's own generator.

    A sample is what `sample` makes of a video, followed by a list with the reasons why others could not be read.
    """

    def __init__(self, videos: list, seed: int) -> None:
        self.videos, self.seed = videos, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        generator = sample_generator(self.seed, epoch, index)
        broken = []
        while True:
            try:
                return *self.sample(self.videos[index], generator), broken
            except BrokenVideo as error:
                broken.append(str(error))
                if len(broken) == TRIES:
                    raise UserError(f"{TRIES} videos in a row could not be read; look at data.root and at the last one, {error}") from None
                index = pick_below(len(self), generator)

    @abstractmethod
    def sample(self, video: Any, generator: torch.Generator) -> tuple:
        """What a batch takes of one video. Raises BrokenVideo."""


class PretrainingClips(TrainingVideos):
    """Random clips and their masks: clip uint8 (T, 3, H, W), positions of visible (N_vis,) and masked (N_mask,) cubes."""

    def __init__(
        self, videos: list[Path], *, frames: int, stride: int, size: int, scales: list[float], flip: bool,
        draw_mask: Callable[[torch.Generator], Tensor], seed: int
    ) -> None:  # fmt: skip
        super().__init__(videos, seed)
        self.frames, self.stride, self.size, self.scales, self.flip, self.draw_mask = frames, stride, size, scales, flip, draw_mask

    def sample(self, video: Path, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        with Video(video) as opened:
            frames = opened.frames(dense_clip(len(opened), self.frames, self.stride, generator))  # (T, 3, H_video, W_video)
        clip = resized_multi_scale_crop(frames, generator, self.size, self.scales, self.flip)  # (T, 3, H, W)
        return clip, *split(self.draw_mask(generator))


class LabelledClips(TrainingVideos):
    """Clips with their class: uint8 (repeats, T, 3, H, W) and a number.

    Repeated augmentation (Table 10): the same frames, decoded once, in `repeats` independent augmentations.
    """

    def __init__(
        self, videos: LabelledVideos, *, frames: int, stride: int, sampling: str,
        augment: Callable[[Tensor, torch.Generator], Tensor], repeats: int, seed: int
    ) -> None:  # fmt: skip
        super().__init__(videos, seed)
        self.frames, self.stride, self.augment, self.repeats = frames, stride, augment, repeats
        self.choose_frames = SAMPLING[sampling][0]

    def sample(self, video: tuple[Path, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        path, label = video
        with Video(path) as opened:
            frames = opened.frames(self.choose_frames(len(opened), self.frames, self.stride, generator))  # (T, 3, H_video, W_video)
        return torch.stack([self.augment(frames, generator) for _ in range(self.repeats)]), torch.tensor(label)


class TestViews(Dataset):
    """Items (index, views, reason): all views of a video, uint8 (clips * crops, T, 3, H, W), or None and why there are none.

    Every frame is decoded once. Nothing is random, and no other video stands in for one that cannot be read.
    """

    def __init__(self, videos: list[Path], *, frames: int, stride: int, sampling: str, size: int, clips: int, crops: int) -> None:
        self.videos, self.frames, self.stride, self.size = videos, frames, stride, size
        self.clips, self.crops, self.choose_frames = clips, crops, SAMPLING[sampling][1]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            with Video(self.videos[index]) as video:
                clips = self.choose_frames(len(video), self.frames, self.stride, self.clips)
                wanted = sorted(set(sum(clips, [])))
                crops = test_crops(video.frames(wanted), self.size, self.crops)  # (crops, len(wanted), 3, H, W)
        except BrokenVideo as error:
            return index, None, str(error)
        place = {frame: number for number, frame in enumerate(wanted)}
        views = [crops[:, [place[frame] for frame in clip]] for clip in clips]  # clips times (crops, T, 3, H, W)
        return index, torch.cat(views), ""


def collate_views(items: list[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    """Indices and views (B, V, T, 3, H, W) of the readable videos, None without any; indices and reasons of the others."""
    indices = [index for index, views, _ in items if views is not None]
    readable = [views for _, views, _ in items if views is not None]
    broken = [(index, reason) for index, views, reason in items if views is None]
    return indices, torch.stack(readable) if readable else None, broken


def collate(samples: list[tuple]) -> tuple:
    """Stack the tensors of samples; join the reports of broken videos, which come last."""
    *tensors, broken = zip(*samples)
    return *(torch.stack(column) for column in tensors), sum(broken, [])


def loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """A DataLoader with `workers` processes beside this one, 0 for none; for a GPU, batches come in pinned memory."""
    ahead = dict(num_workers=workers, prefetch_factor=4) if workers else {}
    return DataLoader(dataset, pin_memory=torch.cuda.is_available(), **ahead, **options)


class GlobalBatches(Sampler):
    """One process's share of every global batch, in pieces of `per_device` clips, as lists of (epoch, index).

    Every epoch is a new shuffle of the videos, the last incomplete batch dropped. Which videos form the batch of a step
    does not depend on the number of processes. Begins at `start`, the step at which a run resumes, ends before `steps`.
    """

    def __init__(
        self, *, length: int, batch_size: int, per_device: int, rank: int, world_size: int, seed: int, start: int, steps: int
    ) -> None:  # fmt: skip
        self.length, self.batch_size, self.per_device, self.seed = length, batch_size, per_device, seed
        self.rank, self.world_size, self.start, self.steps = rank, world_size, start, steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.length // self.batch_size
        shuffled = None
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or shuffled is None:
                shuffled = torch.randperm(self.length, generator=sample_generator(self.seed, epoch, -1)).tolist()
            mine = shuffled[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]
            for piece in range(0, len(mine), self.per_device):
                yield [(epoch, index) for index in mine[piece : piece + self.per_device]]

    def __len__(self) -> int:
        return (self.steps - self.start) * self.batch_size // (self.world_size * self.per_device)


def training_batches(
    videos: TrainingVideos, workers: int, *, batch_size: int, per_device: int, start: int, steps: int, collate_fn: Callable = collate
) -> Iterator[tuple]:
    """This process's batches of all steps from `start` on, in pieces of `per_device` samples: see GlobalBatches."""
    rank, world_size = position()
    share = GlobalBatches(
        length=len(videos), batch_size=batch_size, per_device=per_device, rank=rank, world_size=world_size,
        seed=videos.seed, start=start, steps=steps
    )  # fmt: skip
    return iter(loader(videos, workers, batch_sampler=share, collate_fn=collate_fn))
