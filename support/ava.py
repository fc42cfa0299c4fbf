"""AVA's files, and its evaluator: frame-mAP at IoU 0.5 (Sec. 4.3).

    python -m support.ava DETECTIONS.csv --ground-truth ava_val_v2.2.csv \\
        --labels ava_action_list_v2.2_for_activitynet_2019.pbtxt --exclude ava_val_excluded_timestamps_v2.2.csv
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from functools import cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from support.config import UserError, say
from support.datasets import SUFFIXES
from support.processes import launch
from support.video import BrokenVideo, Video

ACTIONS = 80  # of AVA, numbered from 1; 60 of them are evaluated
GROUPS = ("PERSON_MOVEMENT", "OBJECT_MANIPULATION", "PERSON_INTERACTION")  # AVA's actions 1 to 14, to 63, to 80
AIA_ENTRY = "an entry holds image_id, bbox [x, y, width, height] in pixels and score"

Frame = tuple[str, float]  # a key frame: video, second, an int if it is whole
Box = tuple[float, float, float, float]  # x1 y1 x2 y2 in fractions of width and height
Actions = dict[int, tuple[str, str]]  # name and group by number; the group is empty if unknown


class Row(NamedTuple):
    """A row of AVA's csv files: a person in a key frame, and one of the actions that the person does."""

    frame: Frame
    box: Box
    action: int  # from 1; 0 where the file has none
    score: float  # 1 where the file has none


# ---- AVA's files ----


def read_ground_truth(path: Path, actions: int = ACTIONS) -> list[Row]:
    """AVA's annotations: rows video,second,x1,y1,x2,y2,action,person. Raises UserError with file and line.

    AVA-Kinetics also has rows video,second: a key frame without persons, in which nothing is to be found.
    """
    return _read_rows(path, range(1, actions + 1), "person")


def read_detections(path: Path, actions: int = ACTIONS) -> list[Row]:
    """Detected actions: rows video,second,x1,y1,x2,y2,action,score; without a score it is 1. Raises UserError."""
    return _read_rows(path, range(1, actions + 1), "score", any_box=True)


def read_person_boxes(
    path: Path, threshold: float, file_list: Path | None = None, sizes: Mapping[str, tuple[int, int]] | None = None
) -> dict[Frame, list[Row]]:
    """Key frames of persons that a detector found with a score of at least `threshold`, in the paper 0.8 (Sec. B).

    path: csv as SlowFast has it, rows video,second,x1,y1,x2,y2,action or nothing,score; or json as AIA has it. This
    numbers movies by AVA's `file_list` and measures in pixels, so it takes the `sizes` of movies, (width, height);
    boxes of other movies are left out. Raises UserError.
    """
    if path.suffix in (".pkl", ".pickle"):
        rows = f"pickle.load(open('{path}', 'rb')).items() for row in rows"
        command = f"import pickle; [print(key, *row[:4], '', row[4], sep=',') for key, rows in {rows}]"
        how = f'if you trust it, convert it with python -c "{command}" > boxes.csv'
        raise UserError(f"{path} is a pickle, which could run any code: {how}")
    to_columns = _aia_columns(path, file_list, sizes) if path.suffix == ".json" else None
    rows = _read_rows(path, range(ACTIONS + 1), "score", to_columns=to_columns)
    if kept := [row._replace(action=0) for row in rows if row.score >= threshold]:
        return key_frames(kept)
    highest = f"{max(row.score for row in rows):.3f}"
    raise UserError(f"{path}: none of {len(rows)} boxes has a score of {threshold} or more; the highest is {highest}")


def read_exclusions(path: Path) -> set[Frame]:
    """Key frames that do not count: rows video,second. Raises UserError with file and line."""
    return set(_parsed(path, _key_frame, "a row of excluded frames is video,second"))


