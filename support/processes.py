"""A command's processes: how they start, agree, stop and end; the device of each."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from support.config import UserError

STOP_SIGNALS = ("SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1


def launch(main: Callable[[], None]) -> None:
    """Run a command. A UserError, an OSError or ctrl-C ends it with one sentence and a non-zero exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:  # a loader worker's comes with its traceback, the sentence at the end
        _stop(str(error).rpartition("UserError: ")[2].strip())
    except OSError as error:
        if not error.filename:  # not about a path: show where it happened
            traceback.print_exc()
            _stop(str(error))
        _stop(f"{error}; give another path, or fix this one")  # a folder that is a file, no permission
    except BrokenProcessPool:
        _stop("a process was killed, perhaps for lack of memory: make room, then the same command resumes")
    except RuntimeError as error:
        if not (reason := re.search(r"shared memory|ancdata|Too many open files", str(error))):
            raise
        advice = "set data.workers lower, or raise the limit (ulimit -n, or --shm-size of a container)"
        _stop(f"the loader's workers lack shared memory or open files ({reason[0]}): {advice}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command resumes from the last checkpoint, if there is one")
    finally:
        workers = multiprocessing.active_children()
        if workers and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report their end
        for worker in workers:  # they ignore SIGTERM, by which Python would end them
            worker.kill()
    if dist.is_initialized():
        dist.destroy_process_group()


def _stop(sentence: str) -> None:
    """End the process with the sentence. torchrun, if it started this one, repeats it at the end of its report."""
    sentence = f"{Path(sys.argv[0]).name}: {sentence}"
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": details}}))
    sys.exit(sentence)


def gather(items: list) -> list:
    """The lists of all processes, concatenated, on every process."""
    if not dist.is_initialized():
        return items
    lists: list = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Collect the names of stop signals. A cluster's scheduler sends SIGTERM or SIGUSR1 before it ends a job."""
    numbers, told = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)], []
    before = [signal.signal(number, lambda number, _: told.append(signal.Signals(number).name)) for number in numbers]
    try:
        yield told
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Ignore stop signals in a loader worker, which has to outlive the current step."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def find_device() -> torch.device:
    """The accelerator of this process (CUDA, Apple's MPS, Intel's XPU), or the CPU.

    Each process of torchrun has its own. Raises UserError if there are more processes than devices.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if not accelerator:
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if index >= count:
        raise UserError(f"there are {count} GPUs: give torchrun a smaller --nproc_per_node")
    return torch.device(accelerator.type, index)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products are faster in bf16: on GPUs, except for NVIDIA's before Ampere, which only emulate it."""
    is_cuda = device.type == "cuda"
    return torch.cuda.is_bf16_supported(including_emulation=False) if is_cuda else device.type != "cpu"
