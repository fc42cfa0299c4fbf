"""AVA's files and its evaluator: frame-mAP is the official one's to the digit, mistakes are refused with their line."""

import json
import math
import pickle
import random
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import number_of, numbered_frame, run
from torchvision.transforms.v2 import functional as TF

import support.toy_ava
from support import ava
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
        path.write_text(
            "".join(
                f"v,{second:04d},{','.join(map(str, box))},{','.join(map(str, rest))}\n" for second, box, *rest in rows
            )
        )
        return path

    def __call__(
        self, truth: list[tuple], found: list[tuple], actions: tuple[int, ...] = (1,), **options
    ) -> dict[int, float]:
        truth = ava.read_ground_truth(self.write("truth.csv", truth))
        found = ava.read_detections(self.write("found.csv", found))
        return ava.average_precisions(truth, found, actions, **options)


@pytest.fixture
def average_precisions(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_all_found_and_nothing_else_is_1(average_precisions):
    assert average_precisions([(902, LEFT, 1, 7), (902, RIGHT, 1, 8)], [(902, LEFT, 1, 0.3), (902, RIGHT, 1, 0.9)]) == {
        1: 1.0
    }


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
    assert average_precisions(truth, found, skip_empty=True)[1] == 1.0  # 904 has none of action 1
    skipped = average_precisions(truth, found, (1, 2), skip_empty=True)
    assert skipped[1] == pytest.approx(1 / 2)  # 904 has some, of action 2
    assert skipped[2] == 0.0


def test_frames_without_detections_count(average_precisions):
    assert average_precisions([(902, LEFT, 1), (903, LEFT, 1)], [(902, LEFT, 1, 0.9)])[1] == pytest.approx(1 / 2)


def test_actions_without_ground_truth_or_detections_or_in_no_list(average_precisions):
    truth = [(902, LEFT, 1), (902, LEFT, 3), (902, LEFT, 80)]
    found = [(902, LEFT, 1, 0.9), (902, LEFT, 2, 0.9), (902, RIGHT, 79, 0.99)]
    result = average_precisions(truth, found, (1, 2, 3))
    assert result[1] == 1.0 and math.isnan(result[2]) and result[3] == 0.0
    assert ava.mean_percent(result.values()) == 50 and ava.mean_percent([math.nan]) is None


def test_actions_do_not_mix(average_precisions):
    truth, found = [(902, LEFT, 1), (902, LEFT, 2)], [(902, LEFT, 1, 0.9), (902, RIGHT, 2, 0.9)]
    assert average_precisions(truth, found, (1, 2)) == {1: 1.0, 2: 0.0}


def test_detections_without_area_are_dropped_but_ground_truth_without_area_counts(average_precisions):
    nothing, inverted = (0.5, 0.5, 0.5, 0.9), (0.9, 0.0, 0.5, 0.4)
    assert average_precisions(
        [(902, RIGHT, 1)], [(902, nothing, 1, 0.9), (902, inverted, 1, 0.8), (902, RIGHT, 1, 0.7)]
    ) == {1: 1.0}
    assert average_precisions([(902, RIGHT, 1), (902, nothing, 1)], [(902, nothing, 1, 0.9), (902, RIGHT, 1, 0.7)])[
        1
    ] == pytest.approx(1 / 2)


def test_boxes_outside_the_frame_are_not_cut_off(average_precisions):
    outside = (
        -0.4,
        0.0,
        0.4,
        0.4,
    )  # IoU with LEFT 1/2; if cut off at the edge it would be 1, and (-0.5, ...) would match too
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
            boxes = [
                (score, box) for score, kind, *box in rows if kind == action and box[0] < box[2] and box[1] < box[3]
            ]
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
        result[action] = sum(
            (recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)) if recall[i] != recall[i - 1]
        )
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
    """Sorts rows by frame and box: the official result depends on their order where scores or overlaps are equal."""
    video, second, *numbers = row.split(",")
    return video, int(second), *map(float, numbers[:4])


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_official_algorithm_on_random_rows(tmp_path, seed):
    truth, found = random_rows(seed, scores=None)
    for name, rows in (("truth", sorted(truth, key=by_place)), ("found", found)):
        (tmp_path / name).write_text("\n".join(rows))
    actions, excluded = set(range(1, 4)), {("a", 903), ("b", 904), ("c", 917)}
    for skip in (False, True):
        expected = official(
            tmp_path / "truth",
            tmp_path / "found",
            actions,
            {f"{video},{second:04d}" for video, second in excluded},
            skip,
        )
        ground_truth, detections = ava.read_ground_truth(tmp_path / "truth"), ava.read_detections(tmp_path / "found")
        counted = [[row for row in rows if row.frame not in excluded] for rows in (ground_truth, detections)]
        precisions = ava.average_precisions(*counted, actions, skip_empty=skip)
        assert precisions == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert 5 < ava.mean_percent(precisions.values()) < 95


