"""One pre-training sample (decode, crop, resize) against decord with PIL per frame, as the authors' code loads it.

    pip install decord
    python tests/benchmarks/bench_loader.py VIDEO...          # without a video: one with B-frames is made on the spot

From the same file; from the file that `python -m tools.prepare` makes of it; the latter through a DataLoader worker.
And the 5 x 3 views of one test video, decoded once, against 15 separate views, as the authors' code loads them.

Interleaved; the ratio is the median over pairs. This project's frames are compared with those of decoding everything,
and a clip of the prepared file with the same clip of the original.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy
import torch
from interleaved import measure, quartiles, ratios
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

import data
import support.video
import tools.prepare
from support.seeds import sample_generator

SCALES = [1.0, 0.875, 0.75, 0.66]


def official(path: str, seed: int) -> Tensor:
    """The authors' loading, written out: decord, PIL crop and resize of each frame, stack, to float, normalize."""
    import decord

    generator = sample_generator(0, seed, 0)  # the same frames and crop as ours
    reader = decord.VideoReader(path, num_threads=1)
    indices = data.dense_clip(len(reader), 16, 4, generator)
    frames = reader.get_batch(indices).asnumpy()
    images = [Image.fromarray(frame).convert("RGB") for frame in frames]
    top, left, height, width = data.multi_scale_crop(images[0].height, images[0].width, 224, SCALES, generator)
    images = [image.crop((left, top, left + width, top + height)) for image in images]  # GroupMultiScaleCrop
    images = [image.resize((224, 224), Image.BILINEAR) for image in images]
    stacked = numpy.concatenate(images, axis=2)  # Stack: (H, W, T * 3)
    clip = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)  # ToTorchFormatTensor
    mean, std = (torch.tensor(values * 16)[:, None, None] for values in (data.MEAN, data.STD))
    return clip.sub_(mean).div_(std).view(16, 3, 224, 224).transpose(0, 1)  # GroupNormalize; (3, T, H, W)


def ours(path: str, seed: int) -> Tensor:
    return clips_of(path)[seed, 0][0]  # uint8 (T, 3, H, W): normalized on the device


def clips_of(path: str, repeats: int = 1) -> data.PretrainingClips:
    options = dict(frames=16, stride=4, size=224, scales=SCALES, flip=False, draw_mask=no_mask, seed=0)
    options |= dict(repeats=repeats)
    return data.PretrainingClips([Path(path)], **options)


def no_mask(generator: torch.Generator) -> Tensor:
    return torch.zeros(0, dtype=torch.bool)


def all_views(path: str, number: int) -> Tensor:
    options = dict(frames=16, stride=4, sampling="dense", size=224, clips=5, crops=3)
    return data.TestViews([Path(path)], **options)[0][1]  # uint8 (15, T, 3, 224, 224)


def separate_views(path: str, number: int) -> Tensor:
    """Each of the 15 views from the file again, as in the authors' test set: every fourth frame, resized, then cut."""
    import decord

    views = []
    for clip in range(5):
        for crop in range(3):
            reader = decord.VideoReader(path, num_threads=1)
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


