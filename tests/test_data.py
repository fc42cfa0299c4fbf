"""Clips, crops, augmentations, views and batches are what the paper and the authors' code say."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_numbered
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from videos import broken_files, coordinates

import data
import masking
import support.video
from baselines import moco_v3
from data import sample_generator
from support.config import load_config
from support.processes import Processes

SCALES = [1.0, 0.875, 0.75, 0.66]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """70 numbered frames each: H.264 with B-frames, MPEG-4 in AVI, H.264 with short GOPs."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_numbered(folder / "b_frames.mp4", 70, options={"g": "25", "bf": "3"}),
        write_numbered(folder / "mpeg4.avi", 70, "mpeg4", {"bf": "2", "g": "12"}),
        write_numbered(folder / "short_gop.mp4", 70, options={"g": "10"}),
    ]


def sampled(function, *arguments, count: int = 600) -> list:
    return [function(*arguments, sample_generator(0, 0, number)) for number in range(count)]


GENERATOR = torch.Generator()
BY_HAND = [  # function, (length, frames, stride, ...), the only result
    (data.dense_clip, (64, 16, 4, GENERATOR), list(range(0, 64, 4))),
    (data.dense_clip, (10, 6, 4, GENERATOR), [0, 4, 8, 8, 8, 8]),  # repeats the last index reached
    (data.dense_clip, (63, 16, 4, GENERATOR), list(range(0, 64, 4))),
    (data.dense_clip, (74, 16, 4), list(range(5, 69, 4))),  # the middle
    (data.repeated_clips, (10, 8, 4, 2, GENERATOR), [[0, 4, 8, 8, 8, 8, 8, 8]] * 2),
    # floor(i N / 8), not the authors' eight times frame 0
    (data.uniform_training_clip, (5, 8, 2, GENERATOR), [0, 0, 1, 1, 2, 3, 3, 4]),
    # 75 frames 4 apart, 59 to spare: starts at 0, 14, 29, 44, 59 of them
    (data.dense_test_clips, (300, 16, 4, 5), [list(range(start, start + 64, 4)) for start in (0, 56, 116, 176, 236)]),
    (data.dense_test_clips, (65, 16, 4, 3), [list(range(start, start + 64, 4)) for start in (0, 0, 4)]),
    (data.dense_test_clips, (64, 16, 4, 2), [list(range(0, 64, 4))] * 2),
    (data.dense_test_clips, (10, 6, 4, 2), [[0, 4, 8, 8, 8, 8]] * 2),
    (data.dense_test_clips, (1, 6, 4, 2), [[0] * 6] * 2),
    (data.dense_test_clips, (300, 16, 4, 1), [list(range(116, 180, 4))]),  # a single one: in the middle
    (data.uniform_test_clips, (40, 8, 2, 2), [list(range(0, 40, 5)), list(range(2, 40, 5))]),  # part 5: 0, 2.5, 5, ...
    (data.uniform_test_clips, (6, 4, 2, 2), [[0, 1, 3, 4], [0, 2, 3, 5]]),  # 0 0.75 1.5 2.25 3 3.75 4.5 5.25
    (data.uniform_test_clips, (40, 8, 2, 1), [list(range(2, 40, 5))]),
    (data.uniform_test_clips, (3, 4, 2, 2), [[0, 0, 1, 2], [0, 1, 1, 2]]),  # 0 0.375 0.75 1.125 1.5 1.875 2.25 2.625
    (data.uniform_test_clips, (1, 4, 2, 2), [[0] * 4] * 2),
]


@pytest.mark.parametrize("function, arguments, expected", BY_HAND)
def test_clips_by_hand(function, arguments, expected):
    assert function(*arguments) == expected


def test_starts_are_uniform():
    starts = Counter(clip[0] for clip in sampled(data.dense_clip, 70, 16, 4, count=700))
    assert set(starts) == set(range(7)) and min(starts.values()) > 60  # 70 - 64 = 6 is the last start
    # here the end is uniform in [64, 70), and frame 69 never in a clip
    starts = Counter(clip[0] for clip in sampled(data.dense_training_clip, 70, 16, 4))
    assert set(starts) == set(range(6)) and min(starts.values()) > 60


