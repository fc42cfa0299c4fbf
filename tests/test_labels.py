"""Labels as each dataset's own files give them; which frames and which pixels a labelled clip is made of."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import numbered_frame, run, write_numbered
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
import support.datasets
import support.run
import support.video
from support.config import UserError

# ---- the datasets as they are distributed ----


def tree(root: Path, *videos: str, **files: str | bytes) -> Path:
    """Empty files for videos, and text files: `labels_train_json="..."` stands for labels/train.json."""
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, content in files.items():
        path = root / "/".join(name.replace("_txt", ".txt").replace("_json", ".json").replace("_csv", ".csv").split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def relative(root: Path, videos: list[tuple[Path, int]]) -> list[tuple[str, int]]:
    return [(path.relative_to(root).as_posix(), label) for path, label in videos]


def test_kinetics_folder_tree(tmp_path):
    root = tree(tmp_path, "train/riding a bike/b_000001_000011.mp4", "train/abseiling/a_000003_000013.mp4", "train/abseiling/c.MKV",
                "val/abseiling/d.mp4", "val/riding_a_bike/e.mp4", "train/abseiling/readme.txt", "train/zumba/f.webm")  # fmt: skip
    train, val, names = support.datasets.labelled(str(root), "train", "val", "")
    assert names == ["abseiling", "riding a bike", "zumba"]
    assert relative(root, train) == [
        ("train/abseiling/a_000003_000013.mp4", 0), ("train/abseiling/c.MKV", 0), ("train/riding a bike/b_000001_000011.mp4", 1), ("train/zumba/f.webm", 2)
    ]  # fmt: skip
    assert relative(root, val) == [("val/abseiling/d.mp4", 0), ("val/riding_a_bike/e.mp4", 1)]
    (root / "names.txt").write_text("zumba\r\nriding a bike\r\nabseiling\r\n")  # the file's order, not the alphabet's
    assert [label for _, label in support.datasets.labelled(str(root), "train", "val", "names.txt")[0]] == [0, 1, 2, 2]
    assert Counter(label for _, label in support.datasets.labelled(str(root), "train", "val", "", per_class=1)[0]) == {0: 1, 1: 1, 2: 1}
    assert len(support.datasets.labelled(str(root), "train", "val", "", per_class=1)[1]) == 2  # all are tested


def test_kinetics_csv(tmp_path):
    head = "label,youtube_id,time_start,time_end,split\r\n"
    root = tree(
        tmp_path, "train/-abc_def_000012_000022.mp4", "somewhere/else/XYZ_000100_000110.mkv",
        train_csv=head + "riding a bike,-abc_def,12,22,train\r\n" + '"cutting, pineapple",XYZ,100,110,train\r\n',
        val_csv="\ufeff" + head + "riding a bike,gone,7,17,validate\r\n",
    )  # fmt: skip
    train, val, names = support.datasets.labelled(str(root), "train.csv", "val.csv", "")
    assert names == ["cutting, pineapple", "riding a bike"]
    assert relative(root, train) == [("somewhere/else/XYZ_000100_000110.mkv", 0), ("train/-abc_def_000012_000022.mp4", 1)]
    assert [path.name for path, _ in val] == ["gone_000007_000017"]  # not downloaded: to be counted as wrong, not forgotten


def test_something_something_json(tmp_path):
    def entry(number: int, template: str) -> dict:
        return {"id": str(number), "label": "holding a cup", "template": template, "placeholders": ["a cup"]}

    root = tree(
        tmp_path, "20bn-something-something-v2/1.webm", "20bn-something-something-v2/78687.webm", "20bn-something-something-v2/20.webm",
        labels__labels_json=json.dumps({"Holding something next to something": "0", "Approaching something with your camera": "2", "Closing something": "1"}),
        labels__train_json=json.dumps([entry(78687, "Holding [something] next to [something]"), entry(1, "Closing [something]")]),
        labels__validation_json=json.dumps([entry(20, "Approaching [something] with your camera"), entry(21, "Closing [something]")]),
        labels__test_json=json.dumps([{"id": "1"}]),
    )  # fmt: skip
    train, val, names = support.datasets.labelled(str(root), "labels/train.json", "labels/validation.json", "labels/labels.json")
    assert names == ["Holding something next to something", "Closing something", "Approaching something with your camera"]
    assert relative(root, train) == [("20bn-something-something-v2/78687.webm", 0), ("20bn-something-something-v2/1.webm", 1)]
    assert [(path.stem, label) for path, label in val] == [("20", 2), ("21", 1)]
    with pytest.raises(UserError, match="test.json: id 1: no label for 1.webm"):
        support.datasets.labelled(str(root), "labels/train.json", "labels/test.json", "labels/labels.json")


def test_ucf101_lists(tmp_path):
    root = tree(
        tmp_path, "YoYo/v_YoYo_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        classInd_txt="1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n",
        trainlist01_txt="ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nYoYo/v_YoYo_g08_c01.avi 3\r\n",
        testlist01_txt="HandstandPushups/v_HandStandPushups_g01_c01.avi\r\nYoYo/v_YoYo_g01_c01.avi\r\n",
    )  # fmt: skip
    train, val, names = support.datasets.labelled(str(root), "trainlist01.txt", "testlist01.txt", "classInd.txt")
    assert names == ["ApplyEyeMakeup", "HandstandPushups", "YoYo"]
    assert relative(root, train) == [("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 0), ("YoYo/v_YoYo_g08_c01.avi", 2)]
    assert [label for _, label in val] == [1, 2]  # counted from 1 in the dataset's files


def test_hmdb51_splits(tmp_path):
    root = tree(
        tmp_path,
        splits__brush_hair_test_split1_txt="a b (1).avi 1 \r\nc.avi 2 \r\nd.avi 0 \r\n",
        splits__wave_test_split1_txt="\ufeffe.avi 1 \nf.avi 2 \n\n",
        splits__wave_test_split2_txt="e.avi 2 \nf.avi 1 \n",
    )
    train, val, names = support.datasets.labelled(str(root), "splits/*_test_split1.txt=1", "splits/*_test_split1.txt=2", "")
    assert names == ["brush_hair", "wave"]
    assert relative(root, train) == [("brush_hair/a b (1).avi", 0), ("wave/e.avi", 1)]
    assert relative(root, val) == [("brush_hair/c.avi", 0), ("wave/f.avi", 1)]
    assert relative(root, support.datasets.labelled(str(root), "splits/*_test_split2.txt=1", "splits/*_test_split2.txt=2", "")[0]) == [("wave/f.avi", 0)]


def test_plain_list(tmp_path):
    root = tree(tmp_path, train_txt="\ufeffb/arm wrestling/x 1.mp4 2\r\n\r\ny.AVI\t0\r\n/elsewhere/z, 3.webm,1\r\n", val_txt="w.mp4 02\n")
    train, val, names = support.datasets.labelled(str(root), "train.txt", "val.txt", "")
    assert train == [(root / "y.AVI", 0), (Path("/elsewhere/z, 3.webm"), 1), (root / "b/arm wrestling/x 1.mp4", 2)]
    assert val == [(root / "w.mp4", 2)] and names == ["0", "1", "2"]


def test_plain_list_with_names_of_classes(tmp_path):
    root = tree(tmp_path, train_txt="a b.mp4 arm wrestling\nc.mp4,abseiling\n", val_txt="d.mp4 Arm_Wrestling\n")
    train, val, names = support.datasets.labelled(str(root), "train.txt", "val.txt", "")
    assert names == ["abseiling", "arm wrestling"] and train == [(root / "c.mp4", 0), (root / "a b.mp4", 1)] and val == [(root / "d.mp4", 1)]


def test_folders_named_by_numbers(tmp_path):
    root = tree(tmp_path, "train/00/a.mp4", "train/01/b.mp4", "val/01/c.mp4")
    train, val, names = support.datasets.labelled(str(root), "train", "val", "")
    assert len(names) == 2 and [label for _, label in train] == [0, 1] and [label for _, label in val] == [1]


GOOD = {"train_txt": "a.mp4 0\nb.mp4 1\n", "val_txt": "c.mp4 1\n", "names_txt": "one\ntwo\n"}
JSON = '[{"id": "1", "template": "one"}]'


@pytest.mark.parametrize(
    "files, train, classes, sentence",
    [
        ({"train_txt": "a.mp4 0\nb.mp4\n"}, "train.txt", "", "train.txt, line 2: no label for b.mp4"),
        ({"train_txt": "a.mp4\nb.mp4\n"}, "train.txt", "", "train.txt, line 1: no label for a.mp4"),
        ({"train_txt": "a.mp4 0\nb.mp4\n"}, "train.txt", "names.txt", "train.txt, line 2: no label for b.mp4"),
        ({"train_txt": "a.mp4 0\n\nb.mp4 2\n"}, "train.txt", "names.txt", "train.txt, line 3: label 2 is out of range for b.mp4"),
        ({"val_txt": "c.mp4 0\nd.mp4 7\n"}, "train.txt", "", "val.txt, line 2: label 7 is out of range for d.mp4"),
        ({"val_txt": "one/c.mp4\nthree/d.mp4\n"}, "train.txt", "names.txt", "val.txt, line 2: unknown class 'three' for d.mp4"),
        ({"train_txt": "a.mp4 0\r\nb c.mp4 1\r\n./a.mp4 1\r\n"}, "train.txt", "", "train.txt, line 3: ROOT/a.mp4 is named a second time, after ROOT/train.txt, line 1"),
        ({"names_txt": "\n"}, "train.txt", "names.txt", "names.txt names no class"),
        ({}, "train.txt", "none.txt", "data.classes: no class names can be read from none.txt"),
        ({"names_json": "{"}, "train.txt", "names.json", "data.classes: no class names can be read from ROOT/names.json"),
        ({"names_json": '["one", "two"]'}, "train.txt", "names.json", "data.classes: no class names can be read from ROOT/names.json"),
        ({"names_txt": b"\xff\xfe"}, "train.txt", "names.txt", "data.classes: no class names can be read from ROOT/names.txt"),
        ({"train_txt": b"\x80\x81.mp4 0\n"}, "train.txt", "", "train.txt is not a list of videos"),
        ({"train_txt": "\n"}, "train.txt", "", "no videos found in ROOT/train.txt"),
        ({"train_json": "[{"}, "train.json", "", "train.json is not a list of videos"),
        ({"train_json": '[{"template": "one"}]'}, "train.json", "", "train.json is not a list of videos in a form that support/datasets.py describes (KeyError: 'id')"),
        ({"train_json": '{"one": "0"}'}, "train.json", "", "train.json is not a list of videos"),
        ({"train_json": JSON, "names_txt": "two\n"}, "train.json", "names.txt", "train.json: id 1: unknown class 'one'"),
        ({"train_json": '[{"id": "1"}, {"id": "2", "template": "one"}]'}, "train.json", "", "train.json: id 1: no label for 1"),
        ({"train_json": JSON[:-1] + "," + JSON[1:]}, "train.json", "", "train.json: id 1: ROOT/1 is named a second time"),
        ({"train_csv": "label,youtube_id,time_start,time_end\none,abc,x,3\n"}, "train.csv", "", "train.csv is not a list of videos"),
        ({"train_csv": "label,youtube_id,time_start,time_end\none,abc,1\n"}, "train.csv", "", "train.csv is not a list of videos"),
        ({"train_csv": "youtube_id,time_start,time_end\nabc,1,11\n"}, "train.csv", "", "train.csv: youtube_id abc: no label for abc_000001_000011"),
        ({"wave_split1_txt": "a.avi 1\nb.avi\n"}, "*_split1.txt=1", "", "wave_split1.txt, line 2: expected 'name flag', not 'b.avi'"),
        ({"wave_split1_txt": b"\xff.avi 1\n"}, "*_split1.txt=1", "", "wave_split1.txt"),
        ({"wave_split1_txt": "a.avi 1\na.avi 1\n"}, "*_split1.txt=1", "", "wave_split1.txt, line 2: ROOT/wave/a.avi is named a second time"),
        ({"wave_split1_txt": "a.avi 1\n"}, "*_split1.txt=2", "", "no videos found in *_split1.txt"),
        ({"wave_split1_txt": "a.avi 1\n"}, "*_split1.txt=1", "names.txt", "wave_split1.txt, line 1: unknown class 'wave' for a.avi"),
        ({"train_txt": "a.mp4 0\nb.mp4 -1\n"}, "train.txt", "", "train.txt, line 2: label -1 for b.mp4; labels count from 0"),
        ({"train_txt": "a.mp4 0\nb.mp4 99\n"}, "train.txt", "", "the training videos have 2 different labels, and 99 is one of them"),
        ({"train_txt": "a.mp4 three\n"}, "train.txt", "names.txt", "train.txt, line 1: unknown class 'three' for a.mp4"),
        ({}, "nowhere", "", "there is no folder or list file nowhere: set data.root, and data.train or data.val below it"),
    ],
)  # fmt: skip
def test_malformed_lists_end_in_a_sentence_with_file_and_line(tmp_path, files, train, classes, sentence):
    root = tree(tmp_path, **{**GOOD, **files})
    with pytest.raises(UserError) as error:
        support.datasets.labelled(str(root), train, "val.txt", classes)
    assert sentence.replace("ROOT", str(root)) in str(error.value) and "\n" not in str(error.value)


def test_without_test_videos_every_fifth_of_each_class_is_kept(tmp_path):
    root = tree(tmp_path, *(f"{name}/{i:02}.mp4" for name, count in (("many", 11), ("few", 4)) for i in range(count)))
    train, val, names = support.datasets.labelled(str(root), "", "", "")
    assert names == ["few", "many"] and relative(root, val) == [("many/04.mp4", 1), ("many/09.mp4", 1)]
    assert len(train) == 13 and not set(train) & set(val)
    assert support.datasets.labelled(str(root), "", "", "", per_class=3)[1] == val and len(support.datasets.labelled(str(root), "", "", "", per_class=3)[0]) == 6
    with pytest.raises(UserError, match="no class in .* has five videos, so none can be kept for testing: name test videos by data.val"):
        support.datasets.labelled(str(tree(tmp_path / "other", "a/1.mp4")), "", "", "")


def test_a_video_outside_of_the_class_folders_has_no_label(tmp_path):
    root = tree(tmp_path, "train/one/a.mp4", "train/stray.mp4", "val/one/b.mp4")
    with pytest.raises(UserError, match="train: no label for stray.mp4"):
        support.datasets.labelled(str(root), "train", "val", "")


# ---- which frames: by hand, and from the authors' words in facts.md ----


def draws(function, *arguments: int, count: int = 600) -> list[list[int]]:
    return [function(*arguments, support.run.sample_generator(0, 0, number)) for number in range(count)]


def test_dense_training_clip_by_hand():
    offsets = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    clips = draws(data.dense_training_clip, 70, 16, 4)
    starts = Counter(clip[0] for clip in clips)
    assert set(starts) == set(range(6)) and min(starts.values()) > 60  # the end is uniform in [64, 70), so frame 69 is never shown
    assert all([index - clip[0] for index in clip] == offsets for clip in clips)
    assert draws(data.dense_training_clip, 64, 16, 4, count=3) == [offsets] * 3  # as long as the span: the same, by the other branch
    assert {tuple(clip) for clip in draws(data.dense_training_clip, 65, 16, 4)} == {tuple(offsets)}
    assert data.dense_training_clip(12, 6, 4, torch.Generator()) == [0, 6, 11, 11, 11, 11]  # 3 points over [0, 12], the rest repeated
    assert data.dense_training_clip(10, 6, 4, torch.Generator()) == [0, 9, 9, 9, 9, 9]
    assert data.dense_training_clip(5, 4, 4, torch.Generator()) == [0, 4, 4, 4]
    assert data.dense_training_clip(3, 4, 4, torch.Generator()) == [2] * 4
    assert data.dense_training_clip(1, 4, 2, torch.Generator()) == [0] * 4


@pytest.mark.parametrize("length", [1, 3, 15, 16, 40, 63, 64, 65, 100, 301])
def test_dense_training_clip_as_the_authors_compute_it(length):
    import numpy as np

    frames, stride, span = 16, 4, 64
    for clip in draws(data.dense_training_clip, length, frames, stride, count=20):
        if length > span:
            end = clip[-1] + 1
            assert span <= end < length
            expected = np.clip(np.linspace(end - span, end, num=frames), end - span, end - 1)
        else:
            expected = np.concatenate((np.linspace(0, length, num=length // stride), np.full(frames - length // stride, length)))
            expected = np.clip(expected, 0, length - 1)
        assert clip == expected.astype(np.int64).tolist()


def test_uniform_training_clip_by_hand():
    clips = draws(data.uniform_training_clip, 37, 8, 2)
    assert all(i * 4 <= index < i * 4 + 4 for clip in clips for i, index in enumerate(clip))  # 37 // 8 = 4; the last 5 frames are never shown
    assert {clip[3] for clip in clips} == {12, 13, 14, 15} and {clip[7] for clip in clips} == {28, 29, 30, 31}
    assert len({clip[0] + 4 - clip[1] for clip in clips}) > 3  # each by itself
    assert draws(data.uniform_training_clip, 8, 8, 2, count=2) == [list(range(8))] * 2
    assert data.uniform_training_clip(5, 8, 2, torch.Generator()) == [0, 0, 1, 1, 2, 3, 3, 4]  # floor(i N / 16), not the authors' eight times frame 0
    assert data.uniform_training_clip(1, 4, 2, torch.Generator()) == [0] * 4


def test_dense_test_clips_by_hand():
    clips = data.dense_test_clips(300, 16, 4, 5)  # 75 frames 4 apart; 59 to spare: clips start at 0, 14, 29, 44, 59 of them
    assert [clip[0] for clip in clips] == [0, 56, 116, 176, 236]
    assert all(clip == list(range(clip[0], clip[0] + 64, 4)) for clip in clips)
    assert data.dense_test_clips(64, 16, 4, 3) == [list(range(0, 64, 4))] * 3
    assert [clip[0] for clip in data.dense_test_clips(65, 16, 4, 3)] == [0, 0, 4]
    assert data.dense_test_clips(10, 6, 4, 2) == [[0, 4, 8, 8, 8, 8]] * 2
    assert data.dense_test_clips(1, 4, 4, 2) == [[0] * 4] * 2
    assert data.dense_test_clips(300, 16, 4, 1) == [list(range(116, 180, 4))]  # one alone: in the middle


def test_uniform_test_clips_by_hand():
    first, second = data.uniform_test_clips(40, 8, 2, 2)  # tick 5: 0, 2.5, 5, 7.5, ...
    assert first == [0, 5, 10, 15, 20, 25, 30, 35] and second == [2, 7, 12, 17, 22, 27, 32, 37]
    assert data.uniform_test_clips(6, 4, 2, 2) == [[0, 1, 3, 4], [0, 2, 3, 5]]  # 0 0.75 1.5 2.25 3 3.75 4.5 5.25
    assert data.uniform_test_clips(2, 4, 2, 2) == [[0, 0, 1, 1]] * 2
    assert data.uniform_test_clips(1, 4, 2, 2) == [[0] * 4] * 2
    assert data.uniform_test_clips(40, 8, 2, 1) == [[2, 7, 12, 17, 22, 27, 32, 37]]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 63, 64, 65, 117, 300, 320])
def test_the_test_clips_of_a_video_cover_it(length):
    dense = data.dense_test_clips(length, 16, 4, 5)
    shown = sorted(set(sum(dense, [])))
    assert shown == list(range(0, length, 4))  # every fourth frame from the first to the last
    uniform = data.uniform_test_clips(length, 16, 2, 2)
    shown = sorted(set(sum(uniform, [])))
    assert shown[0] == 0 and all(b - a <= length / 32 + 1 for a, b in zip(shown, [*shown[1:], length]))
    for clips, number in ((dense, 5), (uniform, 2)):
        assert len(clips) == number and all(len(clip) == 16 and sorted(clip) == clip and 0 <= clip[0] and clip[-1] < length for clip in clips)


# ---- which pixels ----


def columns(height: int, width: int, frames: int = 2) -> torch.Tensor:
    """Frames (T, 3, H, W) whose red says the column, whose green says the row."""
    clip = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    clip[:, 0], clip[:, 1] = torch.arange(width), torch.arange(height)[:, None]
    return clip


def test_test_crops_by_hand():
    wide = columns(32, 77)
    assert [crop[0, 0, 0, 0].item() for crop in data.test_crops(wide, 32, 3)] == [0, 22, 45]  # int(j (77 - 32) / 2)
    crops = data.test_crops(wide, 32, 3)
    assert crops.shape == (3, 2, 3, 32, 32)
    assert all(torch.equal(crop, wide[..., start : start + 32]) for crop, start in zip(crops, (0, 22, 45)))
    tall = columns(77, 32)
    assert all(torch.equal(crop, tall[..., start : start + 32, :]) for crop, start in zip(data.test_crops(tall, 32, 3), (0, 22, 45)))
    assert torch.equal(data.test_crops(wide, 32, 1)[0], wide[..., 22:54])
    assert torch.equal(data.test_crops(columns(32, 32), 32, 3), columns(32, 32).expand(3, -1, -1, -1, -1))


@pytest.mark.parametrize("height, width, resized", [(256, 340, (224, 297)), (240, 320, (224, 298)), (480, 270, (398, 224)), (100, 100, (224, 224)), (61, 80, (224, 293))])
def test_test_crops_after_resizing(height, width, resized):
    clip = columns(height, width, 1)
    whole = TF.resize(clip, list(resized), antialias=True)
    long = max(resized)
    for crop, start in zip(data.test_crops(clip, 224, 3), (0, (long - 224) // 2, long - 224)):
        assert torch.equal(crop, whole[..., start : start + 224, :] if height > width else whole[..., start : start + 224])


class Counted(support.video.Video):
    """A video that counts how often its frames are asked for, and which are converted."""

    asked, converted = 0, 0

    def frames(self, indices):
        Counted.asked += 1
        return super().frames(indices)

    def _to_rgb(self, frame):
        Counted.converted += 1
        return super()._to_rgb(frame)


@pytest.fixture
def counted(monkeypatch):
    Counted.asked = Counted.converted = 0
    monkeypatch.setattr(data, "Video", Counted)
    return Counted


@pytest.mark.parametrize("sampling, clips", [("dense", 5), ("uniform", 2)])
def test_views_are_the_right_pixels_and_every_frame_is_decoded_once(tmp_path, counted, sampling, clips):
    video = write_numbered(tmp_path / "video.mp4", 40)
    views = data.TestViews([video], frames=8, stride=3, sampling=sampling, size=64, clips=clips, crops=3)
    index, pixels, reason = views[0]
    assert (index, reason, pixels.shape) == (0, "", (clips * 3, 8, 3, 64, 64))
    everything = support.video.read_frames(video, list(range(40)))  # 96 x 64: nothing is resized
    counts = counted.asked, counted.converted
    indices = data.SAMPLING[sampling][1](40, 8, 3, clips)
    expected = [everything[clip][..., start : start + 64] for clip in indices for start in (0, 16, 32)]
    assert torch.equal(pixels, torch.stack(expected))
    assert counts == (1, len(set(sum(indices, []))))


def test_an_unreadable_video_is_no_view_and_no_other_stands_in(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    whole = write_numbered(tmp_path / "whole.mp4", 20)
    views = data.TestViews([tmp_path / "broken.mp4", whole], frames=4, stride=2, sampling="dense", size=32, clips=2, crops=1)
    indices, pixels, broken = data.collate_views([views[0], views[1]])
    assert indices == [1] and pixels.shape == (1, 2, 4, 3, 32, 32) and broken[0][0] == 0 and "broken.mp4" in broken[0][1]
    assert data.collate_views([views[0]])[:2] == ([], None)


# ---- augmentation ----


def augmentation(**options) -> data.Augmentation:
    return data.Augmentation(**{**dict(size=32, randaugment=(0, 0, 0), area=(1, 1), aspect=(1, 1), flip=False, erase=0.0), **options})


FULL = dict(randaugment=(4, 7, 0.5), area=(0.08, 1.0), aspect=(0.75, 1.3333), flip=True)


@pytest.fixture(scope="module")
def moving() -> torch.Tensor:
    frames = torch.stack([torch.from_numpy(numbered_frame(i).to_ndarray(format="rgb24").copy()) for i in range(6)]).permute(0, 3, 1, 2)
    noise = torch.randint(0, 60, frames.shape, generator=torch.Generator().manual_seed(0))
    return (frames.int() + noise).clamp(0, 255).byte()


def test_without_augmentation_a_square_clip_stays_as_it_is(moving):
    assert torch.equal(augmentation()(moving[..., :64, :64][..., ::2, ::2].contiguous(), support.run.sample_generator(0, 0, 0)), moving[..., :64:2, :64:2])


def test_one_augmentation_for_all_frames(moving):
    """A still video stays still; and each frame comes out as if it had been alone."""
    augment, seen = augmentation(**FULL), set()
    for number in range(60):
        still = augment(moving[:1].expand(6, -1, -1, -1), support.run.sample_generator(0, 0, number))
        assert still.shape == (6, 3, 32, 32) and still.dtype == torch.uint8
        assert torch.equal(still, still[:1].expand_as(still)), number
        clip = augment(moving, support.run.sample_generator(0, 0, number))
        for t in (0, 3, 5):
            assert torch.equal(clip[t], augment(moving[t : t + 1], support.run.sample_generator(0, 0, number))[0])
        seen.add(clip.numpy().tobytes())
    assert len(seen) == 60


def test_randaugment_by_its_numbers(monkeypatch, moving):
    """Four operations, each half the time, of magnitude 7 of 10 with deviation 0.5; torchvision counts to 30."""
    magnitudes, per_clip = [], Counter()
    original = v2.RandAugment

    def recorded(operations, magnitude, **options):
        assert operations == 1
        magnitudes.append(magnitude)
        return original(operations, magnitude, **options)

    monkeypatch.setattr(data.v2, "RandAugment", recorded)
    augment = augmentation(randaugment=(4, 7, 0.5))
    small = moving[:1, :, ::4, ::4]
    for number in range(300):
        before = len(magnitudes)
        augment(small, support.run.sample_generator(0, 0, number))
        per_clip[len(magnitudes) - before] += 1
    assert set(per_clip) == {0, 1, 2, 3, 4} and len(magnitudes) == pytest.approx(600, abs=60)
    values = torch.tensor(magnitudes, dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(21, abs=0.3) and float(values.std()) == pytest.approx(1.5, abs=0.3)


def test_flip_is_of_half_of_the_clips_and_whole_clips():
    clip, augment, flipped = columns(32, 32), augmentation(flip=True), 0
    for number in range(80):
        result = augment(clip, support.run.sample_generator(0, 0, number))
        assert torch.equal(result, clip) or torch.equal(result, clip.flip(-1))
        flipped += not torch.equal(result, clip)
    assert 25 < flipped < 55


def test_random_resized_crop_by_its_numbers():
    """Left, right, top and bottom edges read off coordinates: area 8 to 100 %, sides between 3:4 and 4:3, anywhere."""
    clip, augment = columns(240, 240, 1), augmentation(area=(0.08, 1.0), aspect=(0.75, 1.3333))
    areas, aspects, lefts = [], [], []
    for number in range(200):
        result = augment(clip, support.run.sample_generator(0, 0, number))[0].float()
        width, height = ((result[c].amax() - result[c].amin()).item() * 32 / 31 for c in (0, 1))
        areas.append(width * height / 240**2)
        aspects.append(width / height)
        lefts.append(result[0].amin().item())
    assert 0.06 < min(areas) < 0.15 and 0.85 < max(areas) < 1.05 and 0.68 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.46
    assert min(lefts) < 6 and max(lefts) > 120


def test_erasing_is_one_box_of_noise_in_all_frames():
    clip, augment, erased = torch.full((5, 3, 32, 32), 7, dtype=torch.uint8), augmentation(erase=0.25), 0
    for number in range(200):
        result = augment(clip, support.run.sample_generator(0, 0, number))
        changed = (result != 7).any(dim=1)  # (5, 32, 32)
        if changed.any():
            erased += 1
            rows, cols = changed.any(dim=(0, 2)).nonzero().flatten(), changed.any(dim=(0, 1)).nonzero().flatten()
            box = changed[:, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
            assert box.float().mean(dim=(1, 2)).min() > 0.9  # the same box in each frame; a few pixels of noise happen to be 7
            assert 0.01 < box[0].numel() / 32**2 <= 0.36
            inside = result[:, :, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].float()
            assert inside.std(dim=(2, 3)).min() > 20 and not torch.equal(inside[0], inside[1])
    assert 30 < erased < 70


def labelled_clips(videos: list, **options) -> data.LabelledClips:
    defaults = dict(frames=6, stride=2, sampling="dense", augment=augmentation(**FULL, erase=0.25), repeats=2, seed=0)
    return data.LabelledClips(videos, **{**defaults, **options})


def test_repeated_augmentation_decodes_once_and_augments_the_same_frames_differently(tmp_path, counted):
    video = write_numbered(tmp_path / "video.mp4", 40)
    clips, label, broken = labelled_clips([(video, 3)], repeats=3)[0, 0]
    assert clips.shape == (3, 6, 3, 32, 32) and label == 3 and not broken
    assert (counted.asked, counted.converted) == (1, 6)
    assert not torch.equal(clips[0], clips[1]) and not torch.equal(clips[1], clips[2])
    same, _, _ = labelled_clips([(video, 3)], repeats=3, augment=augmentation())[0, 0]
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2])  # the same frames


def test_a_labelled_sample_is_a_function_of_seed_epoch_and_index(tmp_path):
    videos = [(write_numbered(tmp_path / f"{number}.mp4", 40), number) for number in range(2)]
    first = labelled_clips(videos)[3, 1]
    torch.manual_seed(99)  # the global generator plays no part, and is left alone
    state = torch.get_rng_state()
    assert torch.equal(labelled_clips(videos)[3, 1][0], first[0])
    assert torch.equal(torch.get_rng_state(), state)
    for other in (labelled_clips(videos)[4, 1], labelled_clips(videos, seed=1)[3, 1], labelled_clips(videos)[3, 0]):
        assert not torch.equal(other[0], first[0])


def test_a_broken_training_video_is_replaced_with_the_others_own_label(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    whole = write_numbered(tmp_path / "whole.mp4", 40)
    for epoch in range(5):
        _, label, broken = labelled_clips([(tmp_path / "broken.mp4", 0), (whole, 1)])[epoch, 0]
        assert label == 1 and "broken.mp4" in broken[0]


# ---- the command that looks a dataset over ----


def test_check_counts_classes_and_names_what_is_wrong(tmp_path):
    for name in ("train/a/1.mp4", "train/a/2.mp4", "train/b/3.mp4", "val/a/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_numbered(tmp_path / name, 5)
    dataset = [f"data.root={tmp_path}", "data.train=train", "data.val=val", "data.workers=1"]
    done = run("support.datasets", *dataset)
    assert "3 videos for training in train, 2 classes, 0 wrong labels, 0 unreadable" in done.stdout
    assert re.search(r"\b2  a\n +1  b\n", done.stdout)

    (tmp_path / "val" / "a" / "5.mp4").write_bytes((tmp_path / "val/a/4.mp4").read_bytes()[:400])
    (tmp_path / "val" / "c").mkdir()
    write_numbered(tmp_path / "val/c/6.mp4", 5)
    (tmp_path / "list.txt").write_text("train/a/1.mp4 0\nval/c/6.mp4 7\n")
    done = run("support.datasets", *dataset, ok=False)
    assert done.returncode == 1
    assert "3 videos for testing in val, 2 classes, 1 wrong labels, 1 unreadable" in done.stdout
    assert "unknown class 'c' for 6.mp4" in done.stdout and str(tmp_path / "val/a/5.mp4") in done.stdout

    done = run("support.datasets", dataset[0], "data.train=train", "data.val=list.txt", "data.workers=1", ok=False)
    assert "label 7 is out of range for 6.mp4" in done.stdout and "1 videos are for training as well" in done.stdout
