"""The toy videos: reproducible, finished after an interruption, of a class that motion alone tells."""

import itertools
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run, run_processes, run_with_signal

from support import datasets, toy
from support import toy_ava as ava
from support.config import UserError
from support.seeds import sample_generator
from support.video import Video, read_frames


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read_rows(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "kind, render, train, val, lost",
    [
        ("toy_videos", toy.render, 24, 8, ["classes.txt", "train/horizontal/00008.mp4"]),
        ("toy_ava", ava.render, 6, 3, ["annotations/ava_action_list_v2.2.pbtxt", "videos/val_00002.mp4"]),
    ],
)
def test_videos_are_reproducible_and_finished_after_an_interruption(kind, render, train, val, lost, request, tmp_path):
    original, again, videos = request.getfixturevalue(kind), tmp_path / "again", {"train": train, "val": val}
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    assert len(files) == {"toy_videos": 32 + 5, "toy_ava": 9 + 2 * 3 + 3}[kind]
    shutil.copytree(original, again)
    for name in lost:
        (again / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in again.rglob("*.mp4")}
    render(again, videos)
    assert all((again / path).read_bytes() == (original / path).read_bytes() for path in files)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    assert kept.items() <= before.items()
    (again / ".lock").unlink()
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    render(again, videos)  # complete: nothing is written, which may not be allowed
    assert before == {path: path.stat().st_mtime_ns for path in again.rglob("*")}
    for others in ((videos | {"val": 16}, 0), (videos, 1)):
        with pytest.raises(UserError, match="other settings"):
            render(again, *others)
    other = render(tmp_path / "other", {"train": 3, "val": 0}, seed=1)
    for path in other.rglob("*.mp4"):
        assert path.read_bytes() != (original / path.relative_to(other)).read_bytes()


def test_files_hold_what_was_rendered(toy_videos, toy_ava):
    """Frame by frame, and boxes at the seconds that their rows name."""
    generator = sample_generator(0, 0, 2)
    scene, shapes = ava.render_scene(generator)
    for path, clip in (
        (toy_videos / "train/horizontal/00008.mp4", toy.render_clip("horizontal", "diamond", seeded(8))),
        (toy_ava / "videos/train_00002.mp4", scene),
    ):
        frames = read_frames(path, list(range(len(clip)))) / 255
        assert (frames - clip[:, None]).abs().mean(dim=(1, 2, 3)).max() < 0.02
    rows = [row for row in read_rows(toy_ava / "annotations/ava_train_v2.2.csv") if row[0] == "train_00002"]
    for _, second, *box, action, person in rows:
        actions, boxes = shapes[int(person)]
        frame = (int(second) - 900) * 12
        assert [*map(float, box)] == pytest.approx(boxes[frame].clamp(0, 1).tolist(), abs=6e-4)
        assert [*ava.ACTIONS][int(action) - 1] in actions[frame]
    assert len(rows) > 4


def test_a_killed_rendering_is_finished_and_of_two_at_once_one_waits(tmp_path):
    folder = tmp_path / "videos"
    render = partial(toy.render, folder, {"train": 104, "val": 8})  # enough for two processes
    run_with_signal(".mp4 8 SIGKILL group", render)
    assert 7 <= len(list(folder.rglob("*.mp4"))) < 16 and not (folder / "classes.txt").exists()
    assert list(folder.rglob("*.part"))  # one was whole, but not yet renamed
    done = run_processes(render, processes=2)
    assert done.returncode == 0 and done.stderr.count(" 0/112") == 1
    found = datasets.list_videos(str(folder), "")
    assert len(found) == 112 and all(len(Video(path)) == toy.FRAMES for path in found)
    names = {path.name for path in folder.rglob("*") if path.suffix != ".mp4" and path.is_file()}
    assert names == {"classes.txt", "settings.json", ".lock", "shapes_train.csv", "shapes_val.csv"}


def test_a_process_that_is_killed_ends_the_rendering_in_a_sentence(tmp_path):
    printed = run_with_signal(".mp4 8 SIGKILL itself", "tools.render_toy", tmp_path)
    assert "a process was killed, perhaps for lack of memory: make room, then" in printed


def test_a_configuration_without_a_root_gets_the_toy_videos(monkeypatch):
    for module in (toy, ava):
        monkeypatch.setattr(module, "render", lambda folder: folder)
    own, none = (SimpleNamespace(root=root, train="a", val="b") for root in ("own", ""))
    assert toy.find(own) == ("own", "a", "b", "") and toy.find(none) == ("toy_videos", "train", "val", "classes.txt")
    assert ava.find(own) == Path("own") and ava.find(none) == Path("toy_ava")
    assert run("tools.render_toy", "toy_ava", "--ava").stdout == "toy_ava\n"


