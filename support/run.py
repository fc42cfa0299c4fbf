"""What every stage needs and no reader of the paper has to study: processes, schedule, checkpoints, log."""

import fcntl
import hashlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.profiler import profile, schedule
from tqdm import tqdm

from support.config import UserError, _flatten, as_dict, pick


def launch(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a `UserError` or ctrl-C ends it with one sentence and a non-zero exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        # a DataLoader's worker passes on its own traceback with the sentence at the end
        _stop(str(error).rpartition("UserError: ")[2].strip())
    except OSError as error:  # a folder that is a file, no permission, a full disk
        _stop(f"{error}; give another path, or mend this one")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last checkpoint, or begins anew if there is none yet")
    if dist.is_initialized():
        dist.destroy_process_group()


def _stop(sentence: str) -> None:
    """End the process with the sentence, and have torchrun, if it started this one, repeat it at the end of its own report."""
    sentence = f"{Path(sys.argv[0]).name}: {sentence}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": details}}))
    sys.exit(sentence)


# ---- processes: plain `python` runs one, torchrun starts one per device and sets RANK, LOCAL_RANK, WORLD_SIZE ----


def start_processes(workers: int) -> tuple[int, int, torch.device]:
    """Join the other processes if torchrun started any. Returns rank, world size and this process's device.

    On a CPU the cores that `workers` loader processes need are left to them: 15 to 20 % more clips/s on two cores.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} GPUs here; start torchrun with at most so many --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() - workers))
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def position() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def numerics(run: SimpleNamespace) -> tuple[bool, bool]:
    """Whether to compute in bf16 and whether to compile: `run.precision` and `run.compile`, "auto" meaning on GPUs."""
    on_gpu = torch.cuda.is_available()
    bf16 = pick({"auto": on_gpu, "bf16": True, "float32": False}, run.precision, "run.precision")
    return bf16, pick({"auto": on_gpu, "always": True, "never": False}, run.compile, "run.compile")


def share_batch(batch_size: int, samples: int, world_size: int, at_most: int) -> tuple[int, int]:
    """How any number of devices share the paper's batch: samples at a time on each, up to `at_most`, and times to accumulate."""
    if batch_size % world_size:
        raise UserError(f"optim.batch_size={batch_size} cannot be shared equally by {world_size} processes")
    if samples < batch_size:
        raise UserError(f"{samples} videos are fewer than one batch: set optim.batch_size to {samples} or less")
    per_device = max(n for n in range(1, at_most + 1) if batch_size // world_size % n == 0)
    return per_device, batch_size // world_size // per_device


# ---- schedule, checkpoints, log ----


def say(text: str) -> None:
    """Print beside the progress bar, not among a command's results; only the first process does."""
    if position()[0] == 0:
        print(text, file=sys.stderr, flush=True)


def warmup_cosine(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Learning rate at `step` of `total`: linear from 0 to `peak` over `warmup` steps, then half a cosine to `end`."""
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def save_checkpoint(path: Path, **content: Any) -> None:
    """Write beside and rename, so that a kill at any moment leaves a whole checkpoint: the old one or the new one."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # a full disk
        beside.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written ({reason}): make room, and the same command goes on from the last checkpoint") from None
    os.replace(beside, path)


def load_checkpoint(path: Path, config: SimpleNamespace) -> dict | None:
    """The checkpoint that a run left at `path`, or None. UserError if it was made with another configuration.

    Where the data is, the loader's workers and all of `run` but the seed may change when a run goes on.
    """
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        then = _flatten(checkpoint["config"])
    except Exception as error:  # torch.load raises many types for what is one mistake: not a run's checkpoint
        raise UserError(f"{path} is not a whole checkpoint of a run ({type(error).__name__}): delete it or give another run.folder") from None
    now = _flatten(as_dict(config))
    for key in now:
        may_change = key in ("data.root", "data.workers") or (key.startswith("run.") and key != "run.seed")
        if then.get(key) != now[key] and not may_change:
            what = f"{key}={then.get(key)}, not {now[key]}"
            raise UserError(f"{path.parent} holds a run with {what}: give another run.folder or delete this one")
    return checkpoint


_locks: dict[Path, Any] = {}  # open files: a lock lasts until its file is closed, at the latest when the process ends


def open_folder(config: SimpleNamespace) -> tuple[Path, dict | None]:
    """The run's folder, locked for this run alone, and the checkpoint in it, if any. UserError if another run is at work there."""
    if not config.run.folder:
        raise UserError("run.folder is empty: name the folder of this run")
    folder, refusal = Path(config.run.folder), [""]
    checkpoint = load_checkpoint(folder / "checkpoint.pt", config)
    if position()[0] == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locks.setdefault(folder.resolve(), open(folder / ".lock", "w"))
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
        except BlockingIOError:
            refusal = [f"another run is at work in {folder}: wait for it, stop it, or give this one another run.folder"]
        except OSError as error:
            refusal = [f"{error}; give another run.folder, or mend this one"]
    if dist.is_initialized():  # all processes end with the sentence, not only the one that found it
        dist.broadcast_object_list(refusal)
    if refusal[0]:
        raise UserError(refusal[0])
    return folder, checkpoint


def gather(items: list) -> list:
    """The lists of all processes, one after the other."""
    if not dist.is_initialized():
        return items
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that this process took of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Reading:
    """A number on its way from the device: the loop goes on meanwhile and asks for it later."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value.detach().to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if value.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def get(self) -> float:
        if self.arrived:
            self.arrived.synchronize()
        return float(self.value)


class Log:
    """log.jsonl in a run's folder: one JSON object per line. Lines after `step`, where a run resumes, are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
        try:
            kept = [line for line in whole if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} holds a line that is none of a run's log: mend it or move the file away") from None
        path.with_suffix(".tmp").write_text("".join(kept))
        os.replace(path.with_suffix(".tmp"), path)
        self.file = open(path, "a", buffering=1)

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")


class Progress:
    """The steps of a loop, with a bar and log.jsonl: mean loss, clips/s, share of time spent waiting for data, memory.

    A line is written when the next one is due: by then its loss has come from the device, and the loop has not waited.
    With `run.profile`, what the first process does in its fourth to sixth step is written to trace.json.
    """

    def __init__(self, run: SimpleNamespace, start: int, steps: int, clips: int, device: torch.device) -> None:
        self.folder, self.clips, self.every, self.device = Path(run.folder), clips, run.log_every, device
        self.chief = position()[0] == 0
        self.profiler = None
        if run.profile and self.chief:  # by the fourth step everything is compiled and has its memory
            steps_to_trace = schedule(wait=2, warmup=1, active=3, repeat=1)
            trace = str(self.folder / "trace.json")
            self.profiler = profile(schedule=steps_to_trace, on_trace_ready=lambda p: p.export_chrome_trace(trace))
        self.log = Log(self.folder / "log.jsonl", start) if self.chief else None
        self.bar = tqdm(range(start, steps), initial=start, total=steps, unit="step", disable=not self.chief)
        self.broken: list[str] = []  # what was said about unreadable videos
        self.pending: tuple[Reading, dict] | None = None
        self._begin(start)

    def _begin(self, step: int) -> None:
        self.step, self.since, self.waited, self.count = step, time.perf_counter(), 0.0, 0
        self.loss_sum = torch.zeros((), device=self.device)

    def __iter__(self) -> Iterator[int]:
        with self.profiler or nullcontext():
            yield from self.bar

    def next(self, batches: Iterator) -> Any:
        """The next batch, the time that it takes counted as waiting."""
        asked_at = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked_at
        return batch

    def report(self, broken: list[str]) -> None:
        """Say once of each unreadable video that another one stands in for it."""
        for report in broken:
            if report not in self.broken:
                self.broken.append(report)
                tqdm.write(f"replaced by another video: {report}", file=sys.stderr)

    def add(self, loss: torch.Tensor) -> None:
        self.loss_sum += loss.detach()
        self.count += 1

    def done(self, step: int, **values: Any) -> None:
        """To be called after each step with its number, counted from 1, and what else to log."""
        if self.profiler:
            self.profiler.step()
        if step % self.every and step != self.bar.total:
            return
        _, processes = position()
        if processes > 1:
            dist.all_reduce(self.loss_sum)
        self.flush()
        seconds = time.perf_counter() - self.since
        speed = dict(
            clips_per_second=round((step - self.step) * self.clips / seconds, 1),
            waiting_for_data=round(self.waited / seconds, 4),
            memory_gb=round(peak_memory(self.device) / 1e9, 3),
        )
        self.pending = Reading(self.loss_sum / (self.count * processes)), dict(step=step, **values, **speed)
        self._begin(step)

    def flush(self) -> None:
        """Write the pending line. UserError if its loss is not a number."""
        if not self.pending:
            return
        reading, values = self.pending
        self.pending, loss = None, reading.get()
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {values['step']}; a lower optim.base_lr may help")
        if self.chief:
            self.log.write(loss=loss, **values)
            self.bar.set_postfix({"loss": f"{loss:.4f}", "clips/s": values["clips_per_second"]}, refresh=False)

    def gather_broken(self) -> None:
        """All processes' reports to each of them, and to broken_videos.txt."""
        self.broken = list(dict.fromkeys(gather(self.broken)))
        if self.chief and self.broken:
            (self.folder / "broken_videos.txt").write_text("".join(f"{report}\n" for report in self.broken))


# ---- from frames to a clip ----


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The source of all randomness of one sample: independent for every (seed, epoch, index).

    Below 0 are an epoch's order of samples (index -1), the masks of pictures (epoch -1), and of process R what is
    drawn on the device (index -2 - R): drop path, mixup.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def pick_below(count: int, generator: torch.Generator) -> int:
    """A uniform whole number in [0, count)."""
    return int(torch.randint(count, (), generator=generator))
