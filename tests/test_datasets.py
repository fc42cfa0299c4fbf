"""Videos and labels as each dataset's own files give them, and a dataset checked."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, write_numbered

from support.config import UserError
from support.datasets import Classes, labelled_videos
from support.lists import find_splits, list_entries, list_videos, named_videos


def tree(root: Path, *videos: str, **files: str | bytes) -> Path:
    """Make empty files for videos, and files with the given content."""
    for name in videos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def labelled(root: Path, train: str, val: str, classes: str = "", **options) -> tuple[list, list, list[str]]:
    """Return `labelled_videos` with paths relative to `root`."""
    train, val, names = labelled_videos(str(root), train, val, classes, **options)
    train, val = ([(os.path.relpath(path, root), label) for path, label in videos] for videos in (train, val))
    return train, val, names


BOM = "\ufeff"
KINETICS = "label,youtube_id,time_start,time_end,split\r\n"
SSV2 = {
    "train.json": json.dumps([{"id": "7", "label": "holding a cup", "template": "Holding [something]"}]),
    "val.json": json.dumps([{"id": 8, "label": "Closing something"}]),
    "labels.json": json.dumps({"Closing something": "1", "Holding something": "0", "Opening something": "2"}),
}
DATASETS = {  # lists; data.train, data.val and data.classes; the videos for training and for validation; the classes
    "Kinetics' folders": (
        {},
        "train val",
        {"train/abseiling/a.mp4": 0, "train/abseiling/c.MKV": 0, "train/riding a bike/b.mp4": 1},
        {"val/riding_a_bike/e.mp4": 1},
        ["abseiling", "riding a bike"],
    ),
    "Kinetics' csv": (
        {
            "train.csv": KINETICS + 'riding a bike,-abc_def,12,22,train\r\n"cutting, pineapple",XYZ,100,110,train\r\n',
            "val.csv": BOM + '"youtube_id" , "label", time_start, time_end\n "v", "riding a bike", "1", 11\n\n',
        },
        "train.csv val.csv",
        {"some/where/XYZ_000100_000110.mkv": 0, "train/-abc_def_000012_000022.mp4": 1},
        {"val/v_000001_000011.mp4": 1},
        ["cutting, pineapple", "riding a bike"],
    ),
    "Something-Something": (
        {f"labels/{name}": text for name, text in SSV2.items()},
        "labels/train.json labels/val.json labels/labels.json",
        {"20bn/7.webm": 0},
        {"20bn/8.webm": 1},
        ["Holding something", "Closing something", "Opening something"],
    ),
    "UCF101": (  # numbers from 1, and a class file; the test list has no labels
        {
            "trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 3\r\nBowling/v_g01_c01.avi 1\r\n",
            "testlist01.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\n",
            "classInd.txt": "1 Bowling\r\n2 HandstandPushups\r\n3 YoYo\r\n",
        },
        "trainlist01.txt testlist01.txt classInd.txt",
        {"Bowling/v_g01_c01.avi": 0, "YoYo/v_YoYo_g08_c01.avi": 2},
        {"HandstandPushups/v_HandStandPushups_g01_c01.avi": 1},
        ["Bowling", "HandstandPushups", "YoYo"],
    ),
    "HMDB51": (
        {
            "splits/brush_hair_test_split1.txt": "a b (1).avi 1 \r\nd.avi 0 \r\n",
            "splits/wave_test_split1.txt": BOM + "e.avi 1 \nf.avi 2 \n\n",
            "splits/wave_test_split2.txt": "e.avi 2 \nf.avi 1 \n",
        },
        "splits/*_test_split1.txt=1 splits/*_test_split1.txt=2",
        {"brush_hair/a b (1).avi": 0, "wave/e.avi": 1},
        {"wave/f.avi": 1},
        ["brush_hair", "wave"],
    ),
    "numbers": (
        {"train.csv": BOM + "b/arm wrestling/x 1.AVI 2\r\n\r\nROOT/y.mp4\t0\r\nz, 3.webm,1\r\n", "val.txt": "w.ts 02"},
        "train.csv val.txt",
        {"y.mp4": 0, "z, 3.webm": 1, "b/arm wrestling/x 1.AVI": 2},
        {"w.ts": 2},
        ["0", "1", "2"],
    ),
    "names": (
        {"train.txt": '"a b.mp4","arm wrestling"\nc.mp4 , abseiling\n', "val.txt": "d.mp4 Arm_Wrestling \n"},
        "train.txt val.txt",
        {"c.mp4": 0, "a b.mp4": 1},
        {"d.mp4": 1},
        ["abseiling", "arm wrestling"],
    ),
}


def write_lists(folder: Path, lists: dict[str, str], root: Path) -> None:
    tree(folder, **{name: text.replace("ROOT", str(root)) for name, text in lists.items()})


@pytest.mark.parametrize("lists, selections, train, val, names", DATASETS.values(), ids=DATASETS)
def test_datasets_as_they_are_distributed(tmp_path, lists, selections, train, val, names):
    write_lists(tree(tmp_path, *train, *val, "train/readme.txt"), lists, tmp_path)
    assert labelled(tmp_path, *selections.split()) == ([*train.items()], [*val.items()], names)
    paths = list_videos(str(tmp_path), selections.split()[1])
    assert list(paths) == [tmp_path / name for name in val]


def test_numbers_of_folders_are_names_unless_a_file_numbers_the_classes(tmp_path):
    tree(tmp_path, "mixed/10/a.mp4", "mixed/9/a.mp4", "mixed/jump/a.mp4", "numbered/001/a.mp4", "numbered/002/a.mp4")
    tree(tmp_path, **{"names.txt": "1 jump\n2 run\n"})
    for folder, classes, names in (("mixed", "", ["10", "9", "jump"]), ("numbered", "names.txt", ["jump", "run"])):
        videos, _, found = labelled(tmp_path, folder, folder, classes)
        assert found == names and [label for _, label in videos] == [*range(len(names))]


CLASS_FILES = {
    "quoted": '"id","name"\n"0","brush hair"\n"1","cart wheel"\n"2","3 point shot, jumping"\n',
    "name,id with a header": "name,id\nbrush hair,0\ncart wheel, 1\n3 point shot, jumping,2\n",
    "name, tab, id": "brush hair\t0\ncart wheel\t1\n3 point shot, jumping\t2\n",
    "number name": "0 brush hair\r\n1 cart wheel\r\n\r\n2 3 point shot, jumping\r\n",
    "names with a header": BOM + "name\nbrush hair\ncart wheel\n3 point shot, jumping\n",
}


@pytest.mark.parametrize("text", CLASS_FILES.values(), ids=CLASS_FILES)
def test_class_files(tmp_path, text):
    tree(tmp_path, **{"names.csv": text, "train.txt": "a.mp4 2\nb.mp4 Brush_Hair\n"})
    classes = Classes(str(tmp_path), "names.csv", [])
    assert classes.names == ["brush hair", "cart wheel", "3 point shot, jumping"]
    assert [classes.index(entry) for entry in list_entries(str(tmp_path), "train.txt")] == [2, 0]


LINES = {  # a line, its path and its label
    '"a.mp4 b.mp4","1"': ("a.mp4 b.mp4", 1),
    "a b.mp4 , jump.mp4": ("a b.mp4", "jump.mp4"),
    "x/a.mp4b.webm": ("x/a.mp4b.webm", "x"),
    "some video -1": ("some video", -1),  # a file without a suffix
}


def test_lines_of_lists(tmp_path):
    tree(tmp_path, "some video", **{"list.txt": "\n" + "\n".join(LINES)})
    entries = list(list_entries(str(tmp_path), "list.txt"))
    assert [(os.path.relpath(entry.path, tmp_path), entry.label) for entry in entries] == [*LINES.values()]
    assert entries[3].where == f"{tmp_path}/list.txt, line 5"


def test_pretraining_ignores_labels(tmp_path):
    text = 'a.mp4 0 -1\nb c.mp4 -1\nd.mp4,3\n./f.mp4\n"g h.mp4" 0 -1\n'
    tree(tmp_path, **{"list.txt": text, "twice.txt": "a.mp4 0\na.mp4"})
    names = "a.mp4", "b c.mp4", "d.mp4", "f.mp4", "g h.mp4"
    assert list(list_videos(str(tmp_path), "list.txt")) == [tmp_path / name for name in names]
    with pytest.raises(UserError, match="twice.txt, line 2: .*a.mp4 is named a second time"):
        list_videos(str(tmp_path), "twice.txt")


def test_a_long_list_is_small_and_shared_with_loader_workers(tmp_path):
    """A few objects, not one for each video: reading objects writes reference counts, which copies their pages."""
    before = sys.getallocatedblocks()
    (tmp_path / "list.txt").write_text("".join(f"folder {i % 100}/video {i}.mp4 0 -1\n" for i in range(100_000)))
    videos = list_videos(str(tmp_path), "list.txt")
    assert sys.getallocatedblocks() - before < 10_000
    assert len(videos) == 100_000 and videos[-1] == videos[99_999] == tmp_path / "folder 99/video 99999.mp4"
    assert videos[7:300:100] == [tmp_path / f"folder 7/video {i}.mp4" for i in (7, 107, 207)]
    with pytest.raises(IndexError):
        videos[100_000]
    assert videos.paths.nbytes < 1.1 * sum(len(str(path)) for path in videos)


def test_videos_of_a_tree_a_list_from_elsewhere_and_a_command_line(tmp_path, monkeypatch):
    root = tree(tmp_path / "videos", "b/arm wrestling/x 1.mp4", "a/y.AVI", "a/notes.txt")
    tree(tmp_path, **{"mine.txt": "a/y.AVI 0\n"})
    monkeypatch.chdir(tmp_path)
    y, x = root / "a/y.AVI", root / "b/arm wrestling/x 1.mp4"
    selections = {"": [y, x], "b": [x], "../mine.txt": [y], "mine.txt": [y], f"{tmp_path}/mine.txt": [y]}
    for selection, videos in selections.items():
        assert list(list_videos(str(root), selection)) == videos
    (root / "list=a.txt").write_text("a/y.AVI 0\n")
    assert list(named_videos([x, root / "b", root / "list=a.txt"])) == [x, x, y]
    tree(root, "1.mp4", "[1].mp4", "*.mp4")  # names that look like patterns, next to patterns that no shell expanded
    assert named_videos([root / "[1].mp4", root / "*.mp4"]) == [root / "[1].mp4", root / "*.mp4"]
    assert named_videos([root / "*/*.AVI", root / "[12].*", root / "?.avi"]) == [y, root / "1.mp4", root / "?.avi"]
    (root / "windows.txt").write_text("a\\y.AVI\n")
    assert [(entry.path, entry.label) for entry in list_entries(str(root), "windows.txt")] == [(str(y), "a")]


def test_links_are_followed_and_loops_are_not(tmp_path):
    elsewhere = tree(tmp_path / "elsewhere", "jump/a.mp4", "c.mp4")
    root = tree(tmp_path / "root", "walk/d.mp4")
    links = {"jump": "jump", "walk/c.mp4": "c.mp4", "walk/gone.mp4": "gone.mp4", "walk/there": "jump"}
    for name, target in links.items():  # a video that is gone stays, as a broken one
        (root / name).symlink_to(elsewhere / target)
    (root / "itself").symlink_to("itself")
    (root / "loop").symlink_to(root)
    (elsewhere / "jump" / "back").symlink_to(root / "walk")
    names = {os.path.relpath(path, root) for path in list_videos(str(root), "")}
    assert {"jump/a.mp4", "walk/c.mp4", "walk/d.mp4", "walk/gone.mp4"} <= names
    assert len(names) < 20 and not any("loop" in name for name in names)


def test_hidden_and_system_entries_are_skipped(tmp_path):
    hidden = ".ipynb_checkpoints/a.mp4", "@eaDir/b.mp4", "run/._c.mp4", "__MACOSX/run/c.mp4", "run/@eaDir/d/e.mp4"
    root = tree(tmp_path / ".cache", *hidden, "run/c.mp4", "-_id/d.mp4", "#recycle/f.mp4", "lost+found/g.mp4")
    assert list(list_videos(str(root), "")) == [root / "-_id/d.mp4", root / "run/c.mp4"]
    tree(root, **{"splits/run_test_split1.txt": "c.mp4 1\n", "splits/._run_test_split1.txt": b"\x00\x05\x16\xff"})
    assert list(list_videos(str(root), "splits/*_test_split1.txt=1")) == [root / "run/c.mp4"]


GOOD = {"train.txt": "a.mp4 0\nb.mp4 1\n", "val.txt": "c.mp4 1\n", "names.txt": "one\ntwo\n"}
TXT, NAMES, LIST, CSV = "train.txt", "train.txt val.txt names.txt", "train.json", "train.csv"
NO_LIST = "is not a list of videos as support/lists.py describes it"
NO_NAMES = "data.classes: no class names can be read from"
NO_VIDEO = "is not the path of a video, alone or with one label"
WRONG = [
    ("val.txt", "c.mp4 0\nd.mp4\n", TXT, "val.txt, line 2: no label for d.mp4; the 2 classes of the training"),
    ("train.txt", "a.mp4\nb.mp4\n", TXT, "two classes, but those of the training videos are []: make a folder for"),
    ("train.txt", "a.mp4 0\n\nb.mp4 2\n", NAMES, "line 3: unknown class '2' for b.mp4; the 2 classes of ROOT/names"),
    ("train.txt", "a.mp4 0\nb.mp4 1\nc.mp4 -1\n", TXT, "train.txt, line 3: label '-1'; labels are names"),
    ("train.txt", "a.mp4 0\nb.mp4 \u00b20\n", TXT, "train.txt, line 2: label '\u00b20'; labels are"),
    ("train.txt", "a.mp4 0\r\n./a.mp4 1\r\n", TXT, "train.txt, line 2: ROOT/a.mp4 is named a second time"),
    ("val.txt", "one/c.mp4\nthree/d.mp4\n", NAMES, "val.txt, line 2: unknown class 'three' for d.mp4"),
    ("val.txt", "t/stray.mp4 0\n", "digits val.txt", "unknown class '0' for stray.mp4; the 2 classes of the training"),
    ("names.txt", "\n", NAMES, "two classes, but those of ROOT/names.txt are []"),
    ("names.txt", b"\xff\xfe", NAMES, f"{NO_NAMES} ROOT/names.txt"),
    ("x.txt", "", "train.txt val.txt none.txt", f"{NO_NAMES} none.txt"),
    ("names.json", '{"one": 1e999}', "train.txt val.txt names.json", f"{NO_NAMES} ROOT/names.json"),
    ("names.txt", "0 one\n0 two\n", NAMES, "names.txt: class 'two' cannot be told apart from another"),
    ("names.txt", "# names\n# of classes\n0 a\n1 b\n2 c\n", NAMES, "names.txt, line 2: expected a number and a name"),
    ("train.txt", b"\x80\x81.mp4 0\n", TXT, NO_LIST),
    ("train.txt", "\n", TXT, "no videos found in train.txt"),
    ("train.json", "[{", LIST, NO_LIST),
    ("train.json", '[{"template": "one"}]', LIST, "describes it (KeyError: 'id')"),
    ("train.json", '{"one": "0"}', LIST, NO_LIST),
    ("train.json", '[{"id": "1"}, {"id": "2", "label": "0"}, {"id": 3, "label": "b"}]', LIST, "id 1: no label for 1"),
    ("train.csv", KINETICS + "one,abc,x,3\n", CSV, NO_LIST),
    ("train.csv", KINETICS + "one,abc,1\n", CSV, NO_LIST),
    ("wave_split1.txt", "a.avi 1\nb.avi\n", "*_split1.txt=1", "wave_split1.txt, line 2: expected 'name flag'"),
    ("wave_split1.txt", "a.avi 1\n", "*_split1.txt=2", "no videos found in *_split1.txt=2"),
    ("train.txt", "a.mp4 24 0\n", TXT, f"train.txt, line 1: 'a.mp4 24 0' {NO_VIDEO}"),  # as for folders of frames
    ("train.txt", "path,label\na.mp4,0\n", TXT, f"train.txt, line 1: 'path,label' {NO_VIDEO}"),
    ("train.txt", "Push_Up/a.mp4\npush up/b.mp4\n", TXT, "class 'push up' cannot be told apart from another"),
    ("val.txt", "b.mp4 0\n", TXT, "no validation video exists, not even ROOT/b.mp4"),
    ("x.txt", "", "s/*_split1.txt=1", "there is no folder or list file s/*_split1.txt: look at data"),
]


@pytest.mark.parametrize("file, text, selections, sentence", WRONG)
def test_what_is_wrong_ends_in_a_sentence_with_file_and_line(tmp_path, file, text, selections, sentence):
    root = tree(tmp_path, "c.mp4", "t/stray.mp4", "digits/1/a.mp4", "digits/2/b.mp4", **GOOD)
    (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    train, *more = selections.split()
    val, *classes = more or ["val.txt"]
    with pytest.raises(UserError) as error:
        labelled(root, train, val, *classes)
    assert sentence.replace("ROOT", str(root)) in str(error.value) and "\n" not in str(error.value)


def test_without_validation_videos_every_fifth_of_each_class_is_kept(tmp_path, capsys):
    root = tree(tmp_path, *(f"{name}/{i:02}.mp4" for name, count in (("many", 11), ("few", 4)) for i in range(count)))
    train, val, names = labelled(root, "", "")
    assert names == ["few", "many"] and val == [("many/04.mp4", 1), ("many/09.mp4", 1)]
    assert len(train) == 13 and not set(train) & set(val)
    assert "1 of 2 classes have fewer than five videos and are never tested" in capsys.readouterr().err
    few, same, _ = labelled(root, "", "", per_class=3)
    assert same == val and few == [(f"{name}/0{i}.mp4", names.index(name)) for name in names for i in range(3)]
    with pytest.raises(UserError, match="no class has five videos, so none can be kept"):
        labelled(tree(tmp_path / "other", "a/1.mp4", "b/1.mp4"), "", "")
    assert labelled(tree(root, **{"val.txt": "many/00.mp4 0\ngone.mp4 1\n"}), "", "val.txt")[1][1] == ("gone.mp4", 1)


SPLITS = {  # folders, data.train, data.val: the training and validation videos that are meant
    ("train val test", "", ""): ("train", "val"),
    ("training validation", "", ""): ("training", "validation"),
    ("train test", "", "test"): ("train", "test"),
    ("train val test", "test", ""): ("test", ""),
    ("train bus car", "", ""): ("", ""),  # three classes
}


@pytest.mark.parametrize("folders, train, val", SPLITS)
def test_folders_of_splits_are_recognized(tmp_path, capsys, folders, train, val):
    tree(tmp_path, *(f"{folder}/jump/a.mp4" for folder in folders.split()))
    used = SPLITS[folders, train, val]
    assert find_splits(str(tmp_path), train, val) == used
    said = f"training on data.train={used[0]}, validation on data.val={used[1]}; the rest is left out"
    assert (said in capsys.readouterr().err) == (used != (train, val))


def test_with_a_checkpoints_classes_validation_needs_no_training_videos(tmp_path):
    root = tree(tmp_path, "val/b/1.mp4", "val/A_a/2.mp4", **{"names.txt": "c\na a\nb\n", "other.txt": "a a\nb\n"})
    known = ["c", "b", "a a"]  # in the order of the model's outputs
    for classes in ("", "names.txt"):
        _, val, names = labelled(root, "gone", "val", classes, known=known)
        assert names == known and val == [("val/A_a/2.mp4", 2), ("val/b/1.mp4", 1)]
    assert labelled(root, "gone", "val", "other.txt", known=known)[2] == ["a a", "b"]  # for the caller to refuse
    tree(root, **{"val.txt": "val/b/1.mp4 2\nval/A_a/2.mp4 11\n"})
    numbered = [str(number) for number in range(12)]
    assert [label for _, label in labelled(root, "gone", "val.txt", known=numbered)[1]] == [2, 11]
    with pytest.raises(UserError, match="no folder or list file gone"):
        labelled(root, "gone", "", known=known)


def check(*words: object, cwd: Path = ROOT, ok: bool = True) -> str:
    """Return what is printed."""
    done = run("tools.check_dataset", *words, cwd=cwd, ok=ok)
    assert ok or done.returncode == 1
    return done.stdout + done.stderr


def test_check_counts_classes_and_names_what_is_wrong(tmp_path):
    tree(tmp_path, "train/a/1.mp4", "train/a/2.mp4", "train/b/3.mp4", "val/a/4.mp4", "val/c/6.mp4")
    for path in tmp_path.rglob("*.mp4"):
        write_numbered(path, 5)
    dataset = [f"data.root={tmp_path}", "data.train=train", "data.workers=1"]
    counts = "3 videos for training in train, 0 unreadable\n2 classes, 0 wrong labels\n       2  a\n       1  b\n"
    assert counts in check(*dataset, "data.val=")
    (tmp_path / "val" / "a" / "5.mp4").write_bytes((tmp_path / "val/a/4.mp4").read_bytes()[:400])
    printed = check(*dataset, "data.val=val", ok=False)
    assert "3 videos for validation in val, 1 unreadable\n2 classes, 1 wrong labels\n" in printed
    assert "unknown class 'c' for 6.mp4" in printed and str(tmp_path / "val/a/5.mp4") in printed
    (tmp_path / "list.txt").write_text("train/a/1.mp4 0\n")
    assert "1 videos are for training and for validation, such as " in check(*dataset, "data.val=list.txt", ok=False)


@pytest.mark.parametrize("words", ["pretrain/k400_base.yaml data.val=", "baselines/k400_base.yaml"])
def test_check_of_a_pretraining_list_ignores_labels(words, tmp_path):
    write_numbered(tmp_path / "a.mp4", 5)
    tree(tmp_path, **{"train.txt": "a.mp4 0 -1\n"})
    dataset = [f"data.root={tmp_path}", "data.train=train.txt", "data.workers=1"]
    assert "1 videos for training in train.txt, 0 unreadable" in check(*f"configs/{words}".split(), *dataset)


def test_check_of_videos_folders_and_lists_needs_no_configuration(tmp_path):
    tree(tmp_path, "a.mp4", "run=3/b.mp4", "run=3/x=1.mp4", **{"list.txt": "a.mp4 0\nrun=3/b.mp4 jump\n"})
    for path in tmp_path.rglob("*.mp4"):
        write_numbered(path, 5)
    assert "5 videos, 0 unreadable\n" in check("a.mp4", "run=3", "list.txt", cwd=tmp_path)
    assert "1 videos, 0 unreadable\n" in check("run=3/x=1.mp4", cwd=tmp_path)
    (tmp_path / "run=3" / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:400])
    printed = check("run=3", "gone.mp4", cwd=tmp_path, ok=False)
    assert re.match(r"4 videos, 2 unreadable\n  run=3/cut.mp4: .*\n  gone.mp4: ", printed)
    for words, sentence in {"a.mp4 data.workers=2": "'a.mp4' is neither", "": "which dataset? Name"}.items():
        assert sentence in check(*words.split(), cwd=tmp_path, ok=False)
