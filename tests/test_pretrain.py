"""Target and loss by hand; all that the paper varies runs; reconstructions show what they say."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import log, losses, run, write_numbered
from PIL import Image

import data
import masking
import model as m
import pretrain
from support.config import load_config
from support.lists import list_videos
from support.processes import Processes
from support.seeds import sample_generator
from support.video import Video, read_frames
from support.weights import build_from_checkpoint
from tools.export_hugging_face import export


def objective_of(*settings: str) -> pretrain.Objective:
    return pretrain.Objective(load_config(pretrain.DEFAULT, list(settings)))


RAW = ["target.normalize=false", "data.size=16", "model.cube=[2,16,16]"]  # one cube at each time


def smooth_l1(difference: torch.Tensor) -> torch.Tensor:
    return torch.where(difference.abs() < 1, difference**2 / 2, difference.abs() - 0.5)


@pytest.mark.parametrize("loss, error", [("mse", torch.square), ("l1", torch.abs), ("smooth_l1", smooth_l1)])
def test_losses_on_raw_pixels(loss, error):
    frames = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    target = frames[0].permute(0, 2, 3, 1).flatten() / 255
    prediction = 3 * torch.randn(1, 1, 1536)
    result = objective_of(*RAW, "data.frames=2", f"target.loss={loss}").loss(prediction, frames, torch.tensor([[0]]))
    assert result.item() == pytest.approx(error(prediction.flatten() - target).mean().item(), 1e-5)


def test_std_of_a_flat_cube():
    """As in the authors' code, 1e-6 is added to the std; n - 1 divides the squares."""
    for values, std in (([3.0, 3.0, 3.0], 1e-6), ([1.0, 2.0, 3.0], 1 + 1e-6)):
        cubes = torch.tensor(values)[:, None].expand(3, 3)  # pixels, colors
        assert pretrain.cube_statistics(cubes)[1].flatten().tolist() == pytest.approx([std] * 3, rel=1e-7)


@pytest.mark.parametrize("kind", masking.MASKS)
def test_training_masks_are_of_the_kind_that_the_configuration_names(kind):
    config = load_config(pretrain.DEFAULT, [f"mask.type={kind}", "mask.ratio=0.75"])
    model, _, sample_mask = pretrain.build(config)
    expected = masking.MASKS[kind](model.grid, 0.75, torch.Generator().manual_seed(0))
    assert torch.equal(sample_mask(torch.Generator().manual_seed(0)), expected)


def test_target_of_twice_the_frames():
    """T x tau -> 2T x tau/2: the encoder gets every other frame, each token predicts four (Table 1c)."""
    objective = objective_of(*RAW, "target.frames=double", "data.frames=4", "data.stride=4")
    target = objective.target
    assert (target.load_frames, target.load_stride, target.cube) == (8, 2, (4, 16, 16))
    frames = torch.randint(0, 256, (1, 8, 3, 16, 16), dtype=torch.uint8)
    clip, target_frames = objective.input_and_target(frames)
    assert torch.equal(clip, frames[:, [0, 2, 4, 6]]) and torch.equal(target_frames, frames)
    expected = frames[0, 4:8].permute(0, 2, 3, 1).flatten()[None, None] / 255  # what the second of two tokens predicts
    assert expected.shape == (1, 1, 3072)
    assert float(objective.loss(expected, target_frames, torch.tensor([[1]]))) < 1e-12


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_target_of_the_center_frame(mask):
    """Only tokens of the slice of time that holds frame 8 count, and they predict that frame (Table 1c)."""
    objective = objective_of(*RAW, "target.frames=center", "data.frames=16", "data.size=64")
    frames = torch.randint(0, 256, (1, 16, 3, 64, 64), dtype=torch.uint8)
    _, target = objective.input_and_target(frames)
    assert torch.equal(target[0, 0], frames[0, 8])
    _, masked = masking.split(masking.MASKS[mask]((8, 4, 4), 0.75, torch.Generator().manual_seed(0)))
    prediction = torch.randn(1, len(masked), 768)
    error = 0.0
    for number, token in enumerate(masked.tolist()):
        t, h, w = token // 16, token // 4 % 4, token % 4
        if t == 4:
            pixels = frames[0, 8, :, h * 16 : h * 16 + 16, w * 16 : w * 16 + 16].permute(1, 2, 0).flatten() / 255
            error += float((prediction[0, number] - pixels).square().mean())
    assert float(objective.loss(prediction, target, masked[None])) == pytest.approx(error / (len(masked) / 8), rel=1e-4)


