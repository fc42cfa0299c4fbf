"""Encode a dataset once, so that random clips are cheap to decode.

python -m tools.prepare data.root=/data/ucf101 --to /data/ucf101_256
"""

import argparse
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import filelock
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from support.config import UserError, parse
from support.datasets import list_videos
from support.lists import PREPARED, files_below, find_files, split_flag
from support.processes import launch
from support.video import BrokenVideo, Video, write_mp4
from tools.check_dataset import load_data_config

# Every 32nd frame is a key frame, and 7 of 8 are non-reference frames that can be skipped: few are decoded for a clip.
# Psychovisual options are off. Of the settings tried that keep a PSNR of 38 dB and at most 1.25 times the size of
# Kinetics' files, these decode fastest.
X264 = {
    "crf": "21.4", "preset": "medium", "tune": "fastdecode", "g": "32", "bf": "7", "b_strategy": "0",
    "sc_threshold": "0", "psy-rd": "0:0", "aq-strength": "0", "x264-params": "b-pyramid=none:open-gop=0",
}  # fmt: skip
LISTS = (".csv", ".json", ".pbtxt", ".tsv", ".txt")  # lists and labels next to the videos


def prepare(config: SimpleNamespace, out: Path, short: int, processes: int) -> bool:
    """Encode the videos of the group `data` of a configuration into the same tree below `out`, and copy its lists.

    Return whether all videos are there.
    """
    source, out = Path(os.path.abspath(config.root)), Path(os.path.abspath(out))
    if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
        what = f"--to {out} and data.root={source} are the same folder or one is inside the other"
        raise UserError(f"{what}: name a folder next to it")
    selections = [config.train, config.val] if config.val else [config.train]
    videos = find_videos(source, selections, out)
    lists = find_lists(source, [*selections, getattr(config, "classes", "")], out)
    lock = open_folder(out, json.dumps({"root": str(source), "short": short, "x264": X264}))
    for target in (*videos.values(), *lists.values()):
        target.parent.mkdir(parents=True, exist_ok=True)
    for file, target in lists.items():
        shutil.copyfile(file, target)
    broken = encode_all(videos, short, processes)
    done = {video: target for video, target in videos.items() if os.path.exists(target)}
    names = [target.relative_to(out).as_posix() for target in done.values()]
    for file, lines in (("prepared.txt", names), ("unreadable.txt", broken)):
        (out / file).write_text("".join(f"{line}\n" for line in lines), "utf-8", errors="surrogateescape")
    for reason in broken:
        print(f"  cannot be read: {reason}")
    if not done:
        raise UserError(f"none of the {len(videos)} videos below {source} could be read")
    before, after = (sum(map(os.path.getsize, files)) / 1e6 for files in (done.keys(), done.values()))
    print(f"{len(done):,} of {len(videos):,} videos are in {out}: {before:,.1f} MB became {after:,.1f} MB")
    print(f"train with data.root={out}")
    lock.release()
    return len(done) == len(videos)


def find_videos(source: Path, selections: list[str], out: Path) -> dict[Path, Path]:
    """Return the target of each video."""
    videos = {Path(os.path.abspath(path)) for name in selections for path in list_videos(str(source), name)}
    outside = [video for video in videos if not video.is_relative_to(source)]
    if outside:
        what = f"{min(outside)} is not below data.root={source}, so it has no place in {out}"
        raise UserError(f"{what}: set data.root to a folder that holds all videos")
    targets = {video: (out / video.relative_to(source)).with_suffix(".mp4") for video in sorted(videos)}
    refuse_collisions(targets)
    return targets


def find_lists(source: Path, names: list[str], out: Path) -> dict[Path, Path]:
    """Return where lists are copied: those below `source`, and those of a configuration, wherever they are."""
    targets = {Path(file): out / Path(file).relative_to(source) for file in files_below(source, LISTS)}
    for name in names:
        for file in find_files(str(source), split_flag(name)[0]):
            if file.is_file():
                targets.setdefault(Path(os.path.abspath(file)), out / file.name)
    refuse_collisions(targets)
    return targets


