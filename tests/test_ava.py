"""AVA's files and its evaluator: frame-mAP is the official one's to the digit, mistakes are refused with their line."""

import json
import math
import pickle
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import ROOT, run
from videos import frame_folder

from support import ava
from support.average_precision import average_precisions, mean_percent, summarize
from support.config import UserError
from support.video import BrokenVideo

LEFT, RIGHT = (0.0, 0.0, 0.4, 0.4), (0.5, 0.0, 0.9, 0.4)


def official(truth: ava.Rows, found: ava.Rows, actions: set[int], skip_empty: bool) -> dict[int, float]:
    """get_ava_performance.py and object_detection_evaluation.py of ActivityNet, loop for loop, in plain Python."""

    def by_frame(rows: ava.Rows) -> dict[ava.Frame, ava.Rows]:
        frames = defaultdict(list)
        for row in rows:
            if row.action in actions:
                frames[row.frame].append(row)
        return frames

    def iou(a: tuple, b: tuple) -> float:
        both = max(0.0, min(a[3], b[3]) - max(a[1], b[1])) * max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        return both / ((a[3] - a[1]) * (a[2] - a[0]) + (b[3] - b[1]) * (b[2] - b[0]) - both)

    number_of_truth, scores_and_labels = Counter(row.action for row in truth), defaultdict(list)
    truth, found = by_frame(truth), by_frame(found)
    for frame, rows in found.items():
        if skip_empty and frame not in truth:
            continue
        for action in actions:
            candidates = [row.box for row in truth.get(frame, []) if row.action == action]
            taken = [False] * len(candidates)
            for _, box, kind, score in sorted(rows, key=lambda row: -row.score):
                if kind != action or box[0] >= box[2] or box[1] >= box[3]:
                    continue
                overlaps = [iou(box, candidate) for candidate in candidates]
                label = False
                if overlaps and max(overlaps) >= 0.5:
                    best = overlaps.index(max(overlaps))
                    if not taken[best]:
                        label = taken[best] = True
                scores_and_labels[action].append((score, label))
    result = {}
    for action in actions:
        if not number_of_truth[action]:
            result[action] = math.nan
            continue
        right, precision, recall = 0, [0.0], [0.0]
        for place, (_, label) in enumerate(sorted(scores_and_labels[action], key=lambda pair: -pair[0]), 1):
            right += label
            precision.append(right / place)
            recall.append(right / number_of_truth[action])
        precision.append(0.0)
        recall.append(1.0)
        for place in range(len(precision) - 2, -1, -1):
            precision[place] = max(precision[place], precision[place + 1])
        changes = [i for i in range(1, len(recall)) if recall[i] != recall[i - 1]]
        result[action] = sum((recall[i] - recall[i - 1]) * precision[i] for i in changes)
    return result


def random_rows(seed: int, scores: list[float] | None) -> tuple[ava.Rows, ava.Rows]:
    """Rows of ground truth and of detections by frame and box. Nobody does action 6; action 5 is never detected.

    Boxes are on a coarse grid: overlaps repeat, or are exactly one half; some boxes have no area or leave the frame.
    """
    generator = random.Random(seed)

    def box(spread: float) -> tuple[float, ...]:
        x = generator.choice([-0.125, 0.125, 0.5])
        return tuple(edge + generator.choice([0, 0, spread, -spread]) for edge in (x, 0, x + 0.25, 0.5))

    truth, found = set(), set()
    for _ in range(700):
        frame, action = (generator.choice("abc"), generator.randint(900, 915)), generator.randint(1, 6)
        if generator.random() < 0.7 and frame[1] != 907 and action != 6:
            truth.add(ava.Row(frame, box(generator.choice([0, 0, 0, 0.125])), action, 1.0))
        score = generator.choice(scores) if scores else generator.random()
        if action != 5:
            found.add(ava.Row(frame, box(generator.choice([0.02, 0.125, 0.25])), action, score))
    return sorted(truth), sorted(found)


@pytest.mark.parametrize("scores", [None, [0.2, 0.5, 0.5, 0.9]])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_official_algorithm_on_random_rows(seed, scores):
    """In any order of rows, even with ties, which the official one decides by the order of rows: here sorted."""
    tables, actions = random_rows(seed, scores), {1, 2, 3, 5, 6}  # 4 is not evaluated
    for skip in (False, True):
        expected = official(*tables, actions, skip)
        for order in range(3):
            shuffled = [random.Random(order).sample(rows, len(rows)) for rows in tables]
            precisions = average_precisions(*shuffled, actions, skip_empty=skip)
            assert precisions == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert precisions[5] == 0 and math.isnan(precisions[6]) and 5 < mean_percent(precisions.values()) < 95


