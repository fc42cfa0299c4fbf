"""Report a study's results: a chart of all cases, a table of verdicts, and a chart of longer pre-training."""

import csv
import os
import statistics
from pathlib import Path
from typing import Any

from support.config import say
from support.pictures import new_figure

PROBE = "probe of pre-trained weights"
VERDICTS = """\
| table or figure | which is ahead of which | by, in the paper | by, here: mean (seeds) | verdict |
|---|---|---|---|---|"""


def read_results(file: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of results.csv by experiment, seed and stage."""
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8-sig") as opened:
        return {(row["experiment"], row["seed"], row["stage"]): row for row in csv.DictReader(opened)}


def values(results: dict, experiment: str, stage: str, column: str = "top1") -> dict[str, float]:
    """Return a column's values by seed, of the seeds that have one."""
    rows = [row for row in results.values() if (row["experiment"], row["stage"]) == (experiment, stage)]
    return {row["seed"]: float(row[column]) for row in sorted(rows, key=lambda row: int(row["seed"])) if row[column]}


def compare(results: dict, claim: dict) -> tuple[str, bool]:
    """Return what a claim of the paper is here, mean and seeds, and whether the results agree with it.

    They do if `higher` is ahead of `lower` with every seed that both have. Where the paper's difference is `small`,
    they also do if it is not behind with every seed and the mean difference is below the range of either side's seeds.
    """
    high, low = _side(results, claim, "higher"), _side(results, claim, "lower")
    seeds = [seed for seed in high if seed in low]
    if not seeds:
        return "", False
    differences = [high[seed] - low[seed] for seed in seeds]
    mean = statistics.mean(differences)
    agrees = min(differences) > 0
    if claim.get("small") and max(differences) >= 0:
        ranges = [max(side[seed] for seed in seeds) - min(side[seed] for seed in seeds) for side in (high, low)]
        agrees = agrees or abs(mean) < max(ranges)
    listed = ", ".join(f"{difference:+.1f}" for difference in differences)
    return f"**{mean:+.1f}** ({listed})", agrees


def _side(results: dict, claim: dict, side: str) -> dict[str, float]:
    """Return top-1 by seed of an experiment, or of the first less the second of two experiments."""
    stage = claim.get(f"{side}_stage", claim.get("stage", "finetune"))
    if isinstance(claim[side], str):
        return values(results, claim[side], stage)
    first, second = (values(results, name, stage) for name in claim[side])
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def write_report(study: dict, results: dict, page: Path, folder: Path) -> None:
    """Write the page as Markdown and its charts into the folder."""
    verdicts, agreement = [], {}
    for table in study["tables"]:
        name = table["title"].split(":")[0]
        for claim in table["claims"]:
            here, agrees = compare(results, claim)
            if here:
                agreement[name] = agreement.get(name, True) and agrees
                verdict = "agrees" if agrees else "**does not**"
                verdicts.append(f"| {name} | {claim['says']} | {claim['paper']} | {here} | {verdict} |")
    others = ", ".join(name for name, agrees in agreement.items() if not agrees) or "none"
    count = f"{sum(agreement.values())} of {len(agreement)}"
    commits = ", ".join(sorted({row["commit"] for row in results.values()}))
    versions = ", ".join(sorted({row["torch"] for row in results.values()}))
    link = Path(os.path.relpath(folder, page.parent)).as_posix()
    lines = [
        study["about"],
        f"**{count} tables and figures agree with the paper in every row; these do not: {others}.**\n",
        f"![top-1 of all cases: means as bars, seeds as dots]({link}/study.png)\n",
        *[VERDICTS, *verdicts, ""],
        f"![top-1 and error over clips seen: means as lines, seeds as dots]({link}/study_length.png)\n",
        f"{len(results)} results of commit {commits} with torch {versions}.\n",
    ]
    page.write_text("\n".join(lines), "utf-8")
    draw_cases(study["tables"], results, folder / "study.png")
    draw_length(study["length"], results, folder / "study_length.png")
    say(f"{page}, {folder / 'study.png'}, {folder / 'study_length.png'}")


def draw_cases(tables: list[dict], results: dict, path: Path) -> None:
    """Draw top-1 of all cases, a panel for each table: means as bars, seeds as dots."""
    heights = [1 + max(len(table["rows"]) for table in tables[row : row + 2]) for row in range(0, len(tables), 2)]
    figure = new_figure(10, 0.6 * len(heights) + 0.25 * sum(heights))
    panels = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights).flat
    for axes in panels[len(tables) :]:
        axes.set_axis_off()
    for table, axes in zip(tables, panels, strict=False):
        axes.set(title=table["title"], xlim=(0, 100), xlabel="top-1, %")
        axes.invert_yaxis()
        for row in table["rows"]:
            top1 = [*values(results, row["experiment"], row.get("stage", "finetune")).values()]
            if top1:
                axes.barh(row["case"], statistics.mean(top1), color="lightsteelblue")
                axes.plot(top1, [row["case"]] * len(top1), "o", color="black", markersize=3)
    figure.savefig(path, dpi=100)


def draw_length(points: list[dict], results: dict, path: Path) -> None:
    """Draw top-1 and the error of masked cubes over the clips seen in pre-training."""
    figure = new_figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    _draw_line(left, points, results, PROBE, "top1", "linear probe", "tab:blue")
    _draw_line(right, points, results, "pretrain", "error", "reconstruction", "tab:blue")
    _draw_line(right, points, results, "pretrain", "copy_error", "best copy", "gray")
    left.set(ylabel="top-1, %", ylim=(0, 100))
    right.set(ylabel="squared error of masked cubes")
    right.set_ylim(bottom=0)
    clips = [point["clips"] for point in points]
    few = min(filter(None, clips), default=1) / 4
    for axes in (left, right):
        # logarithmic, with a place for no clips at all
        axes.set_xscale("symlog", linthresh=few, linscale=0.2)
        axes.set_xlim(-few / 2, 1.5 * max(clips))
        axes.set_xticks(clips, [f"{count:,}" for count in clips], rotation=30)
        axes.minorticks_off()
        axes.set_xlabel("clips seen in pre-training")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)


def _draw_line(axes: Any, points: list[dict], results: dict, stage: str, column: str, label: str, color: str) -> None:
    clips, means = [], []
    for point in points:
        seeds = [*values(results, point["experiment"], stage, column).values()]
        if seeds:
            axes.plot([point["clips"]] * len(seeds), seeds, "o", color=color, markersize=3)
            clips.append(point["clips"])
            means.append(statistics.mean(seeds))
    axes.plot(clips, means, color=color, label=label)
