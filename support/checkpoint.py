"""Checkpoints of a run: written so that a kill does no harm, read only by the run that they belong to."""

import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from support.config import UserError, as_dict, flatten, load_config, say
from support.lists import PREPARED
from support.processes import gather
from support.run import Log, count_steps

# Keys that may change when a run resumes; a lower learning rate helps if the loss is no longer finite.
MAY_CHANGE = ("data.root", "data.workers", "data.test_clips", "data.test_crops", "optim.base_lr")
MAY_CHANGE += ("optim.steps", "optim.warmup_steps", "optim.epochs", "optim.warmup_epochs")


def save_checkpoint(log: Log, config: SimpleNamespace, **content: Any) -> None:
    """Write `content` and the configuration as checkpoint.pt of the run's folder, on rank 0, and draw the log.

    It is written next to the old one and renamed, so that a valid one survives a kill at any moment. Raises UserError
    if the disk is full or if a weight is not finite.
    """
    if log.file is None:
        return
    path = log.folder / "checkpoint.pt"
    if not all_finite(content):
        what = f"weights are not finite at step {content['step']}, so {path} stays as it was"
        raise UserError(f"{what}: the same command resumes from it, with a lower optim.base_lr if this happens again")
    with log.clock_stopped():
        write_checkpoint(path, content | dict(config=as_dict(config)))
        if log.epoch_ends(content["step"], config.run.keep_every):
            shutil.copyfile(path, path.with_name(f"checkpoint_{content['step'] // log.epoch:04d}.pt"))
        log.draw()


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a file next to the old one and rename it. Raises UserError if the disk is full."""
    new = path.with_suffix(".tmp")
    try:
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise  # a loader worker was killed in the meantime
        new.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written ({reason}): make room, then the same command resumes") from None
    os.replace(new, path)


def all_finite(content: dict[str, Any]) -> bool:
    """Return whether all weights of a checkpoint are finite. The optimizer's tensors are not looked at."""
    weights = flatten(content | dict(optimizer={})).values()
    return all(bool(weight.isfinite().all()) for weight in weights if isinstance(weight, Tensor))


def load_checkpoint(config: SimpleNamespace, default: Path, **identity: Any) -> dict[str, Any] | None:
    """Return the checkpoint that a run left in its folder, or None, the same on all processes.

    When a run resumes, the keys in MAY_CHANGE may change, and all of `run` but the seed. identity: what else has to
    stay the same, which is the videos and a stage's classes, actions or frozen encoder. Raises UserError for a
    checkpoint of another configuration or identity, and if processes see different ones.
    """
    folder = Path(config.run.folder)
    path = folder / "checkpoint.pt"
    checkpoint = None
    if path.exists():
        checkpoint = read_run(path, default)
        check_config(folder, checkpoint["config"], config)
        check_identity(folder, checkpoint, identity, config.run.other_videos)
    states = gather([(checkpoint["step"] if checkpoint else 0, identity["videos"])])
    if any(step != states[0][0] for step, _ in states):
        steps = ", ".join(str(step) for step, _ in states)
        what = f"processes find checkpoints of different steps ({steps}) in {folder}"
        raise UserError(f"{what}: run.folder has to be on a disk that all machines share")
    if any(videos["digest"] != states[0][1]["digest"] for _, videos in states):
        counts = ", ".join(f"{videos['count']:,}" for _, videos in states)
        raise UserError(f"processes find different training videos ({counts}): give all machines the same data.root")
    return checkpoint


def read_run(path: Path, default: Path) -> dict[str, Any]:
    """Read a run's checkpoint and give its "config" today's keys. Raises UserError if the file is no checkpoint."""
    try:
        # Mapped: what is not needed is not read. Windows cannot replace a file that is mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=sys.platform != "win32")
        checkpoint["config"] = as_dict(load_config(default, [], checkpoint["config"]))
        checkpoint["step"] = int(checkpoint["step"])
    except UserError as error:
        raise UserError(f"{path}: {error}, or set another run.folder") from None
    except Exception as error:  # torch.load raises many types
        what = f"{path} is not a whole checkpoint of a run ({type(error).__name__})"
        raise UserError(f"{what}: delete it or set another run.folder") from None
    return checkpoint


