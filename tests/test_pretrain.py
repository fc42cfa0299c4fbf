"""Target and loss by hand; all that the paper varies runs; reconstructions show what they say."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import log, losses, run, write_numbered
from PIL import Image

import data
import masking
import model as m
import pretrain
from support.config import UserError, load_config
from support.datasets import list_videos
from support.run import warmup_cosine
from support.video import Video, read_frames


def configured(*settings: str):
    return load_config(pretrain.DEFAULT, list(settings))


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
    assert float(objective.loss(prediction, frames, masked)) == pytest.approx(
        float((prediction - wanted).square().mean()), rel=1e-5
    )
    assert float(objective.loss(wanted, frames, masked)) < 1e-9
    assert float(objective.loss(torch.zeros(1, 2, 384), frames, masked)) == pytest.approx(
        127 / 128, rel=1e-4
    )  # 511 / 512 for 2 x 16 x 16


@pytest.mark.parametrize(
    "loss, reference",
    [
        ("mse", torch.square),
        ("l1", torch.abs),
        ("smooth_l1", lambda d: torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5)),
    ],
)
def test_losses_on_raw_pixels(loss, reference):
    objective = pretrain.Objective(
        configured(
            "target.normalize=false", f"target.loss={loss}", "data.size=16", "data.frames=2", "model.cube=[2,16,16]"
        )
    )
    frames = torch.randint(0, 256, (1, 2, 3, 16, 16), dtype=torch.uint8)
    target = frames[0].permute(0, 2, 3, 1).flatten() / 255  # one cube
    prediction = 3 * torch.randn(1, 1, 1536)
    expected = reference(prediction.flatten() - target).mean()
    assert float(objective.loss(prediction, frames, torch.tensor([[0]]))) == pytest.approx(float(expected), rel=1e-5)


def test_target_of_twice_the_frames():
    """T x tau -> 2T x tau/2: the encoder gets every second frame, each token predicts four (Table 1c)."""
    objective = pretrain.Objective(
        configured(
            "target.frames=double",
            "target.normalize=false",
            "data.frames=4",
            "data.stride=4",
            "data.size=16",
            "model.cube=[2,16,16]",
        )
    )
    target_row = objective.target
    assert (target_row.load_frames, target_row.load_stride, target_row.cube) == (8, 2, (4, 16, 16))
    frames = torch.randint(0, 256, (1, 8, 3, 16, 16), dtype=torch.uint8)
    clip, target = objective.input_and_target(frames)
    assert torch.equal(clip, frames[:, [0, 2, 4, 6]]) and torch.equal(target, frames)
    wanted = frames[0, 4:8].permute(0, 2, 3, 1).flatten()[None, None] / 255  # what the second of two tokens predicts
    assert wanted.shape == (1, 1, 3072)
    assert float(objective.loss(wanted, target, torch.tensor([[1]]))) < 1e-12


@pytest.mark.parametrize("mask", ["tube", "random"])
def test_target_of_the_centre_frame(mask):
    """Only tokens of the slice of time that holds frame 8 count, and they predict that frame (Table 1c)."""
    objective = pretrain.Objective(
        configured(
            "target.frames=center", "target.normalize=false", "data.frames=16", "data.size=64", "model.cube=[2,16,16]"
        )
    )
    frames = torch.randint(0, 256, (1, 16, 3, 64, 64), dtype=torch.uint8)
    _, target = objective.input_and_target(frames)
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


@pytest.mark.parametrize("normalize", ["false", "true"])
def test_four_clips_can_be_overfitted(toy_videos, normalize):
    """The loss falls below a tenth of that of predicting the mean of all hidden pixels, or of each hidden cube."""
    torch.manual_seed(0)
    objective = pretrain.Objective(
        configured(f"target.normalize={normalize}", "data.frames=8", "data.size=32", "model.cube=[2,8,8]")
    )
    model = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=2, clip_size=(8, 32, 32), cube=(2, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    videos = list_videos(str(toy_videos), "train")[::6]
    frames = torch.stack(
        [data.center_crop(read_frames(path, list(range(0, 16, 2))), 32) for path in videos]
    )  # (4, 8, 3, 32, 32)
    visible, masked = (
        x.expand(4, -1) for x in masking.split(masking.tube_mask(model.grid, 0.75, torch.Generator().manual_seed(0)))
    )
    clip = data.normalize(frames)
    hidden = m.gather_tokens(pretrain.to_cubes(frames, (2, 8, 8)).flatten(2), masked) / 255
    nothing_learned = hidden.var().item() if normalize == "false" else 127 / 128
    for step in range(500):
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, 500, 20, 4e-3, 0)
        loss = objective.loss(model(clip, visible, masked), frames, masked)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1 * nothing_learned


# ---- half the decoder ----


@pytest.mark.parametrize("more", [[], ["target.loss=l1", "target.normalize=false"]])
def test_the_loss_of_some_cubes_is_the_mean_over_these_cubes(more):
    """The same predictions, all or some of them: the whole loss is the mean of the loss of each half."""
    objective = pretrain.Objective(configured(*more))
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8)
    masks = [masking.tube_mask((4, 4, 4), 0.75, generator) for _ in range(2)]
    masked = torch.stack([masking.split(mask)[1] for mask in masks])  # (2, 48)
    kept = torch.stack([masking.running_cells(row, (4, 4, 4), 0.5, generator) for row in masked])  # (2, 24)
    prediction = torch.randn(2, 48, 1536)
    chosen = (masked[:, :, None] == kept[:, None]).any(2)  # (2, 48)
    halves = [
        objective.loss(prediction[part].view(2, 24, -1), frames, masked[part].view(2, 24)) for part in (chosen, ~chosen)
    ]
    assert torch.equal(masked[chosen].view(2, 24), kept) and halves[0] != halves[1]
    assert float(sum(halves) / 2) == pytest.approx(float(objective.loss(prediction, frames, masked)), rel=1e-5)
    by_hand = sum(
        objective.loss(prediction[[b]][:, [i]], frames[[b]], masked[[b]][:, [i]]) for b, i in chosen.nonzero().tolist()
    )
    assert float(halves[0]) == pytest.approx(float(by_hand / 48), rel=1e-5)


def test_the_model_reconstructs_the_listed_cubes_alone():
    """Cubes that are left out take no part in the decoder, and each prediction belongs to its own position."""
    torch.manual_seed(0)
    model = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=2, clip_size=(8, 64, 64)).eval()
    clip, generator = torch.randn(1, 3, 8, 64, 64), torch.Generator().manual_seed(0)
    visible, masked = masking.split(masking.tube_mask(model.grid, 0.75, generator))
    kept = masking.running_cells(masked, model.grid, 0.5, generator)
    some, all_of_them = model(clip, visible[None], kept[None]), model(clip, visible[None], masked[None])
    assert some.shape == (1, 24, 1536) and all_of_them.shape == (1, 48, 1536)
    order = torch.randperm(24, generator=generator)
    assert torch.allclose(model(clip, visible[None], kept[order][None]), some[:, order], atol=1e-5)
    tokens = torch.cat(
        [
            model.encoder_to_decoder(model.encoder(clip, visible[None])) + model.pos_embed[visible],
            model.mask_token + model.pos_embed[kept],
        ],
        dim=1,
    )
    assert tokens.shape[1] == 16 + 24 and torch.equal(model.decoder(tokens, 24), some)
    assert not torch.allclose(some, all_of_them[:, torch.isin(masked, kept)], atol=1e-5)  # fewer tokens to attend to


def test_samples_of_the_default_are_those_without_the_key(toy_videos):
    def clips(**options):
        defaults = dict(frames=8, stride=2, size=64, scales=[1.0, 0.75], flip=True, seed=0)
        draw_mask = partial(masking.tube_mask, (4, 4, 4), 0.75)
        return data.PretrainingClips(list_videos(str(toy_videos), "train"), **defaults, draw_mask=draw_mask, **options)

    cells = partial(masking.running_cells, grid=(4, 4, 4))
    before, default = clips(), clips(choose_reconstructed=partial(cells, ratio=0.0))
    half = clips(choose_reconstructed=partial(cells, ratio=0.5))
    for index in range(4):
        assert all(map(torch.equal, before[3, index][:3], default[3, index][:3]))
        clip, visible, masked, _ = before[3, index]
        clip_of_half, visible_of_half, kept, _ = half[3, index]
        assert torch.equal(clip, clip_of_half) and torch.equal(visible, visible_of_half)  # only the targets are fewer
        assert len(kept) == 24 and torch.isin(kept, masked).all()
        assert torch.equal(kept, half[3, index][2]) and not torch.equal(kept, half[4, index][2])


def test_a_run_with_half_the_decoder_draws_all_masked_cubes(finished, settings, tmp_path):
    more = ["mask.decoder_ratio=0.5", f"run.folder={tmp_path}"]
    done = run("pretrain.py", *settings["pretrain"], *more)
    assert "tube mask: 48 of 64 cubes masked, 16 visible, 24 reconstructed" in done.stderr
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] and losses(tmp_path) != losses(finished("pretrain"))
    half, default = (size_of(next((f / "pictures").glob("*.png"))) for f in (tmp_path, finished("pretrain")))
    assert half == default
    done = run("pretrain.py", *settings["pretrain"], f"run.folder={tmp_path}", "mask.decoder_ratio=0", ok=False)
    assert "mask.decoder_ratio=0.5, not 0" in done.stderr


@pytest.mark.parametrize(
    "ratio, sentence", [(1, "at most 0.9999"), (-0.5, "at least 0"), (0.99, "leaves none of 48 masked cubes")]
)
def test_a_decoder_without_cubes_ends_in_a_sentence(ratio, sentence, settings, tmp_path):
    done = run("pretrain.py", *settings["pretrain"], f"mask.decoder_ratio={ratio}", f"run.folder={tmp_path}", ok=False)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


# ---- whole runs ----


def test_a_run_says_its_mask_learns_and_draws(finished):
    folder = finished("pretrain")
    said = (folder / "said.txt").read_text()
    assert "24 videos; clips of 8 frames, 2 apart, 64 x 64 pixels" in said
    assert "tube mask: 48 of 64 cubes masked, 16 visible" in said and re.search(r"ViT-tiny, [\d,]+ parameters", said)
    assert losses(folder)[-1] < losses(folder)[0] and len(log(folder)) == 9
    pictures = sorted((folder / "pictures").iterdir())
    assert [path.name for path in pictures] == ["00000.mp4", "00000.png"] and len(Video(pictures[0])) == 8


def test_a_set_without_a_usable_video_ends_in_a_sentence(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.mkv"):
        (tmp_path / "videos" / name).write_bytes(b"nothing")
    done = run("pretrain.py", f"data.root={tmp_path / 'videos'}", f"run.folder={tmp_path / 'run'}", ok=False)
    assert done.returncode == 1 and "100 videos in a row could not be read" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_is_named(settings, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    more = [f"data.val={tmp_path}", "optim.epochs=1", f"run.folder={tmp_path / 'run'}", "data.workers=0"]
    done = run("pretrain.py", *settings["pretrain"], *more)
    assert f"no picture of {tmp_path / 'broken.mp4'}: " in done.stderr and "steps done" in done.stderr


VARIANTS = [  # of Table 1, and sizes
    ["mask.type=random", "mask.ratio=0.9"],
    ["mask.type=frame", "mask.ratio=0.875"],
    ["mask.type=random", "mask.decoder_ratio=0.6", "target.frames=center"],
    ["target.frames=double"],
    ["target.frames=center", "mask.type=random"],
    ["target.frames=center", "mask.type=frame", "mask.ratio=0.875"],
    [
        "target.normalize=false",
        "target.loss=l1",
        "data.frames=32",
        "data.size=96",
        "data.flip=true",
        "data.scales=[1,0.75]",
    ],
    ["target.loss=smooth_l1", "model.decoder_depth=1", "model.cube=[4,16,16]", "run.precision=bf16"],
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: ",".join(variant))
def test_everything_that_the_paper_varies_runs(variant, settings, tmp_path):
    more = ["data.workers=0", "optim.epochs=1", f"run.folder={tmp_path}"]
    run("pretrain.py", *settings["pretrain"], *more, *variant)
    assert len(losses(tmp_path)) == 3 and len(list((tmp_path / "pictures").iterdir())) == 2


# ---- reconstructions ----


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_reconstruct_own_video_with_own_and_official_weights(finished, tmp_path):
    video, own = write_numbered(tmp_path / "mine.mp4", 40), finished("pretrain") / "checkpoint.pt"
    ratios = ["--ratios", 0.5, 0.75, "mask.type=random"]
    run("pretrain.py", "--reconstruct", video, "--weights", own, "--out", tmp_path / "own", *ratios)
    one = size_of(tmp_path / "own/mine.png")
    assert len(Video(tmp_path / "own/mine.mp4")) == 8
    run("pretrain.py", "--reconstruct", video, "--weights", own, "--out", tmp_path / "one")
    assert one[0] >= 8 * 64 and one[1] / 7 == pytest.approx(size_of(tmp_path / "one/mine.png")[1] / 4, rel=0.05)  # rows

    torch.manual_seed(0)
    official = m.VideoMAE(**m.SIZES["S"], decoder_depth=1)
    torch.save({"model": official.state_dict()}, tmp_path / "official.pth")
    run("pretrain.py", "--reconstruct", video, "--weights", tmp_path / "official.pth", "--out", tmp_path / "official")
    width, height = size_of(tmp_path / "official/mine.png")
    assert width >= 8 * 224 and height >= 4 * 224 and len(Video(tmp_path / "official/mine.mp4")) == 16

    none = tmp_path / "none.mp4"
    done = run("pretrain.py", "--reconstruct", none, video, "--weights", own, "--out", tmp_path / "two", ok=False)
    assert f"no picture of {none}" in done.stderr and "1 of 2 videos cannot be read; see above" in done.stderr
    assert done.returncode == 1 and (tmp_path / "two/mine.png").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--reconstruct", "a.mp4"], "--reconstruct needs --weights FILE"),
        (["--weights", "x.pt"], "--weights goes with --reconstruct"),
        (["--reconstruct", "a.mp4", "--weights", "none.pt"], "no weights at none.pt"),
        (
            ["--reconstruct", "a.mp4", "--weights", "OWN", "data.size=96"],
            "leave data.frames, data.size and target.frames",
        ),
        (
            ["--reconstruct", "a.mp4", "--weights", "OWN", "target.frames=double"],
            "another target than target.frames=double",
        ),
        (["--reconstruct", "a.mp4", "--weights", "FINETUNED"], "is not a pre-training checkpoint"),
    ],
)
def test_mistakes_in_reconstructing_end_in_a_sentence(arguments, sentence, finished):
    places = {"OWN": finished("pretrain") / "checkpoint.pt", "FINETUNED": finished("finetune") / "checkpoint.pt"}
    done = run("pretrain.py", *(places.get(word, word) for word in arguments), ok=False)
    assert done.returncode == 1 and sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_perfect_prediction_gives_the_original_back(toy_videos):
    """With the masked cubes' own statistics; with estimated ones nothing of the masked cubes is used."""
    objective = pretrain.Objective(configured("data.frames=16", "model.cube=[2,16,16]"))
    frames = read_frames(list_videos(str(toy_videos), "val")[0], list(range(16)))
    mask = masking.tube_mask((8, 4, 4), 0.75, torch.Generator().manual_seed(0))
    _, masked = masking.split(mask)
    cubes = pretrain.to_cubes(frames[None] / 255, (2, 16, 16))[0, masked]
    mean, std = pretrain.cube_statistics(cubes)

    class Oracle(m.VideoMAE):
        def forward(self, clip, visible, masked):
            return ((cubes - mean) / std).flatten(1)[None]

    oracle = Oracle(**m.SIZES["tiny"], decoder_depth=1, clip_size=(16, 64, 64))
    views = pretrain.reconstruct(oracle, objective, frames, mask)
    names = list(views)
    assert names[:2] == ["original", "masked"]
    assert "estimated from visible" in names[2] and "taken from the original" in names[3]
    assert torch.equal(views["original"], frames)
    assert (views[names[3]].int() - frames.int()).abs().max() <= 1
    pixels = mask.view(8, 4, 4).repeat_interleave(2, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)
    pixels = pixels[:, None].expand_as(frames)
    assert (views["masked"][pixels] == 128).all() and torch.equal(views["masked"][~pixels], frames[~pixels])
    other = pretrain.reconstruct(oracle, objective, torch.where(pixels, 255 - frames, frames), mask)
    assert torch.equal(other[names[2]], views[names[2]])


def test_an_exported_run_opens_in_transformers(finished, tmp_path):
    import transformers

    done = run("support.weights", finished("pretrain") / "checkpoint.pt", tmp_path / "exported")
    assert "from_pretrained" in done.stdout
    kind = transformers.VideoMAEForPreTraining
    theirs, report = kind.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.config.num_frames == 8
    processor = json.loads((tmp_path / "exported/preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
