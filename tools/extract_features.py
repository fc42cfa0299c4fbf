"""Write features of long videos: a frozen encoder applied to windows along each video (docs/features.md).

python -m tools.extract_features movie.mp4 videos/ --weights runs/finetune/toy/checkpoint.pt --out features
"""

import argparse
import os
import sys
import zlib
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path, PurePath
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from einops import reduce
from torch import nn
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import data
from model import Encoder, VideoClassifier, cube_grid
from probe import DEFAULT, LinearProbe
from support.config import UserError, as_dict, flatten, load_config, parse, say
from support.lists import named_videos
from support.processes import gather, launch, start_processes
from support.video import BrokenVideo, Video
from support.weights import load_weights, read_checkpoint, read_options, stored_config

# --keep: the mean over all tokens of a window, the means over those of each time, or every token
KEEP = {"mean": "B (t n) D -> B D", "time": "B (t n) D -> B t D", "tokens": "B (t n) D -> B (t n) D"}


def configure(weights: Path, settings: list[str]) -> SimpleNamespace:
    """Return the probe's configuration with the values of the weights' training, and `settings` over them."""
    trained = flatten(read_checkpoint(weights)[1].get("config", {}))  # in any stage
    if not trained:
        return stored_config(weights, DEFAULT, settings)
    stored = flatten(as_dict(load_config(DEFAULT, [])))
    return load_config(DEFAULT, settings, {key: trained.get(key, value) for key, value in stored.items()})


def build_encoder(weights: Path, config: SimpleNamespace) -> tuple[Encoder, nn.Module]:
    """Return the encoder with its last norm, or the one of fine-tuned weights, which has none, and their `fc_norm`."""
    state, options = read_checkpoint(weights)[0], read_options(weights, config.model.pretrained_clip)
    sizes = {key: options[key] for key in ("width", "depth", "heads", "clip_size", "eps") if key in options}
    kind = VideoClassifier if "fc_norm.weight" in state else LinearProbe
    model = kind(**sizes, cube=config.model.cube, classes=1).eval()
    model.head = nn.Identity()
    load_weights(model, weights)
    return model.encoder, getattr(model, "fc_norm", nn.Identity())


def result_files(videos: list[PurePath], out: Path) -> dict[Path, PurePath]:
    """Return {file of features: video}, in folders below `out` as the videos, absolute, below their common one."""
    videos = list(dict.fromkeys(videos))
    common = [folder for folder in videos[0].parents if all(video.is_relative_to(folder) for video in videos)]
    if not common:
        raise UserError("the videos are on different drives: give those of one drive at a time")
    above = common[0]
    files = {out / video.relative_to(above).with_suffix(".npz"): video for video in videos}
    if len(files) < len(videos):
        raise UserError(f"some of the videos below {above} differ only in their suffix: rename one of each two")
    return files


def is_done(file: Path, settings: dict) -> bool:
    """Return whether a file of features exists. Raises UserError if it was made with other settings."""
    if not file.exists():
        return False
    try:
        with np.load(file) as stored:
            then = {key: str(stored.get(key)) for key in settings}
    except Exception as error:  # many types for one mistake
        raise UserError(f"{file} holds no features ({type(error).__name__}): delete it or give another --out") from None
    if differ := [f"{key}={then[key]}, not {now}" for key, now in settings.items() if then[key] != str(now)]:
        raise UserError(f"{file} was made with {'; '.join(differ)}: delete it or give another --out")
    return True


def windows(path: Path, frames: int, stride: int, size: int, window_stride: int, last: str) -> Iterator[tuple]:
    """Yield clips uint8 (T, 3, size, size) along a video, and when their first and last frames are shown, in seconds.

    If frames are left over at the end, last="repeat" adds a clip that repeats the last frame that it reaches. Each
    frame is decoded once, and only frames that later windows need are kept. Raises BrokenVideo.
    """
    with Video(path) as video:
        count, span = len(video), frames * stride
        starts = list(range(0, count - (frames - 1) * stride, window_stride))
        after = len(starts) * window_stride
        if last == "repeat" and after < count and (not starts or starts[-1] + span < count):
            starts.append(after)
        if not starts:
            raise BrokenVideo(f"{path}: its {count} frames do not fill a window; --last repeat would fill it")
        decoded, kept = enumerate(video.every_frame()), {}
        for start in starts:
            indices = [start + i for i in data.dense_clip(min(span, count - start), frames, stride)]
            kept = {index: frame for index, frame in kept.items() if index >= start}
            while indices[-1] not in kept:
                index, frame = next(decoded)
                if any((index - first) % stride == 0 for first in range(start, index + 1, window_stride)):
                    kept[index] = data.crop_views(frame[None], size, 1)[0, 0]  # (3, size, size)
            yield torch.stack([kept[index] for index in indices]), [float(video.times[i]) for i in indices]


