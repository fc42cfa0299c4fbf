"""Pre-training steps of one process against two, each with one thread and its own clips, through torchrun and gloo as in pretrain.py.

    python tests/benchmarks/bench_scaling.py                        # ViT-S, 16 x 224 x 224, two clips on each process
    python tests/benchmarks/bench_scaling.py --size B --accumulation 8

Efficiency is the time of one process's step over that of two, which do twice the work: 1 would be perfect. Two processes
that exchange no gradients tell what the machine itself takes away. Medians of interleaved rounds, each of new processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from bench_step import batch_of
from torch.nn.parallel import DistributedDataParallel

import data
import pretrain
import support.config
import support.run
from model import SIZES, VideoMAE

WAYS = {"one": 1, "two": 2, "two, no exchange": 2}


def train(a: argparse.Namespace) -> None:
    """One of the processes: the first prints the median seconds of a step."""
    rank, world_size, device = support.run.start_processes(0)
    torch.manual_seed(0)
    model = VideoMAE(**SIZES[a.size], decoder_depth=4).to(device)
    objective = pretrain.Objective(support.config.load_config(pretrain.DEFAULT, [str(pretrain.CONFIGS / "k400_base.yaml")]))
    optimizer = torch.optim.AdamW(pretrain.parameter_groups(model, 0.05), lr=1e-5, betas=(0.9, 0.95), fused=True)
    predict = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False) if world_size > 1 else model
    frames, _, visible, masked, _ = batch_of(a.batch, device.type)
    seconds = []
    for _ in range(a.steps + 1):
        dist.barrier()
        start = time.perf_counter()
        for piece in range(a.accumulation):
            alone = world_size > 1 and (piece < a.accumulation - 1 or a.way == "two, no exchange")
            with predict.no_sync() if alone else nullcontext():
                prediction = predict(data.normalize(frames), visible, masked)
                (objective.loss(prediction, frames, masked) / a.accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        print(json.dumps(statistics.median(seconds[1:])))  # the first is for warming up
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=2, help="clips at a time on each process")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.way:
        return train(a)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(a.rounds):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WAYS[way]}"]
            command = [*launcher, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True)
            seconds[way].append(json.loads(done.stdout.splitlines()[-1]))
    for way, processes in WAYS.items():
        median, efficiency = statistics.median(seconds[way]), sorted(one / this for one, this in zip(seconds["one"], seconds[way]))
        clips = processes * a.batch * a.accumulation
        quartiles = statistics.quantiles(efficiency, n=4) if a.rounds > 1 else efficiency * 3
        print(
            f"ViT-{a.size}, {way}: {median:.3f} s a step of {clips} clips, {clips / median:.2f} clips/s; "
            f"efficiency {statistics.median(efficiency):.2f} (quartiles {quartiles[0]:.2f} to {quartiles[2]:.2f}, {a.rounds} rounds)"
        )


if __name__ == "__main__":
    main()
