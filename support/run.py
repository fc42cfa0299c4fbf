"""Code shared by all stages: processes and device, batches, when to save a checkpoint, the log.

Everything random is a function of the seed, so that a resumed run repeats what an uninterrupted one does. What a
sample holds depends on (seed, epoch, index): not on the number of processes, loader workers or micro-batches. What is
drawn on the device (drop path, dropout, mixup) depends on (seed, step, micro-batch, rank), so it does depend on those.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, schedule
from tqdm import tqdm

from support.checkpoint import (
    check_facts,
    describe,
    load_checkpoint,
    open_folder,
    open_log,
    open_tensorboard,
    save_checkpoint,
)
from support.config import UserError, as_dict, pick, say
from support.pictures import draw_log
from support.processes import STOP_SIGNALS, find_device, gather, has_fast_bf16, noted_signals
from support.seeds import seed_device


def warmup_cosine(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Learning rate at `step` of `total`: linear from 0 to `peak` over `warmup` steps, then half a cosine to `end`."""
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Run:
    """One run: its processes and device, its batches and steps, its folder. The loop itself is in the stage's file.

    `python` starts one process, torchrun one per device. `default` is the stage's default configuration file.
    """

    def __init__(self, config: SimpleNamespace, default: Path) -> None:
        self.config, self.default, self.folder = config, default, Path(config.run.folder)
        self.device = find_device()
        fast, compiles = has_fast_bf16(self.device), self.device.type in ("cuda", "xpu")
        self.bf16 = pick({"auto": fast, "bf16": True, "float32": False}, config.run.precision, "run.precision")
        self.compiled = pick({"auto": compiles, "always": True, "never": False}, config.run.compile, "run.compile")
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index)
            torch.set_float32_matmul_precision("high")  # TF32
        elif "OMP_NUM_THREADS" not in os.environ:  # leave cores to the loader: 15 to 20 % more clips/s on two cores
            torch.set_num_threads(max(1, torch.get_num_threads() - config.data.workers))
        if "RANK" in os.environ and not dist.is_initialized():
            gpu, backend = self.device.type, dist.get_default_backend_for_device(self.device.type)
            dist.init_process_group("gloo" if gpu == "cpu" else f"cpu:gloo,{gpu}:{backend}")
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.replicas: list[DistributedDataParallel] = []
        self.broken: list[str] = []  # a sentence on each video that could not be read
        self.pending: tuple[torch.Event | None, dict[str, Any]] | None = None

    def autocast(self) -> torch.autocast:
        """bf16 where `run.precision` asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def compile(self, function: Callable) -> Callable:
        """A module or function through torch.compile, if `run.compile` asks for it."""
        return torch.compile(function) if self.compiled else function

    def parallel(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over all processes."""
        if self.world_size == 1:
            return module
        self.replicas.append(DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False))
        return self.replicas[-1]

    def plan(self, videos: Sequence, batch_size: int, repeats: int = 1) -> None:
        """Split a step's `batch_size` videos over processes and micro-batches that fit on a device; count steps.

        repeats: clips that a video becomes on the device. Raises UserError.
        """
        self.videos, samples, optim = describe(videos), len(videos), self.config.optim
        self.batch_size, self.repeats = batch_size, repeats
        if batch_size % self.world_size:
            what = f"optim.batch_size={optim.batch_size}, {batch_size} videos"
            raise UserError(f"{what}, cannot be split equally over {self.world_size} processes")
        if samples < batch_size:
            most = samples * optim.batch_size // batch_size
            raise UserError(f"{samples} videos are fewer than one batch: set optim.batch_size to {most} or less")
        share = batch_size // self.world_size
        at_most = max(1, self.config.run.batch_per_device // repeats)
        self.per_device = max(n for n in range(1, at_most + 1) if share % n == 0)
        self.accumulation = share // self.per_device
        if 2 * self.per_device < min(at_most, share):
            what = f"optim.batch_size={optim.batch_size} on {self.world_size} processes"
            say(f"{what} can only be split into micro-batches of {self.per_device}, though {at_most} fit on a device")
        self.samples_per_step, self.steps_per_epoch = batch_size * repeats, samples // batch_size
        self.total, self.warmup = (round(n * self.steps_per_epoch) for n in (optim.epochs, optim.warmup_epochs))

    def open(self, state: dict[str, Any], **facts: Any) -> None:
        """Lock the run's folder, resume from its checkpoint if there is one, and say how the run is set up.

        state: what learns, by its name in the checkpoint: modules and the optimizer. facts: what else checkpoints hold.
        Raises UserError if another run is at work in the folder, or one of another configuration has left it.
        """
        self.state, self.facts = state, facts | dict(videos=self.videos)
        checkpoint, refusals = load_checkpoint(self.folder, self.config, self.default), []
        if checkpoint:
            check_facts(self.folder, checkpoint, self.facts, self.config.run.other_videos)
        self.start = checkpoint["step"] if checkpoint else 0
        try:
            if self.rank == 0:
                self.lock = open_folder(self.folder, self.config)
                self.log_file = open_log(self.folder / "log.jsonl", self.start)
                self.board = open_tensorboard(self.folder, self.start) if self.config.run.tensorboard else None
        except UserError as error:
            refusals = [str(error)]
        for sentence in gather(refusals):  # on all processes, not only the one that found it
            raise UserError(sentence)
        for name, part in state.items() if checkpoint else ():
            part.load_state_dict(checkpoint[name])
        optim, device = self.config.optim, f"{self.world_size} x {self.device.type}"
        lr, of_each = optim.base_lr * optim.batch_size / 256, f", {self.repeats} clips of each" * (self.repeats > 1)
        say(
            f"batch {self.batch_size} = {self.world_size} processes x {self.accumulation} accumulated x "
            f"{self.per_device}{of_each}, on {device}; "
            f"learning rate {optim.base_lr:g} x {optim.batch_size} / 256 = {lr:.4g}\n"
            f"{self.total:,} steps = {optim.epochs} epochs x {self.steps_per_epoch:,}; starting at step {self.start:,}"
        )

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar; with run.profile, a trace of the fourth to the sixth."""
        tracer = None
        if self.config.run.profile and self.rank == 0:  # by the fourth step all is compiled and has its memory
            trace = str(self.folder / "trace.json")
            traced = schedule(wait=2, warmup=1, active=3, repeat=1)
            tracer = profile(schedule=traced, on_trace_ready=lambda done: done.export_chrome_trace(trace))
        quiet = self.rank > 0
        self.bar = tqdm(range(self.start, self.total), initial=self.start, total=self.total, unit="step", disable=quiet)
        self._reset(self.start)
        self.asked: tuple[Tensor, dist.Work | None] | None = None
        with tracer or nullcontext(), noted_signals() as self.told:
            for step in self.bar:
                self.step = step
                yield step
                if tracer:
                    tracer.step()
        if self.broken:
            say(f"{len(self.broken)} broken videos were replaced by others: {self.folder / 'broken_videos.txt'}")

    def micro_batches(self, batches: Iterator[tuple]) -> Iterator[list[Tensor]]:
        """The step's `accumulation` micro-batches, on the device. Gradients are exchanged with the last one only."""
        for number in range(self.accumulation):
            asked = time.perf_counter()
            *tensors, broken = next(batches)
            self.waited += time.perf_counter() - asked
            for sentence in dict.fromkeys(broken):
                if sentence not in self.broken:
                    self.broken.append(sentence)
                    tqdm.write(f"replaced by another video: {sentence}", file=sys.stderr)
            for replica in self.replicas:  # as DDP's no_sync does
                replica.require_backward_grad_sync = number == self.accumulation - 1
            seed_device(self.config.run.seed, self.step * self.accumulation + number, self.rank)
            yield [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def add_loss(self, loss: Tensor) -> None:
        """Count a micro-batch's loss towards the mean that is logged."""
        self.loss_sum += loss.detach()
        self.count += 1

    def end_step(self, **values: Any) -> None:
        """Log `values` with the mean loss, speed and memory, and save a checkpoint, each if it is due.

        values: numbers, or tensors on the device. A line is written one logging interval late: by then its values have
        come from the device, and the loop never waits.
        """
        done, run = self.step + 1, self.config.run
        if done % run.log_every == 0 or done == self.total:
            self._log_step(done, values)
        stop = self._stop_requested() if done < self.total else []
        if stop or done % run.checkpoint_every == 0 or done == self.total:
            self._save(done)
        if stop:
            raise UserError(f"stopped by {' and '.join(stop)} after step {done}: the same command resumes there")

    def _log_step(self, done: int, values: dict[str, Any]) -> None:
        if self.world_size > 1:
            dist.all_reduce(self.loss_sum)
        self._write_pending()
        seconds, loss = time.perf_counter() - self.since, self.loss_sum / (self.count * self.world_size)
        speed = round((done - self.since_step) * self.samples_per_step / seconds, 1)
        place = dict(loss=loss, step=done, epoch=round(done / self.steps_per_epoch, 4))
        measured = dict(clips_per_second=speed, waiting_for_data=round(self.waited / seconds, 4))
        values = place | values | measured | dict(memory_gb=peak_memory(self.device))
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.detach().to("cpu", non_blocking=True)
        arrived = None if self.device.type == "cpu" else torch.Event(self.device)
        if arrived:
            arrived.record()
        self.pending = arrived, values
        self._reset(done)

    def _save(self, done: int) -> None:
        self._write_pending()
        self.broken = list(dict.fromkeys(gather(self.broken)))
        if self.rank == 0:
            if self.broken:
                lines = "".join(f"{line}\n" for line in self.broken)
                (self.folder / "broken_videos.txt").write_text(lines, "utf-8", "surrogateescape")
            content = {name: part.state_dict() for name, part in self.state.items()} | self.facts
            content |= dict(step=done, config=as_dict(self.config))
            save_checkpoint(self.folder / "checkpoint.pt", content)
            draw_log(self.folder)

    def _stop_requested(self) -> list[str]:
        """The signals that asked any of the processes to stop. They agree on it a step later, so that none waits."""
        if self.world_size == 1:
            return [*dict.fromkeys(self.told)]
        told, before = torch.tensor([int(name in self.told) for name in STOP_SIGNALS]), self.asked
        self.asked = told, dist.all_reduce(told, async_op=True)
        if not before:
            return []
        before[1].wait()
        return [name for name, count in zip(STOP_SIGNALS, before[0].tolist(), strict=True) if count]

    def validation_due(self) -> bool:
        """Whether this step ends an epoch after which `run.validate_every` asks for a test; the last has its own."""
        every, done = self.config.run.validate_every * self.steps_per_epoch, self.step + 1
        return every > 0 and done % every == 0 and done < self.total

    def log(self, **values: Any) -> None:
        """Write a line of log.jsonl, and draw the log."""
        self._write_pending()
        if self.rank == 0:
            self._write(values)
            draw_log(self.folder)

    def _write(self, values: dict[str, Any]) -> None:
        self.log_file.write(json.dumps(values) + "\n")
        for name, value in values.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar("/".join(filter(None, [values.get("encoder"), name])), value, values["step"])

    def _reset(self, step: int) -> None:
        self.since_step, self.since, self.waited, self.count = step, time.perf_counter(), 0.0, 0
        self.loss_sum = torch.zeros((), device=self.device)

    def _write_pending(self) -> None:
        if not self.pending:
            return
        (arrived, values), self.pending = self.pending, None
        if arrived:
            arrived.synchronize()
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
        if not math.isfinite(loss := values["loss"]):
            raise UserError(f"the loss is {loss} at step {values['step']}; a lower optim.base_lr may help")
        if self.rank == 0:
            self._write(values)
        self.bar.set_postfix({"loss": f"{loss:.4f}", "clips/s": values["clips_per_second"]}, refresh=False)


def peak_memory(device: torch.device) -> float | None:
    """GB: the most that tensors took on a GPU, or this process of the machine's memory, if the system tells."""
    if most := getattr(torch.get_device_module(device), "max_memory_allocated", None):
        return round(most(device) / 1e9, 3)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
