"""Which videos a dataset has, and their labels, as each dataset's own files say it.

python -m support.datasets configs/finetune/ucf101_base.yaml data.root=/data/ucf101    # before days of training
"""

import argparse
import csv
import json
import multiprocessing
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from support.config import UserError, load_config, parse
from support.run import launch
from support.video import BrokenVideo, Video

CONFIG = Path(__file__).parents[1] / "configs" / "finetune" / "toy.yaml"
SUFFIXES = tuple(
    ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)

LabelledVideos = list[tuple[Path, int]]  # each with the number of its class


class Entry(NamedTuple):
    """One video of a dataset."""

    path: Path
    label: str  # a number or a class's name, as the dataset writes it; "" if it does not say
    where: str  # the file and line that name the video


def list_entries(root: str, selection: str) -> list[Entry]:
    """The videos that a configuration names.

    selection: empty for everything below `root`, or the name, below `root`, of
    - a folder: every video below it; its own folder's name is its label (Kinetics, UCF101 and HMDB51 unpacked);
    - a list file: lines `path [label]` or `path,label`, paths relative to `root` (UCF101's trainlist and testlist);
    - a .json list of objects with `id` and `template` or `label` (Something-Something V2);
    - a .csv file with the columns label, youtube_id, time_start, time_end (Kinetics);
    - files with lines `name flag`, one for each class, as `*_test_split1.txt=FLAG`: those with this flag (HMDB51).
    An `id` means the video of this name, whatever its suffix, anywhere below `root`.
    Raises UserError, with the line, for what cannot be read, is named twice or is not there at all.
    """
    pattern, flag = re.fullmatch(r"(.*?)(?:=(\d+))?", selection).groups()
    where = Path(root, pattern) if not pattern or Path(root, pattern).exists() else Path(pattern)
    if flag:
        entries = _read_flagged(root, pattern, flag)
    elif where.is_dir():
        videos = sorted(path for path in where.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        entries = [Entry(path, path.parent.name if path.parent != where else "", str(path.parent)) for path in videos]
    elif where.is_file():
        entries = _read_list(root, where)
    else:
        raise UserError(f"there is no folder or list file {where}: set data.root, and data.train or data.val below it")
    if not entries:
        raise UserError(f"no videos found in {where} (files ending in {' '.join(SUFFIXES)})")
    seen: dict[Path, str] = {}
    for path, _, line in entries:
        if path in seen:
            raise UserError(f"{line}: {path} is named a second time, after {seen[path]}; delete one of the two")
        seen[path] = line
    return entries


def list_videos(root: str, selection: str) -> list[Path]:
    """The paths alone of `list_entries`: pre-training needs no labels."""
    return [entry.path for entry in list_entries(root, selection)]


def _read_list(root: str, file: Path) -> list[Entry]:
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix == ".json":
            items = [(str(item["id"]), item.get("template") or item.get("label") or "") for item in json.loads(text)]
            labels = [re.sub(r"[\[\]]", "", label) for _, label in items]
            named = [(id, label, f"{file}: id {id}") for (id, _), label in zip(items, labels, strict=True)]
            return _find_by_name(root, named)
        rows = csv.DictReader(text.lstrip().splitlines())
        if {"youtube_id", "time_start", "time_end"} <= set(rows.fieldnames or ()):
            named = []
            for row in rows:
                name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
                named.append((name, row.get("label") or "", f"{file}: youtube_id {row['youtube_id']}"))
            return _find_by_name(root, named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{file} is not a list of videos in a form that support/datasets.py describes ({what})"
        ) from None
    entries = []
    for where, line in _lines(file):
        path, label = _split(line)
        if label.startswith("-"):
            raise UserError(f"{where}: label {label} for {path}; labels count from 0")
        entries.append(Entry(Path(root, path), label or Path(path).parent.name, where))
    return entries


def _read_flagged(root: str, pattern: str, flag: str) -> list[Entry]:
    """HMDB51: CLASS_test_split1.txt with lines `name flag`; the class is what stands before the pattern's text."""
    entries = []
    for file in sorted(Path(root).glob(pattern)):
        label = file.name.removesuffix(pattern.rpartition("*")[2])
        for where, line in _lines(file):
            name, its_flag = _split(line)
            if not its_flag.isdecimal():
                raise UserError(f"{where}: expected 'name flag', not '{line}'")
            if its_flag == flag:
                entries.append(Entry(Path(root, label, name), label, where))
    return entries


def _find_by_name(root: str, named: list[tuple[str, str, str]]) -> list[Entry]:
    """Entries for (name, label, where): found once for all below `root`; a missing one stays, as a broken video."""
    paths = {path.stem: path for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in SUFFIXES}
    return [Entry(paths.get(name, Path(root, name)), label, where) for name, label, where in named]


def _lines(file: Path) -> list[tuple[str, str]]:
    """A text file's lines that are not blank, each with its file and number."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a text file in UTF-8 ({error})") from None
    return [(f"{file}, line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _split(line: str) -> tuple[str, str]:
    """Path and label, or "", of a list's line. A name may hold blanks: what follows its suffix is the label."""
    suffix = "|".join(map(re.escape, SUFFIXES))
    match = re.fullmatch(rf"(.*?(?:{suffix}))(?:[\s,]+(.+))?", line, re.IGNORECASE)
    path, label = (match or re.fullmatch(r"(.*?)(?:[\s,]+(\d+))?", line)).groups()
    return path, label or ""


class Classes:
    """The names of a dataset's classes, and which class a label means.

    From a file: lines `name`, numbered from 0 (Kinetics), lines `number name` (UCF101's classInd.txt) or a .json object
    {"name": "number"} (Something-Something V2's labels). Without one, from the labels of the training videos.
    """

    def __init__(self, root: str, file: str, entries: list[Entry]) -> None:
        if file:
            self.where = Path(root, file) if Path(root, file).exists() else Path(file)
            numbered = self._read(self.where)
        else:
            self.where = "the training videos"
            labels = {entry.label for entry in entries if entry.label}
            numbered = list(enumerate(sorted(labels)))
            if all(label.isdecimal() for label in labels):
                numbered = [(number, str(number)) for number in sorted({int(label) for label in labels})]
                if numbered and numbered[-1][0] >= len(numbered):
                    used = f"have {len(numbered)} different labels, and {numbered[-1][0]} is one of them"
                    what = "labels count from 0, or data.classes names a file with all classes"
                    raise UserError(f"the training videos {used}; {what}")
        self.names = [name for _, name in numbered]
        self.by_label = {str(number): index for index, (number, _) in enumerate(numbered)}
        self.by_label |= {self._plain(name): index for index, name in enumerate(self.names)}

    @staticmethod
    def _read(file: Path) -> list[tuple[int, str]]:
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_text("utf-8-sig"))
                return sorted((int(number), name) for name, number in content.items())
            lines = [line for _, line in _lines(file)]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"data.classes: no class names can be read from {file} ({error})") from None
        if not lines:
            raise UserError(f"data.classes: {file} names no class")
        matches = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
        return [(int(match[1]), match[2]) for match in matches] if all(matches) else list(enumerate(lines))

    @staticmethod
    def _plain(name: str) -> str:
        return name.replace("_", " ").lower()  # folders are often named riding_a_bike for "riding a bike"

    def index(self, entry: Entry) -> int:
        """The class of an entry. Raises UserError with its file and line."""
        is_number = entry.label.isdecimal()
        index = self.by_label.get(str(int(entry.label)) if is_number else self._plain(entry.label))
        if index is None:
            what = f"unknown class '{entry.label}'" if entry.label else "no label"
            what = f"label {entry.label} is out of range" if is_number else what
            classes = f"{self.where} has {len(self.names)} classes, {', '.join(self.names[:3])}, ..."
            raise UserError(f"{entry.where}: {what} for {entry.path.name}; {classes}")
        return index


