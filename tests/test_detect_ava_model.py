"""Action detection beyond its annotations: model, clips, training runs, tests and predictions."""

import colorsys
import json
import math
import shutil
import subprocess
from pathlib import Path

import av
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command, run
from torch import nn

import data
import detect_ava
import model as m
import support.ava
import support.run
import support.weights
from finetune import parameter_groups
from support import toy
from support.config import UserError, as_dict, load_config

DETECT = ROOT / "detect_ava.py"
NO_PERSONS = torch.zeros(0, 12)  # labels
TINY = dict(width=32, depth=2, heads=2, clip_size=(4, 32, 32), cube=(2, 16, 16))


def configured(*settings: str):
    return load_config(detect_ava.DEFAULT, list(settings))


# ---- model ----


class Constant(nn.Module):
    """Stands in for the encoder: every token of clip i is `values[i]` times its feature's number."""

    def __init__(self, encoder: nn.Module, values: list[float]) -> None:
        super().__init__()
        self.patch_embed, self.values = encoder.patch_embed, torch.tensor(values)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        tokens = math.prod(m.cube_grid(clip.shape[2:], self.patch_embed.cube))
        return self.values[:, None, None] * torch.arange(32.0).expand(len(clip), tokens, 32)


def test_what_is_pooled_from_a_constant_map_is_that_constant():
    """For boxes of every kind: whole, small, thin, without area, at the edge."""
    detector = detect_ava.ActionDetector(**TINY, classes=5)
    detector.encoder, detector.head = Constant(detector.encoder, [1.0, -2.0]), nn.Identity()
    boxes = torch.tensor([[0, 0, 64, 48], [3, 5, 4, 7], [10, 0, 11, 48], [50, 10, 64, 20], [0, 0, 0, 0], [20, 20, 37.5, 41.3]])
    features = detector(torch.zeros(2, 3, 4, 48, 64), detect_ava.to_rois([boxes, boxes[:2]]))
    assert torch.allclose(features, torch.tensor([1.0] * 6 + [-2.0] * 2)[:, None] * torch.arange(32.0))


def test_pooling_takes_the_cubes_under_the_box():
    """One bright cube among dark ones: only the boxes that lie over it see it, whichever slice of time it is in."""
    detector = detect_ava.ActionDetector(**TINY, classes=5)

    class OneCube(Constant):
        def forward(self, clip):
            tokens = torch.zeros(1, 2, 4, 6, 32)
            tokens[0, 1, 2, 4] = 1.0  # rows 32 to 48, columns 64 to 80 of 64 x 96 pixels
            return tokens.flatten(1, 3)

    detector.encoder, detector.head = OneCube(detector.encoder, []), nn.Identity()
    boxes = torch.tensor([[64.0, 32, 80, 48], [0, 0, 96, 64], [0, 0, 40, 64], [66, 0, 80, 12]])
    seen = detector(torch.zeros(1, 3, 4, 64, 96), detect_ava.to_rois([boxes]))[:, 0]
    assert 0.4 < seen[0] <= 0.5 and 0.25 < seen[1] <= 0.5  # half of the time
    assert seen[2] == 0 and seen[3] == 0


def test_persons_of_two_clips_never_mix():
    torch.manual_seed(0)
    detector = detect_ava.ActionDetector(**TINY, classes=5).eval()
    clip, boxes = torch.randn(2, 3, 4, 32, 48), [torch.tensor([[0.0, 0, 20, 30], [5, 5, 45, 25]]), torch.tensor([[0.0, 0, 20, 30]])]
    logits = detector(clip, detect_ava.to_rois(boxes))
    other = clip.clone()
    other[1] = torch.randn(3, 4, 32, 48)
    changed = detector(other, detect_ava.to_rois([boxes[0], boxes[1] + 3]))
    assert torch.equal(logits[:2], changed[:2]) and not torch.allclose(logits[2], changed[2])
    for place in (0, 1):  # and each alone is what it was in the batch
        alone = detector(clip[place : place + 1], detect_ava.to_rois(boxes[place : place + 1]))
        assert torch.allclose(alone, logits[2 * place : 2 * place + 2][: len(alone)], atol=1e-6)


