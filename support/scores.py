"""Write the scores of a test and of a prediction; compare two tested models class by class."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from support.config import UserError, say
from support.datasets import LabelledVideos
from support.pictures import new_figure


def write_csv(file: Path, rows: Iterable[list]) -> None:
    """Write rows of a csv file; names of files may not be valid UTF-8."""
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        csv.writer(opened).writerows(rows)


def describe_accuracy(rates: dict[str, float], videos: int, unreadable: int, classes: int) -> str:
    """Return a sentence on the rates of a test, in percent. Top-5 is left out with fewer than ten classes."""
    text = f"top-1 {rates['top1']:.2f} % (mean over classes {rates['class_mean']:.2f} %)"
    if classes >= 10:
        text += f", top-5 {rates['top5']:.2f} %"
    text += f" of {videos:,} videos"
    return text + (f", {unreadable} of them unreadable" if unreadable else "")


def write_scores(folder: Path, videos: LabelledVideos, scores: Tensor, names: list[str]) -> None:
    """Write scores.csv: class, prediction and probabilities of each video; classes.csv: videos and top-1 of each class.

    The scores of a video that cannot be read are NaN.
    """
    rows, hits = [["video", "class", "prediction", *names]], {name: [] for name in names}
    for (path, label), row in zip(videos, scores, strict=True):
        prediction, probabilities = "unreadable", [""] * len(names)
        if not row.isnan().any():
            prediction, probabilities = names[int(row.argmax())], [f"{p:.5f}" for p in row.tolist()]
        rows.append([path, names[label], prediction, *probabilities])
        hits[names[label]].append(prediction == names[label])
    write_csv(folder / "scores.csv", rows)
    rows = [["class", "videos", "top1"]]
    for name, correct in hits.items():
        rows.append([name, len(correct), f"{100 * sum(correct) / len(correct):.2f}" if correct else ""])
    write_csv(folder / "classes.csv", rows)


def most_probable(videos: list[Path], scores: Tensor, names: list[str]) -> dict[str, dict[str, float]]:
    """Return the up to five most probable classes of each readable video, with their probabilities."""
    predictions = {}
    for video, row in zip(videos, scores, strict=True):
        if not row.isnan().any():
            values, indices = row.topk(min(5, len(names)))
            predictions[str(video)] = {names[i]: p for i, p in zip(indices.tolist(), values.tolist(), strict=True)}
    return predictions


def write_predictions(file: Path, predictions: dict[str, dict[str, float]]) -> None:
    """Write what `most_probable` returns as .json, or as .csv with a row for each video and class."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".json":
        file.write_text(json.dumps(predictions, indent=1), "utf-8")
        return
    rows = [["video", "class", "probability"]]
    for video, classes in predictions.items():
        rows += [[video, name, f"{p:.5f}"] for name, p in classes.items()]
    write_csv(file, rows)


def compare(files: list[Path], out: Path, most: int = 20) -> None:
    """Print and draw in which classes one of two scores.csv is most ahead of the other (Sec. D, Figures 7 and 8)."""
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
    points = [ahead for ahead, _ in rows]
    figure = new_figure(8, 1.5 + 0.22 * len(rows))
    axes = figure.subplots()
    bars = axes.barh(range(len(rows)), points, color=["steelblue" if ahead > 0 else "orange" for ahead in points])
    axes.bar_label(bars, fmt="%+.1f", padding=3)
    axes.set_yticks(range(len(rows)), [name[:40] for _, name in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)  # room for the numbers
    axes.set_xlabel(f"top-1 of {files[1]}\nless that of {files[0]}, percentage points")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "comparison.png", dpi=120)
    say(f"{out / 'comparison.png'}")


def class_accuracy(file: Path) -> dict[str, float]:
    """Return top-1 in percent by class, from a scores.csv."""
    correct: dict[str, list[bool]] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            for row in csv.DictReader(opened):
                correct.setdefault(row["class"], []).append(row["class"] == row["prediction"])
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        raise UserError(f"{file} is not a scores.csv as --test writes it") from None
    return {name: 100 * sum(videos) / len(videos) for name, videos in correct.items()}
