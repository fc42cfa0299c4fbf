"""Frame-mAP is the official evaluator's, boxes stay on their pixels, clips hold the frames that their time says."""

import json
import math
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import number_of, numbered_frame, run, write_numbered

import data
import detect_ava
import support.ava
import support.run
import support.video
from support import toy
from support.config import UserError
from support.video import BrokenVideo

# ---- frame-mAP by hand ----

LEFT, RIGHT, BELOW = (0.0, 0.0, 0.4, 0.4), (0.5, 0.0, 0.9, 0.4), (0.0, 0.5, 0.4, 0.9)
NEAR_LEFT = (0.1, 0.0, 0.5, 0.4)  # IoU with LEFT: 0.3 / 0.5 = 0.6; with RIGHT: 0


class Files:
    """Writes rows (second, box, action[, score]) of video v as AVA's csv files and evaluates them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, rows: list[tuple]) -> Path:
        path = self.folder / name
        path.write_text("".join(f"v,{second:04d},{','.join(map(str, box))},{','.join(map(str, rest))}\n" for second, box, *rest in rows))
        return path

    def __call__(self, truth: list[tuple], found: list[tuple], actions: tuple[int, ...] = (1,), **options) -> dict[int, float]:
        truth, found = support.ava.read_ground_truth(self.write("truth.csv", truth)), support.ava.read_detections(self.write("found.csv", found))
        return support.ava.average_precisions(truth, found, actions, **options)


@pytest.fixture
def average_precisions(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_all_found_and_nothing_else_is_1(average_precisions):
    assert average_precisions([(902, LEFT, 1, 7), (902, RIGHT, 1, 8)], [(902, LEFT, 1, 0.3), (902, RIGHT, 1, 0.9)]) == {1: 1.0}


def test_a_duplicate_is_wrong(average_precisions):
    truth = [(902, LEFT, 1), (902, RIGHT, 1)]
    found = [(902, LEFT, 1, 0.9), (902, NEAR_LEFT, 1, 0.8), (902, RIGHT, 1, 0.7)]
    # right, wrong, right: precision 1 at recall 1/2, 2/3 at recall 1
    assert average_precisions(truth, found)[1] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    # The better placed of the two comes second: the higher score takes the box all the same.
    found = [(902, NEAR_LEFT, 1, 0.9), (902, LEFT, 1, 0.8), (902, RIGHT, 1, 0.7)]
    assert average_precisions(truth, found)[1] == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)


def test_no_second_choice(average_precisions):
    """Both detections overlap box a most; the second overlaps b enough too, but b is not tried."""
    a, b = (0.0, 0.0, 0.4, 0.4), (0.05, 0.0, 0.45, 0.4)
    found = [(902, (0.0, 0.0, 0.41, 0.4), 1, 0.9), (902, (0.0, 0.0, 0.42, 0.4), 1, 0.8)]
    assert average_precisions([(902, a, 1), (902, b, 1)], found)[1] == pytest.approx(1 / 2)


def test_overlap_of_exactly_one_half_is_enough(average_precisions):
    assert average_precisions([(902, (0, 0, 0.5, 0.5), 1)], [(902, (0, 0, 0.5, 0.25), 1, 0.5)]) == {1: 1.0}
    assert average_precisions([(902, (0, 0, 0.5, 0.5), 1)], [(902, (0, 0, 0.5, 0.2499), 1, 0.5)]) == {1: 0.0}


def test_ties_in_score_do_not_depend_on_the_order_of_rows(average_precisions):
    truth = [(902, LEFT, 1), (903, LEFT, 1)]
    found = [(902, LEFT, 1, 0.5), (903, RIGHT, 1, 0.5), (903, LEFT, 1, 0.5)]
    # By frame, then box: right in 902; in 903 LEFT, right, before RIGHT, wrong.
    assert average_precisions(truth, found) == {1: 1.0} == average_precisions(truth[::-1], found[::-1])


def test_precision_never_grows_with_recall(average_precisions):
    truth = [(second, LEFT, 1) for second in (902, 903, 904)]
    found = [(901, LEFT, 1, 0.9), (902, LEFT, 1, 0.8), (903, LEFT, 1, 0.7)]
    # wrong, right, right: precision 1/2 and 2/3 are raised to 2/3; recall ends at 2/3
    assert average_precisions(truth, found)[1] == pytest.approx(2 / 3 * 2 / 3)


def test_frames_without_ground_truth_count_unless_skipped(average_precisions):
    truth, found = [(902, LEFT, 1), (904, LEFT, 2)], [(903, LEFT, 1, 0.9), (904, LEFT, 1, 0.8), (902, LEFT, 1, 0.7)]
    assert average_precisions(truth, found)[1] == pytest.approx(1 / 3)
    assert average_precisions(truth, found, skip_frames_without_ground_truth=True)[1] == 1.0  # 904 has none of action 1
    skipped = average_precisions(truth, found, (1, 2), skip_frames_without_ground_truth=True)
    assert skipped[1] == pytest.approx(1 / 2)  # 904 has some, of action 2
    assert skipped[2] == 0.0


def test_frames_without_detections_count(average_precisions):
    assert average_precisions([(902, LEFT, 1), (903, LEFT, 1)], [(902, LEFT, 1, 0.9)])[1] == pytest.approx(1 / 2)


def test_excluded_frames_count_on_neither_side(average_precisions):
    truth, found = [(902, LEFT, 1), (903, LEFT, 1)], [(902, LEFT, 1, 0.5), (903, RIGHT, 1, 0.9), (905, RIGHT, 1, 0.9)]
    assert average_precisions(truth, found, excluded={("v", 903), ("v", 905)}) == {1: 1.0}
    assert average_precisions(truth, found, excluded={("w", 903)})[1] == pytest.approx(1 / 2 * 1 / 3)


def test_actions_without_ground_truth_or_detections_or_in_no_list(average_precisions):
    truth = [(902, LEFT, 1), (902, LEFT, 3), (902, LEFT, 80)]
    found = [(902, LEFT, 1, 0.9), (902, LEFT, 2, 0.9), (902, RIGHT, 79, 0.99)]
    result = average_precisions(truth, found, (1, 2, 3))
    assert result[1] == 1.0 and math.isnan(result[2]) and result[3] == 0.0
    assert support.ava.mean_of(result.values()) == 0.5


def test_actions_do_not_mix(average_precisions):
    truth, found = [(902, LEFT, 1), (902, LEFT, 2)], [(902, LEFT, 1, 0.9), (902, RIGHT, 2, 0.9)]
    assert average_precisions(truth, found, (1, 2)) == {1: 1.0, 2: 0.0}


def test_detections_without_area_are_dropped_but_ground_truth_without_area_counts(average_precisions):
    nothing, inverted = (0.5, 0.5, 0.5, 0.9), (0.9, 0.0, 0.5, 0.4)
    assert average_precisions([(902, RIGHT, 1)], [(902, nothing, 1, 0.9), (902, inverted, 1, 0.8), (902, RIGHT, 1, 0.7)]) == {1: 1.0}
    assert average_precisions([(902, RIGHT, 1), (902, nothing, 1)], [(902, nothing, 1, 0.9), (902, RIGHT, 1, 0.7)])[1] == pytest.approx(1 / 2)


def test_boxes_outside_the_frame_are_not_cut_off(average_precisions):
    outside = (-0.4, 0.0, 0.4, 0.4)  # IoU with LEFT 1/2; if cut off at the edge it would be 1, and (-0.5, ...) would match too
    assert average_precisions([(902, LEFT, 1)], [(902, outside, 1, 0.9)]) == {1: 1.0}
    assert average_precisions([(902, LEFT, 1)], [(902, (-0.5, 0.0, 0.4, 0.4), 1, 0.9)]) == {1: 0.0}


def test_without_any_detection_left(average_precisions):
    assert average_precisions([(902, LEFT, 1)], [(902, LEFT, 2, 0.9)]) == {1: 0.0}


# ---- frame-mAP against a slow transcription of the official evaluator ----


def official(truth: Path, found: Path, actions: set[int], excluded: set[str], skip_empty: bool) -> dict[int, float]:
    """get_ava_performance.py and object_detection_evaluation.py of ActivityNet, loop for loop, in plain Python."""

    def read_csv(path: Path) -> dict[str, list[tuple]]:
        entries = defaultdict(list)
        for line in path.read_text().splitlines():
            row = line.split(",")
            score = float(row[7]) if len(row) == 8 else 1.0
            if int(row[6]) in actions:
                entries[f"{row[0]},{int(row[1]):04d}"].append((score, int(row[6]), *map(float, row[2:6])))
        return {key: sorted(rows, key=lambda row: -row[0]) for key, rows in entries.items()}

    def iou(a: tuple, b: tuple) -> float:
        both = max(0.0, min(a[3], b[3]) - max(a[1], b[1])) * max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        return both / ((a[3] - a[1]) * (a[2] - a[0]) + (b[3] - b[1]) * (b[2] - b[0]) - both)

    truth, found = read_csv(truth), read_csv(found)
    number_of_truth, scores_and_labels = defaultdict(int), defaultdict(list)
    for key, rows in truth.items():
        if key not in excluded:
            for _, action, *_ in rows:
                number_of_truth[action] += 1
    for key, rows in found.items():
        if key in excluded or skip_empty and key not in truth:
            continue
        for action in actions:
            boxes = [(score, box) for score, kind, *box in rows if kind == action and box[0] < box[2] and box[1] < box[3]]
            candidates = [box for _, kind, *box in truth.get(key, []) if kind == action]
            taken = [False] * len(candidates)
            for score, box in boxes:
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
        result[action] = sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)) if recall[i] != recall[i - 1])
    return result


def random_rows(seed: int, scores: list[float] | None) -> tuple[list[str], list[str]]:
    """Rows of ground truth and of detections: boxes on a coarse grid, so that overlaps repeat and claims conflict."""
    generator = random.Random(seed)

    def box(spread: float) -> tuple[float, ...]:
        x, y = generator.choice([0.1, 0.2, 0.25, 0.5]), generator.choice([0.0, 0.1, 0.3])
        return tuple(round(edge + generator.choice([0, 0, spread, -spread]), 3) for edge in (x, y, x + 0.3, y + 0.4))

    truth, found = set(), set()
    for _ in range(600):
        frame, action = f"{generator.choice('abc')},{generator.randint(900, 915):04d}", generator.randint(1, 4)
        if generator.random() < 0.7 and not frame.endswith("7"):
            truth.add(f"{frame},{','.join(map(str, box(0)))},{action}")
        score = generator.choice(scores) if scores else generator.random()
        found.add(f"{frame},{','.join(map(str, box(generator.choice([0.02, 0.1, 0.4]))))},{action},{score}")
    truth, found = sorted(truth), sorted(found)
    generator.shuffle(truth)
    generator.shuffle(found)
    return truth, found


def by_place(row: str) -> tuple:
    """Sorts rows by frame and box. Where two scores or two overlaps are equal, the official result depends on the order of rows."""
    video, second, *numbers = row.split(",")
    return video, int(second), *map(float, numbers[:4])


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_official_algorithm_on_random_rows(tmp_path, seed):
    truth, found = random_rows(seed, scores=None)
    for name, rows in (("truth", sorted(truth, key=by_place)), ("found", found)):
        (tmp_path / name).write_text("\n".join(rows))
    actions, excluded = set(range(1, 4)), {("a", 903), ("b", 904), ("c", 917)}
    for skip in (False, True):
        expected = official(tmp_path / "truth", tmp_path / "found", actions, {f"{video},{second:04d}" for video, second in excluded}, skip)
        ground_truth, detections = support.ava.read_ground_truth(tmp_path / "truth"), support.ava.read_detections(tmp_path / "found")
        precisions = support.ava.average_precisions(ground_truth, detections, actions, excluded, skip_frames_without_ground_truth=skip)
        assert precisions == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert 0.05 < support.ava.mean_of(precisions.values()) < 0.95


@pytest.mark.parametrize("seed", range(6))
def test_order_of_rows_is_of_no_consequence_even_with_ties(tmp_path, seed):
    results = []
    for order in range(4):
        truth, found = random_rows(seed, scores=[0.2, 0.5, 0.5, 0.9])
        random.Random(order).shuffle(truth)
        random.Random(order).shuffle(found)
        for name, rows in (("truth", truth), ("found", found)):
            (tmp_path / name).write_text("\n".join(rows))
        ground_truth, detections = support.ava.read_ground_truth(tmp_path / "truth"), support.ava.read_detections(tmp_path / "found")
        results.append(support.ava.average_precisions(ground_truth, detections, range(1, 5)))
    assert all(result == results[0] for result in results)
    # ... and it is what the official algorithm says if rows come in the order of frame and box.
    for name, rows in (("truth", truth), ("found", found)):
        (tmp_path / name).write_text("\n".join(sorted(rows, key=by_place)))
    assert results[0] == pytest.approx(official(tmp_path / "truth", tmp_path / "found", set(range(1, 5)), set(), False), abs=1e-12)


# ---- the command ----

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


def test_evaluate_command(tmp_path):
    files = Files(tmp_path)
    truth = files.write("gt.csv", [(902, LEFT, 1, 4), (902, LEFT, 5, 4), (903, LEFT, 6, 4), (904, LEFT, 9, 0), (905, LEFT, 1, 0)])
    found = files.write("mine.csv", [(902, LEFT, 1, 0.9), (903, LEFT, 1, 0.95), (902, RIGHT, 5, 0.3), (903, LEFT, 6, 0.2), (904, LEFT, 6, 0.3)])
    (tmp_path / "list.pbtxt").write_text(LIST)
    (tmp_path / "out.csv").write_text("v,0905\n")
    options = ["--evaluate", found, "--ground-truth", truth, "--labels", tmp_path / "list.pbtxt", "--exclude", tmp_path / "out.csv"]
    printed = run("detect_ava.py", *options).stdout
    result = json.loads((tmp_path / "mine_mAP.json").read_text())
    assert result["mAP"] == pytest.approx(100 * (1 / 2 + 0 + 1 / 2) / 3)
    assert result["groups"] == {"person movement": pytest.approx(50), "object manipulation": None, "person interaction": pytest.approx(25)}
    assert [action["AP"] for action in result["actions"]] == [pytest.approx(50), None, 0, pytest.approx(50)]
    assert " 33.33  mAP at IoU 0.5" in printed and " 25.00  mean of person interaction" in printed and '  none    2 read "{aloud}"' in printed
    run("detect_ava.py", *options, "--skip-frames-without-ground-truth", "--out", tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text())["mAP"] == pytest.approx(100 * (1 / 2 + 0 + 1) / 3)  # 904 has only action 9


def test_evaluate_command_says_what_is_wrong(tmp_path):
    files = Files(tmp_path)
    found = files.write("mine.csv", [(902, LEFT, 1, 0.9)])
    (tmp_path / "list.pbtxt").write_text(LIST)
    done = run("detect_ava.py", "--evaluate", found, ok=False)
    assert done.returncode and done.stderr.startswith("detect_ava.py: --evaluate needs --ground-truth GT.csv and --labels LIST.pbtxt")
    truth = files.write("gt.csv", [(902, LEFT, 3)])
    done = run("detect_ava.py", "--evaluate", found, "--ground-truth", truth, "--labels", tmp_path / "list.pbtxt", ok=False)
    assert done.returncode and "holds no row of an action in" in done.stderr and len(done.stderr.splitlines()) == 1


# ---- readers ----


def test_ground_truth_becomes_key_frames_and_rows_again(tmp_path):
    (tmp_path / "gt.csv").write_text(
        "-bc,0903,0.5,0.1,0.9,0.8,12,1\r\n-bc,902,0.1,0.1,0.3,0.8,80,0\r\n\r\nab,0902,0.2,0.2,0.4,0.4,3,5\r\n"
        "-bc,0903,0.1,0.1,0.3,0.8,11,0\r\n-bc,0903,0.50,0.1,0.9,0.8,79,1\r\n"
    )
    rows = support.ava.read_ground_truth(tmp_path / "gt.csv")
    frames = support.ava.key_frames(rows)
    assert [(frame.video, frame.second) for frame in frames] == [("-bc", 902), ("-bc", 903), ("ab", 902)]
    assert frames[1].boxes.tolist() == [[0.1, 0.1, 0.3, 0.8], [0.5, 0.1, 0.9, 0.8]] and frames[1].scores.tolist() == [1, 1]
    assert frames[1].labels.shape == (2, 80) and [(i, j + 1) for i, j in frames[1].labels.nonzero().tolist()] == [(0, 11), (1, 12), (1, 79)]
    support.ava.write_rows(tmp_path / "again.csv", support.ava.to_rows(frames))
    assert (tmp_path / "again.csv").read_text().splitlines() == [
        "-bc,0902,0.1,0.1,0.3,0.8,80,1", "-bc,0903,0.1,0.1,0.3,0.8,11,1", "-bc,0903,0.5,0.1,0.9,0.8,12,1", "-bc,0903,0.5,0.1,0.9,0.8,79,1",
        "ab,0902,0.2,0.2,0.4,0.4,3,1",
    ]  # fmt: skip


def test_predictions_evaluate_alike_in_memory_and_from_their_file(tmp_path):
    truth, _ = random_rows(0, None)
    (tmp_path / "truth").write_text("\n".join(truth))
    rows = support.ava.read_ground_truth(tmp_path / "truth")
    frames = support.ava.key_frames(rows)
    for frame in frames:
        frame.labels = (frame.labels + 0.8 * torch.rand(frame.labels.shape, generator=torch.Generator().manual_seed(frame.second))) / 2
    detections = support.ava.to_rows(frames)
    support.ava.write_rows(tmp_path / "found", detections)
    in_memory = support.ava.average_precisions(rows, detections, range(1, 5))
    assert in_memory == support.ava.average_precisions(rows, support.ava.read_detections(tmp_path / "found"), range(1, 5))
    assert 0.5 < support.ava.mean_of(in_memory.values()) <= 1


GOOD = "v,0902,0.1,0.1,0.3,0.8,12,1\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("v,0902,0.1,0.1,0.3,0.8", "6 columns"),
        ("v,0902,0.1,0.1,0.3,0.8,12,1,1", "9 columns"),
        ("v,0902,0.1,left,0.3,0.8,12,1", "could not convert string to float: 'left'"),
        ("v,soon,0.1,0.1,0.3,0.8,12,1", "second that is not a whole number"),
        (",0902,0.1,0.1,0.3,0.8,12,1", "no video"),
        ("v,0902,0.1,0.1,0.3,0.8,81,1", "unknown action 81, known are 1 to 80"),
        ("v,0902,0.1,0.1,0.3,0.8,0,1", "unknown action 0"),
        ("v,0902,0.1,0.1,0.3,0.8,,1", "invalid literal for int"),
        ("v,0902,0.1,0.1,0.3,0.8,sit,1", "'sit'"),
        ("v,0902,nan,0.1,0.3,0.8,12,1", "not finite"),
        ("v,0902,32,17,190,240,12,1", "a box in pixels"),
        ("v,0902,0.4,0.1,0.3,0.8,12,1", "lies beyond the other"),
    ],
)
def test_malformed_rows_are_refused_with_file_and_line(tmp_path, row, reason):
    (tmp_path / "gt.csv").write_text(GOOD + "\n" + GOOD + row + "\n")
    with pytest.raises(UserError, match=rf"gt.csv, line 4: .*{reason}.*; a row is video,second,x1,y1,x2,y2,action,person"):
        support.ava.read_ground_truth(tmp_path / "gt.csv")


@pytest.mark.parametrize("score", ["high", "inf", "nan"])
def test_malformed_scores_are_refused(tmp_path, score):
    (tmp_path / "found.csv").write_text(f"{GOOD}v,0902,0.1,0.1,0.3,0.8,12,{score}\n")
    with pytest.raises(UserError, match=r"found.csv, line 2: .*; a row is video,second,x1,y1,x2,y2,action,score"):
        support.ava.read_detections(tmp_path / "found.csv")


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\x00\xff\xfe binary"])
def test_files_without_rows_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "gt.csv").write_bytes(content)
    with pytest.raises(UserError, match="gt.csv"):
        support.ava.read_ground_truth(tmp_path / "gt.csv")


def test_exclusions(tmp_path):
    (tmp_path / "x.csv").write_text("v,0902\n\nw,903\n")
    assert support.ava.read_exclusions(tmp_path / "x.csv") == {("v", 902), ("w", 903)}
    (tmp_path / "x.csv").write_text("v,0902\nv,0902,1\n")
    with pytest.raises(UserError, match="x.csv, line 2: a row of excluded frames is video,second, not v,0902,1"):
        support.ava.read_exclusions(tmp_path / "x.csv")


def test_lists_of_actions(tmp_path):
    path = tmp_path / "list.pbtxt"
    path.write_text(LIST)
    actions = support.ava.read_actions(path)
    assert list(actions) == [1, 2, 5, 6] and actions[2] == support.ava.Action('read "{aloud}"', "OBJECT_MANIPULATION")
    path.write_text('item {\n  name: "sit"\n  id: 11\n}\nitem {\n  name: "stand"\n  id: 12\n}\n')
    assert support.ava.read_actions(path) == {11: support.ava.Action("sit", ""), 12: support.ava.Action("stand", "")}
    assert support.ava.summarize({11: 0.5, 12: math.nan}, support.ava.read_actions(path)) == {
        "mAP": 50, "groups": {}, "actions": [{"id": 11, "name": "sit", "AP": 50}, {"id": 12, "name": "stand", "AP": None}]
    }  # fmt: skip
    # The list of the 60 evaluated actions states no types, but its ids are AVA's: 14 poses, 49 with objects, 17 with persons.
    names = {14: "walk", 15: "answer phone", 63: "write", 64: "fight/hit (a person)"}
    path.write_text("".join(f'item {{\n  name: "{names.get(i, i)}"\n  id: {i}\n}}\n' for i in range(1, 81)))
    groups = [action.group for action in support.ava.read_actions(path).values()]
    assert [groups.count(group) for group in support.ava.GROUPS] == [14, 49, 17] and groups == sorted(groups, key=list(support.ava.GROUPS).index)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1), ("sit\nstand\n", 2), ('item { id: 1 }\n', 1), ('\nitem { name: "sit" }\n', 2), ('item { name: "a" id: 1 }\nitem { name: "b" id: 1 }', 2),
        ('item { name: "a" id: 0 }', 1), ('item { name: "a" id: 1 }\n}\n', 2), ('item { name: "a" id: 1 }\nnoise item { name: "b" id: 2 }', 2),
    ],
)  # fmt: skip
def test_malformed_lists_of_actions_are_refused_with_file_and_line(tmp_path, text, line):
    (tmp_path / "list.pbtxt").write_text(text)
    with pytest.raises(UserError, match=f"list.pbtxt, line {line}"):
        support.ava.read_actions(tmp_path / "list.pbtxt")
    (tmp_path / "list.pbtxt").write_text("# a comment\n\n  # another\n" + text)
    with pytest.raises(UserError, match=f"list.pbtxt, line {line + 3 if text else 1}"):
        support.ava.read_actions(tmp_path / "list.pbtxt")


def test_person_boxes_of_slowfast(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(
        "v,0903,0.1,0.1,0.3,0.8,,0.95\nv,0903,0.5,0.1,0.7,0.8,,0.6\nv,0902,0.5,0.1,0.7,0.8,12,0.8\n"
        "v,0902,0.5,0.1,0.7,0.8,14,0.8\nw,0902,0,0,1,1,,0.7\n"
    )
    frames = support.ava.read_person_boxes(path, 0.8)
    assert [(frame.video, frame.second, frame.scores.tolist()) for frame in frames] == [("v", 902, [0.8]), ("v", 903, [0.95])]
    assert frames[0].labels.nonzero()[:, 1].tolist() == [11, 13] and frames[1].labels.sum() == 0 and frames[1].labels.shape == (1, 80)
    with pytest.raises(UserError, match="boxes.csv: none of 5 boxes has a score of 0.99 or more; the highest is 0.950"):
        support.ava.read_person_boxes(path, 0.99)


def test_person_boxes_of_aia(tmp_path):
    (tmp_path / "names.txt").write_text("first-One.mkv\n2nd.mp4\n")
    sizes = {"first-One": (400, 200), "2nd": (200, 100)}
    entries = [
        {"image_id": 10902, "bbox": [20, 10, 40, 50], "category_id": 1, "score": 0.9},
        {"image_id": 1798, "bbox": [100, 0, 300, 200], "category_id": 1, "score": 0.85},
        {"image_id": 10902, "bbox": [0, 0, 10, 10], "category_id": 1, "score": 0.2},
    ]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(entries))
    frames = support.ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", sizes)
    assert [(frame.video, frame.second, frame.boxes.tolist(), frame.scores.tolist()) for frame in frames] == [
        ("2nd", 902, [[0.1, 0.1, 0.3, 0.6]], [0.9]), ("first-One", 1798, [[0.25, 0, 1, 1]], [0.85])
    ]  # fmt: skip
    with pytest.raises(UserError, match="give AVA's list of file names"):
        support.ava.read_person_boxes(path, 0.8)
    for change, reason in (
        ({"image_id": 20902}, "names.txt lists 2"), ({"image_id": None}, "int"), ({"bbox": [1, 2, 3]}, "not enough values"),
        ({"score": math.nan}, "not finite"), ({"bbox": [900, 10, 20, 20]}, "of another size"),
        ({"bbox": 7}, "not iterable"), ({"score": "high"}, "could not convert"),
    ):  # fmt: skip
        path.write_text(json.dumps([entries[0], entries[1] | change]))
        with pytest.raises(UserError, match=f"boxes.json, entry 2: .*{reason}"):
            support.ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", sizes)
    path.write_text(json.dumps(entries))
    frames = support.ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", {"first-One": (400, 200)})
    assert [frame.video for frame in frames] == ["first-One"]  # the other movie is missing
    with pytest.raises(UserError, match="a movie for none of its 3 boxes"):
        support.ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", {})
    for content in ("{}", "[]", "not json", "[1]"):
        path.write_text(content)
        with pytest.raises(UserError, match="boxes.json"):
            support.ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", sizes)


def test_a_pickle_is_refused_with_a_command_that_converts_it(tmp_path):
    import pickle

    path = tmp_path / "ava_dense_proposals.pkl"
    path.write_bytes(pickle.dumps({"v,0902": [[0.1, 0.1, 0.3, 0.8, 0.95], [0.5, 0.1, 0.7, 0.8, 0.81]], "w,1798": [[0, 0, 1, 1, 0.9]]}))
    with pytest.raises(UserError, match="is a pickle, which could run any code") as refusal:
        support.ava.read_person_boxes(path, 0.8)
    command = str(refusal.value).partition("convert it with python")[2]
    subprocess.run(f"{sys.executable}{command}", shell=True, check=True, cwd=tmp_path)
    frames = support.ava.read_person_boxes(tmp_path / "boxes.csv", 0.8)
    assert [(frame.video, frame.second, frame.scores.tolist()) for frame in frames] == [("v", 902, [0.95, 0.81]), ("w", 1798, [0.9])]


# ---- boxes ----


def colour_coded(height: int, width: int) -> torch.Tensor:
    """Frames (2, 3, H, W) whose red is the place from left to right and whose green that from top to bottom."""
    frames = torch.zeros(2, 3, height, width)
    frames[:, 0] = (torch.arange(width) + 0.5) / width
    frames[:, 1] = ((torch.arange(height) + 0.5) / height)[:, None]
    frames[:, 2] = 0.5
    return frames


def place_of(frames: torch.Tensor, x: float, y: float) -> list[float]:
    """The place, in fractions of the coded frame, that the colour at (x, y) in pixels tells."""
    height, width = frames.shape[-2:]
    grid = torch.tensor([[[[2 * x / width - 1, 2 * y / height - 1]]]], dtype=frames.dtype)
    return F.grid_sample(frames[-1:], grid, align_corners=False)[0, :2, 0, 0].tolist()


@pytest.mark.parametrize(("height", "width", "short"), [(180, 321, 128), (321, 180, 128), (97, 100, 256), (64, 64, 64)])
def test_the_pixel_under_a_corner_stays_under_it(height, width, short):
    boxes = torch.tensor([[0.4, 0.42, 0.55, 0.61], [0.45, 0.4, 0.6, 0.5]], dtype=torch.float64)
    frames, pixels = colour_coded(height, width), detect_ava.to_pixels(boxes, height, width)

    def check(frames: torch.Tensor, pixels: torch.Tensor, flipped: bool = False) -> None:
        for box, (x1, y1, x2, y2) in zip(pixels.tolist(), boxes.tolist()):
            corners = [(box[0], box[1], x2 if flipped else x1, y1), (box[2], box[3], x1 if flipped else x2, y2)]
            for x, y, *place in corners:
                assert place_of(frames, x, y) == pytest.approx(place, abs=1.5e-3)

    check(frames, pixels)
    frames, pixels = detect_ava.resize_short_side(frames, pixels, short)
    assert min(frames.shape[-2:]) == short
    check(frames, pixels)
    side, top, left = int(0.6 * short), (frames.shape[-2] - int(0.6 * short)) // 2, (frames.shape[-1] - int(0.6 * short)) // 2
    frames, pixels = detect_ava.crop(frames, pixels, top, left, side, side)
    assert frames.shape[-2:] == (side, side)
    check(frames, pixels)
    frames, pixels = detect_ava.flip(frames, pixels)
    check(frames, pixels, flipped=True)
    assert (pixels[:, :2] < pixels[:, 2:]).all()
    frames = frames[..., :-3]
    padded = detect_ava.pad(frames, (2, 16, 32))
    assert padded.shape == (2, 3, math.ceil(side / 16) * 16, math.ceil((side - 3) / 32) * 32)
    assert torch.equal(padded[..., :side, : side - 3], frames) and not padded[..., side:, :].any() and not padded[..., side - 3 :].any()


def test_boxes_are_cut_off_at_the_window(tmp_path):
    boxes = torch.tensor([[10.0, 10, 30, 40], [0, 0, 12, 12], [70, 5, 90, 80]])
    _, cut = detect_ava.crop(torch.zeros(1, 3, 100, 100), boxes, top=20, left=20, height=40, width=50)
    assert cut.tolist() == [[0, 0, 10, 20], [0, 0, 0, 0], [50, 0, 50, 40]]  # the second and third are lost: no area
    _, none = detect_ava.crop(torch.zeros(1, 3, 100, 100), torch.zeros(0, 4), top=20, left=20, height=40, width=50)
    assert none.shape == (0, 4)  # a frame without persons is legal


def test_jitter_stays_in_its_bounds_and_fills_them():
    boxes = torch.tensor([[100.0, 200.0, 200.0, 400.0]]).repeat(4000, 1)  # 100 wide, 200 high
    jittered = detect_ava.jitter_boxes(boxes, torch.Generator().manual_seed(0))
    low, high = (jittered - boxes).amin(dim=0), (jittered - boxes).amax(dim=0)
    assert low.tolist() == pytest.approx([-20, -20, -10, -10], abs=0.2) and high.tolist() == pytest.approx([10, 10, 20, 20], abs=0.2)
    assert (low >= torch.tensor([-20, -20, -10, -10])).all() and (high <= torch.tensor([10, 10, 20, 20])).all()
    assert torch.corrcoef((jittered - boxes).T).fill_diagonal_(0).abs().max() < 0.06  # each edge on its own


def test_enlarged_boxes():
    boxes = torch.tensor([[100.0, 200.0, 200.0, 400.0]])
    assert detect_ava.enlarge_boxes(boxes).tolist() == [[95, 195, 205, 405]]
    assert detect_ava.enlarge_boxes(boxes[:0]).shape == (0, 4)


# ---- clips by time ----

OPEN_GOP = {"x264-params": "keyint=25:min-keyint=25:bframes=3:open-gop=1:scenecut=0"}
OFFSETS = [4 * i - 32 for i in range(16)]  # of 16 frames, 4 apart, at 30 a second
OFFSETS_AT_25 = [-27, -23, -20, -17, -13, -10, -7, -3, 0, 3, 7, 10, 13, 17, 20, 23]  # the nearest of the frames at 25 a second
LENGTH = 12  # seconds


def times(rate: int, begin: int = 0) -> list[int]:
    return [round(1000 * (begin + i / rate)) for i in range(LENGTH * rate)]


@pytest.fixture(scope="module")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Movies whose frames show their numbers: at 25 and 30 fps, cut to start at second 900 and whole, in several containers."""
    folder = tmp_path_factory.mktemp("movies")
    for rate in (25, 30):
        for suffix in ("mp4", "mkv"):
            write_numbered(folder / f"cut{rate}.{suffix}", LENGTH * rate, options=OPEN_GOP, times=times(rate))
        whole = [0, *times(rate, begin=898)]  # one frame for the first 898 seconds
        write_numbered(folder / f"whole{rate}.mp4", len(whole), options=OPEN_GOP, times=whole)
    write_numbered(folder / "one_key_frame.mp4", LENGTH * 30, options={"g": "1000", "bf": "7"}, times=times(30))
    write_numbered(folder / "all_key_frames.mp4", LENGTH * 30, options={"g": "1"}, times=times(30))
    write_numbered(folder / "late_start.mkv", LENGTH * 30, options=OPEN_GOP, times=times(30, begin=5))
    return folder


