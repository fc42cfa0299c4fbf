"""Action detection: clips by time and their boxes, the detector, its loss, tests of whole runs."""

import colorsys
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import log, number_of, run, write_numbered
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF
from videos import frame_folder

import detect_ava
import model as m
from support import ava
from support.config import UserError, load_config
from support.processes import start_processes
from support.seeds import random_below
from support.video import BrokenVideo
from support.weights import build_from_checkpoint

NO_PERSONS = torch.zeros(0, 8)  # labels


def configured(*settings: str) -> SimpleNamespace:
    same = ["run.precision=float32", "run.compile=never", "data.workers=0"]
    same += ["data.frames=8", "data.stride=2", "data.short_side=36", "data.size=32"]
    return load_config(detect_ava.DEFAULT, [*same, *settings])


def tiny_detector(side: int = 16) -> detect_ava.ActionDetector:
    torch.manual_seed(0)
    sizes = dict(width=32, depth=2, heads=2, clip_size=(4, 32, 32), cube=(2, side, side))
    return detect_ava.ActionDetector(**sizes, classes=5).eval()


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# ---- clips by time ----

OPEN_GOP = {"x264-params": "keyint=25:min-keyint=25:bframes=3:open-gop=1:scenecut=0"}
OFFSETS = {30: [4 * i - 32 for i in range(16)]}  # of 16 frames, 4 apart, at 30 a second
OFFSETS |= {25: [-27, -23, -20, -17, -13, -10, -7, -3, 0, 3, 7, 10, 13, 17, 20, 23]}  # the nearest
LENGTH = 12  # seconds


