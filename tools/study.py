"""The paper's claims on the toy videos: runs the experiments of configs/study/toy.yaml and reports them.

    python -m support.study --jobs 2 data.workers=0             # 95 minutes on two cores; the same command resumes
    python -m support.study --seeds 0 --only base scratch       # some experiments, with what they start from
    python -m support.study --report docs/study.md --results docs/toy_study/results.csv     # what is published

Every run is a command of pretrain.py, finetune.py or probe.py. Once finished it stands in results.csv with its result.
A key=value goes to all runs: without loader processes two runs at a time keep two cores busy with 5 % less work.
"""

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import yaml

from support import toy
from support.config import UserError, load_config, parse, pick
from support.pictures import new_figure
from support.processes import launch
from support.run import say

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "configs" / "study" / "toy.yaml"
COLUMNS = ("experiment", "seed", "stage", "top1", "loss", "curve", "seconds", "torch", "commit", "command")
PRETRAINING = (
    "baselines/moco_v3",
    "pretrain",
)  # stages that others start from; an experiment without either has the last


# One command: a stage of an experiment with one seed. results.csv knows it by the first three.
Run = namedtuple("Run", "experiment seed stage folder settings")


def read_study(path: Path) -> dict:
    """A study's YAML. Raises UserError if it is none."""
    try:
        study = yaml.safe_load(path.read_text("utf-8-sig"))
        missing = {"folder", "root", "subsets", "seeds", "settings", "experiments", "about", "tables"} - study.keys()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"no study can be read from {path}: {' '.join(str(error).split())}") from None
    if missing:
        raise UserError(f"{path} is no study: it lacks {', '.join(sorted(missing))}; {STUDY} has all")
    return study


def plan(study: dict, seed: int, only: list[str], settings: list[str]) -> list[tuple[Run | None, Run]]:
    """The experiments' pre-trainings, None from scratch, and what follows. Raises UserError for a bad setting."""

    def make(name: str, stage: str, *words: str) -> Run:
        folder = Path(study["folder"], f"{name}_seed{seed}", stage)
        words = f"data.root={study['root']}", *words, *study["settings"][stage].split()
        words += *study["experiments"][name].get(stage, "").split(), *settings
        words += f"run.seed={seed}", f"run.folder={folder}"
        load_config(ROOT / "configs" / Path(stage).parts[0] / "toy.yaml", list(words))
        return Run(name, str(seed), stage, folder, words)

    runs = []
    for name in only or study["experiments"]:
        experiment = pick(study["experiments"], name, "--only")
        init = experiment.get("init", name)
        source = None
        if init != "scratch":
            source = make(
                init, *[stage for stage in PRETRAINING if stage in study["experiments"][init]][:1] or PRETRAINING[1:]
            )
        weights = f"init={source.folder / 'checkpoint.pt' if source else 'scratch'}"
        runs.append((source, make(name, "probe" if "probe" in experiment else "finetune", weights)))
    return runs


