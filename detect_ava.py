"""Action detection on AVA v2.2 (Sec. 4.3, Tables 5 and 12): which of 80 actions does each person do, once a second of a movie?

    laptop:   torchrun detect_ava.py                        # toy videos, from the encoder that `torchrun pretrain.py` leaves
    8 GPUs:   torchrun --nproc_per_node=8 detect_ava.py configs/detect/k400_base.yaml data.root=/data/ava init=pretrained.pt
    8 nodes:  torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 detect_ava.py ...
    test:     torchrun --nproc_per_node=8 detect_ava.py --test --weights runs/detect/k400_base/checkpoint.pt
    predict:  python detect_ava.py --predict VIDEO --boxes PERSONS.csv --weights runs/detect/toy/checkpoint.pt
    evaluate: python detect_ava.py --evaluate DETECTIONS.csv --ground-truth ava_val_v2.2.csv \\
                  --exclude ava_val_excluded_timestamps_v2.2.csv --labels ava_action_list_v2.2_for_activitynet_2019.pbtxt

AVA labels one frame of every second, the key frame: a box for each person and, for each box, all that the person does
(one pose, and objects handled and persons dealt with, if any). A network sees a clip around the key frame. Where the
persons are is given: by people for training, by a detector of persons for testing.

From a detected box to its 80 scores, in the order of this file:

    read_person_boxes   a row video,second,x1,y1,x2,y2,,score of the detector, kept if the score is at least 0.8
    read_clip           16 frames around that second of the movie, 4 apart
    TestClips           frames with a short side of 256 pixels, and the box in these pixels (KeyFrameClips: training, cropped)
    ActionDetector      tokens; mean over time; RoIAlign of the box, 7 x 7; maximum; linear: 80 logits
    detect              sigmoid: 80 probabilities; times the detector's score if data.person_score is set
    write_rows          a row video,second,x1,y1,x2,y2,action,score of detections.csv for each action that is evaluated
    average_precisions  what such rows are worth: frame-mAP at IoU 0.5

The same command again goes on from the last checkpoint. Any value of the YAML file can be given as key=value.
"""

import argparse
import json
import math
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import common
import data
import toy
from common import UserError, say
from data import BrokenVideo
from finetune import check_init, encoder_options, parameter_groups
from model import Encoder, build_from, cube_grid, load_weights, read_checkpoint, read_options, recompute_blocks, truncated_normal

CONFIGS = Path(__file__).parent / "configs" / "detect"
DEFAULT = CONFIGS / "toy.yaml"
ACTIONS = 80  # of AVA, numbered from 1; 60 of them are evaluated (Sec. 4.3)
RATE = 30  # frames a second that a stride counts, whatever the movie's own rate
START = 900  # second of each movie at which AVA's 15 minutes begin

Frame = tuple[str, int]  # a key frame: video, second
Box = tuple[float, float, float, float]  # x1 y1 x2 y2 as fractions of width and height


# ---- what AVA consists of ----


class Row(NamedTuple):
    """A row of AVA's csv files."""

    frame: Frame
    box: Box
    action: int  # from 1; 0 where the file states none
    score: float  # 1 where the file states none


@dataclass
class KeyFrame:
    """A frame with M persons: what the rows of a (video, second) say together."""

    video: str
    second: int
    boxes: Tensor  # (M, 4) x1 y1 x2 y2 as fractions of width and height, float64
    labels: Tensor  # (M, actions) 1.0 for each action that the person does, 0.0 otherwise; in a prediction, probabilities
    scores: Tensor  # (M,) of the person detector, float64; 1 for ground truth


@dataclass
class Action:
    """An entry of AVA's list of actions."""

    name: str
    group: str  # one of GROUPS; empty if unknown


GROUPS = ("PERSON_MOVEMENT", "OBJECT_MANIPULATION", "PERSON_INTERACTION")  # AVA's actions 1 to 14, 15 to 63, 64 to 80


@dataclass
class TestSet:
    """What a model is tested on."""

    movies: dict[str, Path]
    persons: list[KeyFrame]  # boxes that a detector found, as key frames without labels
    ground_truth: list[Row]
    actions: dict[int, Action]  # those evaluated
    excluded: set[Frame]


# ---- AVA's csv files: rows, and key frames made of them ----


def read_ground_truth(path: Path, actions: int = ACTIONS) -> list[Row]:
    """AVA's annotations: rows video,second,x1,y1,x2,y2,action,person. Raises UserError with file and line."""
    return _read_rows(path, actions)


def read_detections(path: Path, actions: int = ACTIONS) -> list[Row]:
    """Detected actions: rows video,second,x1,y1,x2,y2,action,score; without a score it is 1. Raises UserError."""
    return _read_rows(path, actions, scored=True, any_box=True)


def read_person_boxes(
    path: Path, threshold: float, file_list: Path | None = None, sizes: Mapping[str, tuple[int, int]] | None = None
) -> list[KeyFrame]:
    """Boxes of persons that a detector found with a score of at least `threshold`, in the paper 0.8 (Sec. B).

    path: csv as SlowFast has it, rows video,second,x1,y1,x2,y2,action or nothing,score; or json as AIA has it. This numbers
    the movies by their place in AVA's file list and measures in pixels, so it needs the width and height of each movie;
    boxes of movies whose size is not given are left out. Raises UserError.
    """
    if path.suffix in (".pkl", ".pickle"):  # unpickling would run whatever code the file holds
        load = f"pickle.load(open('{path}', 'rb'))"
        convert = f"import pickle; [print(key, *row[:4], '', row[4], sep=',') for key, rows in {load}.items() for row in rows]"
        raise UserError(f'{path} is a pickle, which could run any code: if you trust it, convert it with python -c "{convert}" > boxes.csv')
    if path.suffix == ".json":
        rows = _read_aia_boxes(path, file_list, sizes)
    else:
        rows = _read_rows(path, ACTIONS, scored=True, unlabelled=True)
    kept = [row for row in rows if row.score >= threshold]
    if not kept:
        highest = max(row.score for row in rows)
        raise UserError(f"{path}: none of {len(rows)} boxes has a score of {threshold} or more; the highest is {highest:.3f}")
    return key_frames(kept)


def _read_rows(path: Path, actions: int, *, scored: bool = False, unlabelled: bool = False, any_box: bool = False) -> list[Row]:
    """scored: column 8 is a score, otherwise a person's number, which nothing needs. unlabelled: the action may be empty.

    any_box: boxes may have their edges in the wrong order; the evaluation drops them.
    """
    rows: list[Row] = []
    known: dict[tuple[Frame, Box], tuple[Frame, Box]] = {}  # boxes stand in many rows: one copy saves memory
    for number, line in _lines(path):
        try:
            columns = line.split(",")
            if len(columns) not in (7, 8):
                raise ValueError(f"{len(columns)} columns")
            video, second, *edges, action = columns[:7]
            x1, y1, x2, y2 = box = tuple(map(float, edges))
            if not video or not second.isdecimal():
                raise ValueError("no video, or a second that is not a whole number")
            if not all(-10 < edge < 10 for edge in box):
                raise ValueError("a box in pixels, or with numbers that are not finite")
            if not any_box and (x1 > x2 or y1 > y2):
                raise ValueError("a box whose left or upper edge lies beyond the other")
            label = 0 if unlabelled and not action.strip() else int(action)
            if not (0 if unlabelled else 1) <= label <= actions:
                raise ValueError(f"unknown action {label}, known are 1 to {actions}")
            score = float(columns[7]) if scored and len(columns) == 8 else 1.0
            if not math.isfinite(score):
                raise ValueError("a score that is not finite")
        except ValueError as error:
            form = "video,second,x1,y1,x2,y2,action" + (",score" if scored else ",person")
            raise UserError(f"{path}, line {number}: {error}; a row is {form}, the box in fractions of width and height") from None
        place = (video, int(second)), box
        rows.append(Row(*known.setdefault(place, place), label, score))
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, blank ones left out. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no rows can be read from {path}: {error}") from None


