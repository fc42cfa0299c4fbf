"""Time a step of this project's models against transformers' VideoMAE with sdpa, in turns, on the same device.

    python -m tools.bench_step                                                # pre-training of ViT-B, batch 4
    python -m tools.bench_step configs/finetune/k400_base.yaml run.batch_per_device=1
    python -m tools.bench_step configs/finetune/k400_base.yaml run.batch_per_device=2 --forward
    python -m tools.bench_step mask.decoder_ratio=0.5                         # half the decoder against all of it
    python -m tools.bench_step run.batch_per_device=16 run.precision=bf16 run.compile=always
    python -m tools.bench_step configs/pretrain/k400_small.yaml run.batch_per_device=2 --scaling --repeats 3

Model, batch and precision are those of a recipe. A CPU computes with one thread. The ratio is the median of pairs.
Memory is measured in a process of its own for each model.

--scaling times one process against two, each with its own clips. Efficiency is the time of one process's step over
that of two, which do twice the work: 1 would be perfect. Two processes that exchange no gradients tell what the machine
itself costs. Every round starts new processes.
"""

import argparse
import importlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import masking
import pretrain
from model import SIZES, checkpoint_activations, cube_grid
from support.config import UserError, parse
from support.processes import Processes, compiler, launch, start_processes
from tools.scale import CONFIGS, build, load_recipe

SCALING = {"one": 1, "two": 2, "two, no exchange": 2}  # processes

# ---- for all benchmarks ----


def require(name: str) -> ModuleType:
    """Import a package that only a benchmark needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this benchmark compares with {name}, which is not installed: pip install {name}") from None


def measure(ways: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round. Their order alternates, so that other load affects all alike.

    A way takes the number of the round and returns the seconds that it took. Round 0 comes first and does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            taken = ways[name](number)
            if number:
                seconds[name].append(taken)
    return seconds


def speedup(seconds: dict[str, list[float]], way: str, other: str) -> str:
    """Return how many times as fast `way` was as `other`: the median of the rounds, and the quartiles."""
    ratios = [slow / fast for fast, slow in zip(seconds[way], seconds[other], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}, {len(ratios)} pairs)"


# ---- the steps ----


def read_recipe(settings: list[str]) -> SimpleNamespace:
    """Read the recipe that a command line names, with a batch of four."""
    files = [Path(word) for word in settings if "=" not in word] or [CONFIGS / "pretrain" / "k400_base.yaml"]
    return load_recipe(files[0], ["run.batch_per_device=4", *(word for word in settings if "=" in word)])


def make_batch(config: SimpleNamespace, device: torch.device) -> list[Tensor]:
    """Return frames, targets and, in pre-training, masks and the positions of visible and of masked tokens."""
    generator = torch.Generator().manual_seed(0)
    clips, frames, size = config.run.batch_per_device, config.data.frames, config.data.size
    batch = [torch.randint(0, 256, (clips, frames, 3, size, size), dtype=torch.uint8, generator=generator)]
    batch.append(torch.rand(clips, 400, generator=generator).softmax(dim=1))
    if hasattr(config, "mask"):
        grid = cube_grid((frames, size, size), config.model.cube)
        mask = torch.stack([masking.tube_mask(grid, config.mask.ratio, generator) for _ in range(clips)])
        visible, masked = map(torch.stack, zip(*map(masking.split, mask), strict=True))
        cells = [masking.running_cells(row, grid, config.mask.decoder_ratio, generator) for row in masked]
        batch += [mask, visible, torch.stack(cells)]
    return [tensor.to(device) for tensor in batch]


def ours(config: SimpleNamespace, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return this project's model, and a function from the model, perhaps compiled or replicated, to its loss."""
    frames, targets, *positions = make_batch(config, device)
    model, _ = build(config, device)
    if config.run.recompute:
        checkpoint_activations(model)
    if not positions:
        return model, lambda network: F.cross_entropy(network(data.normalize(frames)), targets)
    _, visible, masked = positions
    loss = compiler(config.run.compile, device)(pretrain.Objective(config).loss)
    return model, lambda network: loss(network(data.normalize(frames), visible, masked), frames, masked)


