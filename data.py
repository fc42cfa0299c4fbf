"""From video files to clips: exact frames, clip sampling (Sec. 3.3), MultiScaleCrop (Table 9), batches.

Everything random about a sample is a function of (seed, epoch, index) alone, so results depend neither on the number
of loader workers nor on the number of processes, and a resumed run sees what it would have seen.

    python data.py check configs/finetune/ucf101_base.yaml data.root=/data/ucf101    # before days of training
    python data.py prepare data.root=/data/ucf101 --to /data/ucf101_256              # encoded once: clips load many times as fast
"""

import argparse
import csv
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import av
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common import UserError, launch, load_config, parse, position
from masking import split

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
SUFFIXES = frozenset(".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split())
TRIES = 100  # videos in a row that may be unreadable before a run gives up

LabelledVideos = list[tuple[Path, int]]  # each with the number of its class


class BrokenVideo(Exception):
    """A file that holds no readable video, or not the frames asked for. Its text names the file and the reason."""


# ---- frames from a file ----


class Video:
    """A video file, opened for exact access to single frames; use it in a `with` statement. Raises BrokenVideo.

    `len(video)` is its number of frames, `video.frames(indices)` decodes those wanted and as little else as possible.

    Every packet is read (2 ms for 10 s of video) but none decoded to learn when each frame is shown. A wanted frame is
    then decoded from the key frame before it, and frames on the way that no other frame refers to are skipped.
    Only mp4 and Matroska files state the time of every frame. In others, AVI above all (UCF101, HMDB51), FFmpeg guesses
    times and guesses wrong for B-frames: there frames are counted from the start.
    """

    TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.reformatter = VideoReformatter()  # one for all frames: a new one each time costs a third of the decoding
        try:
            self.container = av.open(str(path))
            try:
                self._index_packets()
            except BaseException:
                self.container.close()
                raise
        except (av.FFmpegError, ValueError, UnicodeError) as error:
            raise BrokenVideo(f"{path}: {error}") from error

    def _index_packets(self) -> None:
        self.stream = self.container.streams.best("video")  # a file may hold several, such as a cover picture
        if self.stream is None:
            raise BrokenVideo(f"{self.path}: no video stream")
        self.stream.thread_type, self.stream.thread_count = "NONE", 1  # loader workers are the parallelism
        self.packets = [packet for packet in self.container.demux(self.stream) if packet.size]
        shown = [position for position, packet in enumerate(self.packets) if not packet.is_discard]
        if not shown:
            raise BrokenVideo(f"{self.path}: no frames")
        times = [self.packets[position].pts for position in shown]
        self.timed = self.container.format.name in self.TIMED and None not in times and len(set(times)) == len(times)
        # positions[i]: where, in the order of decoding, the packet of the i-th shown frame stands
        self.positions = sorted(shown, key=lambda position: self.packets[position].pts) if self.timed else shown

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.container.close()

    def __len__(self) -> int:
        return len(self.positions)

    def frames(self, indices: list[int]) -> Tensor:
        """uint8 RGB (len(indices), 3, H, W), upright, frames counted from 0 in the order of display."""
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"{self.path}: frames {indices} asked for, but it has frames 0 to {len(self) - 1}")
        try:
            found = self._decode_by_time(wanted) if self.timed else self._decode_by_counting(wanted)
        except (av.FFmpegError, ValueError) as error:
            raise BrokenVideo(f"{self.path}: {error}") from error
        if len(found) < len(wanted):
            missing = next(index for index in wanted if index not in found)
            raise BrokenVideo(f"{self.path}: frame {missing} of {len(self)} cannot be decoded")
        frames = torch.stack([found[index] for index in indices])  # (len(indices), H, W, 3)
        return frames.permute(0, 3, 1, 2)  # channels stay last in memory: the fastest to copy and to resize

    def every_frame(self) -> Iterator[Tensor]:
        """All frames in the order of display, uint8 RGB (3, H, W), upright. Raises BrokenVideo at the first that is missing."""
        codec, count = self.stream.codec_context, 0
        codec.flush_buffers()
        codec.skip_frame = "DEFAULT"
        try:
            for packet in (*self.packets, None):
                for frame in codec.decode(packet):
                    if frame.is_corrupt:
                        raise BrokenVideo(f"{self.path}: frame {count} of {len(self)} is damaged")
                    count += 1
                    yield self._to_rgb(frame).permute(2, 0, 1)
        except (av.FFmpegError, ValueError) as error:
            raise BrokenVideo(f"{self.path}: frame {count} of {len(self)}: {error}") from error
        if count != len(self):
            raise BrokenVideo(f"{self.path}: only {count} of {len(self)} frames can be decoded")

    def _decode_by_time(self, wanted: list[int]) -> dict[int, Tensor]:
        packets, codec = self.packets, self.stream.codec_context
        index_of = {packets[self.positions[index]].pts: index for index in wanted}
        stretches = []  # packets from the key frame that a wanted frame needs to the frame itself: [first, last]
        for last in (self.positions[index] for index in wanted):
            first = last
            # In an open GOP, frames shown before a key frame are stored after it and need the one before that.
            while first and not (packets[first].is_keyframe and packets[first].pts <= packets[last].pts):
                first -= 1
            stretches.append([first, last])
        runs: list[list[int]] = []  # the same where they overlap or touch, as one
        for first, last in sorted(stretches):
            if runs and first <= runs[-1][1] + 1:
                runs[-1][1] = max(runs[-1][1], last)
            else:
                runs.append([first, last])
        found = {}
        for first, last in runs:
            codec.flush_buffers()
            for packet in (*packets[first : last + 1], None):
                if packet is not None:
                    codec.skip_frame = "DEFAULT" if packet.pts in index_of else "NONREF"
                for frame in codec.decode(packet):
                    if frame.pts in index_of:
                        found[index_of[frame.pts]] = self._to_rgb(frame)
        return found

    def _decode_by_counting(self, wanted: list[int]) -> dict[int, Tensor]:
        codec, shown, found = self.stream.codec_context, 0, {}
        codec.flush_buffers()
        codec.skip_frame = "DEFAULT"
        for packet in (*self.packets, None):
            for frame in codec.decode(packet):
                if shown in wanted:
                    found[shown] = self._to_rgb(frame)
                shown += 1
            if shown > wanted[-1]:
                break
        return found

    def _to_rgb(self, frame: av.VideoFrame) -> Tensor:
        size = dict(width=self.stream.width, height=self.stream.height)  # should the size change within a stream
        image = torch.from_numpy(self.reformatter.reformat(frame, format="rgb24", threads=1, **size).to_ndarray())  # (H, W, 3)
        quarter_turns = round(frame.rotation / 90)  # phones film sideways and say so in the container
        return image.rot90(quarter_turns) if quarter_turns else image


