"""The toy videos: reproducible, finished after an interruption, and of a class that only motion tells."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import support.datasets
import support.video
from support import toy
from support.config import UserError


def test_files_are_real_videos_and_reproducible(toy_videos, tmp_path):
    videos = support.datasets.list_videos(str(toy_videos), "train")
    assert len(videos) == 24 and {path.parent.name for path in videos} == set(toy.CLASSES)
    assert (toy_videos / "classes.txt").read_text().splitlines() == list(toy.CLASSES)
    again = toy.render(tmp_path / "again", {"train": 24, "val": 8})
    for path in videos:
        assert path.read_bytes() == (again / path.relative_to(toy_videos)).read_bytes()
    assert support.video.read_frames(videos[0], [0, toy.FRAMES - 1]).shape == (2, 3, toy.SIZE, toy.SIZE)


def test_rendering_is_never_repeated_and_other_settings_are_refused(toy_videos):
    before = {path: path.stat().st_mtime_ns for path in toy_videos.rglob("*.mp4")}
    toy.render(toy_videos, {"train": 24, "val": 8})
    assert before == {path: path.stat().st_mtime_ns for path in toy_videos.rglob("*.mp4")}
    with pytest.raises(UserError, match="other settings"):
        toy.render(toy_videos, {"train": 32, "val": 8})


def test_an_interrupted_rendering_is_finished(tmp_path):
    folder = tmp_path / "videos"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from support import toy; from pathlib import Path; toy.render(Path({str(folder)!r}), {{'train': 160, 'val': 8}})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    while len(list(folder.rglob("*.mp4"))) < 20:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    whole = list(folder.rglob("*.mp4"))
    assert 20 <= len(whole) < 168 and not (folder / "classes.txt").exists()
    toy.render(folder, {"train": 160, "val": 8})
    videos = support.datasets.list_videos(str(folder), "")
    assert len(videos) == 168 and all(len(support.video.Video(path)) == toy.FRAMES for path in videos)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted([*videos, folder / "classes.txt", folder / "settings.json"])


@pytest.mark.parametrize("motion", toy.CLASSES)
def test_the_shape_moves_as_the_class_says_and_nothing_else_changes(motion):
    right = ("right" in motion) - ("left" in motion)
    down = ("down" in motion) - ("up" in motion)
    for seed in range(20):
        x, y, turn, size = toy.trajectory(motion, torch.Generator().manual_seed(seed))
        assert not turn.diff().any() and not size.diff().any()
        speed = torch.hypot(x.diff(), y.diff())
        assert 2.49 < float(speed.min()) and float(speed.max()) < 4.01 and float(speed.max() - speed.min()) < 1e-3
        way = torch.tensor([right, down]) / (abs(right) + abs(down)) ** 0.5
        assert torch.allclose(torch.stack([x.diff(), y.diff()], 1) / speed[:, None], way.expand(23, 2), atol=1e-3)


def test_a_single_frame_does_not_tell_the_class():
    """In every frame, position, angle and size are distributed as in every other frame and class."""
    quantiles = torch.linspace(0.05, 0.95, 10)
    for motion in toy.CLASSES:
        generator = torch.Generator().manual_seed(1)
        x, y, turn, size = (torch.stack(of_clip) for of_clip in zip(*(toy.trajectory(motion, generator) for _ in range(3000))))
        for frame in (0, 11, toy.FRAMES - 1):
            state = [x[:, frame] % toy.SIZE / toy.SIZE, y[:, frame] % toy.SIZE / toy.SIZE, turn[:, frame] % 1, (size[:, frame] - 11) / 11]
            found = torch.stack([part.quantile(quantiles) for part in state])  # all four uniform in [0, 1]
            assert (found - quantiles).abs().max() < 5 * 0.5 / 3000**0.5, (motion, frame)


@pytest.mark.parametrize("motion", toy.CLASSES)
def test_shapes_are_drawn_where_the_trajectory_says(motion):
    """Two frames differ inside the circles around their two positions, and nowhere else."""
    clip = 255 * toy.render_clip(motion, torch.Generator().manual_seed(7)).permute(0, 3, 1, 2)  # (T, 3, H, W)
    x, y, _, size = toy.trajectory(motion, torch.Generator().manual_seed(7))
    rows, columns = torch.meshgrid(torch.arange(toy.SIZE) + 0.5, torch.arange(toy.SIZE) + 0.5, indexing="ij")

    def circle(t: int) -> torch.Tensor:
        dx, dy = ((d + 32) % 64 - 32 for d in (columns - x[t], rows - y[t]))
        return dx**2 + dy**2 <= (size[t] + 1) ** 2

    for t in (5, 8, 12):  # before a shape has crossed the frame and come back to where it was
        changed = (clip[t] - clip[0]).abs().amax(0) > 2
        assert changed.any() and not (changed & ~circle(t) & ~circle(0)).any()
        # the shape has left where it was: its first place is background now
        assert (changed & circle(0) & ~circle(t)).any() or (circle(0) == circle(t)).all()