def transformers_sdpa(config: SimpleNamespace, device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return the same for transformers' model."""
    transformers = require("transformers")
    frames, targets, *positions = make_batch(config, device)
    size = SIZES[config.model.size]
    options = transformers.VideoMAEConfig(
        image_size=config.data.size,
        num_frames=config.data.frames,
        tubelet_size=config.model.cube[0],
        patch_size=config.model.cube[1],
        hidden_size=size["width"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["heads"],
        intermediate_size=4 * size["width"],
        decoder_hidden_size=size["decoder_width"],
        decoder_num_hidden_layers=getattr(config.model, "decoder_depth", 0),
        decoder_num_attention_heads=size["decoder_heads"],
        decoder_intermediate_size=4 * size["decoder_width"],
        use_mean_pooling=not positions,
        layer_norm_eps=1e-6,
        num_labels=400,
        attn_implementation="sdpa",
    )
    kind = transformers.VideoMAEForPreTraining if positions else transformers.VideoMAEForVideoClassification
    model = kind(options).to(device)
    if not positions:
        return model, lambda network: F.cross_entropy(network(data.normalize(frames).transpose(1, 2)).logits, targets)
    mask = positions[0]
    return model, lambda network: network(data.normalize(frames).transpose(1, 2), bool_masked_pos=mask).loss


def build_step(name: str, config: SimpleNamespace, forward: bool, processes: Processes) -> Callable[[], None]:
    """Return a training step, or a forward pass, of a model.

    name: "transformers", "ours", "all" (ours with the whole decoder), or a key of SCALING (ours in parallel).
    """
    if name == "all":
        config = SimpleNamespace(**vars(config) | dict(mask=SimpleNamespace(ratio=config.mask.ratio, decoder_ratio=0)))
    model, loss = (transformers_sdpa if name == "transformers" else ours)(config, processes.device)
    network = compiler(config.run.compile, processes.device)(model)
    if name.startswith("two"):
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    fused = name != "transformers" or processes.device.type == "cuda"  # its default
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=processes.dtype == torch.float16)  # as in training

    def step() -> None:
        with network.no_sync() if name == "two, no exchange" else nullcontext():
            with processes.autocast(), torch.set_grad_enabled(not forward):
                value = loss(network)
            if forward:
                return
            scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


# ---- what is measured ----


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, to the end of what it starts on a GPU."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> float:
    """Return the GB that this process took at its peak: resident on a CPU, allocated by tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # VmHWM and not getrusage, which would count what the parent process had before it started this one
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e9


def compare(config: SimpleNamespace, options: argparse.Namespace, processes: Processes) -> None:
    """Print speed and memory of both models."""
    names = ["ours", "transformers"]
    if hasattr(config, "mask") and config.mask.decoder_ratio:
        names = ["ours", "all"]
    steps = {name: build_step(name, config, options.forward, processes) for name in names}
    ways = {name: lambda number, step=step: timed(step, processes.device) for name, step in steps.items()}
    seconds = measure(ways, options.repeats)
    first, second = (statistics.median(times) for times in seconds.values())
    clips, dtype = config.run.batch_per_device, str(processes.dtype).removeprefix("torch.")
    print(
        f"ViT-{config.model.size}, {clips} clips, {dtype}: {speedup(seconds, *names)} times as fast as {names[1]}; "
        f"{first:.3f} against {second:.3f} s a step, {clips / first:.1f} clips/s",
        flush=True,
    )
    memory = [in_new_process(name) for name in names]
    print(f"    peak memory {memory[0]:.2f} against {memory[1]:.2f} GB")


def compare_scaling(config: SimpleNamespace, repeats: int) -> None:
    """Print the speed of one process and of two."""
    seconds = measure({way: lambda number, way=way: in_new_process(way, SCALING[way]) for way in SCALING}, repeats)
    for way, processes in SCALING.items():
        median, clips = statistics.median(seconds[way]), processes * config.run.batch_per_device
        print(
            f"ViT-{config.model.size}, {way}: {median:.3f} s a step of {clips} clips, {clips / median:.2f} clips/s; "
            f"efficiency {speedup(seconds, way, 'one')}"
        )


def in_new_process(name: str, count: int = 0) -> float:
    """Return what this command prints with `--child name`, in `count` processes through torchrun."""
    command = [sys.executable]
    if count:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += ["-m", "tools.bench_step", *sys.argv[1:], "--child", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def run_child(name: str, step: Callable[[], None], processes: Processes) -> None:
    """Print the median seconds of a step in one of several processes, else the peak memory of two steps."""
    if name not in SCALING:
        for _ in range(2):
            step()
        return print(peak_memory(processes.device))
    seconds = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if processes.rank == 0:
        print(statistics.median(seconds[1:]))  # the first is for warming up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--scaling", action="store_true", help="one process against two")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parse(parser)
    config = read_recipe(options.settings)
    if options.scaling and not options.child:
        return compare_scaling(config, options.repeats)
    processes = start_processes(config.run.precision)
    torch.set_num_threads(1)
    if options.child:
        return run_child(options.child, build_step(options.child, config, options.forward, processes), processes)
    print(f"torch {torch.__version__}, {processes.device}")
    compare(config, options, processes)


if __name__ == "__main__":
    launch(main)