def refuse_collisions(targets: dict[Path, Path]) -> None:
    sources: dict[Path, Path] = {}
    for source, target in targets.items():
        if sources.setdefault(target, source) != source:
            raise UserError(f"{sources[target]} and {source} would both become {target}: rename one of the two")


def open_folder(out: Path, settings: str) -> filelock.BaseFileLock:
    """Lock a folder for this process, and write the settings into it, or check that it has the same ones."""
    mark = out / PREPARED
    if out.exists() and any(out.iterdir()) and not (mark.exists() and mark.read_text("utf-8") == settings):
        what = f"{out} is not empty, and what it holds was not prepared in the same way from the same folder"
        raise UserError(f"{what}: name another --to or delete it")
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another command prepares {out}: wait for it, stop it, or name another --to") from None
    mark.write_text(settings, "utf-8")
    for part in out.rglob("*.part"):  # of a command that was killed
        part.unlink()
    return lock


def encode_all(videos: dict[Path, Path], short: int, processes: int) -> list[str]:
    """Encode the videos whose targets are missing. Return why some cannot be encoded."""
    todo = {video: target for video, target in videos.items() if not os.path.exists(target)}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin_process) as pool:
        in_turn = pool.map if processes > 1 else map
        reasons = in_turn(partial(encode, short=short), todo.keys(), todo.values())
        bar = tqdm(reasons, "preparing videos", len(videos), initial=len(videos) - len(todo), unit="video")
        return [reason for reason in bar if reason]


def begin_process() -> None:
    torch.set_num_threads(1)  # videos are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it without a traceback


def encode(source: Path, target: Path, short: int) -> str:
    """Encode one video by way of a temporary file, so that a target is always complete. Return "" or why it cannot be.

    All frames and times stay. Frames become upright, with even sides, the shorter one at most `short` pixels.
    """
    part = target.with_name(f"{os.getpid()}.part")  # however long the target's name is
    try:
        with Video(source) as video:
            frames = (TF.resize(frame, prepared_size(frame, short), antialias=True) for frame in video.every_frame())
            times = video.times
            write_mp4(part, frames, video.rate, options=X264, times=[time - times[0] for time in times])
        with Video(part) as written:
            if len(written) != len(times):
                raise BrokenVideo(f"{source}: {len(times)} frames became {len(written)}")
        os.replace(part, target)
    except OSError as error:  # reading is not what failed: that is a BrokenVideo
        if error.errno != errno.ENAMETOOLONG:  # .ts becomes .mp4
            raise UserError(f"{target} cannot be written ({error}): fix this, then the same command resumes") from None
        reason = f"{source}: its name is too long with the suffix .mp4"
    except BrokenVideo as error:
        reason = str(error)
    except (av.FFmpegError, ValueError) as error:
        reason = f"{source}: {error}"
    else:
        return ""
    part.unlink(missing_ok=True)
    return reason


def prepared_size(frame: Tensor, short: int) -> list[int]:
    """Return height and width with `short` as the shorter side: never enlarged, and even, as H.264 needs it."""
    sides = frame.shape[-2:]
    return [max(2, side * min(short, *sides) // min(sides) // 2 * 2) for side in sides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where the prepared videos go")
    parser.add_argument("--short", type=int, default=256, help="most pixels of the shorter side; 320 for 320 x 320")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="videos at a time, one for each core")
    arguments = parse(parser)
    config = load_data_config(arguments.settings)
    if not arguments.to:
        raise UserError("where to? Give a new folder by --to FOLDER")
    if arguments.short < 16 or arguments.processes < 1:
        raise UserError("--short has to be at least 16 and --processes at least 1")
    if not prepare(config, arguments.to, arguments.short, arguments.processes):
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
