"""Action detection: clips by time and their boxes, the detector, its loss, tests and predictions."""

import colorsys
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from conftest import number_of, numbered_frame, run, write_numbered
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import data
import detect_ava
import model as m
import support.video
import support.weights
from support import ava as files
from support import toy
from support.config import UserError, as_dict, load_config
from support.run import Run
from support.seeds import random_below
from support.video import BrokenVideo

NO_PERSONS = torch.zeros(0, 12)  # labels
TINY = dict(width=32, depth=2, heads=2, clip_size=(4, 32, 32), cube=(2, 16, 16))


def configured(*settings: str) -> SimpleNamespace:
    return load_config(detect_ava.DEFAULT, ["run.precision=float32", "run.compile=never", *settings])


@pytest.fixture(scope="module")
def ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.render_ava(tmp_path_factory.mktemp("toy_ava") / "videos", {"train": 6, "val": 3})


# ---- clips by time ----

OPEN_GOP = {"x264-params": "keyint=25:min-keyint=25:bframes=3:open-gop=1:scenecut=0"}
OFFSETS = [4 * i - 32 for i in range(16)]  # of 16 frames, 4 apart, at 30 a second
OFFSETS_AT_25 = [-27, -23, -20, -17, -13, -10, -7, -3, 0, 3, 7, 10, 13, 17, 20, 23]  # the nearest
LENGTH = 12  # seconds


def times(rate: int, begin: int = 0) -> list[int]:
    return [round(1000 * (begin + i / rate)) for i in range(LENGTH * rate)]


def tenths(count: int) -> list[int]:
    return [100 * number for number in range(count)]


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Movies whose frames show their numbers: at 25 and 30 fps, cut at second 900 and whole, in mp4 and Matroska."""
    folder = tmp_path_factory.mktemp("movies")
    for rate in (25, 30):
        for suffix in ("mp4", "mkv"):
            write_numbered(folder / f"cut{rate}.{suffix}", LENGTH * rate, options=OPEN_GOP, times=times(rate))
        whole = [0, *times(rate, begin=898)]  # one frame for the first 898 seconds
        write_numbered(folder / f"whole{rate}.mp4", len(whole), options=OPEN_GOP, times=whole)
    write_numbered(folder / "one_key_frame.mp4", LENGTH * 30, options={"g": "1000", "bf": "7"}, times=times(30))
    write_numbered(folder / "all_key_frames.mp4", LENGTH * 30, options={"g": "1"}, times=times(30))
    write_numbered(folder / "late_start.mkv", LENGTH * 30, options=OPEN_GOP, times=times(30, begin=5))
    return folder


def clip_of(
    path: Path, second: int, frames: int = 16, stride: int = 4, rate: float = 30.0, starts_at: int = 900
) -> list:
    options = SimpleNamespace(frames=frames, stride=stride, rate=rate, starts_at=starts_at)
    clip = detect_ava.read_clip(path, second, options)
    assert clip.dtype == torch.uint8 and clip.shape[:2] == (frames, 3)
    return [number_of(frame) for frame in clip]


def test_the_nearest_frame_is_taken_the_earlier_of_two():
    times = [Fraction(number, 25) for number in range(50)]
    assert [detect_ava.nearest(times, Fraction(time)) for time in ("-1", "0.019", "0.02", "0.021", "1.5", "9")] == [
        0,
        0,
        0,
        1,
        37,
        49,
    ]


@pytest.mark.parametrize(
    "name", ["cut30.mp4", "cut30.mkv", "one_key_frame.mp4", "all_key_frames.mp4", "late_start.mkv"]
)
def test_clips_of_a_cut_movie_at_30_fps(movies, name):
    for second in range(900, 912):  # at both ends the first and the last frame stand in
        assert clip_of(movies / name, second) == [
            min(max((second - 900) * 30 + offset, 0), LENGTH * 30 - 1) for offset in OFFSETS
        ]


@pytest.mark.parametrize("name", ["cut25.mp4", "cut25.mkv"])
def test_clips_of_a_cut_movie_at_25_fps_show_the_same_times(movies, name):
    for second in range(900, 912):
        assert clip_of(movies / name, second) == [
            min(max((second - 900) * 25 + offset, 0), LENGTH * 25 - 1) for offset in OFFSETS_AT_25
        ]


@pytest.mark.parametrize(("rate", "offsets"), [(25, OFFSETS_AT_25), (30, OFFSETS)])
def test_clips_of_a_whole_movie(movies, rate, offsets):
    for second in range(900, 910):
        expected = [min(1 + (second - 898) * rate + offset, LENGTH * rate) for offset in offsets]
        assert clip_of(movies / f"whole{rate}.mp4", second, starts_at=0) == expected
    assert clip_of(movies / f"whole{rate}.mp4", 1, starts_at=0) == [0] * 16  # the first frame is shown for 898 seconds
    assert clip_of(movies / f"cut{rate}.mp4", 0, starts_at=0) == [max(offset, 0) for offset in offsets]


def test_a_second_outside_the_movie_is_refused(movies):
    for name, second, starts_at in (
        ("cut30.mp4", 899, 900),
        ("cut30.mp4", 914, 900),
        ("cut25.mkv", 1798, 900),
        ("cut30.mp4", 902, 0),
    ):
        with pytest.raises(BrokenVideo, match=f"{name}.*second {second} lies outside.*is the movie cut or whole"):
            clip_of(movies / name, second, starts_at=starts_at)


def test_key_frames_at_fractions_of_a_second(movies, tmp_path):
    """As AVA-Kinetics has them. What the digits say is exact: a tenth of a second is three frames."""
    for second, key in ((905.5, 165), (905.1, 153), (905.016, 150), (905.017, 151)):
        assert clip_of(movies / "cut30.mp4", second)[8] == key
        assert clip_of(movies / "cut30.mp4", second, frames=8, stride=30)[3:6] == [key - 30, key, key + 30]
    with pytest.raises(BrokenVideo, match="second 912.75 lies outside"):
        clip_of(movies / "cut30.mp4", 912.75)
    write_numbered(tmp_path / "film.mp4", 10, times=tenths(10))
    assert clip_of(tmp_path / "film.mp4", 900.35)[8] == 3  # the earlier of two; as a float it lies behind the middle


def test_only_packets_near_the_key_frame_are_read(movies, monkeypatch):
    read, packets = [], support.video._packets

    def recorded(*arguments):
        for packet in packets(*arguments):
            read.append(packet.pts * packet.time_base)
            yield packet

    monkeypatch.setattr(support.video, "_packets", recorded)
    for name in ("cut30.mp4", "cut30.mkv"):
        read.clear()
        assert clip_of(movies / name, 906)[8] == 180
        # From 6 - 32/30 s to 6 + 28/30 s; from the key frame before, one in 25 frames, or from the one before that.
        assert min(read) > 3 and max(read) < 7.3


def test_broken_movies_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    write_numbered(tmp_path / "old.avi", 40, "mpeg4", {"bf": "2"})
    for name, reason in (("text.mp4", "."), ("none.mp4", "No such file"), ("old.avi", "only mp4 and Matroska")):
        with pytest.raises(BrokenVideo, match=f"{name}.*{reason}"):
            clip_of(tmp_path / name, 900)


def test_clips_from_a_folder_of_frames(tmp_path):
    folder = tmp_path / "movie"
    folder.mkdir()
    for number in range(100):
        frame = torch.from_numpy(numbered_frame(number).to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous()
        TF.to_pil_image(frame).save(folder / f"movie_{number + 1:06d}.jpg", quality=95)
    assert clip_of(folder, 902) == [60 + offset for offset in OFFSETS]
    assert clip_of(folder, 900) == [max(offset, 0) for offset in OFFSETS]
    assert clip_of(folder, 903) == [min(90 + offset, 99) for offset in OFFSETS]
    assert clip_of(folder, 902, frames=8, stride=2, rate=12.0) == [40, 45, 50, 55, 60, 65, 70, 75]
    for second in (899, 904):
        with pytest.raises(BrokenVideo, match="lies outside"):
            clip_of(folder, second)
    (folder / "movie_000057.jpg").unlink()
    with pytest.raises(BrokenVideo, match="movie_000057.jpg"):
        clip_of(folder, 902)


# ---- boxes ----


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Movies, folders of frames, whose red is the place from left to right and whose green that from top to bottom."""
    folder, movies = tmp_path_factory.mktemp("coded"), {}
    for height, width in ((180, 321), (321, 180), (97, 100), (64, 64)):
        movies[f"{height}x{width}"] = folder / f"{height}x{width}"
        movies[f"{height}x{width}"].mkdir()
        red = (torch.arange(width) + 0.5).expand(height, -1) / width
        green = (torch.arange(height)[:, None] + 0.5).expand(-1, width) / height
        picture = (torch.stack([red, green, torch.full_like(red, 0.5)]) * 255).round().byte()
        for number in range(1, 9):
            path = folder / f"{height}x{width}" / f"{height}x{width}_{number:06d}.jpg"
            TF.to_pil_image(picture).save(path, quality=100, subsampling=0)
    return movies


