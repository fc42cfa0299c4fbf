"""Which videos a dataset has, and their labels, as each dataset's own files say it."""

import csv
import glob
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from support.config import UserError, load_config

SUFFIXES = ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
VIDEO = re.compile(rf"(.*?(?:{'|'.join(map(re.escape, SUFFIXES))}))((?:[\s,].*)?)", re.IGNORECASE)  # in a list
QUOTED, OTHER = re.compile(r'"([^"]+)"(.*)'), re.compile(r"(.*?)((?:[\s,]+-?\d+)*)")
HIDDEN = re.compile(r"\..*|@eaDir|#recycle|\$RECYCLE\.BIN|System Volume Information|__MACOSX|lost\+found")

LabelledVideos = list[tuple[Path, int]]  # each with the number of its class


class Entry(NamedTuple):
    """One video of a dataset."""

    path: Path
    label: str | int  # a class's name, or a number that a list gives; "" if the dataset does not say
    where: str  # the file and line that name the video


def list_entries(root: str, selection: str, labels: bool = True) -> list[Entry]:
    """The videos that a configuration names.

    selection: empty for everything below `root`, or the name, below `root`, of
    - a folder: every video below it; its own folder's name is its label (Kinetics, UCF101 and HMDB51 unpacked);
    - a list file: lines `path [label]` or `path,label`, paths relative to `root` (UCF101's trainlist and testlist);
    - a .json list of objects with `id` and `template` or `label` (Something-Something V2);
    - a .csv file with the columns label, youtube_id, time_start, time_end (Kinetics);
    - files with lines `name flag`, one for each class, as `*_test_split1.txt=FLAG`: those with this flag (HMDB51).
    An `id` means the video of this name, whatever its suffix, anywhere below `root`.
    labels: False to ignore what follows the paths in a list.
    Raises UserError, with the line, for what cannot be read, is named twice or is not there at all.
    """
    pattern, flag = re.fullmatch(r"(.*?)(?:=(\d+))?", selection).groups()
    files = find_files(root, pattern)
    where = files[0] if len(files) == 1 else Path(pattern or root)
    if not files or len(files) > 1 and not flag:
        what = f"no file matches {where} below {root}" if flag else f"there is no folder or list file {where}"
        raise UserError(f"{what}: set data.root, and data.train or data.val below it")
    try:
        if flag:
            entries = [entry for file in files for entry in _read_flagged(root, file, pattern, flag)]
        elif where.is_dir():
            videos = [(path, path.parent) for path in files_below(where)]
            entries = [Entry(path, "" if folder == where else folder.name, str(folder)) for path, folder in videos]
        else:
            entries = _read_list(root, where, labels)
        if Path(root, "prepared.json").exists():
            entries = _as_prepared(root, entries)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        what = f"{where} is not a list of videos in a form that support/datasets.py describes"
        raise UserError(f"{what} ({type(error).__name__}: {error})") from None
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
    return [entry.path for entry in list_entries(root, selection, labels=False)]


def named_videos(names: list[Path]) -> list[Path]:
    """The videos that a command line names: files, folders, or lists, whose paths are relative to the list's folder."""
    videos = []
    for name in names:
        root, selection = (name, "") if name.is_dir() else (name.parent, name.name)
        is_list = name.is_dir() or name.suffix.lower() in (".txt", ".csv", ".json")
        videos += list_videos(str(root), selection) if is_list else [name]
    return videos


def find_files(root: str, name: str) -> list[Path]:
    """The files that a path or pattern means: below `root`, from the current folder, or as prepare copied them."""
    places = [(root, name), ("", name)] if name else [(root, "")]
    if Path(root, "prepared.json").exists():
        places.append((root, Path(name).name))
    for folder, pattern in places:
        exists = Path(folder, pattern).exists()
        if found := [pattern] if exists else glob.glob(pattern, root_dir=folder or None, recursive=True):
            return [Path(folder, match) for match in sorted(found)]
    return []


def files_below(folder: Path, suffixes: list[str] = SUFFIXES) -> list[Path]:
    """The videos, or other files, below `folder`, sorted. Hidden ones are skipped. Links are followed but for loops."""

    def leads_back(path: Path) -> bool:
        return path.is_symlink() and any(path.samefile(parent) for parent in path.absolute().parents)

    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not HIDDEN.fullmatch(name) and not leads_back(Path(place, name))]
        files += [Path(place, name) for name in names if not HIDDEN.fullmatch(name)]
    return sorted(path for path in files if path.suffix.lower() in suffixes)