LIST = """# evaluated actions
label {
  name: "sit"
  label_id: 1
  label_type: PERSON_MOVEMENT
}
label { name: "read \\"{aloud}\\"" label_id: 2 label_type: OBJECT_MANIPULATION }
label { name: "hug (a person)" label_id: 5 label_type: PERSON_INTERACTION }
label { name: "talk to" label_id: 6 label_type: PERSON_INTERACTION }
"""


def test_command(tmp_path):
    rows = [(902, LEFT, 1), (902, LEFT, 5), (903, LEFT, 6), (904, LEFT, 9), (905, LEFT, 1)]
    truth = [ava.Row(("v", second), box, action, 1.0) for second, box, action in rows]
    rows = [(902, LEFT, 1, 0.9), (903, LEFT, 1, 0.95), (902, RIGHT, 5, 0.3), (903, LEFT, 6, 0.2), (904, LEFT, 6, 0.3)]
    found = [ava.Row(("v", second), box, action, score) for second, box, action, score in rows]
    paths = [tmp_path / name for name in ("mine.csv", "gt.csv", "list.pbtxt", "x.csv")]
    ava.write_rows(paths[0], [*found, found[1]._replace(frame=("v", 905))])
    ava.write_rows(paths[1], truth)
    paths[2].write_text(LIST)
    paths[3].write_text("v,0905\n")  # excluded on both sides
    for path in paths:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark, as Excel writes it
    files = zip(("--evaluate", "--ground-truth", "--labels", "--exclude"), paths, strict=True)
    command = ["detect_ava.py", *sum(files, ())]
    printed = run(*command).stdout
    result = json.loads((tmp_path / "mine_mAP.json").read_text())
    assert result["mAP"] == pytest.approx(100 * (1 / 2 + 0 + 1 / 2) / 3)
    groups = dict(person_movement=50, object_manipulation=None, person_interaction=25)
    assert result["groups"] == {group.replace("_", " "): pytest.approx(value) for group, value in groups.items()}
    assert [action["AP"] for action in result["actions"]] == [pytest.approx(50), None, 0, pytest.approx(50)]
    assert printed.startswith("6 detections in 4 frames, 4 of them among the 4 with ground truth\n")
    for line in (" 33.33  mAP at IoU 0.5", " 25.00  mean of person interaction", '  none    2 read "{aloud}"'):
        assert f"{line}\n" in printed
    done = run(*command, "--json")
    assert json.loads(done.stdout) == result and "6 detections in 4 frames" in done.stderr
    run(*command, "--skip-frames-without-ground-truth", "--out", tmp_path / "other.json")
    skipped = json.loads((tmp_path / "other.json").read_text())
    assert skipped["mAP"] == pytest.approx(100 * (1 / 2 + 0 + 1) / 3)  # 904 has only action 9
    ava.write_rows(tmp_path / "other.csv", [row for row in truth if row.action == 9])
    mistakes = {
        (*command[:3], "--labels", paths[2]): "needs --ground-truth GT.csv and --labels LIST",
        (*command, "other.csv"): "takes no configuration",
        (*command, "--ground-truth", tmp_path / "other.csv"): "holds no action in",
        (*command, "--out", tmp_path): "Is a directory",
    }
    for words, sentence in mistakes.items():
        done = run(*words, ok=False)
        assert done.returncode and sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert " 33.33  mAP at IoU 0.5" in done.stdout  # printed before it is written