def _read_rows(
    path: Path, actions: range, last: str, any_box: bool = False, to_columns: Callable | None = None
) -> list[Row]:
    """The last column is a "score" or not needed. The action may be empty if 0 is one of `actions`.

    any_box: the edges of a box may be in the wrong order; the evaluation ignores such boxes.
    to_columns: makes a row's columns of an entry of a json file, None of one to leave out.
    """
    known: dict[Any, Any] = {}  # a box is in many rows: one copy saves memory

    def parse(item: Any) -> Row | None:
        columns = to_columns(item) if to_columns else item
        if columns is None:
            return None
        if last == "person" and not any(columns[2:]):
            return _key_frame(columns[:2]) and None
        if len(columns) not in (7, 8):
            raise ValueError(f"{len(columns)} columns")
        frame, (x1, y1, x2, y2) = _key_frame(columns[:2]), map(float, columns[2:6])
        action = int(columns[6]) if columns[6].strip() or 0 not in actions else 0
        score = float(columns[7]) if last == "score" and len(columns) == 8 else 1.0
        if not all(-10 < edge < 10 for edge in (x1, y1, x2, y2)):
            raise ValueError("a box in pixels, or with numbers that are not finite")
        if not any_box and (x1 > x2 or y1 > y2):
            raise ValueError("a box of negative size, whose left or upper edge lies beyond the other")
        if action not in actions:
            raise ValueError(f"unknown action {action}, known are 1 to {actions[-1]}")
        if not math.isfinite(score):
            raise ValueError("a score that is not finite")
        place = frame, (x1, y1, x2, y2)
        return Row(*known.setdefault(place, place), action, score)

    form = f"a row is video,second,x1,y1,x2,y2,action,{last}, the box in fractions of width and height"
    items = _parsed(path, parse, AIA_ENTRY if to_columns else form)
    if rows := [row for row in items if row]:
        return rows
    missing = f"{path}: there is a movie for none of its {len(items)} boxes; look at data.movies"
    raise UserError(missing if items else f"{path} holds no rows")


def _key_frame(columns: list[str]) -> Frame:
    video, second = columns
    if not video or not re.fullmatch(r"\d+(\.\d+)?", second):
        raise ValueError("no video, or a second that is not a whole number or a decimal fraction")
    second = float(second)
    return video, int(second) if second.is_integer() else second


def _aia_columns(path: Path, file_list: Path | None, sizes: Mapping[str, tuple[int, int]] | None) -> Callable:
    """What makes columns of AIA's {"image_id": 10000 * movie + second, "bbox": [x, y, width, height], "score"}."""
    if file_list is None or sizes is None:
        raise UserError(f"{path} numbers its movies: give AVA's list of file names too, as data.file_list")
    videos = _parsed(file_list, lambda columns: columns[0].rsplit(".", 1)[0], "a line is the name of a file")

    def to_columns(entry: dict[str, Any]) -> list | None:
        movie, second = divmod(int(entry["image_id"]), 10000)
        x, y, box_width, box_height = map(float, entry["bbox"])
        if not 0 <= movie < len(videos):
            raise ValueError(f"movie {movie}, but {file_list} lists {len(videos)}, counted from 0")
        if videos[movie] not in sizes:
            return None
        width, height = sizes[videos[movie]]
        box = x / width, y / height, (x + box_width) / width, (y + box_height) / height
        if not all(-0.1 < edge < 1.1 for edge in box):
            raise ValueError(f"a box outside of {width} x {height} pixels: found in a movie of another size")
        return [videos[movie], str(second), *box, "", entry["score"]]

    return to_columns


def _parsed(path: Path, parse: Callable[[Any], Any], form: str) -> list:
    """What `parse` makes of the columns of each line of a csv file that is not blank, or of each entry of a json file.

    Raises UserError with file and line.
    """
    parsed, number = [], 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for item in json.load(file) if path.suffix == ".json" else (line.strip().split(",") for line in file):
                number += 1
                if item != [""]:
                    parsed.append(parse(item))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"no rows can be read from {path}: {error}") from None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        place = f"{'entry' if path.suffix == '.json' else 'line'} {number}"
        raise UserError(f"{path}, {place}: {error}; {form}") from None
    return parsed


