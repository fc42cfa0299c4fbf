"""A step of this project's models against transformers' VideoMAE with sdpa: same precision, same machine, one run.

    python tests/benchmarks/bench_step.py                                     # pre-training of ViT-B on a CPU
    python tests/benchmarks/bench_step.py --of finetune --batch 2             # a fine-tuning step
    python tests/benchmarks/bench_step.py --of forward --batch 2              # the classifier's forward pass
    python tests/benchmarks/bench_step.py --of finetune --batch 2 --recompute # ours with activation checkpointing
    python tests/benchmarks/bench_step.py --decoder-ratio 0.5                 # ours with half the decoder against ours
    python tests/benchmarks/bench_step.py --device cuda --size S B L --batch 16 --precision bf16 --compile --depths 1 4

Interleaved; ratios are medians of pairs, first on each line. Memory is measured in a process of its own for each model.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from interleaved import measure, quartiles, ratios
from scale import CONFIGS, empty_batch, forward_flops, load_recipe
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

import data
import masking
import pretrain
from model import SIZES, VideoClassifier, VideoMAE, checkpoint_activations, parameter_groups

Step = Callable[[tuple[Tensor, ...], bool], None]  # of a batch, in bf16 or not


def pretraining(size: str, depth: int, device: str) -> tuple[VideoMAE, pretrain.Objective, torch.optim.Optimizer]:
    model = VideoMAE(**SIZES[size], decoder_depth=depth).to(device)
    objective = pretrain.Objective(load_recipe(CONFIGS / "pretrain" / "k400_base.yaml"))
    groups = parameter_groups(model, 0.05)
    return model, objective, torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)


def finetuning(size: str, device: str) -> tuple[VideoClassifier, torch.optim.Optimizer]:
    sizes = {name: SIZES[size][name] for name in ("width", "depth", "heads")}
    model = VideoClassifier(**sizes, classes=400).to(device)
    groups = parameter_groups(model, 0.05, 0.75)
    return model, torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.999), fused=True)


def ours(options: argparse.Namespace, size: str, depth: int) -> Step:
    objective, on_device = None, options.device
    if options.of == "pretrain":
        model, objective, optimizer = pretraining(size, depth, on_device)
    else:
        model, optimizer = finetuning(size, on_device)
    if options.recompute:
        checkpoint_activations(model)
    predict = torch.compile(model) if options.compile else model
    loss_of = objective.loss if objective else F.cross_entropy
    loss_of = torch.compile(loss_of) if options.compile and objective else loss_of

    def step(batch: tuple[Tensor, ...], bf16: bool) -> None:
        frames, _, visible, masked, targets = batch
        with torch.autocast(on_device, torch.bfloat16, enabled=bf16):
            clip = data.normalize(frames)
            prediction = predict(clip, visible, masked) if objective else predict(clip)
        if options.of != "forward":
            loss = loss_of(prediction, frames, masked) if objective else loss_of(prediction.float(), targets)
            update(loss, optimizer)

    return step


def transformers_sdpa(options: argparse.Namespace, size: str, depth: int) -> Step:
    import transformers

    sizes = SIZES[size]
    config = transformers.VideoMAEConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["width"],
        decoder_hidden_size=sizes["decoder_width"],
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=sizes["decoder_heads"],
        decoder_intermediate_size=4 * sizes["decoder_width"],
        use_mean_pooling=options.of != "pretrain",
        layer_norm_eps=1e-6,
        num_labels=400,
        attn_implementation="sdpa",
    )
    pretrains = options.of == "pretrain"
    kind = transformers.VideoMAEForPreTraining if pretrains else transformers.VideoMAEForVideoClassification
    model = kind(config).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=options.device == "cuda")
    predict = torch.compile(model) if options.compile else model

    def step(batch: tuple[Tensor, ...], bf16: bool) -> None:
        frames, mask, _, _, targets = batch
        with torch.autocast(options.device, torch.bfloat16, enabled=bf16):
            clip = data.normalize(frames).transpose(1, 2)
            output = predict(clip, bool_masked_pos=mask) if pretrains else predict(clip)
        if options.of != "forward":
            update(output.loss if pretrains else F.cross_entropy(output.logits.float(), targets), optimizer)

    return step


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


BUILDERS = {"ours": ours, "transformers": transformers_sdpa, "decoder_ratio=0": ours}


def batch_of(size: int, device: str, decoder_ratio: float = 0) -> tuple[Tensor, ...]:
    """Frames, mask, positions of visible and of masked tokens, and targets of `size` clips of 16 x 224 x 224."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (size, 16, 3, 224, 224), dtype=torch.uint8, generator=generator)
    mask = torch.stack([masking.tube_mask((8, 14, 14), 0.9, generator) for _ in range(size)])
    visible, masked = map(torch.stack, zip(*map(masking.split, mask), strict=True))
    masked = torch.stack([masking.running_cells(row, (8, 14, 14), decoder_ratio, generator) for row in masked])
    targets = torch.rand(size, 400, generator=generator).softmax(dim=1)
    return tuple(x.to(device) for x in (frames, mask, visible, masked, targets))