def test_ground_truth_becomes_key_frames_and_persons(tmp_path):
    text = "-bc,0903,0.5,0.1,0.9,0.8,12,1\r\n-bc,902,0.1,0.1,0.3,0.8,80,0\r\n\r\nab,0902,0.2,0.2,0.4,0.4,3,5\r\n"
    text += "-bc,0903,0.1,0.1,0.3,0.8,11,0\r\n-bc,0903,0.50,0.1,0.9,0.8,79,1\r\n"
    (tmp_path / "gt.csv").write_text(text)
    frames = ava.key_frames(ava.read_ground_truth(tmp_path / "gt.csv"))
    assert list(frames) == [("-bc", 902), ("-bc", 903), ("ab", 902)]
    boxes, labels = ava.to_persons(frames["-bc", 903], 80)
    assert torch.equal(boxes, torch.tensor([[0.1, 0.1, 0.3, 0.8], [0.5, 0.1, 0.9, 0.8]]))
    assert labels.shape == (2, 80) and (labels.nonzero() + torch.tensor([0, 1])).tolist() == [[0, 11], [1, 12], [1, 79]]
    assert labels.unique().tolist() == [0, 1]
    assert [tensor.shape for tensor in ava.to_persons([], 80)] == [(0, 4), (0, 80)]


def test_rows_are_read_as_they_were_written_also_those_of_ava_kinetics(tmp_path):
    """Key frames at fractions of a second, and rows without a box: a key frame without persons."""
    text = "k,1.5,0.1,0.1,0.3,0.8,12,0\nk,2.5\nv,0902,0.1,0.1,0.3,0.8,12,0\nk,84.083333,0,0,1,1,3,1\nv,0903,,,,,,\n"
    (tmp_path / "gt.csv").write_text(text)
    rows = ava.read_ground_truth(tmp_path / "gt.csv")
    assert list(ava.key_frames(rows)) == [("k", 1.5), ("k", 84.083333), ("v", 902)]
    ava.write_rows(tmp_path / "again.csv", rows)
    written = [line.split(",")[1] for line in (tmp_path / "again.csv").read_text().splitlines()]
    assert written == ["01.5", "0902", "84.083333"]
    scores = torch.rand(50).tolist()  # of float32, as probabilities are
    rows += [ava.Row((f'{i}, "日本"', 902), LEFT, 1, score) for i, score in enumerate(scores)]
    ava.write_rows(tmp_path / "again.csv", rows)
    again = ava.read_detections(tmp_path / "again.csv")
    assert [row[:3] for row in again] == [row[:3] for row in rows]
    assert torch.equal(torch.tensor([row.score for row in again]), torch.tensor([row.score for row in rows]))
    (tmp_path / "x.csv").write_text("k,1.5\n\nv,902.0\n")
    assert ava.read_exclusions(tmp_path / "x.csv") == {("k", 1.5), ("v", 902)}


GOOD = "v,0902,0.1,0.1,0.3,0.8,12,1\n"
AIA = {"image_id": 1798, "bbox": [100, 0, 300, 200], "category_id": 1, "score": 0.85}
SIT = 'item { name: "sit" id: 1 }\n'
TRUTH, FOUND, EXCLUDED, ACTIONS = ava.read_ground_truth, ava.read_detections, ava.read_exclusions, ava.read_actions
PERSONS = partial(ava.read_person_boxes, threshold=0.8)
BOX = "0.1,0.1,0.3,0.8"
MISTAKES = [  # who reads it, the content of the file, what is said of it
    (TRUTH, f"{GOOD}\n{GOOD}v,0902,0,0,1,1", "line 4: 6 columns; a row is video,second,x1,y1,x2,y2,action,person"),
    (TRUTH, f"{GOOD}v,0902,{BOX},12,1,1", "line 2: 9 columns"),
    (TRUTH, "v,0902,0.1,left,0.3,0.8,12,1", "line 1: could not convert string to float: 'left'"),
    *((TRUTH, f"k,{second}", "line 1: no video, or a sec") for second in ("1.5.2", "-1", "1e3", ".5", "1.", "nan")),
    (TRUTH, f",0902,{BOX},12,1", "line 1: no video"),
    *((TRUTH, f"v,0902,{BOX},{action},1", f"line 1: unknown action {action}, known are 1 to 80") for action in (0, 81)),
    (TRUTH, f"v,0902,{BOX},,1", "line 1: invalid literal for int"),
    *((TRUTH, f"v,0902,{edge},0.1,0.3,0.8,12,1", "line 1: a box in pixels, or .*not finite") for edge in ("nan", "32")),
    (TRUTH, "v,0902,0.4,0.1,0.3,0.8,12,1", "line 1: a box of negative size, whose left or upper edge lies beyond"),
    *((TRUTH, content, "no rows can be read from") for content in (b"\x00\xff\xfe binary", None)),
    *((FOUND, f"{GOOD}v,902,0,0,1,1,12,{score}", "line 2: .*,action,score") for score in ("high", "inf", "nan")),
    (FOUND, "k,2.5", "line 1: 2 columns"),
    (EXCLUDED, "v,0902\nv,0902,1", "line 2: too many values to unpack .*; a row of excluded frames is video,second"),
    *((ACTIONS, text, "line 1: a list of actions is made of") for text in ("", "sit\nstand\n", "item { id: 1 }\n")),
    (ACTIONS, '# item { name: "x" id: 9 }\n\n  # another\nitem { name: "sit" }\n', "line 4: a list of actions"),
    (ACTIONS, 'item { name: "a" id: 0 }', "line 1: .*each id once, from 1"),
    *((ACTIONS, SIT + text, "line 2: a list of") for text in ("}", f"noise {SIT}", "item { name: 'x' id: 2 }", SIT)),
    (PERSONS, f"{GOOD}v,0902,0.4,0.1,0.3,0.8,,1", "line 2: a box of negative size"),
    (PERSONS, "", "holds no rows"),
    (PERSONS, f"v,0902,{BOX},,0.6\n", "no box has a score of 0.8 or more"),
    (PERSONS, f"v,0902,{BOX},,high\n", "line 1: could not convert"),
]