def key_frames(rows: list[Row], actions: int = ACTIONS) -> list[KeyFrame]:
    """Rows put together by key frame and, within it, by box; in the order of video and second."""
    rows_of: dict[tuple[Frame, Box], list[Row]] = {}
    for row in rows:
        rows_of.setdefault((row.frame, row.box), []).append(row)
    persons = sorted(rows_of)  # by video, second and box
    boxes = torch.tensor([box for _, box in persons], dtype=torch.float64)  # (P, 4)
    scores = torch.tensor([max(row.score for row in rows_of[person]) for person in persons], dtype=torch.float64)  # (P,)
    labels = torch.zeros(len(persons), actions + 1)  # (P, 1 + actions), column 0 for rows without an action
    for person, of_person in zip(persons, labels):
        of_person[[row.action for row in rows_of[person]]] = 1.0
    counts = Counter(frame for frame, _ in persons)  # persons in each frame
    # Views of three tensors: where loader processes are not forked, they cannot be handed thousands of separate ones.
    pieces = zip(counts, *(column.split([*counts.values()]) for column in (boxes, labels[:, 1:], scores)))
    return [KeyFrame(*frame, *tensors) for frame, *tensors in pieces]


# ---- the clip around a key frame: time, not a frame's number, decides ----


def clip_times(second: int, frames: int, stride: int, rate: float = RATE) -> list[Fraction]:
    """When, in seconds, the frames of the clip around `second` are shown; the key frame is the first of the second half.

    Frames are `stride` frames apart at the nominal `rate`: 16 x 4 at 30 a second reach from -32/30 s to +28/30 s.
    """
    return [second + Fraction((i - frames // 2) * stride) / Fraction(rate) for i in range(frames)]


def read_clip(path: Path, second: int, *, frames: int, stride: int, rate: float = RATE, starts_at: int = START) -> Tensor:
    """The clip of T = `frames` frames around the key frame at `second` of a movie: uint8 (T, 3, H, W). Raises BrokenVideo.

    path: a movie file, or a folder of frames extracted at 30 a second, as SlowFast has them: <video>_000001.jpg, ...
    starts_at: the second of the movie at which the file or folder starts: 900 if it was cut to AVA's part, 0 if it is whole.
    Before the start and after the end the first and the last frame stand in.
    """
    times = [time - starts_at for time in clip_times(second, frames, stride, rate)]
    too_far = f"{path}: second {second} lies outside, if it starts at second {starts_at}; is the movie cut or whole?"
    if path.is_dir():
        numbers = [1 + math.ceil(time * 30 - Fraction(1, 2)) for time in times]  # the nearest frame, of two the earlier
        last = _last_frame(path)
        if not 1 <= numbers[frames // 2] <= last + 15:
            raise BrokenVideo(too_far)
        return torch.stack([_read_frame(path, min(max(number, 1), last)) for number in numbers])  # (T, 3, H, W)
    if second < starts_at:
        raise BrokenVideo(too_far)
    with Excerpt(path, times[0], times[-1]) as excerpt:
        if second - starts_at > excerpt.times[-1] + Fraction(1, 2):
            raise BrokenVideo(too_far)
        return excerpt.frames([nearest(excerpt.times, time) for time in times])  # (T, 3, H, W)


def nearest(times: list[Fraction], time: Fraction) -> int:
    """Index of the nearest to `time` of the sorted `times`, the earlier of two equally near."""
    right = bisect_left(times, time)
    neighbours = range(max(right - 1, 0), min(right + 1, len(times)))
    return min(neighbours, key=lambda index: abs(times[index] - time))


class Excerpt(data.Video):
    """The part of a movie around the times from `begin` to `end`, in seconds from its start; the rest of the file is not read.

    `excerpt.times` says when each of its frames is shown, `excerpt.frames(indices)` decodes some. Raises BrokenVideo.
    """

    def __init__(self, path: Path, begin: Fraction, end: Fraction) -> None:
        self.begin, self.end = begin, end
        super().__init__(path)

    def _index_packets(self) -> None:
        self.stream = self.container.streams.best("video")
        if self.stream is None:
            raise BrokenVideo(f"{self.path}: no video stream")
        if self.container.format.name not in self.TIMED:
            raise BrokenVideo(f"{self.path}: only mp4 and Matroska files state the time of every frame; encode it anew as one of them")
        self.stream.thread_type, self.stream.thread_count = "NONE", 1  # loader workers are the parallelism
        self.timed, unit = True, self.stream.time_base
        origin = Fraction(self.container.start_time or 0, 1_000_000)
        begin, end = (origin + self.begin) / unit, (origin + self.end) / unit  # on the file's own clock
        start, back = self.stream.start_time or 0, 0
        # A key frame decoded at or before the target may be shown after it: then seek again, 1, 3, 7, ... seconds further back.
        while True:
            target = max(int(begin - back / unit), start)
            self.container.seek(target, stream=self.stream)
            self.packets = self._read_until(end)
            if target == start or self.packets and self.packets[0].pts <= begin:
                break
            back = 2 * back + 1
        if not self.packets:
            raise BrokenVideo(f"{self.path}: no frames around {float(self.begin):.1f} s")
        first = self.packets[0].pts  # what is shown before this key frame needs frames that have not been read
        shown = [position for position, packet in enumerate(self.packets) if not packet.is_discard and packet.pts >= first]
        self.positions = sorted(shown, key=lambda position: self.packets[position].pts)
        self.times = [self.packets[position].pts * unit - origin for position in self.positions]

    def _read_until(self, end: Fraction) -> list:
        """Packets from the next key frame on, in the order of decoding: a frame at or after `end` and all shown before it."""
        packets, after = [], math.inf
        for packet in self.container.demux(self.stream):
            if not packet.size or not packets and not packet.is_keyframe:
                continue
            if packet.pts is None:
                raise BrokenVideo(f"{self.path}: frames without a time; encode it anew")
            if packet.dts is not None and packet.dts >= after:  # nothing is shown before it is decoded
                break
            packets.append(packet)
            if packet.pts >= end:
                after = min(after, packet.pts)
        return packets


@cache  # a folder may hold 27,000 frames
def _last_frame(folder: Path) -> int:
    """The highest number of a frame in a folder of extracted frames."""
    pattern = re.compile(re.escape(folder.name) + r"_(\d{6})\.jpg")
    numbers = [int(match[1]) for match in map(pattern.fullmatch, os.listdir(folder)) if match]
    if not numbers:
        raise BrokenVideo(f"{folder}: no frames named {folder.name}_000001.jpg and so on")
    return max(numbers)


def _read_frame(folder: Path, number: int) -> Tensor:
    """A frame in a folder of extracted frames, uint8 (3, H, W)."""
    path = folder / f"{folder.name}_{number:06d}.jpg"
    try:
        return TF.pil_to_tensor(Image.open(path).convert("RGB"))
    except OSError as error:
        raise BrokenVideo(f"{path}: {error}") from None


# ---- boxes in pixels: they go with the frames through every change of the picture ----
# A corner is a point, not a pixel: x runs from 0 at the left edge of a frame to its width at the right edge.


def to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (M, 4) in fractions of a frame to pixels."""
    return boxes * boxes.new_tensor([width, height, width, height])


def resize_short_side(frames: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Frames (T, 3, H, W), and boxes (M, 4) with them, resized so that the shorter side has `size` pixels."""
    resized = TF.resize(frames, [size], antialias=True)
    scale_y, scale_x = (new / old for new, old in zip(resized.shape[-2:], frames.shape[-2:]))  # rounded, so not quite the same
    return resized, boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])


def crop(frames: Tensor, boxes: Tensor, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A window of the frames. Boxes are clamped to it; one that lies wholly outside has no area left."""
    moved = boxes - boxes.new_tensor([left, top, left, top])
    return frames[..., top : top + height, left : left + width], clamp_boxes(moved, height, width)


def flip(frames: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Frames and boxes with left and right exchanged."""
    width = frames.shape[-1]
    x1, y1, x2, y2 = boxes.unbind(1)
    return frames.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=1)


def clamp_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (M, 4) clamped to the frame."""
    return boxes.clamp(boxes.new_zeros(4), boxes.new_tensor([width, height, width, height]))


def pad(clip: Tensor, cube: tuple[int, int, int]) -> Tensor:
    """A clip (..., H, W) whose H and W are made whole numbers of cubes: with zeros, after `data.normalize` the mean colour.

    They are added on the right and below, so boxes in pixels stay as they are.
    """
    return F.pad(clip, (0, -clip.shape[-1] % cube[2], 0, -clip.shape[-2] % cube[1]))


def jitter_boxes(
    boxes: Tensor, generator: torch.Generator, outward: tuple[float, float] = (0.2, 0.1), inward: tuple[float, float] = (0.1, 0.05)
) -> Tensor:
    """Each edge moved on its own, uniformly between `inward` and `outward`, fractions of the box's (width, height).

    In the authors' training, not in the paper.
    """
    extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # (M, 4) width, height, width, height
    outward, inward = boxes.new_tensor(outward * 2), boxes.new_tensor(inward * 2)
    shift = torch.rand(boxes.shape, generator=generator, dtype=boxes.dtype) * (outward + inward) - inward  # outward is positive
    return boxes + shift * extent * boxes.new_tensor([-1, -1, 1, 1])


def enlarge_boxes(boxes: Tensor, by: tuple[float, float] = (0.1, 0.05)) -> Tensor:
    """Boxes made wider and higher by fractions of their (width, height), half on either side.

    The authors' code pools from these in testing, the paper does not say so.
    """
    half = (boxes[:, 2:] - boxes[:, :2]) * boxes.new_tensor(by) / 2  # (M, 2)
    return boxes + torch.cat([-half, half], dim=1)


def jitter_colours(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames uint8 (T, 3, H, W) with hue, saturation and value moved by up to 10 of 180, 26 and 26 of 255, the same in all.

    In the authors' training, not in the paper.
    """
    hue, saturation, value = ((2 * torch.rand(3, generator=generator) - 1) * torch.tensor([10 / 180, 26 / 255, 26 / 255])).tolist()
    frames = TF.adjust_hue(frames, hue).float() / 255  # (T, 3, H, W)
    low, high = frames.amin(dim=1, keepdim=True), frames.amax(dim=1, keepdim=True)  # (T, 1, H, W); HSV's value is `high`,
    spread = (high - low).clamp(min=1e-6)  # its saturation spread / high,
    away = (high - frames) / spread  # (T, 3, H, W) and its hue this: 0 for the strongest channel, 1 for the weakest
    saturated = (spread / high.clamp(min=1e-6) + saturation).clamp(0, 1)
    return ((high + value).clamp(0, 1) * (1 - saturated * away) * 255).round().byte()


# ---- training clips and test clips (Sec. B) ----


def resized_clip(frame: KeyFrame, movies: dict[str, Path], settings: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """The clip around a key frame, uint8 (T, 3, H, W), its short side 256 in the paper (Sec. B), and boxes (M, 4) in its pixels."""
    s = settings
    clip = read_clip(movies[frame.video], frame.second, frames=s.frames, stride=s.stride, rate=s.rate, starts_at=s.starts_at)
    return resize_short_side(clip, to_pixels(frame.boxes.float(), *clip.shape[-2:]), s.short_side)


class KeyFrameClips(data.TrainingVideos):
    """Random crops around labelled key frames: uint8 (T, 3, size, size), boxes (M, 4) in pixels, labels (M, classes). Sec. B."""

    def __init__(self, frames: list[KeyFrame], movies: dict[str, Path], settings: SimpleNamespace, seed: int) -> None:
        super().__init__(frames, seed)
        self.movies, self.settings = movies, settings

    def sample(self, frame: KeyFrame, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        s = self.settings
        clip, boxes = resized_clip(frame, self.movies, s)  # (T, 3, H, W), (M, 4)
        if s.jitter_boxes:
            boxes = jitter_boxes(boxes, generator)
        top, left = (data.pick_below(side - s.size + 1, generator) for side in clip.shape[-2:])
        # Persons outside the crop stay, as boxes without area at its edge, as in the authors' code.
        clip, boxes = crop(clip, boxes, top, left, s.size, s.size)  # (T, 3, size, size)
        if s.flip and data.pick_below(2, generator):
            clip, boxes = flip(clip, boxes)
        if s.jitter_colours:
            clip = jitter_colours(clip, generator)
        return clip.contiguous(), boxes, frame.labels


def to_rois(boxes: list[Tensor]) -> Tensor:
    """Boxes of each clip, (M_i, 4) in pixels, as one tensor (M, 5) whose first column is the clip's index in the batch."""
    return torch.cat([F.pad(of_clip, (1, 0), value=index) for index, of_clip in enumerate(boxes)])


def collate(samples: list[tuple]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Clips (B, T, 3, H, W), their persons' boxes (M, 5), see `to_rois`, labels (M, classes), reports of broken videos."""
    clips, boxes, labels, broken = zip(*samples)
    return torch.stack(clips), to_rois(boxes), torch.cat(labels), sum(broken, [])


class TestClips(Dataset):
    """Whole frames around key frames: index, uint8 (T, 3, H, W), boxes (M, 4) in pixels, ""; or index, None, None and why not."""

    def __init__(self, frames: list[KeyFrame], movies: dict[str, Path], settings: SimpleNamespace) -> None:
        self.frames, self.movies, self.settings = frames, movies, settings

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Tensor | None, str]:
        frame = self.frames[index]
        if frame.video not in self.movies:
            return index, None, None, f"movie {frame.video} is missing"
        try:
            clip, boxes = resized_clip(frame, self.movies, self.settings)  # (T, 3, H, W), (M, 4)
        except BrokenVideo as error:
            return index, None, None, str(error)
        if self.settings.widen_boxes:
            boxes = enlarge_boxes(boxes)
        return index, clip, clamp_boxes(boxes, *clip.shape[-2:]), ""


def collate_test(items: list[tuple]) -> tuple[list[int], Tensor | None, Tensor | None, list[str]]:
    """Indices, clips (B, T, 3, H, W) and boxes (M, 5) of what can be read, None without any; reasons of the rest."""
    readable = [item for item in items if item[1] is not None]
    reasons = [reason for _, clip, _, reason in items if clip is None]
    if not readable:
        return [], None, None, reasons
    indices, clips, boxes, _ = zip(*readable)
    return list(indices), torch.stack(clips), to_rois(boxes), reasons


def batches_by_movie(frames: list[KeyFrame], at_most: int) -> list[list[int]]:
    """Indices of key frames in batches of one movie each, whose frames are all of one size."""
    batches: list[list[int]] = []
    for index, frame in enumerate(frames):
        if batches and len(batches[-1]) < at_most and frames[batches[-1][0]].video == frame.video:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# ---- the model (Sec. B: "the action detection architecture in SlowFast") ----


class ActionDetector(nn.Module):
    """Encoder, mean over time, RoIAlign of each person's box, maximum over its 7 x 7 cells, linear.

    Unlike a classifier's, the encoder keeps its last norm; fine-tuned weights have none, then it starts at 1 and 0.
    clip_size: that of the pre-training, to which the position table belongs; clips may have other sizes.
    """

    discards = ("encoder_to_decoder.", "mask_token", "decoder", "cls_token", "pre_logits.", "fc_norm.")

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        clip_size: tuple[int, int, int] = (16, 224, 224),
        cube: tuple[int, int, int] = (2, 16, 16),
        eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        # What it takes to build this model again; checkpoints carry it.
        self.options = dict(width=width, depth=depth, heads=heads, classes=classes, clip_size=list(clip_size), cube=list(cube), eps=eps)
        encoder = dict(width=width, depth=depth, heads=heads, clip_size=clip_size, cube=cube, eps=eps)
        self.encoder = Encoder(**encoder, norm=True, drop_path=drop_path)
        self.head = nn.Linear(width, classes)
        self.apply(truncated_normal)

    def forward(self, clip: Tensor, rois: Tensor) -> Tensor:
        """clip (B, 3, T, H, W), normalised, and rois (M, 5), each a clip's index and a box in pixels, to logits (M, classes)."""
        cube = self.encoder.patch_embed.cube
        time, height, _ = cube_grid(clip.shape[2:], cube)
        x = self.encoder(clip)  # (B, T/2 H/16 W/16, D)
        x = rearrange(x, "B (t h w) D -> t B D h w", t=time, h=height).mean(dim=0)  # (B, D, H/16, W/16)
        # As in SlowFast and the authors' code: no shift by half a cube (aligned), more samples in larger boxes (sampling_ratio).
        x = roi_align(x.float(), rois, output_size=7, spatial_scale=1 / cube[1], sampling_ratio=0, aligned=False)  # (M, D, 7, 7)
        x = x.amax(dim=(2, 3))  # (M, D)
        return self.head(x)  # (M, classes)


def detection_loss(logits: Tensor, labels: Tensor, clips: int) -> Tensor:
    """Binary cross-entropy of (M, classes): the mean over actions, the sum over persons, divided by the number of clips.

    So every person weighs the same, however many there are in a clip and whichever process sees it. The authors' code
    multiplies the mean by the number of persons, which differs by a constant that AdamW does not notice.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / (labels.shape[1] * clips)


def build(config: SimpleNamespace, labels: Tensor) -> ActionDetector:
    """The detector, initialised as `init` says: "scratch" or the file of any weights that `model.load_weights` reads.

    labels (M, classes): of all persons to train on. The head starts at each action's frequency: from one half its bias would
    creep for thousands of steps while features are bent to make up for it. Neither the paper nor its code does so.
    """
    torch.manual_seed(config.run.seed)
    model = ActionDetector(**encoder_options(config), classes=config.data.actions, drop_path=config.model.drop_path)
    say(f"initialised from {config.init}")
    if config.init != "scratch":
        load_weights(model, config.init, fresh=("encoder.norm.", "head."))
    with torch.no_grad():
        model.head.bias.copy_(((labels.sum(dim=0) + 0.5) / (len(labels) + 1)).logit())  # never quite 0 or 1
    return model


def build_detector(path: Path, clip_size: tuple[int, int, int]) -> ActionDetector:
    """The detector that a checkpoint holds, with its weights; for `clip_size` see `model.read_options`."""
    return build_from(ActionDetector, "classes", "a checkpoint of action detection, with its actions", path, clip_size)


# ---- test: whole frames, short side 256, detected persons with a score of at least 0.8 (Sec. B) ----


@torch.inference_mode()
def detect(
    model: ActionDetector, persons: list[KeyFrame], movies: dict[str, Path], config: SimpleNamespace, title: str
) -> tuple[list[KeyFrame], list[str]]:
    """`persons` with the probabilities of all actions as labels, for every process, and why some key frames could not be read."""
    device = next(model.parameters()).device
    bf16, _ = common.numerics(config.run)
    rank, world_size = common.position()
    share = batches_by_movie(persons, config.run.batch_per_device)[rank::world_size]
    batches = data.loader(TestClips(persons, movies, config.data), config.data.workers, batch_sampler=share, collate_fn=collate_test)
    model.eval()
    found, broken = [], []
    with tqdm(total=sum(map(len, share)), desc=title, unit="frame", disable=rank > 0) as bar:
        for indices, clip, rois, reasons in batches:
            broken += reasons
            if clip is not None:
                clip = data.normalize(clip.to(device, non_blocking=True), config.data.mean, config.data.std)  # (B, 3, T, H, W)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = model(pad(clip, model.options["cube"]), rois.to(device, non_blocking=True))  # (M, classes)
                found.append((indices, logits.float().sigmoid()))
            bar.update(len(indices) + len(reasons))
    predictions = []
    for indices, probabilities in common.gather([(indices, probabilities.cpu()) for indices, probabilities in found]):
        asked = [persons[index] for index in indices]
        for frame, labels in zip(asked, probabilities.split([len(frame.boxes) for frame in asked])):  # (M, classes)
            if config.data.person_score:
                labels = labels * frame.scores[:, None].float()
            predictions.append(replace(frame, labels=labels))
    predictions.sort(key=lambda frame: (frame.video, frame.second))
    return predictions, sorted(set(common.gather(broken)))


def test(model: ActionDetector, test_set: TestSet, config: SimpleNamespace, title: str) -> tuple[list[KeyFrame], dict, list[str]]:
    """Predictions, what they are worth as `summarize` says it, and why some key frames could not be read.

    A key frame that cannot be read has no detections; its ground truth still counts.
    """
    predictions, broken = detect(model, test_set.persons, test_set.movies, config, title)
    if not predictions:
        raise UserError(f"none of the {len(test_set.persons)} key frames with persons can be read; the first reason: {broken[0]}")
    evaluated = torch.zeros(model.options["classes"])  # (classes,) 1 for the actions that count
    evaluated[[action - 1 for action in test_set.actions]] = 1
    for frame in predictions:
        frame.labels = frame.labels * evaluated
    precisions = average_precisions(test_set.ground_truth, to_rows(predictions), test_set.actions, test_set.excluded)
    return predictions, summarize(precisions, test_set.actions), broken


def to_rows(frames: list[KeyFrame]) -> list[Row]:
    """The reverse of `key_frames`: a row for every label above 0, with the label, 1 or a probability, as its score."""
    rows = []
    for frame in frames:
        for box, labels in zip(frame.boxes.tolist(), frame.labels.tolist()):
            place = (frame.video, frame.second), tuple(box)
            rows += [Row(*place, action, score) for action, score in enumerate(labels, 1) if score > 0]
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write detections as AVA's evaluation reads them, with as many digits as a float32 has."""
    with open(path, "w") as file:
        for (video, second), box, action, score in rows:
            edges = ",".join(f"{edge:.9g}" for edge in box)
            file.write(f"{video},{second:04d},{edges},{action},{score:.9g}\n")


def test_and_write(model: ActionDetector, test_set: TestSet, config: SimpleNamespace, folder: Path) -> float:
    """The paper's test of a model: prints and returns mAP, writes detections.csv, mAP.json and pictures into `folder`."""
    predictions, summary, broken = test(model, test_set, config, "testing")
    if common.position()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "detections.csv", to_rows(predictions))
        (folder / "mAP.json").write_text(json.dumps(summary, indent=1) + "\n")
        for reason in broken:
            say(f"no detections: {reason}")
        draw_key_frames(predictions, test_set, config, folder / "pictures")
        show(summary)
        persons = sum(len(frame.boxes) for frame in predictions)
        print(f"{persons:,} persons in {len(predictions):,} frames: {folder / 'detections.csv'}", flush=True)
    return summary["mAP"]


# ---- frame-mAP at IoU 0.5 (Sec. 4.3), the official evaluator's to the digit ----


def average_precisions(
    ground_truth: list[Row], detections: list[Row], actions: Iterable[int], excluded: Container[Frame] = (), *,
    skip_frames_without_ground_truth: bool = False
) -> dict[int, float]:  # fmt: skip
    """Average precision of each action; NaN without ground truth, 0 without detections. The mean of all is the mAP.

    The rules of AVA's own evaluator: a detection looks only at the ground-truth box that it overlaps most, and is wrong
    if a detection with a higher score has taken that one, even where a second box overlaps enough. Rows of other actions,
    excluded frames and detections without area count for nothing. Detections in frames without ground truth are wrong,
    unless such frames are skipped, as mmaction2 does by default.

    Where two scores or two overlaps are equal, the official result depends on the order of rows. Here frame and box decide.
    """
    truth: dict[int, dict[Frame, list[Box]]] = {action: {} for action in sorted(actions)}
    for frame, box, action, _ in sorted(ground_truth):
        if action in truth and frame not in excluded:
            truth[action].setdefault(frame, []).append(box)
    frames_with_truth = {frame for frames in truth.values() for frame in frames}

    found: dict[int, list[tuple[float, Frame, Box]]] = {action: [] for action in truth}
    for frame, box, action, score in detections:
        has_area = box[0] < box[2] and box[1] < box[3]
        if action in found and frame not in excluded and has_area:
            if frame in frames_with_truth or not skip_frames_without_ground_truth:
                found[action].append((-score, frame, box))

    precisions = {}
    for action, true_boxes in truth.items():
        taken: set[tuple[Frame, Box]] = set()  # ground-truth boxes that a detection with a higher score has found
        correct = []
        for _, frame, box in sorted(found[action]):  # highest score first
            best = max(true_boxes.get(frame, ()), key=lambda true_box: iou(box, true_box), default=None)
            correct.append(best is not None and iou(box, best) >= 0.5 and (frame, best) not in taken)  # IoU 0.5: Sec. 4.3
            if correct[-1]:
                taken.add((frame, best))
        precisions[action] = _average_precision(torch.tensor(correct, dtype=torch.bool), sum(map(len, true_boxes.values())))
    return precisions


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    both = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    return both / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both)


def _average_precision(correct: Tensor, positives: int) -> float:
    """Area under the precision-recall curve of detections (D,), best first; precision made non-increasing in recall."""
    if not positives:
        return math.nan
    precision = correct.cumsum(0).double() / torch.arange(1, len(correct) + 1)  # (D,)
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(correct) else precision  # (D,)
    return float(envelope[correct].sum() / positives)  # recall grows by 1 / positives at every correct detection


def mean_of(precisions: Iterable[float]) -> float:
    """The mean of those that are numbers."""
    numbers = [precision for precision in precisions if not math.isnan(precision)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def summarize(precisions: dict[int, float], actions: dict[int, Action]) -> dict:
    """mAP, the mean of each group that the list of actions knows, and AP by action, in percent; None without ground truth."""

    def percent(value: float) -> float | None:
        return None if math.isnan(value) else 100 * value

    groups: dict[str, list[float]] = {}
    for number, action in actions.items():
        if action.group:
            groups.setdefault(action.group.replace("_", " ").lower(), []).append(precisions[number])
    return {
        "mAP": percent(mean_of(precisions.values())),
        "groups": {group: percent(mean_of(values)) for group, values in groups.items()},
        "actions": [{"id": number, "name": actions[number].name, "AP": percent(precision)} for number, precision in precisions.items()],
    }


def show(summary: dict) -> None:
    """Print AP by action, the mean of each group, and the mAP."""

    def number(value: float | None) -> str:
        return "  none" if value is None else f"{value:6.2f}"

    for action in summary["actions"]:
        print(f"{number(action['AP'])}  {action['id']:3d} {action['name']}")
    for group, value in summary["groups"].items():
        print(f"{number(value)}  mean of {group}")
    print(f"{number(summary['mAP'])}  mAP at IoU 0.5", flush=True)


# ---- AVA's other files: actions, excluded frames, AIA's boxes, movies ----


def read_actions(path: Path) -> dict[int, Action]:
    """A list of actions in AVA's pbtxt form, by id: blocks with name and id or label_id, and label_type or none.

    The list of the 60 evaluated actions states no types; if its names show that they are AVA's, the ids tell the groups.
    Raises UserError with file and line.
    """
    try:
        text = re.sub(r"^[ \t]*#.*", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)  # without comments
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no list of actions can be read from {path}: {error}") from None
    form = 'a list of actions is made of blocks such as item { name: "sit" id: 11 }'
    string = r'"(?:\\.|[^"\\\n])*"'  # may hold braces and \"
    block = rf"\w+\s*:?\s*\{{((?:{string}|[^{{}}\"])*)\}}"
    actions: dict[int, Action] = {}
    for match in re.finditer(block, text):
        line = 1 + text.count("\n", 0, match.start())
        fields = dict(re.findall(rf"(\w+):\s*({string}|\w+)", match[1]))
        name, number = fields.get("name", ""), fields.get("label_id", fields.get("id", ""))
        if not name.startswith('"') or not number.isdecimal():
            raise UserError(f"{path}, line {line}: {form}")
        if int(number) in (0, *actions):
            raise UserError(f"{path}, line {line}: action {number} is listed twice, or is 0; ids start at 1")
        actions[int(number)] = Action(re.sub(r"\\(.)", r"\1", name[1:-1]), fields.get("label_type", ""))
    rest = re.sub(block, lambda match: "\n" * match[0].count("\n"), text).rstrip()
    if rest or not actions:
        line = 1 + rest.count("\n")
        raise UserError(f"{path}, line {line}: {form}")
    firsts_and_lasts = {14: "walk", 15: "answer phone", 63: "write", 64: "fight/hit (a person)"}  # of AVA's groups
    is_ava = all(number in actions and actions[number].name == name for number, name in firsts_and_lasts.items())
    if is_ava and not any(action.group for action in actions.values()):
        for number, action in actions.items():
            action.group = GROUPS[(number > 14) + (number > 63)]
    return actions


def read_exclusions(path: Path) -> set[Frame]:
    """Key frames that are not evaluated, as AVA lists them: rows video,second. Raises UserError with file and line."""
    excluded = set()
    for number, line in _lines(path):
        video, _, second = line.strip().partition(",")
        if not video or not second.isdecimal():
            raise UserError(f"{path}, line {number}: a row of excluded frames is video,second, not {line.strip()}")
        excluded.add((video, int(second)))
    return excluded


def _read_aia_boxes(path: Path, file_list: Path | None, sizes: Mapping[str, tuple[int, int]] | None) -> list[Row]:
    """A list of {"image_id": 10000 * number of the movie + second, "bbox": [x, y, width, height], "score"}."""
    if file_list is None or sizes is None:
        raise UserError(f"{path} numbers its movies: give AVA's list of file names too, such as ava_file_names_trainval_v2.1.txt")
    try:
        videos = [name.rsplit(".", 1)[0] for name in file_list.read_text(encoding="utf-8").split()]
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"no boxes can be read from {path} and {file_list}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list of boxes")
    rows = []
    for number, entry in enumerate(entries, 1):
        try:
            movie, second = divmod(int(entry["image_id"]), 10000)
            x, y, box_width, box_height = map(float, entry["bbox"])
            score = float(entry["score"])
            if not 0 <= movie < len(videos):
                raise ValueError(f"movie {movie}, but {file_list} lists {len(videos)}, counted from 0")
            if videos[movie] not in sizes:  # the movie is missing
                continue
            width, height = sizes[videos[movie]]
            if not (box_width >= 0 and box_height >= 0 and abs(score) < math.inf):
                raise ValueError("a box of negative size, or a number that is not finite")
            if not (-0.1 * width < x and x + box_width < 1.1 * width and -0.1 * height < y and y + box_height < 1.1 * height):
                raise ValueError(f"a box that lies outside a movie of {width} x {height} pixels: it was found in one of another size")
        except (KeyError, TypeError, ValueError) as error:
            form = "an entry holds image_id, bbox [x, y, width, height] in pixels and score"
            raise UserError(f"{path}, entry {number}: {error}; {form}") from None
        box = x / width, y / height, (x + box_width) / width, (y + box_height) / height
        rows.append(Row((videos[movie], second), box, 0, score))
    if not rows:
        raise UserError(f"{path}: there is a movie for none of its {len(entries)} boxes; look at data.movies and at {file_list}")
    return rows


def list_movies(root: Path) -> dict[str, Path]:
    """The movie of each video id: a file of any video suffix, or a folder of frames, in the folder `root`. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: set data.root to the folder of AVA's movies, or of folders with their frames")
    paths = (path for path in sorted(root.iterdir()) if path.is_dir() or path.suffix.lower() in data.SUFFIXES)
    movies = {path.name if path.is_dir() else path.stem: path for path in paths}
    if not movies:
        raise UserError(f"no movies and no folders of frames found in {root}")
    return movies


def movie_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a movie file or a folder of frames. Raises BrokenVideo."""
    height, width = read_clip(path, 0, frames=2, stride=1, starts_at=0).shape[-2:]
    return width, height


# ---- clips to train on, and what a model is tested on ----


def find_root(config: SimpleNamespace, world_size: int) -> Path:
    """`data.root` of a configuration; the toy videos, rendered if need be, without one."""
    return Path(config.data.root or toy.on_first_use(toy.render_ava, toy.AVA_FOLDER, world_size))


def find_training(config: SimpleNamespace, root: Path) -> tuple[list[KeyFrame], dict[str, Path]]:
    """Labelled key frames to train on, without those excluded or of missing movies, and all movies."""
    movies = list_movies(root / config.data.movies)
    frames = key_frames(read_ground_truth(root / config.data.train, config.data.actions), config.data.actions)
    excluded = read_exclusions(root / config.data.train_exclude) if config.data.train_exclude else set()
    frames = [frame for frame in frames if (frame.video, frame.second) not in excluded]
    named = {frame.video for frame in frames}
    missing = sorted(named - movies.keys())
    if missing:
        where = root / config.data.movies
        say(f"{len(missing)} of {len(named)} movies for training are not in {where} and left out: {', '.join(missing)}")
    frames = [frame for frame in frames if frame.video in movies]
    if not frames:
        raise UserError(f"{root / config.data.movies} holds none of the movies that {root / config.data.train} names; look at data.movies")
    return frames, movies


def find_test(config: SimpleNamespace, root: Path) -> TestSet:
    movies = list_movies(root / config.data.movies)
    actions = read_actions(root / config.data.labels)
    if max(actions) > config.data.actions:
        raise UserError(f"{root / config.data.labels} lists action {max(actions)}, more than data.actions={config.data.actions}")
    excluded = read_exclusions(root / config.data.val_exclude) if config.data.val_exclude else set()
    ground_truth = read_ground_truth(root / config.data.val, config.data.actions)
    persons = find_persons(root / config.data.boxes, config, root, movies)
    tested = [frame for frame in persons if (frame.video, frame.second) not in excluded]
    if not tested:
        raise UserError(f"{root / config.data.val_exclude} leaves out all {len(persons)} key frames with persons: nothing is left to test")
    return TestSet(movies, tested, ground_truth, actions, excluded)


def find_persons(path: Path, config: SimpleNamespace, root: Path, movies: dict[str, Path]) -> list[KeyFrame]:
    """Boxes that a detector found, from a file of any form that `read_person_boxes` reads."""
    if path.suffix != ".json":
        return read_person_boxes(path, config.data.threshold)
    sizes = {}
    for video, movie in movies.items():
        try:
            sizes[video] = movie_size(movie)
        except BrokenVideo as error:
            say(f"its boxes are left out: {error}")
    return read_person_boxes(path, config.data.threshold, root / config.data.file_list, sizes)


# ---- training (Table 12) ----


def check(config: SimpleNamespace) -> None:
    """Most mistakes in a configuration are found here, before any work."""
    cube_grid((config.data.frames, config.data.size, config.data.size), config.model.cube)
    if config.data.size > config.data.short_side:
        frames = f"frames whose short side is data.short_side={config.data.short_side}"
        raise UserError(f"data.size={config.data.size} cannot be cropped from {frames}")


def train(config: SimpleNamespace) -> None:
    """Run, or go on with, the experiment that `config` describes; test it at the end."""
    check(config)
    check_init(config.init, "scratch")
    bf16, compiled = common.numerics(config.run)
    rank, world_size, device = common.start_processes(config.data.workers)
    chief = rank == 0
    root = find_root(config, world_size)
    frames, movies = find_training(config, root)
    test_set = find_test(config, root)
    model = build(config, torch.cat([frame.labels for frame in frames])).to(device)  # labels: (M, classes)
    if config.run.recompute:
        recompute_blocks(model)
    clips = KeyFrameClips(frames, movies, config.data, config.run.seed)
    clips[0, 0]  # stops here if no movie can be read

    batch_size = config.optim.batch_size
    per_device, accumulation = common.share_batch(batch_size, len(frames), world_size, config.run.batch_per_device)
    steps_per_epoch = len(frames) // batch_size
    steps, warmup = config.optim.epochs * steps_per_epoch, config.optim.warmup_epochs * steps_per_epoch
    peak_lr, end_lr = config.optim.base_lr * batch_size / 256, config.optim.min_lr * batch_size / 256  # Sec. B

    groups = parameter_groups(model, config.optim.layer_decay, config.optim.weight_decay)  # Table 12
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    folder, checkpoint = common.open_folder(config)
    start = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    persons, detected = (sum(len(frame.boxes) for frame in of_set) for of_set in (frames, test_set.persons))
    say(
        f"{folder}: ViT-{config.model.size}, {sum(p.numel() for p in model.parameters()):,} parameters, on {world_size} x {device.type}\n"
        f"{len(frames):,} key frames for training with {persons:,} persons, {len(test_set.persons):,} for testing "
        f"with {detected:,} detected, {len(test_set.actions)} of {config.data.actions} actions evaluated\n"
        f"clips of {config.data.frames} frames, {config.data.size} x {config.data.size} pixels in training, "
        f"short side {config.data.short_side} in testing\n"
        f"batch {batch_size} = {world_size} processes x {accumulation} accumulated x {per_device} clips; "
        f"learning rate {config.optim.base_lr:g} x {batch_size} / 256 = {peak_lr:.4g}, "
        f"times {groups[0]['lr_scale']:.3g} in the cube embedding\n"
        f"{steps:,} steps = {config.optim.epochs} epochs x {steps_per_epoch:,}; starting at step {start:,}"
    )

    predict = torch.compile(model) if compiled else model
    if world_size > 1:
        predict = DistributedDataParallel(predict, gradient_as_bucket_view=True, broadcast_buffers=False)
    size = dict(batch_size=batch_size, per_device=per_device)
    batches = data.training_batches(clips, config.data.workers, **size, start=start, steps=steps, collate_fn=collate)
    progress = common.Progress(config.run, start, steps, batch_size, device)

    model.train()
    for step in progress:
        learning_rate = common.warmup_cosine(step, steps, warmup, peak_lr, end_lr)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        for piece in range(accumulation):
            *tensors, broken = progress.next(batches)
            progress.report(broken)
            clip, rois, labels = (x.to(device, non_blocking=True) for x in tensors)  # (B, T, 3, H, W), (M, 5), (M, classes)
            clip = data.normalize(clip, config.data.mean, config.data.std)  # (B, 3, T, H, W)
            # Drop path: a function of the step, so that a resumed run repeats it.
            torch.manual_seed(data.pick_below(2**62, data.sample_generator(config.run.seed, step * accumulation + piece, -2 - rank)))
            with predict.no_sync() if world_size > 1 and piece < accumulation - 1 else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = predict(clip, rois)  # (M, classes)
                loss = detection_loss(logits, labels, len(clip))
                (loss / accumulation).backward()
            progress.add(loss)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        progress.done(done, epoch=round(done / steps_per_epoch, 4), lr=learning_rate)
        if done % config.run.checkpoint_every == 0 or done == steps:
            progress.flush()
            progress.gather_broken()
            if chief:
                names = {number: action.name for number, action in test_set.actions.items()}
                # `positions` are no parameter and usually computed, but those of image weights are not
                content = dict(model=model.state_dict(), model_options=model.options, positions=model.encoder.pos_embed, actions=names)
                state = dict(optimizer=optimizer.state_dict(), step=done, config=common.as_dict(config))
                common.save_checkpoint(folder / "checkpoint.pt", **content, **state)
        if config.run.validate_every and done % (config.run.validate_every * steps_per_epoch) == 0 and done < steps:
            progress.flush()
            epoch = done // steps_per_epoch
            _, summary, _ = test(model, test_set, config, f"epoch {epoch}")
            if chief:
                progress.log.write(step=done, epoch=epoch, mAP=summary["mAP"])
            say(f"epoch {epoch}: mAP {summary['mAP']:.2f}")
            model.train()

    if progress.broken:
        say(f"{len(progress.broken)} key frames that could not be read were replaced by others: {folder / 'broken_videos.txt'}")
    mean_ap = test_and_write(model, test_set, config, folder)
    if chief:
        progress.log.write(step=steps, test_mAP=mean_ap)


# ---- pictures ----


def draw_persons(image: Tensor, persons: KeyFrame | None, names: dict[int, str], colour: str) -> Image.Image:
    """A frame uint8 (3, H, W), enlarged if small, with boxes and the up to four most probable actions of each, if above 0.3."""
    zoom = max(1, round(400 / image.shape[1]))
    picture = TF.to_pil_image(image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
    draw, font, line = ImageDraw.Draw(picture), ImageFont.load_default(13), 16
    for box, labels in zip(persons.boxes.tolist(), persons.labels) if persons else []:
        left, top, right, bottom = (edge * side for edge, side in zip(box, picture.size * 2))
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        scores, actions = labels.topk(min(4, len(labels)))
        for row, (score, action) in enumerate(zip(scores.tolist(), (actions + 1).tolist())):
            if score > 0.3:
                text = str(names.get(action, action)) + (f" {score:.2f}" if score < 1 else "")
                where = max(0, min(left + 3, picture.width - font.getlength(text))), top + 2 + row * line
                draw.rectangle(draw.textbbox(where, text, font), fill="black")
                draw.text(where, text, colour, font)
    return picture


def draw_key_frames(predictions: list[KeyFrame], test_set: TestSet, config: SimpleNamespace, folder: Path) -> None:
    """`run.pictures` of the key frames, evenly chosen: on the left what was detected, on the right the ground truth."""
    s, names = config.data, {number: action.name for number, action in test_set.actions.items()}
    truth = {(frame.video, frame.second): frame for frame in key_frames(test_set.ground_truth, s.actions)}
    for index in torch.linspace(0, len(predictions) - 1, min(config.run.pictures, len(predictions))).long().tolist():
        frame = predictions[index]
        clip = read_clip(test_set.movies[frame.video], frame.second, frames=2, stride=1, rate=s.rate, starts_at=s.starts_at)
        image = clip[1]  # the key frame, (3, H, W)
        left = draw_persons(image, frame, names, "orange")
        right = draw_persons(image, truth.get((frame.video, frame.second)), names, "lime")
        sheet = Image.new("RGB", (2 * left.width + 8, left.height + 20), "white")
        sheet.paste(left, (0, 20))
        sheet.paste(right, (left.width + 8, 20))
        for x, text in ((4, "detected"), (left.width + 12, "ground truth")):
            ImageDraw.Draw(sheet).text((x, 2), f"{text}, {frame.video}, second {frame.second}", "black", ImageFont.load_default(13))
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"{frame.video}_{frame.second:04d}.png")


def annotated(movie: Excerpt, predictions: list[KeyFrame], names: dict[int, str], starts_at: int) -> Iterator[Tensor]:
    """All frames of a video, uint8 (3, H, W), H and W even, each with the persons and actions of the nearest second."""
    by_second = {frame.second: frame for frame in predictions}
    for time, image in zip(movie.times, movie.every_frame()):
        picture = TF.pil_to_tensor(draw_persons(image, by_second.get(round(time) + starts_at), names, "orange"))  # (3, H, W)
        yield picture[:, : picture.shape[1] // 2 * 2, : picture.shape[2] // 2 * 2]


# ---- testing, predicting and evaluating what comes from anywhere ----


def stored_config(weights: Path, settings: list[str]) -> SimpleNamespace:
    """The configuration for weights: a .yaml file if given, else the checkpoint's own, or the ViT-B recipe if it has none."""
    if "classes" not in read_options(weights):
        raise UserError(f"{weights} is not a checkpoint of action detection: make one with detect_ava.py")
    stored = read_checkpoint(weights)[1].get("config")
    if stored and "actions" not in stored["data"]:
        raise UserError(f"{weights} was trained by another stage: make a checkpoint of action detection with detect_ava.py")
    stored = stored or common.as_dict(common.load_config(DEFAULT, [str(CONFIGS / "k400_base.yaml")]))
    config = common.load_config(DEFAULT, settings, stored)
    check(config)
    return config


def test_weights(arguments: argparse.Namespace) -> None:
    """`--test`: the mAP of any checkpoint of action detection, its detections and pictures beside it or in `--out`."""
    config = stored_config(arguments.weights, arguments.settings)
    _, world_size, device = common.start_processes(config.data.workers)
    test_set = find_test(config, find_root(config, world_size))
    model = build_detector(arguments.weights, config.model.pretrained_clip).to(device)
    if model.options["classes"] != config.data.actions:
        classes = model.options["classes"]
        raise UserError(f"{arguments.weights} knows {classes} actions, the dataset {config.data.actions}: set data.actions")
    test_and_write(model, test_set, config, arguments.out or arguments.weights.parent)


def predict_video(arguments: argparse.Namespace) -> None:
    """`--predict`: a video as mp4 with the persons' boxes, one set of them a second, and what they do."""
    video, out = arguments.predict, arguments.out or Path("runs/detections") / f"{arguments.predict.stem}.mp4"
    config = stored_config(arguments.weights, arguments.settings)
    device = common.start_processes(config.data.workers)[2]
    model = build_detector(arguments.weights, config.model.pretrained_clip).to(device)
    names = read_checkpoint(arguments.weights)[1].get("actions", {})
    persons = find_persons(arguments.boxes, config, Path(config.data.root), {video.stem: video})
    mine = [frame for frame in persons if frame.video == video.stem]
    if not mine:
        others = ", ".join(sorted({frame.video for frame in persons})[:3])
        only = f"only of {others}, ...: its first column has to be the name of the file"
        raise UserError(f"{arguments.boxes} has no boxes of video {video.stem}, {only}")
    predictions, broken = detect(model, mine, {video.stem: video}, config, "predicting")
    if common.position()[0] > 0:
        return
    for reason in broken:
        say(f"no detections: {reason}")
    try:
        with Excerpt(video, Fraction(0), Fraction(10**6)) as movie:
            out.parent.mkdir(parents=True, exist_ok=True)
            pictures = tqdm(annotated(movie, predictions, names, config.data.starts_at), "drawing", len(movie), unit="frame")
            data.write_mp4(out, pictures, movie.stream.average_rate)
    except BrokenVideo as error:
        raise UserError(f"the video cannot be read: {error}") from None
    print(f"{sum(len(frame.boxes) for frame in predictions)} persons in {len(predictions)} key frames: {out}")


def evaluate(arguments: argparse.Namespace) -> None:
    """`--evaluate`: print and write the mAP of a file of detections."""
    if not arguments.ground_truth or not arguments.labels:
        raise UserError("--evaluate needs --ground-truth GT.csv and --labels LIST.pbtxt, both from AVA's annotations")
    actions = read_actions(arguments.labels)
    known = max(ACTIONS, *actions)
    ground_truth, detections = read_ground_truth(arguments.ground_truth, known), read_detections(arguments.evaluate, known)
    excluded = read_exclusions(arguments.exclude) if arguments.exclude else set()
    precisions = average_precisions(
        ground_truth, detections, actions, excluded, skip_frames_without_ground_truth=arguments.skip_frames_without_ground_truth
    )
    if all(map(math.isnan, precisions.values())):
        raise UserError(f"{arguments.ground_truth} holds no row of an action in {arguments.labels} outside excluded frames")
    summary = summarize(precisions, actions)
    frames, true_frames = ({row.frame for row in rows} for rows in (detections, ground_truth))
    print(
        f"{len(detections):,} detections in {len(frames):,} frames, "
        f"{len(frames & true_frames):,} of them among the {len(true_frames):,} with ground truth"
    )
    show(summary)
    if not summary["groups"]:
        print(f"no groups: {arguments.labels} states no label_type")
    if arguments.skip_frames_without_ground_truth:
        print("frames without ground truth left out")
    out = arguments.out or arguments.evaluate.with_name(f"{arguments.evaluate.stem}_mAP.json")
    try:
        out.write_text(json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"the result cannot be written to {out}: {error}; name another file with --out") from None
    print(f"written to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--test", action="store_true", help="test --weights instead of training")
    add("--predict", type=Path, metavar="VIDEO", help="draw the actions of the persons in --boxes into a copy of this video")
    add(
        "--boxes", type=Path, metavar="FILE",
        help="rows video,second,x1,y1,x2,y2,,score; seconds count from data.starts_at at the start of the file",
    )  # fmt: skip
    add("--weights", type=Path, help="checkpoint of action detection: this project's or the official one")
    add("--evaluate", type=Path, metavar="DETECTIONS.csv", help="evaluate these detections")
    add("--ground-truth", type=Path, metavar="GT.csv", help="AVA's annotations")
    add("--labels", type=Path, metavar="LIST.pbtxt", help="the actions to evaluate")
    add("--exclude", type=Path, metavar="X.csv", help="frames to leave out, video,second")
    add("--skip-frames-without-ground-truth", action="store_true", help="detections there are not counted as wrong; not official")
    add(
        "--out", type=Path,
        help="folder of --test, default that of the weights; file of --predict, default runs/detections/VIDEO.mp4, "
        "and of --evaluate, default DETECTIONS_mAP.json",
    )  # fmt: skip
    arguments = common.parse(parser)
    if (arguments.test or arguments.predict) and not arguments.weights:
        raise UserError("--test and --predict need --weights FILE, a checkpoint of action detection such as runs/detect/toy/checkpoint.pt")
    if arguments.predict and not arguments.boxes:
        rows = "rows video,second,x1,y1,x2,y2,,score in fractions of width and height"
        raise UserError(f"--predict needs --boxes FILE, where the persons are: {rows}")
    if arguments.weights and not (arguments.test or arguments.predict):
        raise UserError("--weights goes with --test or --predict; training starts from weights with init=FILE")
    if arguments.evaluate:
        evaluate(arguments)
    elif arguments.predict:
        predict_video(arguments)
    elif arguments.test:
        test_weights(arguments)
    else:
        train(common.load_config(DEFAULT, arguments.settings))


if __name__ == "__main__":
    common.launch(main)
