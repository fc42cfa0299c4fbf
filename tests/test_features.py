"""tools/extract_features.py: frames of a window, what is kept of its tokens, files, processes, kills, mistakes."""

import gc
import os
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
import transformers
from conftest import run, run_with_signal
from videos import SIZE, broken_files, number_of, write_numbered

import data
import model as m
from support.config import UserError
from support.video import BrokenVideo
from support.weights import build_from_checkpoint
from tools.export_hugging_face import export
from tools.extract_features import result_files, windows

TOOL = "tools.extract_features"
PLAIN = dict(frames=4, stride=3, size=SIZE[1], window_stride=12, last="repeat")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two videos with the same name in two folders, 25 frames a second, and a short one."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in (("a/x.mp4", 40), ("b/x.mp4", 17), ("b/short.mkv", 3)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_numbered(folder / name, count, options={"g": "12"})
    return folder


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    model = m.VideoClassifier(**m.encoder_size("tiny"), clip_size=(8, 32, 32), cube=(1, 8, 8), classes=5)
    torch.nn.init.normal_(model.fc_norm.weight, 1, 0.1)
    torch.nn.init.normal_(model.fc_norm.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("fine_tuned") / "checkpoint.pt"
    config = dict(data=dict(frames=8, stride=4, size=32), model=dict(cube=[1, 8, 8]))
    torch.save(dict(model=model.state_dict(), model_options=model.options, config=config), path)
    return path


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
@pytest.mark.parametrize(
    "count, options, starts, last",
    [
        (34, {}, [0, 12, 24], None),  # the last frame is in a window
        (33, {}, [0, 12], [24, 27, 30, 30]),
        (33, {"last": "drop"}, [0, 12], None),
        (25, {}, [0, 12], [24, 24, 24, 24]),
        (23, {"window_stride": 5}, [0, 5, 10], [15, 18, 21, 21]),  # overlapping; 12 to 21 are the last whole ones
        (22, {"window_stride": 5}, [0, 5, 10], None),
        (43, {"window_stride": 20}, [0, 20], [40, 40, 40, 40]),  # frames between windows are in none
        (1, {"window_stride": 7}, [], [0, 0, 0, 0]),
        (9, {"stride": 1, "frames": 2, "window_stride": 1, "last": "drop"}, list(range(8)), None),
    ],
)
def test_frames_of_each_window_are_exact(tmp_path, monkeypatch, suffix, count, options, starts, last):
    """B-frames, several key frames, and in AVI no times. Crops keep a frame as it is, so that its number is read."""
    monkeypatch.setattr(data, "crop_views", lambda frames, size, crops: frames.clone()[None])
    path, options = write_numbered(tmp_path / f"a.{suffix}", count, options={"g": "10", "bf": "2"}), PLAIN | options
    expected = [[start + i * options["stride"] for i in range(options["frames"])] for start in starts]
    if last:
        expected.append(last)
    assert [[number_of(frame) for frame in clip] for clip, _ in windows(path, **options)] == expected


def test_a_video_without_a_whole_window_is_broken_if_the_last_is_dropped(tmp_path):
    with pytest.raises(BrokenVideo, match="its 9 frames do not fill a window; --last repeat would fill it"):
        next(windows(write_numbered(tmp_path / "a.mp4", 9), **PLAIN | dict(last="drop")))


def test_times_are_those_of_the_frames_even_at_a_changing_rate(tmp_path):
    shown = [10 * i + (300 if i > 15 else 0) for i in range(30)]  # ms
    path = write_numbered(tmp_path / "a.mkv", 30, times=shown)
    times = [(seconds[0], seconds[-1]) for _, seconds in windows(path, **PLAIN)]
    assert times == [(shown[a] / 1000, shown[b] / 1000) for a, b in ((0, 9), (12, 21), (24, 27))]


def test_pixels_are_those_of_a_test_view(tmp_path):
    path = write_numbered(tmp_path / "a.mp4", 8)
    [(clip, _)] = windows(path, **PLAIN | dict(size=48))
    view = data.TestViews([path], frames=4, stride=3, sampling="dense", size=48, clips=1, crops=1)[0][1]
    assert torch.equal(clip, view[0])


@pytest.mark.parametrize("window_stride, most", [(12, 4), (1, 10), (100, 4)])
def test_few_frames_are_in_memory(tmp_path, window_stride, most):
    """At any window of a long video at most `most` cropped frames are alive, and one or two decoded ones."""
    path, alive = write_numbered(tmp_path / "a.mp4", 240, size=(74, 74)), []
    for number, _ in enumerate(windows(path, **PLAIN | dict(size=37, window_stride=window_stride))):
        if number in (2, 17, 75, 230):
            shapes = [each.shape for each in gc.get_objects() if type(each) is torch.Tensor]
            alive.append(shapes.count((3, 37, 37)))
            assert shapes.count((3, 74, 74)) <= 2
    assert 4 <= max(alive) <= most


def keep_of(tokens: torch.Tensor, keep: str) -> torch.Tensor:
    """What is kept of tokens (B, 128, D), 8 times of 4 x 4 places."""
    if keep == "mean":
        return tokens.sum(1) / 128
    return tokens.view(len(tokens), 8, 16, -1).sum(2) / 16 if keep == "time" else tokens


@torch.no_grad()
@pytest.mark.parametrize("keep, shape", [("mean", ()), ("time", (8,)), ("tokens", (128,))])
def test_features_equal_transformers(videos, pretrained, fine_tuned, tmp_path, keep, shape):
    """Pre-trained, with the last norm; fine-tuned, with fc_norm of what is kept: for the mean, what the head sees."""
    export(build_from_checkpoint(pretrained, m.VideoMAE), tmp_path / "hf", True, [])
    theirs = transformers.VideoMAEModel.from_pretrained(tmp_path / "hf").eval()
    options = dict(frames=8, stride=2, size=32, window_stride=6, last="repeat")
    clips = data.normalize(torch.stack([clip for clip, _ in windows(videos / "a/x.mp4", **options)]))
    expected = keep_of(theirs(clips.transpose(1, 2)).last_hidden_state, keep)
    more = ["--keep", keep, "--window-stride", "6", "data.frames=8", "data.size=32", "data.stride=2"]
    more += ["run.batch_per_device=4", "--out"]
    for weights in (pretrained, tmp_path / "hf"):
        run(TOOL, videos / "a/x.mp4", "--weights", weights, *more, tmp_path / weights.name)
        stored = read(tmp_path / weights.name / "x.npz")
        assert stored["features"].shape == (5, *shape, 128) and stored["features"].dtype == np.float32
        assert np.abs(stored["features"] - expected.numpy()).max() < 1e-5 and expected.std() > 0.1
        assert stored["start"].tolist() == pytest.approx([0, 0.24, 0.48, 0.72, 0.96])
        assert stored["end"].tolist() == pytest.approx([0.56, 0.8, 1.04, 1.28, 1.52])
        settings = options | dict(keep=keep, video=str(videos / "a/x.mp4"), weights=str(weights))
        assert all(stored[key] == value for key, value in settings.items())

    classifier = build_from_checkpoint(fine_tuned, m.VideoClassifier).eval()
    run(TOOL, videos / "a/x.mp4", "--weights", fine_tuned, *more, tmp_path / "tuned")
    features = torch.from_numpy(read(tmp_path / "tuned/x.npz")["features"])
    assert (features - classifier.fc_norm(keep_of(classifier.encoder(clips), keep))).abs().max() < 1e-5
    if keep == "mean":
        assert (classifier.head(features) - classifier(clips)).abs().max() < 1e-6 and features.std() > 0.5


def test_weights_of_every_kind(videos, pretrained, fine_tuned, tmp_path):
    """The clips are those of the training, or of overrides, or of the Kinetics recipe. The file decides the norm."""
    state, tuned = (torch.load(path)["model"] for path in (pretrained, fine_tuned))
    heads = dict(weight=torch.zeros(5, 128), bias=torch.zeros(5))
    torch.save(dict(heads=heads, step=1, config=dict(init=str(pretrained))), tmp_path / "probe.pt")
    encoder = {key: state[key] for key in state if key.startswith("encoder.")}
    torch.save(encoder | {"head.weight": heads["weight"]}, tmp_path / "detector.pth")
    torch.save({"module": {key.removeprefix("encoder."): tuned[key] for key in tuned}}, tmp_path / "official.pth")
    settings = ["data.frames=8", "data.size=32", "data.stride=2", "data.workers=0"]
    settings += ["model.pretrained_clip=[8,32,32]", "model.cube=[1,8,8]"]

    def features(weights: Path, settings: list[str]) -> np.ndarray:
        out = tmp_path / f"{weights.name} {len(settings)}"
        done = run(TOOL, videos / "a/x.mp4", "--weights", weights, "--out", out, *settings)
        assert "another version" not in done.stderr
        return read(out / "x.npz")["features"]

    expected = features(pretrained, settings)
    assert np.array_equal(features(tmp_path / "probe.pt", settings), expected)
    assert np.array_equal(features(tmp_path / "detector.pth", settings), expected)
    official = features(tmp_path / "official.pth", settings[:2] + settings[3:])  # Kinetics' stride is 4
    assert np.array_equal(features(fine_tuned, []), official)  # as its configuration's: a window has 32 frames
    assert official.shape == (2, 128) and not np.allclose(official, expected[:2])


def test_files_of_a_folder_and_two_processes(videos, pretrained, tmp_path):
    """One file per video, below --out as below the folder; the same by two processes."""
    words = ["--weights", pretrained, "data.frames=8", "data.stride=1", "--out"]
    run(TOOL, videos / "a/x.mp4", *words, tmp_path / "one", videos)  # named twice
    done = run(TOOL, videos, *words, tmp_path / "two", processes=2)
    assert "8 windows [" in done.stderr and "9 windows [" not in done.stderr  # rank 0: the first and the third video
    counts = {"a/x.npz": 5, "b/short.npz": 1, "b/x.npz": 3}
    for name, count in counts.items():
        one, two = read(tmp_path / "one" / name), read(tmp_path / "two" / name)
        assert one["features"].shape == (count, 128) and one.keys() == two.keys()
        assert np.allclose(one.pop("features"), two.pop("features"), atol=1e-6)
        assert all(np.array_equal(one[key], two[key]) for key in one)
    files = sorted(path for path in (tmp_path / "two").rglob("*") if path.is_file())
    assert [path.relative_to(tmp_path / "two").as_posix() for path in files] == list(counts)


def test_a_killed_run_resumes_at_the_next_video(videos, pretrained, tmp_path):
    words = [videos, "--weights", pretrained, "--out", tmp_path, "data.stride=1"]
    run_with_signal(".npz 2 SIGKILL itself", TOOL, *words)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(done) == 1 and len(list(tmp_path.rglob("*.part"))) == 1
    run(TOOL, *words)
    assert len(list(tmp_path.rglob("*.npz"))) == 3 and not list(tmp_path.rglob("*.part"))
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())  # not done again