def clip_of(path: Path, second: int, **options) -> list[int]:
    clip = support.video.read_clip(path, second, frames=16, stride=4, **options)
    assert clip.dtype == torch.uint8 and clip.shape[:2] == (16, 3)
    return [number_of(frame) for frame in clip]


def test_clip_times():
    assert support.video.clip_times(902, 16, 4) == [902 + Fraction(offset, 30) for offset in OFFSETS]
    assert support.video.clip_times(902, 8, 2, rate=12) == [902 + Fraction(offset, 12) for offset in (-8, -6, -4, -2, 0, 2, 4, 6)]


@pytest.mark.parametrize("name", ["cut30.mp4", "cut30.mkv", "one_key_frame.mp4", "all_key_frames.mp4", "late_start.mkv"])
def test_clips_of_a_cut_movie_at_30_fps(movies, name):
    for second in range(900, 912):  # at both ends the first and the last frame stand in
        assert clip_of(movies / name, second) == [min(max((second - 900) * 30 + offset, 0), LENGTH * 30 - 1) for offset in OFFSETS]


@pytest.mark.parametrize("name", ["cut25.mp4", "cut25.mkv"])
def test_clips_of_a_cut_movie_at_25_fps_show_the_same_times(movies, name):
    for second in range(900, 912):
        assert clip_of(movies / name, second) == [min(max((second - 900) * 25 + offset, 0), LENGTH * 25 - 1) for offset in OFFSETS_AT_25]


