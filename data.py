"""From a video to a clip to a batch: temporal sampling (Sec. 3.3), crops, datasets, batches.

All randomness of a sample is a function of (seed, epoch, index). It does not depend on the number of processes or
loader workers, and a resumed run sees what it would have seen (support/seeds.py).
"""

import functools
import sys
import time
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
from tqdm import tqdm

from masking import split
from support.config import UserError
from support.processes import Processes, ignore_signals, loader_workers
from support.seeds import random_below, sample_generator
from support.video import BrokenVideo, Video

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
TRIES = 100  # give up after this many unreadable videos in a row

# ---- temporal sampling: which frames of a video are in a clip ----


def dense_clip(length: int, frames: int, stride: int, generator: Generator | None = None) -> list[int]:
    """Return the indices of `frames` frames, `stride` apart, from a random start (Sec. 3.3, "Temporal downsampling").

    Without a generator the clip is in the middle. In a video that is too short it starts at 0.
    """
    spare = max(length - frames * stride, 0)
    start = random_below(spare + 1, generator) if generator else spare // 2
    return _strided(start, length, frames, stride)


def repeated_clips(length: int, frames: int, stride: int, repeats: int, generator: Generator) -> list[list[int]]:
    """Sample `repeats` clips of one video, the first by `dense_clip`.

    The others start whole strides away from it, so that clips that overlap share their frames: these are decoded once.
    Each start is uniform, but the clips are not independent.
    """
    first = dense_clip(length, frames, stride, generator)
    starts = range(first[0] % stride, max(length - frames * stride, 0) + 1, stride)
    clips = [first]
    for _ in range(repeats - 1):
        start = starts[random_below(len(starts), generator)]
        clips.append(_strided(start, length, frames, stride))
    return clips


def dense_training_clip(length: int, frames: int, stride: int, generator: Generator) -> list[int]:
    """Sample densely for fine-tuning on Kinetics, UCF101 and HMDB51, as the authors' code does (after SlowFast).

    The indices are spread evenly over a random span of frames * stride: with 16 frames and stride 4 they are 64/15
    apart, not 4. A video shorter than the span is taken whole, and its last frame repeated.
    """
    span = frames * stride
    if length > span:
        start = random_below(length - span, generator)
        return [start + offset for offset in _spread(span, frames)]
    count = length // stride
    return _spread(length, count) + [length - 1] * (frames - count)


