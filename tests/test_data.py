"""Clips, crops and batches are what the paper and the authors' code say."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from videos import broken_files, write_numbered

import data
import masking
import support.datasets
import support.run
import support.video
from support.config import UserError

@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """70 numbered frames each."""
    folder = tmp_path_factory.mktemp("videos")
    open_gop = {"x264-params": "keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"}
    return {
        "b_frames": write_numbered(folder / "b_frames.mp4", 70, options={"g": "25", "bf": "3"}),
        "open_gop": write_numbered(folder / "open_gop.mp4", 70, options=open_gop),
        "avi_mpeg4_b_frames": write_numbered(folder / "ucf.avi", 70, "mpeg4", {"bf": "2", "g": "12"}),
    }


# ---- broken files ----


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
