"""Frames are the frames asked for, whatever the file, and what cannot be read is named."""

import os
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from av.video.reformatter import VideoReformatter
from videos import SIZE, broken_files, number_of, remux, set_matrix, turn_by_90, two_streams, write_numbered

import support.video
from support.video import BrokenVideo, Video, read_frames, write_mp4

COUNT = 70
X264 = {
    "b_frames": {"g": "25", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0"},
    "open_gop": {"x264-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"},
    "one_key_frame": {"g": "1000", "bf": "7"},
    "all_key_frames": {"g": "1"},
    "intra_refresh": {"x264-params": "intra-refresh=1:keyint=12:bframes=0:scenecut=0"},
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
    "av1": ("youtube.mp4", "libsvtav1", {"g": "32", "preset": "8", "svtav1-params": "lp=1"}),
    "qtrle": ("animation.mov", "qtrle", {}, None, "rgb24"),
}
MADE = (
    "late_start",
    "late_start_mp4",
    "variable_rate",
    "rotated",
    "two_streams",
    "gif",
    "all_flagged_as_key",
    "concatenated",
)
CUT = ("mid_gop.ts", "mid_gop.mp4", "mid_gop.mkv", "open_gop_cut.mkv", "open_gop_cut.ts", "refresh_cut.mp4")


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
    flagged = write_numbered(folder / "flagged.mp4", COUNT, "mpeg4", {"g": "25"})
    flagged.write_bytes(flagged.read_bytes().replace(b"stss", b"free"))  # the list of key frames: without it all are
    videos["all_flagged_as_key"] = flagged
    halves = [write_numbered(folder / f"{i}.ts", COUNT // 2, options=b_frames, times=late).read_bytes() for i in (1, 2)]
    (folder / "concatenated.ts").write_bytes(b"".join(halves))  # the clock jumps back in the middle
    videos["concatenated"] = folder / "concatenated.ts"
    for name in CUT:  # recordings that start in mid-GOP, and stream copies cut there: less than 60 frames are left
        source = {"mid_gop": "b_frames", "open_gop_cut": "open_gop", "refresh_cut": "intra_refresh"}[Path(name).stem]
        videos[name] = remux(videos["mpeg_ts" if name == "open_gop_cut.ts" else source], folder / name, 12)
    return videos


def decode_everything(path: Path) -> torch.Tensor:
    """All frames (T, 3, H, W), in the first one's size, in the way of PyAV's own loop: the slow, sure reference."""
    frames, reformatter = [], VideoReformatter()
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.best("video")):
            height, width = frames[0].shape[:2] if frames else (frame.height, frame.width)
            frames.append(torch.from_numpy(reformatter.reformat(frame, width, height, "rgb24").to_ndarray()))
    return torch.stack(frames).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kept", [support.video.KEPT, 0], ids=["in_memory", "read_again"])
@pytest.mark.parametrize("name", [*X264, *OTHERS, *MADE, *CUT])
def test_frames_are_those_asked_for(videos, monkeypatch, name, kept):
    monkeypatch.setattr(support.video, "KEPT", kept)
    path, everything = videos[name], decode_everything(videos[name])
    assert len(everything) == COUNT if name not in CUT else 40 < len(everything) < 60
    if name == "rotated":  # clockwise: the left column becomes the top row
        everything = everything.rot90(-1, (2, 3))
        assert everything.shape[2:] == SIZE
    upright = everything if name != "rotated" else everything.rot90(1, (2, 3))
    first = COUNT - len(everything)
    numbers = [number_of(frame) for frame in upright]
    assert numbers == [i % 35 for i in range(70)] if name == "concatenated" else numbers == list(range(first, COUNT))
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


@pytest.mark.parametrize(
    "name", ["b_frames", "open_gop", "hevc_open_gop", "late_start", "variable_rate", "webm_vp9", "av1"]
)
@pytest.mark.parametrize("kept", [support.video.KEPT, 0], ids=["in_memory", "read_again"])
def test_only_what_is_needed_is_decoded(videos, monkeypatch, name, kept):
    """The packets from the key frame before a wanted frame to its own, and no other if they are in memory."""
    monkeypatch.setattr(support.video, "KEPT", kept)
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
        if kept:
            assert video.read == needed
        else:  # seeking may lead to the key frame before, and reading stops only where nothing wanted can follow
            assert set(needed) <= set(video.read) and len(video.read) < len(needed) + 9 + 25 * (name == "variable_rate")


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
        if name in ("avi_mpeg4_b_frames", "concatenated"):  # these do not say, or not once for all
            assert video.times == [Fraction(i, 25) for i in range(COUNT)]
        else:
            assert [float(time) for time in video.times] == pytest.approx([time - start for time in frames], abs=1e-5)
        assert video.times[0] >= 0 and all(isinstance(time, Fraction) for time in video.times)
    with Video(videos["variable_rate"]) as video:
        assert video.times == [Fraction(int(40 * i + 15 * (i % 3) + 300 * (i > 30)), 1000) for i in range(COUNT)]


def test_the_clock_of_a_transport_stream_may_wrap(tmp_path, videos):
    copy = {"mpegts_copyts": "1"}
    path = remux(videos["mpeg_ts"], tmp_path / "wraps.ts", shift=2**33 - 7200 - 5 * 3600, options=copy)
    with Video(path) as video:
        assert [number_of(frame) for frame in video.every_frame()] == list(range(COUNT))
        assert video.times == [Fraction(i, 25) for i in range(COUNT)]


# ---- excerpts ----


@pytest.mark.parametrize("kept", [support.video.KEPT, 0], ids=["in_memory", "read_again"])
@pytest.mark.parametrize(
    "name", ["b_frames", "open_gop", "all_key_frames", "late_start", "late_start_mp4", "variable_rate", "hevc_open_gop",
             "intra_refresh", "all_flagged_as_key", "av1", "mid_gop.mp4", "open_gop_cut.mkv"],
)  # fmt: skip
def test_an_excerpt_holds_the_frames_from_begin_to_end_and_the_nearest(videos, monkeypatch, name, kept):
    monkeypatch.setattr(support.video, "KEPT", kept)
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
            if name not in ("intra_refresh", "all_flagged_as_key", "refresh_cut.mp4"):
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


# ---- odd files ----


def test_a_change_of_size_is_scaled_away(tmp_path):
    small, late = SIZE, [2000 + 40 * i for i in range(20)]
    parts = [
        write_numbered(tmp_path / "a.ts", 3).read_bytes(),
        write_numbered(tmp_path / "b.ts", 20, times=late, size=(192, 96)).read_bytes(),
    ]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    frames = read_frames(tmp_path / "both.ts", list(range(23)))
    assert frames.shape == (23, 3, small[1], small[0])
    assert torch.equal(frames, decode_everything(tmp_path / "both.ts"))
    with Video(tmp_path / "both.ts") as video:
        assert torch.equal(torch.stack(list(video.every_frame())), frames)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path, turns, mirrored):
    path = write_numbered(tmp_path / "phone.mp4", 5)
    plain = read_frames(path, [4])
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][turns]  # clockwise
    expected = plain.rot90(-turns, (2, 3))
    if mirrored:  # afterwards
        a, c, expected = -a, -c, expected.flip(3)
    assert torch.equal(read_frames(set_matrix(path, a, b, c, d), [4]), expected)
    with Video(path) as video:
        assert torch.equal(list(video.every_frame())[4], expected[0])


