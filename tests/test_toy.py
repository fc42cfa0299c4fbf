"""The toy videos: reproducible, finished after an interruption, of a class that motion tells and a frame hints at."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command, run, run_with_signal

import support.datasets
import support.seeds
import support.video
from support import toy
from support.config import UserError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy_ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.render_ava(tmp_path_factory.mktemp("toy_ava") / "videos", {"train": 6, "val": 4})


# ---- files ----


def test_files_are_real_videos_and_reproducible(toy_videos, tmp_path):
    videos = support.datasets.list_videos(str(toy_videos), "train")
    assert len(videos) == 24 and {path.parent.name for path in videos} == set(toy.CLASSES)
    assert (toy_videos / "classes.txt").read_text().splitlines() == list(toy.CLASSES)
    again = toy.render(tmp_path / "again", {"train": 24, "val": 8})
    for path in videos:
        assert path.read_bytes() == (again / path.relative_to(toy_videos)).read_bytes()
    assert support.video.read_frames(videos[0], [0, toy.FRAMES - 1]).shape == (2, 3, toy.SIZE, toy.SIZE)
    other = toy.render(tmp_path / "other", {"train": 8, "val": 0}, seed=1)
    for path in other.rglob("*.mp4"):
        assert path.read_bytes() != (toy_videos / path.relative_to(other)).read_bytes()


def test_rendering_is_never_repeated_and_other_settings_are_refused(toy_videos):
    before = {path: path.stat().st_mtime_ns for path in toy_videos.rglob("*.mp4")}
    toy.render(toy_videos, {"train": 24, "val": 8})
    assert before == {path: path.stat().st_mtime_ns for path in toy_videos.rglob("*.mp4")}
    for videos, seed in (({"train": 32, "val": 8}, 0), ({"train": 24, "val": 8}, 1)):
        with pytest.raises(UserError, match="other settings"):
            toy.render(toy_videos, videos, seed)


def test_an_interrupted_rendering_is_finished(tmp_path):
    folder, wanted = tmp_path / "videos", {"train": 104, "val": 8}  # enough for two processes
    code = f"import sys; from support import toy; toy.render(toy.Path(sys.argv[1]), {wanted})"
    run_with_signal([sys.executable, "-c", code, str(folder)], ".mp4 8 SIGKILL group")
    assert 7 <= len(list(folder.rglob("*.mp4"))) < 16 and not (folder / "classes.txt").exists()
    assert list(folder.rglob("*.part"))  # one was whole, but not yet renamed
    toy.render(folder, wanted)
    videos = support.datasets.list_videos(str(folder), "")
    assert len(videos) == 112 and all(len(support.video.Video(path)) == toy.FRAMES for path in videos)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files == sorted([*videos, folder / "classes.txt", folder / "settings.json"])


def test_a_process_that_is_killed_ends_the_rendering_in_a_sentence(tmp_path):
    said = run_with_signal(command("support.toy", tmp_path), ".mp4 8 SIGKILL itself")
    assert "a process was killed, perhaps for lack of memory: make room, then" in said


def test_toy_ava_is_the_same_each_time_and_an_interrupted_rendering_is_finished(toy_ava, tmp_path):
    again = tmp_path / "videos"
    shutil.copytree(toy_ava, again)
    (again / "annotations" / "ava_action_list_v2.2.pbtxt").unlink()
    (again / "annotations" / "ava_val_v2.2.csv").write_text("cut off")
    (again / "videos" / "val_00002.mp4").unlink()
    toy.render_ava(again, {"train": 6, "val": 4})
    files = [path.relative_to(toy_ava) for path in sorted(toy_ava.rglob("*")) if path.is_file()]
    assert len(files) == 10 + 2 * 3 + 2
    assert all((again / path).read_bytes() == (toy_ava / path).read_bytes() for path in files)
    with pytest.raises(UserError, match="other settings"):
        toy.render_ava(again, {"train": 7, "val": 4})


def test_a_configuration_without_a_root_gets_the_toy_videos(tmp_path, monkeypatch):
    """In the current folder; those that are complete are not rendered again."""
    monkeypatch.chdir(tmp_path)
    classes = {"toy_videos": list(toy.CLASSES), "toy_ava": list(toy.ACTIONS)}
    settings = {
        "toy_videos": dict(seed=0, videos=toy.VIDEOS, size=64, frames=24, light=0.35, spread=1.2217304763960306),
        "toy_ava": dict(seed=0, videos=toy.AVA_VIDEOS, size=[72, 96], frames=60),
    }
    for folder, last in (("toy_videos", "classes.txt"), ("toy_ava", "annotations/ava_action_list_v2.2.pbtxt")):
        (tmp_path / folder / last).parent.mkdir(parents=True)
        (tmp_path / folder / last).touch()
        (tmp_path / folder / "settings.json").write_text(json.dumps(settings[folder] | {"classes": classes[folder]}))
    own, none = (SimpleNamespace(root=root, train="a", val="b") for root in ("mine", ""))
    assert toy.find(own) == ("mine", "a", "b", "") and toy.find(none) == ("toy_videos", "train", "val", "classes.txt")
    assert toy.find_ava(own) == Path("mine") and toy.find_ava(none) == Path("toy_ava")
    for arguments in (["toy_videos"], ["toy_ava", "--ava"]):
        assert run("support.toy", *arguments, cwd=tmp_path).stdout.strip() == arguments[0]
    assert not list(tmp_path.rglob("*.mp4"))


def test_of_several_processes_one_renders_and_the_others_wait(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; import torch.distributed as dist; from support import toy\n"
        "if __name__ == '__main__':\n"
        "    dist.init_process_group('gloo')\n"
        "    folder = toy.render(Path(sys.argv[1]), {'train': 12, 'val': 4})\n"
        "    print(len(list(folder.rglob('*.mp4'))), (folder / 'classes.txt').exists())\n"
        "    dist.destroy_process_group()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = command(str(script), str(tmp_path / "videos"), processes=2)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["16 True"] * 2, done.stderr
    assert done.stderr.count("| 0/16") == 1


# ---- one shape ----


def test_clips_are_those_of_every_run_so_far():
    """Results on the toy videos can only be compared if the videos stay the same."""
    state = toy.trajectory("moving up-left", seeded(3))[:, [0, -1]].flatten().tolist()
    assert state == pytest.approx([0.2729, -51.8909, 6.7564, -45.4073, 0.2858, 0.2858, 11.2965, 11.2965], abs=1e-3)
    clip, (scene, shapes) = toy.render_clip("moving up-left", seeded(3)), toy.render_scene(seeded(3))
    assert clip.mean(dim=(0, 1, 2)).tolist() == pytest.approx([0.3914, 0.5452, 0.4509], abs=2e-4)
    assert scene.mean(dim=(0, 1, 2)).tolist() == pytest.approx([0.4531, 0.4749, 0.4655], abs=2e-4)
    ends = [["moving up-left", "turning left"], ["moving down-left"], ["moving left", "growing"], ["moving down"]]
    assert [motions[-1] for motions, _ in shapes] == ends
    boxes = [(boxes[30] * torch.tensor([96, 72] * 2)).tolist() for _, boxes in shapes]
    assert boxes[0] == [42, 52, 59, 68] and boxes[2] == [16, 10, 42, 35] and str(boxes[1] + boxes[3]).count("nan") == 8


@pytest.mark.parametrize("motion", toy.CLASSES)
def test_the_shape_moves_as_the_class_says_and_nothing_else_changes(motion):
    right = ("right" in motion) - ("left" in motion)
    down = ("down" in motion) - ("up" in motion)
    for seed in range(20):
        x, y, turn, size = toy.trajectory(motion, seeded(seed))
        assert not turn.diff().any() and not size.diff().any()
        speed = torch.hypot(x.diff(), y.diff())
        assert 2.49 < float(speed.min()) and float(speed.max()) < 4.01 and float(speed.max() - speed.min()) < 1e-3
        way = torch.tensor([right, down]) / (abs(right) + abs(down)) ** 0.5
        assert torch.allclose(torch.stack([x.diff(), y.diff()], 1) / speed[:, None], way.expand(23, 2), atol=1e-3)


def test_the_light_of_the_background_tells_the_class_in_a_quarter_of_the_videos():
    """The class nearest to where it is lighter. Along the motion the mean is 0.35 exp(-(70°)²/2), but for clamping."""
    right, along = 0, []
    for number, motion in enumerate(toy.CLASSES):
        x, y, *_ = toy.STEPS[motion].tolist()
        for seed in range(500):
            dx, dy = (toy.CORNERS.T @ toy.background(motion, seeded(1000 * number + seed)).mean(dim=1)).tolist()
            right += round(math.degrees(math.atan2(dy, dx)) / 45) % 8 == number
            along.append(x * dx + y * dy)
    assert right / 4000 == pytest.approx(0.25, abs=0.02)
    assert sum(along) / 4000 == pytest.approx(0.35 * math.exp(-(math.radians(70) ** 2) / 2), abs=0.015)


def test_nothing_else_in_a_single_frame_tells_the_class():
    """In every frame, position, angle and size are distributed as in every other frame and class."""
    quantiles = torch.linspace(0.05, 0.95, 10)
    for motion in toy.CLASSES:
        generator = seeded(1)
        x, y, turn, size = torch.stack(
            [toy.trajectory(motion, generator) for _ in range(3000)], dim=1
        )  # (3000, FRAMES)
        for frame in (0, 11, toy.FRAMES - 1):
            places = x[:, frame] % toy.SIZE / toy.SIZE, y[:, frame] % toy.SIZE / toy.SIZE
            state = [*places, turn[:, frame] % 1, (size[:, frame] - 11) / 11]
            found = torch.stack([part.quantile(quantiles) for part in state])  # all four uniform in [0, 1]
            assert (found - quantiles).abs().max() < 5 * 0.5 / 3000**0.5, (motion, frame)


@pytest.mark.parametrize("motion", toy.CLASSES)
def test_shapes_are_painted_where_the_trajectory_says(motion):
    """Two frames differ inside the circles around their two positions, and nowhere else."""
    clip = (255 * toy.render_clip(motion, seeded(7))).round()  # (T, H, W, 3)
    x, y, _, size = toy.trajectory(motion, seeded(7))
    rows, columns = torch.meshgrid(torch.arange(toy.SIZE) + 0.5, torch.arange(toy.SIZE) + 0.5, indexing="ij")

    def circle(t: int) -> torch.Tensor:
        dx, dy = ((d + 32) % 64 - 32 for d in (columns - x[t], rows - y[t]))
        return dx**2 + dy**2 <= (size[t] + 1) ** 2

    for t in (5, 8, 12):  # before a shape has crossed the frame and come back to where it was
        changed = (clip[t] - clip[0]).abs().amax(-1) > 2
        assert changed.any() and not (changed & ~circle(t) & ~circle(0)).any()
        # the shape has left where it was: its first place is background now
        assert (changed & circle(0) & ~circle(t)).any() or (circle(0) == circle(t)).all()


# ---- several shapes ----


def test_toy_ava_rows_name_videos_seconds_and_actions(toy_ava):
    labels = (toy_ava / "annotations" / "ava_action_list_v2.2.pbtxt").read_text()
    assert [labels.count(group) for group in ("PERSON_MOVEMENT", "OBJECT_MANIPULATION", "PERSON_INTERACTION")] == [
        8,
        2,
        2,
    ]
    assert all(f'name: "{name}"\n  label_id: {i}\n' in labels for i, name in enumerate(toy.ACTIONS, 1))
    for split, videos in (("train", 6), ("val", 4)):
        truth, detected = (
            [line.split(",") for line in (toy_ava / name).read_text().splitlines()]
            for name in (f"annotations/ava_{split}_v2.2.csv", f"boxes/ava_{split}_predicted_boxes.csv")
        )
        for video, second, *box, action, last in truth + detected:
            assert (toy_ava / "videos" / f"{video}.mp4").exists() and 901 <= int(second) <= 904
            x1, y1, x2, y2 = map(float, box)
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            assert 1 <= int(action) <= 12 and 0 <= int(last) < 4 if action else 0.5 <= float(last) <= 1
        assert len({row[0] for row in truth}) == videos
        persons = len({(*row[:2], row[7]) for row in truth})
        assert 0.7 < len(detected) / persons < 1.3  # some are missed, some are false


def test_toy_boxes_follow_the_motions_that_the_labels_say():
    """In frames without a change of motion, a wrap or a cut, the centre of a box goes where its label says."""
    checked, size = set(), torch.tensor([toy.AVA_WIDTH, toy.AVA_HEIGHT] * 2)
    for seed in range(30):
        _, shapes = toy.render_scene(support.seeds.sample_generator(0, 0, seed))
        for motions, boxes in shapes:
            assert boxes.shape == (toy.AVA_FRAMES, 4)
            for frame in range(4, toy.AVA_FRAMES - 4):
                before, after = (boxes[frame + offset] * size for offset in (-4, 4))
                corners = torch.stack([before, after])
                if corners.isnan().any() or motions[frame - 4] != motions[frame + 4]:
                    continue
                if corners.min() <= 0 or (corners[:, 2:] >= size[2:]).any():
                    continue
                dx, dy = ((after - before)[:2] + (after - before)[2:]).tolist()
                dx, dy = dx / 2, dy / 2
                if abs(dx) > 40 or abs(dy) > 40:
                    continue
                for name, way in (("left", -dx), ("right", dx), ("up", -dy), ("down", dy)):
                    if any(motion.startswith("moving") and name in motion for motion in motions[frame]):
                        checked.add(name)
                        assert way >= 4  # at least 1 pixel per frame; an outline that turns or grows shifts its box too
    assert checked == {"left", "right", "up", "down"}


def test_boxes_are_around_what_is_painted():
    """The frame differs from the background inside the box of every shape that is seen."""
    clip, shapes = toy.render_scene(seeded(5))
    background = toy._canvas(toy.AVA_HEIGHT, toy.AVA_WIDTH, torch.rand(4, 3, generator=seeded(5)))[2]
    different = (clip - background).abs().amax(-1) > 0.02  # (AVA_FRAMES, H, W)
    seen = 0
    for _, boxes in shapes:
        for box, picture in zip((boxes * torch.tensor([96, 72] * 2)).round(), different, strict=True):
            if not box.isnan().any():
                x1, y1, x2, y2 = box.int().tolist()
                assert picture[y1:y2, x1:x2].float().mean() > 0.3
                seen += 1
    assert seen > toy.AVA_FRAMES
