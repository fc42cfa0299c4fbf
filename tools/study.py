"""Test the paper's claims on the toy videos: run the experiments of configs/study/toy.yaml and report their results.

    python -m tools.study --jobs 2 data.workers=0             # hours on two cores; the same command resumes
    python -m tools.study --seeds 0 --only base scratch       # some experiments, with what they start from
    python -m tools.study --report docs/study.md --results docs/toy_study/results.csv     # what is published

Every job is a command of one stage; results.csv records those that are finished. A key=value goes to all jobs. Without
loader processes, two jobs at a time keep two cores busy with 5 % less work.
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
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from support import toy
from support.config import UserError, load_config, parse, pick, say
from support.processes import launch
from tools.study_report import read_results, write_report

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "configs" / "study" / "toy.yaml"
COLUMNS = "experiment seed stage top1 loss error copy_error seconds torch commit command".split()
KEYS = {"folder", "root", "subsets", "seeds", "settings", "experiments", "about", "tables", "length"}


class Job(NamedTuple):
    """One command: a stage of an experiment with one seed."""

    experiment: str
    seed: str
    stage: str
    folder: Path
    settings: tuple[str, ...]


def read_study(path: Path) -> dict:
    """Read a study's YAML. Raises UserError if it is none."""
    try:
        study = yaml.safe_load(path.read_text("utf-8-sig"))
        missing = KEYS - study.keys()
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"no study can be read from {path}: {' '.join(str(error).split())}") from None
    if missing:
        raise UserError(f"{path} is no study: it lacks {', '.join(sorted(missing))}; {STUDY} has all")
    return study


def make_job(study: dict, experiment: str, stage: str, seed: int, settings: list[str]) -> Job:
    """Return the job of an experiment's stage. Raises UserError for a setting that the stage does not have."""
    folder = Path(study["folder"], f"{experiment}_seed{seed}", stage)
    overrides = study["experiments"][experiment].get(stage, "")
    words = [f"data.root={study['root']}", *study["settings"][stage].split(), *overrides.split(), *settings]
    words += [f"run.seed={seed}", f"run.folder={folder}"]
    load_config(ROOT / "configs" / Path(stage).parts[0] / "toy.yaml", words)
    return Job(experiment, str(seed), stage, folder, tuple(words))


def plan(study: dict, seed: int, only: list[str], settings: list[str]) -> list[tuple[Job | None, Job]]:
    """Return the jobs of fine-tuning and probing, each with the pre-training that it starts from, None from scratch."""
    jobs = []
    for name in only or study["experiments"]:
        experiment = pick(study["experiments"], name, "--only")
        init = experiment.get("init", name)
        source, weights = None, "scratch"
        if init != "scratch":
            stage = "baselines/moco_v3" if "baselines/moco_v3" in study["experiments"][init] else "pretrain"
            source = make_job(study, init, stage, seed, settings)
            weights = source.folder / "checkpoint.pt"
        for stage in ("finetune", "probe"):
            if stage in experiment:
                jobs.append((source, make_job(study, name, stage, seed, [f"init={weights}", *settings])))
    return jobs