def times(rate: int, begin: int = 0) -> list[int]:
    return [round(1000 * (begin + i / rate)) for i in range(LENGTH * rate)]


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Movies whose frames show their numbers: at 25 and 30 fps, cut at second 900 and whole, in mp4 and Matroska."""
    folder = tmp_path_factory.mktemp("movies")
    for rate in (25, 30):
        for suffix in ("mp4", "mkv"):
            write_numbered(folder / f"cut{rate}.{suffix}", LENGTH * rate, options=OPEN_GOP, times=times(rate))
        whole = [0, *times(rate, begin=898)]  # one frame for the first 898 seconds
        write_numbered(folder / f"whole{rate}.mp4", len(whole), options=OPEN_GOP, times=whole)
    write_numbered(folder / "late_start30.mkv", LENGTH * 30, options=OPEN_GOP, times=times(30, begin=5))
    (frame_folder(folder / "frames30", 100) / "notes.txt").touch()
    return folder


def clip_of(path: Path, second: float, **changes: float) -> list[int]:
    options = SimpleNamespace(**dict(frames=16, stride=4, rate=30.0, starts_at=900) | changes)
    clip = detect_ava.read_clip(path, second, options)
    assert clip.dtype == torch.uint8 and clip.shape[:2] == (options.frames, 3)
    return [number_of(frame) for frame in clip]


@pytest.mark.parametrize("name", ["cut25.mp4", "cut25.mkv", "cut30.mp4", "cut30.mkv", "late_start30.mkv", "frames30"])
def test_clips_of_a_cut_movie(movies, name):
    """Of the same times at 25 and 30 frames a second. At both ends the first and the last frame stand in."""
    rate = 25 if "25" in name else 30
    last = 99 if name == "frames30" else LENGTH * rate - 1
    for second in range(900, 901 + last // rate):
        key = (second - 900) * rate
        assert clip_of(movies / name, second) == [min(max(key + offset, 0), last) for offset in OFFSETS[rate]]
    for second in (899, 902 + last // rate, 1798):
        sentence = f"{name}: second {second} lies outside.*is the movie cut or whole"
        with pytest.raises(BrokenVideo, match=sentence):
            clip_of(movies / name, second)
    assert clip_of(movies / name, 902, frames=8, stride=30)[3:6] == [rate, 2 * rate, min(3 * rate, last)]


@pytest.mark.parametrize("rate", [25, 30])
def test_clips_of_a_whole_movie(movies, rate):
    for second in range(900, 910):
        expected = [min(1 + (second - 898) * rate + offset, LENGTH * rate) for offset in OFFSETS[rate]]
        assert clip_of(movies / f"whole{rate}.mp4", second, starts_at=0) == expected
    assert clip_of(movies / f"whole{rate}.mp4", 1, starts_at=0) == [0] * 16  # the first frame is shown for 898 seconds
    assert clip_of(movies / f"cut{rate}.mp4", 0, starts_at=0) == [max(offset, 0) for offset in OFFSETS[rate]]


def test_key_frames_at_fractions_of_a_second(movies, tmp_path):
    """As AVA-Kinetics has them. What the digits say is exact: a tenth of a second is three frames."""
    for second, key in ((905.5, 165), (905.1, 153), (905.016, 150), (905.017, 151)):
        assert clip_of(movies / "cut30.mp4", second)[8] == key
        assert clip_of(movies / "cut30.mp4", second, frames=8, stride=30)[3:6] == [key - 30, key, key + 30]
    with pytest.raises(BrokenVideo, match="second 912.75 lies outside"):
        clip_of(movies / "cut30.mp4", 912.75)
    write_numbered(tmp_path / "film.mp4", 10, times=list(range(0, 1000, 100)))
    assert clip_of(tmp_path / "film.mp4", 900.35)[8] == 3  # the earlier of two; as a float it lies behind the middle


def test_only_the_part_around_the_key_frame_is_opened(movies, monkeypatch):
    opened, really_open = [], ava.open_movie
    monkeypatch.setattr(ava, "open_movie", lambda *part: opened.append(part) or really_open(*part))
    clip_of(movies / "cut30.mp4", 906)
    assert opened == [(movies / "cut30.mp4", Fraction(148, 30), Fraction(208, 30))]


# ---- boxes ----


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Movies, folders of frames, whose red is the place from left to right and whose green that from top to bottom."""
    folder, movies = tmp_path_factory.mktemp("coded"), {}
    for height, width in ((180, 321), (321, 180), (97, 100), (64, 64)):
        name = f"{height}x{width}"
        movies[name] = folder / name
        movies[name].mkdir()
        red = (torch.arange(width) + 0.5).expand(height, -1) / width
        green = (torch.arange(height)[:, None] + 0.5).expand(-1, width) / height
        picture = (torch.stack([red, green, torch.full_like(red, 0.5)]) * 255).round().byte()
        for number in range(1, 9):
            TF.to_pil_image(picture).save(movies[name] / f"{name}_{number:06d}.jpg", quality=100, subsampling=0)
    return movies


def place_at(clip: torch.Tensor, x: float, y: float) -> list[float]:
    """The place, in fractions of the coded frame, that the color at (x, y) in pixels of a clip (T, 3, H, W) tells."""
    height, width = clip.shape[-2:]
    grid = torch.tensor([[[[2 * x / width - 1, 2 * y / height - 1]]]])
    sampled = nn.functional.grid_sample(clip[-1:].float() / 255, grid, padding_mode="border", align_corners=False)
    return sampled[0, :2, 0, 0].tolist()


def key_frame(movie: str, *boxes: tuple) -> tuple[ava.Frame, ava.Rows]:
    return (movie, 902), [ava.Row((movie, 902), box, action, 0.9) for action, box in enumerate(boxes, 1)]


def options_of(*settings: str) -> SimpleNamespace:
    return configured("data.rate=30", "data.starts_at=902", *settings).data


def batch_of(coded: dict, key: tuple, *settings: str) -> tuple:
    return detect_ava.KeyFrameBatches(dict([key]), coded, options_of(*settings), 8)[0]


