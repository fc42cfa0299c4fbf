"""MoCo v3 against its equations and PyTorch's batch norm; its augmentation; its checkpoint in the later stages.

What it shares with the stages (resuming, processes, mistakes) is in test_stages.py, its recipes are in test_recipes.py.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import log, losses, run, write_numbered
from torch import Tensor
from torchvision.transforms import v2
from videos import number_of

import model as m
import support.run
from baselines import moco_v3
from detect_ava import ActionDetector
from probe import LinearProbe
from support.config import load_config
from support.video import write_mp4
from support.weights import load_weights, read_checkpoint

STAGE = "baselines/moco_v3"
EMBEDDING = "encoder.patch_embed.proj.weight"


def configured(*settings: str):
    small = ["data.frames=4", "data.size=32", "moco.mlp_dim=32", "moco.dim=16"]
    return load_config(moco_v3.DEFAULT, [*small, *settings])


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


# ---- loss and gradients ----


def mlp(x: Tensor, weights: dict[str, Tensor], part: str, layers: int) -> Tensor:
    for i in range(layers):
        scale, shift = (weights.get(f"{part}.{3 * i + 1}.{name}") for name in ("weight", "bias"))
        assert (scale is None) == (shift is None) == (i == layers - 1)
        x = F.batch_norm(x @ weights[f"{part}.{3 * i}.weight"].T, None, None, scale, shift, training=True)
        x = x.clamp(min=0) if i < layers - 1 else x
    return x


def transcribed_loss(f_q: torch.nn.Module, f_k: torch.nn.Module, views: list[Tensor], tau: float) -> Tensor:
    """MoCo v3's Algorithm 1 and Eq. 1, sum by sum, with PyTorch's batch norm."""
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


def test_loss_and_gradients_are_those_of_the_equations():
    torch.manual_seed(0)
    f_q = moco_v3.build(configured())
    f_k = moco_v3.key_network(f_q)
    for network in (f_q, f_k):
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # the two differ; scales and shifts are not 1 and 0
    one, two = torch.randn(2, 6, 3, 4, 32, 32)
    q, features = f_q(torch.cat([one, two]))
    k, _ = f_k(torch.cat([one, two]))
    (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
    loss = moco_v3.contrastive_loss(q1, k2, 0.3) + moco_v3.contrastive_loss(q2, k1, 0.3)
    wanted = transcribed_loss(f_q, f_k, [one, two], 0.3)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and not features.requires_grad
    learned = [parameter for parameter in f_q.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(x, learned) for x in (loss, wanted))
    for gradient, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-6 + 1e-4 * float(reference.abs().max()))
    assert not any(parameter.requires_grad for parameter in f_k.parameters())


def test_a_loss_by_hand():
    """Two queries that are their own keys, at right angles: -log(e^(1/tau) / (e^(1/tau) + e^0)), times 2 tau."""
    q = torch.tensor([[2.0, 0.0], [0.0, 0.5]])  # of any length
    wanted = 2 * 0.2 * math.log(1 + math.exp(-1 / 0.2))
    assert float(moco_v3.contrastive_loss(q, 3 * q, 0.2)) == pytest.approx(wanted, rel=1e-4)
    same = torch.ones(8, 4)
    assert float(moco_v3.contrastive_loss(same, same, 0.2)) == pytest.approx(0.4 * math.log(8))


def test_batch_norm_sees_one_view_at_a_time():
    f_q = moco_v3.build(configured())
    one, two, other = torch.randn(3, 4, 3, 4, 32, 32)
    first, second = (f_q(torch.cat([one, x]))[0][:4] for x in (two, 9 * other))
    assert torch.allclose(first, second, atol=1e-5)


# ---- what learns, what follows, what stays ----


@pytest.fixture(scope="module")
def steps(settings, tmp_path_factory) -> list[dict]:
    """The checkpoints after each of nine steps."""
    contents, save = [], support.run.save_checkpoint

    def spy(path: Path, content: dict) -> None:
        save(path, content)
        contents.append(torch.load(path, weights_only=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support.run, "save_checkpoint", spy)
        folder = tmp_path_factory.mktemp("steps")
        run(f"{STAGE}.py", *settings[STAGE], "run.checkpoint_every=1", "data.workers=0", f"run.folder={folder}")
    return contents


def test_the_momentum_goes_from_099_to_1_by_half_a_cosine(finished):
    """Nine steps: 1 - 0.01 * (1 + cos(180 t / 9 degrees)) / 2."""
    wanted = [0.99, 0.990302, 0.991170, 0.9925, 0.994132, 0.995868, 0.9975, 0.998830, 0.999698]
    assert [line["momentum"] for line in log(finished(STAGE))] == pytest.approx(wanted, abs=1e-6)


def test_the_key_network_follows_the_query_network(steps):
    """f_k = m f_k + (1 - m) f_q before each step; at first they are the same."""
    first = moco_v3.build(load_config(moco_v3.DEFAULT, [], steps[0]["config"])).state_dict()
    before = {"model": first, "key_network": first}
    assert {key for key in first if not key.startswith("predictor.")} == steps[0]["key_network"].keys()
    for step, after in enumerate(steps):
        momentum = 1 - 0.01 * (1 + math.cos(math.pi * step / 9)) / 2
        for key, value in after["key_network"].items():
            wanted = momentum * before["key_network"][key].double() + (1 - momentum) * before["model"][key].double()
            assert torch.allclose(value.double(), wanted, rtol=0, atol=1e-6), (step, key)
        before = after
    moved = [key for key, value in steps[-1]["key_network"].items() if not torch.equal(value, first[key])]
    assert len(moved) == len(first) - 2 - sum(key.startswith("predictor.") for key in first)


def test_the_cube_embedding_is_random_and_fixed(steps):
    """All other parameters are the optimizer's, all with weight decay, as in MoCo v3's code."""
    first = moco_v3.build(load_config(moco_v3.DEFAULT, [], steps[0]["config"])).state_dict()
    fixed = {EMBEDDING, EMBEDDING.replace("weight", "bias")}
    for content in steps:
        for part in ("model", "key_network"):
            assert all(torch.equal(content[part][key], first[key]) for key in fixed)
    assert {key for key, value in steps[-1]["model"].items() if torch.equal(value, first[key])} == fixed
    (group,) = steps[-1]["optimizer"]["param_groups"]
    assert len(group["params"]) == len(first) - 2 and (group["weight_decay"], group["betas"]) == (0.1, (0.9, 0.999))


def test_weights_start_as_in_moco_v3s_code():
    """Xavier's uniform distribution; queries, keys and values are matrices of their own."""
    state = moco_v3.build(configured()).state_dict()
    for key, bound in {
        EMBEDDING: math.sqrt(6 / (1536 + 128)),
        "encoder.blocks.1.attn.qkv.weight": math.sqrt(6 / (128 + 128)),
        "encoder.blocks.1.mlp.fc1.weight": math.sqrt(6 / (128 + 512)),
    }.items():
        assert bound * 0.999 < float(state[key].abs().max()) <= bound
        assert float(state[key].std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_two_processes_learn_what_one_does(settings, finished, tmp_path):
    """Keys, negatives and batch norm are of all processes: losses, gradients (Adam's moments), weights, features."""
    done = run(f"{STAGE}.py", *settings[STAGE], "data.workers=1", f"run.folder={tmp_path}", processes=2)
    assert done.stderr.count("batch 8 = 2 processes x 1 accumulated x 4") == 1  # rank 0 alone speaks
    one, two = (checkpoint(folder) for folder in (finished(STAGE), tmp_path))
    for number, state in one["optimizer"]["state"].items():
        ours, theirs = two["optimizer"]["state"][number]["exp_avg"], state["exp_avg"]
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6 + 1e-3 * float(theirs.abs().max())), number
    for part in ("model", "key_network"):
        keys = one[part].keys() - {"encoder.norm.bias"}  # without effect before a batch norm: its gradient is rounding
        assert all(torch.allclose(two[part][key], one[part][key], atol=1e-5) for key in keys)
    for name in ("loss", "feature_std"):
        assert [x[name] for x in log(tmp_path)] == pytest.approx([x[name] for x in log(finished(STAGE))], rel=1e-4)


