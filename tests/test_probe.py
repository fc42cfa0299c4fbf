"""The probe: a frozen encoder stays as it is, and what is linearly separable is separated."""

import math
from pathlib import Path

import pytest
import torch
from conftest import log, losses, run, table

import data
import model as m
import probe
from support.config import load_config
from support.datasets import labelled_videos
from support.run import warmup_cosine
from support.weights import build_from_checkpoint
from tools.export_hugging_face import to_hugging_face


def configured(*settings: object):
    return load_config(probe.DEFAULT, list(map(str, settings)))


def short(videos: Path, pretrained: Path, folder: Path, *more: str) -> list[str]:
    """Twelve videos of three colors, six at a time, for thirty epochs: sixty steps."""
    return [
        *(f"data.root={videos}", "data.train=train", "data.val=val", f"init={pretrained}", f"run.folder={folder}"),
        *("data.frames=4", "data.size=32", "data.stride=1", "data.scales=[1, 0.875, 0.75, 0.66]", "data.workers=0"),
        *("optim.batch_size=6", "optim.epochs=30", "optim.base_lr=2", "run.log_every=1", *more),
    ]


def test_colors_are_linearly_separable(coloured_videos, pretrained, tmp_path):
    """Both encoders tell three colors apart, trained or not; each has its own scores."""
    done = run("probe.py", *short(coloured_videos, pretrained, tmp_path))
    printed = done.stdout.splitlines()
    assert len(printed) == 2
    assert all(line.startswith("top-1 100.00 %, top-5 100.00 % of 6 videos, 1 x 1 views") for line in printed)
    assert done.stderr.index("pre-trained encoder:") < done.stderr.index("random encoder:")
    assert "12 videos for training, 6 for testing, 3 classes" in done.stderr
    results = {line["encoder"]: line["test_top1"] for line in log(tmp_path) if "encoder" in line}
    assert results == {"pre-trained": 100.0, "random": 100.0}
    for encoder in ("pre-trained", "random"):
        rows = table(tmp_path / encoder / "scores.csv")
        assert [row["class"] for row in rows] == ["blue", "blue", "green", "green", "red", "red"]
        assert all(row["class"] == row["prediction"] for row in rows)
    heads = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["heads"]
    assert not torch.equal(heads["pre-trained.weight"], heads["random.weight"])
    assert losses(tmp_path)[-1] < 0.5 < losses(tmp_path)[0] == pytest.approx(math.log(3), abs=0.6)


def test_the_encoder_is_frozen_and_always_in_eval_mode(coloured_videos, pretrained, tmp_path, monkeypatch):
    """Not one bit of it changes, no gradient is computed; the features are the pre-trained encoder's, with its norm."""
    built, before, heads, seen, original = {}, {}, {}, [], probe.build

    def note(module, inputs, output) -> None:
        seen.append((module.training or module.blocks[0].training, output.requires_grad))

    def build(*arguments):
        built.update(original(*arguments))
        for name, each in built.items():
            each.encoder.register_forward_hook(note)
            before[name] = {key: value.clone() for key, value in each.encoder.state_dict().items()}
            heads[name] = each.head.weight.clone()
        return built

    monkeypatch.setattr(probe, "build", build)
    run("probe.py", *short(coloured_videos, pretrained, tmp_path, "optim.epochs=2"))
    assert set(before) == {"pre-trained", "random"} and len(seen) == 2 * (4 + 1) and set(seen) == {(False, False)}
    stored = torch.load(pretrained, weights_only=True)["model"]
    for name, each in built.items():
        state = each.encoder.state_dict()
        assert state.keys() == before[name].keys()
        assert all(torch.equal(state[key], value) for key, value in before[name].items())
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in each.encoder.parameters())
        assert not torch.equal(each.head.weight, heads[name])
        assert all(torch.equal(state[key], stored[f"encoder.{key}"]) for key in state) == (name == "pre-trained")
        each.train()
        assert not any(part.training for part in each.encoder.modules()) and each.training and each.head.training
    fc1 = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(before["random"][fc1], before["pre-trained"][fc1])

    full, clip = build_from_checkpoint(pretrained, m.VideoMAE), torch.randn(2, 3, 8, 64, 64)
    pre_trained = built["pre-trained"]
    with torch.no_grad():
        assert torch.equal(pre_trained.features(clip), full.encoder(clip).mean(dim=1))
        assert torch.equal(pre_trained(clip), pre_trained.head(full.encoder(clip).mean(dim=1)))


def test_the_loss_is_that_of_softmax_regression_on_the_features(coloured_videos, pretrained, tmp_path):
    """Three steps of SGD with momentum (Table 11), written out on the same clips."""
    more = ["data.scales=[1.0]", "optim.batch_size=12", "optim.epochs=3", "model.against_random=false"]
    settings = short(coloured_videos, pretrained, tmp_path, *more)
    run("probe.py", *settings)
    c = configured(*settings)
    videos, _, _ = labelled_videos(str(coloured_videos), "train", "val", "")
    each = probe.build(c, 3)["pre-trained"]
    clips = data.LabelledClips(videos, 0, data_config=c.data, augment=lambda frames, _: data.center_crop(frames, 32))
    weight, bias = each.head.weight.detach().clone(), each.head.bias.detach().clone()
    velocity, expected = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    for step in range(3):
        samples = [clips[step, index] for index in range(12)]
        features = each.features(data.normalize(torch.cat([sample[0] for sample in samples])))
        labels = torch.tensor([int(sample[1]) for sample in samples])
        probabilities = (features @ weight.T + bias).softmax(dim=1)
        expected.append(float(-probabilities[torch.arange(12), labels].log().mean()))
        error = (probabilities - torch.eye(3)[labels]) / 12
        lr = warmup_cosine(step, 3, c.optim.warmup_epochs, 2 * 12 / 256, 0.0)
        for number, gradient in enumerate((error.T @ features, error.sum(dim=0))):
            velocity[number] = 0.9 * velocity[number] + gradient
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "random").exists()


def test_weights_in_other_namings_are_probed_alike(coloured_videos, pretrained, tmp_path):
    state, clip = torch.load(pretrained, weights_only=True)["model"], torch.randn(1, 3, 4, 32, 32)
    expected = probe.build(configured(*short(coloured_videos, pretrained, tmp_path)), 3)["pre-trained"](clip)
    for name, content in (("official.pth", {"model": state}), ("hugging_face.bin", to_hugging_face(state))):
        torch.save(content, tmp_path / name)
        more = "model.pretrained_clip=[8,64,64]"
        other = configured(*short(coloured_videos, tmp_path / name, tmp_path, more))
        assert torch.equal(probe.build(other, 3)["pre-trained"](clip), expected)