def test_clips_without_persons_are_legal():
    torch.manual_seed(0)
    detector = detect_ava.ActionDetector(**TINY, classes=5)
    nobody, clip = torch.zeros(0, 4), torch.randn(2, 3, 4, 32, 32)
    one = torch.tensor([[0.0, 0, 20, 30]])
    logits = detector(clip, detect_ava.to_rois([nobody, one]))
    assert logits.shape == (1, 5)
    assert torch.allclose(logits, detector(clip[1:], detect_ava.to_rois([one])), atol=1e-6)
    loss = detect_ava.detection_loss(detector(clip, detect_ava.to_rois([nobody, nobody])), torch.zeros(0, 5), 2)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in detector.parameters())


def test_loss_weighs_every_person_alike():
    logits, labels = torch.randn(6, 5), torch.randint(2, (6, 5)).float()
    p = logits.double().sigmoid()
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(dim=1)  # of each person
    assert float(detect_ava.detection_loss(logits, labels, 4)) == pytest.approx(float(by_hand.sum() / 4), rel=1e-5)
    # two processes with 1 and 5 persons in 2 clips each: their mean is the loss of all
    halves = [detect_ava.detection_loss(logits[part], labels[part], 2) for part in (slice(0, 1), slice(1, 6))]
    assert float(sum(halves) / 2) == pytest.approx(float(by_hand.sum() / 4), rel=1e-5)


def test_layer_decay_groups_hold_every_parameter_once():
    detector = detect_ava.ActionDetector(**TINY, classes=5)
    groups = parameter_groups(detector, 0.5, 0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in detector.parameters()}
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    named = {name: scale[id(parameter)] for name, parameter in detector.named_parameters()}
    assert named["encoder.patch_embed.proj.weight"] == 0.5**3 and named["encoder.blocks.0.attn.q_bias"] == 0.5**2
    assert named["encoder.blocks.1.mlp.fc1.weight"] == 0.5 and named["encoder.norm.weight"] == named["head.bias"] == 1


# ---- weights from elsewhere ----


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_weights_of_the_official_action_detection_repository(tmp_path):
    sizes = {name: m.SIZES["tiny"][name] for name in ("width", "depth", "heads")}
    ours = randomised(detect_ava.ActionDetector(**sizes, classes=80, clip_size=(4, 32, 32))).eval()
    clip, rois = torch.randn(1, 3, 4, 32, 48), torch.tensor([[0.0, 3, 3, 40, 30]])
    for head in ("head", "roi_heads.action.predictor.cls_score"):
        names = {key: key.replace("encoder.", "backbone.", 1) if key.startswith("encoder.") else key.replace("head", head, 1) for key in ours.state_dict()}
        torch.save({"module": {names[key]: value for key, value in ours.state_dict().items()}}, tmp_path / "official.pth")
        theirs = detect_ava.build_detector(tmp_path / "official.pth", (4, 32, 32)).eval()
        assert torch.equal(theirs(clip, rois), ours(clip, rois))