def write_subset(root: str, file: Path, videos: int) -> None:
    """List the first training videos of each class, equally many: a smaller subset is part of every larger one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    classes = sorted(Path(root, "train").iterdir())
    with open(file, "w", encoding="utf-8") as opened:
        for folder in classes:
            for path in sorted(folder.iterdir())[: videos // len(classes)]:
                opened.write(f"{path.relative_to(root).as_posix()}\n")


def run_missing(jobs: list[tuple[Job | None, Job]], file: Path, processes: int) -> list[Job]:
    """Run the jobs that results.csv does not have, `processes` at a time, and append their results.

    Jobs start in their order, but those that start from a pre-training are next when it has finished. Return the jobs
    that failed.
    """
    # a probe has several rows: probe of pre-trained weights, probe of random weights
    known = {(experiment, seed, stage.split()[0]) for experiment, seed, stage in read_results(file)}
    missing = [(source, job) for source, job in jobs if job[:3] not in known]
    starts = dict.fromkeys(source or job for source, job in missing)
    starts = [job for job in starts if job[:3] not in known or not (job.folder / "checkpoint.pt").exists()]
    ready = [job for source, job in missing if source and source not in starts] + starts
    running, failed = set(), []
    file.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(processes) as pool, open(file, "a", newline="", encoding="utf-8", buffering=1) as opened:
        table = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        if not opened.tell():
            table.writeheader()
        while ready or running:
            while ready and len(running) < processes:
                running.add(pool.submit(run_job, ready.pop(0)))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for job, rows in (future.result() for future in finished):
                say(f"{job.folder}: {'finished' if rows else 'failed, see output.txt there'}")
                if not rows:
                    failed.append(job)
                    continue
                if job[:3] not in known:
                    table.writerows(rows)
                ready = [following for source, following in missing if source == job] + ready
    return failed


def run_job(job: Job) -> tuple[Job, list[dict]]:
    """Run a job, with its output in output.txt. Return it with its rows of results, none if it failed."""
    start, resumes = time.perf_counter(), (job.folder / "checkpoint.pt").exists()
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "output.txt", "a") as output:
        command = [sys.executable, str(ROOT / f"{job.stage}.py"), *job.settings]
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
            return job, []
    row = dict(experiment=job.experiment, seed=job.seed, torch=torch.__version__, commit=commit)
    row["seconds"] = "" if resumes else round(time.perf_counter() - start)  # the time before is not known
    row["command"] = shlex.join(["python", f"{job.stage}.py", *job.settings])
    return job, [row | result for result in read_log(job)]


def read_log(job: Job) -> list[dict]:
    """Return a finished job's results: top-1, of which a probe has several, or loss and errors of pre-training."""
    lines = [json.loads(line) for line in (job.folder / "log.jsonl").read_text("utf-8").splitlines()]
    top1 = {line.get("encoder"): f"{line['test_top1']:.2f}" for line in lines if "test_top1" in line}
    if job.stage == "probe":
        return [dict(stage=f"probe of {encoder} weights", top1=top1[encoder]) for encoder in top1]
    if job.stage == "finetune":
        return [dict(stage=job.stage, top1=top1[None])]
    losses = [line["loss"] for line in lines if "loss" in line]
    result = dict(stage=job.stage, loss=f"{statistics.mean(losses[-8:]):.4f}")
    if "reconstruction_error" in lines[-1]:
        result["error"] = f"{lines[-1]['reconstruction_error']:.5f}"
        result["copy_error"] = f"{lines[-1]['copy_error']:.5f}"
    return [result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="experiments to run; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the study's file")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time; each has its fraction of the cores")
    parser.add_argument("--results", type=Path, help="default: results.csv in the study's folder")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="only write the page and its charts")
    arguments = parse(parser)
    files = [word for word in arguments.settings if word.endswith(".yaml") and "=" not in word]
    settings = [word for word in arguments.settings if word not in files]
    study = read_study(Path(files[0]) if files else STUDY)
    file = arguments.results or Path(study["folder"], "results.csv")
    if arguments.jobs < 1:
        raise UserError("--jobs has to be at least 1")
    if not arguments.report:
        run_study(study, arguments.seeds or study["seeds"], arguments.only, settings, file, arguments.jobs)
    write_report(study, read_results(file), arguments.report or file.with_name("study.md"), file.parent)


def run_study(study: dict, seeds: list[int], only: list[str], settings: list[str], file: Path, processes: int) -> None:
    jobs = []
    for seed in seeds:  # all of them before anything is rendered
        jobs += plan(study, seed, only, settings)
    if Path(study["root"]) == toy.FOLDER:
        toy.render(toy.FOLDER)
    for subset, videos in study["subsets"].items():
        write_subset(study["root"], Path(subset), videos)
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"}
    if failed := run_missing(jobs, file, processes):
        raise UserError(f"{len(failed)} jobs failed: the same command tries again, then what starts from them")


if __name__ == "__main__":
    launch(main)