@pytest.mark.parametrize("seed", range(6))
def test_order_of_rows_is_of_no_consequence_even_with_ties(tmp_path, seed):
    results = []
    for order in range(4):
        truth, found = random_rows(seed, scores=[0.2, 0.5, 0.5, 0.9])
        random.Random(order).shuffle(truth)
        random.Random(order).shuffle(found)
        for name, rows in (("truth", truth), ("found", found)):
            (tmp_path / name).write_text("\n".join(rows))
        ground_truth, detections = ava.read_ground_truth(tmp_path / "truth"), ava.read_detections(tmp_path / "found")
        results.append(ava.average_precisions(ground_truth, detections, range(1, 5)))
    assert all(result == results[0] for result in results)
    # ... and it is what the official algorithm says if rows come in the order of frame and box.
    for name, rows in (("truth", truth), ("found", found)):
        (tmp_path / name).write_text("\n".join(sorted(rows, key=by_place)))
    assert results[0] == pytest.approx(
        official(tmp_path / "truth", tmp_path / "found", set(range(1, 5)), set(), False), abs=1e-12
    )


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


def test_command(tmp_path):
    files = Files(tmp_path)
    truth = [(902, LEFT, 1, 4), (902, LEFT, 5, 4), (903, LEFT, 6, 4), (904, LEFT, 9, 0), (905, LEFT, 1, 0)]
    found = [(902, LEFT, 1, 0.9), (903, LEFT, 1, 0.95), (902, RIGHT, 5, 0.3), (903, LEFT, 6, 0.2), (904, LEFT, 6, 0.3)]
    truth, found = files.write("gt.csv", truth), files.write("mine.csv", found)
    (tmp_path / "list.pbtxt").write_text(LIST)
    (tmp_path / "out.csv").write_text("v,0905\n")
    options = ["--ground-truth", truth, "--labels", tmp_path / "list.pbtxt", "--exclude", tmp_path / "out.csv"]
    printed = run("support.ava", found, *options).stdout
    result = json.loads((tmp_path / "mine_mAP.json").read_text())
    assert result["mAP"] == pytest.approx(100 * (1 / 2 + 0 + 1 / 2) / 3)
    groups = dict(person_movement=50, object_manipulation=None, person_interaction=25)
    assert result["groups"] == {group.replace("_", " "): pytest.approx(value) for group, value in groups.items()}
    assert [action["AP"] for action in result["actions"]] == [pytest.approx(50), None, 0, pytest.approx(50)]
    assert printed.startswith("5 detections in 3 frames, 3 of them among the 4 with ground truth\n")
    for line in (" 33.33  mAP at IoU 0.5", " 25.00  mean of person interaction", '  none    2 read "{aloud}"'):
        assert f"{line}\n" in printed
    assert run("detect_ava.py", "--evaluate", found, *options).stdout == printed  # the short way
    for command in (("support.ava", found), ("detect_ava.py", "--evaluate", found)):
        done = run(*command, *options, "--json")
        assert json.loads(done.stdout) == result and "5 detections in 3 frames" in done.stderr
    run("support.ava", found, *options, "--skip-frames-without-ground-truth", "--out", tmp_path / "other.json")
    skipped = json.loads((tmp_path / "other.json").read_text())
    assert skipped["mAP"] == pytest.approx(100 * (1 / 2 + 0 + 1) / 3)  # 904 has only action 9