@pytest.mark.parametrize("naming", ["own pre-training", "own fine-tuning", "official fine-tuning", "Hugging Face pre-training"])
def test_training_starts_from_weights_of_every_stage(tmp_path, capfd, naming):
    sizes = m.SIZES["tiny"]
    if "pre-training" in naming:
        source = m.VideoMAE(**sizes, decoder_depth=1, clip_size=(8, 64, 64))
    else:
        source = m.VideoClassifier(**{name: sizes[name] for name in ("width", "depth", "heads")}, classes=7, clip_size=(8, 64, 64))
    state = randomised(source).state_dict()
    if naming.startswith("own"):
        content = dict(model=state, model_options=source.options)
    elif naming == "official fine-tuning":
        content = {"module": {key.replace("encoder.", ""): value for key, value in state.items()}}
    else:
        content = support.weights.to_hugging_face(state)
    torch.save(content, tmp_path / "weights.pt")
    detector = detect_ava.build(configured(f"init={tmp_path / 'weights.pt'}"), NO_PERSONS)
    assert torch.equal(detector.encoder.blocks[3].mlp.fc2.weight, source.encoder.blocks[3].mlp.fc2.weight)
    if "pre-training" in naming:
        assert torch.equal(detector.encoder.norm.weight, source.encoder.norm.weight)  # kept
    else:
        assert (detector.encoder.norm.weight == 1).all() and (detector.encoder.norm.bias == 0).all()  # there is none
        assert "start fresh: encoder.norm" in capfd.readouterr().err


def test_a_classifier_is_no_detector(tmp_path):
    source = m.VideoClassifier(**TINY, classes=7)
    torch.save(dict(model=source.state_dict(), model_options=source.options), tmp_path / "classifier.pt")
    with pytest.raises(UserError, match="encoder.norm.* is missing"):
        detect_ava.build_detector(tmp_path / "classifier.pt", (4, 32, 32))


def test_the_head_starts_at_the_frequencies_of_the_actions():
    labels = torch.zeros(199, 12)
    labels[:49, 3], labels[:, 4] = 1, 1  # one quarter, all; the others never
    detector = detect_ava.build(configured("init=scratch"), labels)
    frequencies = detector.head.bias.detach().sigmoid()
    assert frequencies[3] == pytest.approx(49.5 / 200) and frequencies[4] == pytest.approx(0.9975) and frequencies[0] == pytest.approx(0.0025)


# ---- clips ----


@pytest.fixture(scope="module")
def ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.render_ava(tmp_path_factory.mktemp("toy_ava") / "videos", {"train": 6, "val": 3})


def test_training_clips_and_their_boxes(ava):
    config = configured(f"data.root={ava}", "data.flip=true", "data.jitter_boxes=true", "data.jitter_colours=true")
    frames, movies = detect_ava.find_training(config, ava)
    assert {frame.video for frame in frames} <= movies.keys()
    excluded = support.ava.read_exclusions(ava / config.data.train_exclude)
    assert not any((frame.video, frame.second) in excluded for frame in frames)
    clips = detect_ava.KeyFrameClips(frames, movies, config.data, seed=0)
    samples = [clips[0, index] for index in range(4)]
    clip, rois, labels, broken = detect_ava.collate(samples)
    assert clip.shape == (4, 8, 3, 64, 64) and clip.dtype == torch.uint8 and not broken
    assert rois[:, 0].tolist() == [float(place) for place, frame in enumerate(frames[:4]) for _ in frame.boxes]
    assert torch.equal(labels, torch.cat([frame.labels for frame in frames[:4]])) and labels.shape[1] == 12
    assert (rois[:, 1:] >= 0).all() and (rois[:, 1:] <= 64).all() and (rois[:, 1:3] <= rois[:, 3:]).all()
    again, other = clips[0, 2], clips[1, 2]
    assert torch.equal(again[0], samples[2][0]) and torch.equal(again[1], samples[2][1])
    assert not torch.equal(other[0], samples[2][0])


def test_colour_jitter_moves_hue_saturation_and_value():
    """Against Python's own conversion, with the shifts that the generator draws."""
    frames = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    frames[0, :, 0, 0] = 77  # grey stays grey
    frames[0, :, 0, 1] = 0
    jittered = detect_ava.jitter_colours(frames, torch.Generator().manual_seed(3))
    hue, saturation, value = ((2 * torch.rand(3, generator=torch.Generator().manual_seed(3)) - 1) * torch.tensor([10 / 180, 26 / 255, 26 / 255])).tolist()
    assert abs(hue) > 0.01 and abs(saturation) > 0.01 and abs(value) > 0.01
    for t, y, x in ((t, y, x) for t in range(2) for y in range(4) for x in range(5)):
        h, s, v = colorsys.rgb_to_hsv(*(frames[t, :, y, x] / 255).tolist())
        s, v = (min(max(a, 0), 1) for a in (s + saturation if s else 0, v + value))
        wanted = 255 * torch.tensor(colorsys.hsv_to_rgb((h + hue) % 1, s, v))
        assert (jittered[t, :, y, x] - wanted).abs().max() < 6  # hue comes back from torchvision in whole numbers


