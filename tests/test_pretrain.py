"""Target and loss by hand; whole runs as real processes: devices, resumption after a kill, broken input, pictures."""

import json
import math
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, run, turn_by_90, write_numbered
from test_data import broken_files

import data
import masking
import model as m
import pretrain
import support.datasets
import support.video
from support.config import UserError, load_config
from support.run import warmup_cosine

PRETRAIN = ROOT / "pretrain.py"


def configured(*settings: str):
    return load_config(pretrain.CONFIGS / "toy.yaml", list(settings))


# ---- target and loss ----


def test_flattening_order_and_uncubing():
    """A cube's pixels run over p0, p1, p2 and channel, the channel fastest; cubes over time, height, width."""
    p0, p1, p2 = cube = (2, 4, 4)
    frames = torch.arange(4 * 3 * 8 * 8).view(1, 4, 3, 8, 8)
    cubes = pretrain.to_cubes(frames, cube)  # (1, 2 * 2 * 2, 32, 3)
    assert cubes.shape == (1, 8, 32, 3)
    for t, h, w in ((0, 0, 1), (1, 1, 0)):
        for a, b, c in ((0, 0, 0), (1, 2, 3)):
            pixel = cubes[0, (t * 2 + h) * 2 + w, (a * p1 + b) * p2 + c]
            assert torch.equal(pixel, frames[0, t * p0 + a, :, h * p1 + b, w * p2 + c])
    assert torch.equal(pretrain.from_cubes(cubes, cube, 8), frames)


def test_target_of_a_cube_by_hand():
    objective = pretrain.Objective(configured("data.frames=2", "data.size=16", "model.cube=[2,8,8]"))
    frames = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    masked = torch.tensor([[1, 2]])  # upper right and lower left
    wanted = []
    for rows, columns in ((slice(0, 8), slice(8, 16)), (slice(8, 16), slice(0, 8))):
        pixels = frames[0, :, :, rows, columns].double() / 255  # (2, 3, 8, 8)
        for_each_channel = [pixels[:, c].flatten() for c in range(3)]
        normalised = [(p - p.mean()) / ((((p - p.mean()) ** 2).sum() / 127).sqrt() + 1e-6) for p in for_each_channel]
        wanted.append(torch.stack(normalised, 1).flatten())
    wanted = torch.stack(wanted)[None].float()
    prediction = torch.randn(1, 2, 384)
    assert float(objective.loss(prediction, frames, masked)) == pytest.approx(float((prediction - wanted).square().mean()), rel=1e-5)
    assert float(objective.loss(wanted, frames, masked)) < 1e-9
    assert float(objective.loss(torch.zeros(1, 2, 384), frames, masked)) == pytest.approx(127 / 128, rel=1e-4)  # 511 / 512 for 2 x 16 x 16


@pytest.mark.parametrize("loss, reference", [("mse", torch.square), ("l1", torch.abs), ("smooth_l1", lambda d: torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5))])
def test_losses_on_raw_pixels(loss, reference):
    objective = pretrain.Objective(configured("target.normalize=false", f"target.loss={loss}", "data.size=16", "data.frames=2", "model.cube=[2,16,16]"))
    frames = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    target = frames[0].permute(0, 2, 3, 1).flatten() / 255  # one cube
    prediction = 3 * torch.randn(1, 1, 1536)
    expected = reference(prediction.flatten() - target).mean()
    assert float(objective.loss(prediction, frames, torch.tensor([[0]]))) == pytest.approx(float(expected), rel=1e-5)


