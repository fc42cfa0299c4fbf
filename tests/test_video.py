"""Frames are the frames asked for, whatever the file, and what cannot be read is named."""

import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from av.video.reformatter import VideoReformatter
from videos import broken_files, number_of, remux, set_matrix, turn_by_90, two_streams, write_numbered

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
X265 = {"x265-params": "keyint=12:min-keyint=12:bframes=4:open-gop=1:log-level=none"}
VPX = {"g": "20", "lag-in-frames": "16", "auto-alt-ref": "1"}
OTHERS = {
    "avi_mpeg4_b_frames": ("ucf.avi", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg_ps": ("program.mpg", "mpeg2video", {"bf": "2", "g": "12"}),
    "mpeg_ts": ("transport.ts", "libx264", X264["open_gop"]),
    "flv": ("flash.flv", "libx264", X264["b_frames"]),
    "hevc_open_gop": ("hevc.mp4", "libx265", X265),
    "webm_vp9": ("ssv2.webm", "libvpx-vp9", VPX | {"deadline": "realtime"}),
    "webm_vp8": ("old.webm", "libvpx", VPX),
    "av1": ("youtube.mp4", "libsvtav1", {"g": "32", "preset": "8", "svtav1-params": "lp=1"}),
    "qtrle": ("animation.mov", "qtrle", {}, None, "rgb24"),
    "gif": ("moving.gif", "gif", {}, None, "rgb8"),
}
MADE = ["late_start", "late_start_mp4", "variable_rate", "rotated", "two_streams", "all_flagged_as_key"]
MADE += ["concatenated", "clock_wraps"]
CUT = ["mid_gop.ts", "mid_gop.mp4", "mid_gop.mkv", "open_gop_cut.mkv", "open_gop_cut.ts", "refresh_cut.mp4"]
CUT += ["edit_list.mp4"]
UNEVEN = [int(40 * i + 15 * (i % 3) + 300 * (i > 30)) for i in range(COUNT)]  # milliseconds


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Videos that differ in all that makes finding a frame hard."""
    folder = tmp_path_factory.mktemp("variants")
    videos = {name: write_numbered(folder / f"{name}.mp4", COUNT, options=options) for name, options in X264.items()}
    videos |= {name: write_numbered(folder / file, COUNT, *how) for name, (file, *how) in OTHERS.items()}
    b_frames, late = X264["b_frames"], [5000 + 40 * i for i in range(COUNT)]
    videos["late_start"] = write_numbered(folder / "late.mkv", COUNT, options=b_frames, times=late)
    videos["late_start_mp4"] = write_numbered(folder / "late.mp4", COUNT, options=b_frames, times=late)
    videos["variable_rate"] = write_numbered(folder / "variable.mp4", COUNT, options=b_frames, times=UNEVEN)
    videos["rotated"] = turn_by_90(write_numbered(folder / "rotated.mp4", COUNT, options=b_frames))
    videos["two_streams"] = two_streams(folder / "two.mp4", COUNT)
    flagged = write_numbered(folder / "flagged.mp4", COUNT, "mpeg4", {"g": "25"})
    flagged.write_bytes(flagged.read_bytes().replace(b"stss", b"free"))  # the list of key frames: without it all are
    videos["all_flagged_as_key"] = flagged
    first = write_numbered(folder / "1.ts", COUNT // 2, options=b_frames, times=late).read_bytes()
    second = write_numbered(folder / "2.ts", COUNT // 2, options=b_frames, times=late, size=(192, 96)).read_bytes()
    videos["concatenated"] = folder / "concatenated.ts"  # in the middle, the clock jumps back and the size changes
    videos["concatenated"].write_bytes(first + second)
    shift = 2**33 - 7200 - 5 * 3600
    videos["clock_wraps"] = remux(videos["mpeg_ts"], folder / "wraps.ts", shift=shift, mpegts_copyts="1")
    for name in CUT[:-1]:  # recordings that start in mid-GOP, and stream copies cut there: less than 60 frames are left
        source = {"mid_gop": "b_frames", "open_gop_cut": "open_gop", "refresh_cut": "intra_refresh"}[Path(name).stem]
        videos[name] = remux(videos["mpeg_ts" if name == "open_gop_cut.ts" else source], folder / name, 12)
    # frames before time 0 are in the file, and its edit list leaves them out
    videos["edit_list.mp4"] = remux(videos["b_frames"], folder / "edit_list.mp4", shift=-12 * 12800 // 25)
    return videos


def decode_everything(path: Path) -> torch.Tensor:
    """Decode all frames (T, 3, H, W) in the size of the first by PyAV's own loop."""
    frames, reformatter = [], VideoReformatter()
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.best("video")):
            height, width = frames[0].shape[:2] if frames else (frame.height, frame.width)
            frames.append(torch.from_numpy(reformatter.reformat(frame, width, height, "rgb24").to_ndarray()))
    return torch.stack(frames).permute(0, 3, 1, 2)


