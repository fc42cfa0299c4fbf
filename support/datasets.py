"""List a dataset's videos for training and for validation, with their classes. support/lists.py reads the files."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np

from support.config import UserError, say
from support.lists import SUFFIXES, Entry, find_files, read_list, text_lines

HEADERS = "name", "names", "label", "labels", "class", "classes", "class_name", "category"

LabelledVideos = Sequence[tuple[Path, int]]  # each with the number of its class


class Videos(Sequence):
    """The paths of many videos, perhaps with their classes: `videos[index]` is a Path or a pair (Path, class).

    They are in a few large arrays, which forked loader workers share. A list would soon be copied into each worker,
    since reading an object writes its reference count.
    """

    def __init__(self, paths: Iterable[str], classes: Iterable[int] = ()) -> None:
        self.text, self.ends = bytearray(), array("Q", [0])
        for path in paths:
            self.text += os.fsencode(path)
            self.ends.append(len(self.text))
        self.classes = array("Q", classes)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int | slice) -> Path | tuple[Path, int] | list:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        path = Path(os.fsdecode(bytes(self.text[self.ends[place] : self.ends[place + 1]])))
        return (path, self.classes[place]) if self.classes else path

    def names(self) -> Iterator[str]:
        """Yield the paths as strings, many times faster than as Paths."""
        for start, end in pairwise(self.ends):
            yield os.fsdecode(bytes(self.text[start:end]))


def list_entries(root: str, selection: str, labels: bool = True) -> list[Entry]:
    """List the videos of `read_list`. Raises UserError if there are none, or one is named twice."""
    entries = list(read_list(root, selection, labels))
    if not entries:
        raise UserError(f"no videos found in {selection or root} (files ending in {' '.join(SUFFIXES)})")
    seen: dict[str, str] = {}
    for entry in entries:
        path = os.path.normpath(entry.path)
        if path in seen:
            raise UserError(f"{entry.where}: {path} is named a second time, after {seen[path]}; delete one of the two")
        seen[path] = entry.where
    return entries


def list_videos(root: str, selection: str) -> Videos:
    """List the paths alone of `list_entries`: pre-training needs no labels, but perhaps a million videos."""
    videos = Videos(entry.path for entry in read_list(root, selection, labels=False))
    hashes = np.fromiter((hash(os.path.normpath(name)) for name in videos.names()), np.int64, len(videos))
    if len(np.unique(hashes)) < max(1, len(videos)):
        list_entries(root, selection, labels=False)  # raises the error
    return videos


def named_videos(names: list[Path]) -> list[Path]:
    """List the videos that a command line names: files, folders, and lists with paths relative to the list's folder."""
    videos = []
    for name in names:
        if name.is_dir():
            videos += list_videos(str(name), "")
        elif name.suffix.lower() in (".txt", ".csv", ".json"):
            videos += list_videos(str(name.parent), name.name)
        else:
            videos.append(name)
    return videos


