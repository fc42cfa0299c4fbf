"""Layer-wise rates, targets and mixing by hand; whole runs as real processes: training, test, prediction, comparison."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, run
from test_pretrain import in_group
from torchvision import tv_tensors

import finetune
import model as m
import support.config
import support.run
import support.weights
from support.config import UserError, load_config

FINETUNE = ROOT / "finetune.py"
RECIPES = sorted(finetune.CONFIGS.glob("*.yaml"))


def configured(*settings: object):
    return load_config(finetune.DEFAULT, list(map(str, settings)))


# ---- layer-wise learning rates ----


def test_layer_wise_rates_of_every_parameter_of_vit_b():
    with torch.device("meta"):
        model = m.VideoClassifier(**{key: m.SIZES["B"][key] for key in ("width", "depth", "heads")}, classes=400)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales, decays = {}, {}
    for group in finetune.parameter_groups(model, 0.75, 0.05):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in scales  # none twice
            scales[name], decays[name] = group["lr_scale"], group["weight_decay"]
    assert scales.keys() == set(names.values())  # none forgotten
    assert scales["encoder.patch_embed.proj.weight"] == scales["encoder.patch_embed.proj.bias"] == pytest.approx(0.75**13) == pytest.approx(0.0238, abs=1e-4)
    for name, scale in scales.items():
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        if block:
            assert scale == pytest.approx(0.75 ** (12 - int(block[1]))), name
        elif not name.startswith("encoder.patch_embed."):
            assert name.startswith(("fc_norm.", "head.")) and scale == 1, name
    for name, decay in decays.items():
        assert decay == (0 if re.search(r"bias$|norm\d?\.weight$", name) else 0.05), name
    assert sum(decay == 0 for decay in decays.values()) == 12 * 9 + 4  # in a block two norms' four and five other biases; cube embedding, fc_norm's two, head
    for depth, size in ((24, "L"), (32, "H")):
        with torch.device("meta"):
            model = m.VideoClassifier(**{key: m.SIZES[size][key] for key in ("width", "depth", "heads")}, classes=400)
        assert min(group["lr_scale"] for group in finetune.parameter_groups(model, 0.75, 0.05)) == pytest.approx(0.75 ** (depth + 1))


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
    """Targets sum to 1 and say how much of the clip is whose; one box for all frames; either of the two, evenly often."""
    cut, boxes = 0, set()
    for seed in range(60):
        clips, targets = mixed(0.8, 1.0, seed)
        assert torch.allclose(targets.sum(dim=1), torch.ones(4), atol=1e-6) and targets.min() >= 0
        own = targets.diagonal()
        partner = torch.stack([targets[i, i - 1] for i in range(4)])
        assert torch.allclose(own + partner, torch.ones(4), atol=1e-6) and torch.allclose(own, own[:1].expand(4), atol=1e-6)
        if torch.isin(clips, torch.arange(4.0)).all():
            cut += 1
            from_partner = clips != torch.arange(4.0).view(4, 1, 1, 1, 1)  # (4, 3, 6, 20, 24)
            assert torch.equal(from_partner, from_partner[:1, :1, :1].expand_as(from_partner))
            box = from_partner[0, 0, 0]
            rows, columns = box.any(dim=1).nonzero().flatten(), box.any(dim=0).nonzero().flatten()
            assert box.sum() == len(rows) * len(columns) and float(box.float().mean()) == pytest.approx(float(partner[0]), abs=1e-6)
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
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.06) and float(shares.var()) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.2)


# ---- accuracy ----


def test_accuracy_by_hand():
    scores = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.05, 0.05, 0.0], [0.1, 0.3, 0.2, 0.2, 0.1, 0.08, 0.02], [float("nan")] * 7, [0.0, 0.1, 0.1, 0.2, 0.3, 0.1, 0.2]])
    assert finetune.accuracy(scores, torch.tensor([0, 0, 0, 4])) == pytest.approx((50, 75))  # the unreadable one is wrong, whatever its class
    assert finetune.accuracy(scores, torch.tensor([6, 6, 1, 0])) == pytest.approx((0, 0))
    assert finetune.accuracy(scores[:, :2], torch.tensor([0, 1, 1, 1])) == pytest.approx((75, 75))  # fewer than five classes


# ---- recipes ----

TABLE = {  # learning rate for the batch, epochs, layer decay, dropout, drop path, clips x crops, frames, size, flip: Tables 10, 7, 4, 2 and Sec. B
    "k400_small": (2e-3, 150, 0.7, 0.0, 0.1, (5, 3), 16, 224, True),
    "k400_base": (2e-3, 75, 0.75, 0.0, 0.1, (5, 3), 16, 224, True),
    "k400_large": (2e-3, 50, 0.75, 0.5, 0.2, (5, 3), 16, 224, True),
    "k400_huge": (2e-3, 50, 0.75, 0.5, 0.2, (5, 3), 16, 224, True),
    "k400_large_320": (2e-3, 50, 0.75, 0.5, 0.2, (4, 3), 32, 320, True),
    "k400_huge_320": (2e-3, 50, 0.75, 0.5, 0.2, (4, 3), 32, 320, True),
    "ssv2_small": (2e-3, 40, 0.7, 0.0, 0.1, (2, 3), 16, 224, False),
    "ssv2_base": (1e-3, 40, 0.75, 0.0, 0.1, (2, 3), 16, 224, False),
    "ssv2_large": (1e-3, 30, 0.75, 0.5, 0.2, (2, 3), 16, 224, False),
    "ssv2_large_32": (1e-3, 30, 0.75, 0.5, 0.2, (1, 3), 32, 224, False),
    "ssv2_base_from_k400": (1e-3, 40, 0.75, 0.0, 0.1, (2, 3), 16, 224, False),
    "ucf101_base": (2.5e-4, 100, 0.7, 0.0, 0.2, (5, 3), 16, 224, True),
    "ucf101_base_from_k400": (2.5e-4, 100, 0.7, 0.0, 0.2, (5, 3), 16, 224, True),
    "hmdb51_base": (5e-4, 50, 0.7, 0.0, 0.2, (10, 3), 16, 224, True),
    "hmdb51_base_from_k400": (5e-4, 50, 0.7, 0.0, 0.2, (10, 3), 16, 224, True),
    "ssv2_base_scratch": (1.6e-3, 100, 1.0, 0.5, 0.2, (2, 3), 16, 224, False),
    "k400_base_scratch": (1.6e-3, 200, 1.0, 0.5, 0.2, (5, 3), 16, 224, True),
}


def test_no_recipe_is_missing():
    assert TABLE.keys() | {"toy", "ucf101_base_scratch", "hmdb51_base_scratch"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_says_what_the_paper_says(path):
    c = configured(path)
    with torch.device("meta"):
        model = finetune.build(configured(path, "init=scratch"), 10)
    assert m.cube_grid((c.data.frames, c.data.size, c.data.size), c.model.cube) == model.encoder.grid
    assert c.data.sampling == ("uniform" if path.stem.startswith("ssv2") else "dense")
    assert c.run.folder == f"runs/finetune/{path.stem}"
    if path.stem in ("toy", "own"):
        return
    assert (c.init == "scratch") == path.stem.endswith("_scratch")
    assert c.data.repeats == 2 and (c.optim.betas, c.optim.weight_decay) == ([0.9, 0.999], 0.05)
    assert (c.optim.label_smoothing, c.optim.mixup, c.optim.cutmix) == (0.1, 0.8, 1.0)
    assert c.optim.batch_size == (128 if path.stem[:3] in ("ucf", "hmd") else 512)
    assert c.data.crop_area == [0.08, 1.0] and c.data.crop_aspect == [0.75, 1.3333] and c.data.erase == 0.25
    strides = {"k400": 2 if "320" in path.stem else 4, "ucf1": 4, "hmdb": 2}
    assert c.data.stride == strides.get(path.stem[:4], c.data.stride)
    if path.stem in TABLE:
        lr, *others = TABLE[path.stem]
        assert c.optim.base_lr * c.optim.batch_size / 256 == pytest.approx(lr)
        found = [c.optim.epochs, c.optim.layer_decay, c.model.dropout, c.model.drop_path, (c.data.test_clips, c.data.test_crops), c.data.frames, c.data.size, c.data.flip]
        assert found == others
        size = {"small": "S", "base": "B", "large": "L", "huge": "H"}[path.stem.split("_")[1]]
        assert c.model.size == size and c.optim.warmup_epochs == (30 if "scratch" in path.stem else 5)
    if c.init.startswith("runs/finetune/"):
        assert Path(c.init).parent.name in {recipe.stem for recipe in RECIPES}
    elif c.init != "scratch":
        assert (ROOT / "configs/pretrain" / f"{Path(c.init).parent.name}.yaml").exists()


def test_mixing_always_has_partners():
    """A batch on one device holds at least two videos: else every clip would be mixed with its own copy, all in vain."""
    for path in RECIPES:
        c = configured(path)
        if c.optim.mixup or c.optim.cutmix:
            assert c.run.batch_per_device // c.data.repeats >= 2, path.stem


# ---- whole runs ----

SMALL = ["data.frames=4", "data.size=32", "optim.batch_size=8", "run.log_every=1", "run.batch_per_device=16"]
STRONG = [  # everything random on
    "optim.mixup=0.8", "optim.cutmix=1.0", "model.drop_path=0.2", "model.dropout=0.5", "data.repeats=2", "data.randaugment=[4, 7, 0.5]",
    "data.crop_area=[0.3, 1.0]", "data.crop_aspect=[0.75, 1.3333]", "data.flip=true", "data.erase=0.25", "data.test_clips=2", "data.test_crops=3",
]  # fmt: skip


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line]


def table(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """An encoder for clips of 8 x 64 x 64, as pretrain.py leaves it."""
    torch.manual_seed(0)
    cube = configured().model.cube
    model = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=1, clip_size=(8, 64, 64), cube=cube)
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pt"
    torch.save(dict(model=model.state_dict(), model_options=model.options, step=3, config=dict(optim=dict(epochs=1))), path)
    return path


@pytest.fixture(scope="module")
def lists(toy_videos, tmp_path_factory) -> Path:
    """List files of the toy videos: all for training, seven for testing, and six with one that is broken."""
    folder = tmp_path_factory.mktemp("lists")
    videos = {split: sorted((toy_videos / split).rglob("*.mp4")) for split in ("train", "val")}
    broken = folder / toy_videos.name / videos["val"][3].parent.name / "broken.mp4"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(videos["val"][3].read_bytes()[:700])
    with_broken = videos["val"][:3] + [broken] + videos["val"][4:7]
    for name, paths in {"train": videos["train"], "val": videos["val"][:7], "broken": with_broken}.items():
        (folder / f"{name}.txt").write_text("".join(f"{path}\n" for path in paths))
    return folder


def settings(lists: Path, pretrained: Path, folder: Path, *more: str) -> list[str]:
    return [f"data.root={lists}", "data.train=train.txt", "data.val=val.txt", f"init={pretrained}", f"run.folder={folder}", *SMALL, *more]


@pytest.fixture(scope="module")
def reference_run(lists, pretrained, tmp_path_factory) -> Path:
    """Nine steps by one plain process, everything random on, and what it printed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = run(FINETUNE, *settings(lists, pretrained, folder, *STRONG), "optim.epochs=3", "run.checkpoint_every=2", "run.validate_every=2")
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_what_a_run_says_and_leaves(reference_run, pretrained):
    said, printed = (reference_run / "stderr.txt").read_text(), (reference_run / "stdout.txt").read_text()
    assert f"initialised from {pretrained}" in said and "start fresh: fc_norm.bias, fc_norm.weight, head.bias, head.weight" in said
    assert "24 videos for training, 7 for testing, 8 classes" in said
    assert "batch 8 = 1 processes x 1 accumulated x 8 videos, each 2 times" in said
    assert "9 steps = 3 epochs x 3; starting at step 0" in said
    c = configured()
    peak = c.optim.base_lr * 8 / 256
    assert f"learning rate {c.optim.base_lr:g} x 8 / 256 = {peak:.4g}" in said
    assert re.search(r"^epoch 2: top-1 [\d.]+ %, top-5 [\d.]+ % of 7 videos, one view$", said, re.M) and "epoch 1:" not in said.replace("each", "")
    assert re.fullmatch(r"top-1 [\d.]+ %, top-5 [\d.]+ % of 7 videos, 2 x 3 views: \S+/scores.csv\n", printed)

    lines = log(reference_run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["step"] for line in lines if "top1" in line] == [6]
    assert lines[-1]["step"] == 9 and f"top-1 {lines[-1]['test_top1']:.2f} %" in printed
    warm = c.optim.warmup_epochs * 3
    expected = [support.run.warmup_cosine(step, 9, warm, peak, c.optim.min_lr * 8 / 256) for step in range(9)]
    assert [line["lr"] for line in steps] == pytest.approx(expected) and expected[0] == 0 and max(expected) == pytest.approx(peak)
    checkpoint = torch.load(reference_run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 9 and len(checkpoint["classes"]) == 8 and checkpoint["model_options"]["clip_size"] == [8, 64, 64]


def test_scores_and_classes_files(reference_run):
    rows, classes = table(reference_run / "scores.csv"), table(reference_run / "classes.csv")
    names = list(rows[0])[3:]
    assert len(rows) == 7 and names == [row["class"] for row in classes] and len(names) == 8
    for row in rows:
        scores = [float(row[name]) for name in names]
        assert sum(scores) == pytest.approx(1, abs=1e-4) and names[scores.index(max(scores))] == row["prediction"]
        assert Path(row["video"]).parent.name == row["class"]
    for row in classes:
        of_class = [score["prediction"] == score["class"] for score in rows if score["class"] == row["class"]]
        assert int(row["videos"]) == len(of_class) and (row["top1"] == f"{100 * sum(of_class) / len(of_class):.2f}" if of_class else row["top1"] == "")
    top1 = 100 * sum(row["prediction"] == row["class"] for row in rows) / 7
    assert log(reference_run)[-1]["test_top1"] == pytest.approx(top1, abs=1e-4)


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(lists, pretrained, reference_run, tmp_path):
    folder = tmp_path / "run"
    arguments = command(FINETUNE, *settings(lists, pretrained, folder, *STRONG), "optim.epochs=3", "run.checkpoint_every=2", "run.validate_every=2", "data.workers=2")
    process = subprocess.Popen(arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, stderr=subprocess.DEVNULL)
    while not (folder / "checkpoint.pt").exists() or len((folder / "log.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while in_group(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < step < 9
    done = run(*arguments[1:])
    assert f"starting at step {step}" in done.stderr
    one, other = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder, reference_run))
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in other["model"])
    assert all(torch.equal(one["optimizer"]["state"][key]["exp_avg"], value["exp_avg"]) for key, value in other["optimizer"]["state"].items())
    assert losses(folder) == losses(reference_run)
    assert (folder / "scores.csv").read_bytes() == (reference_run / "scores.csv").read_bytes()


