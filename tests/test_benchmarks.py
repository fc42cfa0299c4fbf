"""The benchmarks start and their steps run; the arithmetic of scale agrees with counts by hand."""

import argparse

import pytest
import torch
from conftest import run

import model as m
from support.config import UserError
from support.processes import start_processes
from tools import bench_step, scale


def blocks(tokens: int, width: int, depth: int) -> int:
    """Multiply-accumulates of transformer blocks."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def pretraining_macs(size: str, tokens: int) -> int:
    """Multiply-accumulates of a clip's forward pass in pre-training with so many masked tokens in the decoder."""
    sizes, depth = m.SIZES[size], 12 if size in "LH" else 4
    width, narrow = sizes["width"], sizes["decoder_width"]
    encoder = 160 * 1536 * width + blocks(160, width, sizes["depth"]) + 160 * width * narrow
    return encoder + blocks(160 + tokens, narrow, depth) + tokens * narrow * 1536


@pytest.mark.parametrize("size, name", [("S", "small"), ("B", "base"), ("L", "large"), ("H", "huge")])
def test_work_of_a_pre_training_step(size, name):
    recipe = scale.CONFIGS / "pretrain" / f"k400_{name}.yaml"
    assert scale.step_flops(scale.load_recipe(recipe)) == 3 * 2 * pretraining_macs(size, 1408)
    half = scale.load_recipe(recipe, ["mask.decoder_ratio=0.5"])
    assert scale.step_flops(half) == 3 * 2 * pretraining_macs(size, 704)


def test_a_recipe_in_the_table(capsys):
    """16 clips of 203 GFLOP on each of 64 GPUs, 371 MB of gradients, twice around the ring."""
    numbers = dict(gpus=64, share=0.4, core_ms=45.0, clip_mb=0.64, link=400.0, decoder_ratio=0)
    options = argparse.Namespace(gpu="H100", **numbers)
    scale.print_pretraining(scale.CONFIGS / "pretrain" / "k400_base.yaml", options)
    name, *columns, plain, checkpointed = capsys.readouterr().out.split()
    flops = 3 * 2 * pretraining_macs("B", 1408)
    speed = 0.4 * 989e12 / flops
    step, gradients = 16 / speed, 2 * 63 / 64 * 4 * 94.2098e6
    hours = 1600 * (240_000 // 1024) * 1024 / speed / 3600
    by_hand = ["94.2", f"{flops / 1e9:.0f}", f"{speed:.0f}", f"{hours:.0f}", f"{0.045 * speed:.1f}"]
    by_hand += [f"{0.64 * speed:.0f}", f"{1e3 * step:.1f}", f"{gradients / 1e9:.2f}", f"{gradients / 400e6:.1f}"]
    assert name == "k400_base" and columns == [*by_hand, f"{gradients / 400e9 / step:.0%}", "64"]
    assert float(checkpointed) < float(plain) / 2


@pytest.mark.parametrize(
    "settings, clips",
    [
        (["optim.epochs=10"], 10 * (240_000 // 1024) * 1024),
        (["optim.epochs=10", "data.repeats=4"], 10 * (240_000 // 256) * 1024),  # an epoch counts videos
        (["optim.steps=500", "optim.warmup_steps=50"], 500 * 1024),  # in place of epochs
    ],
)
def test_clips_of_runs_in_epochs_and_in_steps(settings, clips):
    recipe = scale.CONFIGS / "pretrain" / "k400_base.yaml"
    assert scale.clips_of_run(scale.load_recipe(recipe, settings), 240_000) == clips


def test_work_of_moco_v3():
    """Both clips of a video, all 1568 tokens of each, forward, backward, and forward as keys, by hand."""
    encoder = 1568 * 1536 * 768 + blocks(1568, 768, 12)
    projector, predictor = 768 * 4096 + 4096**2 + 4096 * 256, 256 * 4096 + 4096 * 256
    recipe = scale.load_recipe(scale.CONFIGS / "baselines" / "ssv2_base.yaml")
    assert scale.step_flops(recipe) == 2 * 2 * (3 * (encoder + projector + predictor) + encoder + projector)


LARGEST = "pretrain/k400_huge finetune/k400_huge finetune/k400_large_320 finetune/k400_huge_320 baselines/k400_base"


@pytest.mark.parametrize("name", [*LARGEST.split(), "baselines/ucf101_base"])
def test_the_largest_recipes_fit_a_gpu_of_24_gb(name):
    """By arithmetic, with a tenth to spare for what lives for a moment only."""
    config = scale.load_recipe(scale.CONFIGS / f"{name}.yaml")
    assert scale.gigabytes(config)[config.run.recompute] < 0.9 * 24


def test_memory_by_hand():
    """Activations are those before each layer, without its weights; 18 bytes for each parameter are always there."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
    assert scale.kept_for_backward(layers, torch.ones(2, 8)) == 4 * 2 * (8 + 4)
    recipe = scale.CONFIGS / "pretrain" / "k400_base.yaml"
    one, two = (scale.gigabytes(scale.load_recipe(recipe, [f"run.batch_per_device={clips}"]))[0] for clips in (1, 2))
    assert 2 * one - two == pytest.approx(18 * 0.0942, rel=0.01)  # 4 x float32, and in bf16


def test_ratios_are_those_of_pairs_in_alternating_order():
    order = []

    def way(name: str, factor: float, number: int) -> float:
        order.append((name, number))
        return factor * (number + 1)

    ways = {"fast": lambda number: way("fast", 1.0, number), "slow": lambda number: way("slow", number + 1.0, number)}
    seconds = bench_step.measure(ways, rounds=3)
    assert seconds == {"fast": [2, 3, 4], "slow": [4, 9, 16]}
    assert order[:4] == [("slow", 0), ("fast", 0), ("fast", 1), ("slow", 1)] and len(order) == 8
    assert bench_step.speedup(seconds, "fast", "slow") == "3.00 (2.00 to 4.00, 3 pairs)"


@pytest.mark.parametrize("tool", ["bench_loader", "bench_step", "render_toy", "scale", "study"])
def test_tools_start_and_say_what_they_are_for(tool):
    assert f"python -m tools.{tool}" in run(f"tools.{tool}", "--help").stdout


def test_a_package_that_is_missing_is_named():
    with pytest.raises(UserError, match="^this benchmark compares with decodr, .* pip install decodr$"):
        bench_step.require("decodr")


@pytest.mark.parametrize("recipe", ["pretrain/k400_base.yaml mask.decoder_ratio=0.5", "finetune/k400_base.yaml"])
def test_steps_of_both_models_run(recipe):
    settings = [*f"{scale.CONFIGS}/{recipe}".split(), "model.size=tiny", "run.batch_per_device=1"]
    for name in ("ours", "transformers", *["all"] * recipe.startswith("pretrain")):
        for forward in (False, True):
            bench_step.build_step(name, bench_step.read_recipe(settings), forward, start_processes("bf16"))()


def test_a_step_in_fp16_scales_the_loss_as_training_does(monkeypatch):
    """A gradient of 1e-8 is 0 in float16, unless the loss is multiplied by the scaler's 65,536."""
    linear = torch.nn.Linear(4, 1, bias=False)

    def model_and_loss(*_):
        return linear, lambda network: 1e-8 * network(torch.ones(1, 4)).float().sum()

    monkeypatch.setattr(bench_step, "ours", model_and_loss)
    before = linear.weight.detach().clone()
    bench_step.build_step("ours", bench_step.read_recipe([]), False, start_processes("fp16"))()
    assert ((linear.weight - before).abs() > 1e-6).all()  # weight decay alone changes them by less than 1e-7
