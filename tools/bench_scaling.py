"""Time pre-training steps of one process against two, each with one thread and its own clips, through torchrun.

    python -m tools.bench_scaling                        # ViT-S, 16 x 224 x 224, two clips per process, gloo
    python -m tools.bench_scaling --size B --batch 4

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

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from model import SIZES
from support.processes import launch
from tools.bench_step import make_batch, measure, pretraining, speedup

WAYS = {"one": 1, "two": 2, "two, no exchange": 2}  # processes


def train(options: argparse.Namespace) -> None:
    """Train in one of the processes. Rank 0 prints the median seconds of a step."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, objective = pretraining(options.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    network = model
    if options.way != "one":
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    frames, _, visible, masked, _ = make_batch(options.batch)
    seconds = []
    for _ in range(options.steps + 1):
        dist.barrier()
        start = time.perf_counter()
        with network.no_sync() if options.way == "two, no exchange" else nullcontext():
            prediction = network(data.normalize(frames), visible, masked)
            objective.loss(prediction, frames, masked).backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
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
    parser.add_argument("--size", default="S", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=2, help="clips in each process")
    parser.add_argument("--steps", type=int, default=4, help="in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return train(options)
    seconds = measure({way: partial(run_processes, way) for way in WAYS}, options.rounds)
    for way, processes in WAYS.items():
        median = statistics.median(seconds[way])
        clips = processes * options.batch
        print(
            f"ViT-{options.size}, {way}: {median:.3f} s a step of {clips} clips, {clips / median:.2f} clips/s; "
            f"efficiency {speedup(seconds, way, 'one')}"
        )


if __name__ == "__main__":
    launch(main)