def read_frames(path: str | Path, indices: list[int]) -> Tensor:
    """uint8 RGB (len(indices), 3, H, W), upright: exactly the frames asked for, in the order of display."""
    with Video(path) as video:
        return video.frames(indices)


def write_mp4(
    path: Path, frames: Iterable[Tensor], rate: int | Fraction, quantizer: int = 18,
    options: dict[str, str] | None = None, times: Sequence[int] | None = None, unit: Fraction | None = None
) -> None:  # fmt: skip
    """Write frames uint8, each (3, H, W) with H and W even, as H.264.

    With a constant `quantizer` the same frames give the same file; x264's usual rate control, which `options` can ask
    for, is not reproducible to the bit.
    times: when each frame is shown, in units of `unit` seconds; without them, `rate` frames a second.
    """
    options = options or {"qp": str(quantizer), "preset": "ultrafast"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={**options, "threads": "1"})
        stream.pix_fmt = "yuv420p"
        if times:
            stream.codec_context.time_base = unit
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = frame.shape[1:]
            image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")  # (H, W, 3)
            if times:
                image.pts, image.time_base = times[number], unit
            container.mux(stream.encode(image))
        container.mux(stream.encode())


# ---- which videos there are, and their labels, as each dataset's own files say it ----


class Entry(NamedTuple):
    """One video of a dataset. label: as the dataset writes it, a number or a class's name; "" if it does not."""

    path: Path
    label: str
    where: str  # the file, and the line in it, that names the video


