"""Print what each recipe costs and what limits it, by arithmetic: nothing is timed, nothing is run.

    python -m tools.scale                                      # pre-training, Table 3, memory of the others
    python -m tools.scale --decoder-ratio 0.5                  # pre-training with half the decoder
    python -m tools.scale --gpu A100 --gpus 8 --link 12.5      # one port of 100 Gbit/s per machine

FLOPs count a multiply-accumulate twice, backward twice as much as forward, and nothing that is computed again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import masking
import pretrain
from baselines import moco_v3
from model import SIZES, VideoClassifier, VideoMAE, checkpoint_activations, encoder_size
from support.config import load_config
from support.processes import launch
from support.run import count_steps

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GPUS = {"H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s in NVIDIA's data sheets (SXM)
# Training videos as in Sec. 4.1; those of Kinetics-700 by its authors (Carreira et al., 2019)
VIDEOS = {"k400": 240_000, "ssv2": 169_000, "ucf101": 9_500, "hmdb51": 3_500, "k700": 545_000}
TABLE_3 = {"VideoMAE": ("pretrain", 800, 19.5), "MoCo v3": ("baselines", 300, 61.7)}  # epochs, hours on 64 V100s
HEAD = """\
pre-training   params  GFLOP  clips/s    GPU- for each GPU:   a step all-reduce:         clips  GB with   with activ.
                    M  a clip   a GPU   hours  cores   MB/s      ms     GB     ms  share  a GPU    these checkpointing
"""


def recipes(stage: str) -> list[Path]:
    """Return the files of a stage's recipes that name a dataset."""
    return [path for path in sorted((CONFIGS / stage).glob("*_*.yaml")) if path.stem.split("_")[0] in VIDEOS]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> SimpleNamespace:
    return load_config(path.with_name("toy.yaml"), [str(path), *settings])


def build(config: SimpleNamespace, device: torch.device | str = "meta") -> tuple[nn.Module, list[int]]:
    """Return a recipe's model, and how many positions of visible and masked tokens a clip has in pre-training.

    On the device "meta" a model has no memory for its weights.
    """
    clip_size = (config.data.frames, config.data.size, config.data.size)
    clip = dict(clip_size=clip_size, cube=config.model.cube)
    encoder = encoder_size(config.model.size) | clip
    with torch.device(device):
        if hasattr(config, "moco"):
            return moco_v3.QueryNetwork(mlp_dim=config.moco.mlp_dim, dim=config.moco.dim, **encoder), []
        if not hasattr(config, "mask"):
            return VideoClassifier(**encoder, classes=400), []
        sizes = SIZES[config.model.size]
        frames = pretrain.Objective(config).target.cube[0]  # that each token predicts
        model = VideoMAE(**sizes, decoder_depth=config.model.decoder_depth, frames_per_token=frames, **clip)
    visible, masked = masking.split(masking.tube_mask(model.grid, config.mask.ratio))
    return model, [len(visible), len(masking.running_cells(masked, model.grid, config.mask.decoder_ratio))]


def empty_batch(config: SimpleNamespace, positions: list[int], clips: int) -> list[Tensor]:
    """Return inputs of a recipe's model."""
    clip = torch.empty(clips, 3, config.data.frames, config.data.size, config.data.size)
    return [clip, *(torch.empty(clips, count, dtype=torch.long) for count in positions)]


def step_flops(config: SimpleNamespace) -> int:
    """Return a recipe's FLOPs of a step per clip; with MoCo v3 per video: two clips, also forward as keys."""
    model, positions = build(config)
    with torch.device("meta"), FlopCounterMode(display=False) as forward:
        batch = empty_batch(config, positions, 2 if hasattr(config, "moco") else 1)
        model(*batch)
    with torch.device("meta"), FlopCounterMode(display=False) as keys:
        if hasattr(config, "moco"):
            moco_v3.key_network(model)(*batch)
    return 3 * forward.get_total_flops() + keys.get_total_flops()


