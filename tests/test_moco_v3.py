"""MoCo v3 against its equations and PyTorch's batch norm; its two views; its checkpoint in the later stages."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log, run, write_numbered
from torch import Tensor
from torchvision.transforms import v2
from videos import number_of

import data
from baselines import moco_v3
from probe import LinearProbe
from support.config import load_config
from support.processes import Processes
from support.video import write_mp4
from support.weights import load_weights

STAGE = "baselines/moco_v3"
EMBEDDING = ["encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"]


def configured(*settings: str):
    small = ["data.frames=4", "data.stride=2", "data.size=32", "moco.mlp_dim=32", "moco.dim=16"]
    return load_config(moco_v3.DEFAULT, [*small, *settings])


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def mlp(x: Tensor, weights: dict[str, Tensor], part: str, layers: int) -> Tensor:
    for i in range(layers):
        scale, shift = (weights.get(f"{part}.{3 * i + 1}.{name}") for name in ("weight", "bias"))
        assert (scale is None) == (shift is None) == (i == layers - 1)
        x = F.batch_norm(x @ weights[f"{part}.{3 * i}.weight"].T, None, None, scale, shift, training=True)
        x = x.clamp(min=0) if i < layers - 1 else x
    return x


def transcribed_loss(f_q: torch.nn.Module, f_k: torch.nn.Module, views: list[Tensor], tau: float) -> Tensor:
    """MoCo v3's Algorithm 1 and Eq. 1, sum by sum, with PyTorch's batch norm, for one view at a time."""
    fast, slow = dict(f_q.named_parameters()), dict(f_k.named_parameters())
    q = [mlp(mlp(f_q.encoder(x).mean(1), fast, "projector", 3), fast, "predictor", 2) for x in views]
    k = [mlp(f_k.encoder(x).mean(1), slow, "projector", 3).detach() for x in views]
    q, k = ([x / (x * x).sum(1, keepdim=True).sqrt() for x in both] for both in (q, k))
    total = 0
    for queries, keys in ((q[0], k[1]), (q[1], k[0])):
        for i, query in enumerate(queries):
            e = [torch.exp((query * key).sum() / tau) for key in keys]
            total -= 2 * tau * torch.log(e[i] / sum(e)) / len(queries)
    return total


def test_weights_start_as_in_moco_v3s_code():
    """Xavier's uniform distribution; queries, keys and values are matrices of their own."""
    state = moco_v3.build(configured()).state_dict()
    sides = {EMBEDDING[0]: 192 + 128, "encoder.blocks.1.attn.qkv.weight": 128 + 128}
    for key, side in (sides | {"encoder.blocks.1.mlp.fc1.weight": 128 + 512}).items():
        bound = math.sqrt(6 / side)
        assert bound * 0.999 < float(state[key].abs().max()) <= bound
        assert float(state[key].std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.fixture(scope="module")
def steps(settings, tmp_path_factory) -> list[dict]:
    """The checkpoints after each of nine steps, with the lines of the log."""
    folder = tmp_path_factory.mktemp("steps")
    more = ["optim.batch_size=24", "optim.epochs=9", "run.batch_per_device=48", "run.keep_every=1", "run.seed=1"]
    more += ["optim.warmup_epochs=3", "optim.base_lr=0.1", "optim.betas=[0.8, 0.97]", "optim.weight_decay=0.3"]
    run(f"{STAGE}.py", *settings[STAGE], *more, f"run.folder={folder}")
    kept = [torch.load(path, weights_only=True) for path in sorted(folder.glob("checkpoint_*.pt"))]
    return [content | dict(line=line) for content, line in zip(kept, log(folder), strict=True)]


def test_loss_and_gradients_are_those_of_the_equations(steps, tmp_path):
    """In the last step: queries, keys, scales and shifts are no longer those of the start."""
    before, after = steps[-2:]
    config = load_config(moco_v3.DEFAULT, [], after["config"])
    f_q = moco_v3.build(config)
    f_k = moco_v3.key_network(f_q)
    assert not any(parameter.requires_grad for parameter in f_k.parameters())
    f_q.load_state_dict(before["model"])
    f_k.load_state_dict(after["key_network"])
    clips = moco_v3.TwoViews(moco_v3.list_videos(config.data.root, "train"), 1, config=config.data)
    sampler = data.MicroBatchSampler(24, 24, 24, range(8, 9), Processes(0, 1, torch.device("cpu"), torch.float32), 1)
    (views,) = next(data.Batches(clips, sampler, 0, tmp_path))  # (B, 2, T, 3, H, W)
    views = [data.normalize(view) for view in views.unbind(1)]
    loss = transcribed_loss(f_q, f_k, views, config.moco.temperature)
    assert after["line"]["loss"] == pytest.approx(loss.item(), rel=1e-4)

    learned = [parameter for parameter in f_q.parameters() if parameter.requires_grad]
    for number, expected in enumerate(torch.autograd.grad(loss, learned)):
        one, two = (content["optimizer"]["state"][number]["exp_avg"] for content in (before, after))
        gradient = (two - 0.8 * one) / (1 - 0.8)
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6 + 1e-3 * float(expected.abs().max())), number
    features = F.normalize(torch.cat([f_q.encoder(view).mean(dim=1) for view in views]), dim=1)  # (2 B, D)
    std = features.std(dim=0, correction=0).mean().item()
    assert after["line"]["feature_std"] == pytest.approx(std, rel=1e-3)
    assert after["line"]["uniform_std"] == pytest.approx(1 / math.sqrt(128))  # if they fill the sphere


