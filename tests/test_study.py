"""The toy study: its configuration is valid, jobs are run once, the report is right, and so is the published page."""

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run, table

import pretrain
from support import datasets
from support.config import load_config
from tools import study, study_report
from tools.study import COLUMNS, Job

PUBLISHED = study_report.read_results(ROOT / "docs" / "toy_study" / "results.csv")
STUDY = study.read_study(study.STUDY)


def configuration(job: Job):
    return load_config(ROOT / "configs" / Path(job.stage).parts[0] / "toy.yaml", list(job.settings))


def test_jobs_are_valid_differ_and_start_from_their_pre_training():
    jobs = set()
    for source, job in study.plan(STUDY, 1, [], []):
        init = STUDY["experiments"][job.experiment].get("init", job.experiment)
        stage = "baselines/moco_v3" if init.startswith("moco") else "pretrain"
        assert configuration(job).init == (str(source.folder / "checkpoint.pt") if source else "scratch")
        assert source[:3] == (init, "1", stage) if source else init == "scratch"
        jobs |= {job, source} - {None}
    assert len(jobs) == len({job.folder for job in jobs}) == len({(job.stage, job.settings[:-1]) for job in jobs})
    for config in map(configuration, jobs):
        assert config.run.seed == 1
        if hasattr(config, "mask"):
            pretrain.build(config)  # the model, the objective and the mask are possible


def test_numbers_that_depend_on_the_recipe():
    """Steps, clips and stride of the variants follow those of configs/pretrain/toy.yaml."""
    configs = {job.experiment: configuration(job) for job, _ in study.plan(STUDY, 0, [], []) if job}
    base, whole = configs["base"], configs["toy"]
    assert whole.optim.steps == whole.optim.epochs * 4000 / whole.optim.batch_size
    assert configs["videos_1000_steps"].optim.steps == base.optim.steps == 4 * configs["videos_1000_epochs"].optim.steps
    assert configs["target_half_stride"].data.stride * 2 == base.data.stride
    for point in STUDY["length"]:
        if point["clips"]:
            optim = configs[point["experiment"]].optim
            assert optim.steps * optim.batch_size == point["clips"] and optim.steps == 10 * optim.warmup_steps


def test_subsets_are_balanced_and_nested(toy_videos, tmp_path):
    for count in (8, 16, 24):
        study.write_subset(str(toy_videos), tmp_path / "new" / f"{count}.txt", count)
        entries = datasets.list_entries(str(toy_videos), str(tmp_path / "new" / f"{count}.txt"))
        names = {Path(entry.path).name for entry in entries}
        # the first of each class, as those that fine-tuning takes with data.per_class: numbers follow the classes
        assert names == {f"{number:05d}.mp4" for number in range(count)}


def test_a_study_resumes_where_it_stopped_and_a_failure_stops_only_what_needs_it(monkeypatch, tmp_path):
    """With `run_job` replaced: which jobs are started, in which order, and what stands in the table afterwards."""
    file, started, broken = tmp_path / "new" / "results.csv", [], {("toy", "0", "pretrain")}

    def run_job(job: Job) -> tuple[Job, list[dict]]:
        assert "init=scratch" in job.settings or job.stage == "pretrain" or Path(configuration(job).init).exists()
        started.append(job[:3])
        if job[:3] in broken:
            return job, []
        job.folder.mkdir(parents=True)
        (job.folder / "checkpoint.pt").touch()
        return job, [dict(zip(study.COLUMNS, job[:3], strict=False))]

    def run_all() -> list[tuple]:
        started.clear()
        return [job[:3] for job in study.run_missing(plan, file, processes=2)]

    monkeypatch.setattr(study, "run_job", run_job)
    plan = study.plan(STUDY | {"folder": str(tmp_path)}, 0, ["base", "scratch", "labels_4000"], [])
    keys = {job[:3] for jobs in plan for job in jobs if job}
    assert run_all() == [("toy", "0", "pretrain")]
    assert set(started) == keys - {("labels_4000", "0", "finetune")} and len(table(file)) == len(keys) - 2
    broken.clear()
    assert not run_all() and started == [("toy", "0", "pretrain"), ("labels_4000", "0", "finetune")]
    assert sorted(tuple(row.values())[:3] for row in table(file)) == sorted(keys)  # each once
    # a probe is known by its rows
    text = file.read_text().replace(",probe,", ",probe of pre-trained weights,")
    file.write_text(text)
    assert not run_all() and not started
    # weights that are gone are made again if a job needs them, without a second row
    file.write_text("".join(line for line in text.splitlines(keepends=True) if ",probe of" not in line))
    for folder in ("base_seed0/pretrain", "base_seed0/probe"):
        (tmp_path / folder / "checkpoint.pt").unlink()
        (tmp_path / folder).rmdir()
    assert not run_all() and started == [("base", "0", "pretrain"), ("base", "0", "probe")]
    assert len(table(file)) == len(keys)


