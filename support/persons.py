"""Which key frames are labelled, where the persons are (by lists, a detector, or whole frames), a video of them."""

from bisect import bisect_left
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2
from tqdm import tqdm

from support import ava
from support.config import UserError, say
from support.pictures import draw_persons
from support.video import Video, write_mp4

Rows = list[ava.Row]
KeyFrames = dict[ava.Frame, Rows]  # the rows of each key frame (video, second)
Movies = dict[str, Path]


class TestSet(NamedTuple):
    """What a model is tested on."""

    movies: Movies
    persons: KeyFrames  # that a detector found
    ground_truth: Rows
    actions: ava.Actions  # those evaluated


def find_labelled(options: SimpleNamespace, root: Path, split: str) -> tuple[Movies, Rows, set[ava.Frame]]:
    """All movies, the annotations of `split`, train or val, and the key frames excluded from it."""
    movies, named = ava.list_movies(root / options.movies), vars(options)
    excluded = ava.read_exclusions(root / named[f"{split}_exclude"]) if named[f"{split}_exclude"] else set()
    rows = ava.read_ground_truth(root / named[split], options.actions)
    return movies, [row for row in rows if row.frame not in excluded], excluded


def find_training(options: SimpleNamespace, root: Path) -> tuple[KeyFrames, Movies]:
    """Labelled key frames for training, without those that are excluded or whose movie is missing, and all movies."""
    movies, rows, _ = find_labelled(options, root, "train")
    named, where = {row.frame[0] for row in rows}, root / options.movies
    if missing := sorted(named - movies.keys()):
        say(f"{len(missing)} of {len(named)} movies for training are not in {where} and left out: {', '.join(missing)}")
    if len(missing) == len(named):
        raise UserError(f"{where} has none of the movies of {root / options.train}; look at data.movies")
    return ava.key_frames([row for row in rows if row.frame[0] in movies]), movies


def find_test(options: SimpleNamespace, root: Path) -> TestSet:
    """The validation set, and the persons that a detector found in it."""
    movies, rows, excluded = find_labelled(options, root, "val")
    actions = ava.read_actions(root / options.labels)
    if max(actions) > options.actions:
        what = f"{root / options.labels} lists action {max(actions)}"
        raise UserError(f"{what}, more than data.actions={options.actions}")
    found = find_persons(root / options.boxes, options, root, movies)
    persons = {frame: rows for frame, rows in found.items() if frame not in excluded}
    if not persons:
        raise UserError(f"{root / options.val_exclude} leaves out all {len(found)} key frames with persons")
    if not any(row.action in actions for row in rows):
        raise UserError(f"{root / options.val} holds no row of an action in {options.labels} outside excluded frames")
    return TestSet(movies, persons, rows, actions)


def find_persons(path: Path, options: SimpleNamespace, root: Path, movies: Movies) -> KeyFrames:
    """Persons that a detector found, from a file of any form that `read_person_boxes` reads."""
    sizes = ava.movie_sizes(movies) if path.suffix == ".json" else {}
    return ava.read_person_boxes(path, options.threshold, root / options.file_list, sizes)


def load_person_detector(path: Path) -> nn.Module:
    """torchvision's Faster R-CNN for COCO's classes, with the weights from a file. Raises UserError."""
    person_detector = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    try:
        person_detector.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # many types for one mistake
        what = f"{path} does not hold the weights of torchvision's fasterrcnn_resnet50_fpn_v2"
        raise UserError(f"{what} ({type(error).__name__})") from None
    return person_detector.eval()


@torch.inference_mode()
def persons_each_second(
    path: Path, person_detector: nn.Module | None, device: torch.device, options: SimpleNamespace
) -> KeyFrames:
    """The persons that a detector finds at each second of a video, or without one, whole frames.

    Raises BrokenVideo, or UserError if there are no persons.
    """
    rows = []
    with Video(path) as video:
        times = video.times
        for second in range(round(times[-1]) + 1):
            boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
            if person_detector:
                image = video.frames([nearest(times, Fraction(second))])[0].to(device)  # (3, H, W)
                found = person_detector([image / 255])[0]
                kept = (found["labels"] == 1) & (found["scores"] >= options.threshold)  # COCO's class 1: person
                boxes = found["boxes"][kept].cpu() / torch.tensor([*image.shape[:0:-1]] * 2)  # (P, 4)
                scores = found["scores"][kept]
            frame, persons = (path.stem, options.starts_at + second), zip(boxes.tolist(), scores.tolist(), strict=True)
            rows += [ava.Row(frame, tuple(box), 0, score) for box, score in persons]
    if not rows:
        raise UserError(f"{path} shows no person whom the detector gives a score of {options.threshold} or more")
    return ava.key_frames(rows)


def draw_video(path: Path, out: Path, rows: Rows, names: dict[int, str], classes: int, starts_at: int) -> None:
    """Write detections in a video as csv, and the video as mp4, each frame with those nearest, within half a second."""
    if out.exists() and out.samefile(path):
        raise UserError(f"{path} would be overwritten: give another --out")
    frames = ava.key_frames(rows)
    persons, key_times = list(frames.values()), [Fraction(str(second)) - starts_at for _, second in frames]

    def drawn(movie: Video) -> Iterator[Tensor]:
        images = tqdm(movie.every_frame(), "drawing", len(movie), unit="frame")
        for time, image in zip(movie.times, images, strict=True):
            index = nearest(key_times, time)
            shown = persons[index] if abs(key_times[index] - time) <= Fraction(1, 2) else []
            picture = draw_persons(image, *ava.to_persons(shown, classes), names, "orange")
            yield picture[:, : picture.shape[1] // 2 * 2, : picture.shape[2] // 2 * 2]  # H.264 wants even sizes

    out.parent.mkdir(parents=True, exist_ok=True)
    ava.write_rows(out.with_suffix(".csv"), rows)
    with Video(path) as movie:
        write_mp4(out, drawn(movie), movie.rate)
    print(f"{len({(row.frame, row.box) for row in rows})} persons in {len(frames)} key frames: {out}", flush=True)


def nearest(times: list[Fraction], time: Fraction) -> int:
    """The index of the nearest to `time` of the sorted `times`, the earlier of two equally near."""
    right = bisect_left(times, time)
    neighbors = range(max(right - 1, 0), min(right + 1, len(times)))
    return min(neighbors, key=lambda index: abs(times[index] - time))
