"""Videos and labels as each dataset's own files give them, and a dataset looked over."""

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, command, run, write_numbered

from support.config import UserError
from support.datasets import labelled_videos, list_entries, list_videos, named_videos

Videos = list[tuple[Path, int]]


def tree(root: Path, *videos: str, **files: str | bytes) -> Path:
    """Empty files for videos, and text files: `labels__train_json="..."` means labels/train.json."""
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        path = root / f"{stem.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def relative(root: Path, videos: Videos) -> list[tuple[str, int]]:
    return [(path.relative_to(root).as_posix(), label) for path, label in videos]


def labelled(root: Path, train: str, val: str, classes: str = "", **options) -> tuple[Videos, Videos, list[str]]:
    return labelled_videos(str(root), train, val, classes, **options)


def test_a_command_line_names_videos_by_files_folders_and_lists(tmp_path):
    tree(tmp_path, "a/1.mp4", "a/b/2.mkv", "c.avi", list_txt="a/1.mp4 0\nc.avi 3\n")
    paths = named_videos([tmp_path / "c.avi", tmp_path / "a", tmp_path / "list.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == "c.avi a/1.mp4 a/b/2.mkv a/1.mp4 c.avi".split()


# ---- the datasets as they are distributed ----


def test_kinetics_folder_tree(tmp_path):
    root = tree(
        tmp_path, "train/riding a bike/b_000001_000011.mp4", "train/abseiling/a_000003_000013.mp4",
        "train/abseiling/c.MKV", "val/abseiling/d.mp4", "val/riding_a_bike/e.mp4", "train/abseiling/readme.txt",
        "train/zumba/f.webm",
    )  # fmt: skip
    train, val, names = labelled(root, "train", "val")
    assert names == ["abseiling", "riding a bike", "zumba"]
    assert relative(root, train) == [
        ("train/abseiling/a_000003_000013.mp4", 0),
        ("train/abseiling/c.MKV", 0),
        ("train/riding a bike/b_000001_000011.mp4", 1),
        ("train/zumba/f.webm", 2),
    ]
    assert relative(root, val) == [("val/abseiling/d.mp4", 0), ("val/riding_a_bike/e.mp4", 1)]
    (root / "names.txt").write_text("zumba\r\nriding a bike\r\nabseiling\r\n")  # the file's order, not the alphabet's
    assert [label for _, label in labelled(root, "train", "val", "names.txt")[0]] == [0, 1, 2, 2]
    few, all_tested, _ = labelled(root, "train", "val", per_class=1)
    assert Counter(label for _, label in few) == {0: 1, 1: 1, 2: 1} and len(all_tested) == 2


def test_kinetics_csv(tmp_path):
    head = "label,youtube_id,time_start,time_end,split\r\n"
    root = tree(
        tmp_path, "train/-abc_def_000012_000022.mp4", "somewhere/else/XYZ_000100_000110.mkv", "val/v_000001_000011.mp4",
        train_csv=head + 'riding a bike,-abc_def,12,22,train\r\n"cutting, pineapple",XYZ,100,110,train\r\n',
        val_csv="\ufeff" + head + "riding a bike,gone,7,17,validate\r\nriding a bike,v,1,11,validate\r\n",
    )  # fmt: skip
    train, val, names = labelled(root, "train.csv", "val.csv")
    assert names == ["cutting, pineapple", "riding a bike"]
    assert relative(root, train) == [
        ("somewhere/else/XYZ_000100_000110.mkv", 0),
        ("train/-abc_def_000012_000022.mp4", 1),
    ]
    # one is not downloaded: to be counted as wrong, not forgotten
    assert [path.name for path, _ in val] == ["gone_000007_000017", "v_000001_000011.mp4"]


def test_something_something_json(tmp_path):
    def entry(number: int, template: str) -> dict:
        return {"id": str(number), "label": "holding a cup", "template": template, "placeholders": ["a cup"]}

    holding, closing, approaching = "Holding {} next to {}", "Closing {}", "Approaching {} with your camera"
    plain = [text.replace("{}", "something") for text in (holding, closing, approaching)]
    marked = [text.replace("{}", "[something]") for text in (holding, closing, approaching)]
    folder = "20bn-something-something-v2"
    root = tree(
        tmp_path, f"{folder}/1.webm", f"{folder}/78687.webm", f"{folder}/20.webm",
        labels__labels_json=json.dumps({plain[0]: "0", plain[2]: "2", plain[1]: "1"}),
        labels__train_json=json.dumps([entry(78687, marked[0]), entry(1, marked[1])]),
        labels__validation_json=json.dumps([entry(20, marked[2]), entry(21, marked[1])]),
        labels__test_json=json.dumps([{"id": "1"}]),
    )  # fmt: skip
    train, val, names = labelled(root, "labels/train.json", "labels/validation.json", "labels/labels.json")
    assert names == plain
    assert relative(root, train) == [(f"{folder}/78687.webm", 0), (f"{folder}/1.webm", 1)]
    assert [(path.stem, label) for path, label in val] == [("20", 2), ("21", 1)]
    with pytest.raises(UserError, match="test.json: id 1: no label for 1.webm"):
        labelled(root, "labels/train.json", "labels/test.json", "labels/labels.json")


def test_ucf101_lists(tmp_path):
    eye, push, yoyo = "ApplyEyeMakeup", "HandstandPushups", "YoYo"
    videos = f"{yoyo}/v_{yoyo}_g08_c01.avi", f"{eye}/v_{eye}_g08_c01.avi", f"{push}/v_HandStandPushups_g01_c01.avi"
    root = tree(
        tmp_path, *videos,
        classInd_txt=f"1 {eye}\r\n2 {push}\r\n3 {yoyo}\r\n",
        trainlist01_txt=f"{videos[1]} 1\r\n{videos[0]} 3\r\n",
        testlist01_txt=f"{videos[2]}\r\nYoYo/v_YoYo_g01_c01.avi\r\n",
    )  # fmt: skip
    train, val, names = labelled(root, "trainlist01.txt", "testlist01.txt", "classInd.txt")
    assert names == [eye, push, yoyo]
    assert relative(root, train) == [(videos[1], 0), (videos[0], 2)]
    assert [label for _, label in val] == [1, 2]  # counted from 1 in the dataset's files


def test_hmdb51_splits(tmp_path):
    root = tree(
        tmp_path, "wave/f.avi",
        splits__brush_hair_test_split1_txt="a b (1).avi 1 \r\nc.avi 2 \r\nd.avi 0 \r\n",
        splits__wave_test_split1_txt="\ufeffe.avi 1 \nf.avi 2 \n\n",
        splits__wave_test_split2_txt="e.avi 2 \nf.avi 1 \n",
    )  # fmt: skip
    train, val, names = labelled(root, "splits/*_test_split1.txt=1", "splits/*_test_split1.txt=2")
    assert names == ["brush_hair", "wave"]
    assert relative(root, train) == [("brush_hair/a b (1).avi", 0), ("wave/e.avi", 1)]
    assert relative(root, val) == [("brush_hair/c.avi", 0), ("wave/f.avi", 1)]
    assert list_videos(str(root), "splits/*_test_split2.txt=1") == [root / "wave/f.avi"]


def test_plain_list(tmp_path):
    lines = "\ufeffb/arm wrestling/x 1.mp4 2\r\n\r\ny.AVI\t0\r\n/elsewhere/z, 3.webm,1\r\n"
    root = tree(tmp_path, "w.mp4", train_txt=lines, val_txt="w.mp4 02\n")
    train, val, names = labelled(root, "train.txt", "val.txt")
    expected = [(root / "y.AVI", 0), (Path("/elsewhere/z, 3.webm"), 1), (root / "b/arm wrestling/x 1.mp4", 2)]
    assert train == expected and val == [(root / "w.mp4", 2)] and names == ["0", "1", "2"]


def test_plain_list_with_names_of_classes(tmp_path):
    lines = "a b.mp4 arm wrestling\nc.mp4,abseiling\n"
    root = tree(tmp_path, "d.mp4", train_txt=lines, val_txt="d.mp4 Arm_Wrestling\n")
    train, val, names = labelled(root, "train.txt", "val.txt")
    assert names == ["abseiling", "arm wrestling"]
    assert train == [(root / "c.mp4", 0), (root / "a b.mp4", 1)] and val == [(root / "d.mp4", 1)]


@pytest.mark.parametrize("names", [["00", "01"], ["1", "2", "3"], ["10", "9"], ["1", "jump"]])
def test_class_folders_named_by_numbers_are_names(tmp_path, names):
    root = tree(tmp_path, *(f"train/{name}/a.mp4" for name in names), f"val/{names[-1]}/b.mp4")
    train, val, found = labelled(root, "train", "val")
    assert found == names and [label for _, label in train] == list(range(len(names)))
    assert [label for _, label in val] == [len(names) - 1]


def test_a_number_is_not_a_place_among_classes_that_are_named_by_numbers(tmp_path):
    root = tree(tmp_path, *(f"train/{name}/a.mp4" for name in "123"), val_txt="train/1/a.mp4 0\n")
    with pytest.raises(UserError, match="line 1: label 0 is out of range for a.mp4; the training videos has 3 classes"):
        labelled(root, "train", "val.txt")


def test_class_folders_numbered_as_in_the_class_file(tmp_path):
    root = tree(tmp_path, "train/002/a.mp4", "val/1/b.mp4", names_txt="1 jump\n2 run\n")
    assert [video[0][1] for video in labelled(root, "train", "val", "names.txt")[:2]] == [1, 0]


def test_videos_of_a_tree_and_of_a_list(tmp_path):
    root = tree(tmp_path, "b/arm wrestling/x 1.mp4", "a/y.AVI", "a/notes.txt")
    videos = [root / "a/y.AVI", root / "b/arm wrestling/x 1.mp4"]
    assert list_videos(str(root), "") == videos
    assert list_videos(str(root), "b") == videos[1:]
    tree(root, train_txt="a/y.AVI 3\r\n\r\nb/arm wrestling/x 1.mp4 12\r\nb/other.mp4\r\n")
    assert list_videos(str(root), "train.txt") == [*videos, root / "b/other.mp4"]
    tree(root, kinetics_csv="b/arm wrestling/x 1.mp4,12\n/elsewhere/z.webm,0\n")
    assert list_videos(str(root), str(root / "kinetics.csv")) == [videos[1], Path("/elsewhere/z.webm")]


def test_a_list_need_not_be_below_the_root(tmp_path, monkeypatch):
    root = tree(tmp_path / "videos", "a.mp4")
    tree(tmp_path, mine_txt="a.mp4 0\n")
    monkeypatch.chdir(tmp_path)
    assert list_videos(str(root), "mine.txt") == list_videos(str(root), "../mine.txt") == [root / "a.mp4"]


def test_links_to_folders_and_videos_are_followed_and_loops_are_not(tmp_path):
    elsewhere = tree(tmp_path / "elsewhere", "jump/a.mp4", "run/b.mp4", "c.mp4", "csv_000001_000011.mp4")
    root = tree(tmp_path / "root", "train/walk/d.mp4")
    (root / "train" / "jump").symlink_to(elsewhere / "jump")
    (root / "train" / "walk" / "c.mp4").symlink_to(elsewhere / "c.mp4")
    (root / "train" / "walk" / "gone.mp4").symlink_to(elsewhere / "gone.mp4")  # stays, as a broken video
    (root / "train" / "loop").symlink_to(root)
    (elsewhere / "jump" / "back").symlink_to(root / "train" / "walk")
    (root / "train" / "walk" / "there").symlink_to(elsewhere / "jump")
    train, _, names = labelled(root, "train", "train")
    found = {("jump/a.mp4", "jump"), ("walk/c.mp4", "walk"), ("walk/d.mp4", "walk"), ("walk/gone.mp4", "walk")}
    assert found <= {(path.relative_to(root / "train").as_posix(), names[label]) for path, label in train}
    assert len(train) < 20 and not any("loop" in path.parts for path, _ in train)
    (root / "far").symlink_to(elsewhere)
    tree(root, k_csv=HEAD + "jump,csv,1,11\n")
    assert list_videos(str(root), "k.csv") == [root / "far" / "csv_000001_000011.mp4"]


def test_hidden_and_system_entries_are_skipped(tmp_path):
    hidden = ".ipynb_checkpoints/a.mp4", "@eaDir/b.mp4", "run/._c.mp4", "__MACOSX/run/c.mp4", "run/@eaDir/d/e.mp4"
    root = tree(tmp_path / ".cache", *hidden, "run/c.mp4", "-_id/d.mp4", *("#recycle/f.mp4", "lost+found/g.mp4"))
    assert list_videos(str(root), "") == [root / "-_id/d.mp4", root / "run/c.mp4"]
    (root / "splits").mkdir()
    for name in ("run_test_split1.txt", "._run_test_split1.txt"):
        (root / "splits" / name).write_bytes(b"c.mp4 1\n" if name[0] == "r" else b"\x00\x05\x16\xff")
    assert list_videos(str(root), "splits/*_test_split1.txt=1") == [root / "run/c.mp4"]


HEADER = "label,youtube_id,time_start,time_end,split\n"
KINETICS = {
    "all quoted": '"label","youtube_id","time_start","time_end","split"\n"jump, high","-a","1","11","train"\n',
    "blanks": 'label, youtube_id, time_start, time_end, split\n"jump, high", -a, 1, 11, train\n',
    "quoted after blanks": 'youtube_id , "label", time_start, time_end\n -a , "jump, high", "1", 11\n',
    "byte order mark": "\ufeff" + HEADER + '"jump, high",-a,1,11,train\r\n\r\n',
}


@pytest.mark.parametrize("text", KINETICS.values(), ids=KINETICS)
def test_kinetics_csv_is_read_by_the_rules_of_csv(tmp_path, text):
    root = tree(tmp_path, "x/-a_000001_000011.mp4", train_csv=text)
    train, _, names = labelled(root, "train.csv", "train.csv")
    assert train == [(root / "x/-a_000001_000011.mp4", 0)] and names == ["jump, high"]


@pytest.mark.parametrize(
    "line", ['"a b.mp4" jump', '"a b.mp4","jump"', 'a b.mp4,"jump"', "a b.mp4 , jump", "a b.mp4\tjump "]
)
def test_plain_lists_may_be_quoted(tmp_path, line):
    root = tree(tmp_path, "a b.mp4", train_txt=line)
    assert labelled(root, "train.txt", "train.txt")[::2] == ([(root / "a b.mp4", 0)], ["jump"])


CLASS_FILES = {
    "id,name with a header": "id,name\n0,brush hair\n1,cart wheel\n2,jump\n",
    "quoted": '"id","name"\n"0","brush hair"\n"1","cart wheel"\n"2","jump"\n',
    "name,id": "brush hair,0\ncart wheel,1\njump,2\n",
    "name,id with a header": "name,id\nbrush hair,0\ncart wheel, 1\njump,2\n",
    "name, tab, id": "brush hair\t0\ncart wheel\t1\njump\t2\n",
    "number name": "0 brush hair\r\n1 cart wheel\r\n\r\n2 jump\r\n",
    "names": "brush hair\ncart wheel\njump\n",
    "names with a header": "\ufeffname\nbrush hair\ncart wheel\njump\n",
}


@pytest.mark.parametrize("text", CLASS_FILES.values(), ids=CLASS_FILES)
def test_class_files_with_and_without_a_header(tmp_path, text):
    root = tree(tmp_path, "a.mp4", train_txt="a.mp4 2\n", val_txt="a.mp4 Brush_Hair\n", names_csv=text)
    train, val, names = labelled(root, "train.txt", "val.txt", "names.csv")
    assert names == ["brush hair", "cart wheel", "jump"] and train[0][1] == 2 and val[0][1] == 0


def test_pretraining_ignores_labels(tmp_path):
    lines = 'a.mp4 0 -1\nb c.mp4 -1\nd.mp4,3\ne.mp4 12 0\n./f.mp4\n"g h.mp4" 0 -1\n'
    root = tree(tmp_path, train_txt=lines)
    assert [path.name for path in list_videos(str(root), "train.txt")] == [
        *("a.mp4", "b c.mp4", "d.mp4", "e.mp4", "f.mp4", "g h.mp4")
    ]


# ---- what is wrong ----

GOOD = {"train_txt": "a.mp4 0\nb.mp4 1\n", "val_txt": "c.mp4 1\n", "names_txt": "one\ntwo\n"}
HEAD = "label,youtube_id,time_start,time_end\n"
JSON = '[{"id": "1", "template": "one"}]'
TXT, NAMES = ("train.txt", ""), ("train.txt", "names.txt")
FLAG = ("*_split1.txt=1", "")
MALFORMED = [
    ({"train_txt": "a.mp4 0\nb.mp4\n"}, *TXT, "train.txt, line 2: no label for b.mp4"),
    ({"train_txt": "a.mp4\nb.mp4\n"}, *TXT, "train.txt, line 1: no label for a.mp4"),
    ({"train_txt": "a.mp4 0\nb.mp4\n"}, *NAMES, "train.txt, line 2: no label for b.mp4"),
    ({"train_txt": "a.mp4 0\n\nb.mp4 2\n"}, *NAMES, "train.txt, line 3: label 2 is out of range for b.mp4"),
    ({"train_txt": "a.mp4 three\n"}, *NAMES, "train.txt, line 1: unknown class 'three' for a.mp4"),
    ({"train_txt": "a.mp4 0\nb.mp4 -1\n"}, *TXT, "train.txt, line 2: label -1 for b.mp4; labels count from 0"),
    ({"train_txt": "a.mp4 0\nb.mp4 99\n"}, *TXT, "training videos have 2 different labels, and 99 is one of them"),
    (
        {"train_txt": "a.mp4 0\r\nb c.mp4 1\r\n./a.mp4 1\r\n"},
        *TXT,
        "train.txt, line 3: ROOT/a.mp4 is named a second time, after ROOT/train.txt, line 1",
    ),
    ({"val_txt": "c.mp4 0\nd.mp4 7\n"}, *TXT, "val.txt, line 2: label 7 is out of range for d.mp4"),
    ({"val_txt": "one/c.mp4\nthree/d.mp4\n"}, *NAMES, "val.txt, line 2: unknown class 'three' for d.mp4"),
    ({"names_txt": "\n"}, *NAMES, "names.txt names no class"),
    ({"names_txt": b"\xff\xfe"}, *NAMES, "data.classes: no class names can be read from ROOT/names.txt"),
    ({}, "train.txt", "none.txt", "data.classes: no class names can be read from none.txt"),
    ({"names_json": "{"}, "train.txt", "names.json", "data.classes: no class names can be read from ROOT/names.json"),
    ({"names_json": '["a"]'}, "train.txt", "names.json", "data.classes: no class names can be read from ROOT/names"),
    ({"train_txt": b"\x80\x81.mp4 0\n"}, *TXT, "train.txt is not a list of videos"),
    ({"train_txt": "\n"}, *TXT, "no videos found in ROOT/train.txt"),
    ({"train_json": "[{"}, "train.json", "", "train.json is not a list of videos"),
    ({"train_json": '[{"template": "one"}]'}, "train.json", "", "support/datasets.py describes (KeyError: 'id')"),
    ({"train_json": '{"one": "0"}'}, "train.json", "", "train.json is not a list of videos"),
    ({"train_json": JSON, "names_txt": "two\n"}, "train.json", "names.txt", "train.json: id 1: unknown class 'one'"),
    ({"train_json": '[{"id": "1"}, {"id": "2", "label": "a"}]'}, "train.json", "", "train.json: id 1: no label for 1"),
    ({"train_json": f"{JSON[:-1]},{JSON[1:]}"}, "train.json", "", "train.json: id 1: ROOT/1 is named a second time"),
    ({"train_csv": HEAD + "one,abc,x,3\n"}, "train.csv", "", "train.csv is not a list of videos"),
    ({"train_csv": HEAD + "one,abc,1\n"}, "train.csv", "", "train.csv is not a list of videos"),
    (
        {"train_csv": "youtube_id,time_start,time_end\nabc,1,11\n"},
        *("train.csv", ""),
        "train.csv: youtube_id abc: no label for abc_000001_000011",
    ),
    ({"wave_split1_txt": "a.avi 1\nb.avi\n"}, *FLAG, "wave_split1.txt, line 2: expected 'name flag', not 'b.avi'"),
    ({"wave_split1_txt": b"\xff.avi 1\n"}, *FLAG, "wave_split1.txt is not a list of videos"),
    (
        {"wave_split1_txt": "a.avi 1\na.avi 1\n"},
        *FLAG,
        "wave_split1.txt, line 2: ROOT/wave/a.avi is named a second time",
    ),
    ({"wave_split1_txt": "a.avi 1\n"}, "*_split1.txt=2", "", "no videos found in "),
    ({"wave_split1_txt": "a.avi 1\n"}, "*_split1.txt=1", "names.txt", "line 1: unknown class 'wave' for a.avi"),
    (
        {"train_txt": "a.mp4 24 0\n"},
        *TXT,
        "train.txt, line 1: '24 0' is more than a label; lines are 'path label', not",
    ),
    ({"train_txt": "a.mp4 1\nb.mp4 0 # good\n"}, *NAMES, "train.txt, line 2: '0 # good' is more than a label"),
    ({"train_txt": "a.mp4 -1 0\n"}, *NAMES, "train.txt, line 1: '-1 0' is more than a label"),
    (
        {"train_txt": "frames/a 24 0\n"},
        *TXT,
        "train.txt, line 1: 'frames/a 24 0' does not start with the path of a video",
    ),
    ({"train_txt": "path,label\na.mp4,0\n"}, *TXT, "train.txt, line 1: 'path,label' does not start with the path of a"),
    (
        {"train_txt": "a.mp4 0\nb.mp4 \u00b20\n"},
        *TXT,
        "train.txt, line 2: label '\u00b20' among others that are numbers",
    ),
    ({"train_txt": "a.mp4 0\nb.mp4 jump\n"}, *TXT, "train.txt, line 2: label 'jump' among others that are numbers"),
    ({"train_txt": "a.mp4 \u00b20\n"}, *NAMES, "train.txt, line 1: unknown class '\u00b20' for a.mp4"),
    ({"train_txt": "Push_Up/a.mp4\npush up/b.mp4\n"}, *TXT, "classes 'Push_Up' and 'push up' cannot be told apart"),
    ({"names_txt": "0 one\n0 two\n"}, *NAMES, "names.txt: classes 'one' and 'two' cannot be told apart; rename or re"),
    ({"names_txt": "id name\n0 one\n1 two\nthree\n"}, *NAMES, "names.txt, line 4: expected a number and a name, as in"),
    (
        {"names_txt": "# names\n# of classes\n0 a\n1 b\n2 c\n"},
        *NAMES,
        "names.txt, line 2: expected a number and a name",
    ),
    ({"names_json": '{"one": 1e999}'}, "train.txt", "names.json", "data.classes: no class names can be read from ROOT"),
    (
        {},
        "s/*_split1.txt=1",
        "",
        "no file matches s/*_split1.txt below ROOT: set data.root, and data.train or data.val",
    ),
    ({}, "nowhere", "", "there is no folder or list file nowhere: set data.root, and data.train or data.val below it"),
]


@pytest.mark.parametrize("files, train, classes, sentence", MALFORMED)
def test_malformed_lists_end_in_a_sentence_with_file_and_line(tmp_path, files, train, classes, sentence):
    root = tree(tmp_path, "c.mp4", **{**GOOD, **files})
    with pytest.raises(UserError) as error:
        labelled(root, train, "val.txt", classes)
    assert sentence.replace("ROOT", str(root)) in str(error.value) and "\n" not in str(error.value)


def test_class_folders_that_differ_only_in_case_or_underscores_are_refused(tmp_path):
    root = tree(tmp_path, "train/Push_Up/a.mp4", "train/push up/b.mp4")
    with pytest.raises(UserError, match="classes 'Push_Up' and 'push up' cannot be told apart; rename"):
        labelled(root, "train", "train")


def test_a_header_in_a_pretraining_list_is_refused(tmp_path):
    root = tree(tmp_path, train_txt="path label\na.mp4 0\n", folders_txt="a.mp4\nframes/b 24 0\n", b_mp4="")
    with pytest.raises(UserError, match="train.txt, line 1: 'path label' does not start with the path of a video"):
        list_videos(str(root), "train.txt")
    with pytest.raises(UserError, match="folders.txt, line 2: 'frames/b 24 0' does not start with the path of a video"):
        list_videos(str(root), "folders.txt")


def test_a_video_without_a_suffix_may_be_listed(tmp_path):
    root = tree(tmp_path, "some video", train_txt="some video 1\n")
    assert list_entries(str(root), "train.txt")[0][:2] == (root / "some video", 1)


def test_a_folder_without_videos_ends_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no videos found in"):
        list_videos(str(tmp_path), "")
    with pytest.raises(UserError, match="no folder or list file"):
        list_videos(str(tmp_path), "none.txt")


def test_a_video_outside_of_the_class_folders_has_no_label(tmp_path):
    root = tree(tmp_path, "train/one/a.mp4", "train/stray.mp4", "val/one/b.mp4")
    with pytest.raises(UserError, match="train: no label for stray.mp4"):
        labelled(root, "train", "val")


# ---- which videos are for testing ----


def test_without_test_videos_every_fifth_of_each_class_is_kept(tmp_path):
    root = tree(tmp_path, *(f"{name}/{i:02}.mp4" for name, count in (("many", 11), ("few", 4)) for i in range(count)))
    train, val, names = labelled(root, "", "")
    assert names == ["few", "many"] and relative(root, val) == [("many/04.mp4", 1), ("many/09.mp4", 1)]
    assert len(train) == 13 and not set(train) & set(val)
    few, same, _ = labelled(root, "", "", per_class=3)
    assert same == val and len(few) == 6
    sentence = "no class in .* has five videos, so none can be kept for testing: name test videos by data.val"
    with pytest.raises(UserError, match=sentence):
        labelled(tree(tmp_path / "other", "a/1.mp4"), "", "")


def test_with_a_checkpoints_classes_testing_needs_no_training_videos(tmp_path):
    root = tree(tmp_path, "val/b/1.mp4", "val/A_a/2.mp4", names_txt="c\na a\nb\n", other_txt="a a\nb\n")
    known = ["c", "b", "a a"]  # in the order of the model's outputs
    for classes in ("", "names.txt"):
        videos, val, names = labelled(root, "gone", "val", classes, known=known)
        assert videos == [] and names == known and relative(root, val) == [("val/A_a/2.mp4", 2), ("val/b/1.mp4", 1)]
    assert labelled(root, "gone", "val", "other.txt", known=known)[2] == ["a a", "b"]  # for the caller to refuse
    with pytest.raises(UserError, match="val/b: unknown class 'b' for 1.mp4"):
        labelled(root, "gone", "val", known=["a a", "c"])
    numbered = [str(number) for number in range(12)]
    tree(root, val_txt="val/b/1.mp4 2\nval/A_a/2.mp4 11\n")
    assert [label for _, label in labelled(root, "gone", "val.txt", known=numbered)[1]] == [2, 11]
    with pytest.raises(UserError, match="no folder or list file gone"):
        labelled(root, "gone", "", known=known)


def test_test_videos_that_are_all_missing_are_noticed_before_training(tmp_path):
    root = tree(tmp_path, "a.mp4", train_txt="a.mp4 0\n", val_txt="b.mp4 0\nc.mp4 0\n")
    sentence = "none of the 2 test videos is there, the first one being .*b.mp4: look at data.root and data.val"
    with pytest.raises(UserError, match=sentence):
        labelled(root, "train.txt", "val.txt")


# ---- the command that looks a dataset over ----


def test_check_counts_classes_and_names_what_is_wrong(tmp_path):
    for name in ("train/a/1.mp4", "train/a/2.mp4", "train/b/3.mp4", "val/a/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_numbered(tmp_path / name, 5)
    dataset = [f"data.root={tmp_path}", "data.train=train", "data.val=val", "data.workers=1"]
    done = run("tools.check_dataset", *dataset)
    assert "3 videos for training in train, 2 classes, 0 wrong labels, 0 unreadable" in done.stdout
    assert re.search(r"\b2  a\n +1  b\n", done.stdout)

    (tmp_path / "val" / "a" / "5.mp4").write_bytes((tmp_path / "val/a/4.mp4").read_bytes()[:400])
    (tmp_path / "val" / "c").mkdir()
    write_numbered(tmp_path / "val/c/6.mp4", 5)
    (tmp_path / "list.txt").write_text("train/a/1.mp4 0\nval/c/6.mp4 7\n")
    done = run("tools.check_dataset", *dataset, ok=False)
    assert done.returncode == 1
    assert "3 videos for testing in val, 2 classes, 1 wrong labels, 1 unreadable" in done.stdout
    assert "unknown class 'c' for 6.mp4" in done.stdout and str(tmp_path / "val/a/5.mp4") in done.stdout

    done = run("tools.check_dataset", *dataset[:2], "data.val=list.txt", "data.workers=2", ok=False)
    assert "label 7 is out of range for 6.mp4" in done.stdout and "1 videos are for training as well" in done.stdout


@pytest.mark.parametrize("recipe", ["configs/pretrain/k400_base.yaml", "configs/baselines/k400_base.yaml"])
def test_check_of_a_pretraining_list_ignores_labels(recipe, tmp_path):
    write_numbered(tmp_path / "a.mp4", 5)
    tree(tmp_path, train_txt="a.mp4 0 -1\n")
    words = [f"data.root={tmp_path}", "data.train=train.txt", "data.workers=1"]
    words += ["data.val="] if "pretrain" in recipe else []
    done = run("tools.check_dataset", recipe, *words)
    assert "1 videos for training in train.txt, 0 classes, 0 wrong labels, 0 unreadable" in done.stdout


def test_check_survives_names_that_are_not_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/jump\xe9/\xff.mp4"))
    path.parent.mkdir()
    path.write_text("no video")
    words = [f"data.root={tmp_path}", "data.train=", "data.val=", "data.workers=1"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as on a desktop
    done = subprocess.run(command("tools.check_dataset", *words), capture_output=True, cwd=ROOT, env=strict)
    assert done.returncode == 1 and b"1 unreadable" in done.stdout
    assert b"       1  jump\\udce9\n" in done.stdout and b"jump\\udce9/\\udcff.mp4" in done.stdout


def test_check_without_a_dataset_ends_in_a_sentence():
    done = run("tools.check_dataset", ok=False)
    assert done.returncode == 1 and "which dataset? Name a configuration file or give data.root" in done.stderr


def test_check_of_videos_folders_and_lists_needs_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "run=3/b.mp4", "run=3/x=1.mp4"):
        Path(name).parent.mkdir(exist_ok=True)
        write_numbered(Path(name), 5)
    Path("list.txt").write_text("a.mp4 0\nrun=3/b.mp4 jump\n")
    assert run("tools.check_dataset", "a.mp4", "run=3", "list.txt", cwd=tmp_path).stdout == "5 videos, 0 unreadable\n"
    assert run("tools.check_dataset", "run=3/x=1.mp4", cwd=tmp_path).stdout == "1 videos, 0 unreadable\n"
    Path("run=3", "cut.mp4").write_bytes(Path("a.mp4").read_bytes()[:400])
    done = run("tools.check_dataset", "run=3", "gone.mp4", cwd=tmp_path, ok=False)
    assert done.returncode == 1 and re.match(r"4 videos, 2 unreadable\n  run=3/cut.mp4: .*\n  gone.mp4: ", done.stdout)
    for words, sentence in (
        (["empty"], "no videos found in empty"),
        (["a.mp4", "data.workers=2"], "'a.mp4' is neither"),
    ):
        Path("empty").mkdir(exist_ok=True)
        assert sentence in run("tools.check_dataset", *words, cwd=tmp_path, ok=False).stderr


def test_entries_say_where_they_are_named(tmp_path):
    root = tree(tmp_path, "a/b.mp4", list_txt="\n a/b.mp4\n")
    assert list_entries(str(root), "")[0] == (root / "a/b.mp4", "a", str(root / "a"))
    assert list_entries(str(root), "list.txt")[0] == (root / "a/b.mp4", "a", f"{root}/list.txt, line 2")
