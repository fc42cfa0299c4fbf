"""Time pre-training steps of one process against two, each with one thread and its own clips, through torchrun.

    python -m tools.bench_scaling configs/pretrain/k400_small.yaml run.batch_per_device=2

Efficiency is the time of one process's step over that of two, which do twice the work: 1 would be perfect. Two
processes that exchange no gradients tell what the machine itself costs. Every round starts new processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.config import parse
from support.processes import launch, start_processes
from tools.bench_step import measure, ours, read_recipe, speedup

WAYS = {"one": 1, "two": 2, "two, no exchange": 2}  # processes


def train(config: SimpleNamespace, way: str, steps: int) -> None:
    """Train in one of the processes. Rank 0 prints the median seconds of a step."""
    processes = start_processes(config.run.precision)
    torch.manual_seed(0)
    model, loss = ours(config, processes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    network = model if way == "one" else DistributedDataParallel(model, gradient_as_bucket_view=True)
    seconds = []
    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        with network.no_sync() if way == "two, no exchange" else nullcontext():
            with processes.autocast():
                value = loss(network)
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if processes.rank == 0:
        print(json.dumps(statistics.median(seconds[1:])))  # the first is for warming up


def run_processes(way: str, number: int) -> float:
    """Return the seconds of a step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WAYS[way]}"]
    command = [*launcher, "-m", "tools.bench_scaling", *sys.argv[1:], "--way", way]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parse(parser)
    config = read_recipe(options.settings)
    if options.way:
        return train(config, options.way, options.steps)
    seconds = measure({way: partial(run_processes, way) for way in WAYS}, options.rounds)
    for way, processes in WAYS.items():
        median, clips = statistics.median(seconds[way]), processes * config.run.batch_per_device
        print(
            f"ViT-{config.model.size}, {way}: {median:.3f} s a step of {clips} clips, {clips / median:.2f} clips/s; "
            f"efficiency {speedup(seconds, way, 'one')}"
        )


if __name__ == "__main__":
    launch(main)
