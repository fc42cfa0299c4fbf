"""The probe: a frozen encoder stays as it is, what is linearly separable is separated, runs go on and can be shared."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import data
import model as m
import probe
import support.datasets
import support.run
import support.weights
from support.config import UserError, load_config

PROBE = ROOT / "probe.py"


def configured(*settings: object):
    return load_config(probe.DEFAULT, list(map(str, settings)))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """An encoder for clips of 4 x 32 x 32, as pretrain.py leaves it; its weights are random."""
    torch.manual_seed(5)
    model = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=1, clip_size=(4, 32, 32), cube=configured().model.cube)
    with torch.no_grad():
        model.encoder.norm.weight.add_(0.1 * torch.randn(128)), model.encoder.norm.bias.add_(0.1 * torch.randn(128))
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pt"
    torch.save(dict(model=model.state_dict(), model_options=model.options), path)
    return path


def settings(videos: Path, pretrained: Path, folder: Path) -> list[str]:
    """Twelve videos of three colours, six at a time, for thirty epochs: sixty steps."""
    return [
        f"data.root={videos}", "data.train=train", "data.val=val", f"init={pretrained}", f"run.folder={folder}", "data.frames=4", "data.size=32", "data.stride=1",
        "data.scales=[1, 0.875, 0.75, 0.66]", "optim.batch_size=6", "optim.epochs=30", "optim.base_lr=2", "run.log_every=1", "run.checkpoint_every=15",
    ]  # fmt: skip


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line]


def scores(folder: Path, encoder: str) -> list[dict]:
    with open(folder / encoder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reference_run(coloured_videos, pretrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = run(PROBE, *settings(coloured_videos, pretrained, folder))
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_colours_are_linearly_separable(reference_run):
    """Both encoders tell three colours apart, trained or not; each has its own scores."""
    printed, said = (reference_run / "stdout.txt").read_text().splitlines(), (reference_run / "stderr.txt").read_text()
    assert len(printed) == 2 and all(line.startswith("top-1 100.00 %, top-5 100.00 % of 6 videos, 1 x 1 views") for line in printed)
    assert said.index("pre-trained encoder:") < said.index("random encoder:")
    assert "12 videos for training, 6 for testing, 3 classes" in said and "60 steps = 30 epochs x 2" in said
    results = {line["encoder"]: line["test_top1"] for line in log(reference_run) if "encoder" in line}
    assert results == {"pre-trained": 100.0, "random": 100.0}
    for encoder in ("pre-trained", "random"):
        rows = scores(reference_run, encoder)
        assert [row["class"] for row in rows] == ["blue", "blue", "green", "green", "red", "red"] == [row["prediction"] for row in rows]
    heads = torch.load(reference_run / "checkpoint.pt", weights_only=True)["heads"]
    assert not torch.equal(heads["pre-trained.weight"], heads["random.weight"])
    assert losses(reference_run)[-1] < 0.5 < losses(reference_run)[0] == pytest.approx(math.log(3), abs=0.6)


def test_the_schedule_is_table_11s(reference_run):
    c = configured()
    warm, peak = 2 * c.optim.warmup_epochs, 2 * 6 / 256
    assert [line["lr"] for line in log(reference_run) if "loss" in line] == pytest.approx([support.run.warmup_cosine(step, 60, warm, peak, 0.0) for step in range(60)])
    ssv2 = configured(probe.CONFIGS / "ssv2_base.yaml")
    assert ssv2.optim.base_lr * ssv2.optim.batch_size / 256 == pytest.approx(0.4)
    assert (ssv2.optim.epochs, ssv2.optim.warmup_epochs, ssv2.optim.momentum, ssv2.optim.batch_size) == (100, 10, 0.9, 1024)
    assert ssv2.data.scales == [1.0, 0.875, 0.75, 0.66]


@pytest.mark.parametrize("path", sorted(probe.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_builds(path, tmp_path):
    c = configured(path)
    m.cube_grid((c.data.frames, c.data.size, c.data.size), c.model.cube)
    assert c.run.folder == f"runs/probe/{path.stem}" and (ROOT / "configs/pretrain" / f"{Path(c.init).parent.name}.yaml").exists()
    assert c.data.sampling in data.SAMPLING and (c.data.sampling == "uniform") == path.stem.startswith("ssv2")
    assert c.model.against_random == (path.stem == "toy")


def in_process(monkeypatch, *arguments: object) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["probe.py", *map(str, arguments), "data.workers=0"])
    probe.main()


def test_the_encoder_is_frozen_and_always_in_eval_mode(coloured_videos, pretrained, tmp_path, monkeypatch):
    """Not one bit of it changes, no gradient is computed; the features are those of the pre-trained encoder, its norm included."""
    built, seen, original = {}, [], probe.build

    def build(*arguments):
        built.update(original(*arguments))
        for each in built.values():
            each.encoder.register_forward_hook(lambda module, inputs, output: seen.append((module.training or module.blocks[0].training, output.requires_grad)))
        before.update({name: {key: value.clone() for key, value in each.encoder.state_dict().items()} for name, each in built.items()})
        heads.update({name: each.head.weight.clone() for name, each in built.items()})
        return built

    before, heads = {}, {}
    monkeypatch.setattr(probe, "build", build)
    in_process(monkeypatch, *settings(coloured_videos, pretrained, tmp_path), "optim.epochs=2")
    assert set(before) == {"pre-trained", "random"} and len(seen) == 2 * (4 + 1) and set(seen) == {(False, False)}
    stored = torch.load(pretrained, weights_only=True)["model"]
    for name, each in built.items():
        state = each.encoder.state_dict()
        assert state.keys() == before[name].keys() and all(torch.equal(state[key], value) for key, value in before[name].items())
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in each.encoder.parameters())
        assert not torch.equal(each.head.weight, heads[name])
        assert all(torch.equal(state[key], stored[f"encoder.{key}"]) for key in state) == (name == "pre-trained")
        each.train()
        assert not any(module.training for module in each.encoder.modules()) and each.training and each.head.training
    assert not torch.equal(before["random"]["blocks.0.mlp.fc1.weight"], before["pre-trained"]["blocks.0.mlp.fc1.weight"])

    full = support.weights.build_from_checkpoint(pretrained)
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(built["pre-trained"].features(clip), full.encoder(clip).mean(dim=1))
        assert torch.equal(built["pre-trained"](clip), built["pre-trained"].head(full.encoder(clip).mean(dim=1)))


def test_the_loss_is_that_of_softmax_regression_on_the_features(coloured_videos, pretrained, tmp_path, monkeypatch):
    """Three steps of SGD with momentum, written out on the same clips."""
    more = ["data.scales=[1.0]", "optim.batch_size=12", "optim.epochs=3", "model.against_random=false"]
    in_process(monkeypatch, *settings(coloured_videos, pretrained, tmp_path), *more)
    c = configured(*settings(coloured_videos, pretrained, tmp_path), *more)
    videos, _, names = support.datasets.labelled(str(coloured_videos), "train", "val", "")
    each = probe.build(c, 3)["pre-trained"]
    clips = data.LabelledClips(videos, frames=4, stride=1, sampling="dense", augment=lambda frames, generator: data.center_crop(frames, 32), repeats=1, seed=0)
    weight, bias = each.head.weight.detach().clone(), each.head.bias.detach().clone()
    velocity, expected = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    for step in range(3):
        samples = [clips[step, index] for index in range(12)]
        features = each.features(data.normalize(torch.cat([sample[0] for sample in samples])))
        labels = torch.tensor([int(sample[1]) for sample in samples])
        probabilities = (features @ weight.T + bias).softmax(dim=1)
        expected.append(float(-probabilities[torch.arange(12), labels].log().mean()))
        error = (probabilities - torch.eye(3)[labels]) / 12
        lr = support.run.warmup_cosine(step, 3, c.optim.warmup_epochs, 2 * 12 / 256, 0.0)
        for number, gradient in enumerate((error.T @ features, error.sum(dim=0))):
            velocity[number] = 0.9 * velocity[number] + gradient
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "random").exists()


def test_an_interrupted_run_goes_on_bit_for_bit(coloured_videos, pretrained, reference_run, tmp_path, monkeypatch):
    save = support.run.save_checkpoint

    def save_and_stop(path, **content):
        save(path, **content)
        if content["step"] == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(probe, "save_checkpoint", save_and_stop)
        in_process(patched, *settings(coloured_videos, pretrained, tmp_path))
    assert len(losses(tmp_path)) == 30
    in_process(monkeypatch, *settings(coloured_videos, pretrained, tmp_path))
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path, reference_run))
    assert one["step"] == 60 and all(torch.equal(one["heads"][key], value) for key, value in other["heads"].items())
    assert losses(tmp_path) == losses(reference_run)
    assert all((tmp_path / name / "scores.csv").read_bytes() == (reference_run / name / "scores.csv").read_bytes() for name in ("pre-trained", "random"))


def test_two_processes_are_as_good_as_one(coloured_videos, pretrained, reference_run, tmp_path):
    done = run(PROBE, *settings(coloured_videos, pretrained, tmp_path), "run.batch_per_device=2", processes=2)
    assert "batch 6 = 2 processes x 3 accumulated x 1 videos" in done.stderr and done.stdout.count("top-1") == 2
    assert losses(tmp_path) == pytest.approx(losses(reference_run), rel=1e-4, abs=1e-6)
    for name in ("pre-trained", "random"):
        for a, b in zip(scores(tmp_path, name), scores(reference_run, name), strict=True):
            assert a["video"] == b["video"] and [float(a[c]) for c in ("blue", "green", "red")] == pytest.approx([float(b[c]) for c in ("blue", "green", "red")], abs=1e-4)


def test_weights_in_other_namings_are_probed_alike(coloured_videos, pretrained, tmp_path):
    state = torch.load(pretrained, weights_only=True)["model"]
    clip = torch.randn(1, 3, 4, 32, 32)
    c = configured(*settings(coloured_videos, pretrained, tmp_path))
    expected = probe.build(c, 3)["pre-trained"](clip)
    for name, content in (("official.pth", {"model": state}), ("hugging_face.bin", support.weights.to_hugging_face(state))):
        torch.save(content, tmp_path / name)
        other = configured(*settings(coloured_videos, tmp_path / name, tmp_path), "model.pretrained_clip=[4,32,32]")
        assert torch.equal(probe.build(other, 3)["pre-trained"](clip), expected)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ("init=none.pt", "no weights at init=none.pt: make them with pretrain.py, or name another file"),
        ("init=scratch", "no weights at init=scratch: make them with pretrain.py, or name another file"),
        ("model.size=S", "does not fit this LinearProbe"),
        ("optim.layer_decay=0.7", "unknown key 'optim.layer_decay'"),
        ("optim.batch_size=13", "12 videos are fewer than one batch: set optim.batch_size to 12 or less"),
        ("data.size=40", "40 pixels of height is not a whole number of cubes"),
        ("data.sampling=tsn", "data.sampling=tsn is not known"),
        ("optim.epochs=0", "optim.epochs=0 has to be at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(more, sentence, coloured_videos, pretrained, tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        in_process(monkeypatch, *settings(coloured_videos, pretrained, tmp_path / "run"), more)
    assert sentence in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()