@pytest.mark.parametrize(("rate", "offsets"), [(25, OFFSETS_AT_25), (30, OFFSETS)])
def test_clips_of_a_whole_movie(movies, rate, offsets):
    for second in range(900, 910):
        expected = [min(1 + (second - 898) * rate + offset, LENGTH * rate) for offset in offsets]
        assert clip_of(movies / f"whole{rate}.mp4", second, starts_at=0) == expected
    assert clip_of(movies / f"whole{rate}.mp4", 1, starts_at=0) == [0] * 16  # the first frame is shown for 898 seconds
    assert clip_of(movies / f"cut{rate}.mp4", 0, starts_at=0) == [max(offset, 0) for offset in offsets]


def test_a_second_outside_the_movie_is_refused(movies):
    for name, second, starts_at in (("cut30.mp4", 899, 900), ("cut30.mp4", 914, 900), ("cut25.mkv", 1798, 900), ("cut30.mp4", 902, 0)):
        with pytest.raises(BrokenVideo, match=f"{name}.*second {second} lies outside.*is the movie cut or whole"):
            clip_of(movies / name, second, starts_at=starts_at)


def test_broken_movies_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    write_numbered(tmp_path / "old.avi", 40, "mpeg4", {"bf": "2"})
    for name, reason in (("text.mp4", "."), ("none.mp4", "No such file"), ("old.avi", "only mp4 and Matroska")):
        with pytest.raises(BrokenVideo, match=f"{name}.*{reason}"):
            clip_of(tmp_path / name, 900)