def list_entries(root: str, selection: str) -> list[Entry]:
    """The videos that a configuration names.

    selection: empty for everything below `root`, or the name, below `root`, of
    - a folder: every video below it; its own folder's name is its label (Kinetics, UCF101 and HMDB51 unpacked);
    - a list file: lines `path [label]` or `path,label`, paths relative to `root` (UCF101's trainlist and testlist);
    - a .json list of objects with `id` and `template` or `label` (Something-Something V2);
    - a .csv file with the columns label, youtube_id, time_start, time_end (Kinetics);
    - files with lines `name flag`, one for each class, as `*_test_split1.txt=FLAG`: those with this flag (HMDB51).
    An `id` stands for the video of this name, whatever its suffix, anywhere below `root`.
    Raises UserError, with the line, for what cannot be read, is named twice or is not there at all.
    """
    pattern, flag = re.fullmatch(r"(.*?)(?:=(\d+))?", selection).groups()
    where = Path(root, pattern) if not pattern or Path(root, pattern).exists() else Path(pattern)
    if flag:
        entries = _read_flagged(root, pattern, flag)
    elif where.is_dir():
        videos = sorted(path for path in where.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        entries = [Entry(path, path.parent.name if path.parent != where else "", str(path.parent)) for path in videos]
    elif where.is_file():
        entries = _read_list(root, where)
    else:
        raise UserError(f"there is no folder or list file {where}: set data.root, and data.train or data.val below it")
    if not entries:
        raise UserError(f"no videos found in {where} (files ending in {' '.join(sorted(SUFFIXES))})")
    seen: dict[Path, str] = {}
    for entry in entries:
        if entry.path in seen:
            raise UserError(f"{entry.where}: {entry.path} is named a second time, after {seen[entry.path]}; delete one of the two")
        seen[entry.path] = entry.where
    return entries


def list_videos(root: str, selection: str) -> list[Path]:
    """The paths alone of `list_entries`: pre-training needs no labels."""
    return [entry.path for entry in list_entries(root, selection)]


def _read_list(root: str, file: Path) -> list[Entry]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            named = []
            for item in json.loads(text):
                label = item.get("template") or item.get("label") or ""
                named.append((str(item["id"]), re.sub(r"[\[\]]", "", label), f"{file}: id {item['id']}"))
            return _find_by_name(root, named)
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if {"youtube_id", "time_start", "time_end"} <= set(lines[0][1].split(",") if lines else []):
            named = []
            for row in csv.DictReader(text.splitlines()):
                name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
                named.append((name, row.get("label") or "", f"{file}: youtube_id {row['youtube_id']}"))
            return _find_by_name(root, named)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is not a list of videos in a form that data.list_entries describes ({what})") from None
    entries = []
    video = "|".join(map(re.escape, SUFFIXES))
    for number, line in lines:
        # a name may hold blanks: what follows the suffix is the label
        match = re.fullmatch(rf"(.*?(?:{video}))(?:[\s,]+(.+))?", line, re.IGNORECASE) or re.fullmatch(r"(.*?)(?:[\s,]+(\d+))?", line)
        path, label = match.groups()
        if label and label.startswith("-"):
            raise UserError(f"{file}, line {number}: label {label} for {path}; labels count from 0")
        entries.append(Entry(Path(root, path), label or Path(path).parent.name, f"{file}, line {number}"))
    return entries


def _read_flagged(root: str, pattern: str, flag: str) -> list[Entry]:
    """HMDB51: CLASS_test_split1.txt with lines `name flag`; the class is what stands before the pattern's text."""
    entries = []
    for file in sorted(Path(root).glob(pattern)):
        label = file.name.removesuffix(pattern.rpartition("*")[2])
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not a text file with lines 'name flag' ({error})") from None
        for number, line in enumerate(lines, 1):
            name, _, its_flag = line.strip().rpartition(" ")
            if line.strip() and not (name and its_flag.isdigit()):
                raise UserError(f"{file}, line {number}: expected 'name flag', not '{line.strip()}'")
            if its_flag == flag:
                entries.append(Entry(Path(root, label, name.strip()), label, f"{file}, line {number}"))
    return entries


def _find_by_name(root: str, named: list[tuple[str, str, str]]) -> list[Entry]:
    """Entries for videos known by name: found once for all below `root`; one that is not there stays a broken video."""
    paths = {path.stem: path for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in SUFFIXES}
    return [Entry(paths.get(name, Path(root, name)), label, where) for name, label, where in named]


class Classes:
    """The names of a dataset's classes, and which class a label means.

    From a file: lines `name`, numbered from 0 (Kinetics), lines `number name` (UCF101's classInd.txt) or a .json object
    {"name": "number"} (Something-Something V2's labels). Without one, from the labels of the training videos.
    """

    def __init__(self, root: str, file: str, entries: list[Entry]) -> None:
        if file:
            self.where = Path(root, file) if Path(root, file).exists() else Path(file)
            numbered = self._read(self.where)
        else:
            self.where = "the training videos"
            labels = {entry.label for entry in entries if entry.label}
            if all(label.isdigit() for label in labels):
                numbered = [(number, str(number)) for number in sorted({int(label) for label in labels})]
                if numbered and numbered[-1][0] >= len(numbered):
                    used = f"{len(numbered)} different labels, and {numbered[-1][0]} is one of them"
                    raise UserError(f"the training videos have {used}; labels count from 0, or data.classes names a file with all classes")
            else:
                numbered = list(enumerate(sorted(labels)))
        self.names = [name for _, name in numbered]
        self.by_label = {str(number): index for index, (number, _) in enumerate(numbered)}
        self.by_label |= {self._plain(name): index for index, name in enumerate(self.names)}

    @staticmethod
    def _read(file: Path) -> list[tuple[int, str]]:
        try:
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix == ".json":
                return sorted((int(number), name) for name, number in json.loads(text).items())
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"data.classes: no class names can be read from {file} ({error})") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError(f"data.classes: {file} names no class")
        matches = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
        return [(int(match[1]), match[2]) for match in matches] if all(matches) else list(enumerate(lines))

    @staticmethod
    def _plain(name: str) -> str:
        return name.replace("_", " ").lower()  # folders are often named riding_a_bike for "riding a bike"

    def index(self, entry: Entry) -> int:
        """The class of an entry. Raises UserError with its file and line."""
        index = self.by_label.get(str(int(entry.label)) if entry.label.isdigit() else self._plain(entry.label))
        if index is None:
            if entry.label.isdigit():
                what = f"label {entry.label} is out of range"
            else:
                what = f"unknown class '{entry.label}'" if entry.label else "no label"
            classes = f"{self.where} has {len(self.names)} classes, {', '.join(self.names[:3])}, ..."
            raise UserError(f"{entry.where}: {what} for {entry.path.name}; {classes}")
        return index


