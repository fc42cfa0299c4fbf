"""Time loading one pre-training sample (decode, crop, resize) against the authors' way: decord, and PIL per frame.

    pip install decord
    python -m tools.bench_loader VIDEO...

The sample is loaded from the video, from the file that `python -m tools.prepare` makes of it, and from the latter by a
loader's worker; then several clips of a video at once, against one at a time, and the 5 x 3 views of a test video,
decoded once, against 15 separate views. Ratios are medians of pairs, timed in turns.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
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
from support.config import UserError
from support.processes import launch
from support.seeds import sample_generator
from support.video import Video
from tools.bench_step import measure, require, speedup

SCALES = [1.0, 0.875, 0.75, 0.66]


def our_clips(path: Path, repeats: int = 1) -> data.PretrainingClips:
    options = dict(frames=16, stride=4, size=224, scales=SCALES, flip=False, seed=0, repeats=repeats)
    return data.PretrainingClips([path], draw_mask=lambda generator: torch.zeros(0, dtype=torch.bool), **options)


def our_views(path: Path) -> Tensor:
    options = dict(frames=16, stride=4, sampling="dense", size=224, clips=5, crops=3)
    return data.TestViews([path], **options)[0][1]  # uint8 (15, T, 3, 224, 224)


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
        images = [image.resize((224, 224), Image.BILINEAR) for image in images]
        stacked = numpy.concatenate(images, axis=2)  # Stack: (H, W, T * 3)
        clip = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)  # ToTorchFormatTensor
        mean, std = (torch.tensor(values * 16)[:, None, None] for values in (data.MEAN, data.STD))
        return clip.sub_(mean).div_(std).view(16, 3, 224, 224).transpose(0, 1)  # GroupNormalize; (3, T, H, W)


def authors_views(path: Path) -> Tensor:
    """Load each of the 15 views from the file again: every fourth frame, resized, then cut."""
    views = []
    for clip in range(5):
        for crop in range(3):
            reader = require("decord").VideoReader(str(path), num_threads=1)
            strided = list(range(0, len(reader), 4))
            strided += [strided[-1]] * (16 - len(strided))
            frames = reader.get_batch(strided).asnumpy()
            height, width = frames.shape[1:3]
            size = (width * 224 // min(height, width), height * 224 // min(height, width))
            images = [Image.fromarray(frame).resize(size, Image.BILINEAR) for frame in frames]
            start = clip * (len(strided) - 16) // 4
            stacked = numpy.stack([numpy.asarray(image) for image in images[start : start + 16]])  # (T, H, W, 3)
            axis = 2 if width >= height else 1
            first = int(crop * (stacked.shape[axis] - 224) / 2)
            view = torch.from_numpy(stacked.take(range(first, first + 224), axis=axis)).permute(3, 0, 1, 2).float()
            mean, std = (torch.tensor(values)[:, None, None, None] for values in (data.MEAN, data.STD))
            views.append(view.div_(255).sub_(mean).div_(std))  # (3, T, 224, 224)
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


def bench(path: Path, prepared: Path, rounds: int) -> None:
    """Print all comparisons for one video."""
    size = prepared.stat().st_size / path.stat().st_size
    quality = statistics.mean(psnr(path, prepared, seed) for seed in range(20))
    print(f"{path.name}, prepared: {size:.2f} times the size, PSNR of clips {quality:.1f} dB")
    original, encoded, authors = our_clips(path), our_clips(prepared), AuthorsClips(path)
    peer = "decord + PIL on the original"
    compare(f"{path.name}, a clip against {peer}", partial(samples, original), partial(samples, authors), rounds)
    compare(f"prepared, a clip against {peer}", partial(samples, encoded), partial(samples, authors), rounds)
    worker = partial(through_a_worker, encoded)
    compare(f"prepared, in a worker against {peer}", worker, partial(through_a_worker, authors), rounds // 4)
    for file, title in ((path, path.name), (prepared, "prepared")):
        for repeats in (2, 4):
            several = partial(through_a_worker, our_clips(file, repeats), repeats=repeats)
            once = partial(through_a_worker, our_clips(file))
            compare(f"{title}, in a worker: data.repeats={repeats} against 1", several, once, rounds // 4)
    views = partial(test_video, our_views, path), partial(test_video, authors_views, path)
    compare(f"{path.name}, 5 x 3 test views against 15 views one by one", *views, rounds // 8)


def psnr(original: Path, prepared: Path, seed: int) -> float:
    """Return the peak signal-to-noise ratio, in dB, of a clip of the prepared file against the original's."""
    clips, size = [], None
    for path in (prepared, original):
        generator = sample_generator(0, seed, 0)
        with Video(path) as video:
            frames = video.frames(data.dense_clip(len(video), 16, 4, generator))
        size = size or list(frames.shape[-2:])
        frames = data.TF.resize(frames, size, antialias=True)
        clips.append(data.resized_multi_scale_crop(frames, generator, 224, SCALES, False).float())
    return float(-10 * ((clips[0] - clips[1]) / 255).square().mean().log10())


def prepare(path: Path, folder: Path, short: int) -> Path:
    """Encode a video as a dataset's are."""
    source = folder / "original" / path.name
    source.parent.mkdir(parents=True)
    source.symlink_to(path.resolve())
    words = [f"data.root={source.parent}", "--to", str(folder / "prepared"), "--short", str(short), "--processes", "1"]
    done = subprocess.run([sys.executable, "-m", "tools.prepare", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{path} cannot be prepared: {(done.stderr + done.stdout).splitlines()[-1]}")
    return (folder / "prepared" / path.name).with_suffix(".mp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=20, help="pairs, of four samples each")
    parser.add_argument("--short", type=int, default=256, help="as for `python -m tools.prepare`")
    options = parser.parse_args()
    require("decord")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(options.videos):
            bench(path, prepare(path, Path(folder, str(number)), options.short), options.repeats)


if __name__ == "__main__":
    launch(main)