def test_clips_from_a_folder_of_frames(tmp_path):
    folder = tmp_path / "movie"
    folder.mkdir()
    for number in range(100):
        frame = torch.from_numpy(numbered_frame(number).to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous()
        data.TF.to_pil_image(frame).save(folder / f"movie_{number + 1:06d}.jpg", quality=95)
    (folder / "notes.txt").touch()
    assert clip_of(folder, 902) == [60 + offset for offset in OFFSETS]
    assert clip_of(folder, 900) == [max(offset, 0) for offset in OFFSETS]
    assert clip_of(folder, 903) == [min(90 + offset, 99) for offset in OFFSETS]
    assert [number_of(frame) for frame in support.video.read_clip(folder, 902, frames=8, stride=2, rate=12)] == [40, 45, 50, 55, 60, 65, 70, 75]
    for second in (899, 904):
        with pytest.raises(BrokenVideo, match="lies outside"):
            clip_of(folder, second)
    (folder / "movie_000057.jpg").unlink()
    with pytest.raises(BrokenVideo, match="movie_000057.jpg"):
        clip_of(folder, 902)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrokenVideo, match="empty_000001.jpg"):
        clip_of(tmp_path / "empty", 902)


def test_list_of_movies(tmp_path):
    for name in ("-5K.mkv", "b.MP4", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "frames").mkdir()
    assert support.ava.list_movies(tmp_path) == {"-5K": tmp_path / "-5K.mkv", "b": tmp_path / "b.MP4", "frames": tmp_path / "frames"}
    with pytest.raises(UserError, match="no folder"):
        support.ava.list_movies(tmp_path / "none")
    with pytest.raises(UserError, match="no movies"):
        support.ava.list_movies(tmp_path / "frames")


