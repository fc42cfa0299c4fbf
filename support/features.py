"""Features of long videos: windows along a video, and what a frozen encoder makes of them (docs/features.md)."""

import argparse
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import data
from model import Encoder, cube_grid
from support.config import UserError, say
from support.datasets import named_videos
from support.processes import gather
from support.run import Run
from support.video import BrokenVideo, Video

# --keep: the mean over all tokens of a window, the means over those of each time, or every token
KEEP = {"mean": "B (t n) D -> B D", "time": "B (t n) D -> B t D", "tokens": "B (t n) D -> B (t n) D"}


def windows(
    path: Path, frames: int, stride: int, size: int, window_stride: int, last: str
) -> Iterator[tuple[Tensor, tuple[float, float]]]:
    """Clips uint8 (T, 3, size, size) along a video, with the seconds at which their first and last frames are shown.

    One starts every `window_stride` frames. If those that fit leave frames at the end and last="repeat", one more
    repeats the last frame that it reaches. Crops are those of a single test view. Each frame is decoded once, and only
    those that later windows need are kept. Raises BrokenVideo.
    """
    span, reach = frames * stride, (frames - 1) * stride
    with Video(path) as video:
        starts = list(range(0, len(video) - reach, window_stride))
        after = len(starts) * window_stride
        if last == "repeat" and after < len(video) and (not starts or starts[-1] + span < len(video)):
            starts.append(after)
        if not starts:
            raise BrokenVideo(f"{path}: its {len(video)} frames do not fill a window; --last repeat would fill it")
        times, decoded, kept = [float(time) for time in video.times], enumerate(video.every_frame()), {}
        for start in starts:
            indices = [start + i for i in data.dense_clip(min(span, len(video) - start), frames, stride)]
            kept = {index: frame for index, frame in kept.items() if index >= start}
            while indices[-1] not in kept:
                index, frame = next(decoded)
                if any((index - first) % stride == 0 for first in range(start, index + 1, window_stride)):
                    kept[index] = data.crop_views(frame[None], size, 1)[0, 0]  # (3, size, size)
            yield torch.stack([kept[index] for index in indices]), (times[indices[0]], times[indices[-1]])


@torch.inference_mode()
def extract(arguments: argparse.Namespace, run: Run, encoder: Encoder, norm: nn.Module) -> None:
    """Write the features of each video's windows, `norm` of what the encoder gives, unless they are there already."""
    config = run.config
    frames, stride, size = config.data.frames, config.data.stride, config.data.size
    grid = cube_grid((frames, size, size), config.model.cube)
    options = dict(frames=frames, stride=stride, size=size, last=arguments.last)
    options["window_stride"] = arguments.window_stride or frames * stride
    parameters = parameters_to_vector([*encoder.parameters(), encoder.pos_embed, *norm.parameters()])
    checksum = zlib.crc32(parameters.numpy())
    settings = options | dict(keep=arguments.keep, bf16=run.bf16, checksum_of_weights=checksum)
    encoder, norm = encoder.to(run.device), norm.to(run.device)

    videos = list(dict.fromkeys(Path(os.path.abspath(video)) for video in named_videos(arguments.features)))
    above = os.path.commonpath([video.parent for video in videos])
    files = {arguments.out / video.relative_to(above).with_suffix(".npz"): video for video in videos}
    if len(files) < len(videos):
        raise UserError(f"some of the videos below {above} differ only in their suffix: rename one of each two")
    mine = list(files.items())[run.rank :: run.world_size]
    todo = [(file, video) for file, video in mine if not is_done(file, settings | dict(video=video))]
    say(f"{len(videos):,} videos, {sum(file.exists() for file in files):,} of them done; {settings}")
    bar, broken = tqdm(unit=" windows", disable=run.rank > 0), []

    def encoded(video: Path) -> Iterator[tuple[np.ndarray, list]]:
        found = windows(video, **options)
        while batch := list(islice(found, config.run.batch_per_device)):
            clip = data.normalize(torch.stack([clip for clip, _ in batch]).to(run.device))  # (B, 3, T, H, W)
            with run.autocast():
                x = reduce(encoder(clip), KEEP[arguments.keep], "mean", t=grid[0])  # from (B, N, D)
                features = norm(x).float()  # (B, D), (B, T/2, D) or (B, N, D)
            yield features.cpu().numpy(), [times for _, times in batch]
            bar.update(len(batch))

    for number, (file, video) in enumerate(todo, len(mine) - len(todo) + 1):
        bar.set_postfix_str(f"video {number} of {len(mine)}")
        try:
            write_features(file, encoded(video), settings | dict(video=str(video), weights=str(arguments.weights)))
        except BrokenVideo as error:
            broken.append(video)
            tqdm.write(f"cannot be read: {error}", file=sys.stderr)
    if len(gather(broken)) == len(videos):
        raise UserError("none of the videos can be read; see above")


def is_done(file: Path, settings: dict[str, Any]) -> bool:
    """Whether the file of features is there. UserError if it was made with other settings."""
    if not file.exists():
        return False
    try:
        with np.load(file) as stored:
            then = {key: str(stored[key]) for key in settings}
    except Exception as error:  # many types for one mistake
        raise UserError(f"{file} holds no features ({type(error).__name__}): delete it or give another --out") from None
    if differ := [f"{key}={then[key]}, not {now}" for key, now in settings.items() if then[key] != str(now)]:
        raise UserError(f"{file} was made with {'; '.join(differ)}: delete it or give another --out")
    return True


def write_features(file: Path, batches: Iterable[tuple[np.ndarray, list]], facts: dict[str, Any]) -> None:
    """Write features (B, ...) and the start and end of their windows, next to the file and renamed: it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part, seconds = file.with_suffix(".part"), []
    with tempfile.TemporaryFile(dir=file.parent) as rows:  # all tokens of a long video may not fit in memory
        for features, times in batches:
            rows.write(features)
            seconds += times
        rows.flush()
        features = np.memmap(rows, np.float32, "r", shape=(len(seconds), *features.shape[1:]))
        start, end = np.array(seconds).T
        with open(part, "wb") as opened:
            np.savez(opened, features=features, start=start, end=end, **facts)
    os.replace(part, file)
