"""The arithmetic of scale: multiply-accumulates counted by hand, a line of its table, memory of the largest recipes."""

import argparse
import subprocess
import sys

import bench_step
import pytest
import scale
import torch
from conftest import ROOT
from interleaved import measure, quartiles, ratios
from torch import Tensor

import masking
import model as m

PRETRAINING, FINETUNING = scale.CONFIGS / "pretrain", scale.CONFIGS / "finetune"


@pytest.mark.parametrize("size, giga_macs", [("S", 11.5), ("B", 35.4), ("L", 142.6), ("H", 237.6)])
def test_work_of_a_pre_training_clip(size, giga_macs):
    """Multiply-accumulates of a forward pass: 12 N D^2 + 2 N^2 D per block, and the linear maps around the blocks."""
    sizes, depth = m.SIZES[size], 12 if size in "LH" else 4
    width, narrow = sizes["width"], sizes["decoder_width"]

    def blocks(tokens: int, width: int, depth: int) -> int:
        return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)

    encoder = 160 * 1536 * width + blocks(160, width, sizes["depth"])
    by_hand = encoder + 160 * width * narrow + blocks(1568, narrow, depth) + 1408 * narrow * 1536
    with torch.device("meta"):
        model = m.VideoMAE(**sizes, decoder_depth=depth)
        assert scale.forward_flops(model, *scale.empty_batch(1, (16, 224, 224), (160, 1408))) == 2 * by_hand
    all_embedded = by_hand + 1408 * 1536 * width  # the authors embed the masked cubes, too
    assert all_embedded / 1e9 == pytest.approx(giga_macs, abs=0.05)


def test_a_recipe_in_the_table(capsys):
    """16 clips of 203 GFLOP on each of 64 GPUs, 377 MB of gradients."""
    options = argparse.Namespace(gpu="H100", gpus=64, share=0.4, core_ms=45.0, clip_mb=0.64, link=400.0)
    scale.print_pretraining(PRETRAINING / "k400_base.yaml", options)
    words = capsys.readouterr().out.split()
    name, parameters, gigaflops, clips_per_second, hours, cores, megabytes = words[:7]
    step, gigabytes, exchange, share, clips, kept, checkpointed = words[7:]
    assert (name, parameters, gigaflops, clips) == ("k400_base", "94.2", "203", "64")
    assert float(clips_per_second) == pytest.approx(0.4 * 989e12 / 203e9, rel=0.01)
    assert float(hours) == pytest.approx(1600 * 240e3 * 203e9 / (0.4 * 989e12) / 3600, rel=0.02)
    assert float(cores) == pytest.approx(0.045 * float(clips_per_second), abs=0.1)
    assert float(megabytes) == pytest.approx(0.64 * float(clips_per_second), abs=1)
    assert float(step) == pytest.approx(16e3 / float(clips_per_second), abs=0.1)
    assert float(gigabytes) == pytest.approx(2 * 63 / 64 * 4 * 0.0942, abs=0.01)
    assert float(exchange) == pytest.approx(float(gigabytes) / 400 * 1e3, abs=0.1)
    assert share == f"{float(exchange) / float(step):.0%}"
    assert float(checkpointed) < float(kept) / 2


def test_table_3_in_gigaflops(capsys):
    """MoCo v3: both clips of a video, all 1568 tokens of each, forward, backward, and forward as keys, by hand."""
    encoder = 1568 * 1536 * 768 + 12 * (12 * 1568 * 768**2 + 2 * 1568**2 * 768)
    projector, predictor = 768 * 4096 + 4096**2 + 4096 * 256, 256 * 4096 + 4096 * 256
    by_hand = 2 * 2 * (3 * (encoder + projector + predictor) + encoder + projector)
    assert scale.moco_v3_flops(scale.load_recipe(scale.CONFIGS / "baselines/ssv2_base.yaml")) == by_hand
    scale.print_table_3()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows[0][:5] == ["VideoMAE", "203", "800", "27.4", "19.5"]
    assert rows[1][:6] == ["MoCo", "v3", f"{by_hand / 1e9:.0f}", "300", f"{by_hand * 300 * 169e3 / 1e18:.1f}", "61.7"]
    assert float(rows[1][6]) == pytest.approx(by_hand * 300 * 169e3 / (64 * 61.7 * 3600) / 1e12, abs=0.05)


