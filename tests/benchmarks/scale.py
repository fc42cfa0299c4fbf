"""The arithmetic of scale: what each recipe costs and what bounds it. Nothing is timed, nothing is run.

    python tests/benchmarks/scale.py                                      # pre-training, Table 3, memory of the others
    python tests/benchmarks/scale.py --decoder-ratio 0.5                  # pre-training with half the decoder
    python tests/benchmarks/scale.py --gpu A100 --gpus 8 --link 12.5      # one port of 100 Gbit/s per machine

FLOPs count a multiply-accumulate twice, backward twice as much as forward, and nothing that is computed again.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

import masking
from baselines import moco_v3
from model import SIZES, VideoClassifier, VideoMAE, checkpoint_activations
from support.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
GPUS = {"H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s in NVIDIA's data sheets (SXM)
# Training videos as in Sec. 4.1; those of Kinetics-700 by its authors (Carreira et al., 2019)
TABLE_3 = {"VideoMAE": ("pretrain", 800, 19.5), "MoCo v3": ("baselines", 300, 61.7)}  # epochs, hours on 64 V100s
VIDEOS = {"k400": 240_000, "ssv2": 169_000, "ucf101": 9_500, "hmdb51": 3_500, "k700": 545_000}


def recipes(stage: str) -> list[Path]:
    """The files of a stage's recipes that name a dataset."""
    return [path for path in sorted((CONFIGS / stage).glob("*_*.yaml")) if path.stem.split("_")[0] in VIDEOS]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> SimpleNamespace:
    return load_config(path.with_name("toy.yaml"), [str(path), *settings])