def test_a_run_says_its_mask_learns_and_draws(finished, toy_videos):
    folder = finished("pretrain")
    said = (folder / "said.txt").read_text()
    assert "24 videos; clips of 4 frames, 2 apart, 32 x 32 pixels" in said
    assert "tube mask: 48 of 64 cubes masked, 16 visible" in said and re.search(r"ViT-tiny, [\d,]+ parameters", said)
    assert losses(folder)[-1] < losses(folder)[0] and len(losses(folder)) == 9
    last = log(folder)[-1]
    error, copied = last["reconstruction_error"], last["copy_error"]
    assert f"error of masked cubes {error:.4f}; best copy ({last['copy']}) {copied:.4f}\n" in said
    pictures = sorted((folder / "pictures").iterdir())
    assert [path.name for path in pictures] == ["00000.mp4", "00000.png"] and len(Video(pictures[0])) == 4
    original = read_frames(list_videos(str(toy_videos), "val")[0], [8])[0]  # of the middle clip
    shown = read_frames(pictures[0], [0])[0, :, -128::4, :128:4]  # enlarged, below its title
    assert (shown.float() - original).abs().mean() < 4


VARIANTS = [  # of Table 1, and sizes: cubes, of them masked, of those reconstructed
    ("mask.type=random mask.ratio=0.9", 64, 57, 57),
    ("mask.type=frame mask.ratio=0.875", 64, 48, 48),
    ("mask.type=random mask.decoder_ratio=0.6 target.frames=center", 64, 48, 19),
    ("target.frames=double mask.decoder_ratio=0.5", 64, 48, 24),
    ("target.frames=center mask.type=frame mask.ratio=0.875", 64, 48, 48),
    ("target.normalize=false target.loss=l1 data.frames=8 data.size=48 data.flip=true", 288, 216, 216),
    ("target.loss=smooth_l1 model.decoder_depth=2 model.cube=[2,8,8] run.precision=bf16", 32, 24, 24),
]


@pytest.mark.parametrize("variant, cubes, masked, reconstructed", VARIANTS)
def test_everything_that_the_paper_varies_runs(variant, cubes, masked, reconstructed, settings, tmp_path):
    more = ["data.workers=0", "optim.epochs=1", "target.normalize=true", f"run.folder={tmp_path}"]
    said = run("pretrain.py", *settings["pretrain"], *more, *variant.split()).stderr
    sentence = f"{masked} of {cubes} cubes masked, {cubes - masked} visible, {reconstructed} reconstructed"
    assert sentence in said and len(losses(tmp_path)) == 3 and len(list((tmp_path / "pictures").iterdir())) == 2


@torch.no_grad()
def first_loss(model: m.VideoMAE, config: SimpleNamespace, videos: list[Path]) -> float:
    """The loss of the first batch of a run."""
    _, objective, sample_mask = pretrain.build(config)
    random = dict(scales=config.data.scales, flip=config.data.flip, sample_mask=sample_mask, seed=config.run.seed)
    clips = data.PretrainingClips(videos, frames=8, stride=2, size=config.data.size, **random)
    processes = Processes(0, 1, torch.device("cpu"), torch.float32)
    batch = next(iter(data.MicroBatchSampler(len(videos), 8, 8, range(1), processes, config.run.seed)))
    frames, visible, masked = (x.flatten(0, 1) for x in data.collate([clips[key] for key in batch])[:3])
    return float(objective.loss(model(data.normalize(frames), visible, masked), frames, masked))


