"""Which videos there are, and their labels, as each dataset's own files say it.

    python -m support.datasets configs/finetune/ucf101_base.yaml data.root=/data/ucf101    # before days of training
"""

import argparse
import csv
import json
import multiprocessing
import re
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.config import UserError, load_config, parse
from support.run import launch
from support.video import (
    BrokenVideo,
    Video,
)

SUFFIXES = frozenset(".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split())

LabelledVideos = list[tuple[Path, int]]  # each with the number of its class


# ---- which videos there are, and their labels, as each dataset's own files say it ----


CONFIG = Path(__file__).parents[1] / "configs" / "finetune" / "toy.yaml"


class Entry(NamedTuple):
    """One video of a dataset. label: as the dataset writes it, a number or a class's name; "" if it does not."""

    path: Path
    label: str
    where: str  # the file, and the line in it, that names the video


def list_entries(root: str, selection: str) -> list[Entry]:
    """The videos that a configuration names.

    selection: empty for everything below `root`, or the name, below `root`, of
    - a folder: every video below it; its own folder's name is its label (Kinetics, UCF101 and HMDB51 unpacked);
    - a list file: lines `path [label]` or `path,label`, paths relative to `root` (UCF101's trainlist and testlist);
    - a .json list of objects with `id` and `template` or `label` (Something-Something V2);
    - a .csv file with the columns label, youtube_id, time_start, time_end (Kinetics);
    - files with lines `name flag`, one for each class, as `*_test_split1.txt=FLAG`: those with this flag (HMDB51).
    An `id` stands for the video of this name, whatever its suffix, anywhere below `root`.
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
        raise UserError(f"no videos found in {where} (files ending in {' '.join(sorted(SUFFIXES))})")
    seen: dict[Path, str] = {}
    for entry in entries:
        if entry.path in seen:
            raise UserError(f"{entry.where}: {entry.path} is named a second time, after {seen[entry.path]}; delete one of the two")
        seen[entry.path] = entry.where
    return entries


def list_videos(root: str, selection: str) -> list[Path]:
    """The paths alone of `list_entries`: pre-training needs no labels."""
    return [entry.path for entry in list_entries(root, selection)]


def _read_list(root: str, file: Path) -> list[Entry]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            named = []
            for item in json.loads(text):
                label = item.get("template") or item.get("label") or ""
                named.append((str(item["id"]), re.sub(r"[\[\]]", "", label), f"{file}: id {item['id']}"))
            return _find_by_name(root, named)
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if {"youtube_id", "time_start", "time_end"} <= set(lines[0][1].split(",") if lines else []):
            named = []
            for row in csv.DictReader(text.splitlines()):
                name = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
                named.append((name, row.get("label") or "", f"{file}: youtube_id {row['youtube_id']}"))
            return _find_by_name(root, named)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is not a list of videos in a form that support/datasets.py describes ({what})") from None
    entries = []
    video = "|".join(map(re.escape, SUFFIXES))
    for number, line in lines:
        # a name may hold blanks: what follows the suffix is the label
        match = re.fullmatch(rf"(.*?(?:{video}))(?:[\s,]+(.+))?", line, re.IGNORECASE) or re.fullmatch(r"(.*?)(?:[\s,]+(\d+))?", line)
        path, label = match.groups()
        if label and label.startswith("-"):
            raise UserError(f"{file}, line {number}: label {label} for {path}; labels count from 0")
        entries.append(Entry(Path(root, path), label or Path(path).parent.name, f"{file}, line {number}"))
    return entries


def _read_flagged(root: str, pattern: str, flag: str) -> list[Entry]:
    """HMDB51: CLASS_test_split1.txt with lines `name flag`; the class is what stands before the pattern's text."""
    entries = []
    for file in sorted(Path(root).glob(pattern)):
        label = file.name.removesuffix(pattern.rpartition("*")[2])
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not a text file with lines 'name flag' ({error})") from None
        for number, line in enumerate(lines, 1):
            name, _, its_flag = line.strip().rpartition(" ")
            if line.strip() and not (name and its_flag.isdigit()):
                raise UserError(f"{file}, line {number}: expected 'name flag', not '{line.strip()}'")
            if its_flag == flag:
                entries.append(Entry(Path(root, label, name.strip()), label, f"{file}, line {number}"))
    return entries


def _find_by_name(root: str, named: list[tuple[str, str, str]]) -> list[Entry]:
    """Entries for videos known by name: found once for all below `root`; one that is not there stays a broken video."""
    paths = {path.stem: path for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in SUFFIXES}
    return [Entry(paths.get(name, Path(root, name)), label, where) for name, label, where in named]


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
            if all(label.isdigit() for label in labels):
                numbered = [(number, str(number)) for number in sorted({int(label) for label in labels})]
                if numbered and numbered[-1][0] >= len(numbered):
                    used = f"{len(numbered)} different labels, and {numbered[-1][0]} is one of them"
                    raise UserError(f"the training videos have {used}; labels count from 0, or data.classes names a file with all classes")
            else:
                numbered = list(enumerate(sorted(labels)))
        self.names = [name for _, name in numbered]
        self.by_label = {str(number): index for index, (number, _) in enumerate(numbered)}
        self.by_label |= {self._plain(name): index for index, name in enumerate(self.names)}

    @staticmethod
    def _read(file: Path) -> list[tuple[int, str]]:
        try:
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix == ".json":
                return sorted((int(number), name) for name, number in json.loads(text).items())
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"data.classes: no class names can be read from {file} ({error})") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError(f"data.classes: {file} names no class")
        matches = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
        return [(int(match[1]), match[2]) for match in matches] if all(matches) else list(enumerate(lines))

    @staticmethod
    def _plain(name: str) -> str:
        return name.replace("_", " ").lower()  # folders are often named riding_a_bike for "riding a bike"

    def index(self, entry: Entry) -> int:
        """The class of an entry. Raises UserError with its file and line."""
        index = self.by_label.get(str(int(entry.label)) if entry.label.isdigit() else self._plain(entry.label))
        if index is None:
            if entry.label.isdigit():
                what = f"label {entry.label} is out of range"
            else:
                what = f"unknown class '{entry.label}'" if entry.label else "no label"
            classes = f"{self.where} has {len(self.names)} classes, {', '.join(self.names[:3])}, ..."
            raise UserError(f"{entry.where}: {what} for {entry.path.name}; {classes}")
        return index


