"""probe.py --features: which frames a window holds, what is kept of its tokens, files, processes, kills, mistakes."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import command, run, run_with_signal
from videos import SIZE, broken_files, number_of, write_numbered

import data
import model as m
import probe
import support.video
from detect_ava import ActionDetector
from support.config import load_config
from support.features import windows
from support.video import BrokenVideo
from support.weights import build_from_checkpoint, export_hugging_face, to_hugging_face

PLAIN = dict(frames=4, stride=3, size=SIZE[1], window_stride=12, last="repeat")


def numbers(path: Path, **options: object) -> list[list[int]]:
    """The numbers that the frames of each window show, if `whole_width` is there."""
    return [[number_of(frame) for frame in clip] for clip, _ in windows(path, **PLAIN | options)]


@pytest.fixture
def whole_width(monkeypatch):
    """Crops that keep a frame as it is, so that its number can be read."""
    monkeypatch.setattr(data, "crop_views", lambda frames, size, crops: frames.clone()[None])


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two videos with the same name in two folders, 25 frames a second, and a short one."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in (("a/x.mp4", 40), ("b/x.mp4", 17), ("b/short.mkv", 3)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_numbered(folder / name, count, options={"g": "12"})
    return folder


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory, pretrained) -> Path:
    torch.manual_seed(1)
    model = m.VideoClassifier(**m.encoder_size("tiny"), clip_size=(8, 64, 64), classes=5)
    with torch.no_grad():
        model.fc_norm.weight.add_(0.1 * torch.randn(128)), model.fc_norm.bias.add_(0.1 * torch.randn(128))
    path = tmp_path_factory.mktemp("fine_tuned") / "checkpoint.pt"
    config = dict(data=dict(frames=8, stride=4, size=64), model=dict(cube=[2, 16, 16]))
    torch.save(dict(model=model.state_dict(), model_options=model.options, config=config), path)
    return path


def features(out: Path, *words: object, processes: int = 0, ok: bool = True):
    return run("probe.py", "--out", out, *words, processes=processes, ok=ok)


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def clips_of(path: Path, **options: int) -> torch.Tensor:
    """All windows of a video, normalized, as transformers takes them: (windows, T, 3, H, W)."""
    clips = torch.stack([clip for clip, _ in windows(path, **options)])
    return data.normalize(clips).transpose(1, 2)


# ---- windows ----


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
@pytest.mark.parametrize(
    "count, options, starts, last",
    [
        (36, {}, [0, 12, 24], None),  # all of it, without a rest
        (34, {}, [0, 12, 24], None),  # the last frame is in a window
        (33, {}, [0, 12], [24, 27, 30, 30]),
        (33, {"last": "drop"}, [0, 12], None),
        (25, {}, [0, 12], [24, 24, 24, 24]),
        (23, {"window_stride": 5}, [0, 5, 10], [15, 18, 21, 21]),  # overlapping; 12 to 21 are the last whole ones
        (22, {"window_stride": 5}, [0, 5, 10], None),
        (22, {"window_stride": 1}, list(range(13)), None),
        (30, {"window_stride": 5, "last": "drop"}, [0, 5, 10, 15, 20], None),
        (40, {"window_stride": 20}, [0, 20], None),  # frames between windows are in none
        (43, {"window_stride": 20}, [0, 20], [40, 40, 40, 40]),
        (5, {}, [], [0, 3, 3, 3]),
        (1, {"window_stride": 7}, [], [0, 0, 0, 0]),
        (9, {"stride": 1, "frames": 2, "window_stride": 1, "last": "drop"}, list(range(8)), None),
    ],
)
def test_frames_of_each_window_are_exact(whole_width, tmp_path, suffix, count, options, starts, last):
    """B-frames, several key frames, and in AVI no times."""
    path = write_numbered(tmp_path / f"a.{suffix}", count, options={"g": "10", "bf": "2"})
    frames, stride = ({**PLAIN, **options}[key] for key in ("frames", "stride"))
    expected = [[start + i * stride for i in range(frames)] for start in starts] + ([last] if last else [])
    assert numbers(path, **options) == expected


def test_a_video_without_a_whole_window_is_named_if_the_last_is_dropped(tmp_path):
    path = write_numbered(tmp_path / "a.mp4", 9)
    with pytest.raises(BrokenVideo, match="a.mp4: its 9 frames do not fill a window; --last repeat would fill it"):
        numbers(path, last="drop")


def test_start_and_end_are_those_of_the_frames_even_at_a_changing_rate(tmp_path):
    shown = [10 * i + (300 if i > 15 else 0) for i in range(30)]  # ms
    path = write_numbered(tmp_path / "a.mkv", 30, times=shown)
    found = [times for _, times in windows(path, **PLAIN)]
    assert found == [(shown[a] / 1000, shown[b] / 1000) for a, b in ((0, 9), (12, 21), (24, 27))]


@pytest.mark.parametrize("size", [48, 64])
def test_pixels_are_those_of_a_test_view(tmp_path, size):
    """In the middle of its windows, also of a video too short for one."""
    for count in (12, 8):
        path = write_numbered(tmp_path / f"{count}.mp4", count)
        (clip, _), *more = windows(path, **PLAIN | dict(size=size))
        view = data.TestViews([path], frames=4, stride=3, sampling="dense", size=size, clips=1, crops=1)[0][1]
        assert not more and torch.equal(clip, view[0])


@pytest.mark.parametrize("window_stride, most", [(12, 4), (3, 4), (1, 10), (5, 10), (100, 4)])
def test_frames_in_memory_do_not_depend_on_the_length_and_each_is_decoded_once(
    tmp_path, monkeypatch, window_stride, most
):
    """At any window at most `most` cropped frames are alive, and one or two decoded ones."""
    path, decoded = write_numbered(tmp_path / "a.mp4", 240, size=(74, 74)), []
    original = support.video.Video.every_frame

    def every_frame(video):
        for frame in original(video):
            decoded.append(1)
            yield frame

    monkeypatch.setattr(support.video.Video, "every_frame", every_frame)
    alive = []
    for number, _ in enumerate(windows(path, **PLAIN | dict(size=37, window_stride=window_stride))):
        if number in (2, 17, 75, 230):
            shapes = [each.shape for each in gc.get_objects() if type(each) is torch.Tensor]
            alive.append(shapes.count((3, 37, 37)))
            assert shapes.count((3, 74, 74)) <= 2
    assert 4 <= max(alive) <= most and len(decoded) <= 240


# ---- features ----


def kept(hidden: torch.Tensor, keep: str) -> torch.Tensor:
    """What is kept of tokens (B, 64, D), 4 times of 4 x 4 places."""
    if keep == "mean":
        return hidden.sum(1) / 64
    return hidden.view(len(hidden), 4, 16, -1).sum(2) / 16 if keep == "time" else hidden


@pytest.mark.parametrize("keep", ["mean", "time", "tokens"])
def test_features_equal_transformers(videos, pretrained, fine_tuned, tmp_path, keep):
    """Pre-trained, with the last norm; fine-tuned, with fc_norm of what is kept: for the mean, what the head sees."""
    export_hugging_face(build_from_checkpoint(pretrained, m.VideoMAE), tmp_path / "hf")
    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "hf").eval()
    options = dict(frames=8, stride=2, size=64, window_stride=6, last="repeat")
    clips = clips_of(videos / "a/x.mp4", **options)
    with torch.no_grad():
        expected = kept(theirs(clips).last_hidden_state, keep)
    more = ["--keep", keep, "--window-stride", "6", "data.stride=2", "run.batch_per_device=4"]
    for name, weights in (("own", pretrained), ("hub", tmp_path / "hf")):
        features(tmp_path / name, "--features", videos / "a/x.mp4", "--weights", weights, *more)
        found = read(tmp_path / name / "x.npz")
        assert found["features"].shape == (5, *{"mean": (), "time": (4,), "tokens": (64,)}[keep], 128)
        assert found["features"].dtype == np.float32
        assert np.abs(found["features"] - expected.numpy()).max() < 1e-5 and expected.std() > 0.1
        assert found["start"].tolist() == pytest.approx([0, 0.24, 0.48, 0.72, 0.96])
        assert found["end"].tolist() == pytest.approx([0.56, 0.8, 1.04, 1.28, 1.52])
        assert found["window_stride"] == 6 and found["keep"] == keep and found["weights"] == str(weights)
        assert found["video"] == str(videos / "a/x.mp4") and found["frames"] == 8 and found["last"] == "repeat"

    classifier = build_from_checkpoint(fine_tuned, m.VideoClassifier).eval()
    features(tmp_path / "tuned", "--features", videos / "a/x.mp4", "--weights", fine_tuned, *more)
    found = torch.from_numpy(read(tmp_path / "tuned/x.npz")["features"])
    with torch.no_grad():
        hidden, logits = classifier.encoder(clips.transpose(1, 2)), classifier(clips.transpose(1, 2))
        assert (found - classifier.fc_norm(kept(hidden, keep))).abs().max() < 1e-5
        if keep == "mean":
            assert (classifier.head(found) - logits).abs().max() < 1e-6 and found.std() > 0.5


def test_weights_of_every_kind_give_the_same_features(videos, pretrained, fine_tuned, tmp_path):
    """Official, Hugging Face's, a probe's checkpoint; the clips are those of the training, or by override."""
    state, tuned = (torch.load(path, weights_only=True)["model"] for path in (pretrained, fine_tuned))
    torch.save({"model": state}, tmp_path / "official.pth")
    torch.save(to_hugging_face(state), tmp_path / "hub.bin")
    torch.save({"module": {key.removeprefix("encoder."): tuned[key] for key in tuned}}, tmp_path / "official_tuned.pth")
    torch.save(to_hugging_face(tuned), tmp_path / "hub_tuned.bin")
    heads = dict(weight=torch.zeros(5, 128), bias=torch.zeros(5))
    torch.save(dict(heads=heads, step=1, config=dict(init=str(pretrained))), tmp_path / "probe.pt")
    elsewhere = ["data.frames=8", "data.size=64", "data.stride=2", "model.pretrained_clip=[8,64,64]", "data.workers=0"]
    for reference, others in (
        (pretrained, ["official.pth", "hub.bin", "probe.pt"]),
        (fine_tuned, ["official_tuned.pth", "hub_tuned.bin"]),
    ):
        found = []
        for weights in (reference, *(tmp_path / name for name in others)):
            out = tmp_path / f"features of {weights.name} {weights.parent.name}"
            features(out, "--features", videos / "a/x.mp4", "--weights", weights, *elsewhere)
            found.append(read(out / "x.npz")["features"])
        assert found[0].shape == (3, 128) and all(np.array_equal(each, found[0]) for each in found)

    # what has no encoder of the same weights to compare with: image models and detectors, as the linear probe sees them
    image = {key: value for key, value in state.items() if key.startswith("encoder.") and "_bias" not in key}
    image |= {f"encoder.blocks.{i}.attn.qkv.bias": torch.zeros(384) for i in range(4)}
    image |= {"encoder.patch_embed.proj.weight": image["encoder.patch_embed.proj.weight"][:, :, 0]}
    image |= {"pos_embed": torch.randn(1, 1 + 16, 128), "cls_token": torch.zeros(1, 1, 128)}
    torch.save(image | {"head.weight": torch.zeros(9, 128), "head.bias": torch.zeros(9)}, tmp_path / "image.pth")
    detector = ActionDetector(**m.encoder_size("tiny"), classes=3, clip_size=(8, 64, 64))
    torch.save(dict(model=detector.state_dict(), model_options=detector.options), tmp_path / "detector.pt")
    clip = clips_of(videos / "a/x.mp4", frames=8, stride=2, size=64, window_stride=16, last="repeat").transpose(1, 2)
    for name in ("image.pth", "detector.pt"):
        features(tmp_path / name[:-3], "--features", videos / "a/x.mp4", "--weights", tmp_path / name, *elsewhere)
        config = load_config(probe.DEFAULT, [f"init={tmp_path / name}", *elsewhere])
        expected = probe.build(config, 3)["pre-trained"].features(clip)
        assert np.abs(read(tmp_path / name[:-3] / "x.npz")["features"] - expected.numpy()).max() < 1e-5

    done = features(tmp_path / "as trained", "--features", videos / "a/x.mp4", "--weights", fine_tuned)
    assert read(tmp_path / "as trained/x.npz")["window_stride"] == 8 * 4  # the stride of its configuration
    assert "another version" not in done.stderr


# ---- files, processes, kills ----


def test_files_of_a_folder_and_two_processes(videos, pretrained, tmp_path):
    """One file per video, below --out as below the folder; the same by two processes; no second time."""
    words = ["--features", videos, "--weights", pretrained, "data.stride=1"]
    features(tmp_path / "one", *words)
    features(tmp_path / "two", *words, processes=2)
    names = ["a/x.npz", "b/short.npz", "b/x.npz"]
    windows = dict(zip(names, (5, 1, 3), strict=True))
    for name in names:
        one, two = read(tmp_path / "one" / name), read(tmp_path / "two" / name)
        assert one["features"].shape == (windows[name], 128) and one.keys() == two.keys()
        assert np.allclose(one.pop("features"), two.pop("features"), atol=1e-6)
        assert all(np.array_equal(one[key], two[key]) for key in one)
    assert [path.relative_to(tmp_path / "two").as_posix() for path in sorted((tmp_path / "two").rglob("*.*"))] == names

    times = {name: (tmp_path / "one" / name).stat().st_mtime_ns for name in names}
    (tmp_path / "one" / names[1]).unlink()
    features(tmp_path / "one", *words, "--features", videos / "a/x.mp4", videos)  # named twice
    changed = [name for name in names if (tmp_path / "one" / name).stat().st_mtime_ns != times[name]]
    assert changed == [names[1]]


def test_a_killed_run_resumes_at_the_next_video(pretrained, tmp_path):
    first = write_numbered(tmp_path / "00.mp4", 120)
    for number in range(1, 5):
        (tmp_path / f"{number:02}.mp4").write_bytes(first.read_bytes())
    out = tmp_path / "out"
    words = ["--features", *sorted(tmp_path.glob("*.mp4")), "--weights", pretrained, "--out", out]
    words += ["--window-stride", "2", "--keep", "tokens"]
    run_with_signal(command("probe.py", *words), ".npz 3 SIGKILL itself", probe.DEFAULT.parents[2])
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert len(there) == 2 and list(out.glob("*.part"))
    run("probe.py", *words)
    assert len(list(out.glob("*.npz"))) == 5 and not list(out.glob("*.part"))
    assert all(path.stat().st_mtime_ns == before for path, before in there.items())  # not done again
    shapes = {read(path)["features"].shape for path in out.glob("*.npz")}
    assert shapes == {(53, 64, 128)}


def test_broken_videos_are_named_and_the_others_done(pretrained, tmp_path):
    files = broken_files(tmp_path / "videos")
    good = write_numbered(tmp_path / "videos/good.mp4", 30)
    words = ["--weights", pretrained, "data.stride=2", "--features"]
    done = features(tmp_path / "out", *words, *files.values(), good)
    assert all(f"cannot be read: {path}: " in done.stderr for path in files.values())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.npz"]
    done = features(tmp_path / "none", *words, *files.values(), ok=False)
    assert done.returncode == 1 and "none of the videos can be read" in done.stderr


def test_names_need_not_be_utf8(pretrained, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.b.mp4")
    write_numbered(tmp_path / "a.mp4", 8).rename(path)
    features(tmp_path / "out", "--features", path, "--weights", pretrained)
    features(tmp_path / "out", "--features", path, "--weights", pretrained)
    assert read(tmp_path / "out" / os.fsdecode(b"caf\xe9.b.npz"))["video"] == str(path)


# ---- mistakes ----


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--features", "VIDEO"], "--features VIDEO..., --weights FILE and --out FOLDER go together"),
        (["--weights", "WEIGHTS"], "--features VIDEO..., --weights FILE and --out FOLDER go together"),
        (["--keep", "time"], "--features VIDEO..., --weights FILE and --out FOLDER go together"),
        (["--features", "VIDEO", "--weights", "none.pt", "--out", "OUT"], "no weights at none.pt"),
        (["ALL", "--window-stride", "0"], "--window-stride 0 has to be at least 1"),
        (["ALL", "--window-stride", "two"], "--window-stride: invalid int value: 'two'"),
        (["ALL", "--keep", "max"], "--keep: invalid choice: 'max'"),
        (["ALL", "--last", "pad"], "--last: invalid choice: 'pad'"),
        (["ALL", "data.frames=7"], "a clip of 7 frames is not a whole number of cubes"),
        (["ALL", "optim.layer_decay=1"], "unknown key 'optim.layer_decay'"),
        (["ALL", "model.cube=[2,8,8]"], "does not fit this LinearProbe"),
    ],
)
def test_mistakes_end_in_a_sentence(videos, pretrained, tmp_path, words, sentence):
    every = ["--features", videos / "b/short.mkv", "--weights", pretrained, "--out", tmp_path / "out"]
    places = {"VIDEO": every[1:2], "WEIGHTS": every[3:4], "OUT": every[5:], "ALL": every}
    done = run("probe.py", *(part for word in words for part in places.get(word, [word])), ok=False)
    assert done.returncode in (1, 2) and sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_settings_weights_or_videos_are_not_mixed_into_a_folder(videos, pretrained, fine_tuned, tmp_path):
    words = ["--features", videos / "a/x.mp4", "--weights", pretrained, "data.stride=2"]
    features(tmp_path, *words)
    before = read(tmp_path / "x.npz")
    for more, sentence in (
        (["--keep", "time"], "was made with keep=mean, not time: delete it or give another --out"),
        (["--window-stride", "8"], "was made with window_stride=16, not 8:"),
        (["data.stride=3"], "was made with stride=2, not 3; window_stride=16, not 24:"),
        (["--features", videos / "b/x.mp4"], f"was made with video={videos / 'a/x.mp4'}, not {videos / 'b/x.mp4'}:"),
        (["--weights", fine_tuned], "was made with checksum_of_weights="),
    ):
        done = features(tmp_path, *words, *more, ok=False)
        assert done.returncode == 1 and f"x.npz {sentence}" in done.stderr.splitlines()[-1]
    assert all(np.array_equal(before[key], value) for key, value in read(tmp_path / "x.npz").items())

    (tmp_path / "x.npz").write_text("not features")
    done = features(tmp_path, *words, ok=False)
    assert done.returncode == 1 and "x.npz holds no features" in done.stderr.splitlines()[-1]
    for name in ("y.mp4", "y.avi"):
        (tmp_path / name).touch()
    done = features(tmp_path, *words, "--features", tmp_path / "y.mp4", tmp_path / "y.avi", ok=False)
    assert done.returncode == 1 and "differ only in their suffix" in done.stderr.splitlines()[-1]