def test_excluded_frames_count_on_neither_side(tmp_path):
    files = Files(tmp_path)
    truth = files.write("gt.csv", [(902, LEFT, 1), (903, LEFT, 1)])
    found = files.write("mine.csv", [(902, LEFT, 1, 0.5), (903, RIGHT, 1, 0.9), (905, RIGHT, 1, 0.9)])
    (tmp_path / "list.pbtxt").write_text(LIST)
    options = [found, "--ground-truth", truth, "--labels", tmp_path / "list.pbtxt", "--exclude", tmp_path / "x.csv"]
    (tmp_path / "x.csv").write_text("v,0903\nv,905\n")
    assert "100.00  mAP at IoU 0.5" in run("support.ava", *options).stdout
    (tmp_path / "x.csv").write_text("w,0903\n")
    assert " 16.67  mAP at IoU 0.5" in run("support.ava", *options).stdout  # 1/2 of 1/3


def test_command_says_what_is_wrong(tmp_path):
    files = Files(tmp_path)
    found = files.write("mine.csv", [(902, LEFT, 1, 0.9)])
    (tmp_path / "list.pbtxt").write_text(LIST)
    done = run("support.ava", found, ok=False)
    assert done.returncode and "needs --ground-truth GT.csv and --labels LIST.pbtxt" in done.stderr
    truth = files.write("gt.csv", [(902, LEFT, 3)])
    options = ["--ground-truth", truth, "--labels", tmp_path / "list.pbtxt"]
    done = run("support.ava", found, *options, ok=False)
    assert done.returncode and "holds no row of an action in" in done.stderr and len(done.stderr.splitlines()) == 1
    files.write("gt.csv", [(902, LEFT, 1)])
    done = run("support.ava", found, *options, "--out", tmp_path, ok=False)
    assert done.returncode and "Is a directory" in done.stderr and "Traceback" not in done.stderr


def test_a_byte_order_mark_changes_nothing(tmp_path):
    """Excel begins its files with one: the first row of each file counted for nothing."""
    files = Files(tmp_path)
    paths = dict(truth=files.write("gt.csv", [(902, LEFT, 1, 4), (903, LEFT, 1, 4), (904, LEFT, 1, 4)]))
    paths |= dict(found=files.write("mine.csv", [(902, LEFT, 1, 0.9), (903, LEFT, 1, 0.8)]))
    paths |= dict(labels=tmp_path / "list.pbtxt", exclude=tmp_path / "x.csv")
    paths["labels"].write_text('item { name: "sit" id: 1 }')
    paths["exclude"].write_text("v,0904\n")
    for path in paths.values():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    options = ["--ground-truth", paths["truth"], "--labels", paths["labels"], "--exclude", paths["exclude"]]
    assert "100.00  mAP at IoU 0.5" in run("support.ava", paths["found"], *options).stdout
    assert list(ava.read_person_boxes(paths["found"], 0.8)) == [("v", 902), ("v", 903)]


# ---- readers ----