def test_activation_checkpointing_changes_nothing(settings, finished, tmp_path):
    run(f"{STAGE}.py", *settings[STAGE], "run.recompute=true", f"run.folder={tmp_path}")
    one, other = checkpoint(finished(STAGE))["model"], checkpoint(tmp_path)["model"]
    assert losses(tmp_path) == losses(finished(STAGE)) and all(torch.equal(one[key], other[key]) for key in one)


# ---- collapse ----


def test_std_of_features_on_a_sphere_and_at_a_point():
    torch.manual_seed(0)
    assert float(moco_v3.feature_std(torch.randn(4000, 64))) == pytest.approx(1 / 8, rel=0.01)
    assert float(moco_v3.feature_std(torch.randn(64).expand(100, 64))) < 1e-6


def test_collapse_is_visible_in_the_log(settings, finished, tmp_path):
    """Black videos cannot be told apart, whatever is learned: no spread, and the loss of a guess, 2 x 2 tau ln 8."""
    healthy = log(finished(STAGE))[0]
    assert healthy["uniform_std"] == pytest.approx(1 / math.sqrt(128)) and healthy["feature_std"] > 0.01
    (tmp_path / "black").mkdir()
    for number in range(8):
        write_mp4(tmp_path / f"black/{number}.mp4", torch.zeros(8, 3, 32, 32, dtype=torch.uint8), rate=8)
    more = [f"data.root={tmp_path}", "data.train=black", "optim.warmup_epochs=2", f"run.folder={tmp_path / 'run'}"]
    run(f"{STAGE}.py", *settings[STAGE], *more)
    first = log(tmp_path / "run")[0]
    assert first["feature_std"] < 1e-6 and first["loss"] == pytest.approx(0.8 * math.log(8), rel=0.02)


