"""The toy study: its configuration is valid, jobs are run once, the report is right, and so are the published pages."""

import json
from pathlib import Path

import yaml
from conftest import ROOT, run, table

import pretrain
from support import datasets
from support.config import load_config
from tools import study, study_report
from tools.study import Job

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


def test_subsets_are_balanced_and_nested(toy_videos, tmp_path):
    for count in (8, 16, 24):
        study.write_subset(str(toy_videos), tmp_path / "new" / f"{count}.txt", count)
        entries = datasets.list_entries(str(toy_videos), str(tmp_path / "new" / f"{count}.txt"))
        names = {Path(entry.path).name for entry in entries}
        # the first of each class, as those that fine-tuning takes with data.per_class: numbers follow the classes
        assert names == {f"{number:05d}.mp4" for number in range(count)}


def test_a_study_resumes_where_it_stopped_and_a_failure_stops_only_what_needs_it(monkeypatch, tmp_path):
    """With `run_job` replaced: which jobs are started, in which order, and what stands in the table afterwards."""
    file, started, broken = tmp_path / "new" / "results.csv", [], {("ratio_90", "0", "pretrain")}

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
    plan = study.plan(STUDY | {"folder": str(tmp_path)}, 0, ["base", "scratch", "ratio_90", "probe"], [])
    keys = {job[:3] for jobs in plan for job in jobs if job}
    assert run_all() == [("ratio_90", "0", "pretrain")]
    assert set(started) == keys - {("ratio_90", "0", "finetune")} and len(table(file)) == len(keys) - 2
    broken.clear()
    assert not run_all() and started == [("ratio_90", "0", "pretrain"), ("ratio_90", "0", "finetune")]
    assert sorted(tuple(row.values())[:3] for row in table(file)) == sorted(keys)  # each once
    assert not run_all() and not started
    # weights that are gone are made again if a job needs them, without a second row
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if ",probe," not in line))
    for folder in ("base_seed0/pretrain", "probe_seed0/probe"):
        (tmp_path / folder / "checkpoint.pt").unlink()
        (tmp_path / folder).rmdir()
    assert not run_all() and started == [("base", "0", "pretrain"), ("probe", "0", "probe")]
    assert len(table(file)) == len(keys)


def test_a_tiny_study_from_the_command_to_the_chart(toy_videos, tmp_path, monkeypatch):
    """Pre-training on eight of 24 videos, then fine-tuning on all of them, for one epoch."""
    folder, few = tmp_path / "runs", str(tmp_path / "few.txt")
    tables = [dict(title="Tiny", why="Because.", rows=[dict(case="8 videos", experiment="few")], claims=[])]
    same = "data.train=train data.val=val"
    settings = {"pretrain": f"{same} run.pictures=0", "finetune": f"{same} data.classes=classes.txt"}
    tiny = dict(root=str(toy_videos), folder=str(folder), seeds=[3, 4], subsets={few: 8}, about="# Tiny\n")
    tiny |= dict(settings=settings, experiments={"few": {"pretrain": f"data.train={few}"}, "other": {}}, tables=tables)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    words = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=8", "data.workers=0"]
    command = ["tools.study", tmp_path / "tiny.yaml", *words, "--only", "few", "--seeds", "3"]
    for name in ("OMP_NUM_THREADS", "TQDM_MININTERVAL"):  # restored after the study has set them
        monkeypatch.setenv(name, "1")
    run(*command)
    first, second = table(folder / "results.csv")
    assert tuple(first.values())[:4] == ("few", "3", "pretrain", "")
    assert tuple(second.values())[:3] == ("few", "3", "finetune") and second["loss"] == ""
    assert second["curve"].startswith("3:2.")  # three steps
    assert 0.1 < float(first["loss"]) < 5 and 0 <= float(second["top1"]) <= 100
    assert first["command"].startswith("python pretrain.py ") and f"data.train={few}" in first["command"]
    assert all(row["torch"] and row["commit"] and float(row["seconds"]) >= 0 for row in (first, second))
    assert "8 videos" in (folder / "few_seed3/pretrain/output.txt").read_text()
    text = (folder / "study.md").read_text()
    assert text.startswith("# Tiny\n") and "](study.png)" in text and "\nBecause.\n" in text
    assert f"| 8 videos | pretrain: `data.train={few}` | {float(first['loss']):.3f} | **" in text
    assert (folder / "study.png").exists()
    # a job that fails
    (folder / "results.csv").unlink()
    (folder / "few_seed3/pretrain/checkpoint.pt").write_text("no checkpoint")
    done = run(*command, ok=False)
    assert done.returncode == 1 and f"{folder / 'few_seed3/pretrain'}: failed, see output.txt there" in done.stderr
    assert "1 jobs failed: the same command tries again" in done.stderr


def test_results_from_the_logs_of_the_stages(tmp_path):
    """Pre-training: the mean of the last eight lines. A probe: two figures; of a repeated test, the last."""
    losses = [dict(step=step, loss=loss) for step, loss in enumerate([9.0] * 3 + [1.0, 2.0] * 4)]
    tuned = [dict(step=10 * i, loss=float(i)) for i in range(1, 8)]
    tuned += [dict(step=70, val_top1=9.0), dict(step=70, test_top1=50.0)]
    tests = (("pre-trained", 1.0), ("pre-trained", 14.25), ("random", 13.0))
    probed = [dict(step=3, encoder=name, test_top1=top1) for name, top1 in tests]
    both = [dict(stage="probe", top1="14.25"), dict(stage="probe of random weights", top1="13.00")]
    for stage, lines, results in (
        ("pretrain", losses, [dict(stage="pretrain", loss="1.5000")]),
        ("finetune", tuned, [dict(stage="finetune", top1="50.00", curve="50:3.000 70:6.500")]),
        ("probe", probed, both),
    ):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert study.read_log(Job("base", "0", stage, tmp_path, ())) == results


def test_published_pages_agree_with_the_published_results(tmp_path):
    """docs/study.md is the report, every case has its seeds, and sentences about results are right."""
    page = tmp_path / "study.md"
    (tmp_path / "toy_study").mkdir()
    study_report.write_report(STUDY, PUBLISHED, page, tmp_path / "toy_study" / "study.png")
    assert page.read_text("utf-8") == (ROOT / "docs" / "study.md").read_text("utf-8")

    def values(experiment: str, stage: str = "finetune", column: str = "top1") -> list[float]:
        return [*study_report.values(PUBLISHED, experiment, stage, column).values()]

    def mean(*words: str) -> float:
        return sum(values(*words)) / len(values(*words))

    ten = {"base", "scratch", "labels_400", "scratch_400"}
    for name in STUDY["experiments"].keys() - {"probe", "moco_probe"}:
        assert len(values(name)) == (10 if name in ten else 3)
    why = {part["title"].split(":")[0]: part["why"] for part in STUDY["tables"]}
    videomae, moco = mean("base", "pretrain", "seconds") / 4, mean("moco", "baselines/moco_v3", "seconds") / 2
    assert f"takes {videomae:.0f} s with VideoMAE and {moco:.0f} s with MoCo v3" in why["Table 3"]
    about = " ".join(STUDY["about"].split())
    for experiment in ("scratch", "untrained", "moco_untrained", "base", "moco", "scratch_twice", "twice"):
        assert f"{mean(experiment):.1f} %" in about
    for stage in ("probe", "probe of random weights"):
        assert abs(mean("probe", stage) - 25) < 2  # "no more than the hint's 25 %"
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    for name in ten:
        assert f"{mean(name):.1f} % ({min(values(name)):.1f} to {max(values(name)):.1f})" in readme
