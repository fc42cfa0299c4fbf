"""List the videos of a dataset, as its own files name them."""

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.config import UserError, say

SUFFIXES = tuple(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
SYSTEM_NAMES = "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"
PREPARED = "prepared.json"  # marks a folder that tools/prepare.py filled


class Entry(NamedTuple):
    """One video of a dataset."""

    path: str
    label: str | int  # the name or the number of its class; "" if the dataset gives none
    where: str  # the file and line that name the video


class Videos(Sequence):
    """The paths of many videos, with or without their classes: `videos[index]` is a pair (Path, class) or a Path.

    They are in two arrays, which forked loader workers share. A list would soon be copied into each worker, since
    reading an object writes its reference count.
    """

    def __init__(self, paths: Iterable[str] = (), classes: Iterable[int] = ()) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths], dtype=bytes)
        self.classes = np.array(classes, dtype=int)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice) -> Path | tuple[Path, int] | list:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        path = Path(os.fsdecode(self.paths[index]))
        return (path, int(self.classes[index])) if len(self.classes) else path


def list_videos(root: str, selection: str) -> Videos:
    """List paths without labels, perhaps a million: pre-training needs no labels."""
    return Videos(entry.path for entry in list_entries(root, selection, labels=False))


def named_videos(names: list[Path]) -> list[Path]:
    """List the videos that a command line names: files, folders, and lists with paths relative to the list's folder.

    Windows' shells do not expand a pattern such as *.mp4, so it is expanded here, unless a file has this name.
    """
    paths = []
    for name in names:
        paths += find_files("", str(name)) or [name]
    videos = []
    for name in paths:
        if name.is_dir():
            videos += list_videos(str(name), "")
        elif name.suffix.lower() in (".txt", ".csv", ".json"):
            videos += list_videos(str(name.parent), name.name)
        else:
            videos.append(name)
    return videos


def find_splits(root: str, train: str, val: str) -> tuple[str, str]:
    """Return data.train and data.val. If data.train is empty, the folders train/ and val/ below `root` are meant.

    Test videos are left out. Without such folders, an empty data.train means every video below `root`.
    """
    splits = []
    for names in (("train", "training"), ("val", "valid", "validation"), ("test", "testing")):
        splits.append(next((name for name in names if Path(root, name).is_dir()), ""))
    train_folder, val_folder, test_folder = splits
    if train or not train_folder or not (val_folder or test_folder):
        return train, val
    val = val or val_folder
    say(f"{root}: training on data.train={train_folder}, validation on data.val={val}; the rest is left out")
    return train_folder, val


def list_entries(root: str, selection: str, labels: bool = True) -> Iterator[Entry]:
    """Yield the videos of `read_list`. Raises UserError if there are none, or one is named twice."""
    hashes = set()  # a million strings would need much more memory
    for entry in read_list(root, selection, labels):
        path = os.path.normpath(entry.path)
        if hash(path) in hashes:
            raise UserError(f"{entry.where}: {path} is named a second time; delete one of the two")
        hashes.add(hash(path))
        yield entry
    if not hashes:
        raise UserError(f"no videos found in {selection or root} (files ending in {' '.join(SUFFIXES)})")


# ---- the forms of lists ----


def read_list(root: str, selection: str, labels: bool = True) -> Iterator[Entry]:
    """Yield the videos that a configuration names.

    selection: empty for everything below `root`, or the name, below `root`, of
    - a folder: every video below it; its own folder's name is its label (Kinetics, UCF101 and HMDB51 unpacked);
    - a list file: lines `path [label]` or `path,label`, paths relative to `root` (UCF101's trainlist and testlist);
    - a .json list of objects with `id` and `template` or `label` (Something-Something V2);
    - a .csv file with the columns label, youtube_id, time_start, time_end (Kinetics);
    - files with lines `name flag`, one for each class, as `*_test_split1.txt=FLAG`: those with this flag (HMDB51).
    An `id` means the video of this name, whatever its suffix, anywhere below `root`.
    In a folder of tools/prepare.py, lists of the original videos mean those that were made of them.
    labels: False to ignore what follows the paths in a list.
    Raises UserError, with the line, for what cannot be read.
    """
    pattern, flag = split_flag(selection)
    files = find_files(root, pattern)
    if not files or (len(files) > 1 and not flag):
        raise UserError(f"there is no folder or list file {pattern or root}: look at data.root, train and val")
    for file in files:
        try:
            if flag:
                entries = _read_flagged(root, file, pattern, int(flag))
            elif file.is_dir():
                entries = _read_folder(file)
            elif file.suffix == ".json":
                entries = _read_json(root, file)
            elif "youtube_id" in _cells(next(text_lines(file), ("", ""))[1]):
                entries = _read_kinetics(root, file)
            else:
                entries = _read_lines(root, file, labels)
            if Path(root, PREPARED).exists():
                entries = _prepared_videos(root, entries)
            yield from entries
        except UserError:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{file} is not a list of videos as support/lists.py describes it ({reason})") from None