@pytest.mark.parametrize(("movie", "short"), [("180x321", 128), ("321x180", 128), ("97x100", 256), ("64x64", 64)])
@pytest.mark.parametrize("flip", [False, True])
def test_the_pixel_under_a_corner_stays_under_it(coded, movie, short, flip):
    """Through resizing, random crops and flips."""
    size, checked, flipped = int(0.9 * short), 0, 0
    boxes = [(0.4, 0.42, 0.55, 0.61), (0.45, 0.4, 0.6, 0.5)]
    settings = f"data.short_side={short}", f"data.size={size}", f"data.flip={flip}"
    clips = detect_ava.KeyFrameClips([key_frame(movie, *boxes)], 0, movies=coded, options=options_of(*settings))
    for epoch in range(6):
        clip, moved, labels, broken = clips[epoch, 0]
        assert clip.shape == (8, 3, size, size) and not broken and labels.argmax(dim=1).tolist() == [0, 1]
        assert (moved[:, :2] < moved[:, 2:]).all()
        mirrored = place_at(clip, 1, 5)[0] > place_at(clip, size - 1, 5)[0]
        flipped += mirrored
        for box, (x1, y1, x2, y2) in zip(moved.tolist(), boxes, strict=True):
            left, right = (x2, x1) if mirrored else (x1, x2)
            for corner, place in ((box[:2], (left, y1)), (box[2:], (right, y2))):
                for edge, seen, expected in zip(corner, place_at(clip, *corner), place, strict=True):
                    assert seen == pytest.approx(expected, abs=0.006) or edge in (0, size)  # clamped
                    checked += 0 < edge < size
    assert checked > 24
    assert 0 < flipped < 6 if flip else flipped == 0
    scores, (clip,), (rois,), broken = batch_of(coded, key_frame(movie, *boxes), *settings)
    assert min(clip.shape[-2:]) == short and len(scores) == 2 and not broken
    for box, place in zip(rois.tolist(), boxes, strict=True):
        assert place_at(clip, *box[:2]) == pytest.approx(place[:2], abs=0.006)
        assert place_at(clip, *box[2:]) == pytest.approx(place[2:], abs=0.006)


def test_frames_are_resized_without_antialiasing(coded):
    _, (clip,), _, _ = batch_of(coded, key_frame("321x180", (0.0, 0.0, 1.0, 1.0)), "data.short_side=60")
    frames = detect_ava.read_clip(coded["321x180"], 902, options_of()).float()
    expected = nn.functional.interpolate(frames, (107, 60), mode="bilinear", align_corners=False)
    assert clip.shape == (8, 3, 107, 60) and (clip.float() - expected).abs().max() <= 1


def test_boxes_are_clamped_to_the_crop_and_jittered_in_their_bounds(coded):
    key = key_frame("64x64", (0.0, 0.0, 0.05, 0.05), (0.0, 0.0, 1.0, 1.0), (0.95, 0.95, 1.0, 1.0))
    for jitter in (False, True):
        options = options_of("data.short_side=64", "data.size=16", f"data.jitter_boxes={jitter}")
        clips = detect_ava.KeyFrameClips([key], 0, movies=coded, options=options)
        boxes = torch.stack([clips[epoch, 0][1] for epoch in range(200)])  # (200, 3, 4)
        assert boxes.min() == 0 and boxes.max() == 16
        sizes = boxes[..., 2:] - boxes[..., :2]
        assert (sizes.prod(dim=2)[:, ::2].min(dim=1).values == 0).all()  # persons outside the crop stay, without area
        # What is left of a box inside the crop is moved inward by up to 0.1 of its width and 0.05 of its height of 16.
        most = torch.tensor([1.6, 0.8]) if jitter else torch.zeros(2)
        assert torch.allclose(boxes[:, 1, :2].amax(dim=0), most, atol=0.1)
        assert torch.allclose(boxes[:, 1, 2:].amin(dim=0), 16 - most, atol=0.1)
    boxes = torch.tensor([[100.0, 200.0, 200.0, 400.0]] * 4000)  # 100 wide, 200 high
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(500, 500))
    moved = detect_ava.jitter_boxes(boxes, torch.Generator().manual_seed(0)) - boxes
    bounds = torch.tensor([[-20.0, -20, -10, -10], [10, 10, 20, 20]])
    assert torch.allclose(torch.stack([moved.amin(dim=0), moved.amax(dim=0)]), bounds, atol=0.2)
    assert torch.corrcoef(moved.T).fill_diagonal_(0).abs().max() < 0.06  # each edge on its own