def test_repeated_clips_start_uniformly_and_share_frames():
    starts = Counter()
    for index in range(4000):
        clips = data.repeated_clips(60, 8, 4, 3, sample_generator(0, 0, index))  # starts from 0 to 28
        assert clips[0] == data.dense_clip(60, 8, 4, sample_generator(0, 0, index))  # the first as without repeats
        assert all(clip == list(range(clip[0], clip[0] + 32, 4)) for clip in clips)
        assert len({clip[0] % 4 for clip in clips}) == 1
        starts.update(clip[0] for clip in clips[1:])
    assert sorted(starts) == list(range(29))
    expected = 8000 / 29
    # chi-squared, 28 degrees of freedom: p 0.0004
    assert sum((count - expected) ** 2 / expected for count in starts.values()) < 60


@pytest.mark.parametrize("length", [1, 3, 15, 16, 40, 63, 64, 65, 100, 301])
def test_dense_training_clip_as_the_authors_compute_it(length):
    frames, stride, span = 16, 4, 64
    for clip in sampled(data.dense_training_clip, length, frames, stride, count=20):
        if length > span:
            end = clip[-1] + 1
            assert span <= end < length
            expected = np.clip(np.linspace(end - span, end, num=frames), end - span, end - 1)
        else:
            repeats = np.full(frames - length // stride, length)
            expected = np.concatenate((np.linspace(0, length, num=length // stride), repeats))
            expected = np.clip(expected, 0, length - 1)
        assert clip == expected.astype(np.int64).tolist()


def test_uniform_training_clip_is_random_in_each_part():
    clips = sampled(data.uniform_training_clip, 37, 8, 2)
    # 37 // 8 = 4; the last 5 frames are never in a clip
    assert all(i * 4 <= index < i * 4 + 4 for clip in clips for i, index in enumerate(clip))
    assert {clip[3] for clip in clips} == {12, 13, 14, 15} and {clip[7] for clip in clips} == {28, 29, 30, 31}
    assert len({clip[0] + 4 - clip[1] for clip in clips}) > 3  # each by itself


def test_multi_scale_crop():
    boxes = sampled(data.multi_scale_crop, 256, 340, 224, SCALES, count=4000)
    sides = Counter(box[2:] for box in boxes)
    # 256 * .875 = 224; 256 * .75 = 192; 256 * .66 = 168: pairs at most one scale apart
    lengths = [256, 224, 192, 168]
    assert set(sides) == {(a, b) for i, a in enumerate(lengths) for j, b in enumerate(lengths) if abs(i - j) <= 1}
    assert min(sides.values()) > 300
    places = Counter(box[:2] for box in boxes if box[2:] == (192, 192))
    y, x = (256 - 192) // 4, (340 - 192) // 4
    expected = {(a * y, b * x) for a in (0, 2, 4) for b in (0, 2, 4)} | {(a * y, b * x) for a in (1, 3) for b in (1, 3)}
    assert set(places) == expected
    assert all(top + height <= 256 and left + width <= 340 for top, left, height, width in boxes)
    box = data.multi_scale_crop(226, 300, 224, [1.0], sample_generator(0, 0, 0))
    assert box[2:] == (224, 224)  # snaps within 2 pixels


def test_resizing_in_pretraining_is_close_to_pil(videos, monkeypatch):
    frame = support.video.read_frames(videos[0], [33])
    monkeypatch.setattr(data, "multi_scale_crop", lambda *_: (3, 5, 50, 60))
    crop = data.resized_multi_scale_crop(frame, torch.Generator(), 32, SCALES, flip=False)[0]
    image = TF.to_pil_image(frame[0]).crop((5, 3, 65, 53)).resize((32, 32), Image.BILINEAR)
    assert (crop.int() - TF.pil_to_tensor(image).int()).abs().max() <= 2


def test_half_of_the_pretraining_clips_are_flipped_as_a_whole():
    flipped = 0
    for number in range(60):
        frames = coordinates(32, 32)
        clip = data.resized_multi_scale_crop(frames, sample_generator(0, 0, number), 32, [1.0], flip=True)
        assert torch.equal(clip, frames) or torch.equal(clip, frames.flip(-1))
        flipped += torch.equal(clip, frames.flip(-1))
        assert torch.equal(frames, data.resized_multi_scale_crop(frames, torch.Generator(), 32, [1.0], flip=False))
    assert 15 < flipped < 45


RESIZED = [  # height and width before and after
    *[((256, 340), (224, 297)), ((240, 320), (224, 298)), ((480, 270), (398, 224)), ((100, 100), (224, 224))],
    *[((61, 80), (224, 293)), ((224, 301), (224, 301)), ((301, 224), (301, 224)), ((224, 224), (224, 224))],
]


@pytest.mark.parametrize("size, resized", RESIZED)
def test_crop_views_go_from_one_end_to_the_other(size, resized):
    clip = coordinates(*size)
    # The authors' cv2.resize and F.interpolate do not antialias.
    whole, spare = F.interpolate(clip.float(), resized, mode="bilinear"), max(resized) - 224
    along = 2 if resized[0] > resized[1] else 3
    for starts in ([spare // 2], [0, spare // 2, spare]):
        expected = torch.stack([whole.narrow(along, start, 224) for start in starts])
        assert (data.crop_views(clip, 224, len(starts)) - expected).abs().max() <= (size != resized)


def test_normalize():
    frames = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    clip = data.normalize(frames)
    assert clip.shape == (2, 3, 4, 8, 8)
    assert torch.allclose(clip[1, 2, 3], (frames[1, 3, 2] / 255 - 0.406) / 0.225, atol=1e-6)
    other = data.normalize(frames, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    assert torch.allclose(other[0, 1, 2], (frames[0, 2, 1] / 255 - 0.4) / 0.2, atol=1e-6)


def pretraining_clips(videos: list[Path], **options) -> data.PretrainingClips:
    defaults = dict(frames=8, stride=2, size=32, scales=SCALES, flip=True, seed=0)
    sample_mask = partial(masking.random_mask, (4, 2, 2), 0.75)
    return data.PretrainingClips(videos, **{**defaults, **options}, sample_mask=sample_mask)


def labelled_clips(videos: list[Path], **options) -> data.LabelledClips:
    data_config = SimpleNamespace(frames=6, stride=2, sampling="dense")
    augment = partial(data.resized_multi_scale_crop, size=32, scales=SCALES, flip=True)
    defaults = dict(data_config=data_config, augment=augment, repeats=2, seed=0)
    return data.LabelledClips([(path, i) for i, path in enumerate(videos)], **{**defaults, **options})


@pytest.mark.parametrize("repeats, ratio, count", [(1, 0.0, 12), (4, 0.0, 12), (4, 0.5, 6)])
def test_repeats_are_clips_of_one_video_with_crops_and_masks_of_their_own(repeats, ratio, count, tmp_path):
    video = write_numbered(tmp_path / "video.mp4", 90)
    cells = partial(masking.running_cells, grid=(4, 2, 2), ratio=ratio)
    samples = pretraining_clips([video], repeats=repeats, scales=[1.0], choose_reconstructed=cells)
    clips, visible, masked, broken = samples[0, 0]
    assert clips.shape == (repeats, 8, 3, 32, 32) and not broken
    assert visible.shape == (repeats, 4) and masked.shape == (repeats, count)
    generator = sample_generator(0, 0, 0)
    expected = data.repeated_clips(90, 8, 2, repeats, generator)
    for number, indices in enumerate(expected):
        frames = support.video.read_frames(video, indices)
        assert torch.equal(clips[number], data.resized_multi_scale_crop(frames, generator, 32, [1.0], True))
        seen, unseen = masking.split(masking.random_mask((4, 2, 2), 0.75, generator))
        assert torch.equal(visible[number], seen)
        assert torch.equal(masked[number], cells(unseen, generator=generator))
    assert repeats == 1 or len({tuple(positions.tolist()) for positions in masked}) > 1


def test_training_survives_broken_videos_and_names_them(tmp_path, videos):
    broken, one_frame = broken_files(tmp_path / "broken"), write_numbered(tmp_path / "one.mp4", 1)
    (tmp_path / "broken/folder.mp4").mkdir()
    broken["folder.mp4"] = tmp_path / "broken/folder.mp4"
    damaged = broken.pop("damaged.mkv")  # of which some frames can be read
    clips = pretraining_clips([*broken.values(), damaged, videos[0], one_frame])
    for index, path in enumerate(clips.videos):
        clip, _, _, reports = clips[0, index]
        assert clip.shape == (1, 8, 3, 32, 32) and clip.dtype == torch.uint8
        if path != damaged:
            assert path.name in reports[0] if path.name in broken else not reports
    assert torch.equal(clip, clip[:, :1].expand_as(clip))  # the one frame, repeated
    for epoch in range(5):  # the other video comes with its own label
        _, label, reports = labelled_clips([broken["text.mp4"], videos[0]])[epoch, 0]
        assert label == 1 and "text.mp4" in reports[0]


def test_memory_and_handles_stay_flat_over_600_clips(videos):
    clips, resident, handles = pretraining_clips(videos[:2]), [], []
    for index in range(900):
        clips[index, index % 2]
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        handles.append(len(os.listdir("/proc/self/fd")))
    assert resident[-1] - resident[300] < 6e6 and handles[-1] == handles[300]


CONFIG = load_config(moco_v3.DEFAULT, ["data.frames=4", "data.stride=2", "data.size=32"])
two_views = partial(moco_v3.TwoViews, seed=0, config=CONFIG.data)


@pytest.mark.parametrize("make", [pretraining_clips, labelled_clips, two_views])
def test_a_sample_is_a_function_of_seed_epoch_and_index(make, videos):
    first = make(videos)[3, 1]
    assert first[0].dtype == torch.uint8 and first[0].shape[-2:] == (32, 32)
    torch.rand(7)  # the global generator plays no part
    state = torch.get_rng_state()
    assert all(map(torch.equal, first[:-1], make(videos)[3, 1][:-1]))
    for other in (make(videos)[4, 1], make(videos, seed=1)[3, 1], make(videos)[3, 0]):
        assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def decoded(monkeypatch) -> list[list[int]]:
    """The indices of each call that decodes frames."""
    calls = []

    class Recorded(support.video.Video):
        def frames(self, indices):
            calls.append(indices)
            return super().frames(indices)

    monkeypatch.setattr(data, "Video", Recorded)
    return calls


def test_repeated_augmentation_decodes_once_and_augments_the_same_frames_differently(videos, decoded):
    clips, label, broken = labelled_clips(videos[:1], repeats=3)[0, 0]
    assert clips.shape == (3, 6, 3, 32, 32) and label == 0 and not broken
    assert len(decoded) == 1 and len(decoded[0]) == 6
    assert not torch.equal(clips[0], clips[1]) and not torch.equal(clips[1], clips[2])
    same, _, _ = labelled_clips(videos[:1], repeats=3, augment=lambda frames, _: frames)[0, 0]
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2])  # the same frames


@pytest.mark.parametrize("sampling, clips", [("dense", 5), ("uniform", 2)])
def test_views_are_the_right_pixels_and_every_frame_is_decoded_once(tmp_path, decoded, sampling, clips):
    video = write_numbered(tmp_path / "video.mp4", 40)
    views = data.TestViews([video], frames=8, stride=3, sampling=sampling, size=64, clips=clips, crops=3)
    index, pixels, reason = views[0]
    assert (index, reason, pixels.shape) == (0, "", (clips * 3, 8, 3, 64, 64))
    everything = support.video.read_frames(video, list(range(40)))  # 96 x 64: nothing is resized
    indices = data.SAMPLING[sampling][1](40, 8, 3, clips)
    expected = [everything[clip][..., start : start + 64] for clip in indices for start in (0, 16, 32)]
    assert torch.equal(pixels, torch.stack(expected))
    assert decoded == [sorted(set(sum(indices, [])))]


def test_every_epoch_is_a_shuffle_without_repetition():
    ranks = (0, 1), (0, 2), (1, 2)  # one process, and two
    processes = [Processes(*rank, torch.device("cpu"), torch.float32) for rank in ranks]
    alone = [sorted(batch) for batch in data.MicroBatchSampler(50, 12, 12, range(8), processes[0], seed=5)]
    for epoch in range(2):
        seen = sum(alone[epoch * 4 : epoch * 4 + 4], [])
        assert {e for e, _ in seen} == {epoch} and len(set(seen)) == 48
    assert sum(alone[:4], []) != [(0, index) for _, index in sum(alone[4:], [])]
    resumed = range(5, 8)
    batches = [[*data.MicroBatchSampler(50, 12, 3, resumed, process, seed=5)] for process in processes[1:]]
    shards = [sum(shard[4:6], []) for shard in batches]  # of the last step, two micro-batches each
    assert sorted(shards[0] + shards[1]) == alone[7]