def _read_list(root: str, file: Path, labels: bool) -> list[Entry]:
    named = []  # in the list, in the file system, and the label
    if file.suffix == ".json":
        for item in json.loads(file.read_text("utf-8-sig")):
            label = re.sub(r"[\[\]]", "", item.get("template") or item.get("label") or "")
            named.append((f"id {item['id']}", str(item["id"]), label))
    else:
        lines = _lines(file)
        table = csv.DictReader(lines.values(), skipinitialspace=True)
        table.fieldnames = [name.strip() for name in table.fieldnames or ()]
        if not {"youtube_id", "time_start", "time_end"} <= set(table.fieldnames):
            return [_read_line(root, where, line, labels) for where, line in lines.items()]
        for row in table:
            stem = f"{row['youtube_id'].strip()}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
            named.append((f"youtube_id {row['youtube_id']}", stem, (row.get("label") or "").strip()))
    paths = {path.stem: path for path in files_below(Path(root))}
    return [Entry(paths.get(stem, Path(root, stem)), label, f"{file}: {what}") for what, stem, label in named]


def _read_line(root: str, where: str, line: str, labels: bool) -> Entry:
    path, label = _split(line)
    if Path(path).suffix.lower() not in SUFFIXES and not os.path.isfile(Path(root, path)):
        raise UserError(f"{where}: '{line}' does not start with the path of a video")
    if labels and re.match(r"-?\d+[\s,;]", label):
        what = f"{where}: '{label}' is more than a label"
        raise UserError(f"{what}; lines are 'path label', not 'path frames label' as for folders of frames")
    is_number = re.fullmatch(r"-?\d+", label)
    return Entry(Path(root, path), int(label) if is_number else label or Path(path).parent.name, where)


def _read_flagged(root: str, file: Path, pattern: str, flag: str) -> list[Entry]:
    """HMDB51: CLASS_test_split1.txt with lines `name flag`; the class is what stands before the pattern's text."""
    label, entries = file.name.removesuffix(pattern.rpartition("*")[2]), []
    for where, line in _lines(file).items():
        name, its_flag = _split(line)
        if not its_flag.isdecimal():
            raise UserError(f"{where}: expected 'name flag', not '{line}'")
        if its_flag == flag:
            entries.append(Entry(Path(root, label, name), label, where))
    return entries


def _lines(file: Path) -> dict[str, str]:
    """A text file's lines that are not blank, by file and number."""
    lines = file.read_text("utf-8-sig").splitlines()
    return {f"{file}, line {number}": line.strip() for number, line in enumerate(lines, 1) if line.strip()}


def _split(line: str) -> tuple[str, str]:
    """Path and label, or "", of a list's line. A name may hold blanks: what follows its suffix is the label."""
    path, label = (QUOTED.fullmatch(line) or VIDEO.fullmatch(line) or OTHER.fullmatch(line)).groups()
    return path, label.strip(' \t,"')


def _as_prepared(root: str, entries: list[Entry]) -> list[Entry]:
    """In a folder that prepare filled: the .mp4 files there in place of the originals, which lists may name."""
    original = json.loads(Path(root, "prepared.json").read_text("utf-8"))["root"]
    paths = [path for path, _, _ in entries]
    paths = [Path(root, path.relative_to(original)) if path.is_relative_to(original) else path for path in paths]
    paths = [path.with_suffix(".mp4") if path.suffix.lower() in SUFFIXES else path for path in paths]
    return [entry._replace(path=path) for entry, path in zip(entries, paths, strict=True)]


class Classes:
    """The names of a dataset's classes, and which class a label means: the one of this name, or else of this number.

    From a file: lines `name`, numbered from 0 (Kinetics), lines `number name` (UCF101's classInd.txt) or `name,number`,
    with or without a header, or a .json object {"name": "number"} (Something-Something V2's labels). Without one, from
    the labels of the training videos: names in alphabetical order, or numbers. known: a checkpoint's classes, whose
    order is kept if they are the same ones.
    """

    def __init__(self, root: str, file: str, entries: list[Entry], known: list[str] | None = None) -> None:
        self.where = (find_files(root, file) or [Path(file)])[0] if file else "the training videos"
        numbered = _read_classes(self.where) if file else _number_labels(entries)
        if known and sorted(known) == sorted(name for _, name in numbered):
            numbered.sort(key=lambda item: known.index(item[1]))
        self.names = [name for _, name in numbered]
        self.by_label: dict[str | int, int] = {}
        named_by_numbers = any(name.isdecimal() for name in self.names)  # then a number is a name, not a place
        for index, (number, name) in enumerate(numbered):
            for key in [_plain(name)] if named_by_numbers else [_plain(name), number]:
                if self.by_label.setdefault(key, index) != index:
                    what = f"classes '{self.names[self.by_label[key]]}' and '{name}' cannot be told apart"
                    raise UserError(f"{self.where}: {what}; rename or renumber one of the two")

    def index(self, entry: Entry) -> int:
        """The class of an entry. Raises UserError with its file and line."""
        label, video = entry.label, entry.path.name
        for key in (_plain(str(label)), int(label) if str(label).isdecimal() else None):
            if key in self.by_label:
                return self.by_label[key]
        if isinstance(label, str):
            what = f"unknown class '{label}' for {video}" if label else f"no label for {video}"
        elif label < 0:
            what = f"label {label} for {video}; labels count from 0"
        else:
            what = f"label {label} is out of range for {video}"
        classes = f"{self.where} has {len(self.names)} classes, {', '.join(self.names[:3])}, ..."
        raise UserError(f"{entry.where}: {what}; {classes}")


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()  # folders are often named riding_a_bike for "riding a bike"


