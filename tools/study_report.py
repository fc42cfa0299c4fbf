"""Report a study's results: tables of means and seeds next to the paper's figures, and a chart."""

import csv
import math
import os
import statistics
from pathlib import Path

from support import toy
from support.config import say
from support.pictures import new_figure

CASES = ["| case | overrides | pre-training loss | top-1 | steps to halfway | paper |", "|---|---|---|---|---|---|"]
CLAIMS = ["\n| which is ahead of which | by, in the paper | by, here: mean (seeds) | |", "|---|---|---|---|"]


def read_results(file: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of results.csv by experiment, seed and stage."""
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8-sig") as opened:
        return {(row["experiment"], row["seed"], row["stage"]): row for row in csv.DictReader(opened)}


def values(results: dict, experiment: str, stage: str, column: str = "top1") -> dict[str, float]:
    """Return a column's values by seed."""
    rows = [row for row in results.values() if (row["experiment"], row["stage"]) == (experiment, stage)]
    return {row["seed"]: float(row[column]) for row in sorted(rows, key=lambda row: int(row["seed"]))}


def steps_to_halfway(results: dict, experiment: str) -> list[float]:
    """Return each seed's step of fine-tuning at which the training loss is halfway from chance to the best of all runs.

    A curve is linear between its points. The step is infinite if a run does not get there. While each video has been
    seen once, the training loss is that of new videos.
    """
    chance = math.log(len(toy.CLASSES))
    curves = {}
    for key, row in results.items():
        if row["curve"]:
            curves[key] = [tuple(map(float, point.split(":"))) for point in row["curve"].split()]
    goal = (chance + min(loss for curve in curves.values() for _, loss in curve)) / 2
    return sorted(_reach(goal, [(0.0, chance), *curve]) for key, curve in curves.items() if key[0] == experiment)


def _reach(goal: float, curve: list[tuple[float, float]]) -> float:
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if low <= goal:
            return before + (after - before) * (high - goal) / (high - low)
    return math.inf


def compare(results: dict, claim: dict) -> tuple[str, bool]:
    """Return a claim of the paper as a row of a table, and whether the results agree with it.

    They do if `higher` is ahead of `lower` with every seed that both have. Where the paper's difference is `small`,
    they also do if it is not behind with every seed and the mean difference is below the range of either side's seeds.
    """
    high, low = _side(results, claim, "higher"), _side(results, claim, "lower")
    seeds = [seed for seed in high if seed in low]
    if not seeds:
        return "", False
    differences = [high[seed] - low[seed] for seed in seeds]
    mean = statistics.mean(differences)
    verdict = "no order"
    if min(differences) > 0:
        verdict = "ahead with every seed"
    if max(differences) < 0:
        verdict = "behind with every seed"
    agrees = verdict.startswith("ahead")
    ranges = [max(side[seed] for seed in seeds) - min(side[seed] for seed in seeds) for side in (high, low)]
    if abs(mean) < max(ranges):
        agrees = agrees or (claim.get("small", False) and not verdict.startswith("behind"))
        verdict += ", below the spread"
    listed = ", ".join(f"{difference:+.1f}" for difference in differences)
    return f"| {claim['says']} | {claim['paper']} | **{mean:+.1f}** ({listed}) | {verdict} |", agrees


def _side(results: dict, claim: dict, side: str) -> dict[str, float]:
    """Return top-1 by seed of an experiment, or of the first less the second of two experiments."""
    stage = claim.get(f"{side}_stage", claim.get("stage", "finetune"))
    if isinstance(claim[side], str):
        return values(results, claim[side], stage)
    first, second = (values(results, name, stage) for name in claim[side])
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def write_report(study: dict, results: dict, page: Path, picture: Path) -> None:
    """Write the tables as Markdown and the chart."""
    figure = new_figure(10, 1 + 1.3 * len(study["tables"]))
    panels = figure.subplots(-(-len(study["tables"]) // 2), 2, squeeze=False).flat
    agreement, sections = {}, []
    for table, axes in zip(study["tables"], panels, strict=False):
        axes.set(title=table["title"], xlim=(0, 100), xlabel="top-1, %")
        axes.invert_yaxis()
        rows = []
        for row in table["rows"]:
            top1 = list(values(results, row["experiment"], row.get("stage", "finetune")).values())
            if not top1:
                continue
            rows.append(_row(study, results, row, top1))
            # the mean as a bar, seeds as dots
            axes.barh(row["case"], statistics.mean(top1), color="lightsteelblue")
            axes.plot(top1, [row["case"]] * len(top1), "o", color="black", markersize=3)
        if rows:
            claims = [compare(results, claim) for claim in table["claims"]]
            agreement[table["title"]] = all(agrees for _, agrees in claims)
            sections += [f"## {table['title']}\n", *CASES, *rows]
            sections += [*CLAIMS, *(line for line, _ in claims if line), f"\n{table['why']}\n"]
    others = ", ".join(title.split(":")[0] for title, agrees in agreement.items() if not agrees) or "none"
    count = f"{sum(agreement.values())} of {len(agreement)}"
    commits = ", ".join(sorted({row["commit"] for row in results.values()}))
    versions = ", ".join(sorted({row["torch"] for row in results.values()}))
    link = Path(os.path.relpath(picture, page.parent)).as_posix()
    lines = [study["about"], f"**{count} agree with the paper in every row; these do not: {others}.**\n"]
    lines += [f"![means as bars, seeds as dots]({link})\n", *sections]
    lines += [f"{len(results)} results of commit {commits} with torch {versions}.\n"]
    page.write_text("\n".join(lines), "utf-8")
    figure.savefig(picture, dpi=100)
    say(f"{page}, {picture}")


def _row(study: dict, results: dict, row: dict, top1: list[float]) -> str:
    """Return a case as a row of a table: overrides, loss, top-1 and steps as mean or median and all seeds."""
    experiment, stage = study["experiments"][row["experiment"]], row.get("stage", "finetune")
    overrides = ", ".join(f"{key}: `{words}`" for key, words in experiment.items() if words) or "–"
    losses = values(results, experiment.get("init", row["experiment"]), "pretrain", "loss")
    loss, steps = "–", "–"
    if losses and "random" not in stage:
        loss = f"{statistics.mean(losses.values()):.3f}"
    seeds = [f"{step:.0f}" if step < math.inf else "never" for step in steps_to_halfway(results, row["experiment"])]
    if seeds and stage == "finetune":
        steps = f"**{seeds[(len(seeds) - 1) // 2]}** ({', '.join(seeds)})"
    accuracy = f"**{statistics.mean(top1):.1f}** ({', '.join(f'{value:.1f}' for value in top1)})"
    return f"| {row['case']} | {overrides} | {loss} | {accuracy} | {steps} | {row.get('paper', '–')} |"
