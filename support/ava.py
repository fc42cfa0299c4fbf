"""Read AVA's files: annotations, persons, actions, movies. Choose what to train and test on."""

import csv
import json
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from functools import cache, lru_cache, partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from support.config import UserError, say
from support.lists import SUFFIXES
from support.video import BrokenVideo, Video

ACTIONS = 80  # of AVA, numbered from 1; 60 of them are evaluated
GROUPS = ("PERSON_MOVEMENT", "OBJECT_MANIPULATION", "PERSON_INTERACTION")  # AVA's actions 1 to 14, to 63, to 80
STRING = r'"(?:\\.|[^"\\\n])*"'  # in a list of actions; may contain braces and \"
BLOCK = re.compile(rf'\w+\s*:?\s*\{{((?:{STRING}|[^{{}}"])*)\}}|\S')  # or a character that belongs to none

Frame = tuple[str, float]  # a key frame: video and second, an int if it is whole
Box = tuple[float, float, float, float]  # x1 y1 x2 y2 in fractions of width and height
Actions = dict[int, tuple[str, str]]  # name and group by number; the group is empty if unknown
Movies = dict[str, Path]  # by video


class Row(NamedTuple):
    """A row of AVA's csv files: a person in a key frame, and one of the actions that the person does."""

    frame: Frame
    box: Box
    action: int  # from 1; 0 for a person without actions
    score: float  # 1 where the file has none


Rows = list[Row]
KeyFrames = dict[Frame, Rows]


def read_ground_truth(path: Path, actions: int = ACTIONS) -> Rows:
    """Read AVA's annotations: rows video,second,x1,y1,x2,y2,action,person. Raises UserError with file and line.

    AVA-Kinetics also has rows video,second: a key frame without persons, in which every detection is wrong.
    """
    return _read_rows(path, "person", actions)


def read_detections(path: Path, actions: int = ACTIONS) -> Rows:
    """Read detected actions: rows video,second,x1,y1,x2,y2,action,score; without a score it is 1. Raises UserError."""
    return _read_rows(path, "score", actions)


def read_person_boxes(
    path: Path, threshold: float, file_list: Path | None = None, sizes: dict[str, tuple[int, int]] | None = None
) -> KeyFrames:
    """Read the persons that a detector found with a score of at least `threshold`, in the paper 0.8 (Sec. B).

    path: csv as SlowFast has it, rows video,second,x1,y1,x2,y2,action or nothing,score; or json as AIA has it, see
    `_read_aia`; or ground truth, whose persons have a score of 1. file_list, sizes: for AIA's json. Raises UserError.
    """
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(f"{path} is a pickle, which could run any code: convert it to csv as docs/ava.md says")
    if path.suffix == ".json":
        rows = _read_aia(path, file_list, sizes or {})
    elif _is_ground_truth(path):
        say(f"{path} is ground truth, with persons' numbers in place of scores: each person has a score of 1")
        rows = _read_rows(path, "person")
    else:
        rows = _read_rows(path, "score")
    kept = [row for row in rows if row.score >= threshold]
    if not kept:
        raise UserError(f"{path}: no box has a score of {threshold} or more and, in json, a movie in data.movies")
    return key_frames(kept)


def read_exclusions(path: Path) -> set[Frame]:
    """Read the key frames that do not count: rows video,second. Raises UserError with file and line."""
    return set(_parse(path, _key_frame, "a row of excluded frames is video,second"))


def _read_rows(path: Path, last: str, actions: int = 0) -> Rows:
    """Read rows whose last column is a "score" or a "person". actions: how many there are; 0: without that column."""
    form = f"a row is video,second,x1,y1,x2,y2,action,{last}, the box in fractions of width and height"
    rows = [row for row in _parse(path, partial(_to_row, last=last, actions=actions), form) if row]
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def _is_ground_truth(path: Path) -> bool:
    """Return whether all rows have an action, which a detector of persons does not know, and a whole number last."""
    rows = _parse(path, list, "")
    return all(not any(row[2:]) or (row[6:7] != [""] and row[-1].isdecimal()) for row in rows)


def _read_aia(path: Path, file_list: Path | None, sizes: dict[str, tuple[int, int]]) -> Rows:
    """Read AIA's list of {"image_id": 10000 * movie + second, "bbox": [x, y, width, height], "score"}.

    Movies are numbered by AVA's `file_list`, boxes measured in pixels of movies of these `sizes`. Boxes of other movies
    are left out.
    """
    if file_list is None:
        raise UserError(f"{path} numbers its movies: give AVA's list of file names too, as data.file_list")
    videos = dict(enumerate(_parse(file_list, lambda columns: columns[0].rsplit(".", 1)[0], "")))

    def parse(entry: dict[str, Any]) -> Row | None:
        movie, second = divmod(int(entry["image_id"]), 10000)
        x, y, box_width, box_height = map(float, entry["bbox"])
        video = videos[movie]
        if video not in sizes:
            return None
        width, height = sizes[video]
        box = x / width, y / height, (x + box_width) / width, (y + box_height) / height
        if not all(-0.1 < edge < 1.1 for edge in box):
            raise ValueError(f"a box outside of {width} x {height} pixels: found in a movie of another size")
        return _to_row([video, str(second), *box, "", entry["score"]], "score", 0)

    form = f"an entry holds image_id, 10000 times the number of the movie in {file_list}, from 0, plus the second, "
    form += "bbox [x, y, width, height] in pixels and score"
    return [row for row in _parse(path, parse, form) if row]


