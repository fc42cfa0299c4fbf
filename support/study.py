"""The paper's claims on the toy videos: runs the experiments of configs/study/toy.yaml and reports them beside the paper.

    python -m support.study --jobs 2 data.workers=0                    # three hours on two cores; the same again goes on
    python -m support.study --seeds 0 --only base scratch              # some experiments, with what they start from
    python -m support.study --report                                   # tables and picture of what is there so far
    python -m support.study --report --results assets/toy_study/results.csv --readme README.md      # what is published

Every run is a command of the project's own scripts and stands, with it, in results.csv once it is finished. A key=value
given here goes to all runs: without loader processes two runs at a time keep two cores busy with 5 % less work.
"""

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]

import finetune
import pretrain
import probe
import support.config
import support.datasets
import support.run
from support import toy

STUDY = ROOT / "configs" / "study" / "toy.yaml"
STAGES = {"pretrain": pretrain, "finetune": finetune, "probe": probe}
COLUMNS = ("experiment", "seed", "stage", "top1", "loss", "seconds", "torch", "commit", "command")
LOSS_LINES = 8  # lines of a pre-training's log, of ten steps each, over which its final loss is averaged
MARKS = "<!-- toy study -->\n", "<!-- end of toy study -->\n"  # around the report in README.md


# ---- which runs there are ----


@dataclass(frozen=True)
class Run:
    """One command: a stage of an experiment with one seed. source: the pre-training it starts from, if any."""

    experiment: str
    seed: int
    stage: str
    folder: Path
    settings: tuple[str, ...]
    source: "Run | None" = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What its rows are known by in the table of results."""
        return self.experiment, str(self.seed), self.stage

    @property
    def command(self) -> list[str]:
        return ["python", f"{self.stage}.py", *self.settings]


def read_study(path: Path) -> dict:
    """A study's YAML. UserError if it is none."""
    try:
        study = yaml.safe_load(path.read_text())
        missing = {"folder", "root", "seeds", "settings", "experiments", "tables"} - study.keys()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise support.config.UserError(f"no study can be read from {path}: {' '.join(str(error).split())}") from None
    if missing:
        raise support.config.UserError(f"{path} is no study: it lacks {', '.join(sorted(missing))}; {STUDY} has all")
    return study


def plan(study: dict, seeds: list[int], only: list[str], settings: list[str]) -> list[Run]:
    """All runs, each behind the one that it starts from, none twice; the first seed of every experiment comes first."""
    runs: dict[Run, None] = {}
    for seed in seeds:
        for name in only or study["experiments"]:
            experiment = support.config.pick(study["experiments"], name, "--only")
            init = experiment.get("init", name)
            source = None if init == "scratch" else make_run(study, init, seed, "pretrain", None, settings)
            last = make_run(study, name, seed, "probe" if "probe" in experiment else "finetune", source, settings)
            runs |= dict.fromkeys([source, last] if source else [last])
    return list(runs)


def make_run(study: dict, name: str, seed: int, stage: str, source: Run | None, settings: list[str]) -> Run:
    """The run of a stage of an experiment. UserError if one of its settings is not valid."""
    experiment, folder = study["experiments"][name], Path(study["folder"], f"{name}_seed{seed}", stage)
    train = str(subset_file(study, experiment["videos"])) if stage == "pretrain" and "videos" in experiment else "train"
    words = [f"data.root={study['root']}", f"data.train={train}", "data.val=val"]
    if stage != "pretrain":
        words += [f"init={source.folder / 'checkpoint.pt' if source else 'scratch'}", "data.classes=classes.txt"]
    words += [*study["settings"].get(stage, "").split(), *experiment.get(stage, "").split(), *settings]
    words += [f"run.seed={seed}", f"run.folder={folder}"]
    support.config.load_config(STAGES[stage].DEFAULT, words)
    return Run(name, seed, stage, folder, tuple(words), source)


def subset_file(study: dict, videos: int) -> Path:
    return Path(study["folder"], f"videos_{videos}.txt")