def read_actions(path: Path) -> Actions:
    """A list of actions in AVA's pbtxt form: blocks with name, id or label_id, and label_type or none.

    The list of the 60 evaluated actions has no types; if its names are AVA's, the numbers tell the groups.
    Raises UserError with file and line.
    """
    try:
        text = re.sub(r"^[ \t]*#.*", "", path.read_text("utf-8-sig"), flags=re.MULTILINE)  # without comments
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no list of actions can be read from {path}: {error}") from None
    string, actions = r'"(?:\\.|[^"\\\n])*"', {}  # a string may hold braces and \"
    for match in re.finditer(rf'\w+\s*:?\s*\{{((?:{string}|[^{{}}"])*)\}}|\S|\Z', text):  # a block, a mistake, the end
        if actions and not match[0]:
            break
        where = f"{path}, line {1 + text.count(chr(10), 0, match.start())}"
        fields = dict(re.findall(rf"(\w+):\s*({string}|\w+)", match[1] or ""))
        name, number = fields.get("name", ""), fields.get("label_id", fields.get("id", ""))
        if not name.startswith('"') or not number.isdecimal():
            raise UserError(f'{where}: a list of actions is made of blocks such as item {{ name: "sit" id: 11 }}')
        if int(number) in (0, *actions):
            raise UserError(f"{where}: action {number} is listed twice, or is 0; ids start at 1")
        actions[int(number)] = re.sub(r"\\(.)", r"\1", name[1:-1]), fields.get("label_type", "")
    known = {14: "walk", 15: "answer phone", 63: "write", 64: "fight/hit (a person)"}  # the first and last of groups
    if all(actions.get(number) == (name, "") for number, name in known.items()):
        return {number: (name, GROUPS[(number > 14) + (number > 63)]) for number, (name, _) in actions.items()}
    return actions


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write detections as AVA's evaluation reads them, with as many digits as a float32 has."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        for (video, second), box, action, score in rows:
            file.write(f"{video},{second:04.15g},{','.join(f'{edge:.9g}' for edge in box)},{action},{score:.9g}\n")


def key_frames(rows: list[Row]) -> dict[Frame, list[Row]]:
    """Rows grouped by key frame, in the order of video, second, box and action."""
    return {frame: list(group) for frame, group in groupby(sorted(rows), key=attrgetter("frame"))}


def to_persons(rows: list[Row], actions: int) -> tuple[Tensor, Tensor]:
    """The M boxes in the rows of a key frame, sorted, (M, 4), and the scores of their rows, (M, actions).

    In ground truth these are labels, one for each action that a person does; all else is zero.
    """
    boxes = sorted({row.box for row in rows})
    scores = torch.zeros(len(boxes), 1 + actions)  # column 0 for rows without an action
    for row in rows:
        scores[boxes.index(row.box), row.action] = row.score
    return torch.tensor(boxes).reshape(-1, 4), scores[:, 1:]