@torch.inference_mode()
def extract(arguments: argparse.Namespace, config: SimpleNamespace) -> None:
    """Write the features of each video, unless they exist already."""
    if "RANK" in os.environ:  # a process may wait for another's last video for longer than the default allows
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    processes = start_processes(config.run.precision, config.data.workers)
    options, keep = config.data, arguments.keep
    slots, _, _ = cube_grid((options.frames, options.size, options.size), config.model.cube)
    encoder, norm = build_encoder(arguments.weights, config)
    parameters = parameters_to_vector([*encoder.parameters(), encoder.pos_embed, *norm.parameters()])
    windowing = dict(frames=options.frames, stride=options.stride, size=options.size, last=arguments.last)
    windowing["window_stride"] = arguments.window_stride or options.frames * options.stride
    bf16 = processes.dtype == torch.bfloat16
    settings = windowing | dict(keep=keep, bf16=bf16, checksum_of_weights=zlib.crc32(parameters.numpy()))
    encoder, norm = encoder.to(processes.device), norm.to(processes.device)

    videos = [Path(os.path.abspath(video)) for video in named_videos(arguments.videos)]
    files = result_files(videos, arguments.out)
    say(f"{len(files):,} videos, {sum(file.exists() for file in files):,} of them done; {settings}")
    files_of_rank = list(files)[processes.rank :: processes.world_size]
    todo = [file for file in files_of_rank if not is_done(file, settings | dict(video=files[file]))]
    bar = tqdm(unit=" windows", disable=processes.rank > 0)
    broken = []
    for file in todo:
        clips = windows(files[file], **windowing)
        features, times = [], []
        try:
            while batch := list(islice(clips, config.run.batch_per_device)):
                clip = torch.stack([clip for clip, _ in batch]).to(processes.device)  # (B, T, 3, H, W)
                clip = data.normalize(clip)  # (B, 3, T, H, W)
                with processes.autocast():
                    x = reduce(encoder(clip), KEEP[keep], "mean", t=slots)  # from (B, N, D)
                    features.append(norm(x).float().cpu())  # (B, D), (B, T/2, D) or (B, N, D)
                times += [(shown[0], shown[-1]) for _, shown in batch]
                bar.update(len(batch))
            start, end = np.array(times).T
            names = dict(video=str(files[file]), weights=str(arguments.weights))
            write(file, features=torch.cat(features).numpy(), start=start, end=end, **settings, **names)
        except BrokenVideo as error:
            broken.append(file)
            tqdm.write(f"cannot be read: {error}", file=sys.stderr)
    bar.close()
    unreadable = len(gather(broken))
    if unreadable == len(files):
        raise UserError("none of the videos can be read; see above")
    say(
        f"{arguments.out}: features of {len(files) - unreadable:,} videos, {unreadable:,} cannot be read. "
        f"Next: numpy.load(FILE)['features'], see docs/features.md"
    )


def write(file: Path, **content: object) -> None:
    """Write a temporary file and rename it, so that the file is always complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{zlib.crc32(os.fsencode(file.name)):08x}.part")  # the name may be as long as is possible
    with open(part, "wb") as opened:
        np.savez(opened, **content)
    os.replace(part, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("videos", nargs="+", type=Path, metavar="VIDEO", help="videos, folders or lists")
    add("--weights", type=Path, required=True, help="pre-trained or fine-tuned, of any source, see docs/weights.md")
    add("--out", type=Path, required=True, help="folder for the features, one .npz file for each video")
    add("--window-stride", type=int, help="frames from window to window; default: data.frames x data.stride")
    add("--keep", choices=KEEP, default="mean", help="of a window's tokens: the mean, the mean over space, or all")
    add("--last", choices=("repeat", "drop"), default="repeat", help="what to do if the last window is not full")
    arguments = parse(parser, DEFAULT)
    if arguments.window_stride is not None and arguments.window_stride < 1:
        raise UserError(f"--window-stride {arguments.window_stride} has to be at least 1")
    extract(arguments, configure(arguments.weights, arguments.settings))


if __name__ == "__main__":
    launch(main)