def test_a_long_file_is_not_kept_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (480, 1280, 3), dtype=torch.uint8, generator=generator)
    with av.open(str(tmp_path / "long.mov"), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 1280, 480, "rgb24"
        stream.codec_context.options = {"compression_level": "0"}
        image = av.VideoFrame.from_ndarray(noise.numpy(), format="rgb24")
        for number in range(80):
            image.pts = number
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    assert (tmp_path / "long.mov").stat().st_size > 1.4e8

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with Video(tmp_path / "long.mov") as video:
        frames = video.frames([0, 79])
        assert torch.equal(frames[1], noise.permute(2, 0, 1)) and resident() - before < 6e7


def test_any_file_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2021-05-06T10:15.mp4", "http:x.mp4", "%03d.mp4", os.fsdecode(b"\xff\xfe.mp4"), "-x.mp4"):
        write_mp4(Path(name), torch.zeros(3, 3, 32, 32, dtype=torch.uint8), rate=8)
        assert os.path.exists(name) and len(read_frames(name, [0, 2])) == 2


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


@pytest.mark.parametrize(
    ("file", "codec", "tag"),
    [("a.mkv", "libx264", b"ISO/AVC"), ("a.avi", "mpeg4", b"FMP4"), ("a.mov", "libx264", b"avc1")],
)
def test_a_codec_that_nobody_knows_is_named(tmp_path, file, codec, tag):
    path = write_numbered(tmp_path / file, 5, codec)
    content = path.read_bytes()
    assert tag in content
    path.write_bytes(content.replace(tag, tag[:-3] + b"qqq"))
    with pytest.raises(BrokenVideo, match=f"{file}: no decoder for its video"):
        Video(path)


def test_any_failure_to_decode_is_a_broken_video_but_want_of_memory_ends_a_run(videos):
    class Failing:
        def reformat(self, *arguments, **options):
            raise self.error

    with Video(videos["b_frames"]) as video:
        video.reformatter = Failing()
        for error in (RuntimeError("odd"), AttributeError("odd"), OverflowError("odd")):
            Failing.error = error
            with pytest.raises(BrokenVideo, match=rf"b_frames.mp4: odd \({type(error).__name__}\)"):
                video.frames([3])
            with pytest.raises(BrokenVideo, match=rf"b_frames.mp4: odd \({type(error).__name__}\)"):
                list(video.every_frame())
        Failing.error = MemoryError()
        with pytest.raises(MemoryError):
            video.frames([3])


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
