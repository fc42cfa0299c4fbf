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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from shlex import quote
from types import SimpleNamespace

import av
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from support.config import UserError, parse
from support.lists import PREPARED, files_below, find_files, list_videos, split_flag
from support.processes import launch
from support.run import lock_folder
from support.video import BrokenVideo, Video, write_mp4
from tools.check_dataset import load_data_config

# Every 32nd frame is a key frame, and 7 of 8 are non-reference frames that can be skipped: few are decoded for a clip.
# Of the settings tried that keep a PSNR of 38 dB and 1.25 times the size of Kinetics' files, these decode fastest.
X264 = {
    "crf": "21.4", "preset": "medium", "tune": "fastdecode", "g": "32", "bf": "7", "b_strategy": "0",
    "sc_threshold": "0", "psy-rd": "0:0", "aq-strength": "0", "x264-params": "b-pyramid=none:open-gop=0",
}  # fmt: skip
LISTS = (".csv", ".json", ".pbtxt", ".tsv", ".txt")  # lists and labels next to the videos


def prepare(config: SimpleNamespace, out: Path, short: int, processes: int) -> None:
    """Encode the videos of a configuration's group `data` into the same tree below `out`, and copy its lists."""
    source, out = Path(os.path.abspath(config.root)), Path(os.path.abspath(out))
    if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--to {out} and data.root={source} are the same or nested: name a folder next to data.root")
    videos, lists = find_targets(config, source, out)
    check_folder(out, json.dumps({"root": str(source), "short": short, "x264": X264}))
    lock = lock_folder(out)
    for part in out.rglob("*.part"):  # of a command that was killed
        part.unlink()
    for target in (videos | lists).values():
        target.parent.mkdir(parents=True, exist_ok=True)
    for file, target in lists.items():
        shutil.copyfile(file, target)
    broken = encode_all(videos, short, processes)
    text = "".join(f"{reason}\n" for reason in broken)
    (out / "unreadable.txt").write_text(text, "utf-8", errors="surrogateescape")
    lock.release()
    print(text, end="")
    setting = quote(f"data.root={out}")
    print(f"{len(videos) - len(broken):,} of {len(videos):,} videos are in {out}. Next: train with {setting}")
    if broken:
        raise SystemExit(1)


def find_targets(config: SimpleNamespace, source: Path, out: Path) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Return the targets of videos and of lists: those below `source`, and a configuration's, wherever they are."""
    selections = [config.train, config.val] if config.val else [config.train]
    videos = {}
    for selection in selections:
        for path in list_videos(str(source), selection):
            video = Path(os.path.abspath(path))
            if not video.is_relative_to(source):
                raise UserError(f"{video} is not below data.root={source}: set data.root to a folder with all videos")
            videos[video] = (out / video.relative_to(source)).with_suffix(".mp4")
    lists = {Path(file): out / Path(file).relative_to(source) for file in files_below(source, LISTS)}
    for name in [*selections, getattr(config, "classes", "")]:
        for file in find_files(str(source), split_flag(name)[0]):
            if file.is_file():
                lists.setdefault(Path(os.path.abspath(file)), out / file.name)
    sources: dict[Path, Path] = {}
    for file, target in (videos | lists).items():
        if sources.setdefault(target, file) != file:
            raise UserError(f"{sources[target]} and {file} would both become {target}: rename one of the two")
    return videos, lists


def check_folder(out: Path, settings: str) -> None:
    """Write the settings into an empty folder, or check that it has the same ones."""
    mark = out / PREPARED
    if out.exists() and any(out.iterdir()) and not (mark.exists() and mark.read_text("utf-8") == settings):
        raise UserError(f"{out} is not empty and was not prepared in the same way: name another --to or delete it")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(settings, "utf-8")


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
    """Encode all frames of a video, upright, the shorter side at most `short`. Return "" or why it cannot be."""
    part = target.with_name(f"{os.getpid()}.part")  # a target is always complete
    try:
        with Video(source) as video:
            frames = (shrink(frame, short) for frame in video.every_frame())
            times = video.times
            write_mp4(part, frames, video.rate, options=X264, times=[time - times[0] for time in times])
        with Video(part) as written:
            if len(written) != len(times):
                raise BrokenVideo(f"{source}: {len(times)} frames became {len(written)}")
        os.replace(part, target)
    except OSError as error:  # reading is not what failed: that is a BrokenVideo
        if error.errno == errno.ENAMETOOLONG:  # .mp4 is longer than .ts
            part.unlink(missing_ok=True)
            return f"{source}: its name is too long with the suffix .mp4"
        raise UserError(f"{target} cannot be written ({error}): fix this, then the same command resumes") from None
    except (BrokenVideo, av.FFmpegError, ValueError) as error:
        part.unlink(missing_ok=True)
        reason = str(error).removeprefix(f"{source}: ")
        return f"{source}: {reason}"
    return ""


def shrink(frame: Tensor, short: int) -> Tensor:
    """Resize to `short` as the shorter side: never enlarged, and even, as H.264 needs it."""
    sides = frame.shape[-2:]
    short = min(short, *sides)
    return TF.resize(frame, [max(2, side * short // min(sides) // 2 * 2) for side in sides], antialias=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where the prepared videos go")
    parser.add_argument("--short", type=int, default=256, help="most pixels of the shorter side; 320 for 320 x 320")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="videos at a time, one for each core")
    arguments = parse(parser)
    if not arguments.to or arguments.short < 16 or arguments.processes < 1:
        raise UserError("give a new folder by --to FOLDER, --short of at least 16 and --processes of at least 1")
    prepare(load_data_config(arguments.settings), arguments.to, arguments.short, arguments.processes)


if __name__ == "__main__":
    launch(main)
