"""Targets, mixing, accuracy by hand; test and prediction of any weights; comparison of two models."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import log, losses, run, table
from torchvision import tv_tensors

import finetune
import model as m
from support import toy
from support.config import load_config
from support.datasets import labelled_videos
from support.weights import build_from_checkpoint
from tools.export_hugging_face import to_hugging_face


def configured(*settings: object):
    return load_config(finetune.DEFAULT, list(map(str, settings)))


# ---- targets and mixing ----


def test_label_smoothing_by_hand():
    targets = finetune.soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    assert torch.equal(finetune.soft_targets(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


def mixed(mixup: float, cutmix: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four clips of 6 x 20 x 24, clip i all of value i; targets of class i."""
    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 6, 20, 24).clone()
    torch.manual_seed(seed)
    mixed_clips, targets = finetune.mixing(mixup, cutmix)(tv_tensors.Video(clips), torch.eye(4))
    return mixed_clips.as_subclass(torch.Tensor), targets


def test_mixup_and_cutmix():
    """Targets sum to 1 and say how much of a clip is whose; one box for all frames; either of the two, evenly often."""
    cut, boxes = 0, set()
    for seed in range(60):
        clips, targets = mixed(0.8, 1.0, seed)
        assert torch.allclose(targets.sum(dim=1), torch.ones(4), atol=1e-6) and targets.min() >= 0
        own = targets.diagonal()
        partner = torch.stack([targets[i, i - 1] for i in range(4)])
        assert torch.allclose(own + partner, torch.ones(4), atol=1e-6) and torch.allclose(
            own, own[:1].expand(4), atol=1e-6
        )
        if torch.isin(clips, torch.arange(4.0)).all():
            cut += 1
            from_partner = clips != torch.arange(4.0).view(4, 1, 1, 1, 1)  # (4, 3, 6, 20, 24)
            assert torch.equal(from_partner, from_partner[:1, :1, :1].expand_as(from_partner))
            box = from_partner[0, 0, 0]
            rows, columns = box.any(dim=1).nonzero().flatten(), box.any(dim=0).nonzero().flatten()
            assert box.sum() == len(rows) * len(columns) and float(box.float().mean()) == pytest.approx(
                float(partner[0]), abs=1e-6
            )
            assert all((clips[i][from_partner[i]] == (i - 1) % 4).all() for i in range(4))
            boxes.add(tuple(rows.tolist()) + tuple(columns.tolist()))
        else:
            assert torch.allclose(clips[2], torch.full_like(clips[2], float(2 * own[2] + partner[2])), atol=1e-5)
    assert 18 < cut < 42 and len(boxes) > 15


def test_a_rate_of_zero_leaves_mixing_out():
    clips, targets = mixed(0, 0, 0)
    assert torch.equal(targets, torch.eye(4)) and torch.equal(clips[:, 0, 0, 0, 0], torch.arange(4.0))
    assert all(len(mixed(0.8, 0, seed)[0].unique()) == 4 for seed in range(5))
    assert all(torch.isin(mixed(0, 1.0, seed)[0], torch.arange(4.0)).all() for seed in range(5))