@pytest.mark.parametrize("source, size", [("own", 32), ("official", 32), ("hugging face", 32), ("own", 48)])
def test_a_run_continues_from_pretrained_weights(source, size, settings, pretrained, tmp_path):
    """Its first loss is theirs; positions are interpolated, restored when it resumes, and read by other commands."""
    content, init = torch.load(pretrained), tmp_path / "weights"
    theirs = m.VideoMAE(**content["model_options"])
    theirs.load_state_dict(content["model"])
    init.mkdir()
    if source == "own":
        torch.save(content, init / "checkpoint.pt")
    elif source == "official":
        torch.save(dict(model=content["model"]), init / "checkpoint.pt")
    else:
        export(theirs, init, True, [])
    words = [*settings["pretrain"], f"init={init}", f"data.size={size}", "optim.epochs=1", "run.validate_every=0"]
    words += ["data.workers=0", "data.frames=8", "model.pretrained_clip=[8, 32, 32]", f"run.folder={tmp_path / 'run'}"]
    assert f"initialized from {init}\n" in run("pretrain.py", *words).stderr

    model = m.VideoMAE(**theirs.options | dict(clip_size=(8, size, size)))
    model.load_state_dict(content["model"])
    for part in (model, model.encoder):
        table = m.sincos_positions(128, part.pos_embed.shape[1])
        part.pos_embed.copy_(m.interpolate_positions(table, (8, 4, 4), model.grid))
    config = load_config(pretrain.DEFAULT, words)
    videos = list_videos(config.data.root, "train")
    assert losses(tmp_path / "run")[0] == pytest.approx(first_loss(model, config, videos), rel=1e-5)
    shutil.rmtree(init)  # the checkpoint decides
    assert "initialized" not in run("pretrain.py", *words).stderr
    assert log(tmp_path / "run")[-1] == log(tmp_path / "run")[-2]
    read = build_from_checkpoint(tmp_path / "run", m.VideoMAE)
    assert torch.equal(read.pos_embed, model.pos_embed) and torch.equal(read.encoder.pos_embed, model.encoder.pos_embed)


def test_validation(settings, finished, toy_videos, tmp_path):
    """The loss of middle clips with fixed masks; broken videos are named and left out; training stays the same."""
    broken, videos = tmp_path / "broken.mp4", list_videos(str(toy_videos), "val")
    broken.touch()
    (tmp_path / "val.txt").write_text("".join(f"{video}\n" for video in [broken, *videos]))
    words = [*settings["pretrain"], f"data.val={tmp_path / 'val.txt'}", "run.validate_every=1", "run.pictures=0"]
    said = run("pretrain.py", *words, f"run.folder={tmp_path / 'run'}").stderr
    assert losses(tmp_path / "run") == losses(finished("pretrain"))  # which is validated every second epoch
    lines = [line for line in log(tmp_path / "run") if "val_loss" in line]
    assert [(line["step"], line["epoch"]) for line in lines] == [(3, 1), (6, 2), (9, 3)]
    assert f"epoch 3: validation loss {lines[-1]['val_loss']:.4f}, 8 of 9 clips\n" in said
    assert said.count(f"left out of the fixed clips: {broken}: ") == 4  # and in the last comparison

    model = build_from_checkpoint(tmp_path / "run", m.VideoMAE).requires_grad_(False)
    by_hand, errors = [], []
    for number, video in enumerate(videos, 1):
        frames = data.center_crop(read_frames(video, data.dense_clip(24, 4, 2)), 32)
        mask = masking.tube_mask(model.grid, 0.75, sample_generator(0, -1, number))
        visible, masked = (positions[None] for positions in masking.split(mask))
        target = pretrain.to_cubes(frames[None] / 255, (1, 8, 8))[:, mask]
        prediction = model(data.normalize(frames[None]), visible, masked).unflatten(2, (-1, 3))
        by_hand.append(float((prediction - target).square().mean()))
        drawn = pretrain.reconstruct(model, objective_of("data.frames=4"), frames, mask)["reconstruction"]
        errors.append(float((drawn / 255 - frames / 255).square().mean()) / 0.75)  # it is exact elsewhere
    assert lines[-1]["val_loss"] == pytest.approx(sum(by_hand) / 8, rel=1e-4)
    assert log(tmp_path / "run")[-1]["reconstruction_error"] == pytest.approx(sum(errors) / 8, rel=1e-4)


