"""Frames are the frames asked for; clips, crops and batches are what the paper and the authors' code say."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import av
import pytest
import torch
from conftest import SIZE, audio_only, number_of, turn_by_90, two_streams, write_numbered

import data
import masking
import support.datasets
import support.run
import support.video
from support.config import UserError

COUNT = 70
X264 = {
    "b_frames": {"g": "25", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0"},
    "open_gop": {"x264-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"},
    "one_key_frame": {"g": "1000", "bf": "7"},
    "all_key_frames": {"g": "1"},
}


def variants(folder: Path) -> dict[str, Path]:
    """Videos that differ in all that makes finding a frame hard."""
    videos = {name: write_numbered(folder / f"{name}.mp4", COUNT, options=options) for name, options in X264.items()}
    videos["late_start"] = write_numbered(folder / "late.mkv", COUNT, options=X264["b_frames"], times=[5000 + 40 * i for i in range(COUNT)])
    videos["late_start_mp4"] = write_numbered(folder / "late.mp4", COUNT, options=X264["b_frames"], times=[5000 + 40 * i for i in range(COUNT)])
    uneven = [int(40 * i + 15 * (i % 3) + 300 * (i > 30)) for i in range(COUNT)]
    videos["variable_rate"] = write_numbered(folder / "variable.mp4", COUNT, options=X264["b_frames"], times=uneven)
    videos["rotated"] = turn_by_90(write_numbered(folder / "rotated.mp4", COUNT, options=X264["b_frames"]))
    videos["two_streams"] = two_streams(folder / "two.mp4", COUNT)
    videos["avi_mpeg4_b_frames"] = write_numbered(folder / "ucf.avi", COUNT, "mpeg4", {"bf": "2", "g": "12"})
    videos["mpeg_ps"] = write_numbered(folder / "program.mpg", COUNT, "mpeg2video", {"bf": "2", "g": "12"})
    videos["mpeg_ts"] = write_numbered(folder / "transport.ts", COUNT, options=X264["open_gop"])
    videos["flv"] = write_numbered(folder / "flash.flv", COUNT, options=X264["b_frames"])
    videos["hevc_open_gop"] = write_numbered(folder / "hevc.mp4", COUNT, "libx265", {"x265-params": "keyint=12:min-keyint=12:bframes=4:open-gop=1:log-level=none"})
    videos["webm_vp9"] = write_numbered(folder / "ssv2.webm", COUNT, "libvpx-vp9", {"g": "20", "lag-in-frames": "16", "auto-alt-ref": "1", "deadline": "realtime"})
    videos["webm_vp8"] = write_numbered(folder / "old.webm", COUNT, "libvpx", {"g": "20", "lag-in-frames": "16", "auto-alt-ref": "1"})
    videos["gif"] = write_numbered(folder / "moving.gif", COUNT, "gif", pixel_format="rgb8")
    return videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return variants(tmp_path_factory.mktemp("variants"))


def decode_everything(path: Path) -> torch.Tensor:
    """All frames (T, 3, H, W) in the way of PyAV's own loop: the slow, sure reference."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(container.streams.best("video"))]
    return torch.stack(frames).permute(0, 3, 1, 2)


