"""A prepared dataset has the same frames, times and names; a kill or a broken file does no harm."""

import io
import json
import os
import shutil
import subprocess
from contextlib import redirect_stdout
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from conftest import (
    ROOT,
    command,
    number_of,
    run_with_signal,
    turn_by_90,
    two_streams,
    write_numbered,
)
from torchvision.transforms.v2 import functional as TF

import support.prepare
import support.video
from support.config import UserError
from support.datasets import SUFFIXES, labelled_videos, list_entries, list_videos

COUNT = 40


def write_smooth(
    path: Path,
    width: int,
    height: int,
    count: int = COUNT,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    **options: str,
) -> Path:
    """Moving gradients, no two frames alike."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(30000, 1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for t in range(count):
            image = 120 + 100 * torch.stack(
                [(columns / 30 + t / 2).sin(), (rows / 40 - t / 3).cos(), ((rows + columns) / 50 + t).sin()], 2
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.byte().numpy(), format="rgb24")))
        container.mux(stream.encode())
    return path


def prepare(root: Path, *words: str, out: str = "prepared", processes: int = 1) -> tuple[Path, str]:
    """The folder prepared beside `root`, and what was said."""
    words = ["prepare.py", f"data.root={root}", "--to", str(root.parent / out), "--processes", str(processes), *words]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr("sys.argv", words)
        try:
            support.prepare.main()
        except UserError as error:
            return root.parent / out, str(error)
    return root.parent / out, said.getvalue()


def times_of(path: Path) -> list[Fraction]:
    """When each frame is shown, in seconds after the first."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        times = sorted(
            packet.pts * packet.time_base for packet in container.demux(stream) if packet.size and not packet.is_discard
        )
    return [shown - times[0] for shown in times]


def rate_of(path: Path) -> Fraction:
    with av.open(str(path)) as container:
        return Fraction(container.streams.best("video").average_rate)  # PyAV 19 has a type of its own


def test_frames_and_times_stay_and_the_printed_psnr_is_all_that_differs(tmp_path):
    root = tmp_path / "videos"
    (root / "a b" / "ü").mkdir(parents=True)
    uneven = [int(40 * i + 15 * (i % 3) + 300 * (i > 30)) for i in range(COUNT)]
    numbered = [
        write_numbered(root / "b_frames.mp4", COUNT, options={"bf": "3", "g": "25"}),
        write_numbered(
            root / "open_gop.mkv",
            COUNT,
            options={"x264-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"},
        ),
        write_numbered(root / "variable.mp4", COUNT, times=uneven),
        write_numbered(root / "late.mkv", COUNT, times=[5000 + 40 * i for i in range(COUNT)]),
        write_numbered(root / "a b" / "ü" / "ucf (1).avi", COUNT, "mpeg4", {"bf": "2", "g": "12"}),
        write_numbered(root / "ssv2.webm", COUNT, "libvpx-vp9", {"deadline": "realtime"}),
        write_numbered(root / "program.MPG", COUNT, "mpeg2video", {"bf": "2", "g": "12"}),
        two_streams(root / "two.mp4", COUNT),
    ]
    turned = turn_by_90(write_numbered(root / "phone.mov", COUNT))
    others = [
        write_smooth(root / "large.mp4", 640, 480),
        write_smooth(root / "tall.mp4", 302, 538),
        write_smooth(root / "odd.mp4", 341, 255, pixel_format="yuv444p"),
        write_smooth(root / "full_range.avi", 320, 240, codec="mjpeg", pixel_format="yuvj420p"),
        write_smooth(
            root / "ten_bits.mp4",
            320,
            180,
            codec="libx265",
            pixel_format="yuv420p10le",
            **{"x265-params": "log-level=none"},
        ),
    ]
    out, said = prepare(root, processes=2)
    assert "14 of 14 videos are in" in said and "PSNR" in said and "MB became" in said
    sizes = {"large": (256, 340), "tall": (456, 256), "odd": (254, 340), "phone": (96, 64), "ten_bits": (180, 320)}
    for original in (*numbered, turned, *others):
        prepared = (out / original.relative_to(root)).with_suffix(".mp4")
        frames = support.video.read_frames(prepared, list(range(COUNT)))
        with support.video.Video(prepared) as video:
            assert len(video) == COUNT == len(set(times_of(prepared)))
        expected = support.video.read_frames(original, list(range(COUNT)))
        if original.stem in sizes:
            assert tuple(frames.shape[2:]) == sizes[original.stem]
        expected = TF.resize(expected, list(frames.shape[2:]), antialias=True)
        for index in range(COUNT):
            assert support.prepare.psnr(frames[index], expected[index]) > 30, (original.name, index)
        for frame, same, previous in zip(frames[1:], expected[1:], expected[:-1], strict=True):
            assert support.prepare.psnr(frame, same) > support.prepare.psnr(frame, previous) + 1
        if original in numbered:
            assert [number_of(frame) for frame in frames] == list(range(COUNT))
        if original.suffix not in (".avi", ".MPG"):  # these state no times
            assert times_of(prepared) == times_of(original)
        if original.name != "variable.mp4":
            assert rate_of(prepared) == pytest.approx(rate_of(original), rel=1e-3)
    prepared = (out / "prepared.txt").read_text(encoding="utf-8").splitlines()
    assert len(prepared) == 14 and "a b/ü/ucf (1).mp4" in prepared
    assert list_videos(str(out), "prepared.txt") == sorted(out / name for name in prepared)