@pytest.mark.parametrize(("read", "content", "sentence"), MISTAKES)
def test_mistakes_are_refused_with_file_and_line(tmp_path, read, content, sentence):
    path = tmp_path / "file.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"file\.csv.*{sentence}" if "no rows can" not in sentence else sentence):
        read(path)


def test_lists_of_actions(tmp_path):
    path = tmp_path / "list.pbtxt"
    path.write_text('item {\n  name: "sit"\n  id: 11\n}\nitem {\n  id: 12\n  name: "stand"\n}\n')
    assert ava.read_actions(path) == {11: ("sit", ""), 12: ("stand", "")}
    assert summarize({11: 0.5, 12: math.nan}, ava.read_actions(path))["groups"] == {}
    # The list of the 60 evaluated actions has no types, but its ids are AVA's: 14 poses, 49 with objects, 17 persons.
    names = {14: "walk", 15: "answer phone", 63: "write", 64: "fight/hit (a person)"}
    path.write_text("".join(f'item {{\n  name: "{names.get(i, i)}"\n  id: {i}\n}}\n' for i in range(1, 81)))
    groups = [group for _, group in ava.read_actions(path).values()]
    assert groups == [ava.GROUPS[0]] * 14 + [ava.GROUPS[1]] * 49 + [ava.GROUPS[2]] * 17


def test_person_boxes_of_slowfast_and_of_ground_truth(tmp_path, capsys):
    path = tmp_path / "boxes.csv"
    text = "v,0903,0.1,0.1,0.3,0.8,,0.95\nv,0903,0.5,0.1,0.7,0.8,,0.6\nv,0902,0.5,0.1,0.7,0.8,12,0.8\n"
    path.write_text(text + "v,0902,0.5,0.1,0.7,0.8,914,0.8\nw,0902,0,0,1,1,,0.7\n")  # 914 is of a larger list
    scores = {frame: [(row.action, row.score) for row in rows] for frame, rows in PERSONS(path).items()}
    assert scores == {("v", 902): [(0, 0.8), (0, 0.8)], ("v", 903): [(0, 0.95)]}  # actions are not needed
    path.write_text("v,0902,0,0,1,1,,1\nv,0902,0.5,0,1,1,,0\n")
    assert [row.box for row in PERSONS(path)["v", 902]] == [(0, 0, 1, 1)]
    assert not capsys.readouterr().err
    # In ground truth all rows have actions, and persons' numbers in place of scores.
    path.write_text("v,0902,0,0,1,1,12,0\nv,0902,0,0,1,1,95,0\nk,2.5\nv,0902,0.5,0,1,1,3,71\n")
    assert {row[1:] for row in PERSONS(path)["v", 902]} == {((0, 0, 1, 1), 0, 1), ((0.5, 0, 1, 1), 0, 1)}
    assert "is ground truth, with persons' numbers in place of scores" in capsys.readouterr().err