@pytest.fixture(params=[support.video.KEPT, 0], ids=["in_memory", "read_again"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of packets that are kept in memory."""
    monkeypatch.setattr(support.video, "KEPT", request.param)
    return request.param


@pytest.mark.parametrize("name", [*X264, *OTHERS, *MADE, *CUT])
def test_frames_are_those_asked_for(videos, kept, name):
    path, everything = videos[name], decode_everything(videos[name])
    assert len(everything) == COUNT if name not in CUT else 40 < len(everything) < 60
    numbers = [number_of(frame) for frame in everything[: 35 if name == "concatenated" else None]]
    assert numbers == list(range(COUNT))[-len(everything) :][: len(numbers)]
    if name == "rotated":  # clockwise: the left column becomes the top row
        everything = everything.rot90(-1, (2, 3))
    generator, last = torch.Generator().manual_seed(0), len(everything) - 1
    requests = [[0], [last], [5, 5, 5], [40, 3, 41, 2], list(range(0, last, 4)), list(range(last + 1))]
    requests += [sorted(torch.randint(last + 1, (8,), generator=generator).tolist()) for _ in range(12)]
    for indices in requests:
        frames = read_frames(path, indices)
        assert frames.dtype == torch.uint8 and frames.stride(1) == 1  # channels last
        assert torch.equal(frames, everything[indices]), indices
    with Video(path) as video:
        assert len(video) == len(everything)
        for index in (-1, len(video)):
            with pytest.raises(IndexError, match=f"has frames 0 to {last}"):
                video.frames([0, index])
        assert torch.equal(torch.stack(list(video.every_frame())), everything)
        for indices in requests[:4]:  # one after the other
            assert torch.equal(video.frames(indices), everything[indices])


class Recorder:
    """A decoder that notes the pts of packets that go in and of frames that come out."""

    def __init__(self, video: Video) -> None:
        self.codec, self.packets, self.frames = video.stream.codec_context, [], []
        self.name, self.skip_frame, self.flush_buffers = self.codec.name, "DEFAULT", self.codec.flush_buffers
        video.stream = SimpleNamespace(codec_context=self, container=video.stream.container)

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        self.codec.skip_frame = self.skip_frame
        frames = self.codec.decode(packet)
        self.packets += [packet.pts] if packet else []
        self.frames += [frame.pts for frame in frames]
        return frames


@pytest.mark.parametrize("name", "b_frames open_gop hevc_open_gop late_start variable_rate webm_vp9 av1".split())
def test_only_packets_from_the_key_frame_to_the_wanted_one_are_decoded(videos, name):
    with av.open(str(videos[name])) as container:
        packets = [packet for packet in container.demux(container.streams.best("video")) if packet.size]
    for index, pts in enumerate(sorted(packet.pts for packet in packets)):
        place = next(place for place, packet in enumerate(packets) if packet.pts == pts)
        key = max(p for p in range(place + 1) if packets[p].is_keyframe and packets[p].pts <= pts)
        with Video(videos[name]) as video:
            recorder = Recorder(video)
            video.frames([index])
        assert recorder.packets == [packet.pts for packet in packets[key : place + 1]]


def test_unreferenced_frames_are_not_decoded(videos):
    with Video(videos["b_frames"]) as video:
        recorder = Recorder(video)
        video.frames([50, 53])
        # 51 is not wanted, and none of the others refers to it.
        assert [video.pts.index(pts) for pts in recorder.frames] == [50, 52, 53, 54]


def test_times_are_those_of_the_file(videos):
    for name, path in videos.items():
        with av.open(str(path)) as container, Video(path) as video:
            frames = [frame.time for frame in container.decode(container.streams.best("video"))]
            start = (container.start_time or 0) / 1e6
            assert video.rate == container.streams.best("video").average_rate
        if name in ("avi_mpeg4_b_frames", "concatenated", "clock_wraps"):
            assert video.times == [Fraction(i, 25) for i in range(COUNT)]
        else:
            assert [float(time) for time in video.times] == pytest.approx([time - start for time in frames], abs=1e-5)
        assert video.times[0] >= 0 and all(isinstance(time, Fraction) for time in video.times)
    with Video(videos["variable_rate"]) as video:
        assert video.times == [Fraction(time, 1000) for time in UNEVEN]


EXCERPTS = "b_frames open_gop all_key_frames late_start late_start_mp4 variable_rate hevc_open_gop intra_refresh"


@pytest.mark.parametrize("name", [*EXCERPTS.split(), "all_flagged_as_key", "av1", "mid_gop.mp4", "open_gop_cut.mkv"])
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


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_only_packets_near_an_excerpt_are_read(tmp_path, suffix):
    options = {"x264-params": "keyint=25:min-keyint=25:bframes=3:open-gop=1:scenecut=0"}
    times = [round(1000 * i / 30) for i in range(360)]
    path = write_numbered(tmp_path / f"movie.{suffix}", 360, options=options, times=times)
    with Video(path, Fraction(148, 30), Fraction(208, 30)) as excerpt:  # there is a key frame every 25 frames
        assert 4 < excerpt.times[0] <= Fraction(148, 30) and Fraction(208, 30) <= excerpt.times[-1] < 7.3


@pytest.mark.parametrize("name", ["avi_mpeg4_b_frames", "mpeg_ts", "gif"])
def test_excerpts_need_a_file_that_states_times(videos, name):
    with pytest.raises(BrokenVideo, match="only mp4 and Matroska files state the time of every frame"):
        Video(videos[name], Fraction(1), Fraction(2))


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path, turns, mirrored):
    path = write_numbered(tmp_path / "phone.mp4", 5)
    expected = read_frames(path, [4]).rot90(-turns, (2, 3))  # clockwise
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][turns]
    if mirrored:  # afterwards
        a, c, expected = -a, -c, expected.flip(3)
    assert torch.equal(read_frames(set_matrix(path, a, b, c, d), [4]), expected)


def test_a_long_file_is_not_kept_in_memory(tmp_path):
    path = write_numbered(tmp_path / "long.mov", 80, "rawvideo", pixel_format="rgb24", size=(1280, 480))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with Video(path) as video:
        assert [number_of(frame) for frame in video.frames([0, 79])] == [0, 79]
        assert path.stat().st_size > 1.4e8 and resident() - before < 6e7


def test_any_file_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2021-05-06T10:15.mp4", "http:x.mp4", "%03d.mp4", os.fsdecode(b"\xff\xfe.mp4"), "-x.mp4"):
        write_mp4(Path(name), torch.zeros(3, 3, 32, 32, dtype=torch.uint8), rate=8)
        assert os.path.exists(name) and len(read_frames(name, [0, 2])) == 2


def test_broken_files_are_named_and_leave_nothing_open(tmp_path):
    broken = broken_files(tmp_path / "broken")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("truncated.mp4", "empty.mp4", "text.mp4", "audio.mp4", "unreadable.mp4", "missing.mp4"):
        with pytest.raises(BrokenVideo, match=name):
            read_frames(broken[name], [0])
        assert len(os.listdir("/proc/self/fd")) == before
    damage = r"damaged.mkv: (frame \d+ of \d+ (is damaged|cannot be decoded)|.*Error)"
    with pytest.raises(BrokenVideo, match=damage), Video(broken["damaged.mkv"]) as video:
        list(video.every_frame())


def test_a_frame_that_is_missing_at_the_end_is_named(videos):
    with Video(videos["all_key_frames"]) as video:
        video.packets.pop()
        for decode in (lambda: list(video.every_frame()), lambda: video.frames([COUNT - 1])):
            with pytest.raises(BrokenVideo, match=f"frame {COUNT - 1} of {COUNT} cannot be decoded"):
                decode()


def test_a_codec_that_nobody_knows_is_named(tmp_path):
    codecs = [("a.mkv", "libx264", b"ISO/AVC"), ("a.avi", "mpeg4", b"FMP4"), ("a.mov", "libx264", b"avc1")]
    for file, codec, tag in codecs:
        path = write_numbered(tmp_path / file, 5, codec)
        content = path.read_bytes()
        path.write_bytes(content.replace(tag, tag[:-3] + b"qqq"))
        with pytest.raises(BrokenVideo, match=f"{file}: no decoder for its video"):
            Video(path)


def test_any_failure_to_decode_is_a_broken_video_but_lack_of_memory_ends_a_run(videos):
    def fail(*arguments: object, **options: object) -> None:
        raise error

    broken = [(error("odd"), BrokenVideo) for error in (RuntimeError, AttributeError, OverflowError)]
    with Video(videos["b_frames"]) as video:
        video.reformatter = SimpleNamespace(reformat=fail)
        for error, expected in (*broken, (MemoryError("b_frames.mp4: odd (MemoryError)"), MemoryError)):
            for decode in (lambda: video.frames([3]), lambda: list(video.every_frame())):
                with pytest.raises(expected, match=rf"b_frames.mp4: odd \({type(error).__name__}\)"):
                    decode()


def test_the_same_frames_give_the_same_file_with_the_options_and_times_given(tmp_path):
    frames = (2 * torch.arange(48).repeat(3, 32, 1) + 3 * torch.arange(20).view(20, 1, 1, 1)).byte()  # (20, 3, 32, 48)
    options, times = {"qp": "5", "preset": "ultrafast"}, [Fraction(i, 25) + Fraction(3 * (i > 5), 7) for i in range(20)]
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, frames, rate=8, options=options)
    write_mp4(tmp_path / "default.mp4", frames, rate=8)
    write_mp4(tmp_path / "times.mp4", frames, 25, options={"crf": "20", "bf": "3", "g": "5"}, times=times)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert (tmp_path / "default.mp4").stat().st_size < (tmp_path / "a.mp4").stat().st_size
    with Video(tmp_path / "a.mp4") as video:
        assert video.rate == 8 and video.times == [Fraction(i, 8) for i in range(20)]
        assert (video.frames(list(range(20))).int() - frames.int()).abs().max() < 8
    with Video(tmp_path / "times.mp4") as video:
        assert [float(time) for time in video.times] == pytest.approx([float(time) for time in times], abs=1e-4)
        assert len(video.keys) > 4  # two without the option