def test_statistics_are_a_key():
    clip = torch.randint(0, 256, (1, 2, 3, 4, 4), dtype=torch.uint8)
    wanted = (clip.float() / 255 - 0.4) / 0.225
    assert torch.allclose(data.normalize(clip, [0.4] * 3, [0.225] * 3), wanted.transpose(1, 2), atol=1e-5)
    assert not torch.allclose(data.normalize(clip), wanted.transpose(1, 2), atol=1e-1)


# ---- test ----


def test_detections_do_not_depend_on_batches(ava):
    config = configured(f"data.root={ava}", "data.workers=0", "run.batch_per_device=1")
    test_set = detect_ava.find_test(config, ava)
    detector = randomised(detect_ava.build(configured("init=scratch"), NO_PERSONS))
    alone, broken = detect_ava.detect(detector, test_set.persons, test_set.movies, config, "test")
    config.run.batch_per_device = 3
    together, _ = detect_ava.detect(detector, test_set.persons, test_set.movies, config, "test")
    assert not broken and len(alone) == len(test_set.persons)
    for one, other, asked in zip(alone, together, test_set.persons):
        assert torch.equal(one.boxes, asked.boxes) and (one.video, one.second) == (asked.video, asked.second) == (other.video, other.second)
        assert torch.allclose(one.labels, other.labels, atol=1e-5)
    assert all(frame.scores.min() >= 0.8 for frame in alone)

    config.data.person_score = True
    scaled, _ = detect_ava.detect(detector, test_set.persons, test_set.movies, config, "test")
    assert all(torch.allclose(a.labels * a.scores[:, None].float(), b.labels, atol=1e-5) for a, b in zip(alone, scaled))
    config.data.person_score, config.data.widen_boxes = False, True
    wider, _ = detect_ava.detect(detector, test_set.persons, test_set.movies, config, "test")
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(alone, wider))  # written are the original boxes
    assert not all(torch.allclose(a.labels, b.labels, atol=1e-4) for a, b in zip(alone, wider))


def test_batches_hold_one_movie_each():
    nobody = torch.zeros(0, 4)
    frames = [support.ava.KeyFrame(video, second, nobody, nobody, nobody) for video, count in (("a", 3), ("b", 2), ("c", 1)) for second in range(count)]
    assert detect_ava.batches_by_movie(frames, 2) == [[0, 1], [2], [3, 4], [5]]


def test_missing_and_broken_movies_are_named_and_their_ground_truth_counts(ava, tmp_path, capfd):
    folder = tmp_path / "ava"
    shutil.copytree(ava, folder)
    (folder / "videos/train_00001.mp4").unlink()
    (folder / "videos/val_00000.mp4").unlink()
    (folder / "videos/val_00001.mp4").write_bytes((ava / "videos/val_00001.mp4").read_bytes()[:500])
    config = configured(f"data.root={folder}", "data.workers=0")
    frames, _ = detect_ava.find_training(config, folder)
    assert "1 of 6 movies for training" in (said := capfd.readouterr().err) and said.rstrip().endswith("left out: train_00001")
    assert not any(frame.video == "train_00001" for frame in frames) and len(frames) > 10

    test_set = detect_ava.find_test(config, folder)
    detector = detect_ava.build(configured("init=scratch"), NO_PERSONS)
    predictions, _, broken = detect_ava.test(detector, test_set, config, "test")
    assert len(broken) == 2 and "movie val_00000 is missing" in broken and any("val_00001.mp4" in reason for reason in broken)
    assert {frame.video for frame in predictions} == {"val_00002"}
    assert {row.frame[0] for row in test_set.ground_truth} == {"val_00000", "val_00001", "val_00002"}

    (folder / "videos/val_00002.mp4").unlink()
    with pytest.raises(UserError, match="none of the .* key frames with persons can be read"):
        detect_ava.test(detector, test_set, config, "test")
    for path in folder.glob("videos/train_*.mp4"):
        path.unlink()
    with pytest.raises(UserError, match="holds none of the movies"):
        detect_ava.find_training(config, folder)