def test_broken_videos_are_named_and_the_others_done(pretrained, tmp_path):
    """Names need not be UTF-8 and may have 255 bytes, and the second time all is done."""
    files = broken_files(tmp_path / "videos").values()
    name = os.fsdecode(b"caf\xe9.b" + 245 * b"x")
    good = write_numbered(tmp_path / "a.mp4", 30).rename(tmp_path / "videos" / f"{name}.mp4")
    words = ["--weights", pretrained, "data.stride=2", *files]
    for _ in range(2):
        done = run(TOOL, *words, good, "--out", tmp_path / "out")
        assert all(f"cannot be read: {path}: " in done.stderr for path in files)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}.npz"]
        last = f"{tmp_path / 'out'}: features of 1 videos, {len(files)} cannot be read. Next: "
        assert done.stderr.splitlines()[-1].startswith(last)
    done = run(TOOL, *words, "--out", tmp_path / "none", ok=False)
    assert done.returncode == 1 and "none of the videos can be read" in done.stderr


def test_folders_of_features_are_those_of_the_videos_on_one_drive_alone():
    one, other, far = map(PureWindowsPath, ("C:/a/x.mp4", "c:/A/b/x.mp4", "D:/a/x.mp4"))
    out = PureWindowsPath("out")
    assert result_files([one, other, one], out) == {out / "x.npz": one, out / "b/x.npz": other}
    with pytest.raises(UserError, match="the videos are on different drives"):
        result_files([one, far], out)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--weights", "none.pt"], "no weights at none.pt"),
        (["--window-stride", "0"], "--window-stride 0 has to be at least 1"),
        (["data.frames=7", "model.cube=[2,8,8]"], "a clip of 7 frames is not a whole number of cubes"),
        (["data.frames=8", "model.cube=[2,8,8]"], "does not fit this LinearProbe"),
        (["y.mp4", "y.avi"], "differ only in their suffix"),
    ],
)
def test_mistakes_end_in_a_sentence(videos, pretrained, tmp_path, words, sentence):
    done = run(TOOL, videos / "b/short.mkv", "--weights", pretrained, "--out", tmp_path / "out", *words, ok=False)
    assert done.returncode == 1 and sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_settings_weights_or_videos_are_not_mixed_into_a_folder(videos, pretrained, tmp_path):
    words = ["data.frames=8", "data.stride=2", "--out", tmp_path, "--weights", pretrained]
    run(TOOL, videos / "a/x.mp4", *words)
    before = (tmp_path / "x.npz").read_bytes()
    learned = torch.load(pretrained) | dict(positions=torch.randn(8 * 4 * 4, 128))
    torch.save(learned, tmp_path / "learned.pt")
    for video, more, sentence in (
        ("a/x.mp4", ["--keep", "time"], "was made with keep=mean, not time: delete it or give another --out"),
        ("a/x.mp4", ["data.stride=3"], "was made with stride=2, not 3; window_stride=16, not 24:"),
        ("a/x.mp4", ["--weights", tmp_path / "learned.pt"], "was made with checksum_of_weights="),
        ("b/x.mp4", [], f"was made with video={videos / 'a/x.mp4'}, not {videos / 'b/x.mp4'}:"),
    ):
        done = run(TOOL, videos / video, *words, *more, ok=False)
        assert done.returncode == 1 and f"x.npz {sentence}" in done.stderr.splitlines()[-1]
    assert (tmp_path / "x.npz").read_bytes() == before