def check_config(folder: Path, before: dict, config: SimpleNamespace) -> None:
    """Raise UserError if a key has changed that may not change when a run resumes."""
    before = flatten(before)
    for key, now in flatten(as_dict(config)).items():
        may_change = key in MAY_CHANGE or (key.startswith("run.") and key != "run.seed")
        if before[key] != now and not may_change:
            what = f"{key}={before[key]}, not {now}"
            raise UserError(f"{folder} holds a run with {what}: set another run.folder or delete this one")


def check_identity(folder: Path, checkpoint: dict, identity: dict, other_videos: bool) -> None:
    """Raise UserError if a run's classes, actions, frozen encoder or training videos differ from its checkpoint's.

    Copies of the videos by tools/prepare.py may have other sizes.
    """
    for name in ("classes", "actions", "encoder"):
        if checkpoint.get(name) != identity.get(name):
            what = f"{folder} holds a run with other {name}"
            raise UserError(f"{what}: set another run.folder, or restore them to resume")
    if other_videos:
        return
    now = identity["videos"]
    before = now | checkpoint.get("videos", {})
    advice = "set another run.folder, or resume with run.other_videos=true"
    if (before["count"], before["digest"]) != (now["count"], now["digest"]):
        what = f"{folder} holds a run with {before['count']:,} training videos, which differ from today's"
        raise UserError(f"{what} {now['count']:,}: restore the list, {advice}")
    if before.get("sizes") != now.get("sizes") and before.get("prepared") == now.get("prepared"):
        what = f"{folder} holds a run, {checkpoint['step']:,} steps of it done, of other videos with the same names"
        raise UserError(f"{what}: the sizes of the files differ; restore them, {advice}")


def check_length(checkpoint: dict, config: SimpleNamespace, steps_per_epoch: int) -> None:
    """Say so if a run that resumes has other numbers of steps. Raises UserError if these steps are done."""
    before, warmup_before = count_steps(SimpleNamespace(**checkpoint["config"]["optim"]), steps_per_epoch)
    total, warmup = count_steps(config.optim, steps_per_epoch)
    if total != before and total <= checkpoint["step"]:
        what = f"{config.run.folder} holds a run of {before:,} steps, {checkpoint['step']:,} of them done"
        raise UserError(f"{what}: {total:,} are too few, set optim.steps or optim.epochs higher, or another run.folder")
    if (total, warmup) != (before, warmup_before):
        say(f"the run of {before:,} steps continues to {total:,}; the learning rate follows the new schedule")


def describe(videos: Sequence) -> dict[str, Any]:
    """Return the number of training videos and a digest of their names (no folders, no suffixes) and labels, in order.

    Also return a digest of the sizes of about 1,000 of the files, and whether tools/prepare.py made them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for video in videos:
        first, *labels = video if isinstance(video, tuple) else (video,)
        name = first.stem if isinstance(first, Path) else first
        digest.update(f"{name} {labels}\n".encode(errors="surrogateescape"))
    some = videos[:: max(1, len(videos) // 1000)]  # a million on a network disk would take minutes
    paths = [video[0] if isinstance(video, tuple) else video for video in some]
    paths = [path for path in paths if isinstance(path, Path)]
    sizes = str([path.stat().st_size if path.exists() else -1 for path in paths])
    sizes = hashlib.blake2b(sizes.encode(), digest_size=16).hexdigest()
    prepared = any((parent / PREPARED).exists() for path in paths[:1] for parent in path.parents)
    return dict(count=len(videos), digest=digest.hexdigest(), sizes=sizes, prepared=prepared)