def _parse(path: Path, parse: Callable[[Any], Any], form: str) -> list:
    """Return what `parse` makes of each entry of a json file, or of the columns of each line of a csv file."""
    parsed: list = []
    number = 0
    word = "entry" if path.suffix == ".json" else "line"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            items = json.load(file) if word == "entry" else csv.reader(map(str.strip, file))
            for item in items:
                number += 1
                if item != []:  # a blank line
                    parsed.append(parse(item))
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"no rows can be read from {path}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}, {word} {number}: {error}; {form}") from None
    return parsed


def _to_row(columns: list, last: str, actions: int) -> Row | None:
    """Turn columns into a row; None for a key frame without persons. Raises ValueError if they cannot be right."""
    if last == "person" and not any(columns[2:]):
        _key_frame(columns[:2])
        return None
    if len(columns) not in (7, 8):
        raise ValueError(f"{len(columns)} columns")
    frame, box = _frame_and_box(*columns[:6])
    action = int(columns[6]) if actions else 0
    score = float(columns[7]) if last == "score" and len(columns) == 8 else 1.0
    if not all(-10 < edge < 10 for edge in box) or not math.isfinite(score):
        raise ValueError("a box in pixels, or numbers that are not finite")
    detection = last == "score" and actions  # the evaluation ignores those of negative size
    if not detection and (box[0] > box[2] or box[1] > box[3]):
        raise ValueError("a box of negative size, whose left or upper edge lies beyond the other")
    if actions and not 1 <= action <= actions:
        raise ValueError(f"unknown action {action}, known are 1 to {actions}")
    return Row(frame, box, action, score)


@lru_cache(maxsize=4096)  # rows of the same box follow one another; they share its objects, which saves memory
def _frame_and_box(video: str, second: str, *edges: str) -> tuple[Frame, Box]:
    return _key_frame([video, second]), tuple(map(float, edges))


def _key_frame(columns: list[str]) -> Frame:
    video, second = columns
    if not video or not re.fullmatch(r"\d+(\.\d+)?", second):
        raise ValueError("no video, or a second that is not a whole number or a decimal fraction")
    second = float(second)
    return video, int(second) if second.is_integer() else second


def read_actions(path: Path) -> Actions:
    """Read a list of actions in AVA's pbtxt form: blocks with name, id or label_id, and label_type or none.

    The list of the 60 evaluated actions has no types; if its names are AVA's, the numbers give the groups.
    """
    try:
        text = re.sub(r"^[ \t]*#.*", "", path.read_text("utf-8-sig"), flags=re.MULTILINE)  # without comments
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no list of actions can be read from {path}: {error}") from None
    actions: Actions = {}
    for block in BLOCK.finditer(text if text.strip() else "?"):
        fields = dict(re.findall(rf"(\w+)\s*:\s*({STRING}|\w+)", block[1] or ""))
        name, number = fields.get("name", ""), fields.get("label_id", fields.get("id", ""))
        if not name.startswith('"') or not number.isdecimal() or int(number) in (0, *actions):
            form = 'item { name: "sit" id: 11 }, each id once, from 1'
            line = 1 + text.count("\n", 0, block.start())
            raise UserError(f"{path}, line {line}: a list of actions is made of blocks such as {form}")
        actions[int(number)] = re.sub(r"\\(.)", r"\1", name[1:-1]), fields.get("label_type", "")
    known = {14: "walk", 15: "answer phone", 63: "write", 64: "fight/hit (a person)"}  # the last and first of groups
    if all(actions.get(number) == (name, "") for number, name in known.items()):
        return {number: (name, GROUPS[(number > 14) + (number > 63)]) for number, (name, _) in actions.items()}
    return actions


