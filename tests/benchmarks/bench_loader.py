"""One pre-training sample (decode, crop, resize) against decord with per-frame PIL, as the authors' code loads it:
from the same file; from the file that `data.py prepare` makes of it; and the latter through a DataLoader's worker. And
the 5 x 3 views of one test video, decoded once, against 15 separate views, as the authors' code loads them.

    pip install decord
    python tests/benchmarks/bench_loader.py VIDEO...          # without a video: one with B-frames is made on the spot

Interleaved; the ratio is the median over pairs. The frames of this project's way are compared with decoding everything,
and a clip of the prepared file with the same clip of the original.
"""

import argparse
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
from PIL import Image
from torch.utils.data import Dataset

import data
import support.prepare
import support.run
import support.video

SCALES = [1.0, 0.875, 0.75, 0.66]


def official(path: str, seed: int) -> torch.Tensor:
    """The authors' loading, written out: decord, PIL crop and resize of each frame, stack, to float, normalise."""
    import decord

    generator = support.run.sample_generator(0, seed, 0)  # the same frames and crop as ours
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


def ours(path: str, seed: int) -> torch.Tensor:
    return clips_of(path)[seed, 0][0]  # uint8 (T, 3, H, W): normalised on the device


def clips_of(path: str) -> data.PretrainingClips:
    return data.PretrainingClips(
        [Path(path)],
        frames=16,
        stride=4,
        size=224,
        scales=SCALES,
        flip=False,
        draw_mask=lambda generator: torch.zeros(0, dtype=torch.bool),
        seed=0,
    )


def all_views(path: str, repeat: int) -> torch.Tensor:
    return data.TestViews([Path(path)], frames=16, stride=4, sampling="dense", size=224, clips=5, crops=3)[0][
        1
    ]  # uint8 (15, T, 3, 224, 224)


