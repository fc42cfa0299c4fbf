"""AVA's files, and its evaluator: frame-mAP at IoU 0.5."""

import json
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support.config import UserError
from support.datasets import SUFFIXES
from support.video import read_clip

ACTIONS = 80  # of AVA, numbered from 1; 60 of them are evaluated (Sec. 4.3)

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
    paths = (path for path in sorted(root.iterdir()) if path.is_dir() or path.suffix.lower() in SUFFIXES)
    movies = {path.name if path.is_dir() else path.stem: path for path in paths}
    if not movies:
        raise UserError(f"no movies and no folders of frames found in {root}")
    return movies


def movie_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of a movie file or a folder of frames. Raises BrokenVideo."""
    height, width = read_clip(path, 0, frames=2, stride=1, starts_at=0).shape[-2:]
    return width, height