class OfficialClips(Dataset):
    """The authors' samples for a DataLoader, with the keys of data.PretrainingClips."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return official(self.path, key[0])


def through_a_worker(dataset: Dataset, number: int, repeats: int = 1) -> float:
    """Seconds in which a worker process loads 6 batches of 4 clips, after a first one: without its start."""
    videos = 4 // repeats  # in a batch
    keys = [[(28 * number + 4 * batch + place, 0) for place in range(videos)] for batch in range(7)]
    batches = iter(data.loader(dataset, 1, batch_sampler=keys))
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def timed(load: Callable[[str, int], Tensor], path: str, samples: int, number: int) -> float:
    """Seconds per sample, after one that does not count: in training a loader finds the caches as it left them."""
    load(path, samples * number)
    start = time.perf_counter()
    for seed in range(samples * number, samples * (number + 1)):
        load(path, seed)
    return (time.perf_counter() - start) / samples


def compare(
    title: str, own: Callable[[int], float], other: Callable[[int], float], rounds: int, clips: int = 1
) -> None:
    """Time two ways in turns and print how many times as fast `own` is, with the milliseconds per clip of both."""
    seconds = measure({"own": own, "other": other}, rounds)
    first, second = (1000 * statistics.median(times) / clips for times in seconds.values())
    print(f"{title}: {quartiles(ratios(seconds, 'own', 'other'))} times as fast; {first:.1f} against {second:.1f} ms")


def identical_frames(path: str) -> str:
    """How many frames of 20 clips are those of decoding everything."""
    with av.open(path) as container:
        stream = container.streams.best("video")
        everything = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    count, same = 0, 0
    with support.video.Video(path) as video:
        for seed in range(20):
            indices = data.dense_clip(len(video), 16, 4, sample_generator(0, seed, 0))
            for index, frame in zip(indices, video.frames(indices), strict=True):
                same += torch.equal(frame, everything[index].permute(2, 0, 1))
                count += 1
    return f"{same} of {count}"


def psnr_of_clip(original: str, prepared: str, seed: int) -> float:
    """In dB, of a clip 16 x 224 x 224 of the prepared file against the same of the original, resized alike."""
    clips = []
    for path in (prepared, original):
        generator = sample_generator(0, seed, 0)
        with support.video.Video(path) as video:
            frames = video.frames(data.dense_clip(len(video), 16, 4, generator))
        if path == prepared:
            size = list(frames.shape[-2:])
        frames = data.TF.resize(frames, size, antialias=True)
        clips.append(data.resized_multi_scale_crop(frames, generator, 224, SCALES, False))
    return psnr(*clips)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of uint8 images in dB."""
    return -10 * math.log10(max(1e-10, ((a.float() - b.float()) / 255).square().mean().item()))


def made_on_the_spot(path: Path) -> Path:
    """280 frames of 340 x 256, moving gradients and noise, H.264 as x264 makes it: B-frames, a key frame every 250."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(340.0), indexing="ij")
    grain = 20 * torch.rand(256, 340, 1, generator=generator)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=28, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for t in range(280):
            waves = (columns / 30 + t / 9).sin(), (rows / 40 - t / 13).cos(), ((rows + columns) / 50 + t / 7).sin()
            image = (110 + 100 * torch.stack(waves, 2) + grain.roll((t, 2 * t), (0, 1))).clamp(0, 255).byte()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path


def bench(path: str, prepared: Path, options: argparse.Namespace) -> None:
    """All comparisons for one video."""
    if reason := tools.prepare.encode(Path(path), prepared, options.short):
        sys.exit(f"{reason}: nothing to measure")
    name, decord = Path(path).name, "decord + PIL on the original"
    size = prepared.stat().st_size / Path(path).stat().st_size
    quality = statistics.mean(psnr_of_clip(path, str(prepared), seed) for seed in range(20))
    print(f"{name}: {identical_frames(path)} frames identical to those of decoding everything")
    print(f"{name}, prepared: {size:.2f} times the size, {quality:.1f} dB PSNR of the final clip")

    sample, official_sample = partial(timed, ours), partial(timed, official, path, 4)
    compare(f"{name}, a sample against {decord}", partial(sample, path, 4), official_sample, options.repeats)
    compare(f"prepared, a sample against {decord}", partial(sample, str(prepared), 4), official_sample, options.repeats)
    workers = partial(through_a_worker, clips_of(str(prepared))), partial(through_a_worker, OfficialClips(path))
    compare(f"prepared, in a loader worker against {decord}", *workers, max(2, options.repeats // 4), clips=24)
    for file, title in ((path, name), (str(prepared), "prepared")):
        for repeats in (2, 4):  # 24 clips in all, as in `once`
            once = partial(through_a_worker, clips_of(file))
            several = partial(through_a_worker, clips_of(file, repeats), repeats=repeats)
            what = f"{title}, in a loader worker: data.repeats={repeats} against 1"
            compare(what, several, once, max(2, options.repeats // 4), clips=24)
    views = partial(timed, all_views, path, 1), partial(timed, separate_views, path, 1)
    compare(f"{name}, 5 x 3 test views against 15 views one by one", *views, max(2, options.repeats // 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="pairs, of four samples each")
    parser.add_argument("--short", type=int, default=256, help="as for `python -m tools.prepare`")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for path in options.videos or [str(made_on_the_spot(Path(folder) / "made_on_the_spot.mp4"))]:
            bench(path, Path(folder) / f"{Path(path).name}.prepared.mp4", options)


if __name__ == "__main__":
    main()
