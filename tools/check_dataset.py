"""Check a dataset before training: labels, files that cannot be read, videos for training and for testing.

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

from support.config import UserError, parse
from support.datasets import Classes, list_entries, named_videos, read_settings
from support.processes import launch
from support.video import BrokenVideo, Video


def check(config: SimpleNamespace) -> bool:
    """Print the number of videos of each class, for training and for testing, and what is wrong; return if all is well.

    config: the group `data` of a configuration. Wrong are labels, files that cannot be read, and test videos that are
    among those for training.
    """
    labels = hasattr(config, "classes")  # pre-training has none
    table, well, seen = None, True, set()
    for what, selection in (("training", config.train), ("testing", config.val))[: 2 if config.val else 1]:
        entries = list_entries(config.root, selection, labels)
        table = table or Classes(config.root, config.classes if labels else "", entries if labels else [])
        count, wrong, paths = Counter(), [], [entry.path for entry in entries]
        for entry in entries if labels else ():
            try:
                count[table.index(entry)] += 1
            except UserError as error:
                wrong.append(str(error))
        broken = _unreadable(paths, config.workers)
        print(
            f"{len(paths):,} videos for {what} in {selection or config.root}, {len(table.names)} classes, "
            f"{len(wrong)} wrong labels, {len(broken)} unreadable"
        )
        for index, name in enumerate(table.names):
            print(f"{count[index]:8,}  {name}")
        if both := seen.intersection(paths):
            broken.append(f"{len(both):,} videos are for training as well, {min(both)} for one")
        for report in (*wrong, *broken):
            print(f"  {report}")
        seen.update(paths)
        well = well and not (wrong or broken)
    return well


def _unreadable(videos: list[Path], workers: int) -> list[str]:
    """Why some videos cannot be read. The first, the middle and the last frame of each are decoded."""

    def reason(path: Path) -> str:
        try:
            with Video(path) as video:
                video.frames([0, len(video) // 2, len(video) - 1])
        except BrokenVideo as error:
            return str(error)
        return ""

    reasons = thread_map(reason, videos, max_workers=max(1, workers), desc="reading videos", unit="video")
    return [reason for reason in reasons if reason]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = parse(parser).settings
    settings = [word for word in words if word.endswith((".yaml", ".yml")) or "=" in word and not Path(word).exists()]
    if settings or not words:
        well = check(read_settings(words))
    else:
        videos = named_videos(list(map(Path, words)))
        broken = _unreadable(videos, os.cpu_count() or 1)
        print(f"{len(videos):,} videos, {len(broken)} unreadable", *broken, sep="\n  ")
        well = not broken
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    launch(main)
