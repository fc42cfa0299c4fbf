"""scores.csv and classes.csv of a tested model, and two tested models compared class by class."""

import csv
import json
from pathlib import Path

from torch import Tensor

from support.config import UserError
from support.datasets import LabelledVideos
from support.pictures import draw_comparison


def write_scores(folder: Path, videos: LabelledVideos, scores: Tensor, names: list[str]) -> None:
    """scores.csv: class, prediction and probabilities of each video. classes.csv: videos and top-1 of each class."""
    rows, right = [["video", "class", "prediction", *names]], {name: [] for name in names}
    for (path, label), row in zip(videos, scores, strict=True):
        readable = not row.isnan().any()
        prediction = names[int(row.argmax())] if readable else "unreadable"
        rows.append([path, names[label], prediction, *(f"{p:.5f}" if readable else "" for p in row.tolist())])
        right[names[label]].append(prediction == names[label])
    classes = [[name, len(r), f"{100 * sum(r) / len(r):.2f}" if r else ""] for name, r in right.items()]
    for name, table in (("scores.csv", rows), ("classes.csv", [["class", "videos", "top1"], *classes])):
        with open(folder / name, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(table)


def most_probable(videos: list[Path], scores: Tensor, names: list[str]) -> dict[str, dict[str, float]]:
    """The up to five most probable classes of each readable video, with their probabilities."""
    found = {}
    for video, row in zip(videos, scores, strict=True):
        if not row.isnan().any():
            best = row.topk(min(5, len(names)))
            found[str(video)] = {names[i]: p for p, i in zip(*map(Tensor.tolist, best), strict=True)}
    return found


def write_predictions(file: Path, found: dict[str, dict[str, float]]) -> None:
    """Write what `most_probable` returns as .json, or as .csv with a row for each video and class."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        if file.suffix == ".json":
            return json.dump(found, opened, indent=1)
        rows = [(video, name, f"{p:.5f}") for video, classes in found.items() for name, p in classes.items()]
        csv.writer(opened).writerows([("video", "class", "probability"), *rows])


def compare(files: list[Path], out: Path, most: int = 20) -> None:
    """Sec. D, Figures 7 and 8: print and draw the classes in which one of two tested models is most ahead of the other.

    files: the scores.csv of both.
    """
    first, second = map(class_accuracy, files)
    shared = first.keys() & second.keys()
    if not shared:
        raise UserError(f"{files[0]} and {files[1]} have no class in common: they have to be of the same dataset")
    rows = sorted(((second[name] - first[name], name) for name in shared), reverse=True)
    if len(rows) > 2 * most:
        rows = rows[:most] + rows[-most:]
    print(f"top-1 by class: {files[1]} (second) against {files[0]} (first)\n  first  second   ahead  class")
    for ahead, name in rows:
        print(f"{first[name]:7.2f} {second[name]:7.2f} {ahead:+7.2f}  {name}")
    draw_comparison(rows, files, out / "comparison.png")


def class_accuracy(file: Path) -> dict[str, float]:
    """Top-1 in percent by class, from a scores.csv."""
    right: dict[str, list[bool]] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            for row in csv.DictReader(opened):
                right.setdefault(row["class"], []).append(row["class"] == row["prediction"])
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{file} is not a scores.csv as --test writes it") from None
    return {name: 100 * sum(hits) / len(hits) for name, hits in right.items()}