# ---- toy videos ----


@pytest.fixture(scope="module")
def toy_ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.render_ava(tmp_path_factory.mktemp("toy_ava") / "videos", {"train": 6, "val": 4})


def test_toy_annotations_are_read_as_ava_itself(toy_ava):
    actions = support.ava.read_actions(toy_ava / "annotations" / "ava_action_list_v2.2.pbtxt")
    assert [action.name for action in actions.values()] == list(toy.ACTIONS)
    movies = support.ava.list_movies(toy_ava / "videos")
    assert len(movies) == 10
    for split in ("train", "val"):
        truth = support.ava.read_ground_truth(toy_ava / "annotations" / f"ava_{split}_v2.2.csv", len(toy.ACTIONS))
        frames = support.ava.key_frames(truth, len(toy.ACTIONS))
        assert all(frame.video in movies and 901 <= frame.second <= 904 for frame in frames)
        assert all(1 <= count <= 2 for frame in frames for count in frame.labels.sum(dim=1).tolist())
        assert all((frame.boxes >= 0).all() and (frame.boxes <= 1).all() and (frame.boxes[:, :2] < frame.boxes[:, 2:]).all() for frame in frames)
        excluded = support.ava.read_exclusions(toy_ava / "annotations" / f"ava_{split}_excluded_timestamps_v2.2.csv")
        assert all(video in movies for video, _ in excluded)
        perfect = support.ava.average_precisions(truth, support.ava.to_rows(frames), actions)
        assert all(math.isnan(value) or value == pytest.approx(1) for value in perfect.values())
        found = support.ava.read_person_boxes(toy_ava / "boxes" / f"ava_{split}_predicted_boxes.csv", 0.8)
        assert 0.5 < sum(len(frame.boxes) for frame in found) / sum(len(frame.boxes) for frame in frames) < 1.3
        clip = support.video.read_clip(movies[frames[0].video], frames[0].second, frames=8, stride=2, rate=toy.RATE)
        assert clip.shape == (8, 3, toy.AVA_HEIGHT, toy.AVA_WIDTH)