class Classes:
    """The names of a dataset's classes. A label means the class of this name or, if there is none, of this number.

    From a file: lines `name`, numbered from 0 (Kinetics), lines `number name` (UCF101's classInd.txt) or `name,number`,
    with or without a header, or a .json object {"name": "number"} (Something-Something V2's labels). Without one, from
    the labels of the training videos: names in alphabetical order, or numbers. known: a checkpoint's classes, whose
    order is kept if they are the same ones.
    """

    def __init__(self, root: str, file: str, entries: Iterable[Entry], known: list[str] | None = None) -> None:
        self.where = str((find_files(root, file) or [file])[0]) if file else "the training videos"
        numbered = _read_classes(Path(self.where)) if file else _number_labels(entries)
        if known and sorted(known) == sorted(name for _, name in numbered):
            numbered.sort(key=lambda item: known.index(item[1]))
        self.names = [name for _, name in numbered]
        self.by_label: dict[str | int, int] = {}
        named_by_numbers = any(name.isdecimal() for name in self.names)  # then a number is a name, not a place
        for index, (number, name) in enumerate(numbered):
            for label in [_plain(name)] if named_by_numbers else [_plain(name), number]:
                if self.by_label.setdefault(label, index) != index:
                    what = f"classes '{self.names[self.by_label[label]]}' and '{name}' cannot be told apart"
                    raise UserError(f"{self.where}: {what}; rename or renumber one of the two")

    def index(self, entry: Entry) -> int:
        """Return the class of an entry. Raises UserError with its file and line."""
        label = str(entry.label)
        if _plain(label) in self.by_label:
            return self.by_label[_plain(label)]
        if label.isdecimal() and int(label) in self.by_label:
            return self.by_label[int(label)]
        if isinstance(entry.label, int):
            what = f"label {label} is out of range"
        elif label:
            what = f"unknown class '{label}'"
        else:
            what = "no label"
        hint = f"there are {len(self.names)} classes in {self.where}: {', '.join(self.names[:3])}, ..."
        if not self.names:
            hint = "no training video has one: make a folder for each class, or a list of lines 'path label'"
        raise UserError(f"{entry.where}: {what} for {Path(entry.path).name}; {hint}")

    def label(self, entries: Iterable[Entry]) -> list[tuple[str, int]]:
        """Return each video's path and class."""
        return [(entry.path, self.index(entry)) for entry in entries]


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()  # folders are often named riding_a_bike for "riding a bike"


def _number_labels(entries: Iterable[Entry]) -> list[tuple[int, str]]:
    places = {entry.label: entry.where for entry in entries if entry.label != ""}
    names = sorted(label for label in places if isinstance(label, str))
    numbers = [label for label in places if isinstance(label, int)]
    if not numbers:
        return list(enumerate(names))
    if names:
        raise UserError(f"{places[names[0]]}: label '{names[0]}' among others that are numbers")
    if max(numbers) >= len(numbers):
        used = f"the training videos have {len(numbers)} different labels, and {max(numbers)} is one of them"
        raise UserError(f"{used}; labels count from 0, or data.classes names a file with all classes")
    return [(number, str(number)) for number in range(max(numbers) + 1)]


def _read_classes(file: Path) -> list[tuple[int, str]]:
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text("utf-8-sig"))
            return sorted((int(number), name) for name, number in content.items())
        lines = list(text_lines(file))
    except (OSError, ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"data.classes: no class names can be read from {file} ({error})") from None
    if not lines:
        raise UserError(f"data.classes: {file} names no class")
    for split in (_number_first, _number_last):
        rows = [split(line) for _, line in lines]
        numbered = [(int(number), name) for number, name in rows if number.isdecimal()]
        if 2 * len(numbered) >= len(rows):
            for (where, _), (number, _) in list(zip(lines, rows, strict=True))[1:]:  # the first may be a header
                if not number.isdecimal():
                    raise UserError(f"{where}: expected a number and a name, as in the other lines")
            return numbered
    names = [line.strip('"') for _, line in lines]
    return list(enumerate(names[1:] if names[0].lower() in HEADERS else names))


def _number_first(line: str) -> tuple[str, str]:
    """Split `number name` or `number,name`, each perhaps quoted."""
    number = line.replace(",", " ").partition(" ")[0].partition("\t")[0]
    return number.strip('"'), line.removeprefix(number).strip(' \t,"')


def _number_last(line: str) -> tuple[str, str]:
    """Split `name,number`, each perhaps quoted."""
    name, _, number = line.replace("\t", ",").rpartition(",")
    return number.strip(' "'), name.strip(' "')


# ---- training and validation videos ----