def test_ground_truth_becomes_key_frames_and_persons(tmp_path):
    (tmp_path / "gt.csv").write_text(
        "-bc,0903,0.5,0.1,0.9,0.8,12,1\r\n-bc,902,0.1,0.1,0.3,0.8,80,0\r\n\r\nab,0902,0.2,0.2,0.4,0.4,3,5\r\n"
        "-bc,0903,0.1,0.1,0.3,0.8,11,0\r\n-bc,0903,0.50,0.1,0.9,0.8,79,1\r\n"
    )
    rows = ava.read_ground_truth(tmp_path / "gt.csv")
    frames = ava.key_frames(rows)
    assert list(frames) == [("-bc", 902), ("-bc", 903), ("ab", 902)]
    boxes, labels = ava.to_persons(frames["-bc", 903], 80)
    assert torch.equal(boxes, torch.tensor([[0.1, 0.1, 0.3, 0.8], [0.5, 0.1, 0.9, 0.8]]))
    assert labels.shape == (2, 80) and (labels.nonzero() + torch.tensor([0, 1])).tolist() == [[0, 11], [1, 12], [1, 79]]
    assert labels.unique().tolist() == [0, 1]
    assert [tensor.shape for tensor in ava.to_persons([], 80)] == [(0, 4), (0, 80)]
    ava.write_rows(tmp_path / "again.csv", sorted(rows))
    assert (tmp_path / "again.csv").read_text().splitlines() == [
        "-bc,0902,0.1,0.1,0.3,0.8,80,1",
        "-bc,0903,0.1,0.1,0.3,0.8,11,1",
        "-bc,0903,0.5,0.1,0.9,0.8,12,1",
        "-bc,0903,0.5,0.1,0.9,0.8,79,1",
        "ab,0902,0.2,0.2,0.4,0.4,3,1",
    ]


def test_rows_of_ava_kinetics(tmp_path):
    """Key frames at fractions of a second, and rows without a box: a key frame without persons."""
    (tmp_path / "gt.csv").write_text(
        "k,1.5,0.1,0.1,0.3,0.8,12,0\nk,2.5\nv,0902,0.1,0.1,0.3,0.8,12,0\nk,84.083333,0,0,1,1,3,1\nv,0903,,,,,,\n"
    )
    rows = ava.read_ground_truth(tmp_path / "gt.csv")
    assert list(ava.key_frames(rows)) == [("k", 1.5), ("k", 84.083333), ("v", 902)]
    ava.write_rows(tmp_path / "again.csv", rows)
    written = [line.split(",")[1] for line in (tmp_path / "again.csv").read_text().splitlines()]
    assert written == ["01.5", "0902", "84.083333"]
    found = ava.read_detections(tmp_path / "again.csv")
    assert found == rows
    assert ava.average_precisions(rows, found, (3, 12)) == {3: 1.0, 12: 1.0}
    moved = [row._replace(frame=("k", 1.25)) if row.frame == ("k", 1.5) else row for row in found]
    assert ava.average_precisions(rows, moved, (3, 12)) == {3: 1.0, 12: 0.25}  # wrong, right of two: 1/2 of 1/2
    nobody = [rows[0]._replace(frame=("k", 2.5), score=2.0), *found]
    assert ava.average_precisions(rows, nobody, (12,))[12] == pytest.approx(2 / 3)  # counts where nobody is
    (tmp_path / "x.csv").write_text("k,1.5\nv,902.0\n")
    assert ava.read_exclusions(tmp_path / "x.csv") == {("k", 1.5), ("v", 902)}
    with pytest.raises(UserError, match="line 2: 2 columns"):
        ava.read_detections(tmp_path / "gt.csv")
    for second in ("1.5.2", "-1", "1e3", ".5", "1.", "nan"):
        (tmp_path / "gt.csv").write_text(f"k,{second}\n")
        with pytest.raises(UserError, match="gt.csv, line 1: no video, or a second that is not"):
            ava.read_ground_truth(tmp_path / "gt.csv")


def test_detections_are_worth_the_same_in_memory_and_from_their_file(tmp_path):
    truth, _ = random_rows(0, None)
    (tmp_path / "truth").write_text("\n".join(truth))
    rows = ava.read_ground_truth(tmp_path / "truth")
    scores = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)).tolist()  # float32, as probabilities are
    detections = [
        row._replace(action=1 + i % 4, score=score) for i, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]
    ava.write_rows(tmp_path / "found", detections)
    in_memory = ava.average_precisions(rows, detections, range(1, 5))
    assert in_memory == ava.average_precisions(rows, ava.read_detections(tmp_path / "found"), range(1, 5))
    assert 5 < ava.mean_percent(in_memory.values()) < 95


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
    with pytest.raises(
        UserError, match=rf"gt.csv, line 4: .*{reason}.*; a row is video,second,x1,y1,x2,y2,action,person"
    ):
        ava.read_ground_truth(tmp_path / "gt.csv")