def test_target_of_twice_the_frames():
    """T x tau -> 2T x tau/2: the encoder gets every second frame, each token predicts four (Table 1c)."""
    objective = pretrain.Objective(configured("target.frames=double", "target.normalize=false", "data.frames=4", "data.stride=4", "data.size=16", "model.cube=[2,16,16]"))
    assert (objective.load_frames, objective.load_stride, objective.cube) == (8, 2, (4, 16, 16))
    frames = torch.randint(0, 256, (1, 8, 3, 16, 16), dtype=torch.uint8)
    clip, target = objective.split(frames)
    assert torch.equal(clip, frames[:, [0, 2, 4, 6]]) and target is frames
    wanted = frames[0, 4:8].permute(0, 2, 3, 1).flatten()[None, None] / 255  # what the second of two tokens predicts
    assert wanted.shape == (1, 1, 3072)
    assert float(objective.loss(wanted, target, torch.tensor([[1]]))) < 1e-12


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_target_of_the_centre_frame(mask):
    """Only tokens of the slice of time that holds frame 8 count, and they predict that frame (Table 1c)."""
    objective = pretrain.Objective(configured("target.frames=center", "target.normalize=false", "data.frames=16", "data.size=64", "model.cube=[2,16,16]"))
    frames = torch.randint(0, 256, (1, 16, 3, 64, 64), dtype=torch.uint8)
    _, target = objective.split(frames)
    assert torch.equal(target[0, 0], frames[0, 8])
    _, masked = masking.split(masking.MASKS[mask]((8, 4, 4), 0.75, torch.Generator().manual_seed(0)))
    prediction = torch.randn(1, len(masked), 768)
    error = 0.0
    for number, token in enumerate(masked.tolist()):
        t, h, w = token // 16, token // 4 % 4, token % 4
        if t == 4:
            wanted = frames[0, 8, :, h * 16 : h * 16 + 16, w * 16 : w * 16 + 16].permute(1, 2, 0).flatten() / 255
            error += float((prediction[0, number] - wanted).square().mean())
    assert float(objective.loss(prediction, target, masked[None])) == pytest.approx(error / (len(masked) / 8), rel=1e-4)


@pytest.mark.parametrize("setting", ["target.frames=centre", "target.loss=l2", "target.frames=double"])
def test_impossible_targets_are_refused(setting):
    with pytest.raises(UserError, match="choose one of|has to be even"):
        pretrain.Objective(configured(setting, "data.stride=1"))


# ---- learning ----


