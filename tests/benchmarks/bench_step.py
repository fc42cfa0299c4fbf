"""A step of this project's models against transformers' VideoMAE with sdpa: same numerics, same machine, one run.

    python tests/benchmarks/bench_step.py                                   # pre-training: CPU, ViT-B, batch 4, one thread, float32 and bf16
    python tests/benchmarks/bench_step.py --of finetune --batch 2           # a fine-tuning step
    python tests/benchmarks/bench_step.py --of forward --batch 2            # the classifier's forward pass, as in testing
    python tests/benchmarks/bench_step.py --of finetune --batch 2 --recompute # ours with run.recompute: less memory, more time
    python tests/benchmarks/bench_step.py --device cuda --size S B L --batch 16 --numerics bf16 --compile --depths 1 2 4 8

Interleaved; ratios are medians of paired runs, first on each line. Memory is measured in a process of its own for each model.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scale import empty_batch, forward_flops

import data
import finetune
import masking
import pretrain
from model import SIZES, VideoClassifier, VideoMAE, recompute_blocks
from support.config import load_config


def ours(a: argparse.Namespace, size: str, depth: int):
    if a.of == "pretrain":
        model = VideoMAE(**SIZES[size], decoder_depth=depth).to(a.device)
        groups, betas = pretrain.parameter_groups(model, 0.05), (0.9, 0.95)
    else:
        sizes = {name: SIZES[size][name] for name in ("width", "depth", "heads")}
        model = VideoClassifier(**sizes, classes=400).to(a.device)
        groups, betas = finetune.parameter_groups(model, 0.75, 0.05), (0.9, 0.999)
    if a.recompute:
        recompute_blocks(model)
    objective = pretrain.Objective(load_config(pretrain.DEFAULT, [str(pretrain.CONFIGS / "k400_base.yaml")]))
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=betas, fused=True)
    predict, loss_of = (torch.compile(model), torch.compile(objective.loss)) if a.compile else (model, objective.loss)

    def step(frames, mask, visible, masked, targets, bf16):
        with torch.autocast(a.device, torch.bfloat16, enabled=bf16):
            clip = data.normalize(frames)
            prediction = predict(clip, visible, masked) if a.of == "pretrain" else predict(clip)
        if a.of == "forward":
            return
        loss = loss_of(prediction, frames, masked) if a.of == "pretrain" else F.cross_entropy(prediction.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_sdpa(a: argparse.Namespace, size: str, depth: int):
    import transformers

    o = SIZES[size]
    config = transformers.VideoMAEConfig(
        hidden_size=o["width"], num_hidden_layers=o["depth"], num_attention_heads=o["heads"], intermediate_size=4 * o["width"],
        decoder_hidden_size=o["decoder_width"], decoder_num_hidden_layers=depth, decoder_num_attention_heads=o["decoder_heads"],
        decoder_intermediate_size=4 * o["decoder_width"], use_mean_pooling=a.of != "pretrain", layer_norm_eps=1e-6, num_labels=400,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = (transformers.VideoMAEForPreTraining if a.of == "pretrain" else transformers.VideoMAEForVideoClassification)(config).to(a.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=a.device == "cuda")
    predict = torch.compile(model) if a.compile else model

    def step(frames, mask, visible, masked, targets, bf16):
        with torch.autocast(a.device, torch.bfloat16, enabled=bf16):
            clip = data.normalize(frames).transpose(1, 2)
            output = predict(clip, bool_masked_pos=mask) if a.of == "pretrain" else predict(clip)
        if a.of == "forward":
            return
        loss = output.loss if a.of == "pretrain" else F.cross_entropy(output.logits.float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


BUILDERS = {"ours": ours, "transformers": transformers_sdpa}


def batch_of(size: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (size, 16, 3, 224, 224), dtype=torch.uint8, generator=generator)
    mask = torch.stack([masking.tube_mask((8, 14, 14), 0.9, generator) for _ in range(size)])
    visible, masked = map(torch.stack, zip(*map(masking.split, mask)))
    targets = torch.rand(size, 400, generator=generator).softmax(dim=1)
    return tuple(x.to(device) for x in (frames, mask, visible, masked, targets))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(name: str, a: argparse.Namespace, size: str, depth: int, bf16: bool) -> float:
    """GB that two steps take at their peak, in a fresh process: resident on a CPU, allocated by tensors on a GPU."""
    arguments = [name, size, depth, bf16, vars(a)]
    return float(subprocess.run([sys.executable, __file__, "--memory-of", json.dumps(arguments)], check=True, capture_output=True, text=True).stdout)


def measure_memory(arguments: str) -> None:
    name, size, depth, bf16, options = json.loads(arguments)
    a = argparse.Namespace(**options)
    torch.set_num_threads(a.threads)
    step, inputs = BUILDERS[name](a, size, depth), batch_of(a.batch, a.device)
    with torch.set_grad_enabled(a.of != "forward"):
        for _ in range(2):
            step(*inputs, bf16)
    # VmHWM and not getrusage, which would count what the parent process had before it started this one
    used = torch.cuda.max_memory_allocated() if a.device == "cuda" else 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print(used / 1e9)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the most that this machine gives."""
    a, b = (torch.randn(4096 if device == "cuda" else 2048, 4096 if device == "cuda" else 2048, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * a.shape[0] ** 3 / statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="pretrain", choices=["pretrain", "finetune", "forward"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", nargs="+", default=["B"], choices=list(SIZES))
    parser.add_argument("--depths", nargs="+", type=int, default=[4], help="decoder blocks, Table 1a")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--numerics", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory_of:
        return measure_memory(a.memory_of)
    torch.set_num_threads(a.threads)
    machine = torch.cuda.get_device_name() if a.device == "cuda" else f"{a.threads} CPU thread(s)"
    torch.set_grad_enabled(a.of != "forward")
    print(f"{a.of}: torch {torch.__version__}, {machine}; batch {a.batch} of 16 x 224 x 224; compile {a.compile}")
    for size in a.size:
        for depth in a.depths if a.of == "pretrain" else a.depths[:1]:
            inputs = batch_of(a.batch, a.device)
            steps = {name: BUILDERS[name](a, size, depth) for name in BUILDERS}
            for numerics in a.numerics:
                bf16 = numerics == "bf16"
                seconds: dict[str, list[float]] = {name: [] for name in steps}
                rates = []
                for repeat in range(a.repeats + 1):
                    for name in list(steps)[:: 1 if repeat % 2 else -1]:
                        synchronize(a.device)
                        start = time.perf_counter()
                        steps[name](*inputs, bf16)
                        synchronize(a.device)
                        if repeat:  # the first is for warming up
                            seconds[name].append(time.perf_counter() - start)
                    rates.append(matmul_rate(a.device, torch.bfloat16 if bf16 else torch.float32))
                ratios = [t / o for t, o in zip(seconds["transformers"], seconds["ours"])]
                quartiles = statistics.quantiles(ratios, n=4)
                median = {name: statistics.median(times) for name, times in seconds.items()}
                with torch.device("meta"):
                    model = VideoMAE(**SIZES[size], decoder_depth=depth)
                    part, positions = (model, (160, 1408)) if a.of == "pretrain" else (model.encoder, ())
                    flops = forward_flops(part, *empty_batch(1, (16, 224, 224), positions))
                flops *= a.batch * (1 if a.of == "forward" else 3)  # forward + backward = 3 x forward; no recomputation counted
                peak = statistics.median(rates)
                print(
                    f"ViT-{size}{f', {depth} decoder blocks' if a.of == 'pretrain' else ''}, {numerics}: {statistics.median(ratios):.2f} times transformers "
                    f"(quartiles {quartiles[0]:.2f} to {quartiles[2]:.2f}, {len(ratios)} pairs); {median['ours']:.3f} against {median['transformers']:.3f} s a step, "
                    f"{a.batch / median['ours']:.1f} clips/s; "
                    f"{flops / 1e9:.0f} GFLOP a step at {flops / median['ours'] / 1e12:.3f} TFLOP/s = {flops / median['ours'] / peak:.0%} of a matrix product's {peak / 1e12:.3f}",
                    flush=True,
                )
                memory = {name: peak_memory(name, a, size, depth, bf16) for name in steps}
                print(f"    peak memory {memory['ours']:.2f} against {memory['transformers']:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
