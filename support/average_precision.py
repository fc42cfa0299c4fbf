"""Frame-mAP at IoU 0.5 (Sec. 4.3, Table 5), equal to the official evaluator's to the digit."""

import argparse
import json
import math
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from support import ava
from support.config import UserError, say


def average_precisions(
    ground_truth: ava.Rows, detections: ava.Rows, actions: Iterable[int], skip_empty: bool = False
) -> dict[int, float]:
    """Return the average precision of each action; NaN without ground truth, 0 without detections.

    Each detection is matched only to the true box that it overlaps most. It is wrong if a detection with a higher score
    was matched to that box before, even where a second box overlaps enough. Detections without area do not count. Those
    in frames without ground truth are wrong, unless `skip_empty`, mmaction2's default, skips these frames. Equal scores
    and equal overlaps are decided by frame and box; in the official evaluator by the order of rows.
    """
    truth: dict[int, dict[ava.Frame, list[ava.Box]]] = {action: {} for action in sorted(actions)}
    for frame, box, action, _ in sorted(ground_truth):
        if action in truth:
            truth[action].setdefault(frame, []).append(box)
    if skip_empty:
        labelled = {frame for boxes in truth.values() for frame in boxes}
        detections = [row for row in detections if row.frame in labelled]
    hits: dict[int, list[bool]] = {action: [] for action in truth}  # of each detection, best first
    matched = set()
    for frame, box, action, _ in sorted(detections, key=lambda row: (-row.score, row.frame, row.box)):
        if action in truth and box[0] < box[2] and box[1] < box[3]:
            overlaps = [(iou(box, true_box), true_box) for true_box in truth[action].get(frame, [])]
            overlap, true_box = max(overlaps, key=itemgetter(0), default=(0.0, box))
            match = frame, action, true_box
            hits[action].append(overlap >= 0.5 and match not in matched)
            if overlap >= 0.5:
                matched.add(match)
    return {action: _average_precision(hits[action], sum(map(len, truth[action].values()))) for action in truth}


def iou(a: ava.Box, b: ava.Box) -> float:
    """Return the intersection over union of two boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    both = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    return both / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both)


def _average_precision(hits: list[bool], positives: int) -> float:
    """Return the area under the curve of precision over recall, for detections (D,) from the best to the worst."""
    hits = torch.tensor(hits, dtype=torch.bool)  # (D,)
    precision = hits.cumsum(0).double() / torch.arange(1, len(hits) + 1)  # (D,)
    precision = precision.flip(0).cummax(0).values.flip(0)  # (D,), made non-increasing
    return float(precision[hits].sum() / positives)  # each hit adds 1 / positives to recall


def mean_percent(precisions: Iterable[float]) -> float | None:
    """Return the mean in percent, without those that are NaN; None if all are."""
    numbers = [precision for precision in precisions if not math.isnan(precision)]
    return 100 * (sum(numbers) / len(numbers)) if numbers else None


def summarize(precisions: dict[int, float], actions: ava.Actions) -> dict[str, Any]:
    """Return mAP, the mean of each group of actions, and AP by action, in percent; None without ground truth."""
    groups: dict[str, list[float]] = {}
    for number, (_, group) in actions.items():
        if group:
            groups.setdefault(group.replace("_", " ").lower(), []).append(precisions[number])
    return {
        "mAP": mean_percent(precisions.values()),
        "groups": {group: mean_percent(values) for group, values in groups.items()},
        "actions": [dict(id=i, name=actions[i][0], AP=mean_percent([value])) for i, value in precisions.items()],
    }


def report(summary: dict[str, Any], path: Path, as_json: bool = False) -> None:
    """Print AP by action, the mean of each group and the mAP, or `as_json` the summary; write it to `path`."""
    lines = [(action["AP"], f"{action['id']:3d} {action['name']}") for action in summary["actions"]]
    lines += [(value, f"mean of {group}") for group, value in summary["groups"].items()]
    lines += [(summary["mAP"], "mAP at IoU 0.5")]
    if as_json:
        print(json.dumps(summary), flush=True)
    else:
        for value, text in lines:
            print("  none" if value is None else f"{value:6.2f}", text, sep="  ", flush=True)
    path.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")


def evaluate(arguments: argparse.Namespace) -> None:
    """Print and write the mAP of a file of detections, whatever made them: `--evaluate`."""
    if not arguments.ground_truth or not arguments.labels or arguments.settings:
        raise UserError("--evaluate needs --ground-truth GT.csv and --labels LIST.pbtxt, and takes no configuration")
    actions = ava.read_actions(arguments.labels)
    known = max(ava.ACTIONS, *actions)
    truth = ava.read_ground_truth(arguments.ground_truth, known)
    rows = ava.read_detections(arguments.evaluate, known)
    excluded = ava.read_exclusions(arguments.exclude) if arguments.exclude else set()
    counted = [[row for row in table if row.frame not in excluded] for table in (truth, rows)]
    summary = summarize(average_precisions(*counted, actions, arguments.skip_frames_without_ground_truth), actions)
    if summary["mAP"] is None:
        raise UserError(f"{arguments.ground_truth} holds no action in {arguments.labels} outside excluded frames")
    note = say if arguments.json else print
    frames, true_frames = {row.frame for row in rows}, {row.frame for row in truth}
    both = f"{len(frames & true_frames):,} of them among the {len(true_frames):,} with ground truth"
    note(f"{len(rows):,} detections in {len(frames):,} frames, {both}")
    out = arguments.out or arguments.evaluate.with_name(f"{arguments.evaluate.stem}_mAP.json")
    report(summary, out, arguments.json)
    note(f"written to {out}")