def test_half_the_decoder_in_the_table(capsys):
    """GFLOP of a clip with 704 of the 1408 masked cubes in the decoder, by hand: ViT-B's encoder stays as it was."""
    options = argparse.Namespace(gpu="H100", gpus=64, share=0.4, core_ms=45.0, clip_mb=0.64, link=400.0)
    scale.print_pretraining(PRETRAINING / "k400_base.yaml", options, ["mask.decoder_ratio=0.5"])
    encoder = 160 * 1536 * 768 + 12 * (12 * 160 * 768**2 + 2 * 160**2 * 768) + 160 * 768 * 384
    decoder = 4 * (12 * 864 * 384**2 + 2 * 864**2 * 384) + 704 * 384 * 1536
    assert capsys.readouterr().out.split()[2] == f"{3 * 2 * (encoder + decoder) / 1e9:.0f}" == "139"
    assert bench_step.step_flops(argparse.Namespace(of="pretrain", batch=1, decoder_ratio=0.5), "B", 4) == 3 * 2 * (
        encoder + decoder
    )


def test_every_recipe_of_a_dataset_is_in_the_tables():
    for folder, own in ((PRETRAINING, {"toy", "toy_picture", "own"}), (FINETUNING, {"toy", "own"})):
        listed = {path.stem for path in scale.recipes(folder.name)}
        assert {path.stem for path in folder.glob("*.yaml")} - listed <= own and len(listed) > 9


@pytest.mark.parametrize(
    "name",
    [
        *("pretrain/k400_huge", "finetune/k400_huge", "finetune/k400_large_320", "finetune/k400_huge_320"),
        *("baselines/k400_base", "baselines/ucf101_base"),
    ],
)
def test_the_largest_recipes_fit_a_gpu_of_24_gb(name):
    """By arithmetic, with a tenth to spare for what lives for a moment only."""
    config = scale.load_recipe(scale.CONFIGS / f"{name}.yaml")
    assert scale.gigabytes(config)[config.run.recompute] < 0.9 * 24


def test_ratios_are_those_of_pairs_in_alternating_order():
    order = []

    def way(name: str, factor: float, number: int) -> float:
        order.append((name, number))
        return factor * (number + 1)

    seconds = measure({"fast": lambda n: way("fast", 1.0, n), "slow": lambda n: way("slow", 2.0, n)}, rounds=3)
    assert seconds == {"fast": [2, 3, 4], "slow": [4, 6, 8]}
    assert order[:4] == [("slow", 0), ("fast", 0), ("fast", 1), ("slow", 1)] and len(order) == 8
    assert ratios(seconds, "fast", "slow") == [2, 2, 2]
    assert (
        quartiles([1.0, 2.0, 3.0]) == "2.00 (1.00 to 3.00, 3 pairs)"
        and quartiles([1.5]) == "1.50 (1.50 to 1.50, 1 pairs)"
    )


@pytest.mark.parametrize("script", ["bench_loader", "bench_scaling", "bench_step", "scale"])
def test_benchmarks_start_from_the_repository(script):
    """As the README says, without a path set; that they import what they measure shows most of what can break them."""
    command = [sys.executable, f"tests/benchmarks/{script}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"python tests/benchmarks/{script}.py" in done.stdout, done.stderr


@pytest.mark.parametrize("of", ["pretrain", "finetune", "forward"])
def test_steps_of_both_models_run(of):
    options = argparse.Namespace(of=of, device="cpu", recompute=of == "finetune", compile=False, batch=1)
    batch = bench_step.batch_of(1, "cpu")
    for build in bench_step.BUILDERS.values():
        with torch.set_grad_enabled(of != "forward"):
            build(options, "tiny", 1)(batch, True)


# ---- activation checkpointing ----


def gradients(model: torch.nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The loss and all gradients of one step whose drop path and dropout start from the same seed."""
    torch.manual_seed(1)
    loss = model(*inputs).square().mean()
    loss.backward()
    found = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_blocks_give_the_same_gradients_from_less_memory(bf16):
    torch.manual_seed(0)
    encoder = {name: m.SIZES["tiny"][name] for name in ("width", "depth", "heads")}
    classifier = m.VideoClassifier(**encoder, classes=5, clip_size=(4, 32, 32), drop_path=0.5, dropout=0.5)
    classifier.head.weight.data.mul_(1000)
    videomae = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=2, clip_size=(4, 32, 32))
    clip = torch.randn(8, 3, 4, 32, 32)
    visible, masked = (
        x.expand(8, -1) for x in masking.split(masking.tube_mask(videomae.grid, 0.5, torch.Generator().manual_seed(0)))
    )
    for model, inputs in ((classifier, [clip]), (videomae, [clip, visible, masked])):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            kept, memory = gradients(model, *inputs), scale.kept_for_backward(model, *inputs)
            m.checkpoint_activations(model)
            assert all(map(torch.equal, gradients(model, *inputs), kept))
            assert scale.kept_for_backward(model, *inputs) < memory / 3