def write_subset(root: str, file: Path, videos: int) -> None:
    """List the first training videos of each class, equally many: a smaller subset is part of every larger one."""
    classes = [sorted(folder.iterdir()) for folder in sorted(Path(root, "train").iterdir())]
    chosen = [path.relative_to(root) for paths in classes for path in paths[: videos // len(classes)]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{path.as_posix()}\n" for path in chosen), "utf-8")


def run_all(runs: list[tuple[Run | None, Run]], file: Path, jobs: int) -> list[Run]:
    """Do what is not in results.csv yet, `jobs` runs at a time. Returns those that failed."""
    known, failed = read_results(file), []
    runs = [(source, last) for source, last in runs if last[:3] not in known]
    sources = dict.fromkeys(source for source, _ in runs if source)
    missing = [run for run in sources if run[:3] not in known or not (run.folder / "checkpoint.pt").exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPool(jobs) as pool, open(file, "a", newline="", encoding="utf-8", buffering=1) as opened:
        table = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        if not opened.tell():
            table.writeheader()
        for follows in (False, True):
            ready = [last for source, last in runs if source not in failed] if follows else missing
            for run, rows in pool.imap_unordered(execute, ready):
                say(f"{run.folder}: {'finished' if rows else 'failed, see output.txt there'}")
                failed += [] if rows else [run]
                table.writerows(row for row in rows if run[:3] not in known)
    return failed


def execute(run: Run) -> tuple[Run, list[dict]]:
    """Run the command, its output going to output.txt in its folder. Returns its rows of results, none if it failed."""
    started, resumed = time.perf_counter(), (run.folder / "checkpoint.pt").exists()
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "output.txt", "a") as output:
        command = [sys.executable, str(ROOT / f"{run.stage}.py"), *run.settings]
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
            return run, []
    seconds = "" if resumed else round(time.perf_counter() - started)  # the time before is not known
    row = dict(zip(COLUMNS, run[:2], strict=False), seconds=seconds, torch=torch.__version__, commit=commit)
    row["command"] = shlex.join(["python", f"{run.stage}.py", *run.settings])
    return run, [row | result for result in read_log(run)]


def read_log(run: Run) -> list[dict]:
    """Stage and result of a finished run: the loss at the end of pre-training, or top-1, of which a probe has two.

    Of fine-tuning also the curve of the training loss: "50:2.07 100:1.98", its means over 50 steps (5 lines).
    """
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text("utf-8").splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if run.stage in PRETRAINING:
        return [dict(stage=run.stage, loss=f"{statistics.mean(loss for _, loss in losses[-8:]):.4f}")]
    parts = [losses[start : start + 5] for start in range(0, len(losses), 5)]
    curve = " ".join(f"{part[-1][0]}:{statistics.mean(loss for _, loss in part):.3f}" for part in parts)
    top1 = {line.get("encoder"): f"{line['test_top1']:.2f}" for line in lines if "test_top1" in line}
    curves = {None: dict(curve=curve)}
    return [
        dict(stage=run.stage + " of random weights" * (name == "random"), top1=top1[name]) | curves.get(name, {})
        for name in top1
    ]


def read_results(file: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of results.csv by experiment, seed and stage."""
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8-sig") as opened:
        return {tuple(row[column] for column in COLUMNS[:3]): row for row in csv.DictReader(opened)}


def values(results: dict, experiment: str, stage: str, column: str = "top1") -> dict[str, float]:
    """A column's values by seed."""
    found = {seed: row[column] for (name, seed, of), row in results.items() if (name, of) == (experiment, stage)}
    return {seed: float(found[seed]) for seed in sorted(found, key=int)}


def halfway(results: dict, experiment: str) -> dict[str, float]:
    """By seed, the step of fine-tuning at which the training loss is halfway between chance and the best of all runs.

    It is read off a run's curve, linear between its points; infinite if the run does not get there. While each video
    has been seen once, the training loss is that of new videos.
    """
    curves = {key: row["curve"] for key, row in results.items() if row["curve"]}
    curves = {key: [tuple(map(float, point.split(":"))) for point in curve.split()] for key, curve in curves.items()}
    chance = math.log(len(toy.CLASSES))
    goal = (chance + min(loss for curve in curves.values() for _, loss in curve)) / 2
    steps = {}
    for (name, seed, _), curve in curves.items():
        if name == experiment:
            pairs = zip([(0.0, chance), *curve], curve, strict=False)
            crossings = (a + (b - a) * (high - goal) / (high - low) for (a, high), (b, low) in pairs if low <= goal)
            steps[seed] = next(crossings, math.inf)
    return steps


def compare(results: dict, claim: dict) -> tuple[str, bool]:
    """A claim of the paper as a row of a table, and whether the results agree with it.

    They do if `higher` is ahead of `lower` with every seed that both have; or, where the paper's difference is `small`,
    if it is not behind with every seed and the mean difference is below the range of either side's seeds. Each side is
    an experiment or, as a list, two to subtract.
    """

    def side(key: str) -> dict[str, float]:
        names = claim[key] if isinstance(claim[key], list) else [claim[key]]
        top1 = [values(results, name, claim.get(f"{key}_stage", claim.get("stage", "finetune"))) for name in names]
        return {
            seed: top1[0][seed] - sum(x[seed] for x in top1[1:]) for seed in sorted(set.intersection(*map(set, top1)))
        }

    high, low = side("higher"), side("lower")
    pairs = [(high[seed], low[seed]) for seed in high if seed in low]
    if not pairs:
        return "", False
    differences = [a - b for a, b in pairs]
    mean, ahead, behind = statistics.mean(differences), min(differences) > 0, max(differences) < 0
    below_spread = abs(mean) < max(max(of_seeds) - min(of_seeds) for of_seeds in zip(*pairs, strict=True))
    verdict = "ahead with every seed" if ahead else "behind with every seed" if behind else "no order"
    verdict += ", below the spread" if below_spread else ""
    seeds = ", ".join(f"{difference:+.1f}" for difference in differences)
    row = f"| {claim['says']} | {claim['paper']} | **{mean:+.1f}** ({seeds}) | {verdict} |"
    return row, ahead or bool(claim.get("small")) and below_spread and not behind


def report(study: dict, results: dict, text: Path, picture: Path) -> None:
    """Write tables of means and seeds next to the paper's figures, and a chart. Raises UserError without matplotlib."""
    link, agreed, parts = Path(os.path.relpath(picture, text.parent)).as_posix(), {}, []
    figure = new_figure(10, 1 + 1.3 * len(study["tables"]))
    panels = figure.subplots(-(-len(study["tables"]) // 2), 2, squeeze=False).flat
    for table, axes in zip(study["tables"], panels, strict=False):
        head, lines = "| case | overrides | pre-training loss | top-1 | steps to halfway | paper |", []
        for row in table["rows"]:
            experiment, stage = study["experiments"][row["experiment"]], row.get("stage", "finetune")
            if top1 := values(results, row["experiment"], stage):
                source = experiment.get("init", row["experiment"]) if "random" not in stage else ""
                losses = values(results, source, "pretrain", "loss")
                given = ", ".join(f"{key}: `{words}`" for key, words in experiment.items() if words) or "–"
                steps = sorted(halfway(results, row["experiment"]).values()) if stage == "finetune" else []
                steps = [f"{step:.0f}" if math.isfinite(step) else "never" for step in steps]
                steps = f"**{steps[(len(steps) - 1) // 2]}** ({', '.join(steps)})" if steps else "–"
                loss = f"{statistics.mean(losses.values()):.3f}" if losses else "–"
                mean, seeds = statistics.mean(top1.values()), ", ".join(f"{value:.1f}" for value in top1.values())
                cells = row["case"], given, loss, f"**{mean:.1f}** ({seeds})", steps, str(row.get("paper", "–"))
                lines.append(f"| {' | '.join(cells)} |")
                axes.barh(row["case"], mean, color="lightsteelblue")
                axes.plot([*top1.values()], [row["case"]] * len(top1), "o", color="black", markersize=3)
        axes.set(title=table["title"], xlim=(0, 100), xlabel="top-1, %")
        axes.invert_yaxis()
        if lines:
            claims = [compare(results, claim) for claim in table["claims"]]
            agreed[table["title"]] = all(agrees for _, agrees in claims)
            said = "\n| which is ahead of which | by, in the paper | by, here: mean (seeds) | |", "|" + "---|" * 4
            said += tuple(line for line, _ in claims if line)
            parts.append(
                "\n".join([f"## {table['title']}\n", head, "|" + "---|" * 6, *lines, *said, "", table["why"], ""])
            )
    named = ", ".join(title.split(":")[0] for title in agreed if not agreed[title]) or "none"
    count = f"**{sum(agreed.values())} of {len(agreed)} agree with the paper in every row; these do not: {named}.**\n"
    commits, versions = (sorted({row[column] for row in results.values()}) for column in ("commit", "torch"))
    parts.append(f"{len(results)} results of commit {', '.join(commits)} with torch {', '.join(versions)}.\n")
    text.write_text("\n".join([study["about"], count, f"![means as bars, seeds as dots]({link})\n", *parts]), "utf-8")
    figure.savefig(picture, dpi=100)
    say(f"{text}, {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="experiments to run; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the study's file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--results", type=Path, help="default: results.csv in the study's folder")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="only write tables and a chart of the results")
    arguments = parse(parser)
    files = [word for word in arguments.settings if word.endswith(".yaml") and "=" not in word]
    study = read_study(Path(files[0]) if files else STUDY)
    file = arguments.results or Path(study["folder"], "results.csv")
    if arguments.jobs < 1:
        raise UserError("--jobs has to be at least 1")
    if not arguments.report:
        settings = [word for word in arguments.settings if word not in files]
        plans = [plan(study, seed, arguments.only, settings) for seed in arguments.seeds or study["seeds"]]
        if Path(study["root"]) == toy.FOLDER:
            toy.render(toy.FOLDER)
        for subset, videos in study["subsets"].items():
            write_subset(study["root"], Path(subset), videos)
        threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        os.environ |= {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
        failed = sum((run_all(runs, file, arguments.jobs) for runs in plans), [])
        if failed:
            raise UserError(f"{len(failed)} runs failed: the same command tries again, then what starts from them")
    report(study, read_results(file), arguments.report or file.with_name("study.md"), file.with_name("study.png"))


if __name__ == "__main__":
    launch(main)