def labelled_videos(
    root: str, train: str, val: str, classes: str, per_class: int = 0, known: list[str] | None = None
) -> tuple[LabelledVideos, LabelledVideos, list[str]]:
    """Videos with their class for training and for testing, and the names of the classes.

    per_class: train on so many videos of each class; 0 for all.
    known: a checkpoint's classes in the order of its outputs; with them and `val`, no training videos are needed.
    Without `val` every fifth training video of each class is kept for testing.
    Raises UserError for a video whose label is missing or unknown, and if none of the test videos exists.
    """
    videos: LabelledVideos = []
    if known and val:
        table = Classes(root, classes, [Entry(Path(), name, "") for name in known])
        names = known if sorted(known) == sorted(table.names) else table.names
        val_videos = [(entry.path, names.index(table.names[table.index(entry)])) for entry in list_entries(root, val)]
    else:
        entries = list_entries(root, train)
        table = Classes(root, classes, entries)
        names = table.names
        by_class: list[LabelledVideos] = [[] for _ in names]
        for entry in entries:
            by_class[table.index(entry)].append((entry.path, table.index(entry)))
        if val:
            val_videos = [(entry.path, table.index(entry)) for entry in list_entries(root, val)]
        else:
            val_videos = [video for group in by_class for video in group[4::5]]
            by_class = [[video for place, video in enumerate(group) if place % 5 != 4] for group in by_class]
            if not val_videos:
                what = f"no class in {root} has five videos, so none can be kept for testing"
                raise UserError(f"{what}: name test videos by data.val")
        videos = [video for group in by_class for video in group[: per_class or None]]
    if not any(path.exists() for path, _ in val_videos):  # known now, not after days of training
        what = f"none of the {len(val_videos)} test videos is there, the first one being {val_videos[0][0]}"
        raise UserError(f"{what}: look at data.root and data.val")
    return videos, val_videos, names