def place_at(clip: torch.Tensor, x: float, y: float) -> list[float]:
    """The place, in fractions of the coded frame, that the color at (x, y) in pixels of a clip (T, 3, H, W) tells."""
    height, width = clip.shape[-2:]
    grid = torch.tensor([[[[2 * x / width - 1, 2 * y / height - 1]]]])
    sampled = nn.functional.grid_sample(clip[-1:].float() / 255, grid, padding_mode="border", align_corners=False)
    return sampled[0, :2, 0, 0].tolist()


AT_30 = ["data.rate=30", "data.starts_at=902"]
BOXES = [(0.4, 0.42, 0.55, 0.61), (0.45, 0.4, 0.6, 0.5)]


@pytest.mark.parametrize(("movie", "short"), [("180x321", 128), ("321x180", 128), ("97x100", 256), ("64x64", 64)])
@pytest.mark.parametrize("flip", [False, True])
def test_the_pixel_under_a_corner_stays_under_it(coded, movie, short, flip):
    """Through resizing, random crops and flips."""
    size, checked = int(0.9 * short), 0
    config = configured(f"data.short_side={short}", f"data.size={size}", f"data.flip={flip}", *AT_30)
    rows = [files.Row((movie, 902), box, action, 1.0) for action, box in enumerate(BOXES, 1)]
    clips = detect_ava.KeyFrameClips([((movie, 902), rows)], 0, movies=coded, options=config.data)
    flipped = 0
    for epoch in range(6):
        clip, boxes, labels, broken = clips[epoch, 0]
        assert clip.shape == (8, 3, size, size) and not broken and labels.argmax(dim=1).tolist() == [0, 1]
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        mirrored = place_at(clip, 1, 5)[0] > place_at(clip, size - 1, 5)[0]
        flipped += mirrored
        for box, (x1, y1, x2, y2) in zip(boxes.tolist(), BOXES, strict=True):
            left, right = (x2, x1) if mirrored else (x1, x2)
            for corner, place in ((box[:2], (left, y1)), (box[2:], (right, y2))):
                for edge, seen, wanted in zip(corner, place_at(clip, *corner), place, strict=True):
                    assert seen == pytest.approx(wanted, abs=0.006) or edge in (0, size)  # clamped
                    checked += 0 < edge < size
    assert checked > 24
    assert 0 < flipped < 6 if flip else flipped == 0
    options = SimpleNamespace(**vars(config.data) | dict(widen_boxes=False))
    scores, clip, rois, broken = detect_ava.test_batch([((movie, 902), rows)], coded, options)
    assert min(clip.shape[-2:]) == short and len(scores) == 2 and not broken
    for box, place in zip(rois[:, 1:].tolist(), sorted(BOXES), strict=True):
        assert place_at(clip[0], box[0], box[1]) == pytest.approx(place[:2], abs=0.006)
        assert place_at(clip[0], box[2], box[3]) == pytest.approx(place[2:], abs=0.006)