def test_the_key_network_follows_the_query_network_and_the_cube_embedding_is_fixed(steps):
    """f_k = m f_k + (1 - m) f_q before each step, m from 0.99 to 1 by half a cosine; at first they are the same."""
    first = moco_v3.build(load_config(moco_v3.DEFAULT, [], steps[0]["config"])).state_dict()
    before = {"model": first, "key_network": first}
    assert {key for key in first if not key.startswith("predictor.")} == steps[0]["key_network"].keys()
    for step, after in enumerate(steps):
        momentum = 1 - 0.01 * (1 + math.cos(math.pi * step / 9)) / 2
        assert after["line"]["momentum"] == pytest.approx(momentum, abs=1e-6)
        for key, value in after["key_network"].items():
            expected = momentum * before["key_network"][key].double() + (1 - momentum) * before["model"][key].double()
            assert torch.allclose(value.double(), expected, rtol=0, atol=1e-6), (step, key)
        before = after
    for part in ("model", "key_network"):
        assert [key for key, value in before[part].items() if torch.equal(value, first[key])] == EMBEDDING
    for content in steps:
        (group,) = content["optimizer"]["param_groups"]  # of all other parameters
        assert len(group["params"]) == len(first) - 2 and group["lr"] == content["line"]["lr"]
        assert group["weight_decay"] == 0.3 and tuple(group["betas"]) == (0.8, 0.97)


def test_two_processes_learn_what_one_does(settings, finished, tmp_path):
    """Keys, negatives and batch norm are of all processes: losses, gradients (Adam's moments), features."""
    more = ["data.workers=1", "run.recompute=true", f"run.folder={tmp_path}"]
    done = run(f"{STAGE}.py", *settings[STAGE], *more, processes=2)
    assert done.stderr.count("batch of 8 videos = 2 processes x 1 accumulated x 4") == 1  # rank 0 alone prints
    one, two = (checkpoint(folder) for folder in (finished(STAGE), tmp_path))
    for number, state in one["optimizer"]["state"].items():
        gradient, reference = two["optimizer"]["state"][number]["exp_avg"], state["exp_avg"]
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-6 + 1e-3 * float(reference.abs().max())), number
    for name in ("loss", "feature_std"):
        assert [x[name] for x in log(tmp_path)] == pytest.approx([x[name] for x in log(finished(STAGE))], rel=1e-4)