def test_toy_videos_are_the_same_each_time_and_an_interrupted_rendering_is_finished(toy_ava, tmp_path):
    again = tmp_path / "videos"
    shutil.copytree(toy_ava, again)
    (again / "annotations" / "ava_action_list_v2.2.pbtxt").unlink()
    (again / "annotations" / "ava_val_v2.2.csv").write_text("cut off")
    (again / "videos" / "val_00002.mp4").unlink()
    toy.render_ava(again, {"train": 6, "val": 4})
    files = [path.relative_to(toy_ava) for path in sorted(toy_ava.rglob("*")) if path.is_file()]
    assert len(files) == 10 + 2 * 3 + 2
    assert all((again / path).read_bytes() == (toy_ava / path).read_bytes() for path in files)
    with pytest.raises(UserError, match="other settings"):
        toy.render_ava(again, {"train": 7, "val": 4})


def test_toy_boxes_follow_the_motions_that_the_labels_say():
    """In frames without a change of motion, a wrap or a cut, the centre of a box goes where its label says."""
    checked = set()
    for seed in range(30):
        _, shapes = toy.render_scene(support.run.sample_generator(0, 0, seed))
        for motions, boxes in shapes:
            for frame in range(4, toy.AVA_FRAMES - 4):
                before, after = boxes[frame - 4], boxes[frame + 4]
                if not before or not after or motions[frame - 4] != motions[frame + 4]:
                    continue
                if min(*before, *after) <= 0 or max(before[2], after[2]) >= toy.AVA_WIDTH or max(before[3], after[3]) >= toy.AVA_HEIGHT:
                    continue
                dx, dy = ((after[i] + after[i + 2] - before[i] - before[i + 2]) / 2 for i in (0, 1))
                if abs(dx) > 40 or abs(dy) > 40:
                    continue
                for name, way in (("left", -dx), ("right", dx), ("up", -dy), ("down", dy)):
                    if any(motion.startswith("moving") and name in motion for motion in motions[frame]):
                        checked.add(name)
                        assert way >= 4  # at least 1 pixel a frame; an outline that turns or grows shifts its box by some
    assert checked == {"left", "right", "up", "down"}