def ratio_of(name: str, options: argparse.Namespace) -> float:
    """mask.decoder_ratio of one of BUILDERS."""
    return options.decoder_ratio if name == "ours" else 0


def timed(function: Callable[[], None], device: str) -> float:
    """Seconds of a call, to the end of what it starts on a GPU."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def peak_memory(name: str, options: argparse.Namespace, size: str, depth: int, bf16: bool) -> float:
    """GB that two steps take at their peak, in a new process: resident on a CPU, allocated by tensors on a GPU."""
    command = [sys.executable, __file__, "--memory-of", json.dumps([name, size, depth, bf16, vars(options)])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(arguments: str) -> None:
    name, size, depth, bf16, options = json.loads(arguments)
    options = argparse.Namespace(**options)
    torch.set_num_threads(options.threads)
    step, batch = BUILDERS[name](options, size, depth), batch_of(options.batch, options.device, ratio_of(name, options))
    with torch.set_grad_enabled(options.of != "forward"):
        for _ in range(2):
            step(batch, bf16)
    if options.device == "cuda":
        used = torch.cuda.max_memory_allocated()
    else:  # VmHWM and not getrusage, which would count what the parent process had before it started this one
        used = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(used / 1e9)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the most that this machine reaches."""
    side = 4096 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(6))


def step_flops(options: argparse.Namespace, size: str, depth: int) -> int:
    """Forward and backward are three times forward; what is computed again does not count."""
    with torch.device("meta"):
        model: nn.Module = VideoMAE(**SIZES[size], decoder_depth=depth)
        positions = (160, round((1 - options.decoder_ratio) * 1408))
        model, positions = (model, positions) if options.of == "pretrain" else (model.encoder, ())
        flops = forward_flops(model, *empty_batch(1, (16, 224, 224), positions))
    return flops * options.batch * (1 if options.of == "forward" else 3)


def compare(options: argparse.Namespace, size: str, depth: int, precision: str) -> None:
    """Print speed and memory of one model in one precision."""
    bf16, other = precision == "bf16", "decoder_ratio=0" if options.decoder_ratio else "transformers"
    steps = {name: BUILDERS[name](options, size, depth) for name in ("ours", other)}
    batches = {name: batch_of(options.batch, options.device, ratio_of(name, options)) for name in steps}
    rates = []

    def way(name: str, number: int) -> float:
        if name == "ours" and number:
            rates.append(matmul_rate(options.device, torch.bfloat16 if bf16 else torch.float32))
        return timed(lambda: steps[name](batches[name], bf16), options.device)

    seconds = measure({name: partial(way, name) for name in steps}, options.repeats)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    flops, peak = step_flops(options, size, depth), statistics.median(rates)
    name = f"ViT-{size}, {depth} decoder blocks" if options.of == "pretrain" else f"ViT-{size}"
    print(
        f"{name}, {precision}: {quartiles(ratios(seconds, 'ours', other))} times as fast as {other}; "
        f"{median['ours']:.3f} against {median[other]:.3f} s a step, "
        f"{options.batch / median['ours']:.1f} clips/s; {flops / 1e9:.0f} GFLOP a step at "
        f"{flops / median['ours'] / 1e12:.3f} TFLOP/s = {flops / median['ours'] / peak:.0%} of a matrix product's "
        f"{peak / 1e12:.3f}",
        flush=True,
    )
    memory = [peak_memory(name, options, size, depth, bf16) for name in steps]
    print(f"    peak memory {memory[0]:.2f} against {memory[1]:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="pretrain", choices=["pretrain", "finetune", "forward"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", nargs="+", default=["B"], choices=list(SIZES))
    parser.add_argument("--depths", nargs="+", type=int, default=[4], help="decoder blocks, Table 1a")
    parser.add_argument("--decoder-ratio", type=float, default=0, help="mask.decoder_ratio, compared with 0")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        return measure_memory(options.memory_of)
    torch.set_num_threads(options.threads)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU thread(s)"
    torch.set_grad_enabled(options.of != "forward")
    what = f"batch {options.batch} of 16 x 224 x 224; compile {options.compile}"
    print(f"{options.of}: torch {torch.__version__}, {machine}; {what}")
    for size in options.size:
        for depth in options.depths if options.of == "pretrain" else options.depths[:1]:
            for precision in options.precision:
                compare(options, size, depth, precision)


if __name__ == "__main__":
    main()
