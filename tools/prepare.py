"""Encode a dataset once, so that random clips are cheap to decode.

python -m tools.prepare data.root=/data/ucf101 --to /data/ucf101_256
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from support.config import UserError, parse
from support.datasets import SUFFIXES, files_below, find_files, list_videos, read_settings
from support.processes import launch
from support.video import BrokenVideo, Video, write_mp4

# A key frame every 32 frames, and no frame refers to seven of eight: few are decoded for a clip of stride 4.
# psy-rd and aq, which please the eye, are off. Of the settings tried that keep 38 dB and at most 1.25 times the size of
# Kinetics' files, these decode fastest.
X264 = {
    "crf": "21.4", "preset": "medium", "tune": "fastdecode", "g": "32", "bf": "7", "b_strategy": "0",
    "sc_threshold": "0", "psy-rd": "0:0", "aq-strength": "0", "x264-params": "b-pyramid=none:open-gop=0",
}  # fmt: skip
LISTS = [".csv", ".json", ".pbtxt", ".tsv", ".txt"]  # lists and labels next to the videos


def prepare(config: SimpleNamespace, out: Path, short: int, processes: int) -> None:
    """Encode a configuration's videos into the same tree below `out`, and copy lists and labels.

    config: the group `data`. All frames and times stay. Frames become upright, with even sides, the shorter one at most
    `short` pixels. The same command resumes. What cannot be read to its last frame is named and left out.
    """
    source, out = Path(os.path.abspath(config.root)), Path(os.path.abspath(out))
    if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
        what = f"--to {out} and data.root={source} are the same folder or one is inside the other"
        raise UserError(f"{what}: name a folder next to it")
    selections = [config.train, config.val] if config.val else [config.train]
    videos = {Path(os.path.abspath(path)) for name in selections for path in list_videos(str(source), name)}
    if outside := [video for video in videos if not video.is_relative_to(source)]:
        what = f"{min(outside)} is not below data.root={source}, so it has no place in {out}"
        raise UserError(f"{what}: set data.root to a folder that holds all videos")
    sources = _sources((video, out / video.relative_to(source).with_suffix(".mp4")) for video in sorted(videos))
    try:
        _begin_folder(out, json.dumps({"root": str(source), "short": short, "x264": X264}))
        _copy_lists(source, [*selections, getattr(config, "classes", "")], out)
        for target in sources:
            target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be filled ({error}): fix this and give the same command again") from None
    todo = [target for target in sources if not target.exists()]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_process) as pool:
        in_turn = pool.map if processes > 1 else map
        reasons = in_turn(partial(_prepare_one, short=short), [sources[target] for target in todo], todo)
        bar = tqdm(reasons, "preparing videos", len(sources), initial=len(sources) - len(todo), unit="video")
        broken = [reason for reason in bar if reason]
    done = [target for target in sources if target.exists()]
    for name, lines in (("prepared", [path.relative_to(out).as_posix() for path in done]), ("unreadable", broken)):
        text = "".join(f"{line}\n" for line in lines)
        (out / f"{name}.txt").write_text(text, "utf-8", errors="surrogateescape")
    for reason in broken:
        print(f"  cannot be read: {reason}")
    if not done:
        raise UserError(f"none of the {len(sources)} videos below {source} could be read")
    ratios = [_psnr_of_prepared(sources[target], target) for target in done[:: math.ceil(len(done) / 64)]]
    before, after = (sum(os.path.getsize(path) for path in paths) / 1e6 for paths in (map(sources.get, done), done))
    print(
        f"{len(done):,} of {len(sources):,} videos are in {out}: {before:,.1f} MB became {after:,.1f} MB, "
        f"{after / before:.2f} times;\nPSNR against the originals in the same size {statistics.median(ratios):.1f} dB, "
        f"lowest {min(ratios):.1f} dB, of {len(ratios)} videos\ntrain with data.root={out}"
    )


def _sources(targets: Iterable[tuple[Path, Path]]) -> dict[Path, Path]:
    """What each target is made from. Raises UserError if two would become the same."""
    sources: dict[Path, Path] = {}
    for source, target in targets:
        if sources.setdefault(target, source) != source:
            raise UserError(f"{sources[target]} and {source} would both become {target}: rename one of the two")
    return sources


def _begin_folder(out: Path, settings: str) -> None:
    mark = out / "prepared.json"
    if out.exists() and any(out.iterdir()) and not (mark.exists() and mark.read_text("utf-8") == settings):
        what = f"{out} is not empty, and what it holds was not prepared in the same way from the same folder"
        raise UserError(f"{what}: name another --to or delete it")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(settings, "utf-8")
    for part in out.rglob("*.part"):  # of a run that was killed
        part.unlink()


def _copy_lists(source: Path, named: list[str], out: Path) -> None:
    """Copy the lists and labels below `source`, and those that a configuration names, wherever they are.

    In the copies videos are named as they are now: relative to `out`, ending in .mp4.
    """
    targets = {file: out / file.relative_to(source) for file in files_below(source, LISTS)}
    for name in filter(None, named):
        for file in filter(Path.is_file, find_files(str(source), re.sub(r"=\d+$", "", name))):
            targets.setdefault(Path(os.path.abspath(file)), out / file.name)
    suffix = "|".join(map(re.escape, SUFFIXES)).encode()
    for copy, file in _sources(targets.items()).items():
        text = re.sub(rb"(?m)^" + re.escape(os.fsencode(f"{source}/")), b"", file.read_bytes())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(re.sub(rb"(?im)(?:" + suffix + rb")(?=[\s,\"]|$)", b".mp4", text))


def _begin_process() -> None:
    torch.set_num_threads(1)  # videos are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it without a traceback


def _prepare_one(source: Path, target: Path, short: int) -> str:
    """Encode one video; "" or why it cannot be. Written next to the target and renamed: what is there is whole."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with Video(source) as video:
            frames = (TF.resize(frame, _prepared_size(frame, short), antialias=True) for frame in video.every_frame())
            times = video.times
            write_mp4(part, frames, video.rate, options=X264, times=[time - times[0] for time in times])
        with Video(part) as written:
            if len(written) != len(times):
                raise BrokenVideo(f"{source}: {len(times)} frames became {len(written)}")
        os.replace(part, target)
    except OSError as error:  # reading is not what failed: that is a BrokenVideo
        raise UserError(f"{target} cannot be written ({error}): fix this and give the same command again") from None
    except (BrokenVideo, av.FFmpegError, ValueError) as error:
        part.unlink(missing_ok=True)
        return str(error) if isinstance(error, BrokenVideo) else f"{source}: {error}"
    return ""