@pytest.mark.parametrize("score", ["high", "inf", "nan"])
def test_malformed_scores_are_refused(tmp_path, score):
    (tmp_path / "found.csv").write_text(f"{GOOD}v,0902,0.1,0.1,0.3,0.8,12,{score}\n")
    with pytest.raises(UserError, match=r"found.csv, line 2: .*; a row is video,second,x1,y1,x2,y2,action,score"):
        ava.read_detections(tmp_path / "found.csv")


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\x00\xff\xfe binary"])
def test_files_without_rows_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "gt.csv").write_bytes(content)
    with pytest.raises(UserError, match="gt.csv"):
        ava.read_ground_truth(tmp_path / "gt.csv")


def test_exclusions(tmp_path):
    (tmp_path / "x.csv").write_text("v,0902\n\nw,903\n")
    assert ava.read_exclusions(tmp_path / "x.csv") == {("v", 902), ("w", 903)}
    (tmp_path / "x.csv").write_text("v,0902\nv,0902,1\n")
    with pytest.raises(
        UserError,
        match="x.csv, line 2: too many values to unpack .expected 2.*; a row of excluded frames is video,second",
    ):
        ava.read_exclusions(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("v,0902\nv,soon\n")
    with pytest.raises(UserError, match="x.csv, line 2: no video, or a second that is not a whole number"):
        ava.read_exclusions(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("")
    assert ava.read_exclusions(tmp_path / "x.csv") == set()


def test_lists_of_actions(tmp_path):
    path = tmp_path / "list.pbtxt"
    path.write_text(LIST)
    actions = ava.read_actions(path)
    assert list(actions) == [1, 2, 5, 6] and actions[2] == ('read "{aloud}"', "OBJECT_MANIPULATION")
    path.write_text('item {\n  name: "sit"\n  id: 11\n}\nitem {\n  name: "stand"\n  id: 12\n}\n')
    assert ava.read_actions(path) == {11: ("sit", ""), 12: ("stand", "")}
    assert ava.summarize({11: 0.5, 12: math.nan}, ava.read_actions(path)) == {
        "mAP": 50,
        "groups": {},
        "actions": [{"id": 11, "name": "sit", "AP": 50}, {"id": 12, "name": "stand", "AP": None}],
    }
    # The list of the 60 evaluated actions has no types, but its ids are AVA's: 14 poses, 49 with objects, 17 persons.
    names = {14: "walk", 15: "answer phone", 63: "write", 64: "fight/hit (a person)"}
    path.write_text("".join(f'item {{\n  name: "{names.get(i, i)}"\n  id: {i}\n}}\n' for i in range(1, 81)))
    groups = [group for _, group in ava.read_actions(path).values()]
    assert [groups.count(group) for group in ava.GROUPS] == [14, 49, 17] and groups == sorted(
        groups, key=list(ava.GROUPS).index
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("sit\nstand\n", 1),
        ("item { id: 1 }\n", 1),
        ('\nitem { name: "sit" }\n', 2),
        ('item { name: "a" id: 1 }\nitem { name: "b" id: 1 }', 2),
        ('item { name: "a" id: 0 }', 1),
        ('item { name: "a" id: 1 }\n}\n', 2),
        ('item { name: "a" id: 1 }\nnoise item { name: "b" id: 2 }', 2),
    ],
)
def test_malformed_lists_of_actions_are_refused_with_file_and_line(tmp_path, text, line):
    (tmp_path / "list.pbtxt").write_text(text)
    with pytest.raises(UserError, match=f"list.pbtxt, line {line}"):
        ava.read_actions(tmp_path / "list.pbtxt")
    (tmp_path / "list.pbtxt").write_text("# a comment\n\n  # another\n" + text)
    with pytest.raises(UserError, match=f"list.pbtxt, line {line + 3}"):
        ava.read_actions(tmp_path / "list.pbtxt")


def test_person_boxes_of_slowfast(tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(
        "v,0903,0.1,0.1,0.3,0.8,,0.95\nv,0903,0.5,0.1,0.7,0.8,,0.6\nv,0902,0.5,0.1,0.7,0.8,12,0.8\n"
        "v,0902,0.5,0.1,0.7,0.8,14,0.8\nw,0902,0,0,1,1,,0.7\n"
    )
    frames = ava.read_person_boxes(path, 0.8)
    scores = {frame: [(row.action, row.score) for row in rows] for frame, rows in frames.items()}
    assert scores == {("v", 902): [(0, 0.8), (0, 0.8)], ("v", 903): [(0, 0.95)]}  # actions are not needed
    assert [len(ava.to_persons(rows, 80)[0]) for rows in frames.values()] == [1, 1]
    with pytest.raises(UserError, match="boxes.csv: none of 5 boxes has a score of 0.99 or more; the highest is 0.950"):
        ava.read_person_boxes(path, 0.99)


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
    frames = ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", sizes)
    assert frames == {
        ("2nd", 902): [(("2nd", 902), (0.1, 0.1, 0.3, 0.6), 0, 0.9)],
        ("first-One", 1798): [(("first-One", 1798), (0.25, 0, 1, 1), 0, 0.85)],
    }
    with pytest.raises(UserError, match="give AVA's list of file names"):
        ava.read_person_boxes(path, 0.8)
    for change, reason in (
        ({"image_id": 20902}, "names.txt lists 2"),
        ({"image_id": None}, "int"),
        ({"bbox": [1, 2, 3]}, "not enough values"),
        ({"score": math.nan}, "not finite"),
        ({"bbox": [900, 10, 20, 20]}, "of another size"),
        ({"bbox": 7}, "not iterable"),
        ({"score": "high"}, "could not convert"),
        ({"image_id": math.inf}, "infinity"),
        ({"bbox": [10, 10, -5, 5]}, "negative size"),
    ):
        path.write_text(json.dumps([entries[0], entries[1] | change]))
        with pytest.raises(UserError, match=f"boxes.json, entry 2: .*{reason}"):
            ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", sizes)
    path.write_text(json.dumps(entries))
    frames = ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", {"first-One": (400, 200)})
    assert list(frames) == [("first-One", 1798)]  # the other movie is missing
    with pytest.raises(UserError, match="a movie for none of its 3 boxes"):
        ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", {})
    for content in ("{}", "[]", "not json", "[1]", "[null]", "7", '[{"image_id": 902}, 0]'):
        path.write_text(content)
        with pytest.raises(UserError, match="boxes.json"):
            ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", sizes)
    for content in (b"not json", b"[\xff]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no rows can be read from .*boxes.json"):
            ava.read_person_boxes(path, 0.8, tmp_path / "names.txt", sizes)


def test_a_pickle_is_refused_with_a_command_that_converts_it(tmp_path):
    path = tmp_path / "ava_dense_proposals.pkl"
    path.write_bytes(
        pickle.dumps(
            {"v,0902": [[0.1, 0.1, 0.3, 0.8, 0.95], [0.5, 0.1, 0.7, 0.8, 0.81]], "w,1798": [[0, 0, 1, 1, 0.9]]}
        )
    )
    with pytest.raises(UserError, match="is a pickle, which could run any code") as refusal:
        ava.read_person_boxes(path, 0.8)
    command = str(refusal.value).partition("convert it with python")[2]
    subprocess.run(f"{sys.executable}{command}", shell=True, check=True, cwd=tmp_path)
    frames = ava.read_person_boxes(tmp_path / "boxes.csv", 0.8)
    scores = {frame: [row.score for row in rows] for frame, rows in frames.items()}
    assert scores == {("v", 902): [0.95, 0.81], ("w", 1798): [0.9]}


def test_list_of_movies(tmp_path):
    for name in ("-5K.mkv", "b.MP4", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "frames").mkdir()
    assert ava.list_movies(tmp_path) == {
        "-5K": tmp_path / "-5K.mkv",
        "b": tmp_path / "b.MP4",
        "frames": tmp_path / "frames",
    }
    with pytest.raises(UserError, match="no folder"):
        ava.list_movies(tmp_path / "none")
    with pytest.raises(UserError, match="no movies"):
        ava.list_movies(tmp_path / "frames")


def test_a_folder_of_frames_is_read_like_a_video(tmp_path):
    folder = tmp_path / "movie"
    folder.mkdir()
    for number in range(20):
        frame = torch.from_numpy(numbered_frame(number).to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous()
        TF.to_pil_image(frame).save(folder / f"movie_{number + 1:06d}.jpg", quality=95)
    (folder / "notes.txt").touch()
    for begin, end, first, last in ((0, 1, 0, 19), (Fraction(1, 4), Fraction(1, 2), 7, 15), (2, 3, 19, 19)):
        with ava.open_movie(folder, begin, end) as movie:
            assert movie.times == [Fraction(number, 30) for number in range(first, last + 1)]
            frames = movie.frames([0, len(movie.times) - 1])
            assert frames.dtype == torch.uint8 and [number_of(frame) for frame in frames] == [first, last]
    (folder / "movie_000007.jpg").write_text("not a picture")
    (folder / "movie_000008.jpg").unlink()
    with ava.open_movie(folder, 0, 1) as movie:
        for number in (7, 8):
            with pytest.raises(BrokenVideo, match=f"movie_{number:06d}.jpg"):
                movie.frames([number - 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrokenVideo, match="empty_000001.jpg"):
        ava.open_movie(tmp_path / "empty", 0, 1)


def test_sizes_of_movies(toy_ava, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("not a video")
    movies = ava.list_movies(toy_ava / "videos") | {"text": tmp_path / "text.mp4"}
    assert ava.movie_sizes(movies) == dict.fromkeys(movies.keys() - {"text"}, (96, 72))
    assert "its boxes are left out" in (said := capsys.readouterr().err) and "text.mp4" in said


# ---- toy videos ----


@pytest.fixture(scope="module")
def toy_ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.toy_ava.render(tmp_path_factory.mktemp("toy_ava") / "videos", {"train": 6, "val": 4})


def test_toy_annotations_are_read_as_ava_itself(toy_ava):
    annotations, count = toy_ava / "annotations", len(support.toy_ava.ACTIONS)
    actions = ava.read_actions(annotations / "ava_action_list_v2.2.pbtxt")
    assert [name for name, _ in actions.values()] == list(support.toy_ava.ACTIONS)
    movies = ava.list_movies(toy_ava / "videos")
    assert len(movies) == 10
    for split in ("train", "val"):
        truth = ava.read_ground_truth(annotations / f"ava_{split}_v2.2.csv", count)
        frames = ava.key_frames(truth)
        assert all(video in movies and 901 <= second <= 904 for video, second in frames)
        boxes, labels = map(torch.cat, zip(*(ava.to_persons(rows, count) for rows in frames.values()), strict=True))
        assert set(labels.sum(dim=1).tolist()) <= {1, 2}
        assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, :2] < boxes[:, 2:]).all()
        excluded = ava.read_exclusions(annotations / f"ava_{split}_excluded_timestamps_v2.2.csv")
        assert all(video in movies for video, _ in excluded)
        perfect = ava.average_precisions(truth, truth, actions)
        assert all(math.isnan(value) or value == pytest.approx(1) for value in perfect.values())
        found = ava.read_person_boxes(toy_ava / "boxes" / f"ava_{split}_predicted_boxes.csv", 0.8)
        assert 0.5 < sum(len(rows) for rows in found.values()) / len(boxes) < 1.3
