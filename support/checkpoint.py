"""What a run keeps in its folder: a lock, its configuration, its log, its checkpoint."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import filelock
import torch
import yaml

from support.config import UserError, as_dict, flatten, load_config

MAY_CHANGE = ("data.root", "data.workers", "data.test_clips", "data.test_crops")  # when a run is resumed


def open_folder(folder: Path, config: SimpleNamespace) -> filelock.BaseFileLock:
    """Create the folder of a run, lock it for this run alone, and write its config.yaml. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", is_singleton=True)
        lock.acquire(timeout=0)
        (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False), "utf-8")
    except filelock.Timeout:
        raise UserError(
            f"another run is at work in {folder}: wait for it, stop it, or set another run.folder"
        ) from None
    except OSError as error:
        raise UserError(f"{error}; set another run.folder, or fix this one") from None
    return lock


def open_log(path: Path, step: int) -> TextIO:
    """log.jsonl, one JSON object per line, to append to; lines after `step`, where a run resumes, are dropped."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:  # a kill may have cut the last line
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds a line that is not a log entry: fix it or move the file away") from None
    path.with_suffix(".tmp").write_text("".join(kept))
    os.replace(path.with_suffix(".tmp"), path)
    return open(path, "a", buffering=1)


def open_tensorboard(folder: Path, step: int) -> Any:
    """A writer of what log.jsonl holds for TensorBoard, from `step` on. UserError if that package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard=true needs TensorBoard: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write next to the old checkpoint and rename, so that a kill at any moment leaves a whole one, old or new."""
    new = path.with_suffix(".tmp")
    try:
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # a full disk
        new.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written ({reason}): make room, then the same command resumes") from None
    os.replace(new, path)


def load_checkpoint(folder: Path, config: SimpleNamespace, default: Path) -> dict | None:
    """The checkpoint that a run left in its folder, or None. UserError if it was made with another configuration.

    Where the data is, the loader's workers, the test views and all of `run` but the seed may change.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        then = flatten(as_dict(load_config(default, [], checkpoint["config"])))
        checkpoint["step"] = int(checkpoint["step"])
    except Exception as error:  # torch.load raises many types for one mistake: not a run's checkpoint
        what = f"{path} is not a whole checkpoint of a run ({type(error).__name__})"
        raise UserError(f"{what}: delete it or set another run.folder") from None
    for key, now in flatten(as_dict(config)).items():
        may_change = key in MAY_CHANGE or (key.startswith("run.") and key != "run.seed")
        if then[key] != now and not may_change:
            what = f"{key}={then[key]}, not {now}"
            raise UserError(f"{folder} holds a run with {what}: set another run.folder or delete this one")
    return checkpoint


def describe(videos: Sequence) -> dict[str, Any]:
    """Number and digest of the training videos with their labels, in order. Folder and suffix of a file may change."""
    digest = hashlib.blake2b(digest_size=16)
    for video in videos:
        first, *labels = video if isinstance(video, tuple) else (video,)
        digest.update(f"{first.stem if isinstance(first, Path) else first} {labels}\n".encode(errors="surrogateescape"))
    return dict(count=len(videos), digest=digest.hexdigest())


def check_facts(folder: Path, checkpoint: dict, facts: dict, other_videos: bool) -> None:
    """Raise UserError if a run's classes, actions or training videos differ from its checkpoint's."""
    for name in ("classes", "actions"):
        if checkpoint.get(name) != facts.get(name):
            what = f"{folder} holds a run with other {name}"
            raise UserError(f"{what}: set another run.folder, or restore them to resume")
    then, now = checkpoint.get("videos", facts["videos"]), facts["videos"]
    if then != now and not other_videos:
        what = f"{folder} holds a run with {then['count']:,} training videos, which are not the {now['count']:,} of now"
        raise UserError(f"{what}: restore the list, set another run.folder, or resume by run.other_videos=true")
