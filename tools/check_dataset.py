"""Check a dataset before training: its classes, wrong labels, unreadable videos, and videos in both of its lists.

python -m tools.check_dataset configs/finetune/ucf101_base.yaml data.root=/data/ucf101
python -m tools.check_dataset VIDEO... FOLDER... LIST...    # can they be read?
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from tqdm.contrib.concurrent import thread_map

from support.config import UserError, is_setting, load_config, parse
from support.datasets import Classes
from support.lists import Entry, find_splits, list_entries, named_videos
from support.processes import launch
from support.video import BrokenVideo, Video


def check(config: SimpleNamespace) -> list[str]:
    """Check the lists of the group `data` of a configuration, and print each. Return their problems."""
    has_labels = hasattr(config, "classes")  # pre-training has none
    train, val = find_splits(config.root, config.train, config.val)
    entries = list(list_entries(config.root, train, has_labels))
    classes = Classes(config.root, config.classes, entries) if has_labels else None
    problems = check_list(f"training in {train or config.root}", entries, classes)
    if val:
        val_entries = list(list_entries(config.root, val, has_labels))
        problems += check_list(f"validation in {val}", val_entries, classes)
        if both := {entry.path for entry in entries} & {entry.path for entry in val_entries}:
            problems.append(f"{len(both):,} videos are for training and for validation, such as {min(both)}")
    return problems


def check_list(title: str, entries: list[Entry], classes: Classes | None) -> list[str]:
    """Print a list's number of videos of each class. Return its problems."""
    problems = find_unreadable([Path(entry.path) for entry in entries])
    print(f"{len(entries):,} videos for {title}, {len(problems)} unreadable")
    if classes:
        count = Counter(dict.fromkeys(classes.names, 0))
        for entry in entries:
            try:
                count[classes.names[classes.index(entry)]] += 1
            except UserError as error:
                problems.append(str(error))
        print(f"{len(count)} classes, {len(entries) - count.total()} wrong labels")
        for name, videos in count.items():
            print(f"{videos:8,}  {name}")
    return problems


def find_unreadable(videos: list[Path]) -> list[str]:
    """Decode the first, middle and last frame of each video. Return why some of them cannot be read."""

    def read(path: Path) -> str | None:
        try:
            with Video(path) as video:
                video.frames([0, len(video) // 2, len(video) - 1])
        except BrokenVideo as error:
            return str(error)

    errors = thread_map(read, videos, max_workers=os.cpu_count(), desc="reading videos", unit="video")
    return [error for error in errors if error]


def load_data_config(settings: list[str]) -> SimpleNamespace:
    """Return the group `data` of a configuration of any stage but detection."""
    stages = [Path(word).parent.name for word in settings if word.endswith((".yaml", ".yml"))]
    stage = stages[0] if stages and stages[0] in ("pretrain", "probe", "baselines") else "finetune"
    config = load_config(Path(__file__).parents[1] / "configs" / stage / "toy.yaml", settings).data
    config.val = getattr(config, "val", "")  # MoCo v3 has no validation
    if not config.root:
        raise UserError("which dataset? Name a configuration file or give data.root, data.train and data.val")
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = parse(parser).settings
    if any(map(is_setting, words)) or not words:
        problems = check(load_data_config(words))
    else:
        videos = named_videos([Path(word) for word in words])
        problems = find_unreadable(videos)
        print(f"{len(videos):,} videos, {len(problems)} unreadable")
    for problem in problems:
        print(f"  {problem}")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
