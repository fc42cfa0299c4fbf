"""A dataset encoded once, so that random clips are cheap to decode.

    python -m support.prepare data.root=/data/ucf101 --to /data/ucf101_256
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path

import av
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from support.config import UserError, load_config, parse
from support.datasets import (
    SUFFIXES,
    list_videos,
)
from support.run import launch
from support.video import (
    BrokenVideo,
    Video,
    write_mp4,
)

# ---- a dataset encoded once, so that random clips are cheap to decode ----

CONFIG = Path(__file__).parents[1] / "configs" / "finetune" / "toy.yaml"

# A key frame every 32 frames, and of eight frames seven that no other refers to: few are decoded for a clip of stride 4.
# psy-rd and aq, which please the eye, are off. Of the settings tried that keep 38 dB and at most 1.25 times the size of
# Kinetics' files, these decode fastest.
X264 = {
    "crf": "21.4", "preset": "medium", "tune": "fastdecode", "g": "32", "bf": "7", "b_strategy": "0", "sc_threshold": "0",
    "psy-rd": "0:0", "aq-strength": "0", "x264-params": "b-pyramid=none:open-gop=0",
}  # fmt: skip
LISTS = frozenset((".csv", ".json", ".pbtxt", ".tsv", ".txt"))  # lists and labels beside the videos


def prepare(root: str, selections: list[str], out: Path, short: int, processes: int) -> None:
    """Encode the videos that `selections` name below `root` into the same tree below `out`, with frames and times as they
    were but upright, at most `short` pixels on the shorter side, and even sides; copy lists and labels beside them.

    The same command again goes on where it was killed. What cannot be read to its last frame is named and left out.
    """
    source, out = Path(os.path.abspath(root)), Path(os.path.abspath(out))
    if source.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--to {out} and data.root={source} are the same folder or one is inside the other: name a folder beside it")
    targets: dict[Path, Path] = {}
    for video in sorted({Path(os.path.abspath(path)) for selection in selections for path in list_videos(str(source), selection)}):
        if not video.is_relative_to(source):
            raise UserError(
                f"{video} is not below data.root={source}, so it has no place in {out}: set data.root to a folder that holds all videos"
            )
        target = out / video.relative_to(source).with_suffix(".mp4")
        if target in targets:
            raise UserError(f"{targets[target]} and {video} would both become {target}: rename one of the two")
        targets[target] = video
    try:
        _begin_folder(out, json.dumps({"root": str(source), "short": short, "x264": X264}))
        _copy_lists(source, [Path(selection) for selection in selections if Path(selection).is_file()], out)
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be filled ({error}): mend this and give the same command again") from None
    todo = [target for target in targets if not target.exists()]
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_process) if processes > 1 else None
    with pool or nullcontext():
        in_turn = pool.map if pool else map
        try:
            reasons = in_turn(_prepare_one, [targets[target] for target in todo], todo, [short] * len(todo))
            bar = tqdm(reasons, "preparing videos", len(targets), initial=len(targets) - len(todo), unit="video")
            broken = [reason for reason in bar if reason]
            done = [target for target in targets if target.exists()]
            sample = done[:: math.ceil(len(done) / 64) or 1]
            ratios = list(in_turn(_psnr_of_prepared, [targets[target] for target in sample], sample))
        except BrokenProcessPool:
            raise UserError(
                "a process was ended from outside, for want of memory perhaps: give the same command again, with fewer --processes"
            ) from None
    (out / "prepared.txt").write_text("".join(f"{target.relative_to(out).as_posix()}\n" for target in done))
    (out / "unreadable.txt").write_text("".join(f"{reason}\n" for reason in broken))
    for reason in broken:
        print(f"  cannot be read: {reason}")
    if not done:
        raise UserError(f"none of the {len(targets)} videos below {source} could be read")
    before, after = (sum(path.stat().st_size for path in paths) / 1e6 for paths in ([targets[target] for target in done], done))
    print(
        f"{len(done):,} of {len(targets):,} videos are in {out}: {before:,.1f} MB became {after:,.1f} MB, {after / before:.2f} times;\n"
        f"PSNR against the originals in the same size {statistics.median(ratios):.1f} dB, "
        f"lowest {min(ratios):.1f} dB, of {len(ratios)} videos\n"
        f"train with data.root={out}"
    )


def _begin_folder(out: Path, settings: str) -> None:
    mark = out / "prepared.json"
    if out.exists() and any(out.iterdir()) and not (mark.exists() and mark.read_text() == settings):
        raise UserError(
            f"{out} is not empty, and what it holds was not prepared in the same way from the same folder: name another --to or delete it"
        )
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(settings)
    for part in out.rglob("*.part"):  # of a run that was killed
        part.unlink()


def _copy_lists(source: Path, outside: list[Path], out: Path) -> None:
    """Copy lists and labels, in which videos are named as they are now: relative to `out`, ending in .mp4."""
    suffixes = "|".join(re.escape(suffix) for suffix in sorted(SUFFIXES)).encode()
    files = {file: out / file.relative_to(source) for file in source.rglob("*") if file.suffix.lower() in LISTS and file.is_file()}
    files |= {file: out / file.name for file in outside if not Path(os.path.abspath(file)).is_relative_to(source)}
    for file, copy in files.items():
        text = re.sub(rb"(?m)^" + re.escape(f"{source}/".encode()), b"", file.read_bytes())
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(re.sub(rb"(?im)(?:" + suffixes + rb")(?=[\s,\"]|$)", b".mp4", text))


def _begin_process() -> None:
    torch.set_num_threads(1)  # videos are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it without a traceback


def _prepare_one(source: Path, target: Path, short: int) -> str:
    """Encode one video; "" or why it cannot be read. Written beside and renamed: what is there is whole."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with Video(source) as video:
            frames = (TF.resize(frame, _prepared_size(frame, short), antialias=True) for frame in video.every_frame())
            write_mp4(part, frames, video.rate, options=X264, times=video.times)
        os.replace(part, target)
    except OSError as error:  # reading is not what failed: that is a BrokenVideo
        raise UserError(f"{target} cannot be written ({error}): mend this and give the same command again") from None
    except (BrokenVideo, av.FFmpegError, ValueError) as error:
        part.unlink(missing_ok=True)
        return str(error) if isinstance(error, BrokenVideo) else f"{source}: {error}"
    return ""


def _prepared_size(frame: Tensor, short: int) -> list[int]:
    """Height and width with `short` as the shorter side: never enlarged, and even, as H.264 needs it."""
    sides = frame.shape[-2:]
    return [max(2, side * min(short, *sides) // min(sides) // 2 * 2) for side in sides]


def _psnr_of_prepared(source: Path, target: Path) -> float:
    """Of the first, the middle and the last frame, as training reads them, against those of the original in the same size."""
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
    parser.add_argument("--short", type=int, default=256, help="most pixels of the shorter side, 256; 320 for inputs of 320 x 320")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="videos at a time, one for each core")
    arguments = parse(parser)
    config = load_config(CONFIG, arguments.settings).data
    if not config.root:
        raise UserError("which dataset? Name a configuration file or give data.root, data.train and data.val")
    if not arguments.to:
        raise UserError("where to? Give a new folder by --to FOLDER")
    if arguments.short < 16 or arguments.processes < 1:
        raise UserError("--short has to be at least 16 and --processes at least 1")
    selections = [config.train, config.val] if config.val else [config.train]
    prepare(config.root, selections, arguments.to, arguments.short, arguments.processes)


if __name__ == "__main__":
    launch(main)