def test_few_frames_are_decoded_for_a_clip(tmp_path):
    """A key frame every 32, and most frames in between unreferenced, whatever the original's were."""
    (tmp_path / "videos").mkdir()
    write_smooth(tmp_path / "videos" / "one.mp4", 64, 64, 100, g="1000")
    out, _ = prepare(tmp_path / "videos")
    with av.open(str(out / "one.mp4")) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        times = sorted(packet.pts for packet in packets)
        assert [times.index(packet.pts) for packet in packets if packet.is_keyframe] == [0, 32, 64, 96]
        stream.codec_context.skip_frame = "NONREF"
        shown = sum(len(stream.codec_context.decode(packet)) for packet in (*packets, None))
    assert shown <= 20


# ---- the datasets' own lists ----


def video(path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_numbered(path, 5, **options)


def labels(root: Path, *selections: str) -> list[list[tuple[str, int]]]:
    train, val, _ = labelled_videos(str(root), *selections)
    assert all(path.exists() for path, _ in train + val)
    return [
        [(path.relative_to(root).with_suffix("").as_posix(), label) for path, label in videos]
        for videos in (train, val)
    ]


CODECS = {"avi": "mpeg4", "ebm": "libvpx"}
SSV2 = [[{"id": "7", "template": "Holding [something]"}], [{"id": "8", "template": "Closing [something]"}]]
DATASETS = {
    "kinetics_tree": (["train/a b/1.mp4", "train/c/2.mkv", "val/a_b/3.mp4"], {}, ("train", "val", "")),
    "kinetics_csv": (
        ["x/-abc_000012_000022.mp4", "x/XYZ_000100_000110.mkv"],
        {
            "train.csv": 'label,youtube_id,time_start,time_end\r\n"cutting, pineapple",-abc,12,22\r\n',
            "val.csv": 'label,youtube_id,time_start,time_end\n"cutting, pineapple",XYZ,100,110\n',
        },
        ("train.csv", "val.csv", ""),
    ),
    "something_something": (
        ["20bn/7.webm", "20bn/8.webm"],
        {
            "labels/train.json": json.dumps(SSV2[0]),
            "labels/validation.json": json.dumps(SSV2[1]),
            "labels/labels.json": '{"Holding something": "0", "Closing something": "1"}',
        },
        ("labels/train.json", "labels/validation.json", "labels/labels.json"),
    ),
    "ucf101": (
        ["YoYo/v_YoYo_g08_c01.avi", "Bowling/v_Bowling_g01_c01.avi"],
        {
            "trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 2\r\n",
            "testlist01.txt": "Bowling/v_Bowling_g01_c01.avi\r\n",
            "classInd.txt": "1 Bowling\r\n2 YoYo\r\n",
        },
        ("trainlist01.txt", "testlist01.txt", "classInd.txt"),
    ),
    "hmdb51": (
        ["brush_hair/a b (1).avi", "wave/e.avi"],
        {"splits/brush_hair_test_split1.txt": "a b (1).avi 1 \r\n", "splits/wave_test_split1.txt": "\ufeffe.avi 1 \n"},
        ("splits/*_test_split1.txt=1", "splits/*_test_split1.txt=1", ""),
    ),
    "plain_list": (
        ["b/arm wrestling/x 1.AVI", "y.mp4"],
        {"train.csv": "b/arm wrestling/x 1.AVI,1\nROOT/y.mp4,0\n", "val.txt": "ROOT/y.mp4 0"},
        ("train.csv", "val.txt", ""),
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_the_same_configuration_serves_the_prepared_folder(tmp_path, name):
    root = tmp_path / "original"
    videos, files, selections = DATASETS[name]
    for path in videos:
        video(root / path, codec=CODECS.get(path[-3:].lower(), "libx264"))
    for path, text in files.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(text.replace("ROOT", str(root)).encode())
    (root / "readme.md").write_text("not a list")
    out, said = prepare(
        root, f"data.train={selections[0]}", f"data.val={selections[1]}", f"data.classes={selections[2]}"
    )
    assert f"{len(videos)} of {len(videos)} videos are in {out}" in said
    assert labels(out, *selections) == labels(root, *selections)
    assert sorted(path.suffix for path in out.rglob("*") if path.suffix.lower() in SUFFIXES) == [".mp4"] * len(videos)
    assert not (out / "readme.md").exists()


def test_a_list_alone_from_elsewhere_is_prepared_and_fixed(tmp_path):
    root = tmp_path / "original"
    for name in ("a.avi", "b.avi"):
        video(root / name, codec="mpeg4")
    (tmp_path / "mine.txt").write_text(f"{root}/b.avi 3\n")
    out, _ = prepare(root, f"data.train={tmp_path}/mine.txt")
    assert (out / "b.mp4").exists() and not (out / "a.mp4").exists()
    assert list_entries(str(out), "mine.txt")[0][:2] == (out / "b.mp4", 3)


UNPACKED = {  # videos below "videos", lists below "lists": as the archives of UCF101, HMDB51 and SSV2 are unpacked
    "ucf101": (DATASETS["ucf101"][0], DATASETS["ucf101"][1], "{}/trainlist01.txt {}/testlist01.txt {}/classInd.txt"),
    "hmdb51": (
        DATASETS["hmdb51"][0],
        {Path(name).name: text for name, text in DATASETS["hmdb51"][1].items()},
        "{}/*_test_split1.txt=1 {}/*_test_split1.txt=1",
    ),
    "something_something": (
        DATASETS["something_something"][0],
        DATASETS["something_something"][1],
        "{}/labels/train.json {}/labels/validation.json {}/labels/labels.json",
    ),
    "absolute_paths": (
        ["b/arm wrestling/x 1.avi", "y.mp4"],
        {"train.csv": "ROOT/b/arm wrestling/x 1.avi,1\nROOT/y.mp4,0\n", "val.txt": "ROOT/y.mp4 0"},
        "{}/train.csv {}/val.txt",
    ),
}


@pytest.mark.parametrize("named", ["beside", "absolute"])
@pytest.mark.parametrize("name", UNPACKED)
def test_lists_next_to_the_videos_serve_the_prepared_folder(tmp_path, name, named):
    root, lists = tmp_path / "set" / "videos", tmp_path / "set" / "lists"
    videos, files, text = UNPACKED[name]
    for path in videos:
        video(root / path, codec=CODECS.get(path[-3:].lower(), "libx264"))
    for path, content in files.items():
        (lists / path).parent.mkdir(parents=True, exist_ok=True)
        (lists / path).write_bytes(content.replace("ROOT", str(root)).encode())
    selections = (text.replace("{}", "../lists" if named == "beside" else str(lists)).split() + [""])[:3]
    words = [f"data.{key}={value}" for key, value in zip(("train", "val", "classes"), selections, strict=True)]
    expected = labels(root, *selections)
    out, _ = prepare(root, *words)  # next to the original videos and lists
    assert labels(out, *selections) == expected
    moved = tmp_path / "elsewhere" / "prepared"
    shutil.copytree(out, moved)
    shutil.rmtree(tmp_path / "set")  # the prepared folder stands alone
    assert labels(moved, *selections) == expected


def test_lists_that_would_become_the_same_are_refused(tmp_path):
    video(tmp_path / "videos" / "a.mp4")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "list.txt").write_text("a.mp4 0\n")
    words = [f"data.train={tmp_path}/one/list.txt", f"data.val={tmp_path}/two/list.txt"]
    out, said = prepare(tmp_path / "videos", *words)
    assert f"{tmp_path}/one/list.txt and {tmp_path}/two/list.txt would both become {out}/list.txt" in said


def test_links_are_followed_and_hidden_entries_are_left_out(tmp_path):
    root = tmp_path / "videos"
    video(tmp_path / "elsewhere" / "jump" / "a.mp4")
    video(root / "run" / "b.mp4")
    (root / "jump").symlink_to(tmp_path / "elsewhere" / "jump")
    (root / "jump" / "loop").symlink_to(root)
    for name in ("run/._b.mp4", ".cache/c.mp4", ".cache/list.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    out, said = prepare(root)
    assert "2 of 2 videos" in said
    assert (
        list_videos(str(out), "") == [out / "jump" / "a.mp4", out / "run" / "b.mp4"] and not (out / ".cache").exists()
    )


# ---- every frame stays ----


def test_every_frame_stays_when_a_transport_streams_clock_wraps(tmp_path):
    (tmp_path / "videos").mkdir()
    times = [95_443_717 - 400 + 40 * i for i in range(COUNT)]  # 2^33 / 90,000 seconds are 95,443,717 ms
    write_numbered(tmp_path / "videos" / "wraps.ts", COUNT, options={"bf": "3", "g": "12"}, times=times)
    out, said = prepare(tmp_path / "videos")
    assert "1 of 1 videos" in said
    frames = support.video.read_frames(out / "wraps.mp4", list(range(COUNT)))
    assert [number_of(frame) for frame in frames] == list(range(COUNT))
    assert times_of(out / "wraps.mp4") == [Fraction(40 * i, 1000) for i in range(COUNT)]


def test_a_different_number_of_frames_is_an_error(tmp_path, monkeypatch):
    video(tmp_path / "videos" / "a.mp4")
    write_mp4 = support.prepare.write_mp4

    def write_early(*arguments, times, **options):  # mp4 does not show what comes before 0
        write_mp4(*arguments, times=[time - Fraction(1, 10) for time in times], **options)

    monkeypatch.setattr(support.prepare, "write_mp4", write_early)
    out, said = prepare(tmp_path / "videos")
    assert "none of the 1 videos" in said and not list(out.glob("*.mp4")) and not list(out.glob("*.part"))
    assert f"{tmp_path / 'videos' / 'a.mp4'}: 5 frames became 2" in (out / "unreadable.txt").read_text()


# ---- what goes wrong ----


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"\xff\xe9")
    video(tmp_path / "videos" / f"{name}.mp4")
    (tmp_path / "videos" / f"{name}.avi").write_text("no video")
    (tmp_path / "videos" / "a.mp4").symlink_to(f"{name}.mp4")
    os.rename(tmp_path / "videos" / f"{name}.avi", tmp_path / "videos" / f"{name} 2.avi")
    words = ["support.prepare", f"data.root={tmp_path}/videos", "--to", f"{tmp_path}/prepared", "--processes", "1"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command(*words), capture_output=True, text=True, env=strict, cwd=ROOT)
    assert "2 of 3 videos are in" in done.stdout and "cannot be read: " in done.stdout, done.stderr
    assert (tmp_path / "prepared" / "prepared.txt").read_bytes() == b"a.mp4\n\xff\xe9.mp4\n"
    assert b"\xff\xe9 2.avi: " in (tmp_path / "prepared" / "unreadable.txt").read_bytes()


def test_broken_videos_are_named_and_stop_nothing(tmp_path):
    root = tmp_path / "videos"
    video(root / "whole.mp4")
    content = write_numbered(root / "cut.mp4", 40).read_bytes()
    (root / "cut.mp4").write_bytes(content[: len(content) // 2])
    damaged = bytearray(write_numbered(root / "damaged.mkv", 40, options={"g": "1"}).read_bytes())
    damaged[len(damaged) // 4 : -200] = os.urandom(len(damaged) - 200 - len(damaged) // 4)
    (root / "damaged.mkv").write_bytes(damaged)
    (root / "text.avi").write_text("no video")
    (root / "list.txt").write_text("whole.mp4 0\ncut.mp4 0\ndamaged.mkv 0\ntext.avi 0\nmissing.avi 0\n")
    out, said = prepare(root, "data.train=list.txt")
    assert "1 of 5 videos are in" in said
    for name in ("cut.mp4", "damaged.mkv", "text.avi", "missing.avi"):
        assert f"cannot be read: {root / name}: " in said and str(root / name) in (out / "unreadable.txt").read_text()
    assert "whole.mp4\n" in (out / "prepared.txt").read_text() and "cut" not in (out / "prepared.txt").read_text()
    assert {path.name for path in out.iterdir()} == {
        "list.txt",
        "prepared.json",
        "prepared.txt",
        "unreadable.txt",
        "whole.mp4",
    }
    (root / "whole.mp4").unlink()
    (root / "damaged.mkv").unlink()
    assert "none of the 2 videos" in prepare(root, out="other")[1]


def test_a_killed_run_resumes_where_it_was(tmp_path):
    root, out = tmp_path / "videos", tmp_path / "prepared"
    root.mkdir()
    first = write_smooth(root / "00.mp4", 160, 120, 60)
    for number in range(1, 8):
        (root / f"{number:02}.mp4").write_bytes(first.read_bytes())
    words = command("support.prepare", f"data.root={root}", "--to", out, "--processes", "2")
    run_with_signal(words, ".mp4 3 SIGKILL group")
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert 2 <= len(there) < 6 and list(out.glob("*.part"))
    for name in there:  # whole, each of them
        assert len(support.video.read_frames(out / name, [0, 30, 59])) == 3
    _, said = prepare(root)
    assert "8 of 8 videos" in said and not list(out.glob("*.part"))
    assert there == {name: (out / name).stat().st_mtime_ns for name in there}  # not done again
    _, again = prepare(root)
    assert again == said


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "which dataset? Name a configuration file or give data.root"),
        (["data.root=ROOT"], "where to? Give a new folder by --to FOLDER"),
        (
            ["data.root=ROOT", "--to", "ROOT"],
            "are the same folder or one is inside the other: name a folder next to it",
        ),
        (["data.root=ROOT", "--to", "ROOT/prepared"], "are the same folder or one is inside the other"),
        (["data.root=ROOT/a", "--to", "ROOT"], "are the same folder or one is inside the other"),
        (["data.root=ROOT", "--to", "LINK/prepared"], "are the same folder or one is inside the other"),
        (
            ["data.root=ROOT", "data.train=a", "--to", "OTHER"],
            "OTHER is not empty, and what it holds was not prepared in the same way from the same folder: "
            "name another --to or delete it",
        ),
        (["data.root=ROOT", "data.train=a", "--to", "OTHER/file.txt"], "cannot be filled"),
        (["data.root=ROOT", "--to", "NEW", "--short", "0"], "--short has to be at least 16"),
        (["data.root=ROOT/nowhere", "--to", "NEW"], "there is no folder or list file"),
        (["data.root=ROOT", "data.train=outside.txt", "--to", "NEW"], "is not below data.root"),
        (["data.root=ROOT", "data.train=twins", "--to", "NEW"], "would both become"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path, monkeypatch, words, sentence):
    root, other = tmp_path / "videos", tmp_path / "other"
    other.mkdir()
    (other / "file.txt").write_text("mine")
    for name in ("a/b.mp4", "twins/c.mp4", "twins/c.avi"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "outside.txt").write_text("../other/z.mp4 0\n")
    (tmp_path / "link").symlink_to(root)
    names = {"ROOT": root, "OTHER": other, "LINK": tmp_path / "link", "NEW": tmp_path / "new"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    monkeypatch.setattr("sys.argv", ["prepare.py", *words])
    with pytest.raises(UserError) as error:
        support.prepare.main()
    assert sentence.replace("OTHER", str(other)) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists() and sorted(path.name for path in other.iterdir()) == ["file.txt"]


def test_other_settings_are_refused(tmp_path):
    video(tmp_path / "videos" / "a.mp4")
    prepare(tmp_path / "videos")
    assert "was not prepared in the same way" in prepare(tmp_path / "videos", "--short", "320")[1]