# ---- a dataset looked over before days of training ----


def check(root: str, train: str, val: str, classes: str, processes: int) -> bool:
    """Print the number of videos of each class, for training and for testing, and what is wrong; return if all is well.

    Wrong are labels, files that cannot be read (the first, the middle and the last frame are decoded), and test videos
    that are among those for training.
    """
    table, well, seen = None, True, set()
    for what, selection in (("training", train), ("testing", val)) if val else (("training", train),):
        entries = list_entries(root, selection)
        table = table or Classes(root, classes, entries)
        count, wrong = Counter(), []
        for entry in entries:
            try:
                count[table.index(entry)] += 1
            except UserError as error:
                wrong.append(str(error))
        paths = [entry.path for entry in entries]
        reasons = in_processes(processes, _unreadable, paths)
        broken = [reason for reason in tqdm(reasons, f"reading {what} videos", len(paths), unit="video") if reason]
        print(f"{len(paths):,} videos for {what} in {selection or root}, {len(table.names)} classes, ", end="")
        print(f"{len(wrong)} wrong labels, {len(broken)} unreadable")
        for index, name in enumerate(table.names):
            print(f"{count[index]:8,}  {name}")
        for report in (*wrong, *broken):
            print(f"  {report}")
        if both := seen.intersection(paths):
            print(f"  {len(both):,} videos are for training as well, {min(both)} for one")
        seen = set(paths)
        well = well and not (wrong or broken or both)
    return well


def _unreadable(path: Path) -> str:
    try:
        with Video(path) as video:
            video.frames([0, len(video) // 2, len(video) - 1])
    except BrokenVideo as error:
        return str(error)
    return ""


def in_processes(processes: int, function: Callable, *arguments: list) -> Iterator[Any]:
    """Like map, computed by some processes, or by this one if `processes` is 1."""
    if processes == 1:
        yield from map(function, *arguments)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_process) as pool:
        try:
            yield from pool.map(function, *arguments)
        except BrokenProcessPool:
            what = "a process was killed, perhaps for lack of memory"
            raise UserError(f"{what}: give the same command again, with fewer processes") from None


def _begin_process() -> None:
    torch.set_num_threads(1)  # videos are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it without a traceback


def read_settings(settings: list[str]) -> SimpleNamespace:
    """The group `data` of the configuration that a command line asks for."""
    config = load_config(CONFIG, settings).data
    if not config.root:
        raise UserError("which dataset? Name a configuration file or give data.root, data.train and data.val")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = read_settings(parse(parser).settings)
    if not check(config.root, config.train, config.val, config.classes, max(1, config.workers)):
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
