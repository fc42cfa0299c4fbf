"""What the loops of all stages need: how a batch is split, the learning rate, the log."""

import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import filelock
import torch
import yaml
from torch.profiler import profile, schedule
from tqdm import tqdm

from support.config import UserError, as_dict, flatten, load_config, say
from support.pictures import draw_log
from support.processes import Processes, compiler, gather


def split_batch(videos: int, batch: int, world_size: int, at_most: int) -> tuple[int, int]:
    """Split a step's batch over processes and micro-batches: return videos per micro-batch, number of micro-batches.

    batch: videos of a step. at_most: videos that fit on a device. Raises UserError if the batch cannot be split equally
    or if there are fewer `videos` than one batch.
    """
    if batch % world_size:
        possible = max(batch // world_size, 1) * world_size
        what = f"a batch of {batch} videos cannot be split equally over {world_size} processes"
        raise UserError(f"{what}: set optim.batch_size so that it is {possible}, for instance")
    if videos < batch:
        what = f"{videos} videos are fewer than one batch of {batch}"
        raise UserError(f"{what}: set optim.batch_size so that it is {videos} or less")
    per_process = batch // world_size
    at_most = max(1, at_most)
    micro_batch = max(n for n in range(1, at_most + 1) if per_process % n == 0)
    if 2 * micro_batch < min(at_most, per_process):
        what = f"a batch of {batch} videos on {world_size} processes"
        say(f"{what} can only be split into micro-batches of {micro_batch}, though {at_most} fit on a device")
    accumulation = per_process // micro_batch
    say(f"batch of {batch} videos = {world_size} processes x {accumulation} accumulated x {micro_batch}")
    return micro_batch, accumulation


def count_steps(optim: SimpleNamespace, steps_per_epoch: int) -> tuple[int, int]:
    """Return the number of steps of a run, and how many of them are warm-up. optim: that group of its configuration."""
    if optim.steps:
        return optim.steps, optim.warmup_steps
    return round(optim.epochs * steps_per_epoch), round(optim.warmup_epochs * steps_per_epoch)


def warmup_cosine(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Return the learning rate at `step` of `total`: linear from 0 to `peak`, then half a cosine to `end`."""
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in GB: of tensors on a GPU, else of this process; None if unknown."""
    if max_memory := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        return round(max_memory(device) / 1e9, 3)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


class Log:
    """A run's folder on rank 0, locked for this run alone, with its log.jsonl, and the progress bar.

    start: the step at which the run starts or resumes. epoch: the steps of one. clips_per_step: of all processes.
    Raises UserError, on all processes, if another run is at work in the folder or if it cannot be written.
    """

    def __init__(
        self, config: SimpleNamespace, processes: Processes, start: int, total: int, epoch: int, clips_per_step: int
    ) -> None:
        self.folder = Path(config.run.folder)
        self.device = processes.device
        self.epoch = epoch
        self.clips_per_step = clips_per_step
        self.lock = self.file = self.board = None  # on other ranks
        self.trace = self.folder / "trace.json" if config.run.profile and processes.rank == 0 else None
        errors = []
        if processes.rank == 0:
            try:
                self.lock = lock_folder(self.folder)
                (self.folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False), "utf-8")
                self.file = open_log(self.folder / "log.jsonl", start)
                if config.run.tensorboard:
                    self.board = open_tensorboard(self.folder, start)
            except (UserError, OSError) as error:
                errors.append(str(error))
        if errors := gather(errors):
            raise UserError(errors[0])
        say(f"{total:,} steps; starting at step {start:,}")
        self.bar = tqdm(initial=start, total=total, unit="step", disable=processes.rank > 0)
        if start < total and compiler(config.run.compile, self.device) is torch.compile:
            self.bar.set_description("compiling the model: the first step takes minutes")
        self.step = start  # of the last line
        self.waited = 0.0  # seconds that loading had cost by then
        self.since = time.perf_counter()

    def progress(self, steps: Iterable[int]) -> Iterator[int]:
        """Yield the steps and move the progress bar. With run.profile, trace the fourth to the sixth step."""
        tracer = None
        if self.trace:  # by the fourth step everything is compiled and all memory is allocated
            traced = schedule(wait=2, warmup=1, active=3, repeat=1)
            tracer = profile(schedule=traced, on_trace_ready=lambda done: done.export_chrome_trace(str(self.trace)))
        with self.bar, tracer or nullcontext():
            for step in steps:
                yield step
                self.bar.set_description(refresh=False)  # the model is compiled
                self.bar.update()
                if tracer:
                    tracer.step()
        if (broken := self.folder / "broken_videos.txt").exists():
            say(f"{len(broken.read_bytes().splitlines())} broken videos were replaced by others: {broken}")

    def write_step(self, step: int, loss: float, waited: float, **values: Any) -> None:
        """Write a line about the steps since the last one: the mean loss, speed, memory, and `values`.

        waited: seconds that loading has cost since the start. Raises UserError if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}; a lower optim.base_lr may help")
        now = time.perf_counter()
        seconds = now - self.since
        speed = round((step - self.step) * self.clips_per_step / seconds, 1)
        waiting = round((waited - self.waited) / seconds, 4)
        self.step, self.waited, self.since = step, waited, now
        values |= dict(clips_per_second=speed, waiting_for_data=waiting, memory_gb=peak_memory(self.device))
        self.write(loss=loss, step=step, epoch=round(step / self.epoch, 4), **values)
        self.bar.set_postfix({"loss": f"{loss:.4f}", "clips/s": speed}, refresh=False)

    def write(self, **values: Any) -> None:
        """Write a line of log.jsonl, and the same for TensorBoard."""
        if not self.file:
            return
        self.file.write(json.dumps(values) + "\n")
        if self.board:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    tag = f"{values['encoder']}/{name}" if "encoder" in values else name
                    self.board.add_scalar(tag, value, values["step"])

    def last_loss(self) -> str:
        """Return ", loss" and the last loss in the log, also that of a run that was finished before; "" without any."""
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        return f", loss {losses[-1]:.4f}" if losses else ""

    def epoch_ends(self, step: int, every: int) -> bool:
        """Return whether a step ends an epoch whose number is a multiple of `every`; with 0 none does."""
        return every > 0 and step % (every * self.epoch) == 0

    def draw(self) -> None:
        """Draw charts of the log."""
        if self.file:
            draw_log(self.folder)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave saving or validation out of the next line's clips per second."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def finetune_command(config: SimpleNamespace, init: str | Path) -> str:
    """Return the command that fine-tunes the weights `init` of a run, with its clips and lists of videos.

    Its recipe is the one with the longest name that the name of the run's folder starts with, or else own.yaml.
    """
    recipes = Path(__file__).parents[1] / "configs" / "finetune"
    words = ["torchrun" if "RANK" in os.environ else "python"]
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        words.append(f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}")
    words.append("finetune.py")
    recipe = recipes / "toy.yaml"
    if config.data.root:
        name = Path(config.run.folder).name
        namesakes = [path for path in recipes.glob("*.yaml") if name.startswith(path.stem)]
        recipe = max(namesakes, key=lambda path: len(path.stem), default=recipes / "own.yaml")
        words += [f"configs/finetune/{recipe.name}", f"data.root={config.data.root}"]
    words.append(f"init={Path(init).as_posix()}")
    default, own = flatten(as_dict(load_config(recipe, []))), flatten(as_dict(config))
    keys = ["model.size", "model.cube", "data.sampling", "data.frames", "data.size"]
    if own.get("data.sampling", default["data.sampling"]) == "dense":  # uniform sampling has no stride
        keys.append("data.stride")
    for key in keys:
        if key in own and own[key] != default[key]:
            words.append(f"{key}={own[key]}".replace(" ", ""))
    if own["data.train"] != default["data.train"]:  # otherwise the recipe's test could be on the run's training videos
        words += [f"data.train={own['data.train']}", f"data.val={own.get('data.val', '')}"]
    return shlex.join(words)


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Create the folder of a run and lock it for this run alone. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", is_singleton=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        what = f"another run is at work in {folder}: wait for it, stop it, or set another run.folder"
        raise UserError(f"{what} (if none is, delete {folder / '.lock'})") from None
    except OSError as error:
        raise UserError(f"{error}; set another run.folder, or fix this one") from None
    return lock


def open_log(path: Path, step: int) -> TextIO:
    """Open log.jsonl, one JSON object per line, to append to it. Drop lines after `step`, where a run resumes."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]  # a torn last line
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds a line that is not a log entry: fix it or move the file away") from None
    path.with_suffix(".tmp").write_text("".join(kept))
    os.replace(path.with_suffix(".tmp"), path)
    return open(path, "a", buffering=1)


def open_tensorboard(folder: Path, step: int) -> Any:
    """Return a writer for TensorBoard of lines after `step`. Raises UserError if that package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("run.tensorboard=true needs TensorBoard: pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10)


def check_writable(folder: Path) -> None:
    """Raise UserError if results cannot be written into a folder: before hours of testing, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"results cannot be written into {folder} ({error}): name another folder with --out") from None