def test_mixup_draws_from_its_beta_distribution():
    shares = torch.stack([mixed(0.8, 0, seed)[1][0, 0] for seed in range(400)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.06) and float(shares.var()) == pytest.approx(
        1 / (4 * (2 * 0.8 + 1)), rel=0.2
    )


# ---- accuracy ----


def test_accuracy_by_hand():
    scores = torch.tensor(
        [
            [0.5, 0.2, 0.1, 0.1, 0.05, 0.05, 0.0],
            [0.1, 0.3, 0.2, 0.2, 0.1, 0.08, 0.02],
            [float("nan")] * 7,
            [0.0, 0.1, 0.1, 0.2, 0.3, 0.1, 0.2],
        ]
    )
    assert finetune.accuracy(scores, torch.tensor([0, 0, 0, 4])) == pytest.approx(
        (50, 75)
    )  # the unreadable one is wrong, whatever its class
    assert finetune.accuracy(scores, torch.tensor([6, 6, 1, 0])) == pytest.approx((0, 0))
    assert finetune.accuracy(scores[:, :2], torch.tensor([0, 1, 1, 1])) == pytest.approx(
        (75, 75)
    )  # fewer than five classes


# ---- a run ----

SMALL = ["data.frames=4", "data.size=32", "optim.batch_size=8", "run.log_every=1", "run.batch_per_device=16"]


def test_what_a_run_says_and_leaves(finished, pretrained):
    folder = finished("finetune")
    said, printed = (folder / "said.txt").read_text(), (folder / "printed.txt").read_text()
    assert f"initialized from {pretrained}" in said
    assert "encoder loaded; fc_norm, head new; " in said
    assert "24 videos for training, 8 for testing, 8 classes" in said and "2 of each video" in said
    assert "learning rate x 0.168 in the cube embedding" in said  # 0.7 ** 5 with four blocks
    one_view = r"^epoch 2: top-1 [\d.]+ %, top-5 [\d.]+ % of 8 videos, one view$"
    assert re.search(one_view, said, re.M) and "epoch 1:" not in said and "epoch 3:" not in said
    assert re.fullmatch(r"top-1 [\d.]+ %, top-5 [\d.]+ % of 8 videos, 2 x 3 views: \S+/scores.csv\n", printed)
    assert [line["step"] for line in log(folder) if "top1" in line] == [6]
    assert log(folder)[-1]["step"] == 9 and f"top-1 {log(folder)[-1]['test_top1']:.2f} %" in printed
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["classes"]) == 8 and checkpoint["model_options"]["clip_size"] == [8, 64, 64]


def test_scores_and_classes_files(finished):
    folder = finished("finetune")
    rows, classes = table(folder / "scores.csv"), table(folder / "classes.csv")
    names = list(rows[0])[3:]
    assert len(rows) == 8 and names == [row["class"] for row in classes] and len(names) == 8
    for row in rows:
        scores = [float(row[name]) for name in names]
        assert sum(scores) == pytest.approx(1, abs=1e-4) and names[scores.index(max(scores))] == row["prediction"]
        assert Path(row["video"]).parent.name == row["class"]
    for row in classes:
        right = [score["prediction"] == score["class"] for score in rows if score["class"] == row["class"]]
        assert int(row["videos"]) == len(right)
        assert row["top1"] == (f"{100 * sum(right) / len(right):.2f}" if right else "")
    top1 = 100 * sum(row["prediction"] == row["class"] for row in rows) / 8
    assert log(folder)[-1]["test_top1"] == pytest.approx(top1, abs=1e-4)


# ---- test and prediction ----


@pytest.fixture(scope="module")
def lists(toy_videos, tmp_path_factory) -> Path:
    """The toy's test videos without the last, and the same with one of them broken."""
    folder = tmp_path_factory.mktemp("lists")
    videos = sorted((toy_videos / "val").rglob("*.mp4"))[:7]
    broken = folder / videos[3].parent.name / "broken.mp4"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(videos[3].read_bytes()[:700])
    for name, paths in {"val": videos, "broken": [*videos[:3], broken, *videos[4:]]}.items():
        (folder / f"{name}.txt").write_text("".join(f"{path}\n" for path in paths))
    return folder


