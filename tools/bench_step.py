"""Time a step of this project's models against transformers' VideoMAE with sdpa, in turns, on the same machine.

    python -m tools.bench_step                                      # pre-training of ViT-B in float32 on a CPU
    python -m tools.bench_step --of finetune --batch 1              # a fine-tuning step
    python -m tools.bench_step --of forward --batch 2               # the classifier's forward pass
    python -m tools.bench_step --decoder-ratio 0.5                  # half the decoder against all of it
    python -m tools.bench_step --device cuda --batch 16 --precision bf16 --compile

The ratio is the median of pairs. Memory is measured in a process of its own for each model.
"""

import argparse
import importlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import masking
import pretrain
from model import SIZES, VideoClassifier, VideoMAE, encoder_size
from support.config import UserError
from support.processes import launch
from tools.scale import CONFIGS, empty_batch, forward_flops, load_recipe

# ---- for all benchmarks ----


def require(name: str) -> ModuleType:
    """Import a package that only a benchmark needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this benchmark compares with {name}, which is not installed: pip install {name}") from None


def measure(ways: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, in alternating order: other load on the machine hits all alike.

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


def make_batch(clips: int, decoder_ratio: float = 0) -> tuple[Tensor, ...]:
    """Return frames, mask, positions of visible and of masked tokens, and targets of clips of 16 x 224 x 224."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (clips, 16, 3, 224, 224), dtype=torch.uint8, generator=generator)
    mask = torch.stack([masking.tube_mask((8, 14, 14), 0.9, generator) for _ in range(clips)])
    visible, masked = map(torch.stack, zip(*map(masking.split, mask), strict=True))
    masked = torch.stack([masking.running_cells(row, (8, 14, 14), decoder_ratio, generator) for row in masked])
    targets = torch.rand(clips, 400, generator=generator).softmax(dim=1)
    return frames, mask, visible, masked, targets


def pretraining(size: str) -> tuple[VideoMAE, pretrain.Objective]:
    return VideoMAE(**SIZES[size], decoder_depth=4), pretrain.Objective(
        load_recipe(CONFIGS / "pretrain/k400_base.yaml")
    )


def ours(options: argparse.Namespace, batch: list[Tensor]) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return this project's model, and a function that returns the loss of the batch."""
    frames, _, visible, masked, targets = batch
    if options.of == "pretrain":
        model, objective = pretraining(options.size)
        objective_loss = torch.compile(objective.loss, disable=not options.compile)
    else:
        model = VideoClassifier(**encoder_size(options.size), classes=400)
    network = torch.compile(model.to(options.device), disable=not options.compile)

    def loss() -> Tensor:
        if options.of == "pretrain":
            return objective_loss(network(data.normalize(frames), visible, masked), frames, masked)
        return F.cross_entropy(network(data.normalize(frames)), targets)

    return model, loss


def transformers_sdpa(options: argparse.Namespace, batch: list[Tensor]) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return transformers' model, and a function that returns the loss of the batch."""
    transformers = require("transformers")
    size = SIZES[options.size]
    config = transformers.VideoMAEConfig(
        hidden_size=size["width"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["heads"],
        intermediate_size=4 * size["width"],
        decoder_hidden_size=size["decoder_width"],
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=size["decoder_heads"],
        decoder_intermediate_size=4 * size["decoder_width"],
        use_mean_pooling=options.of != "pretrain",
        layer_norm_eps=1e-6,
        num_labels=400,
        attn_implementation="sdpa",
    )
    frames, mask, _, _, targets = batch
    pretrains = options.of == "pretrain"
    kind = transformers.VideoMAEForPreTraining if pretrains else transformers.VideoMAEForVideoClassification
    model = kind(config).to(options.device)
    network = torch.compile(model, disable=not options.compile)

    def loss() -> Tensor:
        clips = data.normalize(frames).transpose(1, 2)
        if pretrains:
            return network(clips, bool_masked_pos=mask).loss
        return F.cross_entropy(network(clips).logits, targets)

    return model, loss


def build_step(name: str, options: argparse.Namespace) -> Callable[[], None]:
    """Return a training step, or a forward pass, of "ours", "transformers", or "decoder_ratio=0": all of ours."""
    batch = [x.to(options.device) for x in make_batch(options.batch, options.decoder_ratio if name == "ours" else 0)]
    model, loss = (transformers_sdpa if name == "transformers" else ours)(options, batch)
    fused = name != "transformers" or options.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            value = loss()
        if options.of != "forward":
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


# ---- what is measured ----


def timed(function: Callable[[], object], device: str) -> float:
    """Return the seconds of a call, to the end of what it starts on a GPU."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def print_peak_memory(name: str, options: argparse.Namespace) -> None:
    """Print the GB that two steps take at their peak: resident on a CPU, allocated by tensors on a GPU."""
    step = build_step(name, options)
    for _ in range(2):
        step()
    if options.device == "cuda":
        used = torch.cuda.max_memory_allocated()
    else:  # VmHWM and not getrusage, which would count what the parent process had before it started this one
        used = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(f"{used / 1e9:.2f}")


def matmul_rate(options: argparse.Namespace) -> float:
    """Return the FLOP/s of a large matrix product: the most that this machine reaches."""
    side = 4096 if options.device == "cuda" else 2048
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=options.device, dtype=dtype)
    return 2 * side**3 / statistics.median(timed(lambda: a @ a, options.device) for _ in range(6))


def step_flops(options: argparse.Namespace) -> int:
    """Return the FLOPs of a step: forward, and twice as much backward."""
    with torch.device("meta"):
        model, _ = pretraining(options.size)
        inputs = empty_batch(1, (16, 224, 224), (160, round((1 - options.decoder_ratio) * 1408)))
        if options.of != "pretrain":
            model, inputs = model.encoder, inputs[:1]
        return forward_flops(model, *inputs) * options.batch * (1 if options.of == "forward" else 3)


def compare(options: argparse.Namespace) -> None:
    """Print speed and memory of both models."""
    other = "decoder_ratio=0" if options.decoder_ratio else "transformers"
    steps = {name: build_step(name, options) for name in ("ours", other)}
    ways = {name: lambda _, step=step: timed(step, options.device) for name, step in steps.items()}
    seconds = measure(ways, options.repeats)
    first, second = (statistics.median(times) for times in seconds.values())
    print(
        f"ViT-{options.size}, {options.precision}: {speedup(seconds, 'ours', other)} times as fast as {other}; "
        f"{first:.3f} against {second:.3f} s a step, {options.batch / first:.1f} clips/s"
    )
    flops, peak = step_flops(options), matmul_rate(options)
    what = f"{flops / 1e9:.0f} GFLOP a step at {flops / first / 1e12:.3f} TFLOP/s"
    print(f"    {what} = {flops / first / peak:.0%} of a matrix product's {peak / 1e12:.3f}", flush=True)
    command = [sys.executable, "-m", "tools.bench_step", *sys.argv[1:], "--memory-of"]
    memory = [subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout for name in steps]
    print(f"    peak memory {memory[0].strip()} against {memory[1].strip()} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="pretrain", choices=["pretrain", "finetune", "forward"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="B", choices=list(SIZES))
    parser.add_argument("--decoder-ratio", type=float, default=0, help="mask.decoder_ratio, compared with 0")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="both models through torch.compile")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(options.of != "forward")
    if options.memory_of:
        return print_peak_memory(options.memory_of, options)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "one CPU thread"
    print(f"{options.of}: torch {torch.__version__}, {machine}; batch {options.batch} of 16 x 224 x 224")
    compare(options)


if __name__ == "__main__":
    launch(main)
