"""Targets, mixing and accuracy by hand; runs; test and prediction of any weights; comparison of two models."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import log, losses, run, table
from torchvision import tv_tensors

import finetune
from support.config import load_config
from tools.export_hugging_face import to_hugging_face


def test_label_smoothing_by_hand():
    targets = finetune.soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    assert torch.equal(finetune.soft_targets(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


VALUES = torch.arange(4.0).view(4, 1, 1, 1, 1)


def mixed(mixup: float, cutmix: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix four clips of 6 x 20 x 24, clip i all of value i, and targets of class i."""
    torch.manual_seed(seed)
    clips, targets = finetune.mixing(mixup, cutmix)(tv_tensors.Video(VALUES.repeat(1, 3, 6, 20, 24)), torch.eye(4))
    return clips.as_subclass(torch.Tensor), targets


def test_mixup_and_cutmix():
    """Targets sum to 1 and say how much of a clip is whose; one box for all frames; either of the two, evenly often."""
    cut, boxes = 0, set()
    for seed in range(60):
        clips, targets = mixed(0.8, 1.0, seed)
        own = float(targets[0, 0])
        assert torch.allclose(targets, own * torch.eye(4) + (1 - own) * torch.eye(4).roll(-1, 1)) and 0 <= own <= 1
        expected = own * VALUES + (1 - own) * VALUES.roll(1, 0)
        if torch.isin(clips, VALUES).all():
            cut += 1
            box = clips[0, 0, 0] != 0  # (20, 24), from the clip before
            expected = torch.where(box, VALUES.roll(1, 0), VALUES)
            assert box.sum() == box.any(dim=1).sum() * box.any(dim=0).sum()
            assert float(box.float().mean()) == pytest.approx(1 - own, abs=1e-6)
            boxes.add(tuple(box.flatten().tolist()))
        assert torch.allclose(clips, expected.expand_as(clips), atol=1e-5)
    assert 18 < cut < 42 and len(boxes) > 15


def test_the_rates_of_mixing():
    """0 leaves one of the two out; mixup's weights are from a Beta distribution."""
    clips, targets = mixed(0, 0, 0)
    assert torch.equal(targets, torch.eye(4)) and torch.equal(clips, VALUES.expand_as(clips))
    assert all(torch.isin(mixed(0, 1.0, seed)[0], VALUES).all() for seed in range(5))
    assert all(len(mixed(0.8, 0, seed)[0].unique()) == 4 for seed in range(5))
    weights = torch.stack([mixed(0.8, 0, seed)[1][0, 0] for seed in range(400)])
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(weights.var()) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.2)


def test_accuracy_by_hand():
    """An unreadable video is wrong, whatever its class. There may be fewer than five classes."""
    unreadable = [math.nan] * 7
    scores = torch.tensor([[9, 5, 3, 3, 2, 1, 0], [2, 9, 5, 5, 3, 1, 0], unreadable, [0, 1, 1, 5, 9, 1, 3]])
    for classes, labels, top1, top5 in ((7, [0, 0, 0, 4], 50, 75), (7, [6, 6, 1, 0], 0, 0), (2, [0, 1, 1, 1], 75, 75)):
        assert finetune.accuracy(scores[:, :classes], torch.tensor(labels)) == pytest.approx((top1, top5))
    assert finetune.rates(scores, torch.tensor([0, 0, 0, 4]))["class_mean"] == pytest.approx((100 / 3 + 100) / 2)


def check_tables(folder: Path, count: int) -> list[dict[str, str]]:
    """Check scores.csv and classes.csv of `count` toy videos against each other. Return the rows of scores.csv."""
    rows, classes = table(folder / "scores.csv"), table(folder / "classes.csv")
    names = [row["class"] for row in classes]
    assert len(rows) == count and len(names) == 4 and list(rows[0])[3:] == names
    for row in rows:
        scores = [row[name] for name in names]
        if row["prediction"] == "unreadable":
            assert scores == [""] * 4
        else:
            assert sum(map(float, scores)) == pytest.approx(1, abs=1e-4)
            assert row["prediction"] == max(names, key=row.get)
        assert Path(row["video"]).parent.name == row["class"]
    for row in classes:
        right = [score["prediction"] == score["class"] for score in rows if score["class"] == row["class"]]
        assert int(row["videos"]) == len(right)
        assert row["top1"] == (f"{100 * sum(right) / len(right):.2f}" if right else "")
    return rows