@pytest.fixture
def aia(tmp_path) -> Callable:
    """Read entries, or other content, as AIA's json of boxes, with two movies of different sizes."""
    (tmp_path / "names.txt").write_text("first-One.mkv\n2nd.mp4\nmissing.mp4\nbroken.mp4\n")
    movies = {"first-One": frame_folder(tmp_path / "one", 1, (400, 192)), "broken": tmp_path / "broken.mp4"}
    movies |= {"2nd": frame_folder(tmp_path / "two", 1, (192, 96))}
    path = tmp_path / "boxes.json"

    def read(content: object, movies: ava.Movies = movies) -> ava.KeyFrames:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", ava.movie_sizes(movies))

    return read


def test_person_boxes_of_aia(aia, tmp_path, capsys):
    """In pixels of the movies' own size, which is read from each movie. Boxes of movies that are not there are left."""
    entries = [AIA, {"image_id": 10902, "bbox": [19.2, 9.6, 38.4, 48], "score": 0.9}, AIA | {"score": 0.2}]
    entries += [AIA | {"image_id": image_id} for image_id in (20902, 30902, 30903)]
    frames = aia(entries)
    assert list(frames) == [("2nd", 902), ("first-One", 1798)]
    (second,), (first,) = frames.values()
    assert second[1] == pytest.approx((0.1, 0.1, 0.3, 0.6)) and second[2:] == (0, 0.9)
    assert first[1] == pytest.approx((0.25, 0, 1, 200 / 192)) and first[2:] == (0, 0.85)
    assert capsys.readouterr().err.count("its boxes are left out: ") == 1
    with pytest.raises(UserError, match="no box has .* a movie in data.movies"):
        aia(entries, {})
    with pytest.raises(UserError, match="give AVA's list of file names"):
        ava.read_person_boxes(tmp_path / "boxes.json", 0.8)


BAD_ENTRIES = [AIA | {"image_id": number} for number in (40902, -9000, None, math.inf)]
BAD_ENTRIES += [AIA | {"bbox": box} for box in ([1, 2, 3], 7, [900, 10, 20, 20], [10, 10, -5, 5])]
BAD_ENTRIES += [AIA | {"score": math.nan}, AIA | {"score": "high"}, 1, None, {"image_id": 902}]
BAD_FILES = [([AIA, entry], "boxes.json, entry 2: .*; an entry holds image_id") for entry in BAD_ENTRIES]
BAD_FILES += [(content, "boxes.json") for content in ({}, [], 7, b"not json", b"[\xff]")]


@pytest.mark.parametrize("content, sentence", BAD_FILES)
def test_mistakes_of_aia_are_refused_with_their_entry(aia, content, sentence):
    with pytest.raises(UserError, match=sentence):
        aia(content)


def test_the_docs_convert_a_pickle_of_boxes(tmp_path):
    boxes = {"v,0902": [[0.1, 0.1, 0.3, 0.8, 0.95], [0.5, 0.1, 0.7, 0.8, 0.81]], "w,1798": [[0, 0, 1, 1, 0.9]]}
    (tmp_path / "boxes.pkl").write_bytes(pickle.dumps(boxes))
    with pytest.raises(UserError, match="is a pickle, which could run any code: convert it to csv as docs/ava.md says"):
        PERSONS(tmp_path / "boxes.pkl")
    code = (ROOT / "docs/ava.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    scores = [(frame, row.score) for frame, rows in PERSONS(tmp_path / "boxes.csv").items() for row in rows]
    assert scores == [(("v", 902), 0.95), (("v", 902), 0.81), (("w", 1798), 0.9)]


def test_list_of_movies(tmp_path):
    for name in ("-5K.mkv", "b.MP4", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "frames").mkdir()
    movies = {"-5K": "-5K.mkv", "b": "b.MP4", "frames": "frames"}
    assert ava.list_movies(tmp_path) == {video: tmp_path / name for video, name in movies.items()}
    with pytest.raises(UserError, match="there is no folder .* with movies"):
        ava.list_movies(tmp_path / "frames")


def test_frames_that_are_missing_or_broken_are_named(tmp_path):
    folder = frame_folder(tmp_path / "movie", 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrokenVideo, match="empty_000001.jpg"):
        ava.open_movie(tmp_path / "empty", 0, 1)
    (folder / "movie_000002.jpg").unlink()
    (folder / "movie_000003.jpg").write_text("not a picture")
    for number, reason in ((1, "movie_000002.jpg"), (2, "movie_000003.jpg: cannot identify")):
        with pytest.raises(BrokenVideo, match=reason), ava.open_movie(folder, 0, 1) as movie:
            movie.frames([number])