def _number_labels(entries: list[Entry]) -> list[tuple[int, str]]:
    numbers = sorted({entry.label for entry in entries if isinstance(entry.label, int) and entry.label >= 0})
    names = {entry.label: entry.where for entry in entries if isinstance(entry.label, str) and entry.label}
    if numbers and names:
        name, where = next(iter(names.items()))
        raise UserError(f"{where}: label '{name}' among others that are numbers")
    if numbers and numbers[-1] >= len(numbers):
        used = f"the training videos have {len(numbers)} different labels, and {numbers[-1]} is one of them"
        raise UserError(f"{used}; labels count from 0, or data.classes names a file with all classes")
    return [(number, str(number)) for number in numbers] or list(enumerate(sorted(names)))


def _read_classes(file: Path) -> list[tuple[int, str]]:
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_text("utf-8-sig"))
            return sorted((int(number), name) for name, number in content.items())
        lines = _lines(file)
    except (OSError, ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(f"data.classes: no class names can be read from {file} ({error})") from None
    if not lines:
        raise UserError(f"data.classes: {file} names no class")
    for form in (r'"?(?P<number>\d+)"?[\s,]+(?P<name>.+)', r'(?P<name>.+?)\s*[,\t]\s*"?(?P<number>\d+)"?'):
        matches = {where: re.fullmatch(form, line) for where, line in lines.items()}
        found = [match for match in matches.values() if match]
        if 2 * len(found) >= len(lines):
            if others := [where for where in [*lines][1:] if not matches[where]]:  # the first line may be a header
                raise UserError(f"{others[0]}: expected a number and a name, as in the other lines")
            return [(int(match["number"]), match["name"].strip('"')) for match in found]
    names = [line.strip('"') for line in lines.values()]
    is_header = re.fullmatch("names?|labels?|class|classes|class_name|category", names[0].lower())
    return list(enumerate(names[1:] if is_header else names))


def labelled_videos(
    root: str, train: str, val: str, classes: str, per_class: int = 0, known: list[str] | None = None
) -> tuple[LabelledVideos, LabelledVideos, list[str]]:
    """Videos with their class for training and for testing, and the names of the classes.

    per_class: number of videos of each class to train on; 0 for all.
    known: a checkpoint's classes in the order of its outputs; with them and `val`, no training videos are needed.
    Without `val` every fifth training video of each class is kept for testing.
    Raises UserError for a video whose label is missing or unknown, and if none of the test videos exists.
    """
    if known and val:
        entries, table = [], Classes(root, classes, [Entry(Path(), name, "the checkpoint") for name in known], known)
    else:
        entries = list_entries(root, train)
        table = Classes(root, classes, entries, known)
    by_class: list[list[Path]] = [[] for _ in table.names]
    for entry in entries:
        by_class[table.index(entry)].append(entry.path)
    videos, held_out = [], []
    for label, paths in enumerate(by_class):
        kept = [path for place, path in enumerate(paths) if val or place % 5 != 4]
        videos += [(path, label) for path in kept[: per_class or None]]
        held_out += [(path, label) for path in paths[4::5]]
    val_videos = [(entry.path, table.index(entry)) for entry in list_entries(root, val)] if val else held_out
    if not val_videos:
        what = f"no class in {root} has five videos, so none can be kept for testing"
        raise UserError(f"{what}: name test videos by data.val")
    if not any(path.exists() for path, _ in val_videos):  # known now, not after days of training
        what = f"none of the {len(val_videos)} test videos is there, the first one being {val_videos[0][0]}"
        raise UserError(f"{what}: look at data.root and data.val")
    return videos, val_videos, table.names


def read_settings(settings: list[str]) -> SimpleNamespace:
    """The group `data` of the configuration, of any stage but detection, that a command line asks for."""
    stages = [Path(word).parent.name for word in settings if word.endswith((".yaml", ".yml"))]
    stage = stages[0] if stages and stages[0] in ("pretrain", "probe", "baselines") else "finetune"
    config = load_config(Path(__file__).parents[1] / "configs" / stage / "toy.yaml", settings).data
    config.val = getattr(config, "val", "")  # MoCo v3 has no validation
    if not config.root:
        raise UserError("which dataset? Name a configuration file or give data.root, data.train and data.val")
    return config