def _prepared_size(frame: Tensor, short: int) -> list[int]:
    """Height and width with `short` as the shorter side: never enlarged, and even, as H.264 needs it."""
    sides = frame.shape[-2:]
    return [max(2, side * min(short, *sides) // min(sides) // 2 * 2) for side in sides]


def _psnr_of_prepared(source: Path, target: Path) -> float:
    """Of the first, the middle and the last frame, as training reads them, against the original in the same size."""
    with Video(source) as original, Video(target) as prepared:
        indices = [0, len(prepared) // 2, len(prepared) - 1]
        frames = prepared.frames(indices)
        return psnr(frames, TF.resize(original.frames(indices), list(frames.shape[-2:]), antialias=True))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB."""
    return -10 * math.log10(max(1e-10, ((a.float() - b.float()) / 255).square().mean().item()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where the prepared videos go")
    parser.add_argument("--short", type=int, default=256, help="most pixels of the shorter side; 320 for 320 x 320")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="videos at a time, one for each core")
    arguments = parse(parser)
    config = read_settings(arguments.settings)
    if not arguments.to:
        raise UserError("where to? Give a new folder by --to FOLDER")
    if arguments.short < 16 or arguments.processes < 1:
        raise UserError("--short has to be at least 16 and --processes at least 1")
    prepare(config, arguments.to, arguments.short, arguments.processes)


if __name__ == "__main__":
    launch(main)