def labelled(
    root: str, train: str, val: str, classes: str, per_class: int = 0
) -> tuple[LabelledVideos, LabelledVideos, list[str]]:
    """Videos with their class for training and for testing, and the names of the classes.

    per_class: train on so many videos of each class; 0 for all.
    Without `val` every fifth training video of each class is kept for testing.
    Raises UserError for a video without a label or with one that is out of range.
    """
    entries = list_entries(root, train)
    table = Classes(root, classes, entries)
    by_class: list[LabelledVideos] = [[] for _ in table.names]
    for entry in entries:
        index = table.index(entry)
        by_class[index].append((entry.path, index))
    if val:
        held_out = [(entry.path, table.index(entry)) for entry in list_entries(root, val)]
    else:
        held_out = [video for of_class in by_class for video in of_class[4::5]]
        by_class = [[video for place, video in enumerate(of_class) if place % 5 != 4] for of_class in by_class]
        if not held_out:
            raise UserError(f"no class in {root} has five videos, so none can be kept for testing: name test videos by data.val")
    videos = [video for of_class in by_class for video in (of_class[:per_class] if per_class else of_class)]
    return videos, held_out, table.names


# ---- from frames to a clip ----


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The source of all randomness of one sample: independent for every (seed, epoch, index).

    Below 0 are an epoch's order of samples (index -1), the masks of pictures (epoch -1), and of process R what is
    drawn on the device (index -2 - R): drop path, mixup.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def pick_below(count: int, generator: torch.Generator) -> int:
    """A uniform whole number in [0, count)."""
    return int(torch.randint(count, (), generator=generator))