def test_a_distributed_test_is_exact_and_names_a_broken_video(lists, finished, tmp_path):
    """Seven videos on one and on two processes, one of them broken: the same file, to the last digit."""
    whole = table(finished("finetune") / "scores.csv")
    arguments = ["--test", "--weights", finished("finetune") / "checkpoint.pt", f"data.val={lists / 'broken.txt'}"]
    alone = run("finetune.py", *arguments, "--out", tmp_path / "alone")
    both = run("finetune.py", *arguments, "--out", tmp_path / "both", processes=2)
    for name in ("scores.csv", "classes.csv"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    for done in (alone, both):
        assert done.stderr.count("counted as wrong:") == 1
        assert re.search(r"^counted as wrong: /.*/broken.mp4: \S", done.stderr, re.M)
        assert done.stdout.count("of 7 videos, 1 of them unreadable, 2 x 3 views") == 1
    rows = table(tmp_path / "both/scores.csv")
    assert [row["prediction"] == "unreadable" for row in rows] == [False] * 3 + [True] + [False] * 3
    assert rows[3]["video"].endswith("broken.mp4") and rows[3]["class"] == whole[3]["class"]
    assert list(rows[3].values())[3:] == [""] * 8 and rows[:3] == whole[:3] and rows[4:] == whole[4:7]
    right = sum(row["prediction"] == row["class"] for row in rows)
    assert f"top-1 {100 * right / 7:.2f} %" in both.stdout


def test_weights_of_all_namings_are_tested_and_predict(toy_videos, finished, tmp_path):
    own = finished("finetune") / "checkpoint.pt"
    checkpoint = torch.load(own, weights_only=True)
    state, names = checkpoint["model"], checkpoint["classes"]
    official, hub = tmp_path / "official.pth", tmp_path / "hub/pytorch_model.bin"
    hub.parent.mkdir()
    torch.save({"module": {key.removeprefix("encoder."): value for key, value in state.items()}}, official)
    torch.save(to_hugging_face(state), hub)
    sizes = dict(num_frames=8, image_size=64, tubelet_size=2, patch_size=16, hidden_size=128, num_hidden_layers=4)
    labels = {str(i): f"HF {name}" for i, name in enumerate(names)}
    (hub.parent / "config.json").write_text(json.dumps({"id2label": labels} | sizes))
    videos = [f"data.root={toy_videos}", "data.train=train", "data.val=val", "model.pretrained_clip=[8,64,64]"]
    elsewhere = [*videos, f"data.stride={configured().data.stride}", *SMALL, "data.test_clips=2", "data.test_crops=3"]
    known = ["data.classes=classes.txt"]
    for weights, more in ((own, []), (official, elsewhere + known), (hub, elsewhere + known)):
        done = run("finetune.py", "--test", "--weights", weights, "--out", tmp_path / "out", "data.workers=0", *more)
        assert "of 8 videos, 2 x 3 views" in done.stdout
        assert (tmp_path / "out/scores.csv").read_bytes() == (finished("finetune") / "scores.csv").read_bytes()

    # names of the checkpoint, numbers, those of Hugging Face's config.json; the same probabilities as in the test
    row = table(finished("finetune") / "scores.csv")[2]
    ranked = sorted(names, key=lambda name: -float(row[name]))[:5]
    for weights, shown, more in (
        (own, ranked, []),
        (official, [str(names.index(name)) for name in ranked], elsewhere),
        (hub, [f"HF {name}" for name in ranked], elsewhere),
    ):
        files = [row["video"], tmp_path / "none.mp4"]
        done = run("finetune.py", "--predict", *files, "--weights", weights, "data.workers=0", *more)
        lines = done.stdout.splitlines()
        assert lines[0] == row["video"] and len(lines) == 6
        assert "cannot be read" in done.stderr and "none.mp4" in done.stderr
        found = [re.fullmatch(r" +([\d.]+) %  (.*)", line).groups() for line in lines[1:]]
        wanted = [100 * float(row[name]) for name in ranked]
        assert [float(percent) for percent, _ in found] == pytest.approx(wanted, abs=0.06)
        assert {name for _, name in found} == set(shown)
    done = run("finetune.py", "--predict", *files, "--weights", own, "data.workers=0", "--json")
    found = json.loads(done.stdout)
    assert list(found) == [row["video"]] and [*found[row["video"]]] == ranked
    for name in ("found.json", "found.csv"):
        run("finetune.py", "--predict", *files, "--weights", own, "data.workers=0", "--out", tmp_path / name)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    rows = [(row["video"], row["class"], row["probability"]) for row in table(tmp_path / "found.csv")]
    assert rows == [(video, name, f"{p:.5f}") for video in found for name, p in found[video].items()]
    done = run("finetune.py", "--predict", *files, "--weights", own, "--out", tmp_path, ok=False)
    assert done.returncode == 1 and "predictions are written to a .csv or .json file" in done.stderr
    done = run("finetune.py", "--test", "--weights", own, "data.workers=0", "--json", "--out", tmp_path)
    result = json.loads(done.stdout)
    right = [row["prediction"] == row["class"] for row in table(tmp_path / "scores.csv")]
    assert result["top1"] == pytest.approx(100 * sum(right) / 8) and result["videos"] == 8 and not result["unreadable"]
    done = run("finetune.py", "--predict", tmp_path / "none.mp4", "--weights", own, "data.workers=0", ok=False)
    assert done.returncode == 1 and "none of the videos can be read" in done.stderr


def test_predict_prints_once_however_many_processes(finished):
    video = table(finished("finetune") / "scores.csv")[0]["video"]
    done = run("finetune.py", "--predict", video, "--weights", finished("finetune") / "checkpoint.pt", processes=2)
    assert done.stdout.count(video) == 1 and len(done.stdout.splitlines()) == 6


STARTS = ["scratch", "own", "official", "hugging face", "fine-tuned at another size", "image"]


@pytest.mark.parametrize("start", STARTS)
def test_every_initialization_trains_and_says_so(start, settings, pretrained, finished, tmp_path, monkeypatch):
    state, cube = torch.load(pretrained, weights_only=True)["model"], configured().model.cube
    path, more = tmp_path / "weights.pth", []
    if start == "scratch":
        path = "scratch"
    elif start == "own":
        path = pretrained
    elif start == "official":
        torch.save({"model": state, "epoch": 799}, path)
    elif start == "hugging face":
        torch.save(to_hugging_face(state), path)
    elif start == "image":
        encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
        image = {key: value for key, value in encoder.items() if not key.endswith(("q_bias", "v_bias"))}
        image |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(384) for i in range(4)}
        image |= {"patch_embed.proj.weight": image["patch_embed.proj.weight"][:, :, 0]}
        image |= {"cls_token": torch.zeros(1, 1, 128), "pos_embed": torch.randn(1, 1 + 16, 128)}
        torch.save(image | {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}, path)
    else:
        path, more = finished("finetune") / "checkpoint.pt", ["data.frames=8", "data.size=64"]
    built, original = [], finetune.build

    def build(*arguments):
        model = original(*arguments)
        built.append({key: value.clone() for key, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(finetune, "build", build)
    quick = ["data.workers=0", "optim.epochs=1", "run.validate_every=0", "model.pretrained_clip=[8,64,64]", *more]
    done = run("finetune.py", *settings["finetune"], f"init={path}", f"run.folder={tmp_path / 'run'}", *quick)
    assert f"initialized from {path}" in done.stderr and len(losses(tmp_path / "run")) == 3
    block = "encoder.blocks.2.mlp.fc1.weight"
    from_pretraining = start not in ("scratch", "fine-tuned at another size")
    assert torch.equal(built[0][block], state[block]) == from_pretraining
    assert ("encoder loaded; fc_norm" in done.stderr) == from_pretraining
    if start == "fine-tuned at another size":  # the head, too
        theirs = torch.load(path, weights_only=True)["model"]
        assert all(torch.equal(value, built[0][key]) for key, value in theirs.items())
    after = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert not torch.equal(after["model"][block], built[0][block])  # it has learned
    expected = [4, 32, 32] if start == "scratch" else [8, 64, 64]
    assert after["model_options"]["clip_size"] == expected
    again = build_from_checkpoint(tmp_path / "run/checkpoint.pt", m.VideoClassifier)
    assert torch.equal(again.encoder.pos_embed, after["positions"])
    assert again.encoder.grid == m.cube_grid(expected, cube)


def test_each_augmented_clip_keeps_the_target_of_its_video(coloured_videos, tmp_path, monkeypatch):
    """First one clip of each video, then the next: so mixup mixes clips of different videos."""
    seen = []

    def mix(clip, targets):
        seen.append((clip.as_subclass(torch.Tensor).mean(dim=(2, 3, 4)).argmax(dim=1), targets.argmax(dim=1)))
        return clip, targets

    monkeypatch.setattr(finetune, "mixing", lambda *_: mix)
    words = [f"data.root={coloured_videos}", "data.train=train", "data.val=val", "data.frames=2", "data.size=32"]
    words += ["init=scratch", "data.repeats=3", "optim.batch_size=4", "optim.epochs=1", "run.batch_per_device=12"]
    run("finetune.py", *words, "data.workers=0", f"run.folder={tmp_path}")
    assert len(seen) == 3 and {len(labels) for _, labels in seen} == {12}
    for color, labels in seen:
        assert torch.equal(color, 2 - labels)  # blue, green, red are channels 2, 1, 0
        assert torch.equal(labels, labels[:4].repeat(3))


def test_colors_are_learned_from_scratch_and_a_broken_video_lowers_the_score(coloured_videos, tmp_path):
    """Twelve epochs of twelve videos of three colors, a thing that pixels tell: every test video is recognized."""
    videos = [f"data.root={coloured_videos}", "data.train=train", "data.val=val", "data.frames=2", "data.size=32"]
    optim = ["optim.batch_size=6", "optim.epochs=12", "optim.base_lr=0.05", "optim.warmup_epochs=2"]
    more = ["init=scratch", f"run.folder={tmp_path}", "run.validate_every=0", "data.workers=0"]
    done = run("finetune.py", *videos, *optim, *more)
    assert "top-1 100.00 %, top-5 100.00 % of 6 videos" in done.stdout and losses(tmp_path)[-1] < losses(tmp_path)[0]

    # a broken one among them lowers the score, and it is named
    paths = sorted((coloured_videos / "val").rglob("*.mp4"))
    (tmp_path / "videos/green").mkdir(parents=True)
    broken = tmp_path / "videos/green/broken.mp4"
    broken.write_bytes(paths[2].read_bytes()[:500])
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*paths[:2], broken, *paths[3:]]))
    weights, out = tmp_path / "checkpoint.pt", tmp_path / "with broken"
    done = run("finetune.py", "--test", "--weights", weights, f"data.val={tmp_path / 'list.txt'}", "--out", out)
    assert "top-1 83.33 %, top-5 83.33 % of 6 videos, 1 of them unreadable" in done.stdout
    assert f"counted as wrong: {broken}" in done.stderr
    assert [row["top1"] for row in table(out / "classes.csv")] == ["100.00", "50.00", "100.00"]  # blue, green, red
    predictions = [row["prediction"] for row in table(out / "scores.csv")]
    assert predictions == ["blue", "blue", "unreadable", "green", "red", "red"]