def test_frames_are_resized_without_antialiasing(coded):
    row = files.Row(("321x180", 902), (0.0, 0.0, 1.0, 1.0), 1, 1.0)
    options = configured("data.short_side=60", *AT_30).data
    clip, _, _ = detect_ava.resized_clip(row.frame, [row], coded, options)
    frames = detect_ava.read_clip(coded["321x180"], 902, options).float()
    wanted = nn.functional.interpolate(frames, (107, 60), mode="bilinear", align_corners=False)
    assert clip.shape == (8, 3, 107, 60) and (clip.float() - wanted).abs().max() <= 1


def test_boxes_are_clamped_to_the_crop_and_lost_ones_stay_without_area(coded):
    config = configured("data.short_side=64", "data.size=16", "data.rate=30", "data.starts_at=902")
    corners = [(0.0, 0.0, 0.05, 0.05), (0.0, 0.0, 1.0, 1.0), (0.95, 0.95, 1.0, 1.0)]
    rows = [files.Row(("64x64", 902), box, 1, 1.0) for box in corners]
    clips = detect_ava.KeyFrameClips([(("64x64", 902), rows)], 0, movies=coded, options=config.data)
    for epoch in range(8):
        clip, boxes, labels, _ = clips[epoch, 0]
        assert boxes[1].tolist() == [0, 0, 16, 16] and labels.shape == (3, 12)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        assert boxes.min() >= 0 and boxes.max() <= 16 and 0 in area.tolist()