def write_rows(path: Path, rows: Rows) -> None:
    """Write detections as AVA's evaluation reads them, with as many digits as a float32 has."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        for (video, second), box, action, score in rows:
            writer.writerow([video, f"{second:04.15g}", *(f"{edge:.9g}" for edge in box), action, f"{score:.9g}"])


def key_frames(rows: Rows) -> KeyFrames:
    """Group rows by key frame, in the order of video, second, box and action."""
    return {frame: list(group) for frame, group in groupby(sorted(rows), key=attrgetter("frame"))}


def to_persons(rows: Rows, actions: int) -> tuple[Tensor, Tensor]:
    """Return the M sorted boxes of a key frame, (M, 4), and their scores, in ground truth labels, (M, actions)."""
    boxes = sorted({row.box for row in rows})
    scores = torch.zeros(len(boxes), 1 + actions)  # column 0 for rows without an action
    for row in rows:
        scores[boxes.index(row.box), row.action] = row.score
    return torch.tensor(boxes).reshape(-1, 4), scores[:, 1:]


# ---- movies ----


def list_movies(root: Path) -> Movies:
    """Return the movie of each video: a video file, or a folder of frames, in the folder `root`. Raises UserError."""
    paths = [path for path in sorted(root.glob("*")) if path.is_dir() or path.suffix.lower() in SUFFIXES]
    if not paths:
        raise UserError(f"there is no folder {root} with movies or folders of frames: look at data.movies")
    return {path.name if path.is_dir() else path.stem: path for path in paths}


def open_movie(path: Path, begin: Fraction, end: Fraction) -> AbstractContextManager:
    """Open the part of a movie between two times in seconds: a `Video` or a `FrameFolder`. Raises BrokenVideo."""
    return nullcontext(FrameFolder(path, begin, end)) if path.is_dir() else Video(path, begin, end)


def movie_sizes(movies: Movies) -> dict[str, tuple[int, int]]:
    """Return width and height in pixels of all movies that can be read."""
    sizes = {}
    for video, path in movies.items():
        try:
            with open_movie(path, Fraction(0), Fraction(0)) as movie:
                height, width = movie.frames([0]).shape[-2:]
            sizes[video] = width, height
        except BrokenVideo as error:
            say(f"its boxes are left out: {error}")
    return sizes


class FrameFolder:
    """A folder of frames extracted at 30 a second, as SlowFast has: NAME/NAME_000001.jpg, ... Used like a `Video`."""

    def __init__(self, folder: Path, begin: Fraction, end: Fraction) -> None:
        last = _count_frames(folder) - 1
        self.folder = folder
        self.first = min(math.floor(begin * 30), last)
        self.times = [Fraction(index, 30) for index in range(self.first, min(math.ceil(end * 30), last) + 1)]

    def frames(self, indices: list[int]) -> Tensor:
        """Return uint8 RGB (len(indices), 3, H, W). Raises BrokenVideo."""
        images = []
        for index in indices:
            path = self.folder / f"{self.folder.name}_{1 + self.first + index:06d}.jpg"
            try:
                images.append(TF.pil_to_tensor(Image.open(path).convert("RGB")))
            except (OSError, SyntaxError, ValueError) as error:
                raise BrokenVideo(f"{path}: {error}") from None
        return torch.stack(images)


@cache  # a folder may hold 27,000 frames
def _count_frames(folder: Path) -> int:
    numbers = [int(path.stem[-6:]) for path in folder.glob("*_[0-9][0-9][0-9][0-9][0-9][0-9].jpg")]
    if not numbers:
        raise BrokenVideo(f"{folder}: no frames named {folder.name}_000001.jpg and so on")
    return max(numbers)


# ---- what to train and test on; options: the group `data` of a configuration ----


class ValidationSet(NamedTuple):
    movies: Movies
    persons: KeyFrames  # that a detector found
    ground_truth: Rows
    actions: Actions  # those evaluated


def find_training(options: SimpleNamespace, root: Path) -> tuple[KeyFrames, Movies]:
    """Return the labelled key frames to train on, without those excluded or whose movie is missing, and all movies."""
    movies = list_movies(root / options.movies)
    excluded = read_exclusions(root / options.train_exclude) if options.train_exclude else ()
    rows = [row for row in read_ground_truth(root / options.train, options.actions) if row.frame not in excluded]
    labelled = {row.frame[0] for row in rows}
    where, missing = root / options.movies, sorted(labelled - movies.keys())
    if missing:
        say(f"{len(missing)} of {len(labelled)} movies for training are not in {where}, left out: {', '.join(missing)}")
    if len(missing) == len(labelled):
        raise UserError(f"{where} has none of the movies of {root / options.train}; look at data.movies")
    return key_frames([row for row in rows if row.frame[0] in movies]), movies


def find_validation(options: SimpleNamespace, root: Path) -> ValidationSet:
    """Return the validation set, with the persons that a detector found in it."""
    movies = list_movies(root / options.movies)
    excluded = read_exclusions(root / options.val_exclude) if options.val_exclude else ()
    rows = [row for row in read_ground_truth(root / options.val, options.actions) if row.frame not in excluded]
    actions = read_actions(root / options.labels)
    if max(actions) > options.actions:
        what = f"{root / options.labels} lists action {max(actions)}"
        raise UserError(f"{what}, more than data.actions={options.actions}")
    file_list = root / options.file_list if options.file_list else None
    sizes = movie_sizes(movies) if options.boxes.endswith(".json") else {}
    persons = read_person_boxes(root / options.boxes, options.threshold, file_list, sizes)
    persons = {frame: rows for frame, rows in persons.items() if frame not in excluded}
    if not persons or not any(row.action in actions for row in rows):
        what = f"{root / options.val} has no row of an action in {options.labels}, or {options.boxes} has no person"
        raise UserError(f"outside excluded frames, {what}")
    return ValidationSet(movies, persons, rows, actions)