def kept_for_backward(model: nn.Module, *inputs: Tensor) -> int:
    """Return the bytes of activations that autograd keeps from forward to backward, each storage once."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    for parameter in model.parameters():
        kept.pop(StorageWeakRef(parameter.untyped_storage()), None)
    return sum(storage.nbytes() for storage in kept.values())


def gigabytes(config: SimpleNamespace) -> tuple[float, float]:
    """Return the memory of training `run.batch_per_device` clips in bf16, without and with activation checkpointing.

    Counted are weights, gradients and AdamW's two moments in float32, MoCo v3's second weights, bf16 copies of the
    weights, and what each clip keeps for the backward pass; not what is in memory only for a moment.
    """
    model, positions = build(config)
    state = (20 if hasattr(config, "moco") else 16) * sum(parameter.numel() for parameter in model.parameters())

    def total() -> float:
        one, two = (kept_for_backward(model, *empty_batch(config, positions, clips)) for clips in (1, 2))
        return (state + one + (config.run.batch_per_device - 1) * (two - one)) / 1e9

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")
        plain = total()
        checkpoint_activations(model)
        return plain, total()


def clips_of_run(config: SimpleNamespace, videos: int) -> int:
    """Return how many clips a run of pre-training on so many videos computes."""
    steps_per_epoch = videos // (config.optim.batch_size // config.data.repeats)
    steps, _ = count_steps(config.optim, steps_per_epoch)
    return steps * config.optim.batch_size


def print_pretraining(path: Path, options: argparse.Namespace) -> None:
    """Print one line of the table of recipes for pre-training."""
    config = load_recipe(path, [f"mask.decoder_ratio={options.decoder_ratio}"])
    parameters = sum(parameter.numel() for parameter in build(config)[0].parameters())
    flops = step_flops(config)
    clips_per_second = options.share * GPUS[options.gpu] / flops
    hours = clips_of_run(config, VIDEOS[path.stem.split("_")[0]]) / clips_per_second / 3600
    step = config.optim.batch_size / options.gpus / clips_per_second
    exchanged = 2 * (options.gpus - 1) / options.gpus * 4 * parameters  # float32 gradients, twice around a ring
    exchange = exchanged / (1e9 * options.link)
    plain, checkpointed = gigabytes(config)
    print(
        f"{path.stem:14} {parameters / 1e6:6.1f} {flops / 1e9:7.0f} {clips_per_second:7.0f} {hours:7.0f} "
        f"{clips_per_second * options.core_ms / 1e3:6.1f} {clips_per_second * options.clip_mb:6.0f} "
        f"{1e3 * step:7.1f} {exchanged / 1e9:6.2f} {1e3 * exchange:6.1f} "
        f"{exchange / step:6.0%} {config.run.batch_per_device:6} {plain:7.1f} {checkpointed:13.1f}"
    )


def print_table_3() -> None:
    """Print what both methods compute on Something-Something V2, next to the hours of Table 3."""
    print("\nTable 3: SSV2, ViT-B   GFLOP of a  epochs   EFLOP   hours on 64 V100s  TFLOP/s of a")
    print("                       video's step          in all   in the paper       V100, then")
    for method, (stage, epochs, hours) in TABLE_3.items():
        flops = step_flops(load_recipe(CONFIGS / stage / "ssv2_base.yaml"))
        total = flops * epochs * VIDEOS["ssv2"]
        rate = total / (64 * 3600 * hours)
        print(f"{method:24} {flops / 1e9:9.0f} {epochs:7} {total / 1e18:8.1f} {hours:14.1f} {rate / 1e12:17.1f}")


def print_memory(title: str, stage: str) -> None:
    print(f"\n{title:24}  clips  GB with    with activ.\n                          a GPU    these  checkpointing")
    for path in recipes(stage):
        config = load_recipe(path)
        plain, checkpointed = gigabytes(config)
        print(f"{path.stem:24} {config.run.batch_per_device:6} {plain:8.1f} {checkpointed:14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpu", default="H100", choices=list(GPUS))
    add("--gpus", type=int, default=64)
    add("--share", type=float, default=0.4, help="fraction of the GPU's FLOP/s, assumed for training; not measured")
    add("--core-ms", type=float, default=45, help="time in which a CPU core decodes, crops and resizes a clip")
    add("--clip-mb", type=float, default=0.64, help="size of a video file: 10 s of 340 x 256 in bench_loader")
    add("--link", type=float, default=400, help="GB/s between machines: eight ports of 400 Gbit/s are 400")
    add("--decoder-ratio", type=float, default=0, help="mask.decoder_ratio of pre-training")
    options = parser.parse_args()
    rate = f"{options.share:.0%} of {GPUS[options.gpu] / 1e12:.0f} TFLOP/s"
    print(f"{options.gpus} x {options.gpu} at {rate}; {options.link:g} GB/s between machines")
    print(HEAD, end="")
    for path in recipes("pretrain"):
        print_pretraining(path, options)
    print_table_3()
    print_memory("MoCo v3", "baselines")
    print_memory("fine-tuning", "finetune")


if __name__ == "__main__":
    launch(main)