# ---- whole runs ----

QUICK = ["init=scratch", "optim.batch_size=4", "optim.warmup_epochs=1", "optim.epochs=2", "run.log_every=1", "run.pictures=1", "run.validate_every=1"]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]


@pytest.fixture(scope="module")
def reference_run(ava, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = run(DETECT, *QUICK, f"data.root={ava}", f"run.folder={folder}")
    assert "mAP at IoU 0.5" in done.stdout and "epoch 1: mAP" in done.stderr
    return folder


def test_a_run_leaves_log_checkpoint_detections_and_pictures(reference_run, ava):
    lines = [json.loads(line) for line in (reference_run / "log.jsonl").read_text().splitlines()]
    assert {"loss", "step", "epoch", "lr", "clips_per_second", "waiting_for_data", "memory_gb"} <= set(lines[0])
    summary = json.loads((reference_run / "mAP.json").read_text())
    assert lines[-1]["test_mAP"] == summary["mAP"] and len(summary["actions"]) == 12
    checkpoint = torch.load(reference_run / "checkpoint.pt", weights_only=True)
    assert checkpoint["actions"][9] == "turning left" and checkpoint["model_options"]["classes"] == 12
    assert [path.suffix for path in (reference_run / "pictures").iterdir()] == [".png"]
    # the file of detections, evaluated by itself, is worth the same
    run(
        DETECT, "--evaluate", reference_run / "detections.csv", "--ground-truth", ava / "annotations/ava_val_v2.2.csv",
        "--labels", ava / "annotations/ava_action_list_v2.2.pbtxt", "--exclude", ava / "annotations/ava_val_excluded_timestamps_v2.2.csv",
        "--out", reference_run / "again.json",
    )  # fmt: skip
    assert json.loads((reference_run / "again.json").read_text()) == summary


@pytest.mark.parametrize("settings", [["data.workers=0"], ["data.workers=2", "run.batch_per_device=1"]])
def test_two_processes_do_what_one_does(ava, reference_run, tmp_path, settings):
    done = run(DETECT, *QUICK, *settings, f"data.root={ava}", f"run.folder={tmp_path / 'run'}", processes=2)
    assert losses(tmp_path / "run") == pytest.approx(losses(reference_run), rel=1e-4)
    assert done.stderr.count("steps = 2 epochs") == 1  # rank 0 alone speaks
    ours, theirs = (json.loads((folder / "mAP.json").read_text())["mAP"] for folder in (tmp_path / "run", reference_run))
    assert ours == pytest.approx(theirs, abs=1.0)
    count = [len((folder / "detections.csv").read_text().splitlines()) for folder in (tmp_path / "run", reference_run)]
    assert count[0] == count[1]


def test_a_run_goes_on_bit_for_bit(ava, reference_run, tmp_path):
    """Drop path and every random choice included: as after a kill between checkpoint and end."""
    settings = [*QUICK, f"data.root={ava}", "model.drop_path=0.5", "data.jitter_boxes=true", "data.jitter_colours=true", "run.checkpoint_every=3"]
    run(DETECT, *settings, f"run.folder={tmp_path / 'whole'}")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import detect_ava
save = detect_ava.save_checkpoint
def save_and_die(path, **content):
    save(path, **content)
    if content["step"] == 3:
        raise SystemExit(9)
detect_ava.save_checkpoint = save_and_die
sys.argv = ["detect_ava.py", *{[*settings, f"run.folder={tmp_path / 'cut'}"]!r}]
detect_ava.main()
"""
    (tmp_path / "die.py").write_text(code)
    assert subprocess.run(command(tmp_path / "die.py"), cwd=ROOT, env=ENVIRONMENT).returncode == 9
    done = run(DETECT, *settings, f"run.folder={tmp_path / 'cut'}")
    assert "starting at step 3" in done.stderr
    ours, theirs = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("cut", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_four_clips_are_learned_by_heart(ava, tmp_path):
    """Trained and tested on the same four key frames, with ground-truth boxes, a detector reaches an mAP of 1.0."""
    truth = (ava / "annotations/ava_train_v2.2.csv").read_text().splitlines()
    frames = list(dict.fromkeys(tuple(row.split(",")[:2]) for row in truth))[:4]
    rows = [row for row in truth if tuple(row.split(",")[:2]) in frames]
    (tmp_path / "four.csv").write_text("\n".join(rows))
    boxes = {",".join(row.split(",")[:6]) for row in rows}
    (tmp_path / "boxes.csv").write_text("".join(f"{box},,0.99\n" for box in boxes))
    done = run(
        DETECT, "init=scratch", f"data.root={ava}", f"data.train={tmp_path / 'four.csv'}", f"data.val={tmp_path / 'four.csv'}", f"data.boxes={tmp_path / 'boxes.csv'}",
        "data.train_exclude=", "data.val_exclude=", "data.size=64", "data.short_side=64", "optim.batch_size=4", "optim.base_lr=0.2", "optim.epochs=150", "optim.warmup_epochs=10",
        "optim.layer_decay=1.0", "optim.weight_decay=0.0", "run.validate_every=0", "run.pictures=0", f"run.folder={tmp_path / 'run'}", "data.workers=0",
    )  # fmt: skip
    assert json.loads((tmp_path / "run/mAP.json").read_text())["mAP"] == pytest.approx(100), done.stdout


def test_weights_are_tested_and_predict_a_video(ava, reference_run, tmp_path):
    done = run(DETECT, "--test", "--weights", reference_run / "checkpoint.pt", "--out", tmp_path / "test")
    assert "mAP at IoU 0.5" in done.stdout
    assert json.loads((tmp_path / "test/mAP.json").read_text()) == json.loads((reference_run / "mAP.json").read_text())

    video, boxes = ava / "videos/val_00001.mp4", ava / "boxes/ava_val_predicted_boxes.csv"
    done = run(DETECT, "--predict", video, "--boxes", boxes, "--weights", reference_run / "checkpoint.pt", "--out", tmp_path / "out" / "drawn.mp4")
    with av.open(str(tmp_path / "out/drawn.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(frames) == toy.AVA_FRAMES and stream.average_rate == toy.RATE
    orange = [bool(((frame[..., 0] > 200) & (abs(frame[..., 1].astype(int) - 165) < 40) & (frame[..., 2] < 60)).any()) for frame in frames]
    assert any(orange)  # boxes
    assert "key frames: " in done.stdout

    done = run(DETECT, "--predict", ava / "videos/train_00001.mp4", "--boxes", boxes, "--weights", reference_run / "checkpoint.pt", ok=False)
    assert done.returncode != 0 and "has no boxes of video train_00001" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["data.size=80"], "data.size=80 cannot be cropped from frames whose short side is data.short_side=72"),
        (["data.mean=[0.5]"], "data.mean expects a list such as"),
        (["data.rate=0"], "data.rate=0.0 has to be above 0"),
        (["data.size=50"], "50 pixels of height is not a whole number of cubes"),
        (["data.actions=11"], "unknown action 12, known are 1 to 11"),
        (["data.movies=nowhere"], "there is no folder"),
        (["data.boxes=nowhere.csv"], "no rows can be read from"),
        (["data.threshold=1.1"], "has a score of 1.1 or more"),
        (["data.val_exclude=everything.csv"], "leaves out all 9 key frames with persons: nothing is left to test"),
        (["data.thresold=0.5"], "the nearest valid key is 'data.threshold'"),
        (["optim.batch_size=1000"], "set optim.batch_size to"),
        (["init=nowhere.pt"], "make them with pretrain.py"),
    ],
)
def test_mistakes_are_said_in_a_sentence(ava, tmp_path, settings, sentence):
    rows = (ava / "boxes/ava_val_predicted_boxes.csv").read_text().splitlines()
    (ava / "everything.csv").write_text("".join(f"{','.join(row.split(',')[:2])}\n" for row in rows))
    with pytest.raises(UserError, match=sentence):
        detect_ava.train(configured("init=scratch", f"data.root={ava}", f"run.folder={tmp_path / 'run'}", *settings))


def test_missing_arguments_are_said_in_a_sentence():
    for arguments, sentence in ((["--test"], "--test and --predict need --weights"), (["--weights", "y.pt"], "--weights goes with --test or --predict"), (["--predict", "x.mp4", "--weights", "y.pt"], "--predict needs --boxes")):
        done = run(DETECT, *arguments, ok=False)
        assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr


# ---- recipes ----

TABLES = {  # size, base lr, epochs, layer decay (Table 12), mAP (Table 5)
    "k400_small": ("S", 1e-3, 30, 0.6, "22.5"), "k400_base": ("B", 2.5e-4, 30, 0.75, "26.7"),
    "k400_large": ("L", 2.5e-4, 30, 0.75, "34.3"), "k400_huge": ("H", 5e-4, 20, 0.8, "36.5"), "k700_large": ("L", 2.5e-4, 30, 0.75, "36.1"),
    "k400_small_finetuned": ("S", 5e-4, 30, 0.6, "28.4"), "k400_base_finetuned": ("B", 5e-4, 30, 0.75, "31.8"),
    "k400_large_finetuned": ("L", 5e-4, 20, 0.8, "37.0"), "k400_huge_finetuned": ("H", 5e-4, 20, 0.8, "39.5"),
    "k700_large_finetuned": ("L", 5e-4, 20, 0.8, "39.3"),
}  # fmt: skip


def test_recipes_are_those_of_table_12():
    assert {path.stem for path in detect_ava.CONFIGS.glob("*.yaml")} == {*TABLES, "toy", "authors"}
    folders = set()
    for name, (size, base_lr, epochs, layer_decay, mean_ap) in TABLES.items():
        path = detect_ava.CONFIGS / f"{name}.yaml"
        config = configured(str(path))
        assert (config.model.size, config.optim.base_lr, config.optim.epochs, config.optim.layer_decay) == (size, base_lr, epochs, layer_decay), name
        assert (config.optim.batch_size, config.optim.weight_decay, config.optim.betas, config.optim.warmup_epochs) == (128, 0.05, [0.9, 0.999], 5)
        assert (config.data.short_side, config.data.size, config.data.flip, config.data.threshold) == (256, 224, True, 0.8)
        assert (config.data.frames, config.data.stride, config.data.rate, config.model.drop_path) == (16, 4, 30, 0.2)
        assert not any((config.data.jitter_colours, config.data.jitter_boxes, config.data.widen_boxes, config.data.person_score))
        assert f"{mean_ap} mAP (Table 5)" in path.read_text()
        folders.add(config.run.folder)
        stage = "finetune" if name.endswith("finetuned") else "pretrain"
        assert config.init == f"runs/{stage}/{name.removesuffix('_finetuned')}/checkpoint.pt"
    assert len(folders) == len(TABLES)
    authors = as_dict(configured(str(detect_ava.CONFIGS / "authors.yaml")))["data"]
    assert all(authors[key] for key in ("jitter_colours", "jitter_boxes", "widen_boxes", "person_score"))