def test_reconstruct_own_video_with_own_and_official_weights(finished, tmp_path):
    video, official = write_numbered(tmp_path / "mine.mp4", 40), tmp_path / "official.pth"
    own = finished("pretrain") / "checkpoint.pt"
    torch.save({"model": m.VideoMAE(**m.SIZES["S"], decoder_depth=1).state_dict()}, official)
    sizes = {}
    for weights, frames, *more in ((own, 4), (official, 16), (own, 4, "--ratios", 0.5, 0.75, "mask.type=random")):
        run("pretrain.py", "--reconstruct", video, "--weights", weights, "--out", tmp_path / "out", *more)
        assert len(Video(tmp_path / "out/mine.mp4")) == frames
        with Image.open(tmp_path / "out/mine.png") as image:
            sizes[weights, len(more)] = image.size
    (width, height), (_, two_ratios) = sizes[own, 0], sizes[own, 4]
    assert width >= 4 * 128 and two_ratios / 5 == pytest.approx(height / 3, rel=0.05)  # rows
    assert sizes[official, 0][0] >= 8 * 224 and sizes[official, 0][1] >= 4 * 224
    none = tmp_path / "none.mp4"
    done = run("pretrain.py", "--reconstruct", none, video, "--weights", own, "--out", tmp_path / "two", ok=False)
    assert f"no picture of {none}" in done.stderr and "1 of 2 videos cannot be read; see above" in done.stderr
    assert done.returncode == 1 and (tmp_path / "two/mine.png").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_a_perfect_prediction_gives_the_original_back(toy_videos, normalize):
    """With the masked cubes' own statistics; with estimated ones nothing of the masked cubes is used."""
    sizes = ["data.frames=16", "data.size=32", "model.cube=[2,8,8]"]
    objective = objective_of(*sizes, f"target.normalize={normalize}")
    frames = read_frames(list_videos(str(toy_videos), "val")[0], list(range(16)))
    mask = masking.tube_mask((8, 4, 4), 0.75, torch.Generator().manual_seed(0))
    _, masked = masking.split(mask)
    target = pretrain.to_cubes(frames[None] / 255, (2, 8, 8))[0, masked]
    if normalize == "true":
        mean, std = pretrain.cube_statistics(target)
        target = (target - mean) / std

    class Oracle(m.VideoMAE):
        def forward(self, clip, visible, masked):
            return target.flatten(1)[None]

    oracle = Oracle(**m.SIZES["tiny"], decoder_depth=1, clip_size=(16, 32, 32), cube=(2, 8, 8))
    views = pretrain.reconstruct(oracle, objective, frames, mask)
    assert torch.equal(views["original"], frames)
    perfect = "oracle" if normalize == "true" else "reconstruction"
    assert (views[perfect].int() - frames.int()).abs().max() <= 1
    pixels = mask.view(8, 4, 4).repeat_interleave(2, 0).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pixels = pixels[:, None].expand_as(frames)
    assert (views["masked"][pixels] == 128).all() and torch.equal(views["masked"][~pixels], frames[~pixels])
    if normalize == "true":
        assert list(views) == ["original", "masked", "estimated", "oracle"]
        other = pretrain.reconstruct(oracle, objective, torch.where(pixels, 255 - frames, frames), mask)
        assert torch.equal(other["estimated"], views["estimated"])