def test_a_models_classes_keep_their_order(toy_videos):
    """classes.txt is not in alphabetical order; without data.classes the checkpoint says what an output means."""
    known = (toy_videos / "classes.txt").read_text().splitlines()
    config = configured(f"data.root={toy_videos}", "data.train=train", "data.val=val")
    _, videos, names = labelled_videos(*toy.find(config.data), 0, known)
    assert names == known != sorted(known)
    assert videos and all(path.parent.name == names[label] for path, label in videos)


# ---- mistakes ----


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--weights", "FINETUNED"], "training starts from init=FILE"),
        (["--test"], "--test and --predict need --weights FILE"),
        (["--predict", "a.mp4"], "--test and --predict need --weights FILE"),
        (["--test", "--weights", "none.pt"], "no weights at none.pt"),
        (["--test", "--weights", "PRETRAINED"], "is not a fine-tuned checkpoint"),
        (["--test", "--weights", "FINETUNED", "data.test_crops=0"], "data.test_crops=0 has to be at least 1"),
        (["--test", "--weights", "FINETUNED", "data.sampling=tsn"], "data.sampling=tsn is not known"),
        (["--test", "--weights", "FINETUNED", "data.size=40"], "40 pixels of height is not a whole number of cubes"),
        (
            ["--test", "--weights", "FINETUNED", "data.root=OTHER", "data.train=.", "data.val=.", "data.classes="],
            "unknown class",
        ),
        (["--predict", "a.mp4", "--weights", "PRETRAINED"], "is not a fine-tuned checkpoint"),
        (["--compare", "a.csv", "b.csv"], "a.csv is not a scores.csv as --test writes it"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, sentence, pretrained, finished, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "a.mp4").touch()
    places = {"PRETRAINED": pretrained, "FINETUNED": finished("finetune") / "checkpoint.pt"}
    places["data.root=OTHER"] = f"data.root={tmp_path / 'other'}"
    done = run("finetune.py", *(places.get(word, word) for word in arguments), ok=False)
    assert done.returncode == 1 and sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_mistakes_about_what_is_mixed_and_tested_end_in_a_sentence(settings, lists, tmp_path):
    (tmp_path / "nowhere.txt").write_text("nowhere.mp4 1\n")
    for more, sentence in (
        (["optim.mixup=0.8", "run.batch_per_device=2"], "one video at a time has no other to be mixed with"),
        ([f"data.val={tmp_path / 'nowhere.txt'}"], "none of the 1 test videos is there, the first one being"),
    ):
        done = run("finetune.py", *settings["finetune"], f"run.folder={tmp_path / 'run'}", *more, ok=False)
        assert done.returncode == 1 and sentence in done.stderr and not (tmp_path / "run").exists()