def list_movies(root: Path) -> dict[str, Path]:
    """The movie of each video id: a video file, or a folder of frames, in the folder `root`. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: data.movies has to name AVA's movies, or folders of their frames")
    paths = (path for path in sorted(root.iterdir()) if path.is_dir() or path.suffix.lower() in SUFFIXES)
    movies = {path.name if path.is_dir() else path.stem: path for path in paths}
    if not movies:
        raise UserError(f"no movies and no folders of frames found in {root}")
    return movies


def open_movie(path: Path, begin: Fraction, end: Fraction) -> AbstractContextManager:
    """The part of a movie between two times in seconds: a `Video` or a `FrameFolder`. Raises BrokenVideo."""
    return nullcontext(FrameFolder(path, begin, end)) if path.is_dir() else Video(path, begin, end)


class FrameFolder:
    """A folder of frames extracted at 30 a second, as SlowFast has: NAME/NAME_000001.jpg, ... Used like a `Video`."""

    def __init__(self, folder: Path, begin: Fraction, end: Fraction) -> None:
        last = _count_frames(folder) - 1
        self.folder, self.first = folder, min(math.floor(begin * 30), last)
        self.times = [Fraction(index, 30) for index in range(self.first, min(math.ceil(end * 30), last) + 1)]

    def frames(self, indices: list[int]) -> Tensor:
        """uint8 RGB (len(indices), 3, H, W)."""
        images = []
        for index in indices:
            path = self.folder / f"{self.folder.name}_{1 + self.first + index:06d}.jpg"
            try:
                images.append(TF.pil_to_tensor(Image.open(path).convert("RGB")))
            except (OSError, SyntaxError, ValueError) as error:
                raise BrokenVideo(f"{path}: {error}") from None
        return torch.stack(images)


def movie_sizes(movies: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """Width and height in pixels of all movies that can be read."""
    sizes = {}
    for video, path in movies.items():
        try:
            with open_movie(path, Fraction(0), Fraction(0)) as movie:
                height, width = movie.frames([0]).shape[-2:]
            sizes[video] = width, height
        except BrokenVideo as error:
            say(f"its boxes are left out: {error}")
    return sizes


@cache  # a folder may hold 27,000 frames
def _count_frames(folder: Path) -> int:
    numbers = [int(path.stem[-6:]) for path in folder.glob("*_[0-9][0-9][0-9][0-9][0-9][0-9].jpg")]
    if not numbers:
        raise BrokenVideo(f"{folder}: no frames named {folder.name}_000001.jpg and so on")
    return max(numbers)


# ---- frame-mAP, the official evaluator's to the digit ----


def average_precisions(
    ground_truth: list[Row], detections: list[Row], actions: Iterable[int], skip_empty: bool = False
) -> dict[int, float]:
    """Average precision of each action; NaN without ground truth, 0 without detections. The mean of all is the mAP.

    Each detection is matched only to the true box that it overlaps most. It is wrong if a detection with a higher score
    was matched to that box before, even where a second box overlaps enough. Detections without area do not count. Those
    in frames without ground truth are wrong, unless `skip_empty`, mmaction2's default, skips these frames. Equal scores
    and equal overlaps are decided by frame and box; in the official evaluator by the order of rows.
    """
    truth: dict[int, dict[Frame, list[Box]]] = {action: {} for action in sorted(actions)}
    for frame, box, action, _ in sorted(ground_truth):
        if action in truth:
            truth[action].setdefault(frame, []).append(box)
    frames, taken = {frame for of_action in truth.values() for frame in of_action}, set()
    correct: dict[int, list[bool]] = {action: [] for action in truth}  # of each detection, best first
    for frame, box, action, _ in sorted(detections, key=lambda row: (-row.score, row.frame, row.box)):
        skipped = skip_empty and frame not in frames
        if action in truth and not skipped and box[0] < box[2] and box[1] < box[3]:
            overlaps = {true_box: iou(box, true_box) for true_box in truth[action].get(frame, ())}
            best = max(overlaps, key=overlaps.get, default=None)
            correct[action].append(best is not None and overlaps[best] >= 0.5 and (action, frame, best) not in taken)
            if correct[action][-1]:
                taken.add((action, frame, best))
    precisions = {}
    for action, hits in correct.items():  # the area under the curve of precision over recall
        hits, positives = torch.tensor(hits).bool(), sum(map(len, truth[action].values()))  # (D,)
        precision = hits.cumsum(0).double() / torch.arange(1, len(hits) + 1)  # (D,)
        precision = precision.flip(0).cummax(0).values.flip(0)  # (D,), made non-increasing
        precisions[action] = float(precision[hits].sum() / positives)  # each hit adds 1 / positives to recall
    return precisions


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    both = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    return both / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both)


def mean_percent(precisions: Iterable[float]) -> float | None:
    """The mean in percent of those that are numbers; None without any."""
    numbers = [precision for precision in precisions if not math.isnan(precision)]
    return 100 * (sum(numbers) / len(numbers)) if numbers else None


def summarize(precisions: dict[int, float], actions: Actions) -> dict[str, Any]:
    """mAP, the mean of each group of actions, and AP by action, in percent; None without ground truth."""
    groups: dict[str, list[float]] = {}
    for number, (_, group) in actions.items():
        groups.setdefault(group.replace("_", " ").lower(), []).append(precisions[number])
    return {
        "mAP": mean_percent(precisions.values()),
        "groups": {group: mean_percent(values) for group, values in groups.items() if group},
        "actions": [dict(id=i, name=actions[i][0], AP=mean_percent([value])) for i, value in precisions.items()],
    }


def report(summary: dict[str, Any], path: Path, as_json: bool = False) -> None:
    """Write a summary as json and print AP by action, the mean of each group and the mAP, or `as_json` the summary."""
    path.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    if as_json:
        return print(json.dumps(summary), flush=True)
    lines = [(action["AP"], f"{action['id']:3d} {action['name']}") for action in summary["actions"]]
    lines += [(value, f"mean of {group}") for group, value in summary["groups"].items()]
    for value, text in (*lines, (summary["mAP"], "mAP at IoU 0.5")):
        print("  none" if value is None else f"{value:6.2f}", text, sep="  ", flush=True)


def main(words: list[str] | None = None) -> None:
    """Print and write the mAP of a file of detections. words: of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, skip = parser.add_argument, "detections there are not counted as wrong; not official"
    add("detections", type=Path, metavar="DETECTIONS.csv")
    add("--ground-truth", type=Path, metavar="GT.csv", help="AVA's annotations")
    add("--labels", type=Path, metavar="LIST.pbtxt", help="the actions to evaluate")
    add("--exclude", type=Path, metavar="X.csv", help="frames to leave out, video,second")
    add("--skip-frames-without-ground-truth", action="store_true", help=skip)
    add("--json", action="store_true", help="print the results as one JSON object")
    add("--out", type=Path, metavar="FILE", help="default: DETECTIONS_mAP.json")
    a = parser.parse_args(words)
    if not a.ground_truth or not a.labels:
        raise UserError("evaluating needs --ground-truth GT.csv and --labels LIST.pbtxt, both from AVA's annotations")
    actions = read_actions(a.labels)
    known = max(ACTIONS, *actions)
    truth, rows = read_ground_truth(a.ground_truth, known), read_detections(a.detections, known)
    excluded = read_exclusions(a.exclude) if a.exclude else set()
    counted = [[row for row in of_file if row.frame not in excluded] for of_file in (truth, rows)]
    summary = summarize(average_precisions(*counted, actions, a.skip_frames_without_ground_truth), actions)
    if summary["mAP"] is None:
        raise UserError(f"{a.ground_truth} holds no row of an action in {a.labels} outside excluded frames")
    frames, true_frames = {row.frame for row in rows}, {row.frame for row in truth}
    both = f"{len(frames & true_frames):,} of them among the {len(true_frames):,} with ground truth"
    tell = say if a.json else print
    tell(f"{len(rows):,} detections in {len(frames):,} frames, {both}")
    out = a.out or a.detections.with_name(f"{a.detections.stem}_mAP.json")
    report(summary, out, a.json)
    if not summary["groups"]:
        tell(f"no groups: {a.labels} states no label_type")
    if a.skip_frames_without_ground_truth:
        tell("frames without ground truth left out")
    tell(f"written to {out}")


if __name__ == "__main__":
    launch(main)
