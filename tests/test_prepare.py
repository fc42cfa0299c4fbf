"""A prepared dataset has the same frames, times and lists; a kill or a broken file does no harm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, number_of, run, run_with_signal, turn_by_90, two_streams, write_numbered
from test_datasets import DATASETS, labelled, tree, write_lists
from torchvision.transforms.v2 import functional as TF
from videos import broken_files

import tools.prepare
from support.lists import list_videos
from support.video import Video, read_frames

COUNT = 40


def prepare(root: Path, *words: object, ok: bool = True, out: str = "prepared", processes: int = 1) -> tuple[Path, str]:
    """Return the folder prepared next to `root`, and what was printed."""
    words = f"data.root={root}", "--to", root.parent / out, "--processes", processes, *words
    done = run("tools.prepare", *words, ok=ok)
    assert ok or done.returncode == 1
    return root.parent / out, done.stdout + done.stderr


def video(path: Path, count: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    codecs = {".avi": "mpeg4", ".webm": "libvpx"}
    return write_numbered(path, count, codecs.get(path.suffix.lower(), "libx264"))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * float(((a.float() - b.float()) / 255).square().mean().clamp(min=1e-10).log10())


def test_frames_and_times_stay(tmp_path):
    root = tmp_path / "videos"
    (root / "a b" / "ü").mkdir(parents=True)
    open_gop = {"x264-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"}
    uneven = [int(40 * i + 15 * (i % 3) + 300 * (i > 30)) for i in range(COUNT)]
    wrapping = [95_443_717 - 400 + 40 * i for i in range(COUNT)]  # a stream's clock of 2^33 / 90,000 seconds wraps
    numbered = [
        write_numbered(root / "open_gop.mkv", COUNT, options=open_gop),
        write_numbered(root / "variable.mp4", COUNT, times=uneven),
        write_numbered(root / "late.mkv", COUNT, times=[5000 + 40 * i for i in range(COUNT)]),
        write_numbered(root / "a b" / "ü" / "ucf (1).avi", COUNT, "mpeg4", {"bf": "2", "g": "12"}),
        write_numbered(root / "ssv2.webm", COUNT, "libvpx-vp9", {"deadline": "realtime"}),
        write_numbered(root / "wraps.TS", COUNT, options={"bf": "3", "g": "12"}, times=wrapping),
        two_streams(root / "two.mp4", COUNT),
    ]
    others = [
        turn_by_90(write_numbered(root / "phone.mov", COUNT)),
        write_numbered(root / "large.mp4", COUNT, size=(640, 480)),
        write_numbered(root / "tall.mp4", COUNT, size=(302, 538)),
        write_numbered(root / "odd.mp4", COUNT, size=(341, 255), pixel_format="yuv444p"),
        write_numbered(root / "full_range.avi", COUNT, "mjpeg", size=(320, 240), pixel_format="yuvj420p"),
    ]
    out, said = prepare(root, processes=2)
    assert f"12 of 12 videos are in {out}. Next: train with data.root={out}" in said
    sizes = {"large": (256, 340), "tall": (456, 256), "odd": (254, 340), "phone": (96, 64)}
    for original in (*numbered, *others):
        prepared = (out / original.relative_to(root)).with_suffix(".mp4")
        with Video(original) as before, Video(prepared) as after:
            expected, frames = before.frames(list(range(COUNT))), after.frames(list(range(COUNT)))
            assert len(after) == COUNT == len(set(after.times))
            if original.name != "variable.mp4":
                assert after.rate == pytest.approx(before.rate, rel=1e-3)
            if original.suffix not in (".avi", ".TS"):  # these state no times
                start = before.times[0]
                assert [time - after.times[0] for time in after.times] == [time - start for time in before.times]
        assert tuple(frames.shape[2:]) == sizes.get(original.stem, tuple(expected.shape[2:]))
        expected = TF.resize(expected, list(frames.shape[2:]), antialias=True)
        for frame, same, previous in zip(frames[1:], expected[1:], expected[:-1], strict=True):
            assert psnr(frame, same) > max(30, psnr(frame, previous) + 1), original.name
        if original in numbered:
            assert [number_of(frame) for frame in frames] == list(range(COUNT))


def test_a_different_number_of_frames_is_an_error(tmp_path, monkeypatch):
    path, write_mp4 = video(tmp_path / "videos" / "a.mp4"), tools.prepare.write_mp4

    def write_early(*arguments, times, **options):  # mp4 does not show what comes before 0
        write_mp4(*arguments, times=[time - times[3] for time in times], **options)

    monkeypatch.setattr(tools.prepare, "write_mp4", write_early)
    out, said = prepare(tmp_path / "videos", ok=False)
    assert f"{path}: 5 frames became" in said and not [*out.glob("*.mp4"), *out.glob("*.part")]


@pytest.mark.parametrize("place", ["", "../lists", "ABSOLUTE"])  # below data.root, or next to it, named in two ways
@pytest.mark.parametrize("name", DATASETS)
def test_the_same_configuration_serves_the_prepared_folder(tmp_path, name, place):
    root = tmp_path / "set" / "videos"
    lists, selections, train, val, names = DATASETS[name]
    for path in (*train, *val):
        video(root / path)
    place = place.replace("ABSOLUTE", f"{tmp_path}/set/lists")
    write_lists(root / place, lists, root)
    if lists and place:
        selections = " ".join(f"{place}/{selection}" for selection in selections.split())
    selections = selections.split()
    words = [f"data.{key}={value}" for key, value in zip(("train", "val", "classes"), selections, strict=False)]
    out, said = prepare(root, *words)
    assert f"{len(train) + len(val)} of {len(train) + len(val)} videos are in {out}" in said
    expected = [[(str(Path(path).with_suffix(".mp4")), label) for path, label in part.items()] for part in (train, val)]
    moved = tmp_path / "elsewhere" / "prepared"
    shutil.copytree(out, moved)
    for folder in (out, moved):
        assert labelled(folder, *selections) == (*expected, names)
        shutil.rmtree(tmp_path / "set" / "lists", ignore_errors=True)  # the prepared folder stands alone
        assert all((folder / path).exists() for path, _ in expected[0] + expected[1])


def test_only_what_a_list_names_is_prepared_and_hidden_entries_are_left_out(tmp_path):
    root = tmp_path / "videos"
    for name in ("run/b.mp4", "run/c.mp4", "../elsewhere/jump/a.mp4"):
        video(root / name)
    (root / "jump").symlink_to(tmp_path / "elsewhere" / "jump")
    (root / "jump" / "loop").symlink_to(root)
    tree(root, "run/._b.mp4", ".cache/c.mp4", **{".cache/list.txt": "", "readme.md": "", "list.txt": "run/b.mp4 3\n"})
    out, _ = prepare(root, "data.train=list.txt", out="one")
    assert list(list_videos(str(out), "")) == [out / "run" / "b.mp4"]
    out, said = prepare(root)
    assert "3 of 3 videos" in said and not (out / "readme.md").exists() and not (out / ".cache").exists()
    assert list(list_videos(str(out), "")) == [out / name for name in ("jump/a.mp4", "run/b.mp4", "run/c.mp4")]


def test_names_that_are_not_utf8(tmp_path):
    root, name, strict = tmp_path / "videos", os.fsdecode(b"\xff\xe9"), {"PYTHONIOENCODING": "utf-8:strict"}
    video(root / name / f"{name}.mp4")
    (root / name / f"{name} 2.avi").write_text("no video")
    words = ["tools.prepare", "--to", tmp_path / "prepared", "--processes", "1"], ["tools.check_dataset"]
    commands = [command(*part, f"data.root={root}") for part in words]
    runs = [subprocess.run(each, capture_output=True, env=os.environ | strict, cwd=ROOT) for each in commands]
    prepared, checked = (done.stdout for done in runs)
    assert b"1 of 2 videos are in" in prepared and (tmp_path / "prepared" / name / f"{name}.mp4").exists()
    assert b"\xff\xe9 2.avi: " in (tmp_path / "prepared" / "unreadable.txt").read_bytes()
    assert b"1 unreadable" in checked and b"/\\udcff\\udce9 2.avi" in checked


def test_broken_videos_are_named_and_stop_nothing(tmp_path):
    root = tmp_path / "videos"
    broken = broken_files(root)
    video(root / "whole.mp4")
    (root / "list.txt").write_text("".join(f"{name} 0\n" for name in ("whole.mp4", *broken)))
    out, said = prepare(root, "data.train=list.txt", ok=False)
    assert f"1 of {len(broken) + 1} videos are in" in said
    for path in broken.values():
        assert f"{path}: " in said and f"{path}: " in (out / "unreadable.txt").read_text()
    names = {path.name for path in out.iterdir()}
    assert names == {".lock", "list.txt", "prepared.json", "unreadable.txt", "whole.mp4"}


def test_a_killed_run_resumes_where_it_was(tmp_path):
    root, out = tmp_path / "videos", tmp_path / "prepared"
    first = video(root / "00.mp4", 60)
    for number in range(1, 8):
        (root / f"{number:02}.mp4").write_bytes(first.read_bytes())
    words = f"data.root={root}", "--to", out, "--processes", "1"
    run_with_signal(".mp4 3 SIGKILL group", "tools.prepare", *words)
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert len(there) == 2 and list(out.glob("*.part"))
    for name in there:  # whole, each of them
        assert len(read_frames(out / name, [0, 30, 59])) == 3
    _, said = prepare(root)
    assert "8 of 8 videos" in said and not list(out.glob("*.part"))
    assert there == {name: (out / name).stat().st_mtime_ns for name in there}  # not done again
    assert "was not prepared in the same way" in prepare(root, "--short", "320", ok=False)[1]


def test_long_names(tmp_path):
    root = tmp_path / "videos"
    first = video(root / f"{'x' * 251}.mp4")
    for name in (f"{'影' * 83}.webm", f"{'y' * 251}.avi"):
        shutil.copy(first, root / name)
    assert "3 of 3 videos are in" in prepare(root)[1]
    shutil.copy(first, root / f"{'z' * 252}.ts")
    assert "3 of 4 videos are in" in (said := prepare(root, ok=False)[1]) and "its name is too long" in said


NESTED = "are the same or nested: name a folder next to data.root"
MISTAKES = {
    "--to NEW": "which dataset? Name a configuration file or give data.root",
    "data.root=ROOT": "give a new folder by --to FOLDER",
    "data.root=ROOT --to ROOT": NESTED,
    "data.root=ROOT/a --to ROOT": NESTED,
    "data.root=ROOT --to LINK/prepared": NESTED,
    "data.root=ROOT data.train=a --to OTHER": "OTHER is not empty and was not prepared in the same way",
    "data.root=ROOT data.train=a --to OTHER/file.txt": "OTHER/file.txt",
    "data.root=ROOT --to NEW --short 0": "--short of at least 16",
    "data.root=ROOT data.train=outside.txt --to NEW": "is not below data.root",
    "data.root=ROOT data.train=twins --to NEW": "would both become NEW/twins/c.mp4: rename one of the two",
    "data.root=ROOT data.train=OTHER/file.txt data.val=OTHER/two/file.txt --to NEW": "would both become NEW/file.txt",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_in_a_sentence(tmp_path, words):
    root, other = tmp_path / "videos", tmp_path / "other"
    tree(root, "a/b.mp4", "twins/c.mp4", "twins/c.avi", **{"outside.txt": "../other/z.mp4 0\n"})
    tree(other, **{"file.txt": "a/b.mp4 0\n", "two/file.txt": "a/b.mp4 0\n"})
    (tmp_path / "link").symlink_to(root)
    sentence = MISTAKES[words]
    for name, folder in {"ROOT": "videos", "OTHER": "other", "LINK": "link", "NEW": "new"}.items():
        words = words.replace(name, str(tmp_path / folder))
        sentence = sentence.replace(name, str(tmp_path / folder))
    error = run("tools.prepare", *words.split(), ok=False).stderr
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists() and sorted(path.name for path in other.iterdir()) == ["file.txt", "two"]