NAMES = [
    *X264, "late_start", "late_start_mp4", "variable_rate", "rotated", "two_streams", "avi_mpeg4_b_frames", "mpeg_ps", "mpeg_ts", "flv",
    "hevc_open_gop", "webm_vp9", "webm_vp8", "gif",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_those_asked_for(videos, name):
    path = videos[name]
    everything = decode_everything(path)
    with support.video.Video(path) as video:
        assert len(video) == COUNT == len(everything)
    if name == "rotated":  # clockwise: the left column becomes the top row
        everything = everything.rot90(-1, (2, 3))
        assert everything.shape[2:] == SIZE
    generator = torch.Generator().manual_seed(0)
    requests = [[0], [COUNT - 1], [5, 5, 5], [40, 3, 41, 2], list(range(0, COUNT, 4)), list(range(COUNT))]
    requests += [sorted(torch.randint(COUNT, (8,), generator=generator).tolist()) for _ in range(12)]
    for indices in requests:
        frames = support.video.read_frames(path, indices)
        assert frames.dtype == torch.uint8 and frames.shape == (len(indices), *everything.shape[1:])
        assert torch.equal(frames, everything[indices]), (name, indices)
        upright = frames if name != "rotated" else frames.rot90(1, (2, 3))
        assert [number_of(frame) for frame in upright] == indices


def test_the_same_video_serves_several_requests(videos):
    with support.video.Video(videos["open_gop"]) as video:
        for indices in ([60, 61], [3], [30, 5]):
            assert [number_of(frame) for frame in video.frames(indices)] == indices


def test_only_what_is_needed_is_decoded(videos):
    """Frames 50 to 53 of a file with a key frame every 25: nothing before 50, and no unreferenced frame among the rest."""
    with support.video.Video(videos["b_frames"]) as video:
        fed = []
        class Codec:
            def __init__(self, codec): self.__dict__["codec"] = codec
            def __getattr__(self, name): return getattr(self.codec, name)
            def __setattr__(self, name, value): setattr(self.codec, name, value)
            def decode(self, packet):
                if packet is not None: fed.append(packet.pts)
                return self.codec.decode(packet)
        wrapped = Codec(video.stream.codec_context)
        class Stream:
            codec_context, width, height = wrapped, video.stream.width, video.stream.height
        video.stream = Stream()
        assert [number_of(frame) for frame in video.frames([50, 53])] == [50, 53]
    assert min(fed) >= sorted({p.pts for p in video.packets})[50] and len(fed) < 10


@pytest.mark.parametrize("index", [-1, COUNT])
def test_frames_that_do_not_exist_are_refused(videos, index):
    with pytest.raises(IndexError, match="has frames 0 to 69"):
        support.video.read_frames(videos["b_frames"], [0, index])


# ---- broken files ----


def broken_files(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    whole = write_numbered(folder / "whole.mp4", 40).read_bytes()
    (folder / "whole.mp4").unlink()
    contents = {"truncated.mp4": whole[: len(whole) // 2], "empty.mp4": b"", "text.mp4": b"not a video\n" * 50}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    audio_only(folder / "audio.mp4")
    (folder / "unreadable.mp4").symlink_to("unreadable.mp4")  # leads to itself: not even root can read it
    damaged = bytearray(write_numbered(folder / "damaged.mkv", 40, options={"g": "1"}).read_bytes())
    damaged[len(damaged) // 4 : -200] = os.urandom(len(damaged) - 200 - len(damaged) // 4)
    (folder / "damaged.mkv").write_bytes(damaged)
    return {path.name: path for path in [*folder.iterdir(), folder / "missing.mp4"]}


@pytest.mark.parametrize("name", ["truncated.mp4", "empty.mp4", "text.mp4", "audio.mp4", "unreadable.mp4", "missing.mp4"])
def test_broken_files_are_named_and_leave_nothing_open(tmp_path, name):
    path = broken_files(tmp_path / "broken")[name]
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(support.video.BrokenVideo, match=name):
        support.video.read_frames(path, [0])
    assert len(os.listdir("/proc/self/fd")) == before


def dataset(videos: list[Path], **options) -> data.PretrainingClips:
    defaults = dict(frames=8, stride=2, size=32, scales=[1.0, 0.875, 0.75, 0.66], flip=True, seed=0)
    return data.PretrainingClips(videos, **{**defaults, **options}, draw_mask=partial(masking.random_mask, (4, 2, 2), 0.75))


def test_training_survives_broken_videos_and_names_them(tmp_path, videos):
    broken = broken_files(tmp_path / "broken")
    one_frame = write_numbered(tmp_path / "one.mp4", 1)
    (tmp_path / "folder.mp4").mkdir()
    clips = dataset([*broken.values(), tmp_path / "folder.mp4", one_frame, videos["b_frames"]])
    for index in range(len(clips)):
        clip, _, _, reports = clips[0, index]
        assert clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8
        name = clips.videos[index].name
        if name in ("truncated.mp4", "empty.mp4", "text.mp4", "audio.mp4", "unreadable.mp4", "missing.mp4", "folder.mp4"):
            assert name in reports[0]
        if name in ("one.mp4", "b_frames.mp4"):
            assert not reports
    assert torch.equal(clips[0, len(clips) - 2][0], clips[0, len(clips) - 2][0][:1].expand(8, -1, -1, -1))  # the one frame, repeated


def test_nothing_readable_ends_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="100 videos in a row could not be read"):
        dataset([tmp_path / "a.mp4", tmp_path / "b.mp4"])[0, 0]


def test_memory_and_handles_stay_flat_over_2000_clips(videos):
    clips = dataset([videos["b_frames"], videos["avi_mpeg4_b_frames"]])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for index in range(300):
        clips[0, index % 2]
    memory, handles = resident(), len(os.listdir("/proc/self/fd"))
    for index in range(2000):
        clips[1 + index, index % 2]
    assert resident() - memory < 8e6
    assert len(os.listdir("/proc/self/fd")) == handles


# ---- lists ----


def test_videos_of_a_tree_and_of_a_list(tmp_path):
    for name in ("b/arm wrestling/x 1.mp4", "a/y.AVI", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tree = [tmp_path / "a/y.AVI", tmp_path / "b/arm wrestling/x 1.mp4"]
    assert support.datasets.list_videos(str(tmp_path), "") == tree
    assert support.datasets.list_videos(str(tmp_path), "b") == tree[1:]
    (tmp_path / "train.txt").write_text("a/y.AVI 3\r\n\r\nb/arm wrestling/x 1.mp4 12\r\nb/other.mp4\r\n")
    assert support.datasets.list_videos(str(tmp_path), "train.txt") == [*tree, tmp_path / "b/other.mp4"]
    (tmp_path / "kinetics.csv").write_text("b/arm wrestling/x 1.mp4,12\n/elsewhere/z.webm,0\n")
    assert support.datasets.list_videos(str(tmp_path), str(tmp_path / "kinetics.csv")) == [tree[1], Path("/elsewhere/z.webm")]


def test_no_videos_ends_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no videos found in"):
        support.datasets.list_videos(str(tmp_path), "")
    with pytest.raises(UserError, match="no folder or list file"):
        support.datasets.list_videos(str(tmp_path), "none.txt")


# ---- clips ----


def test_dense_clip_by_hand():
    starts = Counter(data.dense_clip(70, 16, 4, support.run.sample_generator(0, 0, i))[0] for i in range(700))
    assert set(starts) == set(range(7))  # 70 - 64 = 6 is the last start
    assert min(starts.values()) > 60
    assert data.dense_clip(64, 16, 4, support.run.sample_generator(0, 0, 0)) == list(range(0, 64, 4))
    assert data.dense_clip(10, 6, 4, support.run.sample_generator(0, 0, 0)) == [0, 4, 8, 8, 8, 8]  # repeats the last index reached
    assert data.dense_clip(1, 4, 2, support.run.sample_generator(0, 0, 0)) == [0, 0, 0, 0]
    assert data.dense_clip(63, 16, 4, support.run.sample_generator(0, 0, 0))[-1] == 60
    assert data.dense_clip(74, 16, 4) == list(range(5, 69, 4))  # the middle


def test_multi_scale_crop():
    scales = [1.0, 0.875, 0.75, 0.66]
    boxes = [data.multi_scale_crop(256, 340, 224, scales, support.run.sample_generator(0, 0, i)) for i in range(4000)]
    sides = Counter(box[2:] for box in boxes)
    # 256 * .875 = 224; 256 * .75 = 192; 256 * .66 = 168: pairs at most one scale apart
    assert set(sides) == {(a, b) for i, a in enumerate([256, 224, 192, 168]) for j, b in enumerate([256, 224, 192, 168]) if abs(i - j) <= 1}
    assert min(sides.values()) > 300
    places = Counter(box[:2] for box in boxes if box[2:] == (192, 192))
    y, x = (256 - 192) // 4, (340 - 192) // 4
    assert set(places) == {(a * y, b * x) for a in (0, 2, 4) for b in (0, 2, 4)} | {(a * y, b * x) for a in (1, 3) for b in (1, 3)}
    assert all(top + height <= 256 and left + width <= 340 for top, left, height, width in boxes)
    assert data.multi_scale_crop(226, 300, 224, [1.0], support.run.sample_generator(0, 0, 0))[2:] == (224, 224)  # snaps within 2 pixels


def test_a_sample_is_a_function_of_seed_epoch_and_index(videos):
    paths = [videos["b_frames"], videos["open_gop"]]
    first, again, other_epoch, other_seed = dataset(paths)[3, 1], dataset(paths)[3, 1], dataset(paths)[4, 1], dataset(paths, seed=1)[3, 1]
    torch.rand(7)  # the global generator plays no part
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3]))
    assert not torch.equal(first[0], other_epoch[0]) and not torch.equal(first[0], other_seed[0])


def test_flip_happens_to_half_of_the_clips_and_to_whole_clips(videos):
    clips = dataset([videos["b_frames"]], scales=[1.0], stride=1, frames=4)
    plain = dataset([videos["b_frames"]], scales=[1.0], stride=1, frames=4, flip=False)
    flipped = 0
    for epoch in range(60):
        a, b = clips[epoch, 0][0], plain[epoch, 0][0]
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
        flipped += torch.equal(a, b.flip(-1))
    assert 15 < flipped < 45


def test_resize_is_close_to_pil(videos):
    from PIL import Image

    frame = support.video.read_frames(videos["b_frames"], [33])
    ours = data.TF.resized_crop(frame, 3, 5, 50, 60, [32, 32], antialias=True)[0]
    image = Image.fromarray(frame[0].permute(1, 2, 0).contiguous().numpy()).crop((5, 3, 65, 53)).resize((32, 32), Image.BILINEAR)
    assert (ours.int() - data.TF.pil_to_tensor(image).int()).abs().max() <= 2


def test_normalize():
    frames = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    clip = data.normalize(frames)
    assert clip.shape == (2, 3, 4, 8, 8)
    assert torch.allclose(clip[1, 2, 3], (frames[1, 3, 2] / 255 - 0.406) / 0.225, atol=1e-6)


# ---- batches ----


def batches(world_size: int, per_device: int, start: int = 0) -> list[list[tuple[int, int]]]:
    """The global batches that `world_size` processes form together."""
    shares = [
        list(data.GlobalBatches(length=50, batch_size=12, per_device=per_device, rank=rank, world_size=world_size, seed=5, start=start, steps=9))
        for rank in range(world_size)
    ]
    pieces = 12 // world_size // per_device
    assert all(len(share) == (9 - start) * pieces for share in shares)
    return [sorted(sum((share[step * pieces + piece] for share in shares for piece in range(pieces)), [])) for step in range(9 - start)]


def test_batches_do_not_depend_on_processes_or_pieces_or_where_a_run_starts():
    alone = batches(1, 12)
    assert batches(2, 6) == alone and batches(3, 2) == alone and batches(1, 4) == alone
    assert batches(2, 3, start=5) == alone[5:]


def test_every_epoch_is_a_shuffle_without_repetition():
    alone = batches(1, 12)
    for epoch in range(2):
        seen = sum(alone[epoch * 4 : epoch * 4 + 4], [])
        assert {e for e, _ in seen} == {epoch} and len(set(seen)) == 48
    assert sum(alone[:4], []) != [(0, index) for _, index in sum(alone[4:8], [])]