def test_later_stages_start_from_its_checkpoint(settings, finished, tmp_path):
    """The probe reads the features that were contrasted."""
    weights, content = finished(STAGE) / "checkpoint.pt", checkpoint(finished(STAGE))
    done = run("finetune.py", *settings["finetune"], f"init={weights}", "optim.epochs=1", f"run.folder={tmp_path}")
    assert "encoder loaded; " in done.stderr and "predictor, projector not needed" in done.stderr
    f_q = moco_v3.build(load_config(moco_v3.DEFAULT, [], content["config"]))
    f_q.load_state_dict(content["model"])
    probe = LinearProbe(**content["model_options"], classes=8)
    load_weights(probe, weights, fresh=("head.",))
    clip = torch.randn(4, 3, 4, 32, 32)
    assert torch.allclose(probe.features(clip), f_q(clip)[1], atol=1e-6) and not f_q(clip)[1].requires_grad


def test_augmentation_is_that_of_moco_v3():
    crop, jitter, gray, blur, solarize, flip = moco_v3.augmentation(configured().data, 0.3, 0.4)
    assert isinstance(crop, v2.RandomResizedCrop) and (crop.size, crop.scale) == ((32, 32), [0.08, 1.0])
    (color,) = jitter.transforms
    assert (jitter.p, color.brightness, color.contrast) == (0.8, (0.6, 1.4), (0.6, 1.4))
    assert (color.saturation, color.hue, gray.p) == ((0.8, 1.2), (-0.1, 0.1), 0.2)
    assert isinstance(gray, v2.RandomGrayscale) and (blur.p, list(blur.transforms[0].sigma)) == (0.3, [0.1, 2.0])
    assert isinstance(solarize, v2.RandomSolarize) and (solarize.threshold, solarize.p) == (128, 0.4)
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0  # the toy's classes are directions
    assert moco_v3.augmentation(configured("data.flip=true").data, 0, 0)[-1].p == 0.5


def test_all_frames_of_a_view_are_augmented_alike_and_the_two_views_are_not(tmp_path):
    torch.manual_seed(0)
    frame = F.interpolate(255 * torch.rand(1, 3, 4, 4), size=32, mode="bilinear").byte()  # (1, 3, 32, 32)
    write_mp4(tmp_path / "still.mp4", frame.expand(12, -1, -1, -1), rate=12)
    clips = moco_v3.TwoViews([tmp_path / "still.mp4"], 0, config=configured("data.flip=true").data)
    views = torch.stack([clips[epoch, 0][0] for epoch in range(30)]).float()  # (30, 2, 4, 3, 32, 32)
    assert (views - views[:, :, :1]).abs().mean(dim=(2, 3, 4, 5)).max() < 3  # the codec's frames differ by as much
    assert (views[:, 0] - views[:, 1]).abs().mean(dim=(1, 2, 3, 4)).min() > 3


def test_the_two_clips_start_independently_and_are_augmented_as_first_and_second(tmp_path, monkeypatch):
    """12 frames hold 5 starts of 4 frames with stride 2: all 25 pairs occur, each about as often."""
    seen = []

    def augmentation(config, blur: float, solarize: float):
        return lambda clip: seen.append((blur, solarize, number_of(clip[0]))) or clip

    monkeypatch.setattr(moco_v3, "augmentation", augmentation)
    clips = moco_v3.TwoViews([write_numbered(tmp_path / "n.mp4", 12)], 0, config=configured().data)
    count = np.zeros((5, 5))
    for epoch in range(250):
        numbers = [[number_of(frame) for frame in view] for view in clips[epoch, 0][0]]
        assert all(view == list(range(view[0], view[0] + 8, 2)) for view in numbers)
        assert seen[-2:] == [(1.0, 0.0, numbers[0][0]), (0.1, 0.2, numbers[1][0])]
        count[numbers[0][0], numbers[1][0]] += 1
    assert 0 < count.min() <= count.max() < 30