# ---- comparison ----


def scores_file(path: Path, right: dict[str, tuple[int, int]]) -> Path:
    """A scores.csv in which of each class's videos a number, of a number, are recognized."""
    names = list(right)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "class", "prediction", *names])
        for name, (correct, count) in right.items():
            for i in range(count):
                prediction = name if i < correct else "unreadable" if i == correct else "another"
                writer.writerow([f"{name}{i}.mp4", name, prediction, *[""] * len(names)])
    return path


def test_comparison_of_two_models(tmp_path):
    first = scores_file(tmp_path / "first.csv", {"a, b": (1, 4), "c": (2, 2), "d": (3, 4), "only here": (1, 1)})
    second = scores_file(tmp_path / "second.csv", {"d": (3, 4), "c": (1, 2), "a, b": (4, 4)})
    done = run("finetune.py", "--compare", first, second, "--out", tmp_path / "out")
    heading, titles, *rows = done.stdout.splitlines()
    assert str(first) in heading and str(second) in heading and titles.split() == ["first", "second", "ahead", "class"]
    assert [row.split(maxsplit=3) for row in rows] == [
        ["25.00", "100.00", "+75.00", "a, b"],
        ["75.00", "75.00", "+0.00", "d"],
        ["100.00", "50.00", "-50.00", "c"],
    ]
    assert (tmp_path / "out/comparison.png").exists()

    many = {f"class {i}": (i % 11, 10) for i in range(60)}
    scores_file(tmp_path / "many.csv", many)
    scores_file(tmp_path / "more.csv", {name: ((i * 7) % 11, 10) for i, name in enumerate(many)})
    done = run("finetune.py", "--compare", tmp_path / "many.csv", tmp_path / "more.csv")
    ahead = [float(row.split()[2]) for row in done.stdout.splitlines()[2:]]
    everything = sorted((10.0 * (((i * 7) % 11) - i % 11) for i in range(60)), reverse=True)
    assert ahead == pytest.approx(everything[:20] + everything[-20:]) and (tmp_path / "comparison.png").exists()

    scores_file(tmp_path / "other.csv", {"z": (1, 2)})
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    for name, sentence in (
        ("other", "have no class in common"),
        ("text", "text.csv is not a scores.csv as --test writes"),
    ):
        done = run("finetune.py", "--compare", first, tmp_path / f"{name}.csv", ok=False)
        assert done.returncode == 1 and sentence in done.stderr