def in_pixels(*boxes: list[float]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(torch.tensor(boxes).reshape(-1, 4), format="XYXY", canvas_size=(500, 500))


def test_jitter_stays_in_its_bounds_and_fills_them():
    boxes = in_pixels(*[[100.0, 200.0, 200.0, 400.0]] * 4000)  # 100 wide, 200 high
    moved = detect_ava.jitter_boxes(boxes, torch.Generator().manual_seed(0)) - boxes
    bounds = torch.tensor([[-20.0, -20, -10, -10], [10, 10, 20, 20]])
    assert torch.allclose(torch.stack([moved.amin(dim=0), moved.amax(dim=0)]), bounds, atol=0.2)
    assert (moved >= bounds[0] - 1e-4).all() and (moved <= bounds[1] + 1e-4).all()
    assert torch.corrcoef(moved.T).fill_diagonal_(0).abs().max() < 0.06  # each edge on its own


def test_boxes_are_widened_for_pooling_alone(coded):
    config = configured("data.short_side=64", "data.rate=30", "data.starts_at=902", "data.widen_boxes=true")
    rows = [files.Row(("64x64", 902), box, 0, 0.9) for box in ((0.25, 0.25, 0.5, 0.75), (0.5, 0.0, 1.0, 1.0))]
    scores, _, rois, _ = detect_ava.test_batch([(("64x64", 902), rows)], coded, config.data)
    wanted = torch.tensor([[15.2, 15.2, 32.8, 48.8], [30.4, 0, 64, 64]])  # 10 % and 5 % more; cut off at the edge
    assert torch.allclose(rois[:, 1:], wanted) and list(scores) == [row[:2] for row in rows]


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
    boxes = torch.tensor(
        [[0, 0, 64, 48], [3, 5, 4, 7], [10, 0, 11, 48], [50, 10, 64, 20], [0, 0, 0, 0], [20, 20, 37.5, 41.3]]
    )
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
    clip, boxes = (
        torch.randn(2, 3, 4, 32, 48),
        [torch.tensor([[0.0, 0, 20, 30], [5, 5, 45, 25]]), torch.tensor([[0.0, 0, 20, 30]])],
    )
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
    groups = m.parameter_groups(detector, 0.05, 0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in detector.parameters()}
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    named = {name: scale[id(parameter)] for name, parameter in detector.named_parameters()}
    assert named["encoder.patch_embed.proj.weight"] == 0.5**3 and named["encoder.blocks.0.attn.q_bias"] == 0.5**2
    assert named["encoder.blocks.1.mlp.fc1.weight"] == 0.5 and named["encoder.norm.weight"] == named["head.bias"] == 1


# ---- weights from elsewhere ----


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_weights_of_the_official_action_detection_repository(tmp_path):
    sizes = {name: m.SIZES["tiny"][name] for name in ("width", "depth", "heads")}
    ours = randomized(detect_ava.ActionDetector(**sizes, classes=80, clip_size=(4, 32, 32))).eval()
    clip, rois = torch.randn(1, 3, 4, 32, 48), torch.tensor([[0.0, 3, 3, 40, 30]])
    for head in ("head", "roi_heads.action.predictor.cls_score"):
        names = {
            key: key.replace("encoder.", "backbone.", 1) if key.startswith("encoder.") else key.replace("head", head, 1)
            for key in ours.state_dict()
        }
        torch.save(
            {"module": {names[key]: value for key, value in ours.state_dict().items()}}, tmp_path / "official.pth"
        )
        theirs = support.weights.build_from_checkpoint(
            tmp_path / "official.pth", detect_ava.ActionDetector, (4, 32, 32)
        ).eval()
        assert torch.equal(theirs(clip, rois), ours(clip, rois))


@pytest.mark.parametrize(
    "naming", ["own pre-training", "own fine-tuning", "official fine-tuning", "Hugging Face pre-training"]
)
def test_training_starts_from_weights_of_every_stage(tmp_path, capfd, naming):
    sizes = m.SIZES["tiny"]
    if "pre-training" in naming:
        source = m.VideoMAE(**sizes, decoder_depth=1, clip_size=(8, 64, 64))
    else:
        source = m.VideoClassifier(
            **{name: sizes[name] for name in ("width", "depth", "heads")}, classes=7, clip_size=(8, 64, 64)
        )
    state = randomized(source).state_dict()
    if naming.startswith("own"):
        content = dict(model=state, model_options=source.options)
    elif naming == "official fine-tuning":
        content = {"module": {key.replace("encoder.", ""): value for key, value in state.items()}}
    else:
        content = support.weights.to_hugging_face(state)
    torch.save(content, tmp_path / "weights.pt")
    detector = detect_ava.build(configured(f"init={tmp_path / 'weights.pt'}"), str(tmp_path / "weights.pt"), NO_PERSONS)
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
        support.weights.build_from_checkpoint(tmp_path / "classifier.pt", detect_ava.ActionDetector, (4, 32, 32))


def test_the_head_starts_at_the_frequencies_of_the_actions():
    labels = torch.zeros(199, 12)
    labels[:49, 3], labels[:, 4] = 1, 1  # one quarter, all; the others never
    detector = detect_ava.build(configured("init=scratch"), "scratch", labels)
    frequencies = detector.head.bias.detach().sigmoid()
    assert (
        frequencies[3] == pytest.approx(49.5 / 200)
        and frequencies[4] == pytest.approx(0.9975)
        and frequencies[0] == pytest.approx(0.0025)
    )


def test_the_first_logits_are_nearly_those_of_the_frequencies():
    detector = detect_ava.build(configured("init=scratch", "model.size=S"), "scratch", torch.zeros(10, 12)).eval()
    rois = torch.tensor([[0.0, 3, 3, 40, 30], [0.0, 20, 10, 60, 60], [1.0, 0, 0, 64, 64]])
    spread = detector(torch.randn(2, 3, 8, 64, 64), rois) - detector.head.bias
    assert 1e-5 < spread.std() < 2e-3  # about 0.3 without the authors' factor of 0.001


# ---- training clips ----


def test_training_clips_and_their_boxes(ava):
    config = configured(f"data.root={ava}", "data.flip=true", "data.jitter_boxes=true", "data.jitter_colours=true")
    frames, movies = detect_ava.find_training(config.data, ava)
    assert {video for video, _ in frames} <= movies.keys()
    assert not frames.keys() & files.read_exclusions(ava / config.data.train_exclude)
    clips = detect_ava.KeyFrameClips(list(frames.items()), 0, movies=movies, options=config.data)
    samples = [clips[0, index] for index in range(4)]
    clip, rois, labels, broken = detect_ava.collate(samples)
    assert clip.shape == (4, 8, 3, 64, 64) and clip.dtype == torch.uint8 and not broken
    wanted = [files.to_persons(rows, 12)[1] for rows in list(frames.values())[:4]]
    assert rois[:, 0].tolist() == [float(place) for place, of_frame in enumerate(wanted) for _ in of_frame]
    assert torch.equal(labels, torch.cat(wanted)) and labels.shape[1] == 12
    assert (rois[:, 1:] >= 0).all() and (rois[:, 1:] <= 64).all() and (rois[:, 1:3] <= rois[:, 3:]).all()
    again, other = clips[0, 2], clips[1, 2]
    assert torch.equal(again[0], samples[2][0]) and torch.equal(again[1], samples[2][1])
    assert not torch.equal(other[0], samples[2][0])


def test_color_jitter_moves_hue_saturation_and_value_by_whole_steps():
    """Against Python's own conversion. Gray has the hue 0, red, which more saturation shows."""
    frames = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames[0, :, 0, 0], frames[0, :, 0, 1] = 77, 0
    for seed in range(5):
        jittered = detect_ava.jitter_colors(frames, torch.Generator().manual_seed(seed))
        assert jittered.dtype == torch.uint8 and jittered.shape == frames.shape
        generator = torch.Generator().manual_seed(seed)
        hue, saturation, value = (random_below(2 * most + 1, generator) - most for most in (10, 26, 26))
        for t, y, x in ((t, y, x) for t in range(2) for y in range(4) for x in range(5)):
            h, s, v = colorsys.rgb_to_hsv(*(frames[t, :, y, x] / 255).tolist())
            s, v = (min(max(a, 0), 1) for a in (s + saturation / 255, v + value / 255))
            wanted = 255 * torch.tensor(colorsys.hsv_to_rgb((h + hue / 180) % 1, s, v))
            assert (jittered[t, :, y, x] - wanted).abs().max() < 9  # PIL has whole numbers


def test_color_jitter_fills_its_bounds():
    frame, shifts = torch.tensor([200, 100, 100], dtype=torch.uint8).view(1, 3, 1, 1), []
    for seed in range(1500):
        jittered = detect_ava.jitter_colors(frame, torch.Generator().manual_seed(seed))
        shifts.append(colorsys.rgb_to_hsv(*jittered.flatten().tolist()))
    hue, saturation, value = torch.tensor(shifts).unbind(dim=1)
    hue = (hue + 0.5) % 1 - 0.5
    assert hue.min() * 180 == pytest.approx(-10, abs=1.2) and hue.max() * 180 == pytest.approx(10, abs=1.2)
    assert (saturation - 0.5).abs().max() * 255 == pytest.approx(26, abs=2.5)
    assert (value.min(), value.max()) == (174, 226)


def test_boxes_are_jittered_after_the_crop(coded):
    """As in the authors' code: what is left of a box inside the crop is jittered, and stays inside."""
    config = configured("data.short_side=64", "data.size=16", "data.jitter_boxes=true", *AT_30)
    frame = ("64x64", 902)
    whole = [files.Row(frame, (0.0, 0.0, 1.0, 1.0), 1, 1.0)]
    clips = detect_ava.KeyFrameClips([(frame, whole)], 0, movies=coded, options=config.data)
    boxes = torch.cat([clips[epoch, 0][1] for epoch in range(200)])
    assert boxes.min() == 0 and boxes.max() == 16  # moved outward, clamped
    inward = torch.tensor([1.6, 0.8, 14.4, 15.2])  # by up to 0.1 of a width, 0.05 of a height of 16
    assert (boxes[:, :2] <= inward[:2] + 1e-4).all() and (boxes[:, 2:] >= inward[2:] - 1e-4).all()
    assert boxes[:, :2].amax(dim=0).tolist() == pytest.approx([1.6, 0.8], abs=0.1)


def test_statistics_are_a_key():
    clip = torch.randint(0, 256, (1, 2, 3, 4, 4), dtype=torch.uint8)
    wanted = (clip.float() / 255 - 0.4) / 0.225
    assert torch.allclose(data.normalize(clip, [0.4] * 3, [0.225] * 3), wanted.transpose(1, 2), atol=1e-5)
    assert not torch.allclose(data.normalize(clip), wanted.transpose(1, 2), atol=1e-1)


# ---- test ----


def detections(config: SimpleNamespace, detector: nn.Module, ava: Path) -> dict[tuple, dict[int, float]]:
    """Each person's probabilities by action, as `detect` finds them in the validation set."""
    test_set = detect_ava.find_test(config.data, ava)
    rows, broken = detect_ava.detect(
        detector, test_set.persons, test_set.movies, Run(config, detect_ava.DEFAULT), "test"
    )
    assert not broken and rows == sorted(rows)
    found = {}
    for row in rows:
        found.setdefault(row[:2], {})[row.action] = row.score
    assert list(found) == [row[:2] for rows in test_set.persons.values() for row in rows]  # every person, where it was
    return found


def alike(one: dict[tuple, dict[int, float]], other: dict[tuple, dict[int, float]], scale: dict | None = None) -> bool:
    scale = scale or dict.fromkeys(one, 1.0)
    return all(other[key] == pytest.approx({a: p * scale[key] for a, p in one[key].items()}, abs=1e-5) for key in one)


def test_detections_do_not_depend_on_batches(ava):
    config = configured(f"data.root={ava}", "data.workers=0", "run.batch_per_device=1")
    detector = randomized(detect_ava.build(configured("init=scratch"), "scratch", NO_PERSONS))
    alone = detections(config, detector, ava)
    assert all(list(of_person) == list(range(1, 13)) for of_person in alone.values())
    config.run.batch_per_device = 3
    assert alike(alone, detections(config, detector, ava))
    persons = detect_ava.find_test(config.data, ava).persons
    scores = {row[:2]: row.score for rows in persons.values() for row in rows}
    assert min(scores.values()) >= 0.8
    config.data.person_score = True
    assert alike(alone, detections(config, detector, ava), scores)
    config.data.person_score, config.data.widen_boxes = False, True
    wider = detections(config, detector, ava)  # pools from wider boxes, writes the original ones
    assert wider.keys() == alone.keys() and not alike(alone, wider)


def test_frames_are_padded_right_and_below_to_whole_cubes(coded):
    class Recorder(nn.Module):
        options = dict(cube=[2, 16, 32])

        def forward(self, clip: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
            self.seen = clip, rois
            return torch.zeros(len(rois), 12)

    recorder, config = Recorder(), configured("data.short_side=100", "data.workers=0", *AT_30)
    row = files.Row(("97x100", 902), (0.0, 0.0, 1.0, 1.0), 0, 0.9)
    one_run = Run(config, detect_ava.DEFAULT)
    rows, _ = detect_ava.detect(recorder, {row.frame: [row]}, coded, one_run, "test")
    clip, rois = recorder.seen
    assert clip.shape == (1, 3, 8, 112, 128) and rois[0].tolist() == pytest.approx([0, 0, 0, 103, 100])
    assert (
        not clip[..., 100:, :].any() and not clip[..., 103:].any() and (clip[..., :100, :103] != 0).float().mean() > 0.9
    )
    assert [found.score for found in rows] == [0.5] * 12


def test_a_batch_holds_key_frames_of_one_movie(ava, monkeypatch):
    """Movies may have different sizes, which no batch could hold together."""
    seen = []
    really_read = detect_ava.test_batch

    def reading(key_frames: list[tuple], **options) -> tuple:
        seen.append([frame for frame, _ in key_frames])
        return really_read(key_frames, **options)

    monkeypatch.setattr(detect_ava, "test_batch", reading)
    config = configured(f"data.root={ava}", "data.workers=0", "run.batch_per_device=2")
    detections(config, detect_ava.build(configured("init=scratch"), "scratch", NO_PERSONS), ava)
    assert sum(seen, []) == list(detect_ava.find_test(config.data, ava).persons)
    assert all(len({video for video, _ in batch}) == 1 and len(batch) <= 2 for batch in seen)
    assert max(map(len, seen)) == 2


def test_missing_and_broken_movies_are_named_and_their_ground_truth_counts(ava, tmp_path, capfd):
    folder = tmp_path / "ava"
    shutil.copytree(ava, folder)
    (folder / "videos/train_00001.mp4").unlink()
    (folder / "videos/val_00000.mp4").unlink()
    (folder / "videos/val_00001.mp4").write_bytes((ava / "videos/val_00001.mp4").read_bytes()[:500])
    config = configured(f"data.root={folder}", "data.workers=0", "run.pictures=0")
    frames, _ = detect_ava.find_training(config.data, folder)
    assert "1 of 6 movies for training" in (said := capfd.readouterr().err)
    assert said.rstrip().endswith("left out: train_00001")
    assert not any(video == "train_00001" for video, _ in frames) and len(frames) > 10

    test_set = detect_ava.find_test(config.data, folder)
    detector, one_run = (
        detect_ava.build(configured("init=scratch"), "scratch", NO_PERSONS),
        Run(config, detect_ava.DEFAULT),
    )
    detect_ava.test(detector, test_set, one_run, "test", tmp_path / "out")
    said = capfd.readouterr().err
    assert said.count("no detections: ") == 2 and "movie val_00000 is missing" in said and "val_00001.mp4" in said
    found = files.read_detections(tmp_path / "out/detections.csv", 12)
    assert {row.frame[0] for row in found} == {"val_00002"}
    assert {row.frame[0] for row in test_set.ground_truth} == {"val_00000", "val_00001", "val_00002"}

    (folder / "videos/val_00002.mp4").unlink()
    with pytest.raises(UserError, match="none of the .* key frames with persons can be read"):
        detect_ava.test(detector, test_set, one_run, "test")
    for path in folder.glob("videos/train_*.mp4"):
        path.unlink()
    with pytest.raises(UserError, match="has none of the movies"):
        detect_ava.find_training(config.data, folder)


def test_aia_boxes_give_the_same_detections_as_csv(ava, tmp_path):
    """In pixels of the movies' own size, which is read from each movie."""
    config = configured(f"data.root={ava}", "data.file_list=names.txt", "data.workers=0")
    rows = files.read_person_boxes(ava / config.data.boxes, 0.8)
    names = sorted({video for video, _ in rows})
    (ava / "names.txt").write_text("".join(f"{name}.mp4\n" for name in names))
    entries = []
    for (video, second), (x1, y1, x2, y2), _, score in sum(rows.values(), []):
        bbox = [x1 * toy.AVA_WIDTH, y1 * toy.AVA_HEIGHT, (x2 - x1) * toy.AVA_WIDTH, (y2 - y1) * toy.AVA_HEIGHT]
        entries.append(dict(image_id=10000 * names.index(video) + second, bbox=bbox, score=score))
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    found = detect_ava.find_persons(tmp_path / "boxes.json", config.data, ava, files.list_movies(ava / "videos"))
    assert list(found) == list(rows)
    for frame, of_frame in rows.items():
        for one, other in zip(of_frame, found[frame], strict=True):
            assert one.box == pytest.approx(other.box) and one.score == other.score


# ---- whole runs; what all stages share is in test_stages.py ----

QUICK = ["init=scratch", "optim.batch_size=4", "optim.warmup_epochs=1", "optim.epochs=2"]
QUICK += ["run.log_every=1", "run.pictures=1", "run.validate_every=1"]


@pytest.fixture(scope="module")
def reference_run(ava, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = run("detect_ava.py", *QUICK, f"data.root={ava}", f"run.folder={folder}")
    assert "mAP at IoU 0.5" in done.stdout and "epoch 1: mAP" in done.stderr
    return folder


def test_a_run_leaves_detections_their_worth_and_pictures(reference_run, ava):
    lines = [json.loads(line) for line in (reference_run / "log.jsonl").read_text().splitlines()]
    summary = json.loads((reference_run / "mAP.json").read_text())
    assert lines[-1]["test_mAP"] == summary["mAP"] and len(summary["actions"]) == 12
    assert [line["epoch"] for line in lines if "mAP" in line] == [1]
    checkpoint = torch.load(reference_run / "checkpoint.pt", weights_only=True)
    assert checkpoint["actions"][9] == "turning left" and checkpoint["model_options"]["classes"] == 12
    assert {"model", "optimizer", "positions", "step", "config"} <= checkpoint.keys()
    assert [path.suffix for path in (reference_run / "pictures").iterdir()] == [".png"]
    # the file of detections, evaluated by itself, is worth the same
    annotations = ava / "annotations"
    options = ["--ground-truth", annotations / "ava_val_v2.2.csv", "--out", reference_run / "again.json"]
    options += ["--labels", annotations / "ava_action_list_v2.2.pbtxt"]
    options += ["--exclude", annotations / "ava_val_excluded_timestamps_v2.2.csv"]
    run("support.ava", reference_run / "detections.csv", *options)
    assert json.loads((reference_run / "again.json").read_text()) == summary


def test_two_processes_find_what_one_does(ava, reference_run, tmp_path):
    options = ["--test", "--weights", reference_run / "checkpoint.pt", "--out", tmp_path]
    run("detect_ava.py", *options, "run.batch_per_device=1", processes=2)
    ours, theirs = (files.read_detections(folder / "detections.csv", 12) for folder in (tmp_path, reference_run))
    assert [row[:3] for row in ours] == [row[:3] for row in theirs]
    assert [row.score for row in ours] == pytest.approx([row.score for row in theirs], abs=1e-5)
    ours, theirs = (json.loads((folder / "mAP.json").read_text())["mAP"] for folder in (tmp_path, reference_run))
    assert ours == pytest.approx(theirs, abs=1.0)


def test_only_evaluated_actions_are_written(ava, reference_run, tmp_path):
    (tmp_path / "some.pbtxt").write_text('item { name: "right" id: 1 } item { name: "shrinking" id: 12 }')
    options = [
        "--weights",
        reference_run / "checkpoint.pt",
        "--out",
        tmp_path,
        f"data.labels={tmp_path / 'some.pbtxt'}",
    ]
    run("detect_ava.py", "--test", *options)
    assert {row.action for row in files.read_detections(tmp_path / "detections.csv", 12)} == {1, 12}
    assert [action["name"] for action in json.loads((tmp_path / "mAP.json").read_text())["actions"]] == [
        "right",
        "shrinking",
    ]


def test_four_clips_are_memorized(ava, tmp_path):
    """Trained and tested on the same four key frames, with ground-truth boxes, a detector reaches an mAP of 100 %."""
    truth = (ava / "annotations/ava_train_v2.2.csv").read_text().splitlines()
    frames = list(dict.fromkeys(tuple(row.split(",")[:2]) for row in truth))[:4]
    rows = [row for row in truth if tuple(row.split(",")[:2]) in frames]
    (tmp_path / "four.csv").write_text("\n".join(rows))
    boxes = {",".join(row.split(",")[:6]) for row in rows}
    (tmp_path / "boxes.csv").write_text("".join(f"{box},,0.99\n" for box in boxes))
    values = dict(root=ava, train=tmp_path / "four.csv", val=tmp_path / "four.csv", boxes=tmp_path / "boxes.csv")
    values |= dict(train_exclude="", val_exclude="", size=64, short_side=64, workers=0)
    settings = ["init=scratch", *(f"data.{key}={value}" for key, value in values.items())]
    settings += ["optim.batch_size=4", "optim.base_lr=0.2", "optim.epochs=150", "optim.warmup_epochs=10"]
    settings += ["optim.weight_decay=0", "run.validate_every=0", "run.pictures=0", f"run.folder={tmp_path / 'run'}"]
    done = run("detect_ava.py", *settings)
    assert json.loads((tmp_path / "run/mAP.json").read_text())["mAP"] == pytest.approx(100), done.stdout


def test_weights_are_tested_and_predict_a_video(ava, reference_run, tmp_path):
    weights = ["--weights", reference_run / "checkpoint.pt"]
    done = run("detect_ava.py", "--test", *weights, "--out", tmp_path / "test")
    assert "mAP at IoU 0.5" in done.stdout
    assert json.loads((tmp_path / "test/mAP.json").read_text()) == json.loads((reference_run / "mAP.json").read_text())

    options = ["--boxes", ava / "boxes/ava_val_predicted_boxes.csv", *weights]
    out = tmp_path / "out" / "drawn.mp4"
    done = run("detect_ava.py", "--predict", ava / "videos/val_00001.mp4", *options, "--out", out)
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")).int() for frame in container.decode(stream)]
        assert len(frames) == toy.AVA_FRAMES and stream.average_rate == toy.RATE
    red, green, blue = torch.stack(frames).unbind(dim=3)
    assert ((red > 200) & ((green - 165).abs() < 40) & (blue < 60)).any()  # orange boxes
    assert "key frames: " in done.stdout

    rows = files.read_detections(out.with_suffix(".csv"), 12)
    assert {row.frame[0] for row in rows} == {"val_00001"} and {row.action for row in rows} == set(range(1, 13))

    done = run("detect_ava.py", "--predict", ava / "videos/train_00001.mp4", *options, ok=False)
    assert done.returncode and "has no boxes of video train_00001" in done.stderr and "Traceback" not in done.stderr


def test_results_are_printed_as_json(reference_run, tmp_path):
    options = ["--weights", reference_run / "checkpoint.pt", "--out", tmp_path, "run.pictures=0"]
    done = run("detect_ava.py", "--test", "--json", *options)
    assert json.loads(done.stdout) == json.loads((tmp_path / "mAP.json").read_text())
    assert done.stdout.count("\n") == 1 and "detections.csv" in done.stderr


# ---- predictions without a file of boxes ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with random weights, for clips of 8 x 64 x 64."""
    config = configured("init=scratch")
    detector = randomized(detect_ava.build(config, "scratch", NO_PERSONS))
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pt"
    content = dict(model=detector.state_dict(), model_options=detector.options, actions={1: "walk"})
    torch.save(content | dict(config=as_dict(config)), path)
    return path


def seconds_of(path: Path) -> list[float]:
    return sorted({row.frame[1] for row in files.read_detections(path, 12)})


def test_whole_frames_of_videos_folders_and_lists_are_predicted(weights, tmp_path):
    """One box at each second, which is drawn; a video that cannot be read is named and the others are predicted."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    (folder / "below").mkdir(parents=True)
    write_numbered(folder / "one.mp4", 31, times=tenths(31))
    write_numbered(folder / "below/two.mkv", 6, times=tenths(6))
    (folder / "text.mp4").write_text("not a video")
    write_numbered(tmp_path / "three.mp4", 12, times=tenths(12))
    (tmp_path / "list.txt").write_text("three.mp4\n")
    options = ["--weights", weights, "--out", out, "data.workers=0"]
    done = run("detect_ava.py", "--predict", folder, tmp_path / "list.txt", *options)
    assert "left out: " in done.stderr and "text.mp4" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{suffix}" for name in ("one", "three", "two") for suffix in ("csv", "mp4")
    ]
    assert seconds_of(out / "one.csv") == [900, 901, 902, 903]  # the toy's files start at second 900
    assert seconds_of(out / "two.csv") == [900] and seconds_of(out / "three.csv") == [900, 901]
    assert {row.box for row in files.read_detections(out / "one.csv", 12)} == {(0, 0, 1, 1)}
    with av.open(str(out / "one.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 31

    done = run("detect_ava.py", "--predict", folder / "text.mp4", *options, ok=False)
    assert done.returncode and "nothing could be predicted" in done.stderr and "Traceback" not in done.stderr
    (folder / "below/three.mp4").write_bytes((tmp_path / "three.mp4").read_bytes())
    done = run("detect_ava.py", "--predict", folder / "below", tmp_path / "three.mp4", *options, ok=False)
    assert done.returncode and "two of the videos have the same name" in done.stderr
    before = (tmp_path / "three.mp4").read_bytes()
    done = run("detect_ava.py", "--predict", tmp_path / "three.mp4", *options[:2], "--out", tmp_path, ok=False)
    assert done.returncode and "three.mp4 would be overwritten" in done.stderr
    assert (tmp_path / "three.mp4").read_bytes() == before


def test_boxes_at_fractions_of_a_second_are_predicted_and_drawn_on_the_nearest_frames(weights, tmp_path):
    write_numbered(tmp_path / "film.mp4", 40, times=tenths(40))
    (tmp_path / "boxes.csv").write_text("film,1.5,0.25,0.25,0.75,0.75,,0.9\nfilm,1.7,0,0,0.5,0.5,,0.9\n")
    options = ["--boxes", tmp_path / "boxes.csv", "--weights", weights, "data.starts_at=0", "data.workers=0"]
    run("detect_ava.py", "--predict", tmp_path / "film.mp4", *options, "--out", tmp_path / "drawn.mp4")
    assert seconds_of(tmp_path / "drawn.csv") == [1.5, 1.7]
    with av.open(str(tmp_path / "drawn.mp4")) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")).int() for frame in container.decode(video=0)]
    red, green, blue = torch.stack(frames).unbind(dim=3)
    orange = (red > 200) & ((green - 165).abs() < 40) & (blue < 60)  # (T, H, W)
    height, width = orange.shape[1:]
    right, left = orange[:, :, round(0.75 * width)].any(dim=1), orange[:, round(0.1 * height), 0:4].any(dim=1)
    assert right.nonzero().flatten().tolist() == list(range(10, 17))  # 1.0 to 1.6 s, the earlier of two equally near
    assert left.nonzero().flatten().tolist() == list(range(17, 23))  # to 2.2 s


class Found(nn.Module):
    """Stands in for torchvision's person detector: the same boxes in every frame, in pixels."""

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        (image,) = images
        assert image.shape[0] == 3 and image.dtype == torch.float32 and 0 <= image.min() and 0.5 < image.max() <= 1
        self.seen.append(number_of((image * 255).round().byte()))
        height, width = image.shape[1:]
        boxes = [[0, 0, width, height / 2], [width / 4, 0, width / 2, height], [0, 0, 9, 9], [1, 1, 9, 9]]
        scores = torch.tensor([0.8, 0.95, 0.79, 0.99], dtype=torch.float64)
        return [dict(boxes=torch.tensor(boxes), scores=scores, labels=torch.tensor([1, 1, 1, 2]))]


def test_persons_that_a_detector_finds_once_a_second(tmp_path):
    """Those of COCO's class 1 with a score of at least 0.8, in fractions of width and height."""
    write_numbered(tmp_path / "film.mp4", 25, times=tenths(25))
    config, detector = configured("data.starts_at=0"), Found()
    detector.seen = []
    found = detect_ava.persons_each_second(tmp_path / "film.mp4", detector, Run(config, detect_ava.DEFAULT))
    assert detector.seen == [0, 10, 20] and list(found) == [("film", second) for second in range(3)]
    for rows in found.values():
        assert [row.box for row in rows] == [(0, 0, 1, 0.5), (0.25, 0, 0.5, 1)]
        assert [row.score for row in rows] == [0.8, 0.95] and {row.action for row in rows} == {0}
    config.data.threshold = 0.96
    with pytest.raises(UserError, match="film.mp4 shows no person .* of 0.96 or more"):
        detect_ava.persons_each_second(tmp_path / "film.mp4", detector, Run(config, detect_ava.DEFAULT))


def test_torchvisions_detector_is_read_from_a_file(tmp_path, monkeypatch):
    """Never downloaded. Its boxes lie in the frame; which class they have is decided by the file's weights."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    path = tmp_path / "weights.pth"
    for content in (b"not weights", None):
        path.write_bytes(content) if content else torch.save({"x": torch.zeros(1)}, path)
        with pytest.raises(UserError, match="weights.pth does not hold the weights of .*fasterrcnn_resnet50_fpn_v2"):
            detect_ava.load_person_detector(path)
    torch.manual_seed(0)
    source = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    with torch.no_grad():
        source.roi_heads.box_predictor.cls_score.bias[1] = 20  # everything is a person
    torch.save(source.state_dict(), path)
    detector = detect_ava.load_person_detector(path)
    path.unlink()  # 170 MB
    assert not detector.training
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in detector.state_dict().items())
    detector.transform.min_size, detector.transform.max_size = (32,), 64  # as it is, it enlarges a frame to 800 pixels
    write_numbered(tmp_path / "film.mp4", 4, times=tenths(4))
    one_run = Run(configured("data.starts_at=0"), detect_ava.DEFAULT)
    found = detect_ava.persons_each_second(tmp_path / "film.mp4", detector, one_run)
    boxes = torch.tensor([row.box for row in found["film", 0]])
    assert list(found) == [("film", 0)] and boxes.min() >= 0 and 0.5 < boxes.max() <= 1
    assert all(row.score >= 0.8 for row in found["film", 0])
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.bias[2] = 40  # everything is a bicycle
    with pytest.raises(UserError, match="shows no person"):
        detect_ava.persons_each_second(tmp_path / "film.mp4", detector, one_run)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.size=80"], "data.size=80 cannot be cropped from data.short_side=72"),
        (["data.mean=[0.5]"], "data.mean expects list such as"),
        (["data.rate=0"], "data.rate=0.0 has to be at least 0.01"),
        (["data.actions=11"], "unknown action 12, known are 1 to 11"),
        (["data.movies=nowhere"], "there is no folder"),
        (["data.boxes=nowhere.csv"], "no rows can be read from"),
        (["data.threshold=1.1"], "has a score of 1.1 or more"),
        (["data.val_exclude=everything.csv"], "leaves out all 9 key frames with persons"),
        (["data.val=other.csv"], "holds no row of an action in .* outside excluded frames"),
    ],
)
def test_mistakes_end_in_a_sentence(ava, tmp_path, settings, sentence):
    rows = (ava / "boxes/ava_val_predicted_boxes.csv").read_text().splitlines()
    (ava / "everything.csv").write_text("".join(f"{','.join(row.split(',')[:2])}\n" for row in rows))
    excluded = (ava / "annotations/ava_val_excluded_timestamps_v2.2.csv").read_text().split()
    (ava / "other.csv").write_text(f"{excluded[0]},0.1,0.1,0.5,0.5,1,0\n")
    with pytest.raises(UserError, match=sentence):
        detect_ava.train(configured("init=scratch", f"data.root={ava}", f"run.folder={tmp_path / 'run'}", *settings))


def test_missing_arguments_are_said_in_a_sentence():
    needs = "--test and --predict need --weights"
    cases = {("--test",): needs, ("--weights", "y.pt"): needs}
    cases |= {("--predict", "x.mp4"): needs}
    cases |= {("--predict", "x.mp4", "--weights", "y.pt", "--boxes", "b", "--detector", "d"): "not allowed with"}
    for arguments, sentence in cases.items():
        done = run("detect_ava.py", *arguments, ok=False)
        assert done.returncode and sentence in done.stderr and "Traceback" not in done.stderr