def dense_clip(length: int, frames: int, stride: int, generator: torch.Generator | None = None) -> list[int]:
    """Indices of `frames` frames, `stride` apart (Sec. 3.3, "Temporal downsampling"), from a uniformly random start.

    Without a generator the clip is the one in the middle. In a video of `length` < frames * stride it starts at 0 and
    repeats the last index that it reaches.
    """
    spare = max(length - frames * stride, 0)
    start = pick_below(spare + 1, generator) if generator else spare // 2
    last = start + (length - 1 - start) // stride * stride
    return [min(start + i * stride, last) for i in range(frames)]


def dense_training_clip(length: int, frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """Dense sampling for fine-tuning on Kinetics, UCF101 and HMDB51, as the authors' code does it (after SlowFast).

    `frames` indices spread evenly over a random stretch of frames * stride, from its first frame to its end: 16 frames
    with stride 4 are 64/15 apart, not 4. The last one, just past the stretch, is clipped. A shorter video is taken whole.
    """
    span = frames * stride
    if length > span:
        end = span + pick_below(length - span, generator)
        return [min(int(end - span + i * span / max(frames - 1, 1)), end - 1) for i in range(frames)]
    count = length // stride
    indices = [int(i * length / (count - 1)) if count > 1 else 0 for i in range(count)]
    return [min(index, length - 1) for index in indices + [length] * (frames - count)]


def uniform_training_clip(length: int, frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """TSN's uniform sampling (Something-Something): a random frame from each of `frames` equal parts; no stride."""
    part = length // frames
    if part == 0:  # here the authors' code takes frame 0 throughout
        return [i * length // frames for i in range(frames)]
    return [i * part + pick_below(part, generator) for i in range(frames)]


def dense_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """`clips` clips of frames exactly `stride` apart, from the first that fits to the last; one alone in the middle."""
    strided = list(range(0, length, stride))
    strided += [strided[-1]] * (frames - len(strided))
    spare = len(strided) - frames
    starts = [k * spare // (clips - 1) for k in range(clips)] if clips > 1 else [spare // 2]
    return [strided[start : start + frames] for start in starts]


def uniform_test_clips(length: int, frames: int, stride: int, clips: int) -> list[list[int]]:
    """`clips` interleaved clips over the whole video; no stride. One alone takes the middle of each part."""
    tick = length / frames
    offsets = [k * tick / clips for k in range(clips)] if clips > 1 else [tick / 2]
    indices = sorted(int(offset + tick * i) for offset in offsets for i in range(frames))
    return [indices[k::clips] for k in range(clips)]


SAMPLING = {"dense": (dense_training_clip, dense_test_clips), "uniform": (uniform_training_clip, uniform_test_clips)}


def test_crops(frames: Tensor, size: int, crops: int) -> Tensor:
    """`crops` windows size x size along the longer side of frames (T, 3, H, W) with the shorter side resized to `size`.

    They go from one end to the other, one alone stands in the middle. Returns (crops, T, 3, size, size).
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    frames = TF.resize(frames, [height * size // short, width * size // short], antialias=True)
    long = max(frames.shape[-2:])
    starts = [int(j * (long - size) / (crops - 1)) for j in range(crops)] if crops > 1 else [(long - size) // 2]
    return torch.stack([frames.narrow(-1 if width >= height else -2, start, size) for start in starts])


def multi_scale_crop(
    height: int, width: int, size: int, scales: list[float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """MultiScaleCrop of TSN (Tables 9 and 11): a random crop as (top, left, height, width), to be resized to size x size.

    Side lengths are the shorter side times one of `scales`, the two at most one scale apart; the place is one of 13.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]  # no resizing by one or two pixels
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[pick_below(len(pairs), generator)]
    step_y, step_x = (height - crop_height) // 4, (width - crop_width) // 4
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)]  # corners, middles of the edges, centre
    places += [(y, x) for y in (1, 3) for x in (1, 3)]  # half-way from the centre to each corner
    y, x = places[pick_below(len(places), generator)]
    return y * step_y, x * step_x, crop_height, crop_width


def resized_multi_scale_crop(frames: Tensor, generator: torch.Generator, size: int, scales: list[float], flip: bool) -> Tensor:
    """One MultiScaleCrop for all frames (T, 3, H_video, W_video), and a flip in half of the cases: (T, 3, size, size)."""
    top, left, height, width = multi_scale_crop(*frames.shape[-2:], size, scales, generator)
    clip = TF.resized_crop(frames, top, left, height, width, [size, size], antialias=True)
    return (clip.flip(-1) if flip and pick_below(2, generator) else clip).contiguous()


def center_crop(frames: Tensor, size: int) -> Tensor:
    """The largest central square of frames (T, 3, H, W), resized to size x size."""
    side = min(frames.shape[-2:])
    return TF.resize(TF.center_crop(frames, [side, side]), [size, size], antialias=True)


class Augmentation:
    """RandAugment, random resized crop, flip, erasing: what fine-tuning does to a clip (Table 10, order of the authors' code).

    randaugment: number of operations, magnitude (of 10), its standard deviation; each operation is done half the time.
    Each choice holds for all frames of the clip. Called with frames uint8 (T, 3, H, W) it returns uint8 (T, 3, size, size).
    """

    def __init__(
        self, *, size: int, randaugment: tuple[int, float, float], area: tuple[float, float], aspect: tuple[float, float],
        flip: bool, erase: float
    ) -> None:  # fmt: skip
        self.operations, self.magnitude, self.deviation = randaugment
        self.crop = v2.RandomResizedCrop(size, area, aspect, antialias=True)
        self.flip = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        self.erase = erase

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's global source of randomness
            torch.manual_seed(pick_below(2**62, generator))
            clip = tv_tensors.Video(frames)
            for _ in range(int(self.operations)):
                if torch.rand(()) < 0.5:
                    level = (self.magnitude + self.deviation * torch.randn(())).clamp(0, 10)
                    magnitude = round(float(level) * 3)  # torchvision counts to 30
                    mean_colour = [int(255 * mean) for mean in MEAN]
                    clip = v2.RandAugment(1, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=mean_colour)(clip)
            clip = self.flip(self.crop(clip)).as_subclass(Tensor).contiguous()  # (T, 3, size, size)
            if torch.rand(()) < self.erase:
                clip = clip.clone()  # a crop that changes nothing returns the decoded frames, which other repeats use too
                top, left, height, width, _ = v2.RandomErasing.get_params(clip[0].float(), (0.02, 1 / 3), (0.3, 10 / 3), [0.0])
                noise = torch.randn(len(clip), 3, height, width) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
                clip[:, :, top : top + height, left : left + width] = noise.mul(255).clamp(0, 255).byte()
        return clip


def normalize(clip: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 (B, T, 3, H, W), as the loader hands it over, to the model's input: float (B, 3, T, H, W)."""
    mean, std = _statistics(clip.device, tuple(mean), tuple(std))
    return clip.transpose(1, 2).float().sub_(mean).div_(std)


@functools.cache  # copied to a GPU once: every copy would make the loop wait
def _statistics(device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (mean, std))


# ---- datasets and batches ----


class TrainingVideos(Dataset, ABC):
    """Samples by (epoch, index). A broken video is replaced by another one, chosen by the sample's own generator.

    A sample is what `sample` makes of a video, followed by a list with the reasons why others could not be read.
    """

    def __init__(self, videos: list, seed: int) -> None:
        self.videos, self.seed = videos, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        epoch, index = key
        generator = sample_generator(self.seed, epoch, index)
        broken = []
        while True:
            try:
                return *self.sample(self.videos[index], generator), broken
            except BrokenVideo as error:
                broken.append(str(error))
                if len(broken) == TRIES:
                    raise UserError(f"{TRIES} videos in a row could not be read; look at data.root and at the last one, {error}") from None
                index = pick_below(len(self), generator)

    @abstractmethod
    def sample(self, video: Any, generator: torch.Generator) -> tuple:
        """What a batch takes of one video. Raises BrokenVideo."""


class PretrainingClips(TrainingVideos):
    """Random clips and their masks: clip uint8 (T, 3, H, W), positions of visible (N_vis,) and masked (N_mask,) cubes."""

    def __init__(
        self, videos: list[Path], *, frames: int, stride: int, size: int, scales: list[float], flip: bool,
        draw_mask: Callable[[torch.Generator], Tensor], seed: int
    ) -> None:  # fmt: skip
        super().__init__(videos, seed)
        self.frames, self.stride, self.size, self.scales, self.flip, self.draw_mask = frames, stride, size, scales, flip, draw_mask

    def sample(self, video: Path, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        with Video(video) as opened:
            frames = opened.frames(dense_clip(len(opened), self.frames, self.stride, generator))  # (T, 3, H_video, W_video)
        clip = resized_multi_scale_crop(frames, generator, self.size, self.scales, self.flip)  # (T, 3, H, W)
        return clip, *split(self.draw_mask(generator))


class LabelledClips(TrainingVideos):
    """Clips with their class: uint8 (repeats, T, 3, H, W) and a number.

    Repeated augmentation (Table 10): the same frames, decoded once, in `repeats` independent augmentations.
    """

    def __init__(
        self, videos: LabelledVideos, *, frames: int, stride: int, sampling: str,
        augment: Callable[[Tensor, torch.Generator], Tensor], repeats: int, seed: int
    ) -> None:  # fmt: skip
        super().__init__(videos, seed)
        self.frames, self.stride, self.augment, self.repeats = frames, stride, augment, repeats
        self.choose_frames = SAMPLING[sampling][0]

    def sample(self, video: tuple[Path, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        path, label = video
        with Video(path) as opened:
            frames = opened.frames(self.choose_frames(len(opened), self.frames, self.stride, generator))  # (T, 3, H_video, W_video)
        return torch.stack([self.augment(frames, generator) for _ in range(self.repeats)]), torch.tensor(label)


class TestViews(Dataset):
    """Items (index, views, reason): all views of a video, uint8 (clips * crops, T, 3, H, W), or None and why there are none.

    Every frame is decoded once. Nothing is random, and no other video stands in for one that cannot be read.
    """

    def __init__(self, videos: list[Path], *, frames: int, stride: int, sampling: str, size: int, clips: int, crops: int) -> None:
        self.videos, self.frames, self.stride, self.size = videos, frames, stride, size
        self.clips, self.crops, self.choose_frames = clips, crops, SAMPLING[sampling][1]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            with Video(self.videos[index]) as video:
                clips = self.choose_frames(len(video), self.frames, self.stride, self.clips)
                wanted = sorted(set(sum(clips, [])))
                crops = test_crops(video.frames(wanted), self.size, self.crops)  # (crops, len(wanted), 3, H, W)
        except BrokenVideo as error:
            return index, None, str(error)
        place = {frame: number for number, frame in enumerate(wanted)}
        views = [crops[:, [place[frame] for frame in clip]] for clip in clips]  # clips times (crops, T, 3, H, W)
        return index, torch.cat(views), ""


def collate_views(items: list[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    """Indices and views (B, V, T, 3, H, W) of the readable videos, None without any; indices and reasons of the others."""
    indices = [index for index, views, _ in items if views is not None]
    readable = [views for _, views, _ in items if views is not None]
    broken = [(index, reason) for index, views, reason in items if views is None]
    return indices, torch.stack(readable) if readable else None, broken


def collate(samples: list[tuple]) -> tuple:
    """Stack the tensors of samples; join the reports of broken videos, which come last."""
    *tensors, broken = zip(*samples)
    return *(torch.stack(column) for column in tensors), sum(broken, [])


def loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    """A DataLoader with `workers` processes beside this one, 0 for none; for a GPU, batches come in pinned memory."""
    ahead = dict(num_workers=workers, prefetch_factor=4) if workers else {}
    return DataLoader(dataset, pin_memory=torch.cuda.is_available(), **ahead, **options)


class GlobalBatches(Sampler):
    """One process's share of every global batch, in pieces of `per_device` clips, as lists of (epoch, index).

    Every epoch is a new shuffle of the videos, the last incomplete batch dropped. Which videos form the batch of a step
    does not depend on the number of processes. Begins at `start`, the step at which a run resumes, ends before `steps`.
    """

    def __init__(
        self, *, length: int, batch_size: int, per_device: int, rank: int, world_size: int, seed: int, start: int, steps: int
    ) -> None:  # fmt: skip
        self.length, self.batch_size, self.per_device, self.seed = length, batch_size, per_device, seed
        self.rank, self.world_size, self.start, self.steps = rank, world_size, start, steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.length // self.batch_size
        shuffled = None
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, per_epoch)
            if batch == 0 or shuffled is None:
                shuffled = torch.randperm(self.length, generator=sample_generator(self.seed, epoch, -1)).tolist()
            mine = shuffled[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]
            for piece in range(0, len(mine), self.per_device):
                yield [(epoch, index) for index in mine[piece : piece + self.per_device]]

    def __len__(self) -> int:
        return (self.steps - self.start) * self.batch_size // (self.world_size * self.per_device)


def training_batches(
    videos: TrainingVideos, workers: int, *, batch_size: int, per_device: int, start: int, steps: int, collate_fn: Callable = collate
) -> Iterator[tuple]:
    """This process's batches of all steps from `start` on, in pieces of `per_device` samples: see GlobalBatches."""
    rank, world_size = position()
    share = GlobalBatches(
        length=len(videos), batch_size=batch_size, per_device=per_device, rank=rank, world_size=world_size,
        seed=videos.seed, start=start, steps=steps
    )  # fmt: skip
    return iter(loader(videos, workers, batch_sampler=share, collate_fn=collate_fn))


# ---- a dataset looked over before days of training ----


def check(root: str, train: str, val: str, classes: str, processes: int) -> bool:
    """Print how many videos there are of each class, for training and for testing, and what is wrong; return whether all is well.

    Wrong are labels, files that cannot be read (the first, the middle and the last frame are decoded), and test videos
    that are among those for training.
    """
    table, well, seen = None, True, set()
    for what, selection in (("training", train), ("testing", val)) if val else (("training", train),):
        entries = list_entries(root, selection)
        table = table or Classes(root, classes, entries)
        count, wrong = Counter(), []
        for entry in entries:
            try:
                count[table.index(entry)] += 1
            except UserError as error:
                wrong.append(str(error))
        pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
        with pool or nullcontext():
            paths = [entry.path for entry in entries]
            reasons = pool.imap(_unreadable, paths, chunksize=16) if pool else map(_unreadable, paths)
            broken = [reason for reason in tqdm(reasons, f"reading {what} videos", len(entries), unit="video") if reason]
        print(
            f"{len(entries):,} videos for {what} in {selection or root}, {len(table.names)} classes, "
            f"{len(wrong)} wrong labels, {len(broken)} unreadable"
        )
        for index, name in enumerate(table.names):
            print(f"{count[index]:8,}  {name}")
        for report in (*wrong, *broken):
            print(f"  {report}")
        both = {entry.path for entry in entries} & seen
        if both:
            print(f"  {len(both):,} videos are for training as well, {min(both)} for one")
        seen = {entry.path for entry in entries}
        well = well and not (wrong or broken or both)
    return well


def _unreadable(path: Path) -> str:
    try:
        with Video(path) as video:
            video.frames([0, len(video) // 2, len(video) - 1])
    except BrokenVideo as error:
        return str(error)
    return ""


# ---- a dataset encoded once, so that random clips are cheap to decode ----

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
            times = [packet.pts for packet in video.packets if not packet.is_discard]
            rate, unit = video.stream.average_rate or Fraction(25), video.stream.time_base
            if None in times or len(set(times)) < len(times):  # AVI states no times, only a rate
                times, unit = range(len(video)), 1 / rate
            frames = (TF.resize(frame, _prepared_size(frame, short), antialias=True) for frame in video.every_frame())
            write_mp4(part, frames, rate, options=X264, times=sorted(times), unit=unit)
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
    parser.add_argument("command", choices=["check", "prepare"])
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="prepare: where the prepared videos go")
    parser.add_argument("--short", type=int, default=256, help="prepare: most pixels of the shorter side, 256; 320 for inputs of 320 x 320")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="prepare: videos at a time, one for each core")
    default = Path(__file__).parent / "configs" / "finetune" / "toy.yaml"
    arguments = parse(parser)
    config = load_config(default, arguments.settings).data
    if not config.root:
        raise UserError("which dataset? Name a configuration file or give data.root, data.train and data.val")
    if arguments.command == "prepare":
        if not arguments.to:
            raise UserError("where to? Give a new folder by --to FOLDER")
        if arguments.short < 16 or arguments.processes < 1:
            raise UserError("--short has to be at least 16 and --processes at least 1")
        selections = [config.train, config.val] if config.val else [config.train]
        prepare(config.root, selections, arguments.to, arguments.short, arguments.processes)
    elif not check(config.root, config.train, config.val, config.classes, max(1, config.workers)):
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