def forward_flops(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of a forward pass; a training step takes three times as many."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def moco_v3_flops(config: SimpleNamespace) -> int:
    """FLOPs of a step of MoCo v3 for each video: both clips forward and backward, and forward as keys."""
    f_q, batch = shapes(config)
    with torch.device("meta"):
        return 3 * forward_flops(f_q, *batch(2)) + forward_flops(moco_v3.key_network(f_q), *batch(2))


def kept_for_backward(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of activations that autograd keeps between a forward and a backward pass, each storage once."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    return sum(storage.nbytes() for reference, storage in kept.items() if reference not in weights)


def empty_batch(clips: int, clip_size: tuple[int, int, int], positions: Sequence[int] = ()) -> list[Tensor]:
    """A model's inputs: clips and, in pre-training, the positions of so many visible and so many masked tokens."""
    return [torch.empty(clips, 3, *clip_size), *(torch.empty(clips, count, dtype=torch.long) for count in positions)]


def shapes(config: SimpleNamespace) -> tuple[nn.Module, partial]:
    """The model that a recipe trains, without memory for its weights, and a function from clips to an empty batch."""
    clip_size = (config.data.frames, config.data.size, config.data.size)
    sizes = SIZES[config.model.size]
    encoder = {name: sizes[name] for name in ("width", "depth", "heads")} | dict(clip_size=clip_size)
    with torch.device("meta"):
        if hasattr(config, "moco"):
            f_q = moco_v3.QueryNetwork(mlp_dim=config.moco.mlp_dim, dim=config.moco.dim, **encoder)
            return f_q, partial(empty_batch, clip_size=clip_size)
        if not hasattr(config, "mask"):
            return VideoClassifier(**encoder, classes=400), partial(empty_batch, clip_size=clip_size)
        model = VideoMAE(**sizes, decoder_depth=config.model.decoder_depth, clip_size=clip_size)
    visible, masked = masking.split(masking.tube_mask(model.grid, config.mask.ratio))
    masked = masking.running_cells(masked, model.grid, config.mask.decoder_ratio)
    return model, partial(empty_batch, clip_size=clip_size, positions=(len(visible), len(masked)))


def gigabytes(config: SimpleNamespace) -> tuple[float, float]:
    """Memory of training with `run.batch_per_device` clips in bf16, without and with activation checkpointing.

    Weights, gradients and AdamW's two moments in float32, MoCo v3's second weights, the bf16 copies of the weights, and
    what each clip keeps for the backward pass. What lives for a moment only is not counted.
    """
    model, batch = shapes(config)
    state = (20 if hasattr(config, "moco") else 16) * sum(parameter.numel() for parameter in model.parameters())

    def total() -> float:
        one, two = (kept_for_backward(model, *batch(clips)) for clips in (1, 2))
        return (state + one + (config.run.batch_per_device - 1) * (two - one)) / 1e9

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")
        kept = total()
        checkpoint_activations(model)
        return kept, total()


def print_pretraining(path: Path, options: argparse.Namespace, settings: Sequence[str] = ()) -> None:
    """One line of the table of recipes for pre-training, with other settings if any are given."""
    config = load_recipe(path, settings)
    model, batch = shapes(config)
    with torch.device("meta"):
        flops = 3 * forward_flops(model, *batch(1))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    clips_per_second = options.share * GPUS[options.gpu] / flops
    hours = config.optim.epochs * VIDEOS[path.stem.split("_")[0]] / clips_per_second / 3600
    step = config.optim.batch_size / options.gpus / clips_per_second
    exchanged = 2 * (options.gpus - 1) / options.gpus * 4 * parameters  # float32 gradients, twice around a ring
    exchange = exchanged / (1e9 * options.link)
    kept, checkpointed = gigabytes(config)
    cores, megabytes = clips_per_second * options.core_ms / 1e3, clips_per_second * options.clip_mb
    print(
        f"{path.stem:14} {parameters / 1e6:6.1f} {flops / 1e9:7.0f} {clips_per_second:7.0f} {hours:7.0f} "
        f"{cores:6.1f} {megabytes:6.0f} {1e3 * step:7.1f} {exchanged / 1e9:6.2f} {1e3 * exchange:6.1f} "
        f"{exchange / step:6.0%} {config.run.batch_per_device:6} {kept:7.1f} {checkpointed:13.1f}"
    )


def print_table_3() -> None:
    """What both methods compute on Something-Something V2, next to the hours of Table 3."""
    print("\nTable 3: SSV2, ViT-B   GFLOP of a  epochs   EFLOP   hours on 64 V100s  TFLOP/s of a")
    print("                       video's step          in all   in the paper       V100, then")
    for method, (stage, epochs, hours) in TABLE_3.items():
        config = load_recipe(CONFIGS / stage / "ssv2_base.yaml", [f"optim.epochs={epochs}"])
        model, batch = shapes(config)
        with torch.device("meta"):
            flops = moco_v3_flops(config) if stage == "baselines" else 3 * forward_flops(model, *batch(1))
        total = flops * epochs * VIDEOS["ssv2"]
        rate = total / (64 * 3600 * hours)
        print(f"{method:24} {flops / 1e9:9.0f} {epochs:7} {total / 1e18:8.1f} {hours:14.1f} {rate / 1e12:17.1f}")


def print_memory(path: Path) -> None:
    config = load_recipe(path)
    kept, checkpointed = gigabytes(config)
    print(f"{path.stem:24} {config.run.batch_per_device:6} {kept:8.1f} {checkpointed:14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", choices=list(GPUS))
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument(
        "--share", type=float, default=0.4, help="of the GPU's FLOP/s, assumed for training; not measured"
    )
    parser.add_argument(
        "--core-ms", type=float, default=45, help="in which a CPU core decodes, crops and resizes a clip"
    )
    parser.add_argument(
        "--clip-mb", type=float, default=0.64, help="of a video file: 10 s of 340 x 256 in bench_loader.py"
    )
    parser.add_argument(
        "--link", type=float, default=400, help="GB/s between machines: eight ports of 400 Gbit/s are 400"
    )
    parser.add_argument("--decoder-ratio", type=float, default=0, help="mask.decoder_ratio of pre-training")
    options = parser.parse_args()
    rate = f"{options.share:.0%} of {GPUS[options.gpu] / 1e12:.0f} TFLOP/s"
    print(f"{options.gpus} x {options.gpu} at {rate}; {options.link:g} GB/s between machines")
    print(
        "pre-training   params  GFLOP  clips/s    GPU- for each GPU:   a step all-reduce:         clips  GB with"
        "   with activ.\n"
        "                    M  a clip   a GPU   hours  cores   MB/s      ms     GB     ms  share  a GPU    these"
        " checkpointing"
    )
    for path in recipes("pretrain"):
        print_pretraining(path, options, [f"mask.decoder_ratio={options.decoder_ratio}"])
    print_table_3()
    for title, stage in (("MoCo v3", "baselines"), ("fine-tuning", "finetune")):
        print(f"\n{title:24}  clips  GB with    with activ.")
        print("                          a GPU    these  checkpointing")
        for path in recipes(stage):
            print_memory(path)


if __name__ == "__main__":
    main()