def separate_views(path: str, repeat: int) -> torch.Tensor:
    """Each of the 15 views from the file again, as the authors' test set does: all frames of stride 4, resize, then cut out."""
    import decord

    views = []
    for clip in range(5):
        for crop in range(3):
            reader = decord.VideoReader(path, num_threads=1)
            strided = list(range(0, len(reader), 4))
            strided += [strided[-1]] * (16 - len(strided))
            frames = reader.get_batch(strided).asnumpy()
            height, width = frames.shape[1:3]
            short = min(height, width)
            images = [
                Image.fromarray(frame).resize((width * 224 // short, height * 224 // short), Image.BILINEAR)
                for frame in frames
            ]
            start = clip * (len(strided) - 16) // 4
            stacked = numpy.stack([numpy.asarray(image) for image in images[start : start + 16]])  # (T, H, W, 3)
            axis = 2 if width >= height else 1
            place = int(crop * (stacked.shape[axis] - 224) / 2)
            view = (
                torch.from_numpy(stacked.take(range(place, place + 224), axis=axis))
                .permute(3, 0, 1, 2)
                .float()
                .div(255)
            )
            mean, std = (torch.tensor(values)[:, None, None, None] for values in (data.MEAN, data.STD))
            views.append(view.sub_(mean).div_(std))  # (3, T, 224, 224)
    return torch.stack(views)


class OfficialClips(Dataset):
    """The authors' samples for a DataLoader, whose keys are those of data.PretrainingClips."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return official(self.path, key[0])


def through_a_worker(dataset: Dataset, repeat: int) -> float:
    """Seconds in which one worker process hands over 6 batches of 4 clips, counted from a first one: without its start."""
    keys = [[(28 * repeat + 4 * batch + place, 0) for place in range(4)] for batch in range(7)]
    batches = iter(data.loader(dataset, 1, batch_sampler=keys))
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def timed(load: Callable, path: str, samples: int, repeat: int) -> float:
    """Seconds for a sample, after one that is not counted: in training a loader finds the caches as it left them itself."""
    load(path, samples * repeat)
    start = time.perf_counter()
    for seed in range(samples * repeat, samples * (repeat + 1)):
        load(path, seed)
    return (time.perf_counter() - start) / samples


def compare(ways: list[Callable[[int], float]], repeats: int) -> tuple[str, list[float]]:
    """Median of the ratio second / first over interleaved pairs, with quartiles; and the two medians in ms.

    Each way takes the number of the pair and returns the seconds that it took.
    """
    seconds: list[list[float]] = [[], []]
    for repeat in range(-1, repeats):
        for which in (0, 1) if repeat % 2 else (1, 0):
            taken = ways[which](repeat + 1)
            if repeat >= 0:
                seconds[which].append(taken)
    ratios = [b / a for a, b in zip(*seconds)]
    quartiles = statistics.quantiles(ratios, n=4)
    text = f"{statistics.median(ratios):.2f} times as fast as {{}} (quartiles {quartiles[0]:.2f} to {quartiles[2]:.2f}, {repeats} pairs)"
    return text, [1000 * statistics.median(times) for times in seconds]


def decode_everything(path: str) -> torch.Tensor:
    with av.open(path) as container:
        frames = [
            torch.from_numpy(frame.to_ndarray(format="rgb24"))
            for frame in container.decode(container.streams.best("video"))
        ]
    return torch.stack(frames).permute(0, 3, 1, 2)


def psnr_of_clip(original: str, prepared: str, seed: int) -> float:
    """In dB, of a clip 16 x 224 x 224 of the prepared file against the same of the original, resized alike."""
    clips = []
    for path in (prepared, original):
        generator = support.run.sample_generator(0, seed, 0)
        with support.video.Video(path) as video:
            frames = video.frames(data.dense_clip(len(video), 16, 4, generator))
        if path == prepared:
            size = list(frames.shape[-2:])
        clips.append(
            data.resized_multi_scale_crop(data.TF.resize(frames, size, antialias=True), generator, 224, SCALES, False)
        )
    return support.prepare.psnr(*clips)


def made_on_the_spot(path: Path) -> Path:
    """280 frames of 340 x 256, moving gradients and noise, H.264 with x264's defaults: B-frames, a key frame every 250."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(340.0), indexing="ij")
    grain = 20 * torch.rand(256, 340, 1, generator=generator)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=28, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for t in range(280):
            wave = torch.stack(
                [(columns / 30 + t / 9).sin(), (rows / 40 - t / 13).cos(), ((rows + columns) / 50 + t / 7).sin()], 2
            )
            image = (110 + 100 * wave + grain.roll((t, 2 * t), (0, 1))).clamp(0, 255).byte()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help="pairs, of four samples each")
    parser.add_argument("--short", type=int, default=256, help="as for `data.py prepare`")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        for path in a.videos or [str(made_on_the_spot(Path(folder) / "made_on_the_spot.mp4"))]:
            name, everything = Path(path).name, decode_everything(path)
            with support.video.Video(path) as video:
                count, same = 0, 0
                for seed in range(20):
                    indices = data.dense_clip(len(video), 16, 4, support.run.sample_generator(0, seed, 0))
                    same += sum(torch.equal(a, b) for a, b in zip(video.frames(indices), everything[indices]))
                    count += 16
            prepared = str(Path(folder) / f"{name}.prepared.mp4")
            if reason := support.prepare._prepare_one(Path(path), Path(prepared), a.short):
                sys.exit(f"{reason}: nothing to measure")
            size = Path(prepared).stat().st_size / Path(path).stat().st_size
            quality = statistics.mean(psnr_of_clip(path, prepared, seed) for seed in range(20))
            from_original = partial(timed, official, path, 4)
            text, (own, theirs) = compare([partial(timed, ours, path, 4), from_original], a.repeats)
            print(
                f"{name}: {text.format('decord + PIL')}; {own:.1f} against {theirs:.1f} ms a sample, {a.threads} thread(s); "
                f"{same} of {count} frames identical to decoding everything"
            )
            text, (own, theirs) = compare([partial(timed, ours, prepared, 4), from_original], a.repeats)
            print(
                f"{name}, prepared: {text.format('decord + PIL on the original')}; {own:.1f} against {theirs:.1f} ms a sample; "
                f"{size:.2f} times the size, {quality:.1f} dB PSNR of the final clip"
            )
            workers = [partial(through_a_worker, clips_of(prepared)), partial(through_a_worker, OfficialClips(path))]
            text, (own, theirs) = compare(workers, max(2, a.repeats // 4))
            print(
                f"{name}, prepared, through a DataLoader worker: {text.format('decord + PIL on the original through one')}; {own / 24:.1f} against {theirs / 24:.1f} ms a clip"
            )
            text, (own, theirs) = compare(
                [partial(timed, all_views, path, 1), partial(timed, separate_views, path, 1)], max(2, a.repeats // 8)
            )
            print(
                f"{name}: 5 x 3 test views {text.format('15 views one by one')}; {own:.0f} against {theirs:.0f} ms a video"
            )


if __name__ == "__main__":
    main()
