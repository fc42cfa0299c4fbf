"""Frames are the frames asked for, whatever the file, and what cannot be read is named."""

import os
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from videos import SIZE, broken_files, number_of, turn_by_90, two_streams, write_numbered

from support.video import BrokenVideo, Video, read_frames, write_mp4

COUNT = 70
X264 = {
    "b_frames": {"g": "25", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0"},
    "open_gop": {"x264-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"},
    "one_key_frame": {"g": "1000", "bf": "7"},
    "all_key_frames": {"g": "1"},
}
OTHERS = {
    "avi_mpeg4_b_frames": ("ucf.avi", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg_ps": ("program.mpg", "mpeg2video", {"bf": "2", "g": "12"}),
    "mpeg_ts": ("transport.ts", "libx264", X264["open_gop"]),
    "flv": ("flash.flv", "libx264", X264["b_frames"]),
    "hevc_open_gop": (
        "hevc.mp4",
        "libx265",
        {"x265-params": "keyint=12:min-keyint=12:bframes=4:open-gop=1:log-level=none"},
    ),
    "webm_vp9": (
        "ssv2.webm",
        "libvpx-vp9",
        {"g": "20", "lag-in-frames": "16", "auto-alt-ref": "1", "deadline": "realtime"},
    ),
    "webm_vp8": ("old.webm", "libvpx", {"g": "20", "lag-in-frames": "16", "auto-alt-ref": "1"}),
}
MADE = ("late_start", "late_start_mp4", "variable_rate", "rotated", "two_streams", "gif")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Videos that differ in all that makes finding a frame hard."""
    folder = tmp_path_factory.mktemp("variants")
    videos = {name: write_numbered(folder / f"{name}.mp4", COUNT, options=options) for name, options in X264.items()}
    videos |= {name: write_numbered(folder / file, COUNT, *how) for name, (file, *how) in OTHERS.items()}
    b_frames, late = X264["b_frames"], [5000 + 40 * i for i in range(COUNT)]
    videos["late_start"] = write_numbered(folder / "late.mkv", COUNT, options=b_frames, times=late)
    videos["late_start_mp4"] = write_numbered(folder / "late.mp4", COUNT, options=b_frames, times=late)
    uneven = [int(40 * i + 15 * (i % 3) + 300 * (i > 30)) for i in range(COUNT)]
    videos["variable_rate"] = write_numbered(folder / "variable.mp4", COUNT, options=b_frames, times=uneven)
    videos["rotated"] = turn_by_90(write_numbered(folder / "rotated.mp4", COUNT, options=b_frames))
    videos["two_streams"] = two_streams(folder / "two.mp4", COUNT)
    videos["gif"] = write_numbered(folder / "moving.gif", COUNT, "gif", pixel_format="rgb8")
    return videos


def decode_everything(path: Path) -> torch.Tensor:
    """All frames (T, 3, H, W) in the way of PyAV's own loop: the slow, sure reference."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    return torch.stack(frames).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", [*X264, *OTHERS, *MADE])
def test_frames_are_those_asked_for(videos, name):
    path, everything = videos[name], decode_everything(videos[name])
    assert len(everything) == COUNT
    if name == "rotated":  # clockwise: the left column becomes the top row
        everything = everything.rot90(-1, (2, 3))
        assert everything.shape[2:] == SIZE
    upright = everything if name != "rotated" else everything.rot90(1, (2, 3))
    assert [number_of(frame) for frame in upright] == list(range(COUNT))
    generator, last = torch.Generator().manual_seed(0), len(everything) - 1
    requests = [[0], [last], [5, 5, 5], [40, 3, 41, 2], list(range(0, last, 4)), list(range(last + 1))]
    requests += [sorted(torch.randint(last + 1, (8,), generator=generator).tolist()) for _ in range(12)]
    for indices in requests:
        frames = read_frames(path, indices)
        assert frames.dtype == torch.uint8 and frames.shape == (len(indices), *everything.shape[1:])
        assert frames.stride(1) == 1  # channels last
        assert torch.equal(frames, everything[indices]), (name, indices)
    with Video(path) as video:
        assert len(video) == len(everything)
        assert torch.equal(torch.stack(list(video.every_frame())), everything)
        for indices in requests[:4]:  # one after the other
            assert torch.equal(video.frames(indices), everything[indices])


class Counting(Video):
    """Notes the times of the packets that are read."""

    def __init__(self, *arguments):
        self.read = []
        super().__init__(*arguments)

    def _read(self, start: int | None, times=()):
        for packet in super()._read(start, times):
            self.read.append(packet.pts)
            yield packet


@pytest.mark.parametrize("name", ["b_frames", "open_gop", "hevc_open_gop", "late_start", "variable_rate", "webm_vp9"])
def test_only_what_is_needed_is_decoded(videos, name):
    """The packets from the key frame before a wanted frame to its own."""
    with av.open(str(videos[name])) as container:
        packets = [packet for packet in container.demux(container.streams.best("video")) if packet.size]
    shown = sorted(packet.pts for packet in packets)
    for index in range(COUNT):
        place = next(place for place, packet in enumerate(packets) if packet.pts == shown[index])
        keys = [p for p in range(place + 1) if packets[p].is_keyframe and packets[p].pts <= shown[index]]
        with Counting(videos[name]) as video:
            video.read.clear()
            video.frames([index])
        needed = [packet.pts for packet in packets[keys[-1] : place + 1]]
        assert video.read == needed


def test_unreferenced_frames_are_not_decoded(videos):
    with Video(videos["b_frames"]) as video:
        wanted = {video.shown[50], video.shown[53]}
        decoded = [video.shown.index(frame.pts) for frame in video._decode(video.shown[50], wanted)]
        assert decoded == [50, 52, 53, 54]  # 51 is not wanted, and none of these refers to it


@pytest.mark.parametrize("index", [-1, COUNT])
def test_frames_that_do_not_exist_are_refused(videos, index):
    with pytest.raises(IndexError, match="has frames 0 to 69"):
        read_frames(videos["b_frames"], [0, index])


def test_times_are_those_of_the_file(videos):
    for name, path in videos.items():
        with av.open(str(path)) as container, Video(path) as video:
            frames = [frame.time for frame in container.decode(container.streams.best("video"))]
            start = (container.start_time or 0) / 1e6
            assert video.rate == container.streams.best("video").average_rate
        if name == "avi_mpeg4_b_frames":  # it does not say
            assert video.times == [Fraction(i, 25) for i in range(COUNT)]
        else:
            assert [float(time) for time in video.times] == pytest.approx([time - start for time in frames], abs=1e-5)
        assert video.times[0] >= 0 and all(isinstance(time, Fraction) for time in video.times)
    with Video(videos["variable_rate"]) as video:
        assert video.times == [Fraction(int(40 * i + 15 * (i % 3) + 300 * (i > 30)), 1000) for i in range(COUNT)]


# ---- excerpts ----


@pytest.mark.parametrize(
    "name",
    ["b_frames", "open_gop", "all_key_frames", "late_start", "late_start_mp4", "variable_rate", "hevc_open_gop"],
)
def test_an_excerpt_holds_the_frames_from_begin_to_end_and_the_nearest(videos, name):
    with Video(videos[name]) as video:
        times, everything = video.times, torch.stack(list(video.every_frame()))
    for begin, end in ((0, 1), (0.5, 0.5), (0.99, 1.7), (1.31, 9), (2.6, 3), (50, 60), (-2, 0.1)):
        begin, end = Fraction(begin).limit_denominator(100), Fraction(end).limit_denominator(100)
        with Video(videos[name], begin, end) as excerpt:
            indices = [times.index(time) for time in excerpt.times]
            assert {index for index, time in enumerate(times) if begin <= time <= end} <= set(indices)
            assert indices[0] == 0 or times[indices[0]] <= begin
            assert next((index for index, time in enumerate(times) if time >= end), len(times) - 1) in indices
            assert torch.equal(excerpt.frames(list(range(len(excerpt)))), everything[indices])
            assert torch.equal(torch.stack(list(excerpt.every_frame())), everything[indices])


def test_only_packets_near_an_excerpt_are_read(tmp_path):
    for suffix in ("mp4", "mkv"):
        times = [round(1000 * i / 30) for i in range(360)]
        options = {"x264-params": "keyint=25:min-keyint=25:bframes=3:open-gop=1:scenecut=0"}
        path = write_numbered(tmp_path / f"movie.{suffix}", 360, options=options, times=times)
        with Counting(path, Fraction(148, 30), Fraction(208, 30)) as excerpt:
            assert excerpt.times[0] <= Fraction(148, 30) and excerpt.times[-1] >= Fraction(208, 30)
            # From the key frame before the beginning on: there is one every 25 frames.
            assert min(excerpt.read) * excerpt.time_base > 4 and max(excerpt.read) * excerpt.time_base < 7.3
            excerpt.frames(list(range(len(excerpt))))
            assert min(excerpt.read) * excerpt.time_base > 4 and max(excerpt.read) * excerpt.time_base < 7.3


def test_excerpts_need_a_file_that_states_times(videos):
    for name in ("avi_mpeg4_b_frames", "mpeg_ts"):
        with pytest.raises(BrokenVideo, match="only mp4 and Matroska files state the time of every frame"):
            Video(videos[name], Fraction(1), Fraction(2))


# ---- broken files ----


@pytest.mark.parametrize(
    "name", ["truncated.mp4", "empty.mp4", "text.mp4", "audio.mp4", "unreadable.mp4", "missing.mp4"]
)
def test_broken_files_are_named_and_leave_nothing_open(tmp_path, name):
    path = broken_files(tmp_path / "broken")[name]
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BrokenVideo, match=name):
        read_frames(path, [0])
    assert len(os.listdir("/proc/self/fd")) == before


def test_damage_is_named(tmp_path):
    path = broken_files(tmp_path / "broken")["damaged.mkv"]
    with (
        pytest.raises(BrokenVideo, match=r"damaged.mkv: (frame \d+ of \d+ is damaged|only|.*Error)"),
        Video(path) as video,
    ):
        list(video.every_frame())


# ---- writing ----


def gradients(count: int) -> torch.Tensor:
    place, time = torch.arange(48).repeat(3, 32, 1), torch.arange(count).view(count, 1, 1, 1)
    return (place * 2 + time * 3).byte()  # (count, 3, 32, 48)


def test_the_same_frames_give_the_same_file(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, gradients(20), rate=8, options={"qp": "5", "preset": "ultrafast"})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    write_mp4(tmp_path / "c.mp4", gradients(20), rate=8)
    assert (tmp_path / "c.mp4").stat().st_size < (tmp_path / "a.mp4").stat().st_size
    with Video(tmp_path / "a.mp4") as video:
        assert video.rate == 8 and video.times == [Fraction(i, 8) for i in range(20)]
        assert (video.frames(list(range(20))).int() - gradients(20).int()).abs().max() < 8


def test_frames_are_written_at_their_times_with_the_options_given(tmp_path):
    times = [Fraction(i, 25) + Fraction(3 * (i > 5), 7) for i in range(20)]
    write_mp4(tmp_path / "a.mp4", gradients(20), 25, options={"crf": "20", "bf": "3", "g": "5"}, times=times)
    with Video(tmp_path / "a.mp4") as video:
        assert [float(time) for time in video.times] == pytest.approx([float(time) for time in times], abs=1e-4)
        assert len(video.keys) > 3  # one without the option