# ---- two views ----


def test_augmentation_is_that_of_moco_v3():
    crop, jitter, gray, blur, solarize, flip = moco_v3.augmentation(configured().data, 0.3, 0.4).transforms
    assert isinstance(crop, v2.RandomResizedCrop) and (crop.size, crop.scale) == ((32, 32), [0.08, 1.0])
    (color,) = jitter.transforms
    assert (jitter.p, color.brightness, color.contrast) == (0.8, (0.6, 1.4), (0.6, 1.4))
    assert (color.saturation, color.hue, gray.p) == ((0.8, 1.2), (-0.1, 0.1), 0.2)
    assert isinstance(gray, v2.RandomGrayscale) and (blur.p, list(blur.transforms[0].sigma)) == (0.3, [0.1, 2.0])
    assert isinstance(solarize, v2.RandomSolarize) and (solarize.threshold, solarize.p) == (128, 0.4)
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0  # the toy's classes are directions
    assert moco_v3.augmentation(configured("data.flip=true").data, 0, 0).transforms[-1].p == 0.5


def views_of(folder: Path, frame: Tensor, count: int, *settings: str) -> Tensor:
    """The two views (count, 2, 4, 3, 32, 32) of a still video of this frame (3, 32, 32) in as many epochs."""
    write_mp4(folder / "still.mp4", frame.expand(12, -1, -1, -1), rate=12)
    clips = moco_v3.TwoViews([folder / "still.mp4"], 0, config=configured(*settings).data)
    return torch.stack([clips[epoch, 0][0] for epoch in range(count)])


def test_all_frames_of_a_view_are_augmented_alike_and_the_two_views_are_not(tmp_path):
    torch.manual_seed(0)
    frame = F.interpolate(255 * torch.rand(1, 3, 4, 4), size=32, mode="bilinear")[0].byte()
    views = views_of(tmp_path, frame, 30, "data.flip=true").float()
    assert (views - views[:, :, :1]).abs().mean(dim=(2, 3, 4, 5)).max() < 3  # the codec's frames differ by as much
    assert (views[:, 0] - views[:, 1]).abs().mean(dim=(1, 2, 3, 4)).min() > 3


def test_only_second_views_are_solarized_and_a_fifth_of_them(tmp_path):
    """A white frame is at least 0.6 x 255 bright unless inverted."""
    views = views_of(tmp_path, torch.full((3, 32, 32), 255, dtype=torch.uint8), 150)
    inverted = (views.float().mean(dim=(2, 3, 4, 5)) < 120).float().mean(dim=0)
    assert inverted[0] == 0 and float(inverted[1]) == pytest.approx(0.2, abs=0.1)


