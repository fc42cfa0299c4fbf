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


def short(videos: Path, pretrained: Path, folder: Path, *more: str) -> list[str]:
    """Return the settings for twelve videos of three colors, six at a time, thirty epochs: sixty steps."""
    places = [f"data.root={videos}", "data.train=train", "data.val=val", f"init={pretrained}", f"run.folder={folder}"]
    clips = ["data.frames=4", "data.size=16", "data.stride=1", "data.scales=[1, 0.875, 0.75, 0.66]", "data.workers=0"]
    optim = ["optim.batch_size=6", "optim.epochs=30", "optim.warmup_epochs=1", "optim.base_lr=2"]
    return [*places, *clips, *optim, "model.batch_norm=false", "run.log_every=1", *more]


def test_colors_are_linearly_separable(colored_videos, pretrained, tmp_path):
    """Both encoders tell three colors apart, trained or not; each has its own scores."""
    done = run("probe.py", *short(colored_videos, pretrained, tmp_path))
    line = f"top-1 100.00 % (mean over classes 100.00 %) of 6 videos, 1 x 1 views: {tmp_path}"
    assert done.stdout == f"{line}/pre-trained/scores.csv\n{line}/random/scores.csv\n{line}/initial/scores.csv\n"
    assert done.stderr.index("pre-trained encoder:") < done.stderr.index("random encoder:")
    assert "12 videos for training, 6 for the test, 3 classes" in done.stderr
    results = {line["encoder"]: line["test_top1"] for line in log(tmp_path) if "encoder" in line}
    assert results == {"pre-trained": 100.0, "random": 100.0, "initial": 100.0}
    for encoder in results:
        predictions = [row["prediction"] for row in table(tmp_path / encoder / "scores.csv")]
        assert predictions == ["blue", "blue", "green", "green", "red", "red"]
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert not torch.equal(content["heads"]["pre-trained.weight"], content["heads"]["random.weight"])
    assert losses(tmp_path)[-1] < 0.5 < losses(tmp_path)[0] == pytest.approx(math.log(3), abs=0.6)
    assert content["step"] == 60


def test_the_encoder_is_frozen_and_always_in_eval_mode(colored_videos, pretrained, tmp_path, monkeypatch):
    """Not one bit of it changes, no gradient is computed; the features are the pre-trained encoder's, with its norm."""
    probes, seen, original = {}, [], probe.build

    def note(module, inputs, output) -> None:
        seen.append((module.training or module.blocks[0].training, output.requires_grad))

    def build(*arguments):
        probes.update(original(*arguments))
        for each in probes.values():
            each.encoder.register_forward_hook(note)
        return probes

    monkeypatch.setattr(probe, "build", build)
    settings = short(colored_videos, pretrained, tmp_path, "optim.epochs=2")
    run("probe.py", *settings)
    assert probes.keys() == {"pre-trained", "random", "initial"}
    assert len(seen) == 3 * (4 + 1) and set(seen) == {(False, False)}
    before = original(load_config(probe.DEFAULT, settings), 3)
    for name, each in probes.items():
        first = before[name].state_dict()
        changed = [key for key, value in each.state_dict().items() if not torch.equal(value, first[key])]
        assert changed == ["head.weight", "head.bias"]
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in each.encoder.parameters())
        each.train()
        assert not any(part.training for part in each.encoder.modules()) and each.training and each.head.training

    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = build_from_checkpoint(pretrained, m.VideoMAE).encoder(clip).mean(dim=1)
        assert torch.equal(probes["pre-trained"].features(clip), expected)
        assert torch.equal(probes["pre-trained"](clip), probes["pre-trained"].head(expected))
        assert not torch.allclose(probes["random"].features(clip), expected, atol=0.1)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_loss_is_that_of_softmax_regression_on_the_features(colored_videos, pretrained, tmp_path, batch_norm):
    """Three steps of SGD with momentum (Table 11), written out on the same clips."""
    more = ["data.scales=[1.0]", "optim.batch_size=12", "optim.epochs=3", "optim.momentum=0.8"]
    more.append(f"model.batch_norm={batch_norm}")
    settings = short(colored_videos, pretrained, tmp_path, *more, "model.against_random=false", "run.seed=1")
    run("probe.py", *settings)
    config = load_config(probe.DEFAULT, settings)
    videos, _, _ = labelled_videos(str(colored_videos), "train", "val", "")
    model = probe.build(config, 3)["pre-trained"]
    clips = data.LabelledClips(videos, 1, data_config=config.data, augment=lambda x, _: data.center_crop(x, 16))
    linear = model.head[1] if batch_norm else model.head
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    velocity, expected = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    for step in range(3):
        frames, labels, _ = data.collate([clips[step, index] for index in range(12)])  # (12, 1, T, 3, 32, 32), (12,)
        features = model.features(data.normalize(frames.squeeze(1)))
        if batch_norm:
            features = (features - features.mean(dim=0)) / (features.var(dim=0, correction=0) + 1e-6).sqrt()
        probabilities = (features @ weight.T + bias).softmax(dim=1)
        expected.append(float(-probabilities[torch.arange(12), labels].log().mean()))
        error = (probabilities - torch.eye(3)[labels]) / 12
        lr = warmup_cosine(step, 3, config.optim.warmup_epochs, 2 * 12 / 256, 0.0)
        for number, gradient in enumerate((error.T @ features, error.sum(dim=0))):
            velocity[number] = 0.8 * velocity[number] + gradient
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "random").exists()