def test_what_a_run_prints_and_leaves(finished, pretrained):
    folder = finished("finetune")
    messages, printed = (folder / "said.txt").read_text(), (folder / "printed.txt").read_text()
    assert f"initialized from {pretrained}" in messages and "encoder loaded; fc_norm, head new; " in messages
    assert "24 videos for training, 8 for validation, 4 classes; 2 clips of each video" in messages
    lr = load_config(finetune.DEFAULT, [str(folder / "config.yaml")]).optim.base_lr * 8 / 256
    assert f"in the cube embedding {lr * 0.7**5:.3g}\n" in messages  # with four blocks
    one_view = r"^epoch 2: top-1 [\d.]+ % \(mean over classes [\d.]+ %\) of 8 videos, one view$"
    assert re.search(one_view, messages, re.M) and "epoch 1:" not in messages and "epoch 3:" not in messages
    assert re.fullmatch(r"top-1 [\d.]+ % \(.*\) of 8 videos, 2 x 3 views: \S+/scores.csv\n", printed)
    assert [line["step"] for line in log(folder) if "top1" in line] == [6]
    top1 = 100 * sum(row["prediction"] == row["class"] for row in check_tables(folder, 8)) / 8
    assert log(folder)[-1] == dict(step=9, test_top1=pytest.approx(top1)) and f"top-1 {top1:.2f} %" in printed


@pytest.mark.parametrize("start", ["scratch", "pretrained", "finetuned"])
def test_a_model_starts_from_scratch_or_from_weights_at_another_size(start, pretrained, finished):
    folder, stored = finished("finetune"), torch.load(pretrained)["model"]
    size = ["data.frames=8", "data.size=48"] if start == "finetuned" else []  # 4 and 16 before
    path = {"scratch": start, "pretrained": pretrained, "finetuned": folder / "checkpoint.pt"}[start]
    more = [f"init={path}", "model.drop_path=0.5", "model.dropout=0.5", *size]
    config = load_config(finetune.DEFAULT, [str(folder / "config.yaml"), *more])
    model = finetune.build(config, 4)
    assert model.dropout.p == model.encoder.blocks[-1].drop_path.p == 0.5
    assert model.options["clip_size"] == ([4, 16, 16] if start == "scratch" else [8, 32, 32])
    finetuned, block = torch.load(folder / "checkpoint.pt"), "encoder.blocks.2.mlp.fc1.weight"
    same = [key for key, value in model.state_dict().items() if torch.equal(value, finetuned["model"][key])]
    assert (len(same) == len(finetuned["model"])) == (start == "finetuned")  # with the head; the others have learned
    assert torch.equal(model.state_dict()[block], stored[block]) == (start == "pretrained")

    positions = torch.randn_like(finetuned["positions"])  # of a run that resumes
    model = finetune.build(config, 4, finetuned | dict(positions=positions))
    assert model.options == finetuned["model_options"] and torch.equal(model.encoder.pos_embed, positions)


def color_settings(videos: Path, folder: Path, *more: str) -> list[str]:
    clips = [f"data.root={videos}", "data.train=train", "data.val=val", "data.frames=2", "data.size=16"]
    return [*clips, "init=scratch", "data.workers=0", "run.validate_every=0", f"run.folder={folder}", *more]


def test_each_augmented_clip_keeps_the_target_of_its_video(colored_videos, tmp_path, monkeypatch):
    """First one clip of each video, then the next: so mixup mixes clips of different videos. Targets may be soft."""
    seen = []

    def mix(clip, targets):
        seen.append((clip.as_subclass(torch.Tensor).mean(dim=(2, 3, 4)).argmax(dim=1), targets.argmax(dim=1)))
        return clip, torch.full_like(targets, 1 / 3)

    monkeypatch.setattr(finetune, "mixing", lambda *_: mix)
    more = ["data.repeats=3", "optim.batch_size=4", "optim.epochs=4", "run.batch_per_device=12", "run.log_every=1"]
    more += ["run.validate_every=2"]
    run("finetune.py", *color_settings(colored_videos, tmp_path, *more), "optim.base_lr=0.1", "optim.warmup_epochs=0")
    assert len(seen) == 12 and {len(labels) for _, labels in seen} == {12}
    for color, labels in seen:
        assert torch.equal(color, 2 - labels)  # blue, green, red are channels 2, 1, 0
        assert torch.equal(labels, labels[:4].repeat(3))
    assert min(losses(tmp_path)) > math.log(3) - 1e-4  # whatever is learned
    assert [line["epoch"] for line in log(tmp_path) if "top1" in line] == [2]  # the last one is tested