def test_a_seed_gives_the_same_clips_in_every_version():
    """Results on the toy videos can only be compared if the videos stay the same: all shapes, motions, actions."""
    clips = torch.stack([toy.render_clip(toy.CLASSES[i % 4], toy.SHAPES[i % 3], seeded(i)) for i in range(12)])
    scenes = [ava.render_scene(seeded(seed)) for seed in range(6)]
    frames = torch.stack([clip for clip, _ in scenes])
    boxes = torch.cat([boxes for _, shapes in scenes for _, boxes in shapes]) * torch.tensor([48, 32] * 2)
    assert [float(x.square().mean()) for x in (clips, frames)] == pytest.approx([0.0699585, 0.0567295], abs=1e-5)
    assert len(boxes) == 780 and int(boxes.isnan().any(1).sum()) == 406
    assert boxes.nanmean(0).tolist() == pytest.approx([18.230, 10.944, 30.791, 22.794], abs=0.01)


@pytest.mark.parametrize("motion", toy.CLASSES)
@pytest.mark.parametrize("shape, corner", [("disc", 1), ("square", 1.2534), ("diamond", 1.2534)])
def test_the_shape_moves_as_the_class_says_and_nothing_else_changes(motion, shape, corner):
    x, y = {"horizontal": (1, 0), "main diagonal": (1, 1), "vertical": (0, 1), "antidiagonal": (-1, 1)}[motion]
    line = torch.tensor([x, y]) / (x * x + y * y) ** 0.5  # y points down
    ways = set()
    for seed in range(20):
        x, y, turn, radius = toy.trajectory(motion, seeded(seed))
        assert not turn.any() and not radius.diff().any() and toy.RADIUS[0] <= radius[0] <= toy.RADIUS[1]
        steps = torch.stack([x.diff(), y.diff()], 1)  # (T - 1, 2)
        speed = steps @ line
        assert torch.allclose(steps, speed[:, None] * line, atol=1e-3) and (speed - speed[0]).abs().max() < 1e-3
        assert toy.SPEED[0] - 0.01 < speed.abs().mean() < toy.SPEED[1] + 0.01
        ways.add(bool(speed[0] > 0))
    assert len(ways) == 2
    # two frames differ inside the circles around their two positions, and nowhere else
    clip = toy.render_clip(motion, shape, seeded(7))  # (T, H, W)
    x, y, _, radius = toy.trajectory(motion, seeded(7))[..., None, None]  # (T, 1, 1) each
    assert torch.allclose((clip - 0.1).sum(dim=(1, 2)) / 0.8, math.pi * radius[:, 0, 0] ** 2, rtol=0.02)
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    dx = (columns - x + 16) % 32 - 16
    dy = (rows - y + 16) % 32 - 16
    circles = dx**2 + dy**2 <= (corner * radius + 1) ** 2  # (T, H, W)
    for t in (3, 5, 8):
        changed = (clip[t] - clip[0]).abs() > 0.01
        assert changed.any() and not (changed & ~circles[t] & ~circles[0]).any()


def test_a_single_frame_tells_nothing_about_the_direction():
    """The center is anywhere with the same probability, in the first and in the last frame of each class."""
    for number, motion in enumerate(toy.CLASSES):
        states = torch.stack([toy.trajectory(motion, seeded(1000 * number + seed)) for seed in range(400)])
        for frame in (0, 23):
            counts = torch.histc(states[:, :2, frame] % 32, bins=4, min=0, max=32)
            assert (counts - 200).abs().max() < 50  # 4 standard deviations


def test_both_sets_of_labels_are_balanced(toy_videos):
    """shapes_train.csv is a list that the stages read; each shape has as many videos of each direction."""
    videos, _, shapes = datasets.labelled_videos(str(toy_videos), "shapes_train.csv", "shapes_val.csv", "")
    assert shapes == sorted(toy.SHAPES)
    pairs = [(path.parent.name, shapes[label]) for path, label in videos]
    assert all(pairs.count(pair) == 2 for pair in itertools.product(toy.CLASSES, toy.SHAPES))


def test_toy_ava_has_groups_of_actions_and_persons_that_are_missed_or_false(toy_ava):
    labels = (toy_ava / "annotations" / "ava_action_list_v2.2.pbtxt").read_text()
    groups = ("PERSON_MOVEMENT", "OBJECT_MANIPULATION", "PERSON_INTERACTION")
    assert [labels.count(group) for group in groups] == [4, 2, 2]
    assert all(f'name: "{name}"\n  label_id: {i}\n' in labels for i, name in enumerate(ava.ACTIONS, 1))
    for split, videos in (("train", 6), ("val", 3)):
        truth = read_rows(toy_ava / f"annotations/ava_{split}_v2.2.csv")
        detected = read_rows(toy_ava / f"boxes/ava_{split}_predicted_boxes.csv")
        assert len({row[0] for row in truth}) == videos
        persons = len({(*row[:2], row[7]) for row in truth})
        assert 0.7 < len(detected) / persons < 1.5  # some are missed, some are false
