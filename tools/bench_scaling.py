"""Pre-training steps of one process against two, each with one thread and its own clips, through torchrun and gloo.

    python tests/benchmarks/bench_scaling.py                        # ViT-S, 16 x 224 x 224, two clips per process
    python tests/benchmarks/bench_scaling.py --size B --accumulation 8

Efficiency is the time of one process's step over that of two, which do twice the work: 1 would be perfect. Two
processes that exchange no gradients tell what the machine itself costs. Interleaved rounds, each of new processes.
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
from pathlib import Path

import torch
import torch.distributed as dist
from bench_step import batch_of, pretraining
from interleaved import measure, quartiles, ratios
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

import data
from model import SIZES

WAYS = {"one": 1, "two": 2, "two, no exchange": 2}  # processes


def train(options: argparse.Namespace) -> None:
    """One of the processes. Rank 0 prints the median seconds of a step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(0)
    model, objective, optimizer = pretraining(options.size, 4, device)
    predict = model
    if dist.get_world_size() > 1:
        predict = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    frames, _, visible, masked, _ = batch_of(options.batch, device)
    seconds = []
    for _ in range(options.steps + 1):
        dist.barrier()
        start = time.perf_counter()
        for number in range(options.accumulation):
            alone = number < options.accumulation - 1 or options.way == "two, no exchange"
            with predict.no_sync() if alone and predict is not model else nullcontext():
                prediction = predict(data.normalize(frames), visible, masked)
                (objective.loss(prediction, frames, masked) / options.accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps(statistics.median(seconds[1:])))  # the first is for warming up
    dist.destroy_process_group()


def run_processes(way: str, number: int) -> float:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WAYS[way]}"]
    command = [*launcher, __file__, *sys.argv[1:], "--way", way]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=2, help="clips at a time in each process")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return train(options)
    seconds = measure({way: partial(run_processes, way) for way in WAYS}, options.rounds)
    for way, processes in WAYS.items():
        median, clips = statistics.median(seconds[way]), processes * options.batch * options.accumulation
        print(
            f"ViT-{options.size}, {way}: {median:.3f} s a step of {clips} clips, {clips / median:.2f} clips/s; "
            f"efficiency {quartiles(ratios(seconds, way, 'one'))}"
        )


if __name__ == "__main__":
    main()