def test_boxes_are_widened_for_pooling_alone(coded):
    frame, rows = key_frame("64x64", (0.25, 0.25, 0.5, 0.75), (0.5, 0.0, 1.0, 1.0))
    scores, _, (widened,), _ = batch_of(coded, (frame, rows), "data.short_side=64", "data.widen_boxes=true")
    expected = torch.tensor([[15.2, 15.2, 32.8, 48.8], [30.4, 0, 64, 64]])  # 10 % and 5 % more; cut off at the edge
    assert torch.allclose(widened, expected) and list(scores) == [row[:2] for row in rows]


def test_color_jitter_moves_hue_saturation_and_value_by_whole_steps():
    """Against Python's own conversion. Gray has the hue 0, red, which more saturation shows."""
    frames = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames[0, :, 0, 0], frames[0, :, 0, 1] = 77, 0
    for seed in range(5):
        jittered = detect_ava.jitter_colors(frames, torch.Generator().manual_seed(seed))
        assert jittered.dtype == torch.uint8 and jittered.shape == frames.shape
        generator = torch.Generator().manual_seed(seed)
        hue, saturation, value = (random_below(2 * most + 1, generator) - most for most in (10, 26, 26))
        for t, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
            h, s, v = colorsys.rgb_to_hsv(*(frames[t, :, y, x] / 255).tolist())
            s, v = (min(max(a, 0), 1) for a in (s + saturation / 255, v + value / 255))
            expected = 255 * torch.tensor(colorsys.hsv_to_rgb((h + hue / 180) % 1, s, v))
            assert (jittered[t, :, y, x] - expected).abs().max() < 9  # PIL has whole numbers


# ---- model ----


@pytest.mark.parametrize("side", [16, 8])
def test_pooling_takes_the_cubes_under_the_box(side):
    detector = tiny_detector(side)
    detector.head = nn.Identity()
    # One bright cube among dark ones: only the boxes that lie over it see it, whichever slice of time it is in.
    tokens = torch.zeros(1, 2, 4, 6, 32)
    tokens[0, 1, 2, 4] = 1.0  # with cubes of 16: rows 32 to 48, columns 64 to 80 of 64 x 96 pixels
    detector.encoder.forward = lambda clip: tokens.flatten(1, 3)  # (B, N, D)
    boxes = torch.tensor([[64.0, 32, 80, 48], [0, 0, 96, 64], [0, 0, 40, 64], [66, 0, 80, 12]]) * side / 16
    seen = detector(torch.zeros(1, 3, 4, 4 * side, 6 * side), detect_ava.to_rois([boxes]))[:, 0]
    assert 0.4 < seen[0] <= 0.5 and 0.25 < seen[1] <= 0.5  # half of the time
    assert seen[2] == 0 and seen[3] == 0


def test_clips_without_persons_are_legal():
    detector, clip = tiny_detector(), torch.randn(2, 3, 4, 32, 32)
    nobody, one = torch.zeros(0, 4), torch.tensor([[0.0, 0, 20, 30]])
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


# ---- weights from elsewhere ----


def test_training_starts_from_weights(tmp_path, capfd):
    sizes = dict(clip_size=(8, 32, 32), cube=(1, 8, 8))
    pretrained = m.VideoMAE(**m.SIZES["tiny"], decoder_depth=1, **sizes)
    finetuned = m.VideoClassifier(**m.encoder_size("tiny"), classes=7, **sizes)
    path = tmp_path / "weights.pt"
    for source in (pretrained, finetuned):
        torch.save(dict(model=randomized(source).state_dict(), model_options=source.options), path)
        encoder = detect_ava.build(configured(f"init={path}"), NO_PERSONS).encoder
        assert torch.equal(encoder.blocks[3].mlp.fc2.weight, source.encoder.blocks[3].mlp.fc2.weight)
        if source is pretrained:
            assert torch.equal(encoder.norm.weight, source.encoder.norm.weight)  # kept
    assert (encoder.norm.weight == 1).all() and (encoder.norm.bias == 0).all()  # fine-tuned weights have none
    assert "encoder.norm" in capfd.readouterr().err
    with pytest.raises(UserError, match="encoder.norm.* is missing"):
        build_from_checkpoint(path, detect_ava.ActionDetector, (8, 32, 32))