def uniform_training_clip(length: int, frames: int, stride: int, generator: Generator) -> list[int]:
    """Sample a random frame from each of `frames` equal parts: TSN's uniform sampling (Something-Something)."""
    part = length // frames
    if part == 0:  # here the authors' code repeats frame 0
        return [i * length // frames for i in range(frames)]
    return [i * part + random_below(part, generator) for i in range(frames)]


def dense_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """Return `clips` clips of frames exactly `stride` apart, from the first that fits to the last that fits."""
    last = max((length - 1) // stride - (frames - 1), 0)  # start of the last clip, in strides
    return [_strided(start * stride, length, frames, stride) for start in _starts(last, clips)]


def uniform_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """Return `clips` interleaved clips over the whole video. A single one takes the middle of each part."""
    part = length / frames
    offsets = [k * part / clips for k in range(clips)]
    if clips == 1:
        offsets = [part / 2]  # the authors' code: [0]
    indices = sorted(int(offset + part * i) for offset in offsets for i in range(frames))
    return [indices[k::clips] for k in range(clips)]


def _strided(start: int, length: int, frames: int, stride: int) -> list[int]:
    """Return indices from `start` on, `stride` apart. If the video is too short, the last index is repeated."""
    indices = list(range(start, length, stride))[:frames]  # the authors' code leaves out a video's last frame
    return indices + [indices[-1]] * (frames - len(indices))


def _spread(length: int, count: int) -> list[int]:
    """Spread `count` indices evenly from 0 to `length`, which is clipped to length - 1."""
    return [min(i * length // max(count - 1, 1), length - 1) for i in range(count)]


def _starts(last: int, count: int) -> list[int]:
    """Spread `count` starts evenly from 0 to `last`. A single one is central."""
    if count == 1:
        return [last // 2]
    return [i * last // (count - 1) for i in range(count)]


# data.sampling: how clips are sampled for training and for tests
SAMPLING = {"dense": (dense_training_clip, dense_test_clips), "uniform": (uniform_training_clip, uniform_test_clips)}


# ---- crops: which pixels of a frame ----


def crop_views(frames: Tensor, size: int, crops: int) -> Tensor:
    """Crop `crops` windows along the longer side of frames (T, 3, H, W), whose shorter side is resized to `size`.

    They go from one end to the other; a single one is central. Returns (crops, T, 3, size, size).
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    # antialias=False, here and in finetune.Augmentation: as cv2 and F.interpolate resize in the authors' code
    frames = TF.resize(frames, [height * size // short, width * size // short], antialias=False)  # (T, 3, H', W')
    long_side = -1 if width >= height else -2
    starts = _starts(frames.shape[long_side] - size, crops)
    return torch.stack([frames.narrow(long_side, start, size) for start in starts])


def multi_scale_crop(height: int, width: int, size: int, scales: list[float], generator: Generator) -> tuple[int, ...]:
    """Sample a crop (top, left, height, width) by TSN's MultiScaleCrop (Tables 9 and 11), to be resized to size x size.

    Its sides are the video's shorter side times one of `scales`, the two at most one scale apart, in one of 13 places.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]  # no resizing by one or two pixels
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[random_below(len(pairs), generator)]
    step_y, step_x = (height - crop_height) // 4, (width - crop_width) // 4
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)]  # corners, middles of the edges, center
    places += [(y, x) for y in (1, 3) for x in (1, 3)]  # half-way from the center to each corner
    y, x = places[random_below(len(places), generator)]
    return y * step_y, x * step_x, crop_height, crop_width


def resized_multi_scale_crop(frames: Tensor, generator: Generator, size: int, scales: list, flip: bool) -> Tensor:
    """Crop frames (T, 3, H, W) by one MultiScaleCrop; if `flip`, flip half of the clips. Returns (T, 3, size, size)."""
    box = multi_scale_crop(*frames.shape[-2:], size, scales, generator)
    clip = TF.resized_crop(frames, *box, [size, size], antialias=True)
    if flip and random_below(2, generator):
        clip = clip.flip(-1)
    return clip.contiguous()


def center_crop(frames: Tensor, size: int) -> Tensor:
    """Crop the largest central square of frames (T, 3, H, W) and resize it to size x size."""
    side = min(frames.shape[-2:])
    return TF.resize(TF.center_crop(frames, [side, side]), [size, size], antialias=True)


def normalize(clip: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Turn the loader's uint8 (B, T, 3, H, W) into the model's input: float (B, 3, T, H, W). Not target.normalize."""
    mean, std = _statistics(clip.device, tuple(mean), tuple(std))
    return clip.transpose(1, 2).float().sub_(mean).div_(std)


@functools.cache  # cached on the GPU: a copy for each batch would synchronize
def _statistics(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (mean, std))


# ---- datasets: from a video to a clip ----


@dataclass(eq=False)
class TrainingVideos(Dataset, ABC):
    """Samples by (epoch, index). The last item of each is a list of the broken videos that it replaces.

    A subclass says what a sample of one video is.
    """

    videos: list  # or key frames: what `sample` takes
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
        """Return a sample of one video. Raises BrokenVideo."""


@dataclass(eq=False, kw_only=True)
class PretrainingClips(TrainingVideos):
    """Random clips uint8 (R, T', 3, H, W), positions of visible cubes (R, N_vis) and of those to predict (R, N_mask).

    R = `repeats` clips are taken from each video that is opened, each with its own start, crop and mask.
    """

    frames: int  # T': T, or 2 T if target.frames=double
    stride: int
    size: int  # H = W
    scales: list[float]  # of multi_scale_crop
    flip: bool
    sample_mask: Callable[[Generator], Tensor]  # (N,), by one of masking.MASKS
    repeats: int = 1
    choose_reconstructed: Callable[..., Tensor] | None = None  # from the masked cubes: masking.running_cells

    def sample(self, video: Path, generator: Generator) -> tuple[Tensor, ...]:
        with Video(video) as opened:
            clips = repeated_clips(len(opened), self.frames, self.stride, self.repeats, generator)
            numbers, places = torch.unique(torch.tensor(clips), return_inverse=True)  # (F,), (R, T')
            frames = opened.frames(numbers.tolist())  # (F, 3, H_video, W_video)
        samples = []
        for clip in frames[places]:  # (T', 3, H_video, W_video)
            clip = resized_multi_scale_crop(clip, generator, self.size, self.scales, self.flip)  # (T', 3, H, W)
            visible, masked = split(self.sample_mask(generator))
            if self.choose_reconstructed:
                masked = self.choose_reconstructed(masked, generator=generator)
            samples.append((clip, visible, masked))
        return tuple(torch.stack(column) for column in zip(*samples, strict=True))


@dataclass(eq=False, kw_only=True)
class LabelledClips(TrainingVideos):
    """Clips uint8 (R, T, 3, H, W) with their class, for videos [(path, class), ...].

    Repeated augmentation (Table 10): the same frames, decoded once, in R = `repeats` independent augmentations.
    """

    data_config: SimpleNamespace  # the group `data` of a configuration: frames, stride and sampling
    augment: Callable[[Tensor, Generator], Tensor]
    repeats: int = 1

    def sample(self, video: tuple[Path, int], generator: Generator) -> tuple[Tensor, Tensor]:
        path, label = video
        sample_clip, _ = SAMPLING[self.data_config.sampling]
        with Video(path) as opened:
            indices = sample_clip(len(opened), self.data_config.frames, self.data_config.stride, generator)
            frames = opened.frames(indices)  # (T, 3, H_video, W_video)
        clips = torch.stack([self.augment(frames, generator) for _ in range(self.repeats)])
        return clips, torch.tensor(label)


@dataclass(eq=False)
class TestViews(Dataset):
    """All views of a video for a test: items (index, views, reason) with views uint8 (clips * crops, T, 3, H, W).

    For a broken video views is None, and reason says why. Every frame is decoded once; nothing is random.
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
        _, test_clips = SAMPLING[self.sampling]
        try:
            with Video(self.videos[index]) as video:
                clips = test_clips(len(video), self.frames, self.stride, self.clips)
                numbers, places = torch.unique(torch.tensor(clips), return_inverse=True)  # (F,), (clips, T)
                frames = video.frames(numbers.tolist())  # (F, 3, H_video, W_video)
        except BrokenVideo as error:
            return index, None, str(error)
        crops = crop_views(frames, self.size, self.crops)  # (crops, F, 3, H, W)
        views = torch.cat([crops[:, place] for place in places])  # (clips * crops, T, 3, H, W)
        return index, views, ""


# ---- batches ----


def collate(samples: list[tuple]) -> tuple:
    """Stack the tensors of samples; join the reports of broken videos, which come last.

    In a worker, default_collate stacks in shared memory. If that is full, this raises; torch.stack would wait forever.
    """
    *tensors, broken = zip(*samples, strict=True)
    return *(default_collate(column) for column in tensors), sum(broken, [])


def collate_views(items: list[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor | None, list]:
    """Return indices and views (B, V, T, 3, H, W) of readable videos, None without any; (index, reason) of others."""
    readable = [(index, views) for index, views, _ in items if views is not None]
    broken = [(index, reason) for index, views, reason in items if views is None]
    views = default_collate([views for _, views in readable]) if readable else None
    return [index for index, _ in readable], views, broken


def loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """Return a DataLoader with as many processes as data.workers says; it pins memory if there is a GPU."""
    pinned = torch.cuda.is_available() or torch.xpu.is_available()
    workers = loader_workers(workers)
    return DataLoader(dataset, num_workers=workers, pin_memory=pinned, worker_init_fn=ignore_signals, **options)


@dataclass(eq=False)
class MicroBatchSampler(Sampler):
    """Each step's batch is chosen for all processes; this one yields every world_size-th video of it, in micro-batches.

    A micro-batch is a list of (epoch, index). Every epoch is a new shuffle of the `length` videos, the last incomplete
    batch dropped. A step's batch does not depend on the number of processes, nor on the step at which a run resumes.
    """

    length: int
    batch: int  # videos of a step, of all processes
    micro_batch: int
    steps: range
    processes: Processes
    seed: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            epoch, place = divmod(step, self.length // self.batch)
            if place == 0 or step == self.steps.start:
                shuffled = torch.randperm(self.length, generator=sample_generator(self.seed, epoch, -1))
            whole = shuffled[place * self.batch : (place + 1) * self.batch]
            shard = whole[self.processes.rank :: self.processes.world_size]
            for indices in shard.split(self.micro_batch):
                yield [(epoch, index) for index in indices.tolist()]


class Batches:
    """An iterator over micro-batches, which counts how long loading makes the loop wait.

    Broken videos, which are replaced by others, are printed and listed in `folder`/broken_videos.txt.
    """

    def __init__(
        self, clips: TrainingVideos, sampler: Sampler, workers: int, folder: Path, collate_fn: Callable = collate
    ) -> None:
        self.batches = iter(loader(clips, workers, batch_sampler=sampler, collate_fn=collate_fn))
        self.file = folder / "broken_videos.txt"
        self.waited = 0.0  # seconds

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self

    def __next__(self) -> list[Tensor]:
        began = time.perf_counter()
        *tensors, broken = next(self.batches)
        self.waited += time.perf_counter() - began
        if broken:
            note_broken(self.file, broken)
        return tensors


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return `count` numbers below `length`, or all if they are fewer: which videos to validate with, or to draw."""
    return torch.linspace(0, length - 1, min(count, length)).long().tolist()


def note_broken(file: Path, sentences: list[str]) -> None:
    """Print the sentences on broken videos that `file` does not have yet, and append them."""
    known = set(file.read_text("utf-8", "surrogateescape").splitlines()) if file.exists() else set()
    for sentence in dict.fromkeys(sentences):
        if sentence not in known:
            tqdm.write(f"replaced by another video: {sentence}", file=sys.stderr)
            file.parent.mkdir(parents=True, exist_ok=True)  # rank 0 makes it, perhaps on another machine
            with open(file, "a", encoding="utf-8", errors="surrogateescape") as opened:
                opened.write(f"{sentence}\n")