def test_colors_are_learned_from_scratch(colored_videos, tmp_path):
    """Twelve epochs of twelve videos of three colors, which pixels tell: every test video is recognized."""
    optim = ["optim.batch_size=6", "optim.epochs=12", "optim.base_lr=0.05", "optim.warmup_epochs=2"]
    done = run("finetune.py", *color_settings(colored_videos, tmp_path, *optim))
    assert "top-1 100.00 % (mean over classes 100.00 %) of 6 videos" in done.stdout
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 24


def test_a_distributed_test_is_exact_and_names_a_broken_video(toy_videos, finished, tmp_path):
    """Seven videos on one and on two processes, the last one broken and alone in its batch: the same file."""
    videos = sorted((toy_videos / "val").rglob("*.mp4"))[:7]
    broken = tmp_path / videos[6].parent.name / "broken.mp4"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(videos[6].read_bytes()[:700])
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*videos[:6], broken]))
    words = ["--weights", finished("finetune") / "checkpoint.pt", f"data.val={tmp_path / 'list.txt'}", "--test"]
    runs = [run("finetune.py", *words, "--out", tmp_path / f"{n}", processes=n) for n in (0, 2)]
    for name in ("scores.csv", "classes.csv"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    rows, whole = check_tables(tmp_path / "2", 7), table(finished("finetune") / "scores.csv")
    assert rows[:6] == whole[:6]
    assert rows[6]["video"] == str(broken) and rows[6]["prediction"] == "unreadable"
    top1 = 100 * sum(row["prediction"] == row["class"] for row in rows) / 7
    for done in runs:
        assert done.stderr.count("counted as wrong:") == 1 and f"counted as wrong: {broken}: " in done.stderr
        assert done.stdout.count("of 7 videos, 1 of them unreadable, 2 x 3 views") == 1
        assert f"top-1 {top1:.2f} %" in done.stdout


@pytest.fixture(scope="module")
def foreign(toy_videos, finished, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """The finished run's weights as in an official file and in a folder of Hugging Face; the settings they lack."""
    folder, content = tmp_path_factory.mktemp("foreign"), torch.load(finished("finetune") / "checkpoint.pt")
    state = {key.removeprefix("encoder."): value for key, value in content["model"].items()}
    torch.save({"module": state}, folder / "official.pth")
    (folder / "hub").mkdir()
    torch.save(to_hugging_face(content["model"]), folder / "hub/pytorch_model.bin")
    sizes = dict(num_frames=8, image_size=32, tubelet_size=1, patch_size=8, hidden_size=128, num_hidden_layers=4)
    labels = {str(i): f"HF {name}" for i, name in enumerate(content["classes"])}
    (folder / "hub/config.json").write_text(json.dumps(dict(id2label=labels) | sizes))
    options = content["config"]["data"]
    settings = [f"data.{key}={options[key]}" for key in ("frames", "size", "stride", "test_clips", "test_crops")]
    settings += [f"data.root={toy_videos}", "data.train=train", "data.val=val", "model.pretrained_clip=[8,32,32]"]
    return folder / "official.pth", folder / "hub", settings


def test_any_weights_can_be_tested(finished, foreign, tmp_path):
    """A checkpoint of this project knows the order of its classes."""
    own, (_, hub, settings) = finished("finetune") / "checkpoint.pt", foreign
    for weights, more in ((own, ["data.classes="]), (hub, [*settings, "data.classes=classes.txt"])):
        done = run("finetune.py", "--test", "--weights", weights, "--out", tmp_path, "--json", "data.workers=0", *more)
        assert (tmp_path / "scores.csv").read_bytes() == (own.parent / "scores.csv").read_bytes()
        top1 = 100 * sum(row["prediction"] == row["class"] for row in check_tables(tmp_path, 8)) / 8
        result = json.loads(done.stdout)
        assert 0 <= result.pop("top5") <= 100 and 0 <= result.pop("class_mean") <= 100
        assert result == dict(top1=pytest.approx(top1), videos=8, unreadable=0, clips=2, crops=3)


def test_any_weights_predict(finished, foreign, tmp_path):
    """Names are the checkpoint's, those of data.classes, of config.json, or numbers; probabilities are the test's."""
    own, (official, hub, settings) = finished("finetune") / "checkpoint.pt", foreign
    names = torch.load(own)["classes"]
    row = table(own.parent / "scores.csv")[2]
    ranked = sorted(names, key=lambda name: -float(row[name]))[:5]
    words = ["data.workers=0", "--predict", row["video"], tmp_path / "none.mp4", "--weights"]
    for weights, processes, expected_names in (
        ([own], 2, ranked),  # printed once
        ([official, *settings, "data.classes=classes.txt"], 0, ranked),
        ([official, *settings], 0, [str(names.index(name)) for name in ranked]),
        ([hub, *settings], 0, [f"HF {name}" for name in ranked]),
    ):
        done = run("finetune.py", *words, *weights, processes=processes, ok=False)
        assert done.returncode == 1 and "1 of 2 videos cannot be read; see above" in done.stderr
        video, *lines = done.stdout.splitlines()
        assert video == row["video"] and f"cannot be read: {tmp_path / 'none.mp4'}" in done.stderr
        percents, shown = zip(*(line.split(" %  ") for line in lines), strict=True)
        expected_percents = [100 * float(row[name]) for name in ranked]
        assert [float(percent) for percent in percents] == pytest.approx(expected_percents, abs=0.06)
        assert len(shown) == 4 and set(shown) == set(expected_names)

    words.remove(tmp_path / "none.mp4")
    predictions = json.loads(run("finetune.py", *words, own, "--json").stdout)
    assert list(predictions) == [row["video"]] and list(predictions[row["video"]]) == ranked
    for name in ("predictions.json", "predictions.csv"):
        run("finetune.py", *words, own, "--out", tmp_path / "new" / name)
    assert json.loads((tmp_path / "new/predictions.json").read_text()) == predictions
    rows = [tuple(each.values()) for each in table(tmp_path / "new/predictions.csv")]
    assert rows == [(row["video"], name, f"{p:.5f}") for name, p in predictions[row["video"]].items()]


def scores_file(path: Path, right: dict[str, tuple[int, int]]) -> Path:
    """Write a scores.csv in which of each class's videos a number, of a number, are recognized."""
    rows = [["video", "class", "prediction", *right]]
    for name, (correct, count) in right.items():
        for i in range(count):
            prediction = name if i < correct else "unreadable" if i == correct else "another"
            rows.append([f"{name}{i}.mp4", name, prediction, *[""] * len(right)])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_comparison_of_two_models(tmp_path):
    first = scores_file(tmp_path / "first.csv", {"a, b": (1, 4), "c": (2, 2), "d": (3, 4), "only here": (1, 1)})
    second = scores_file(tmp_path / "second.csv", {"d": (3, 4), "c": (1, 2), "a, b": (4, 4)})
    done = run("finetune.py", "--compare", first, second, "--out", tmp_path / "out")
    heading, titles, *rows = done.stdout.splitlines()
    assert str(first) in heading and str(second) in heading and titles.split() == ["first", "second", "ahead", "class"]
    expected = ["25.00 100.00 +75.00 a, b", "75.00 75.00 +0.00 d", "100.00 50.00 -50.00 c"]
    assert [" ".join(row.split()) for row in rows] == expected and (tmp_path / "out/comparison.png").exists()

    many, more = [{f"class {i}": (i * factor % 11, 10) for i in range(60)} for factor in (1, 7)]
    done = run("finetune.py", "--compare", scores_file(tmp_path / "a.csv", many), scores_file(tmp_path / "b.csv", more))
    ahead = sorted((10 * (more[name][0] - many[name][0]) for name in many), reverse=True)
    assert [float(row.split()[2]) for row in done.stdout.splitlines()[2:]] == pytest.approx(ahead[:20] + ahead[-20:])
    assert (tmp_path / "comparison.png").exists()

    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    other = scores_file(tmp_path / "other.csv", {"z": (1, 2)})
    for path, sentence in ((other, "no class in common"), (tmp_path / "text.csv", "text.csv is not a scores.csv as")):
        done = run("finetune.py", "--compare", first, path, ok=False)
        assert done.returncode == 1 and sentence in done.stderr