def test_the_head_starts_at_the_frequencies_of_the_actions():
    labels = torch.zeros(199, 8)
    labels[:49, 3], labels[:, 4] = 1, 1  # one quarter, all; the others never
    detector = detect_ava.build(configured("init=scratch"), labels).eval()
    frequencies = detector.head.bias.detach().sigmoid()[[3, 4, 0]]
    assert frequencies.tolist() == pytest.approx([49.5 / 200, 0.9975, 0.0025])
    rois = torch.tensor([[0.0, 2, 2, 20, 15], [0.0, 10, 5, 30, 30], [1.0, 0, 0, 32, 32]])
    spread = detector(torch.randn(2, 3, 8, 32, 32), rois) - detector.head.bias
    assert 1e-5 < spread.std() < 2e-3  # about 0.3 without the authors' factor of 0.001


# ---- test ----


def detected(config: SimpleNamespace, detector: nn.Module) -> torch.Tensor:
    """The probabilities (persons, 8) of the persons in the validation set."""
    validation, size = ava.find_validation(config.data, Path(config.data.root)), config.run.batch_per_device
    batches = detect_ava.KeyFrameBatches(validation.persons, validation.movies, config.data, size)
    rows, broken = detect_ava.detect(detector, batches, start_processes("float32"), config, "test")
    persons = sum(validation.persons.values(), [])
    expected = [(person.frame, person.box, action) for person in persons for action in range(1, 9)]
    assert not broken and [row[:3] for row in rows] == expected
    return torch.tensor([row.score for row in rows]).reshape(len(persons), 8)


def test_detections_do_not_depend_on_batches(toy_ava):
    config = configured("init=scratch", f"data.root={toy_ava}", "run.batch_per_device=1")
    detector = randomized(detect_ava.build(config, NO_PERSONS))
    alone = detected(config, detector)
    config.run.batch_per_device = 3
    assert torch.allclose(detected(config, detector), alone, atol=1e-5)
    persons = ava.find_validation(config.data, toy_ava).persons
    scores = torch.tensor([row.score for row in sum(persons.values(), [])])
    assert scores.min() >= 0.8
    config.data.person_score = True
    assert torch.allclose(detected(config, detector), alone * scores[:, None], atol=1e-5)
    # Movies may have different sizes, which no batch could hold together.
    batches = detect_ava.KeyFrameBatches(persons, {}, config.data, 2).batches
    assert [frame for batch in batches for frame, _ in batch] == list(persons)
    assert {len({video for (video, _), _ in batch}) for batch in batches} == {1} and max(map(len, batches)) == 2