@pytest.fixture(scope="module")
def plain_run(lists, pretrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(FINETUNE, *settings(lists, pretrained, folder, *PLAIN), processes=0)
    return folder


PLAIN = ["data.repeats=2", "data.randaugment=[4, 7, 0.5]", "data.flip=true", "optim.epochs=2", "run.validate_every=1", "data.test_crops=3"]


def test_losses_and_scores_do_not_depend_on_processes(lists, pretrained, plain_run, tmp_path):
    """Without what is drawn for each process: mixup, drop path, dropout."""
    folder = tmp_path / "run"
    done = run(FINETUNE, *settings(lists, pretrained, folder, *PLAIN), "run.batch_per_device=4", "data.workers=0", processes=2)
    assert "batch 8 = 2 processes x 2 accumulated x 2 videos, each 2 times" in done.stderr
    assert done.stdout.count("top-1") == 1 and done.stderr.count("initialised from") == 1 and done.stderr.count("start fresh") == 1
    assert len(losses(plain_run)) == 6 and losses(folder) == pytest.approx(losses(plain_run), rel=1e-5)
    for a, b in zip(table(plain_run / "scores.csv"), table(folder / "scores.csv")):
        assert a["video"] == b["video"] and [float(a[name]) for name in list(a)[3:]] == pytest.approx([float(b[name]) for name in list(b)[3:]], abs=2e-5)


def test_a_distributed_test_is_exact_and_names_a_broken_video(lists, plain_run, tmp_path):
    """Seven videos on one and on two processes, one of them broken: the same file, to the last digit."""
    weights = plain_run / "checkpoint.pt"
    whole = table(plain_run / "scores.csv")
    arguments = [FINETUNE, "--test", "--weights", weights, "data.val=broken.txt"]
    alone = run(*arguments, "--out", tmp_path / "alone")
    both = run(*arguments, "--out", tmp_path / "both", processes=2)
    for name in ("scores.csv", "classes.csv"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    for done in (alone, both):
        assert done.stderr.count("counted as wrong:") == 1 and re.search(r"^counted as wrong: /.*/broken.mp4: \S", done.stderr, re.M)
        assert done.stdout.count("of 7 videos, 1 of them unreadable, 1 x 3 views") == 1
    rows = table(tmp_path / "both/scores.csv")
    assert [row["prediction"] == "unreadable" for row in rows] == [False] * 3 + [True] + [False] * 3
    assert rows[3]["video"].endswith("broken.mp4") and rows[3]["class"] == whole[3]["class"] and list(rows[3].values())[3:] == [""] * 8
    assert rows[:3] == whole[:3] and rows[4:] == whole[4:]
    right = sum(row["prediction"] == row["class"] for row in rows)
    assert right == sum(row["prediction"] == row["class"] for number, row in enumerate(whole) if number != 3)
    assert f"top-1 {100 * right / 7:.2f} %" in both.stdout


# ---- in this process, to save the start ----


def stage(monkeypatch, *arguments: object) -> None:
    """finetune.py with these arguments."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["finetune.py", *map(str, arguments)])
    finetune.main()


def mistake(monkeypatch, *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        stage(monkeypatch, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_test_weights_of_all_namings(lists, plain_run, tmp_path, monkeypatch, capsys):
    own = plain_run / "checkpoint.pt"
    checkpoint = torch.load(own, weights_only=True)
    state, names = checkpoint["model"], checkpoint["classes"]
    (tmp_path / "hf").mkdir()
    torch.save({"module": {key.removeprefix("encoder."): value for key, value in state.items()}}, tmp_path / "official.pth")
    torch.save(support.weights.to_hugging_face(state), tmp_path / "hf/pytorch_model.bin")
    (tmp_path / "hf/config.json").write_text(json.dumps({"id2label": {str(i): f"HF {name}" for i, name in enumerate(names)}}))
    c = configured()
    elsewhere = [f"data.root={lists}", "data.train=train.txt", "data.val=val.txt", "model.pretrained_clip=[8,64,64]", f"data.stride={c.data.stride}", *SMALL]
    views = ["data.test_clips=1", "data.test_crops=3", "data.workers=0"]
    stage(monkeypatch, "--test", "--weights", own, "--out", tmp_path / "own", "data.workers=0")
    stage(monkeypatch, "--test", "--weights", tmp_path / "official.pth", "--out", tmp_path / "official", *elsewhere, *views)
    stage(monkeypatch, "--test", "--weights", tmp_path / "hf/pytorch_model.bin", *elsewhere, *views)
    reference = (plain_run / "scores.csv").read_bytes()
    assert all((tmp_path / name / "scores.csv").read_bytes() == reference for name in ("own", "official", "hf"))
    assert capsys.readouterr().out.count("of 7 videos, 1 x 3 views") == 3

    # prediction: names of the checkpoint, numbers, those of Hugging Face's config.json; the same as in the test
    video, row = Path(table(plain_run / "scores.csv")[2]["video"]), table(plain_run / "scores.csv")[2]
    ranked = sorted(names, key=lambda name: -float(row[name]))[:5]
    for weights, shown, more in (
        (own, ranked, []),
        (tmp_path / "official.pth", [str(names.index(name)) for name in ranked], elsewhere),
        (tmp_path / "hf/pytorch_model.bin", [f"HF {name}" for name in ranked], elsewhere),
    ):
        stage(monkeypatch, "--predict", video, tmp_path / "none.mp4", "--weights", weights, *more, *views)
        printed = capsys.readouterr()
        lines = printed.out.splitlines()
        assert lines[0] == str(video) and len(lines) == 6 and "cannot be read" in printed.err and "none.mp4" in printed.err
        found = [re.fullmatch(r" +([\d.]+) %  (.*)", line).groups() for line in lines[1:]]
        assert [float(percent) for percent, _ in found] == pytest.approx([100 * float(row[name]) for name in ranked], abs=0.06)
        assert {name for _, name in found} == set(shown)
    assert "none of the videos can be read" in mistake(monkeypatch, "--predict", tmp_path / "none.mp4", "--weights", own, *views)


def test_predict_prints_once_however_many_processes(lists, plain_run):
    video = table(plain_run / "scores.csv")[0]["video"]
    done = run(FINETUNE, "--predict", video, "--weights", plain_run / "checkpoint.pt", processes=2)
    assert done.stdout.count(video) == 1 and len(done.stdout.splitlines()) == 6


STARTS = ["scratch", "own", "official", "hugging face", "fine-tuned at another size", "image"]


@pytest.mark.parametrize("start", STARTS)
def test_every_initialisation_trains_and_says_so(start, lists, pretrained, plain_run, tmp_path, monkeypatch, capsys):
    state, cube = torch.load(pretrained, weights_only=True)["model"], configured().model.cube
    path, more = tmp_path / "weights.pth", []
    if start == "scratch":
        path = "scratch"
    elif start == "own":
        path = pretrained
    elif start == "official":
        torch.save({"model": state, "epoch": 799}, path)
    elif start == "hugging face":
        torch.save(support.weights.to_hugging_face(state), path)
    elif start == "image":
        image = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.") and not key.endswith(("q_bias", "v_bias"))}
        image |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(384) for i in range(4)}
        image |= {"patch_embed.proj.weight": image["patch_embed.proj.weight"][:, :, 0], "cls_token": torch.zeros(1, 1, 128), "pos_embed": torch.randn(1, 1 + 16, 128)}
        torch.save(image | {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}, path)
    else:
        path, more = plain_run / "checkpoint.pt", ["data.frames=8", "data.size=64"]
    built, original = [], finetune.build

    def build(*arguments):
        model = original(*arguments)
        built.append({key: value.clone() for key, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(finetune, "build", build)
    stage(monkeypatch, *settings(lists, path, tmp_path / "run"), "data.workers=0", "optim.epochs=1", "run.validate_every=0", *more)
    said = capsys.readouterr().err
    assert f"initialised from {path}" in said and len(losses(tmp_path / "run")) == 3
    block = "encoder.blocks.2.mlp.fc1.weight"
    assert torch.equal(built[0][block], state[block]) == (start not in ("scratch", "fine-tuned at another size"))
    assert ("start fresh: fc_norm.bias" in said) == (start not in ("scratch", "fine-tuned at another size"))
    if start == "fine-tuned at another size":
        assert all(torch.equal(value, built[0][key]) for key, value in torch.load(path, weights_only=True)["model"].items())  # the head, too
    after = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert not torch.equal(after["model"][block], built[0][block])  # it has learned
    expected = [4, 32, 32] if start == "scratch" else [8, 64, 64]
    assert after["model_options"]["clip_size"] == expected
    again = support.weights.build_classifier(tmp_path / "run/checkpoint.pt")
    assert torch.equal(again.encoder.pos_embed, after["positions"]) and again.encoder.grid == m.cube_grid(expected, cube)


def test_broken_training_videos_are_replaced_and_named(lists, pretrained, tmp_path, monkeypatch, capsys):
    stage(monkeypatch, *settings(lists, pretrained, tmp_path), "data.train=broken.txt", "data.workers=0", "optim.batch_size=7", "optim.epochs=1", "run.validate_every=0")
    said = capsys.readouterr().err
    assert "replaced by another video: " in said and "1 broken videos were replaced by others" in said
    assert "broken.mp4" in (tmp_path / "broken_videos.txt").read_text()


def test_colours_are_learned_from_scratch_and_a_broken_video_lowers_the_score(coloured_videos, tmp_path, monkeypatch, capsys):
    """Twelve epochs of twelve videos of three colours, a thing that pixels tell: every test video is recognised."""
    stage(monkeypatch, f"data.root={coloured_videos}", "data.train=train", "data.val=val", "init=scratch", f"run.folder={tmp_path}", "data.frames=2", "data.size=32",
          "optim.batch_size=6", "optim.epochs=12", "optim.base_lr=0.05", "run.validate_every=0", "data.workers=0")  # fmt: skip
    assert "top-1 100.00 %, top-5 100.00 % of 6 videos" in capsys.readouterr().out
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]

    # a broken one among them lowers the score, and it is named
    videos = sorted((coloured_videos / "val").rglob("*.mp4"))
    (tmp_path / "videos/green").mkdir(parents=True)
    broken = tmp_path / "videos/green/broken.mp4"
    broken.write_bytes(videos[2].read_bytes()[:500])
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*videos[:2], broken, *videos[3:]]))
    stage(monkeypatch, "--test", "--weights", tmp_path / "checkpoint.pt", f"data.val={tmp_path / 'list.txt'}", "--out", tmp_path / "with broken")
    printed = capsys.readouterr()
    assert "top-1 83.33 %, top-5 83.33 % of 6 videos, 1 of them unreadable" in printed.out and f"counted as wrong: {broken}" in printed.err
    assert [row["top1"] for row in table(tmp_path / "with broken/classes.csv")] == ["100.00", "50.00", "100.00"]  # blue, green, red
    assert [row["prediction"] for row in table(tmp_path / "with broken/scores.csv")] == ["blue", "blue", "unreadable", "green", "red", "red"]


# ---- mistakes ----


def test_missing_weights_are_one_sentence_that_names_pretrain_py(tmp_path):
    done = run(FINETUNE, f"init={tmp_path / 'none.pt'}", f"run.folder={tmp_path / 'run'}", "data.root=" + str(tmp_path), ok=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["init=none.pt"], "no weights at init=none.pt: make them with pretrain.py, name another file, or start with init=scratch"),
        (["init="], "no weights at init="),
        (["optim.layer_decai=1"], "unknown key 'optim.layer_decai'; the nearest valid key is 'optim.layer_decay'"),
        (["mask.ratio=0.5"], "unknown key 'mask.ratio'"),
        (["data.repeats=0"], "data.repeats=0 has to be at least 1"),
        (["data.test_clips=0"], "data.test_clips=0 has to be at least 1"),
        (["data.sampling=tsn"], "data.sampling=tsn is not known; choose one of dense, uniform"),
        (["data.size=40"], "40 pixels of height is not a whole number of cubes"),
        (["model.size=XL"], "model.size=XL is not known; choose one of tiny, S, B, L, H"),
        (["model.size=S"], "does not fit this VideoClassifier"),
        (["data.randaugment=no"], "data.randaugment expects list"),
        (["data.randaugment=[2]"], "data.randaugment"),
        (["data.crop_area=[0.5]"], "data.crop_area"),
        (["data.crop_area=[1, 0.5]"], "data.crop_area=[1.0, 0.5] has to name the smaller number first"),
        (["optim.batch_size=25"], "24 videos are fewer than one batch: set optim.batch_size to 24 or less"),
        (["data.val=train/none.txt"], "there is no folder or list file"),
        (["data.classes=none.txt"], "data.classes: no class names can be read from none.txt"),
        (["run.precision=fp16"], "run.precision=fp16 is not known"),
        (["data.val=nowhere.txt"], "none of the 1 test videos is there, the first one being"),
        (["init=configs"], "init=configs is a folder, not a file of weights"),
        (["run.folder="], "run.folder is empty"),
        (["--weights", "FINETUNED"], "--weights goes with --test or --predict; training starts from weights with init=FILE"),
        (["--test"], "--test and --predict need --weights FILE"),
        (["--predict", "a.mp4"], "--test and --predict need --weights FILE"),
        (["--test", "--weights", "none.pt"], "no weights at none.pt"),
        (["--test", "--weights", "PRETRAINED"], "is not a fine-tuned checkpoint"),
        (["--test", "--weights", "FINETUNED", "data.test_crops=0"], "data.test_crops=0 has to be at least 1"),
        (["--test", "--weights", "FINETUNED", "data.sampling=tsn"], "data.sampling=tsn is not known"),
        (["--test", "--weights", "FINETUNED", "data.size=40"], "40 pixels of height is not a whole number of cubes"),
        (["--test", "--weights", "FINETUNED", "data.root=OTHER", "data.train=.", "data.val=."], "unknown class 'one' for a.mp4"),
        (["--predict", "a.mp4", "--weights", "PRETRAINED"], "is not a fine-tuned checkpoint"),
        (["--compare", "a.csv", "b.csv"], "a.csv is not a scores.csv as --test writes it"),
    ],
)
def test_mistakes_end_in_one_sentence_before_any_work(more, sentence, lists, pretrained, plain_run, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "a.mp4").touch()
    (lists / "nowhere.txt").write_text("nowhere.mp4 1\n")
    places = {"PRETRAINED": pretrained, "FINETUNED": plain_run / "checkpoint.pt", "data.root=OTHER": f"data.root={tmp_path / 'other'}"}
    more = [places.get(word, word) for word in more]
    known = [] if str(more[0]).startswith("--") else settings(lists, pretrained, tmp_path / "run", "data.workers=0")
    assert sentence in mistake(monkeypatch, *known, *more)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_belongs_to_its_configuration(lists, pretrained, plain_run, monkeypatch):
    sentence = mistake(monkeypatch, *settings(lists, pretrained, plain_run, *PLAIN), "optim.mixup=0.8", "data.workers=0")
    assert f"{plain_run} holds a run with optim.mixup=0.0, not 0.8" in sentence


# ---- comparison ----


def scores_file(path: Path, right: dict[str, tuple[int, int]]) -> Path:
    """A scores.csv in which of each class's videos so many, of so many, are recognised."""
    names = list(right)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "class", "prediction", *names])
        for name, (correct, count) in right.items():
            writer.writerows([f"{name}{i}.mp4", name, name if i < correct else "unreadable" if i == correct else "another", *[""] * len(names)] for i in range(count))
    return path