def test_a_tiny_study_from_the_command_to_the_page(toy_videos, tmp_path, monkeypatch):
    """Pre-training on eight of 24 videos, fine-tuning on all of them, three steps each, and a job that fails."""
    folder, few = tmp_path / "runs", str(tmp_path / "few.txt")
    claims = [dict(says="few, few", higher="few", lower="few", paper="0", small=True)]
    tables = [dict(title="Tiny: eight videos", rows=[dict(case="8 videos", experiment="few")], claims=claims)]
    settings = {"pretrain": "data.val=val run.pictures=0", "finetune": "data.train=train data.val=val run.log_every=1"}
    settings["finetune"] += " data.classes=classes.txt"
    experiments = {
        "few": {"pretrain": f"data.train={few}", "finetune": ""},
        "broken": {"init": "scratch", "finetune": "data.val=none"},
    }
    tiny = dict(root=str(toy_videos), folder=str(folder), seeds=[3, 4], subsets={few: 8}, about="# Tiny\n")
    tiny |= dict(settings=settings, experiments=experiments, tables=tables, length=[dict(experiment="few", clips=24)])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    command = ["tools.study", tmp_path / "tiny.yaml", "optim.steps=3", "optim.batch_size=8", "data.workers=0"]
    for name in ("OMP_NUM_THREADS", "TQDM_MININTERVAL"):  # restored after the study has set them
        monkeypatch.setenv(name, "1")
    done = run(*command, "--seeds", "3", ok=False)
    assert done.returncode == 1 and f"{folder / 'broken_seed3/finetune'}: failed, see output.txt there" in done.stderr
    assert "1 jobs failed: the same command tries again" in done.stderr
    first, second = table(folder / "results.csv")
    assert tuple(first.values())[:4] == ("few", "3", "pretrain", "")
    assert tuple(second.values())[:3] == ("few", "3", "finetune") and second["loss"] == ""
    assert 0 < float(first["loss"]) < 5 and 0 <= float(second["top1"]) <= 100
    assert first["command"].startswith("python pretrain.py ") and f"data.train={few}" in first["command"]
    assert all(row["torch"] and row["commit"] and float(row["seconds"]) >= 0 for row in (first, second))
    assert "8 videos" in (folder / "few_seed3/pretrain/output.txt").read_text()
    run(*command, "--report", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Tiny\n") and "](runs/study.png)" in text and "](runs/study_length.png)" in text
    assert "| Tiny | few, few | 0 | **+0.0** (+0.0) | **does not** |" in text
    assert (folder / "study.png").exists() and (folder / "study_length.png").exists()


def test_results_from_the_logs_of_the_stages(tmp_path):
    """Pre-training: the mean of the last eight losses, and errors. A probe: each encoder's last test."""
    losses = [dict(step=step, loss=loss) for step, loss in enumerate([9.0] * 3 + [1.0, 2.0] * 4)]
    errors = dict(step=10, reconstruction_error=0.0123456, copy_error=0.2, copy="time")
    tuned = [dict(step=70, loss=1.0), dict(step=70, val_top1=9.0), dict(step=70, test_top1=50.0)]
    tests = (("pre-trained", 1.0), ("pre-trained", 14.25), ("random", 13.0))
    probed = [dict(step=3, encoder=name, test_top1=top1) for name, top1 in tests]
    both = [(f"probe of {name} weights", top1) for name, top1 in (("pre-trained", "14.25"), ("random", "13.00"))]
    pretrained = dict(stage="pretrain", loss="1.5000")
    for stage, lines, results in (
        ("pretrain", losses, [pretrained]),
        ("pretrain", [*losses, errors], [pretrained | dict(error="0.01235", copy_error="0.20000")]),
        ("finetune", tuned, [dict(stage="finetune", top1="50.00")]),
        ("probe", probed, [dict(stage=name, top1=top1) for name, top1 in both]),
    ):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert study.read_log(Job("base", "0", stage, tmp_path, ())) == results


RULE = [  # top-1 of two seeds of each side; whether the paper's difference is small; whether it agrees
    ([51, 61], [50, 60], False, True),  # ahead with every seed, however little
    ([80, 60], [50, 60], False, False),  # not with every seed
    ([58, 60], [50, 61], False, False),
    ([58, 60], [50, 61], True, True),  # no order, the mean difference below the range of one side's seeds
    ([60, 60], [50, 60], True, True),
    ([49, 59], [50, 60], True, False),  # behind with every seed
    ([60, 70], [50, 60], True, True),
    ([50, 50], [50, 50], True, False),  # no range at all
]


@pytest.mark.parametrize("high, low, small, agrees", RULE)
def test_the_rule_of_agreement(high, low, small, agrees):
    sides = {"a": [*high, 99], "b": low}  # a third seed of one side does not count
    keys = [(name, str(seed), "finetune") for name, top1 in sides.items() for seed in range(len(top1))]
    results = {key: dict(zip(COLUMNS, (*key, sides[key[0]][int(key[1])]), strict=False)) for key in keys}
    here, verdict = study_report.compare(results, dict(higher="a", lower="b", small=small))
    assert verdict == agrees and here.startswith(f"**{(sum(high) - sum(low)) / 2:+.1f}** ({high[0] - low[0]:+.1f}, ")


def test_published_pages_agree_with_the_published_results(tmp_path):
    """docs/study.md is the report, every case has its seeds, and sentences about results are right."""
    page = tmp_path / "study.md"
    (tmp_path / "toy_study").mkdir()
    study_report.write_report(STUDY, PUBLISHED, page, tmp_path / "toy_study")
    assert page.read_text("utf-8") == (ROOT / "docs" / "study.md").read_text("utf-8")

    means = defaultdict(list)
    for (experiment, _, stage), row in PUBLISHED.items():
        if row["top1"]:
            means[experiment, stage].append(float(row["top1"]))
    assert {experiment for experiment, stage in means} == STUDY["experiments"].keys()
    for (experiment, _), top1 in means.items():
        assert len(top1) >= len(STUDY["experiments"][experiment].get("seeds", STUDY["seeds"]))
    # every percentage with a decimal is chance, 25 %, or the mean of a case
    known = {f"{statistics.mean(top1):.1f}" for top1 in means.values()} | {"25.0"}
    assert set(re.findall(r"(\d+\.\d) %", STUDY["about"])) <= known