def test_first_views_are_blurred_and_a_tenth_of_the_second(tmp_path):
    """Neighbors in noise are independent: their difference is sqrt(2) times the std. A sigma below 0.4 does little."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 16, 16)).repeat_interleave(2, 1).repeat_interleave(2, 2).byte()
    views = views_of(tmp_path, blocks, 100, "data.crop_area=[1, 1]").float()[:, :, 0].mean(dim=2)  # gray
    ratio = views.diff(dim=-1).std(dim=(-2, -1)) / views.std(dim=(-2, -1))
    blurred = (ratio < 0.9 * ratio.max()).float().mean(dim=0)
    assert float(blurred[0]) > 0.7 and 0.02 < float(blurred[1]) < 0.2


def test_a_sample_depends_on_epoch_and_index_alone(toy_videos):
    videos = sorted((toy_videos / "train").rglob("*.mp4"))
    clips, again = (moco_v3.TwoViews(videos, 3, config=configured().data) for _ in range(2))
    state = torch.get_rng_state()
    first = clips[2, 5][0]
    torch.rand(7)
    assert torch.equal(again[2, 5][0], first) and first.shape == (2, 4, 3, 32, 32) and first.dtype == torch.uint8
    assert not torch.equal(clips[3, 5][0], first) and not torch.equal(clips[2, 6][0], first)
    torch.set_rng_state(state)
    expected = torch.rand(7)
    torch.set_rng_state(state)
    clips[0, 0]
    assert torch.equal(torch.rand(7), expected)  # the global generator is left as it was


def test_the_two_clips_start_independently(tmp_path, monkeypatch):
    """12 frames hold 5 starts of 4 frames with stride 2: all 25 pairs occur, each about as often."""
    monkeypatch.setattr(moco_v3, "augmentation", lambda *_, **__: lambda clip: clip)
    clips = moco_v3.TwoViews([write_numbered(tmp_path / "n.mp4", 12)], 0, config=configured().data)
    count = np.zeros((5, 5))
    for epoch in range(250):
        numbers = [[number_of(frame) for frame in view] for view in clips[epoch, 0][0]]
        assert all(view == list(range(view[0], view[0] + 8, 2)) for view in numbers)
        count[numbers[0][0], numbers[1][0]] += 1
    assert 0 < count.min() <= count.max() < 30


# ---- the checkpoint in later stages ----


@pytest.mark.parametrize("stage", ["finetune", "probe", "detect_ava"])
def test_later_stages_start_from_its_checkpoint(stage, settings, finished, tmp_path):
    weights = finished(STAGE) / "checkpoint.pt"
    done = run(f"{stage}.py", *settings[stage], f"init={weights}", "optim.epochs=1", f"run.folder={tmp_path}")
    assert re.search(r"encoder loaded; .*predictor, projector not needed", done.stderr)
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.parametrize("kind", [m.VideoClassifier, LinearProbe, ActionDetector])
def test_the_encoder_is_loaded_whole(kind, finished):
    content = checkpoint(finished(STAGE))
    options = {key: value for key, value in content["model_options"].items()}
    model = kind(**options, classes=8)
    load_weights(model, finished(STAGE) / "checkpoint.pt", fresh=("head.", "fc_norm.", "encoder.norm."))
    loaded = model.encoder.state_dict()
    assert all(torch.equal(value, content["model"][f"encoder.{key}"]) for key, value in loaded.items())
    assert len(loaded) >= sum(key.startswith("encoder.") for key in content["model"]) - 2


def test_the_probe_reads_the_features_that_were_contrasted(finished):
    config = load_config(moco_v3.DEFAULT, [], checkpoint(finished(STAGE))["config"])
    f_q = moco_v3.build(config)
    f_q.load_state_dict(checkpoint(finished(STAGE))["model"])
    probe = LinearProbe(**f_q.options, classes=8)
    load_weights(probe, finished(STAGE) / "checkpoint.pt", fresh=("head.",))
    clip = torch.randn(4, 3, 4, 32, 32)
    assert torch.allclose(probe.features(clip), f_q(clip)[1], atol=1e-6)


def test_features_of_videos_and_what_the_checkpoint_is_not(finished, toy_videos, tmp_path):
    weights, video = finished(STAGE) / "checkpoint.pt", min((toy_videos / "val").rglob("*.mp4"))
    run("tools.extract_features", video, "--weights", weights, "--out", tmp_path)
    assert np.load(tmp_path / f"{video.stem}.npz")["features"].shape == (3, 128)  # 24 frames, 4 x 2 in a window
    assert read_checkpoint(weights)[1]["clip_size"] == [4, 32, 32]
    for words, sentence in (
        (["pretrain.py", "--reconstruct", video], "is not a pre-training checkpoint, with its decoder"),
        (["finetune.py", "--predict", video], "is not a fine-tuned checkpoint, with its classes"),
    ):
        done = run(*words, "--weights", weights, ok=False)
        assert done.returncode == 1 and sentence in done.stderr.splitlines()[-1]