def _read_folder(folder: Path) -> Iterator[Entry]:
    for path in files_below(folder):
        parent = os.path.dirname(path)
        yield Entry(path, "" if parent == str(folder) else os.path.basename(parent), parent)


def _read_json(root: str, file: Path) -> Iterator[Entry]:
    paths = {Path(path).stem: path for path in files_below(root)}
    for item in json.loads(file.read_text("utf-8-sig")):
        name = str(item["id"])
        label = item.get("template") or item.get("label") or ""  # a template has its placeholders in brackets
        path = paths.get(name, os.path.join(root, name))
        yield Entry(path, label.replace("[", "").replace("]", ""), f"{file}: id {name}")


def _read_kinetics(root: str, file: Path) -> Iterator[Entry]:
    paths = {Path(path).stem: path for path in files_below(root)}
    (_, header), *lines = text_lines(file)
    for where, line in lines:
        row = dict(zip(_cells(header), _cells(line), strict=False))
        name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        yield Entry(paths.get(name, os.path.join(root, name)), row.get("label", ""), where)


def _read_flagged(root: str, file: Path, pattern: str, flag: int) -> Iterator[Entry]:
    """Read HMDB51's CLASS_test_split1.txt. What the pattern's * stands for is the class."""
    name = file.name.removesuffix(pattern.rpartition("*")[2])
    for entry in _read_lines(os.path.join(root, name), file):
        if not isinstance(entry.label, int):
            raise UserError(f"{entry.where}: expected 'name flag' for {entry.path}")
        if entry.label == flag:
            yield entry._replace(label=name)


def _read_lines(root: str, file: Path, labels: bool = True) -> Iterator[Entry]:
    for where, line in text_lines(file):
        path, label = _split_line(line)
        if "\\" in path and not os.path.isfile(os.path.join(root, path)):  # a list made on Windows
            path = path.replace("\\", "/")
        is_video = path.lower().endswith(SUFFIXES) or os.path.isfile(os.path.join(root, path))
        first, *more = label.replace(",", " ").replace(";", " ").split() or [""]
        if not is_video or (labels and more and _is_number(first)):  # such as 'path frames label', for frames
            raise UserError(f"{where}: '{line}' is not the path of a video, alone or with one label")
        if _is_number(label):
            label = int(label)
        elif not label:
            label = os.path.basename(os.path.dirname(path))
        yield Entry(os.path.join(root, path), label, where)


def text_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield file and number, and text, of each line of a text file that is not blank."""
    with open(file, encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, 1):
            if line := line.strip():
                yield f"{file}, line {number}", line


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True), [])]


def _split_line(line: str) -> tuple[str, str]:
    """Split a line into a path, perhaps quoted, and a label or "". A path ends with the first suffix of a video."""
    if line.startswith('"'):
        path, _, label = line[1:].partition('"')
        return path, label.strip(' \t,"')
    words = line.replace(",", " ").replace("\t", " ").split(" ")
    ends = [count for count, word in enumerate(words, 1) if word.lower().endswith(SUFFIXES)]
    if ends:
        words = words[: ends[0]]
    while not ends and len(words) > 1 and (not words[-1] or _is_number(words[-1])):  # a name without a suffix
        words.pop()
    end = len(" ".join(words))
    return line[:end], line[end:].strip(' \t,"')


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _prepared_videos(root: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    """Yield the videos that tools/prepare.py made of the original ones."""
    original = json.loads(Path(root, PREPARED).read_text("utf-8"))["root"]
    for entry in entries:
        path = Path(entry.path)
        if path.is_relative_to(original):  # an absolute path in a list
            path = Path(root, path.relative_to(original))
        yield entry._replace(path=str(path.with_suffix(".mp4")))


def split_flag(selection: str) -> tuple[str, str]:
    """Split PATTERN=FLAG, as HMDB51 needs it. The flag is "" without one."""
    pattern, equals, flag = selection.rpartition("=")
    return (pattern, flag) if equals and flag.isdecimal() else (selection, "")


def find_files(root: str, name: str) -> list[Path]:
    """Find a file or a pattern's files: below `root`, from the current folder, or as tools/prepare.py copied them."""
    places = [(root, name), ("", name)] if name else [(root, "")]
    if Path(root, PREPARED).exists():
        places.append((root, Path(name).name))
    for folder, pattern in places:
        exists = Path(folder, pattern).exists()
        if matches := [pattern] if exists else glob.glob(pattern, root_dir=folder or None, recursive=True):
            return [Path(folder, match) for match in sorted(matches)]
    return []


def files_below(folder: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[str]:
    """Yield the files below a folder in sorted order. Follow links, except to a parent folder; skip hidden names."""
    for item in sorted(os.scandir(folder), key=lambda item: item.name):
        if item.name.startswith(".") or item.name in SYSTEM_NAMES:
            continue
        is_link = item.is_symlink()
        is_folder = os.path.isdir(item) if is_link else item.is_dir()  # a link may be broken
        if is_folder and not (is_link and any(map(Path(item).samefile, Path(item).absolute().parents))):
            yield from files_below(item.path, suffixes)
        elif not is_folder and item.name.lower().endswith(suffixes):
            yield item.path
