"""Time loading one pre-training sample (decode, crop, resize) against the authors' way: decord, and PIL per frame.

    pip install decord
    python -m tools.bench_loader VIDEO
    python -m tools.bench_loader VIDEO PREPARED     # also the file that `python -m tools.prepare` makes of it

The authors' way always reads VIDEO. Then several clips of a video at once, against one at a time, and the 5 x 3 views
of a test video, decoded once, against 15 separate views. Ratios are medians of pairs, timed in turns.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import data
from support.processes import launch
from support.seeds import sample_generator
from tools.bench_step import measure, require, speedup

SCALES = [1.0, 0.875, 0.75, 0.66]


def our_clips(path: Path, repeats: int = 1) -> data.PretrainingClips:
    options = dict(frames=16, stride=4, size=224, scales=SCALES, flip=False, seed=0, repeats=repeats)
    return data.PretrainingClips([path], sample_mask=lambda generator: torch.zeros(0, dtype=torch.bool), **options)


def our_views(path: Path) -> Tensor:
    options = dict(frames=16, stride=4, sampling="dense", size=224, clips=5, crops=3)
    return data.TestViews([path], **options)[0][1]  # uint8 (15, T, 3, 224, 224)


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Stack, ToTorchFormatTensor and GroupNormalize of the authors: (3, T, H, W)."""
    stacked = numpy.concatenate(images, axis=2)  # (H, W, T * 3)
    clip = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values * len(images))[:, None, None] for values in (data.MEAN, data.STD))
    return clip.sub_(mean).div_(std).unflatten(0, (len(images), 3)).transpose(0, 1)


class AuthorsClips(Dataset):
    """The authors' pre-training samples, with the keys, frames and crops of data.PretrainingClips."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        generator = sample_generator(0, *key)
        reader = require("decord").VideoReader(str(self.path), num_threads=1)
        indices = data.dense_clip(len(reader), 16, 4, generator)
        images = [Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()]
        top, left, height, width = data.multi_scale_crop(images[0].height, images[0].width, 224, SCALES, generator)
        images = [image.crop((left, top, left + width, top + height)) for image in images]  # GroupMultiScaleCrop
        return to_tensor([image.resize((224, 224), Image.BILINEAR) for image in images])


def authors_views(path: Path) -> Tensor:
    """Load each of the 15 views from the file again: every fourth frame, resized, then cut."""
    views = []
    for clip, crop in itertools.product(range(5), range(3)):
        reader = require("decord").VideoReader(str(path), num_threads=1)
        strided = list(range(0, len(reader), 4))
        strided += [strided[-1]] * (16 - len(strided))
        images = [Image.fromarray(frame) for frame in reader.get_batch(strided).asnumpy()]
        images = [data.TF.resize(image, 224) for image in images]
        start = clip * (len(strided) - 16) // 4
        images = images[start : start + 16]
        left, top = ((side - 224) * crop // 2 for side in images[0].size)
        views.append(to_tensor([image.crop((left, top, left + 224, top + 224)) for image in images]))
    return torch.stack(views)


# ---- what is measured: functions of a round's number that return the seconds of a clip or a test video ----


def samples(dataset: Dataset, number: int) -> float:
    """Load four clips after one that does not count: in training a loader finds the caches as it left them."""
    dataset[4 * number, 0]
    start = time.perf_counter()
    for epoch in range(4 * number, 4 * number + 4):
        dataset[epoch, 0]
    return (time.perf_counter() - start) / 4


def through_a_worker(dataset: Dataset, number: int, repeats: int = 1) -> float:
    """Load six batches of four clips by a worker process, after a first one: without its start."""
    videos = 4 // repeats  # in a batch
    keys = [[(28 * number + 4 * batch + place, 0) for place in range(videos)] for batch in range(7)]
    batches = iter(data.loader(dataset, 1, batch_sampler=keys))
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return (time.perf_counter() - start) / 24


def test_video(views: Callable[[Path], Tensor], path: Path, number: int) -> float:
    start = time.perf_counter()
    views(path)
    return time.perf_counter() - start


def compare(title: str, way: Callable[[int], float], other: Callable[[int], float], rounds: int) -> None:
    seconds = measure({"way": way, "other": other}, max(2, rounds))
    first, second = (1000 * statistics.median(times) for times in seconds.values())
    print(f"{title}: {speedup(seconds, 'way', 'other')} times as fast; {first:.1f} against {second:.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("prepared", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=20, help="pairs, of four samples each")
    options = parser.parse_args()
    require("decord")
    torch.set_num_threads(1)
    authors, pairs = AuthorsClips(options.video), options.repeats
    for path in filter(None, (options.video, options.prepared)):
        clips = our_clips(path)
        compare(f"{path}, a clip against decord + PIL", partial(samples, clips), partial(samples, authors), pairs)
        once, peer = partial(through_a_worker, clips), partial(through_a_worker, authors)
        compare(f"{path}, in a worker against decord + PIL", once, peer, pairs // 4)
        for repeats in (2, 4):
            more = partial(through_a_worker, our_clips(path, repeats), repeats=repeats)
            compare(f"{path}, in a worker: data.repeats={repeats} against 1", more, once, pairs // 4)
    views = partial(test_video, our_views, options.video), partial(test_video, authors_views, options.video)
    compare(f"{options.video}, 5 x 3 test views against 15 views one by one", *views, pairs // 8)


if __name__ == "__main__":
    launch(main)