def test_comparison_of_two_models(tmp_path, monkeypatch, capsys):
    from PIL import Image

    first = scores_file(tmp_path / "first.csv", {"a, b": (1, 4), "c": (2, 2), "d": (3, 4), "only here": (1, 1)})
    second = scores_file(tmp_path / "second.csv", {"d": (3, 4), "c": (1, 2), "a, b": (4, 4)})
    stage(monkeypatch, "--compare", first, second, "--out", tmp_path / "out")
    heading, titles, *rows = capsys.readouterr().out.splitlines()
    assert str(first) in heading and str(second) in heading
    assert [row.split(maxsplit=3) for row in rows] == [["25.00", "100.00", "+75.00", "a, b"], ["75.00", "75.00", "+0.00", "d"], ["100.00", "50.00", "-50.00", "c"]]
    with Image.open(tmp_path / "out/comparison.png") as image:
        colours = [[image.getpixel((x, 18 * row + 10)) for x in range(200, 720)] for row in (1, 2, 3)]
    blue, orange = (70, 130, 180), (255, 165, 0)
    assert colours[0].count(blue) == pytest.approx(150, abs=2) and orange not in colours[0] and colours[2].count(orange) == pytest.approx(100, abs=2)

    many = {f"class {i}": (i % 11, 10) for i in range(60)}
    scores_file(tmp_path / "many.csv", many)
    scores_file(tmp_path / "more.csv", {name: ((i * 7) % 11, 10) for i, name in enumerate(many)})
    stage(monkeypatch, "--compare", tmp_path / "many.csv", tmp_path / "more.csv")
    rows = capsys.readouterr().out.splitlines()[2:]
    ahead = [float(row.split()[2]) for row in rows]
    assert len(rows) == 40 and ahead == sorted(ahead, reverse=True) and (tmp_path / "comparison.png").exists()
    everything = sorted((10.0 * (((i * 7) % 11) - i % 11) for i in range(60)), reverse=True)
    assert ahead == pytest.approx(everything[:20] + everything[-20:])

    scores_file(tmp_path / "other.csv", {"z": (1, 2)})
    assert "have no class in common" in mistake(monkeypatch, "--compare", first, tmp_path / "other.csv")
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    assert "text.csv is not a scores.csv as --test writes it" in mistake(monkeypatch, "--compare", first, tmp_path / "text.csv")


def test_a_models_classes_keep_their_order(toy_videos):
    """The toy's classes.txt is not in alphabetical order; without data.classes the checkpoint's own names say what an output means."""
    known = (toy_videos / "classes.txt").read_text().splitlines()
    config = support.config.load_config(finetune.DEFAULT, [f"data.root={toy_videos}", "data.train=train", "data.val=val"])
    _, videos, names = finetune.find_videos(config, 1, known)
    assert names == known != sorted(known)
    assert videos and all(path.parent.name == names[label] for path, label in videos)