@pytest.mark.parametrize("normalize", ["false", "true"])
def test_four_clips_can_be_overfitted(toy_videos, normalize):
    """The loss falls below a tenth of that of predicting the mean of all hidden pixels, or of each hidden cube."""
    torch.manual_seed(0)
    objective = pretrain.Objective(configured(f"target.normalize={normalize}", "data.frames=8", "data.size=32", "model.cube=[2,8,8]"))
    model = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=2, clip_size=(8, 32, 32), cube=(2, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    videos = support.datasets.list_videos(str(toy_videos), "train")[::6]
    frames = torch.stack([data.center_crop(support.video.read_frames(path, list(range(0, 16, 2))), 32) for path in videos])  # (4, 8, 3, 32, 32)
    visible, masked = (x.expand(4, -1) for x in masking.split(masking.tube_mask(model.grid, 0.75, torch.Generator().manual_seed(0))))
    clip = data.normalize(frames)
    hidden = m.take(pretrain.to_cubes(frames, (2, 8, 8)).flatten(2), masked) / 255
    nothing_learned = hidden.var().item() if normalize == "false" else 127 / 128
    for step in range(500):
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, 500, 20, 4e-3, 0)
        loss = objective.loss(model(clip, visible, masked), frames, masked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1 * nothing_learned


# ---- whole runs ----

QUICK = ["optim.batch_size=8", "optim.base_lr=0.02", "optim.warmup_epochs=1", "run.log_every=1", "run.pictures=1", "data.train=train", "data.val=val"]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference_run(toy_videos, tmp_path_factory) -> Path:
    """21 steps by one plain process."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = run(PRETRAIN, *QUICK, f"data.root={toy_videos}", "optim.epochs=7", f"run.folder={folder}", "run.checkpoint_every=2")
    assert "tube mask: 48 of 64 cubes masked, 16 visible" in done.stderr
    assert "batch 8 = 1 processes x 1 accumulated x 8 clips; learning rate 0.02 x 8 / 256 = 0.000625" in done.stderr
    assert "21 steps = 7 epochs x 3" in done.stderr
    return folder


def test_a_run_leaves_log_checkpoint_configuration_and_pictures(reference_run):
    assert len(losses(reference_run)) == 21 and losses(reference_run)[-1] < losses(reference_run)[0]
    lines = [json.loads(line) for line in (reference_run / "log.jsonl").read_text().splitlines()]
    assert {"loss", "step", "epoch", "lr", "clips_per_second", "waiting_for_data", "memory_gb"} <= set(lines[0])
    assert [line["step"] for line in lines] == list(range(1, 22)) and lines[0]["lr"] == 0
    checkpoint = torch.load(reference_run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 21 and checkpoint["config"]["optim"]["batch_size"] == 8
    assert load_config(pretrain.CONFIGS / "toy.yaml", [str(reference_run / "config.yaml")]).optim.epochs == 7
    pictures = sorted((reference_run / "pictures").iterdir())
    assert [path.suffix for path in pictures] == [".mp4", ".png"]
    assert len(support.video.Video(pictures[0])) == 8
    assert not list(reference_run.glob("*.tmp"))


@pytest.mark.parametrize("processes, settings", [(1, ["data.workers=0"]), (2, ["data.workers=1"]), (2, ["data.workers=2", "run.batch_per_device=3"])])
def test_losses_do_not_depend_on_processes_workers_or_accumulation(toy_videos, reference_run, tmp_path, processes, settings):
    done = run(PRETRAIN, *QUICK, *settings, f"data.root={toy_videos}", "optim.epochs=7", f"run.folder={tmp_path / 'run'}", processes=processes)
    pieces = "2 processes x 2 accumulated x 2 clips" if "run.batch_per_device=3" in settings else f"{processes} processes x 1 accumulated"
    assert pieces in done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(reference_run), rel=1e-5)
    assert done.stderr.count("steps = 7 epochs") == 1  # rank 0 alone speaks


def in_group(group: int) -> list[str]:
    """Command lines of the living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append((stat.parent / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(toy_videos, reference_run, tmp_path):
    folder = tmp_path / "run"
    arguments = command(PRETRAIN, *QUICK, f"data.root={toy_videos}", "optim.epochs=7", f"run.folder={folder}", "run.checkpoint_every=2", "data.workers=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for wanted_step in (3, 9):  # two kills, each of the main process alone, wherever it just is
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        while not (folder / "log.jsonl").exists() or len((folder / "log.jsonl").read_text().splitlines()) < wanted_step:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until = time.monotonic() + 20
        while in_group(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not in_group(process.pid)  # the loader's workers have gone, too
        step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
        assert step >= wanted_step - 3 and step < 21
    done = run(*arguments[1:])
    assert f"starting at step {step}" in done.stderr
    weights, reference = (torch.load(path / "checkpoint.pt", weights_only=True)["model"] for path in (folder, reference_run))
    assert all(torch.equal(weights[key], reference[key]) for key in reference)
    assert losses(folder) == losses(reference_run)
    again = run(*arguments[1:])  # finished: nothing left to do
    assert "starting at step 21" in again.stderr and losses(folder) == losses(reference_run)


def test_a_folder_belongs_to_one_run_which_control_c_ends_in_a_sentence(toy_videos, tmp_path):
    arguments = command(PRETRAIN, *QUICK, f"data.root={toy_videos}", "optim.epochs=500", f"run.folder={tmp_path / 'run'}")
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests started in the background ignore ctrl-C, and so would the run
    process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    while not (tmp_path / "run/log.jsonl").exists() or not (tmp_path / "run/log.jsonl").read_text():
        time.sleep(0.05)
    second = run(*arguments[1:], ok=False)
    assert second.returncode == 1 and f"another run is at work in {tmp_path / 'run'}: wait for it" in second.stderr and "Traceback" not in second.stderr
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "interrupted: the same command goes on" in said and "Traceback" not in said
    assert not in_group(process.pid)


def test_broken_videos_are_survived_counted_and_named(tmp_path):
    folder = tmp_path / "videos"
    broken = broken_files(folder)
    for number in range(3):
        write_numbered(folder / f"whole {number}.mp4", 30 + number)
    turn_by_90(write_numbered(folder / "phone.mp4", 12))
    (folder / "list.txt").write_text("".join(f"{path.name} 3\n" for path in [*sorted(folder.iterdir()), broken["missing.mp4"]]))
    done = run(PRETRAIN, *QUICK, f"data.root={folder}", "data.train=list.txt", "data.val=", "data.stride=2", "run.pictures=20", "optim.epochs=2", f"run.folder={tmp_path / 'run'}", processes=2)
    reports = (tmp_path / "run/broken_videos.txt").read_text()
    for name in ("truncated.mp4", "empty.mp4", "text.mp4", "audio.mp4", "unreadable.mp4", "missing.mp4"):
        assert f"{name}:" in reports and f"{name}:" in done.stderr
    assert "whole" not in reports and "phone" not in reports
    assert f"{len(reports.splitlines())} broken videos were replaced by others" in done.stderr
    assert "no picture of" in done.stderr


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["optim.base_lrr=1"], "unknown key 'optim.base_lrr'; the nearest valid key is 'optim.base_lr'"),
        (["data.frames=sixteen"], "data.frames expects int"),
        (["data.size=100"], "100 pixels of height is not a whole number of cubes of 16; choose a multiple of 16"),
        (["data.frames=15"], "15 frames is not a whole number of cubes of 2"),
        (["mask.ratio=1.0"], "a mask ratio of 1 hides 16 of 16 places"),
        (["mask.type=tubes"], "mask.type=tubes is not known; choose one of tube, random, frame"),
        (["model.size=XL"], "model.size=XL is not known; choose one of tiny, S, B, L, H"),
        (["model.cube=[2,8]"], "model.cube expects a list such as [2, 16, 16], not [2, 8]"),
        (["--weights", "x.pt"], "--weights goes with --reconstruct"),
        (["run.log_every=0"], "run.log_every=0 has to be at least 1"),
        (["run.precision=fp16"], "run.precision=fp16 is not known"),
        (["data.root=/nowhere"], "there is no folder or list file"),
        (["data.root=tests"], "no videos found in"),
    ],
)
def test_mistakes_end_in_one_sentence_before_any_work(settings, sentence, tmp_path):
    done = run(PRETRAIN, *settings, f"run.folder={tmp_path / 'run'}", ok=False)
    assert done.returncode != 0
    assert sentence in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_set_without_a_usable_video_ends_in_a_sentence(tmp_path):
    broken_files(tmp_path / "videos")
    (tmp_path / "videos/damaged.mkv").write_bytes(b"nothing")
    done = run(PRETRAIN, f"data.root={tmp_path / 'videos'}", f"run.folder={tmp_path / 'run'}", ok=False)
    assert done.returncode != 0 and "100 videos in a row could not be read" in done.stderr and "Traceback" not in done.stderr


def test_fewer_videos_than_a_batch(toy_videos, tmp_path):
    done = run(PRETRAIN, f"data.root={toy_videos}", "data.train=val", f"run.folder={tmp_path / 'run'}", ok=False)
    assert "8 videos are fewer than one batch: set optim.batch_size to 8 or less" in done.stderr and "Traceback" not in done.stderr


VARIANTS = [
    ["mask.type=random", "mask.ratio=0.9"],
    ["mask.type=frame", "mask.ratio=0.875"],
    ["target.frames=double"],
    ["target.frames=center", "mask.type=random"],
    ["target.frames=center", "mask.type=frame", "mask.ratio=0.875"],
    ["target.normalize=false", "target.loss=l1", "data.frames=32", "data.size=96", "data.flip=true", "data.scales=[1,0.75]"],
    ["target.loss=smooth_l1", "model.decoder_depth=1", "model.cube=[4,16,16]", "run.precision=bf16"],
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: ",".join(settings))
def test_everything_that_the_paper_varies_runs(toy_videos, tmp_path, settings, monkeypatch, capsys):
    """In this process, to save the start; the pictures too."""
    monkeypatch.delenv("RANK", raising=False)
    pretrain.train(configured(*QUICK, f"data.root={toy_videos}", "data.workers=0", "optim.epochs=1", f"run.folder={tmp_path}", *settings))
    assert len(losses(tmp_path)) == 3 and len(list((tmp_path / "pictures").iterdir())) == 2


@pytest.mark.parametrize("path", sorted(pretrain.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_builds(path):
    config = load_config(pretrain.DEFAULT, [str(path)])
    with torch.device("meta"):
        model, _, draw_mask = pretrain.build(config)
    with torch.device("cpu"):
        assert len(draw_mask(torch.Generator())) == math.prod(model.grid)
    scaled = config.optim.base_lr * config.optim.batch_size / 256
    if path.stem != "toy":  # Table 9 and Sec. B
        assert scaled == pytest.approx(2.25e-4 if config.optim.batch_size == 192 else 6e-4)
        assert config.run.folder == f"runs/pretrain/{path.stem}"


# ---- reconstructions of one's own videos ----


def picture_of(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size


def test_reconstruct_own_video_with_own_and_official_weights(reference_run, tmp_path):
    video = write_numbered(tmp_path / "mine.mp4", 40)
    run(PRETRAIN, "--reconstruct", video, "--weights", reference_run / "checkpoint.pt", "--out", tmp_path / "own", "--ratios", 0.5, 0.75, "mask.type=random")
    assert picture_of(tmp_path / "own/mine.png") == (1024, (128 + 18) * 7)  # the original, and for both ratios masked, guessed and borrowed
    assert len(support.video.Video(tmp_path / "own/mine.mp4")) == 8

    torch.manual_seed(0)
    official = m.VideoMAE(**m.SIZES["S"], decoder_depth=1)
    torch.save({"model": official.state_dict()}, tmp_path / "official.pth")
    run(PRETRAIN, "--reconstruct", video, "--weights", tmp_path / "official.pth", "--out", tmp_path / "official")
    assert picture_of(tmp_path / "official/mine.png") == (8 * 224, (224 + 18) * 4)

    done = run(PRETRAIN, "--reconstruct", tmp_path / "none.mp4", "--weights", reference_run / "checkpoint.pt", ok=False)
    assert "no clip can be read from" in done.stderr and "Traceback" not in done.stderr
    done = run(PRETRAIN, "--reconstruct", video, ok=False)
    assert "--reconstruct needs --weights FILE" in done.stderr and "Traceback" not in done.stderr


def test_a_perfect_prediction_gives_the_original_back(toy_videos):
    """With the borrowed statistics; and the honest reconstruction uses nothing of the hidden cubes."""
    objective = pretrain.Objective(configured("data.frames=16", "model.cube=[2,16,16]"))
    frames = support.video.read_frames(support.datasets.list_videos(str(toy_videos), "val")[0], list(range(16)))
    mask = masking.tube_mask((8, 4, 4), 0.75, torch.Generator().manual_seed(0))
    _, masked = masking.split(mask)
    cubes = pretrain.to_cubes(frames[None] / 255, (2, 16, 16))[0, masked]
    mean, deviation = pretrain.cube_statistics(cubes)

    class Oracle(m.VideoMAE):
        def forward(self, clip, visible, masked):
            return ((cubes - mean) / deviation).flatten(1)[None]

    oracle = Oracle(**m.SIZES["tiny"], decoder_depth=1, clip_size=(16, 64, 64))
    views = pretrain.reconstruct(oracle, objective, frames, mask)
    names = list(views)
    assert names[:2] == ["original", "masked"] and "guessed from visible" in names[2] and "borrowed from the original" in names[3]
    assert torch.equal(views["original"], frames)
    assert (views[names[3]].int() - frames.int()).abs().max() <= 1
    hidden = mask.view(8, 4, 4).repeat_interleave(2, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(frames)
    assert (views["masked"][hidden] == 128).all() and torch.equal(views["masked"][~hidden], frames[~hidden])
    elsewhere = torch.where(hidden, 255 - frames, frames)
    other = pretrain.reconstruct(oracle, objective, elsewhere, mask)
    assert torch.equal(other[names[2]], views[names[2]])


def test_exported_folder_opens_in_transformers(reference_run, tmp_path):
    import transformers

    done = run("support.weights", reference_run / "checkpoint.pt", tmp_path / "exported")
    assert "from_pretrained" in done.stdout
    theirs, report = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.config.num_frames == 8
    processor = json.loads((tmp_path / "exported/preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