def write_subset(study: dict, videos: int) -> None:
    """List the first videos of each class, equally many: a smaller subset is part of every larger one."""
    by_class: dict[str, list[Path]] = {}
    for entry in support.datasets.list_entries(study["root"], "train"):
        by_class.setdefault(entry.label, []).append(entry.path.relative_to(study["root"]))
    chosen = [path for of_class in by_class.values() for path in of_class[: videos // len(by_class)]]
    file = subset_file(study, videos)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{path}\n" for path in chosen))


# ---- running them ----


def read_results(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def add_results(file: Path, rows: list[dict]) -> None:
    """Append rows to the table of results, but for those that are there: a run made again because others need its weights."""
    known = {(row["experiment"], row["seed"], row["stage"]) for row in read_results(file)}
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(row for row in rows if (row["experiment"], str(row["seed"]), row["stage"]) not in known)


def unfinished(runs: list[Run], file: Path) -> list[Run]:
    """Those runs that have no row yet, or whose weights such a run needs and are not there."""
    known = {(row["experiment"], row["seed"], row["stage"]) for row in read_results(file)}
    wanted = {run.source for run in runs if run.key not in known and run.source and not (run.source.folder / "checkpoint.pt").exists()}
    return [run for run in runs if run.key not in known or run in wanted]


def execute(run: Run, threads: int) -> list[dict]:
    """Run the command, what it prints going to output.txt in its folder, and return its rows of results."""
    begun, resumed = time.perf_counter(), (run.folder / "checkpoint.pt").exists()
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "output.txt", "a") as output:
        command = [sys.executable, ROOT / f"{run.stage}.py", *run.settings]
        subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)
    row = dict(experiment=run.experiment, seed=run.seed, torch=torch.__version__, commit=commit, command=shlex.join(run.command))
    if not resumed:  # otherwise the time before is not known
        row["seconds"] = round(time.perf_counter() - begun)
    return [row | result for result in read_log(run)]


def read_log(run: Run) -> list[dict]:
    """Stage and result of a finished run: the loss at the end of pre-training, or top-1; a probe has two of them."""
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    if run.stage == "pretrain":
        return [dict(stage=run.stage, loss=f"{statistics.mean(line['loss'] for line in lines[-LOSS_LINES:]):.4f}")]
    found = {line.get("encoder"): line["test_top1"] for line in lines if "test_top1" in line}
    return [dict(stage=run.stage + (" of random weights" if encoder == "random" else ""), top1=f"{top1:.2f}") for encoder, top1 in found.items()]


def run_all(runs: list[Run], file: Path, jobs: int) -> None:
    """Do what is unfinished, `jobs` runs at a time, each with its share of the cores. UserError at the end if any failed."""
    waiting, running, failed = unfinished(runs, file), dict[Future, Run](), []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(waiting), unit="run") as bar:
        while True:
            ready = [run for run in waiting if run.source not in waiting + list(running.values()) + failed]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                running[pool.submit(execute, run, max(1, (os.cpu_count() or 1) // jobs))] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if future.exception():
                    failed.append(run)
                    tqdm.write(f"failed, see {run.folder / 'output.txt'}: {future.exception()}", file=sys.stderr)
                else:
                    add_results(file, future.result())
                bar.update()
    if failed:
        raise support.config.UserError(f"{len(failed)} runs failed and {len(waiting)} could not start; the same command tries again")


# ---- tables and picture ----


def values(rows: list[dict], experiment: str, stage: str, column: str) -> list[float]:
    """A column's values, one of each seed."""
    return [float(row[column]) for row in rows if (row["experiment"], row["stage"]) == (experiment, stage)]


def top1_of(rows: list[dict], row: dict) -> list[float]:
    """Top-1, one of each seed, of the experiment that a table's row names."""
    return values(rows, row["experiment"], row.get("stage", "finetune"), "top1")


def overrides(experiment: dict) -> str:
    """In Markdown, what is given to the scripts, the toy's own recipes being the rest."""
    words = [f"`{stage}.py {experiment[stage]}`" for stage in STAGES if experiment.get(stage)]
    if "videos" in experiment:
        words.insert(0, f"pre-trained on {experiment['videos']:,} videos")
    if experiment.get("init") == "scratch":
        words.insert(0, "`init=scratch`")
    return ", ".join(words) or "–"


def report(study: dict, rows: list[dict]) -> str:
    """The tables in Markdown: mean and each seed beside the paper's figures. Experiments without result are left out."""
    parts = []
    for table in study["tables"]:
        lines = []
        for row in table["rows"]:
            if found := top1_of(rows, row):
                experiment = study["experiments"][row["experiment"]]
                begun_from = "" if "random" in row.get("stage", "") else experiment.get("init", row["experiment"])
                loss = values(rows, begun_from, "pretrain", "loss")
                result = f"**{statistics.mean(found):.1f}** ({', '.join(f'{top1:.1f}' for top1 in found)})"
                lines.append(f"| {row['case']} | {overrides(experiment)} | {f'{statistics.mean(loss):.3f}' if loss else '–'} | {result} | {row.get('paper', '–')} |\n")
        if lines:
            head = f"| {table['title']} | overrides | pre-training loss | top-1: mean (seeds in order) | paper: {table['paper']} |\n|---|---|---|---|---|\n"
            parts.append(head + "".join(lines) + (f"\n{table['why']}\n" if table["why"] else ""))
    if rows:
        versions, commits = (", ".join(sorted({row[column] for row in rows})) for column in ("torch", "commit"))
        seconds = {row["command"]: float(row["seconds"] or 0) for row in rows}  # a probe's two rows are one command
        hours = sum(seconds.values()) / 3600
        parts.append(f"{len(rows)} results of commit {commits} with torch {versions}; the runs' own times sum up to {hours:.1f} hours.\n")
    return "\n".join(parts)


COLOURS = "steelblue", "orange"
PANEL, LEFT, BOTTOM, TOP = (440, 250), 150, 40, 30  # pixels of one table's panel and of its margins


def draw(study: dict, rows: list[dict]) -> Image.Image:
    """One panel for each table: curves where it has an axis, otherwise bars; thin black lines are the range over the seeds."""
    sheet = Image.new("RGB", (2 * PANEL[0], PANEL[1] * ((len(study["tables"]) + 1) // 2)), "white")
    for number, table in enumerate(study["tables"]):
        panel = Image.new("RGB", PANEL, "white")
        ImageDraw.Draw(panel).text((8, 6), table["title"], "black", ImageFont.load_default(13))
        found = [(row, top1_of(rows, row)) for row in table["rows"]]
        (draw_curves if "axis" in table else draw_bars)(ImageDraw.Draw(panel), table, [(row, top1) for row, top1 in found if top1])
        sheet.paste(panel, (number % 2 * PANEL[0], number // 2 * PANEL[1]))
    return sheet


def draw_bars(canvas: ImageDraw.ImageDraw, table: dict, found: list[tuple[dict, list[float]]]) -> None:
    """Horizontal bars of top-1 from 0 to 100 %, a case a line."""
    font, unit = ImageFont.load_default(11), (PANEL[0] - LEFT - 50) / 100
    for place, (row, top1) in enumerate(found):
        y, mean = TOP + 12 + place * 32, statistics.mean(top1)
        canvas.text((8, y + 3), row["case"].split(" (")[0], "black", font)
        canvas.rectangle((LEFT, y, LEFT + unit * mean, y + 20), COLOURS[0])
        canvas.line((LEFT + unit * min(top1), y + 10, LEFT + unit * max(top1), y + 10), "black")
        canvas.text((LEFT + unit * max(top1) + 6, y + 3), f"{mean:.1f}", "black", font)


def draw_curves(canvas: ImageDraw.ImageDraw, table: dict, found: list[tuple[dict, list[float]]]) -> None:
    """Top-1 from 0 to 100 % over the places of the table's axis, evenly spaced, a curve for each name in `lines`."""
    font, height = ImageFont.load_default(11), PANEL[1] - BOTTOM - TOP
    places = sorted({row["at"] for row in table["rows"]})
    step = (PANEL[0] - 130) / (len(places) - 1)
    for percent in (0, 25, 50, 75, 100):
        y = TOP + height * (1 - percent / 100)
        canvas.line((40, y, PANEL[0] - 80, y), "lightgrey")
        canvas.text((34, y), f"{percent} %", "black", font, anchor="rm")
    for number, at in enumerate(places):
        canvas.text((45 + number * step, PANEL[1] - BOTTOM + 6), f"{at:,}", "black", font, anchor="ma")
    canvas.text((PANEL[0] / 2 - 20, PANEL[1] - 16), table["axis"], "black", font, anchor="ma")
    names = dict.fromkeys(name for row in table["rows"] for name in row["lines"])
    for number, (colour, name) in enumerate(zip(COLOURS, names)):
        canvas.text((PANEL[0] - 76, TOP + 16 * number), name, colour, font)
        points = []
        for row, top1 in sorted(found, key=lambda pair: pair[0]["at"]):
            if name in row["lines"]:
                x = 45 + places.index(row["at"]) * step
                low, mean, high = (TOP + height * (1 - value / 100) for value in (min(top1), statistics.mean(top1), max(top1)))
                canvas.line((x, low, x, high), "black")
                canvas.ellipse((x - 3, mean - 3, x + 3, mean + 3), colour)
                points.append((x, mean))
        canvas.line(points, colour, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="experiments to run; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the study's file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--results", type=Path, help="table of results; default: results.csv in the study's folder")
    parser.add_argument("--report", action="store_true", help="run nothing: print the tables and draw the picture beside the results")
    parser.add_argument("--readme", type=Path, help="with --report: put the tables between the marks in this file")
    arguments = support.config.parse(parser)
    files = [word for word in arguments.settings if word.endswith(".yaml") and "=" not in word]
    study = read_study(Path(files[0]) if files else STUDY)
    if arguments.jobs < 1:
        raise support.config.UserError("--jobs has to be at least 1")
    if arguments.readme and not (arguments.readme.is_file() and all(mark in arguments.readme.read_text() for mark in MARKS)):
        raise support.config.UserError(f"{arguments.readme} has no lines {' and '.join(mark.strip() for mark in MARKS)} to put the tables between")
    file = arguments.results or Path(study["folder"], "results.csv")
    if not arguments.report:
        settings = [word for word in arguments.settings if word not in files]
        runs = plan(study, arguments.seeds or study["seeds"], arguments.only, settings)
        if Path(study["root"]) == toy.FOLDER:
            toy.render(toy.FOLDER)
        for experiment in study["experiments"].values():
            if "videos" in experiment:
                write_subset(study, experiment["videos"])
        run_all(runs, file, arguments.jobs)
    rows = read_results(file)
    tables = report(study, rows)
    print(tables)
    draw(study, rows).save(file.with_name("study.png"))
    if arguments.readme:
        before, rest = arguments.readme.read_text().split(MARKS[0])
        _, after = rest.split(MARKS[1])
        arguments.readme.write_text(before + MARKS[0] + tables + MARKS[1] + after)


if __name__ == "__main__":
    support.run.launch(main)
