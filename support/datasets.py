"""The classes of a dataset's videos, for training and for validation. support/lists.py lists the videos."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

from support.config import UserError, say
from support.lists import Entry, Videos, find_files, list_entries, list_videos, text_lines  # noqa: F401 (for notebooks)

NUMBERED = (  # lines of a file of classes: number and name, or name and number, each perhaps quoted
    re.compile(r'"?(?P<number>\d+)"?[\s,]+"?(?P<name>.*?)"?'),
    re.compile(r'"?(?P<name>.*?)"?\s*[\t,]\s*"?(?P<number>\d+)"?'),
)
HEADERS = "name", "names", "label", "labels", "class", "classes", "class_name", "category"

LabelledVideos = Sequence[tuple[Path, int]]  # each with the number of its class


class Classes:
    """The names of a dataset's classes. A label means the class of this name or, if there is none, of this number.

    From a file: lines `name`, numbered from 0 (Kinetics), lines `number name` (UCF101's classInd.txt) or `name,number`,
    with or without a header, or a .json object {"name": "number"} (Something-Something V2's labels). Without one, from
    the labels of the training videos: names in alphabetical order, or numbers. `known`: a checkpoint's classes, whose
    order is kept if they are the same.
    """

    def __init__(self, root: str, file: str, entries: Iterable[Entry], known: list[str] | None = None) -> None:
        self.where = str((find_files(root, file) or [file])[0]) if file else "the training videos"
        numbered = _read_classes(Path(self.where)) if file else _number_labels(entries)
        if known and sorted(known) == sorted(name for _, name in numbered):
            numbered.sort(key=lambda item: known.index(item[1]))
        self.names = [name for _, name in numbered]
        self.by_label: dict[str, int] = {}
        named_by_numbers = any(name.isdecimal() for name in self.names)  # then a number is a name, not a place
        for index, (number, name) in enumerate(numbered):
            for label in [_plain(name)] if named_by_numbers else [_plain(name), str(number)]:
                if self.by_label.setdefault(label, index) != index:
                    raise UserError(f"{self.where}: class '{name}' cannot be told apart from another; rename it")

    def index(self, entry: Entry) -> int:
        """Return the class of an entry. Raises UserError with its file and line."""
        label = _plain(str(entry.label))
        if label not in self.by_label:
            what = f"unknown class '{entry.label}'" if label else "no label"
            hint = f"the {len(self.names)} classes of {self.where} are {', '.join(self.names[:3])}, ..."
            raise UserError(f"{entry.where}: {what} for {Path(entry.path).name}; {hint}")
        return self.by_label[label]


def _plain(label: str) -> str:
    label = label.replace("_", " ").lower()  # folders are often named riding_a_bike for "riding a bike"
    return str(int(label)) if label.isdecimal() else label


def _number_labels(entries: Iterable[Entry]) -> list[tuple[int, str]]:
    places = {entry.label: entry.where for entry in entries if entry.label != ""}
    if all(isinstance(label, str) for label in places):
        return list(enumerate(sorted(places)))
    for label, where in places.items():
        if label not in range(len(places)):
            raise UserError(f"{where}: label '{label}'; labels are names or the numbers from 0, or set data.classes")
    return [(number, str(number)) for number in range(len(places))]


def _read_classes(file: Path) -> list[tuple[int, str]]:
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text("utf-8-sig"))
            return sorted((int(number), name) for name, number in content.items())
        lines = list(text_lines(file))
    except (OSError, ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"data.classes: no class names can be read from {file} ({error})") from None
    for form in NUMBERED:
        matches = [form.fullmatch(line) for _, line in lines]
        if 2 * sum(map(bool, matches)) >= len(lines):
            for (where, _), match in zip(lines[1:], matches[1:], strict=True):  # the first may be a header
                if not match:
                    raise UserError(f"{where}: expected a number and a name, as in the other lines")
            return [(int(match["number"]), match["name"]) for match in matches if match]
    names = [line.strip('"') for _, line in lines]
    return list(enumerate(names[1:] if names[0].lower() in HEADERS else names))


def labelled_videos(
    root: str, train: str, val: str, classes: str, per_class: int = 0, known: list[str] | None = None
) -> tuple[LabelledVideos, LabelledVideos, list[str]]:
    """Return the videos with their class for training and for validation, and the names of the classes.

    per_class: number of videos of each class to train on; 0 for all.
    known: a checkpoint's classes in the order of its outputs; with them and `val`, no training videos are needed.
    Without `val` every fifth training video of each class is kept for validation.
    """
    entries = []
    if not (known and val):
        entries = list(list_entries(root, train))
    names = entries or [Entry("", name, "the checkpoint") for name in known]
    table = Classes(root, classes, names, known)
    if len(table.names) < 2:
        what = f"a classifier needs two classes, but those of {table.where} are {table.names}"
        raise UserError(f"{what}: make a folder for each class, or a list of lines 'path label'")
    videos = sorted([(entry.path, table.index(entry)) for entry in entries], key=itemgetter(1))
    if val:
        val_videos = [(entry.path, table.index(entry)) for entry in list_entries(root, val)]
    else:
        videos, val_videos = hold_out(videos, table.names)
    if not any(os.path.exists(path) for path, _ in val_videos):  # raise now, not after days of training
        raise UserError(f"no validation video exists, not even {val_videos[0][0]}: look at data.root and data.val")
    if per_class:
        videos = [video for _, group in groupby(videos, itemgetter(1)) for video in islice(group, per_class)]
    return Videos(*zip(*videos, strict=True)), Videos(*zip(*val_videos, strict=True)), table.names


def hold_out(videos: list[tuple[str, int]], names: list[str]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Split off every fifth video of each class for validation. Print which classes are too small for it."""
    kept, held_out = [], []
    for _, group in groupby(videos, itemgetter(1)):  # the videos are sorted by class
        group = list(group)
        held_out += group[4::5]
        del group[4::5]
        kept += group
    if not held_out:
        raise UserError("no class has five videos, so none can be kept for validation: name some by data.val")
    untested = len(names) - len({label for _, label in held_out})
    if untested:
        say(f"{untested} of {len(names)} classes have fewer than five videos and are never tested: set data.val")
    return kept, held_out
