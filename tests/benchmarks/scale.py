"""The arithmetic of README's section "Scale": what each recipe costs and what bounds it. Nothing is timed, nothing is run.

    python tests/benchmarks/scale.py                                      # all recipes for pre-training, then the memory of those for fine-tuning
    python tests/benchmarks/scale.py --gpu A100 --gpus 8 --link 12.5      # other devices, one port of 100 Gbit/s for each machine

FLOPs count a multiply-accumulate twice, backward twice as much as forward, and nothing that is computed again.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import finetune
import masking
import pretrain
from model import SIZES, VideoClassifier, VideoMAE, recompute_blocks
from support.config import load_config

GPUS = {"H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s in NVIDIA's data sheets (SXM)
# Training videos, as said in Sec. 4.1; those of Kinetics-700 are not, but by its authors (Carreira et al., 2019)
VIDEOS = {"k400": 240_000, "ssv2": 169_000, "ucf101": 9_500, "hmdb51": 3_500, "k700": 545_000}


def forward_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of a forward pass; a training step takes three times as many."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def kept_for_backward(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes that autograd keeps between a forward and a backward pass, each piece of memory once, the weights not counted."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def empty_batch(clips: int, clip_size: tuple[int, int, int], positions: Sequence[int] = ()) -> list[Tensor]:
    """What a model is given: clips and, in pre-training, the positions of so many visible and so many masked tokens."""
    return [torch.empty(clips, 3, *clip_size), *(torch.empty(clips, count, dtype=torch.long) for count in positions)]


def shapes(config: SimpleNamespace) -> tuple[nn.Module, partial]:
    """The model that a recipe trains, without memory for its weights, and the function that makes a batch of so many clips."""
    clip_size = (config.data.frames, config.data.size, config.data.size)
    sizes = SIZES[config.model.size]
    with torch.device("meta"):
        if not hasattr(config, "mask"):
            encoder = {name: sizes[name] for name in ("width", "depth", "heads")}
            return VideoClassifier(**encoder, classes=400, clip_size=clip_size), partial(empty_batch, clip_size=clip_size)
        model = VideoMAE(**sizes, decoder_depth=config.model.decoder_depth, clip_size=clip_size)
    positions = [len(x) for x in masking.split(masking.tube_mask(model.grid, config.mask.ratio))]
    return model, partial(empty_batch, clip_size=clip_size, positions=positions)


def gigabytes(config: SimpleNamespace) -> tuple[float, float]:
    """Memory of training with `run.batch_per_device` clips in bf16 without and with recomputed blocks, but for what lives a moment only.

    Weights, gradients and AdamW's two moments in float32; the bf16 copies of the weights; what each clip keeps for the backward pass.
    """
    model, batch = shapes(config)
    state = 16 * sum(parameter.numel() for parameter in model.parameters())

    def total() -> float:
        one, two = (kept_for_backward(model, *batch(clips)) for clips in (1, 2))
        return (state + one + (config.run.batch_per_device - 1) * (two - one)) / 1e9

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")
        kept = total()
        recompute_blocks(model)
        return kept, total()


def print_pretraining(path: Path, a: argparse.Namespace) -> None:
    config = load_config(pretrain.DEFAULT, [str(path)])
    model, batch = shapes(config)
    with torch.device("meta"):
        flops = 3 * forward_flops(model, *batch(1))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    clips_per_second = a.share * GPUS[a.gpu] / flops
    hours = config.optim.epochs * VIDEOS[path.stem.split("_")[0]] / clips_per_second / 3600
    step = config.optim.batch_size / a.gpus / clips_per_second
    exchanged = 2 * (a.gpus - 1) / a.gpus * 4 * parameters  # float32 gradients go around a ring twice: to be summed, and handed on
    exchange = exchanged / (1e9 * a.link)
    kept, recomputed = gigabytes(config)
    print(
        f"{path.stem:14} {parameters / 1e6:6.1f} {flops / 1e9:7.0f} {clips_per_second:7.0f} {hours:7.0f} "
        f"{clips_per_second * a.core_ms / 1e3:6.1f} {clips_per_second * a.clip_mb:6.0f} {1e3 * step:7.1f} {exchanged / 1e9:6.2f} "
        f"{1e3 * exchange:6.1f} {exchange / step:6.0%} {config.run.batch_per_device:6} {kept:7.1f} {recomputed:11.1f}"
    )


def print_finetuning(path: Path) -> None:
    config = load_config(finetune.DEFAULT, [str(path)])
    kept, recomputed = gigabytes(config)
    print(f"{path.stem:24} {config.run.batch_per_device:6} {kept:8.1f} {recomputed:12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", choices=list(GPUS))
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.4, help="of the GPU's FLOP/s that training is assumed to reach; not measured")
    parser.add_argument("--core-ms", type=float, default=45, help="milliseconds that a CPU core takes to decode, crop and resize a clip")
    parser.add_argument("--clip-mb", type=float, default=0.64, help="megabytes of a video file: 10 s of 340 x 256 in tests/benchmarks/bench_loader.py")
    parser.add_argument("--link", type=float, default=400, help="GB/s between machines: 400 are eight ports of 400 Gbit/s, one for each GPU")
    a = parser.parse_args()
    print(f"{a.gpus} x {a.gpu} at {a.share:.0%} of {GPUS[a.gpu] / 1e12:.0f} TFLOP/s; {a.link:g} GB/s between machines")
    print("pre-training   params  GFLOP  clips/s    GPU- for each GPU:   a step all-reduce:         clips  GB with  with blocks")
    print("                    M  a clip   a GPU   hours  cores   MB/s      ms     GB     ms  share  a GPU    these   recomputed")
    for path in sorted(pretrain.CONFIGS.glob("*_*.yaml")):
        print_pretraining(path, a)
    print("\nfine-tuning               clips  GB with  with blocks\n                          a GPU    these   recomputed")
    for path in sorted(finetune.CONFIGS.glob("*_*.yaml")):
        print_finetuning(path)


if __name__ == "__main__":
    main()