def labelled(
    root: str, train: str, val: str, classes: str, per_class: int = 0
) -> tuple[LabelledVideos, LabelledVideos, list[str]]:
    """Videos with their class for training and for testing, and the names of the classes.

    per_class: train on so many videos of each class; 0 for all.
    Without `val` every fifth training video of each class is kept for testing.
    Raises UserError for a video without a label or with one that is out of range.
    """
    entries = list_entries(root, train)
    table = Classes(root, classes, entries)
    by_class: list[LabelledVideos] = [[] for _ in table.names]
    for entry in entries:
        index = table.index(entry)
        by_class[index].append((entry.path, index))
    if val:
        held_out = [(entry.path, table.index(entry)) for entry in list_entries(root, val)]
    else:
        held_out = [video for of_class in by_class for video in of_class[4::5]]
        by_class = [[video for place, video in enumerate(of_class) if place % 5 != 4] for of_class in by_class]
        if not held_out:
            raise UserError(f"no class in {root} has five videos, so none can be kept for testing: name test videos by data.val")
    videos = [video for of_class in by_class for video in (of_class[:per_class] if per_class else of_class)]
    return videos, held_out, table.names


# ---- a dataset looked over before days of training ----


def check(root: str, train: str, val: str, classes: str, processes: int) -> bool:
    """Print how many videos there are of each class, for training and for testing, and what is wrong; return whether all is well.

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
        pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
        with pool or nullcontext():
            paths = [entry.path for entry in entries]
            reasons = pool.imap(_unreadable, paths, chunksize=16) if pool else map(_unreadable, paths)
            broken = [reason for reason in tqdm(reasons, f"reading {what} videos", len(entries), unit="video") if reason]
        print(
            f"{len(entries):,} videos for {what} in {selection or root}, {len(table.names)} classes, "
            f"{len(wrong)} wrong labels, {len(broken)} unreadable"
        )
        for index, name in enumerate(table.names):
            print(f"{count[index]:8,}  {name}")
        for report in (*wrong, *broken):
            print(f"  {report}")
        both = {entry.path for entry in entries} & seen
        if both:
            print(f"  {len(both):,} videos are for training as well, {min(both)} for one")
        seen = {entry.path for entry in entries}
        well = well and not (wrong or broken or both)
    return well


def _unreadable(path: Path) -> str:
    try:
        with Video(path) as video:
            video.frames([0, len(video) // 2, len(video) - 1])
    except BrokenVideo as error:
        return str(error)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = load_config(CONFIG, parse(parser).settings).data
    if not config.root:
        raise UserError("which dataset? Name a configuration file or give data.root, data.train and data.val")
    if not check(config.root, config.train, config.val, config.classes, max(1, config.workers)):
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