def test_frames_are_padded_right_and_below_to_whole_cubes(coded):
    class Recorder(nn.Module):
        options = dict(cube=[2, 16, 32])

        def forward(self, clip: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
            self.seen = clip, rois
            return torch.zeros(len(rois), 8)

    recorder, frames = Recorder(), dict([key_frame("97x100", (0.0, 0.0, 1.0, 1.0))])
    batches = detect_ava.KeyFrameBatches(frames, coded, options_of("data.short_side=100"), 8)
    rows, _ = detect_ava.detect(recorder, batches, start_processes("float32"), configured(), "test")
    clip, rois = recorder.seen
    assert clip.shape == (1, 3, 8, 112, 128) and rois[0].tolist() == pytest.approx([0, 0, 0, 103, 100])
    assert not clip[..., 100:, :].any() and not clip[..., 103:].any()
    assert (clip[..., :100, :103] != 0).float().mean() > 0.9 and [row.score for row in rows] == [0.5] * 8


def test_missing_and_broken_movies_are_named_and_their_ground_truth_counts(toy_ava, tmp_path, capfd):
    folder = tmp_path / "ava"
    shutil.copytree(toy_ava, folder)
    for name in ("train_00001", "val_00000"):
        (folder / f"videos/{name}.mp4").unlink()
    (folder / "videos/val_00001.mp4").write_bytes((toy_ava / "videos/val_00001.mp4").read_bytes()[:500])
    config = configured("init=scratch", f"data.root={folder}", "run.pictures=0")
    (folder / config.data.train_exclude).write_text("train_00002,0901\n")
    frames, _ = ava.find_training(config.data, folder)
    assert re.search("1 of 6 movies for training .* left out: train_00001\n$", capfd.readouterr().err)
    assert not any(video == "train_00001" for video, _ in frames) and len(frames) > 10
    assert ("train_00002", 901) not in frames and ("train_00002", 902) in frames
    (folder / config.data.val_exclude).write_text("val_00002,0901\n")
    validation = ava.find_validation(config.data, folder)
    assert ("val_00002", 901) not in validation.persons and ("val_00002", 902) in validation.persons
    assert {row.frame[0] for row in validation.ground_truth} == {"val_00000", "val_00001", "val_00002"}
    detector, processes = detect_ava.build(config, NO_PERSONS), start_processes("float32")
    detect_ava.test(detector, validation, processes, config, "test", tmp_path / "out")
    said = capfd.readouterr().err
    assert said.count("no detections: ") == 2 and "movie val_00000 is missing" in said and "val_00001.mp4" in said
    found = ava.read_detections(tmp_path / "out/detections.csv", 8)
    assert {row.frame[0] for row in found} == {"val_00002"}
    (folder / "videos/val_00002.mp4").unlink()
    with pytest.raises(UserError, match="none of the key frames with boxes can be read; the first: "):
        detect_ava.test(detector, ava.find_validation(config.data, folder), processes, config, "test")
    for path in folder.glob("videos/train_*.mp4"):
        path.unlink()
    with pytest.raises(UserError, match="has none of the movies"):
        ava.find_training(config.data, folder)


def test_validation_with_boxes_of_aia(toy_ava, tmp_path):
    (tmp_path / "names.txt").write_text("no.mp4\nval_00001.mp4\n")
    entry = dict(image_id=10902, bbox=[4.8, 3.2, 19.2, 16], score=0.9)  # in pixels of 48 x 32
    (tmp_path / "boxes.json").write_text(json.dumps([entry]))
    settings = f"data.file_list={tmp_path / 'names.txt'}", f"data.boxes={tmp_path / 'boxes.json'}"
    ((frame, (row,)),) = ava.find_validation(configured(*settings).data, toy_ava).persons.items()
    assert frame == ("val_00001", 902) and row.score == 0.9 and row.box == pytest.approx((0.1, 0.1, 0.5, 0.6))


def test_actions_beyond_those_of_the_configuration(toy_ava, tmp_path):
    (tmp_path / "list.pbtxt").write_text('item { name: "sit" id: 9 }')
    with pytest.raises(UserError, match="list.pbtxt lists action 9, more than data.actions=8"):
        ava.find_validation(configured(f"data.labels={tmp_path / 'list.pbtxt'}").data, toy_ava)


# ---- whole runs; what all stages have in common is in test_stages.py ----


def test_a_run_leaves_detections_their_worth_and_pictures(finished, toy_ava, tmp_path):
    folder, annotations = finished("detect_ava"), toy_ava / "annotations"
    summary = json.loads((folder / "mAP.json").read_text())
    assert log(folder)[-1]["test_mAP"] == summary["mAP"] and len(summary["actions"]) == 8
    assert [line["epoch"] for line in log(folder) if "mAP" in line] == [2]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["actions"][5] == "turning left"
    assert [path.suffix for path in (folder / "pictures").iterdir()] == [".png"]
    # The checkpoint, tested by itself, and its file of detections, evaluated by itself, are worth the same.
    options = ["--test", "--json", "--weights", folder / "checkpoint.pt", "--out", tmp_path, "run.pictures=0"]
    done = run("detect_ava.py", *options)
    assert json.loads(done.stdout) == json.loads((tmp_path / "mAP.json").read_text()) == summary
    assert done.stdout.count("\n") == 1 and "detections.csv" in done.stderr
    files = {"--evaluate": tmp_path / "detections.csv", "--ground-truth": annotations / "ava_val_v2.2.csv"}
    files |= {"--labels": annotations / "ava_action_list_v2.2.pbtxt", "--out": tmp_path / "again.json"}
    files |= {"--exclude": annotations / "ava_val_excluded_timestamps_v2.2.csv"}
    run("detect_ava.py", *sum(files.items(), ()))
    assert json.loads((tmp_path / "again.json").read_text()) == summary
    # Only detections of the evaluated actions are written.
    (tmp_path / "some.pbtxt").write_text('item { name: "right" id: 1 } item { name: "shrinking" id: 8 }')
    done = run("detect_ava.py", *options, f"data.labels={tmp_path / 'some.pbtxt'}")
    assert {row.action for row in ava.read_detections(tmp_path / "detections.csv", 8)} == {1, 8}
    assert [action["name"] for action in json.loads(done.stdout)["actions"]] == ["right", "shrinking"]


def test_four_clips_are_memorized(toy_ava, tmp_path):
    """Trained and tested on the same four key frames, with ground-truth boxes, a detector reaches an mAP of 100 %."""
    rows = (toy_ava / "annotations/ava_train_v2.2.csv").read_text().splitlines()
    frames = sorted({tuple(row.split(",")[:2]) for row in rows})[:4]
    path = tmp_path / "four.csv"
    path.write_text("\n".join(row for row in rows if tuple(row.split(",")[:2]) in frames))
    values = dict(root=toy_ava, train=path, val=path, boxes=path, train_exclude="", val_exclude="", size=32)
    settings = ["init=scratch", *(f"data.{key}={value}" for key, value in values.items()), "data.short_side=32"]
    settings += ["data.frames=4", "data.stride=2"]
    settings += ["optim.batch_size=4", "optim.base_lr=0.2", "optim.epochs=150", "optim.warmup_epochs=10"]
    settings += ["optim.weight_decay=0", "data.workers=0", f"run.folder={tmp_path / 'run'}"]
    settings += ["run.pictures=0", "run.validate_every=0"]
    done = run("detect_ava.py", *settings)
    assert json.loads((tmp_path / "run/mAP.json").read_text())["mAP"] == pytest.approx(100), done.stdout


MISTAKES = [
    (["--test"], "--test needs --weights FILE"),
    (["--weights", "y.pt"], "--test needs --weights FILE"),
    (["--test", "--weights", "{weights}", "--out", "{tmp}/all.csv/x"], "results cannot be written into .*all.csv/x"),
    (["init=scratch", "data.val_exclude={tmp}/all.csv"], "or boxes/ava_val_predicted_boxes.csv has no person"),
    (["init=scratch", "data.val={tmp}/b.csv", "data.val_exclude={tmp}/a.csv"], "b.csv has no row of an action in "),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_mistakes_end_in_a_sentence_before_any_work(finished, toy_ava, tmp_path, words, sentence):
    keys = [row.split(",")[:2] for row in (toy_ava / "boxes/ava_val_predicted_boxes.csv").read_text().splitlines()]
    (tmp_path / "all.csv").write_text("".join(f"{video},{second}\n" for video, second in keys))
    (tmp_path / "a.csv").write_text("val_00000,0902\n")
    (tmp_path / "b.csv").write_text("val_00000,0902,0.1,0.1,0.5,0.5,1,0\n")
    words = [word.format(tmp=tmp_path, weights=finished("detect_ava") / "checkpoint.pt") for word in words]
    done = run("detect_ava.py", *words, f"data.root={toy_ava}", f"run.folder={tmp_path / 'run'}", ok=False)
    with pytest.raises(UserError, match=sentence):
        raise UserError(done.stderr)
    assert done.returncode and "Traceback" not in done.stderr and "testing" not in done.stderr