def labelled_videos(
    root: str, train: str, val: str, classes: str, per_class: int = 0, known: list[str] | None = None
) -> tuple[LabelledVideos, LabelledVideos, list[str]]:
    """Return the videos with their class for training and for validation, and the names of the classes.

    per_class: number of videos of each class to train on; 0 for all.
    known: a checkpoint's classes in the order of its outputs; with them and `val`, no training videos are needed.
    Without `val` every fifth training video of each class is kept for validation.
    Raises UserError for a video whose label is missing or unknown, and if none of the validation videos exists.
    """
    if known and val:
        entries, table = [], Classes(root, classes, [Entry("", name, "the checkpoint") for name in known], known)
    else:
        entries = list_entries(root, train)
        table = Classes(root, classes, entries, known)
    videos = sorted(table.label(entries), key=itemgetter(1))
    check_classes(table)
    if val:
        val_videos = table.label(list_entries(root, val))
    else:
        videos, val_videos = hold_out(videos)
        report_untested(val_videos, table.names)
    check_existence(val_videos, root)
    if per_class:
        videos = first_of_each_class(videos, per_class)
    return _as_videos(videos), _as_videos(val_videos), table.names


def _as_videos(pairs: list[tuple[str, int]]) -> Videos:
    return Videos((path for path, _ in pairs), (label for _, label in pairs))


def check_classes(table: Classes) -> None:
    """Raise UserError if there is only one class."""
    if len(table.names) == 1:
        what = f"there is only one class in {table.where}, '{table.names[0]}': a classifier needs two"
        raise UserError(f"{what}, in folders of their own or in a list with labels; look at data.root and data.train")


def hold_out(videos: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Split off every fifth video of each class."""
    kept, held_out = [], []
    for _, group in groupby(videos, itemgetter(1)):  # the videos are sorted by class
        for place, video in enumerate(group):
            if place % 5 == 4:
                held_out.append(video)
            else:
                kept.append(video)
    return kept, held_out


def report_untested(val_videos: list[tuple[str, int]], names: list[str]) -> None:
    """Print which classes have no validation videos."""
    tested = {label for _, label in val_videos}
    untested = [name for label, name in enumerate(names) if label not in tested]
    if untested and tested:
        examples = ", ".join(untested[:5]) + (", ..." if len(untested) > 5 else "")
        what = f"{len(untested)} of {len(names)} classes have fewer than five videos and are never tested: {examples}"
        say(f"{what}; data.val names validation videos")


def first_of_each_class(videos: list[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    return [video for _, group in groupby(videos, itemgetter(1)) for video in islice(group, count)]


def check_existence(val_videos: list[tuple[str, int]], root: str) -> None:
    """Raise UserError if there are no validation videos: now, not after days of training."""
    if not val_videos:
        what = f"no class in {root} has five videos, so none can be kept for validation"
        raise UserError(f"{what}: name validation videos by data.val")
    if not any(os.path.exists(path) for path, _ in val_videos):
        what = f"none of the {len(val_videos)} test videos is there, the first one being {val_videos[0][0]}"
        raise UserError(f"{what}: look at data.root and data.val")


def find_splits(root: str, train: str, val: str) -> tuple[str, str]:
    """Return data.train and data.val. If data.train is empty, the folders train/ and val/ below `root` are meant.

    Test videos are left out. Without such folders, an empty data.train means every video below `root`.
    """
    train_folder = _subfolder(root, "train", "training")
    val_folder = _subfolder(root, "val", "valid", "validation")
    test_folder = _subfolder(root, "test", "testing")
    if train or not train_folder or not (val_folder or test_folder):
        return train, val
    val = val or val_folder
    what = f"{root}: training on {train_folder}/"
    if val:
        what += f", validation on {val}"
    if test_folder and test_folder != val:
        what += f"; {test_folder}/ is left out"
    say(f"{what} (data.train and data.val name others)")
    return train_folder, val


def _subfolder(root: str, *names: str) -> str:
    """Return the first of the names that is a folder below `root`, or ""."""
    return next((name for name in names if Path(root, name).is_dir()), "")
