"""The processes of a command: how they start, communicate, are asked to stop, and end."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from support.config import UserError, pick

# Windows has no SIGUSR1.
STOP_SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGUSR1", "SIGINT")]


# ---- starting ----


@dataclass(frozen=True)
class Processes:
    """This process among the processes of a run, with its device and the precision of its matrix products."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Return a context in which matrix products have the precision that `run.precision` asks for."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def start_processes(precision: str, workers: int = 0) -> Processes:
    """Join the processes that torchrun has started, one per device; `python` starts a single one.

    precision: run.precision. workers: data.workers; without a GPU, a process leaves a core to each of them.
    """
    device = find_device()
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": fast_dtype(device)}
    dtype = pick(dtypes, precision, "run.precision")
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        torch.set_float32_matmul_precision("high")  # TF32
    elif "OMP_NUM_THREADS" not in os.environ:  # 15 to 20 % more clips/s on two cores
        torch.set_num_threads(max(1, torch.get_num_threads() - loader_workers(workers)))
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "gloo"
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device.type)}"
        dist.init_process_group(backend)
    # torch 2.14 deprecates an argument of DDP in favor of one that torch 2.11 does not have
    warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated", FutureWarning)
    if not dist.is_initialized():
        return Processes(0, 1, device, dtype)
    return Processes(dist.get_rank(), dist.get_world_size(), device, dtype)


def find_device() -> torch.device:
    """Return the accelerator of this process (CUDA, Apple's MPS, Intel's XPU), or the CPU.

    Each process of torchrun has its own. Raises UserError if there are more processes than devices.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if not accelerator:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.accelerator.device_count()
    if index >= count:
        raise UserError(f"there are {count} GPUs: give torchrun a smaller --nproc_per_node")
    return torch.device(accelerator.type, index)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 on GPUs, fp16 on NVIDIA's before Ampere, which emulate bf16, and float32 on CPUs."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def loader_workers(workers: int) -> int:
    """Return data.workers or, if it is -1, one less than the cores that each training process of the machine has.

    Without a GPU, -1 means 1: computing takes longer than loading.
    """
    if workers >= 0:
        return workers
    if not torch.accelerator.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


def compiler(setting: str, device: torch.device) -> Callable[[Any], Any]:
    """Return torch.compile, or a function that changes nothing. setting: run.compile."""
    automatic = device.type in ("cuda", "xpu")
    if pick({"auto": automatic, "always": True, "never": False}, setting, "run.compile"):
        return torch.compile
    return lambda function: function


# ---- communicating ----


def gather(items: list) -> list:
    """Return the lists of all processes, concatenated, on every process."""
    if not dist.is_initialized():
        return items
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def average(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


class StopSignals(AbstractContextManager):
    """Note ctrl-C and the signals by which a cluster's scheduler announces the end of a job.

    In the `with` statement a signal is only noted. At the end of each step, `requested` says which ones any of the
    processes got. Inside `at_once`, where there is nothing to save, a signal ends the process.
    """

    def __init__(self) -> None:
        self.noted: set[str] = set()
        self.immediate = False
        self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.noted.add(signal.Signals(number).name)
        if self.immediate:
            self._stop()

    def _stop(self) -> None:
        raise UserError(f"stopped by {' and '.join(sorted(self.noted))}: the same command resumes")

    def requested(self) -> str:
        """Return the names of the signals that any of the processes got, on every process; "" without any."""
        counts = torch.tensor([int(number.name in self.noted) for number in STOP_SIGNALS])
        if dist.is_initialized():
            dist.all_reduce(counts)
        return " and ".join(number.name for number, count in zip(STOP_SIGNALS, counts, strict=True) if count)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """End the process at the first signal, also at one that came before."""
        self.immediate = True
        if self.noted:
            self._stop()
        yield
        self.immediate = False


def ignore_signals(worker: int) -> None:
    """Ignore stop signals in a loader worker, which has to outlive the current step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ---- ending ----


def launch(main: Callable[[], None]) -> None:
    """Run a command. A mistake that the user can fix ends it with one sentence and a non-zero exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be valid UTF-8
    sentence = ""
    try:
        main()
    except KeyboardInterrupt:
        sentence = "interrupted: the same command resumes from the last checkpoint, if there is one"
    except (UserError, OSError, RuntimeError) as error:
        sentence = explain(error)
        if not sentence:
            raise
    finally:
        workers = multiprocessing.active_children()
        if workers and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report that they end
        for worker in workers:
            worker.kill()  # they ignore SIGTERM
    if sentence:
        _end_with(sentence)
    if dist.is_initialized():
        dist.destroy_process_group()


def explain(error: Exception) -> str:
    """Return the sentence that tells the user what to do about an error; "" if there is none."""
    if isinstance(error, UserError):
        return str(error).rpartition("UserError: ")[2].strip()  # one of a loader worker follows a traceback
    if isinstance(error, BrokenProcessPool):
        return "a process was killed, perhaps for lack of memory: make room, then the same command resumes"
    if isinstance(error, OSError):
        if error.filename:
            return f"{error}; give another path, or fix this one"  # e.g. permission is denied
        traceback.print_exc()
        return str(error)
    if lack := re.search(r"shared memory|ancdata|Too many open files", str(error)):
        advice = "set data.workers lower, or raise the limit (ulimit -n, or --shm-size of a container)"
        return f"the loader's workers lack shared memory or open files ({lack[0]}): {advice}"
    if re.search(r"DataLoader worker .* (is killed by signal|exited unexpectedly)", str(error)):
        return "a loader worker was killed, perhaps for lack of memory: set data.workers lower, then resume"
    return ""


def _end_with(sentence: str) -> None:
    """End the process with the sentence. torchrun, if it started this one, repeats it at the end of its report."""
    sentence = f"{Path(sys.argv[0]).name}: {sentence}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": details}}))
    sys.exit(sentence)
