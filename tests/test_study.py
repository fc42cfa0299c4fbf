"""The toy study: its configuration is valid, subsets are balanced and nested, runs are made once, tables are as computed by hand."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from PIL import Image

import pretrain
import support.config
import support.datasets
from support import study as toy_study

PUBLISHED = ROOT / "assets" / "toy_study" / "results.csv"
STUDY = yaml.safe_load(toy_study.STUDY.read_text())


# ---- the configuration ----


def test_every_run_of_the_study_is_valid_and_differs_from_all_others():
    """`plan` loads each run's configuration, `pretrain.build` makes its model, objective and mask."""
    runs = toy_study.plan(STUDY, [0, 1], [], [])
    assert len(runs) == len({run.key for run in runs}) == len({run.folder for run in runs})
    chosen = set()
    for run in runs:
        config = support.config.load_config(toy_study.STAGES[run.stage].DEFAULT, list(run.settings))
        assert config.run.seed == run.seed and config.run.folder == str(run.folder)
        if run.stage == "pretrain" and run.seed == 0:
            pretrain.build(config)
        chosen.add((run.stage, *(word for word in run.settings if not word.startswith("run.folder="))))
    assert len(chosen) == len(runs)
    with pytest.raises(support.config.UserError, match="mask.ratio"):
        toy_study.plan(STUDY, [0], ["base"], ["mask.ration=0.5"])


def test_a_run_comes_after_its_pretraining_and_the_first_seed_before_the_second():
    runs = toy_study.plan(STUDY, [0, 1], [], [])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    for place, run in enumerate(runs):
        if run.stage == "pretrain":
            assert run.source is None
        else:
            assert f"init={run.source.folder / 'checkpoint.pt' if run.source else 'scratch'}" in run.settings
            assert run.source is None or run.source in runs[:place]
    only = toy_study.plan(STUDY, [2], ["probe"], [])
    assert [run.key for run in only] == [("base", "2", "pretrain"), ("probe", "2", "probe")]


def test_every_experiment_is_in_a_table_and_every_row_names_one():
    named = {row["experiment"] for table in STUDY["tables"] for row in table["rows"]}
    assert named == STUDY["experiments"].keys()


def test_small_sets_have_as_many_steps_as_the_whole():
    """2,000 steps of fine-tuning for any number of labels; for fewer pre-training videos the 2,000 steps of all."""
    for run in toy_study.plan(STUDY, [0], [], []):
        config = support.config.load_config(toy_study.STAGES[run.stage].DEFAULT, list(run.settings))
        if run.stage == "finetune":
            videos = 8 * config.data.per_class or 4000
            assert config.optim.epochs * (videos // config.optim.batch_size) == 2000
        elif run.experiment.endswith("_steps"):
            videos = STUDY["experiments"][run.experiment]["videos"]
            assert config.optim.epochs * (videos // config.optim.batch_size) == 2000


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["configs/pretrain/toy.yaml"], "configs/pretrain/toy.yaml is no study: it lacks experiments, folder, root, seeds, settings, tables"),
        (["nowhere.yaml"], "no study can be read from nowhere.yaml"),
        (["--jobs", "0"], "--jobs has to be at least 1"),
        (["--report", "--readme", "LICENSE"], "LICENSE has no lines <!-- toy study --> and <!-- end of toy study --> to put the tables between"),
        (["--only", "bass"], "--only=bass is not known; choose one of base, scratch"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["study.py", *arguments])
    with pytest.raises(support.config.UserError) as error:
        toy_study.main()
    assert sentence in str(error.value)


def test_subsets_are_balanced_and_nested(toy_videos, tmp_path):
    study = dict(root=str(toy_videos), folder=str(tmp_path))
    paths = {}
    for count in (8, 16, 24):
        toy_study.write_subset(study, count)
        entries = support.datasets.list_entries(study["root"], str(toy_study.subset_file(study, count)))
        paths[count] = {entry.path for entry in entries}
        labels = [entry.label for entry in entries]
        assert len(entries) == count and all(labels.count(label) == count // 8 for label in set(labels)) and len(set(labels)) == 8
    assert paths[8] < paths[16] < paths[24] == set(support.datasets.list_videos(study["root"], "train"))
    # those that fine-tuning takes with data.per_class are nested likewise
    videos, _, _ = support.datasets.labelled(study["root"], "train", "val", "classes.txt", per_class=2)
    assert {path for path, _ in videos} == paths[16]


# ---- running ----


def results(file: Path) -> list[dict]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_study_goes_on_where_it_stopped_and_a_failure_stops_only_what_needs_it(monkeypatch, tmp_path):
    """With `execute` replaced: which runs are started, in which order, and what stands in the table afterwards."""
    file, started, broken = tmp_path / "results.csv", [], {("ratio_90", "0", "pretrain")}

    def execute(run: toy_study.Run, threads: int) -> list[dict]:
        assert run.source is None or run.source.key in {(row["experiment"], row["seed"], row["stage"]) for row in results(file)}
        started.append(run.key)
        if run.key in broken:
            raise subprocess.CalledProcessError(1, run.command)
        run.folder.mkdir(parents=True)
        (run.folder / "checkpoint.pt").touch()
        return [dict(experiment=run.experiment, seed=run.seed, stage=run.stage)]

    monkeypatch.setattr(toy_study, "execute", execute)
    runs = toy_study.plan({**STUDY, "folder": str(tmp_path)}, [0, 1], ["base", "scratch", "ratio_90", "probe"], [])
    with pytest.raises(support.config.UserError, match="1 runs failed and 1 could not start"):
        toy_study.run_all(runs, file, jobs=2)
    assert set(started) == {run.key for run in runs} - {("ratio_90", "0", "finetune")} and len(results(file)) == len(runs) - 2
    broken.clear(), started.clear()
    toy_study.run_all(runs, file, jobs=2)
    assert started == [("ratio_90", "0", "pretrain"), ("ratio_90", "0", "finetune")]
    keys = [(row["experiment"], row["seed"], row["stage"]) for row in results(file)]
    assert sorted(keys) == sorted(run.key for run in runs)  # each once
    toy_study.run_all(runs, file, jobs=2)
    assert len(started) == 2 and len(results(file)) == len(runs)


def test_a_tiny_study_from_the_command_to_the_picture(toy_videos, tmp_path):
    """Pre-training on eight of 24 videos, then fine-tuning on all of them, for one epoch."""
    folder, study = tmp_path / "runs", tmp_path / "tiny.yaml"
    table = {"title": "Tiny", "paper": "none", "why": "", "rows": [{"case": "8 videos", "experiment": "few"}]}
    experiments = {"few": {"videos": 8, "pretrain": "mask.ratio=0.5"}, "other": {}}
    described = dict(root=str(toy_videos), folder=str(folder), seeds=[3, 4], settings={"pretrain": "run.pictures=0"}, experiments=experiments, tables=[table])
    study.write_text(yaml.safe_dump(described))
    settings = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=8", "data.workers=0"]
    command = [sys.executable, "-m", "support.study", study, *settings, "--only", "few", "--seeds", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pretraining, finetuning = results(folder / "results.csv")
    assert (pretraining["experiment"], pretraining["seed"], pretraining["stage"], pretraining["top1"]) == ("few", "3", "pretrain", "")
    assert (finetuning["experiment"], finetuning["seed"], finetuning["stage"], finetuning["loss"]) == ("few", "3", "finetune", "")
    assert 0.5 < float(pretraining["loss"]) < 5 and 0 <= float(finetuning["top1"]) <= 100
    assert pretraining["command"].startswith("python pretrain.py ") and f"data.train={folder}/videos_8.txt" in pretraining["command"]
    assert all(row["torch"] and float(row["seconds"]) > 0 for row in (pretraining, finetuning))
    printed = (folder / "few_seed3/pretrain/output.txt").read_text()
    assert "8 videos; clips of 8 frames" in printed and "32 of 64 cubes masked" in printed
    assert f"| 8 videos | pre-trained on 8 videos, `pretrain.py mask.ratio=0.5` | {float(pretraining['loss']):.3f} |" in done.stdout
    assert Image.open(folder / "study.png").size == (2 * toy_study.PANEL[0], toy_study.PANEL[1])


def test_results_from_the_logs_of_the_stages(tmp_path):
    """Pre-training: the mean of the last eight lines. A probe: two figures; of a test made again, the last."""

    def result(stage: str, lines: list[dict]) -> list[dict]:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return toy_study.read_log(toy_study.Run("base", 0, stage, tmp_path, ()))

    assert result("pretrain", [dict(step=step, loss=loss) for step, loss in enumerate([9.0] * 3 + [1.0, 2.0] * 4)]) == [dict(stage="pretrain", loss="1.5000")]
    assert result("finetune", [dict(step=1, loss=2.0), dict(step=2, top1=9.0), dict(step=3, test_top1=50.0)]) == [dict(stage="finetune", top1="50.00")]
    tests = [dict(step=3, encoder=name, test_top1=top1) for name, top1 in (("pre-trained", 1.0), ("pre-trained", 14.25), ("random", 13.0))]
    assert result("probe", tests) == [dict(stage="probe", top1="14.25"), dict(stage="probe of random weights", top1="13.00")]


def test_weights_that_are_gone_are_made_again_without_a_second_row(tmp_path):
    file = tmp_path / "results.csv"
    runs = toy_study.plan({**STUDY, "folder": str(tmp_path)}, [0], ["base", "probe"], [])
    pretraining, finetuning, probing = runs
    toy_study.add_results(file, [dict(experiment=run.experiment, seed=0, stage=run.stage, loss=1) for run in (pretraining, finetuning)])
    assert toy_study.unfinished(runs, file) == [pretraining, probing]
    toy_study.add_results(file, [dict(experiment="base", seed=0, stage="pretrain", loss=2)])
    assert [(row["stage"], row["loss"]) for row in results(file)] == [("pretrain", "1"), ("finetune", "1")]
    pretraining.folder.mkdir(parents=True)
    (pretraining.folder / "checkpoint.pt").touch()
    assert toy_study.unfinished(runs, file) == [probing]


# ---- the report ----


def test_report_of_results_computed_by_hand(tmp_path):
    file = tmp_path / "results.csv"
    rows = [("base", seed, "finetune", top1, "") for seed, top1 in enumerate((90.0, 93.0, 96.0))]
    rows += [("base", seed, "pretrain", "", loss) for seed, loss in enumerate((0.61, 0.63))]
    rows += [("scratch", 0, "finetune", 12.5, ""), ("probe", 0, "probe", 14.0, ""), ("probe", 0, "probe of random weights", 13.0, "")]
    rows += [("labels_200", 0, "finetune", 40.0, "")]
    toy_study.add_results(file, [dict(experiment=e, seed=s, stage=t, top1=a, loss=x, seconds=1800, torch="2.15", commit="abc", command=f"{e} {s} {t.split()[0]}") for e, s, t, a, x in rows])
    text = toy_study.report(STUDY, results(file))
    assert "| 4,000, VideoMAE | – | 0.620 | **93.0** (90.0, 93.0, 96.0) | 80.0 |\n" in text
    assert "| 4,000, from scratch | init=scratch | – | **12.5** (12.5) | 68.8 (K400, 240k) |\n" in text.replace("`", "")
    assert "| 200, VideoMAE | finetune.py data.per_class=25 optim.epochs=80 optim.warmup_epochs=20 | 0.620 | **40.0** (40.0) | 62.6 |\n" in text.replace("`", "")
    assert "| linear probe | – | 0.620 | **14.0** (14.0) | 38.9 |\n" in text
    assert "| probe of random weights | – | – | **13.0** (13.0) | – |\n" in text
    assert "ratio_90" not in text and "tube 90" not in text  # no result yet
    assert "9 results of commit abc with torch 2.15; the runs' own times sum up to 4.0 hours." in text
    # Table 1a's panel is the third; its first bar is that of the base, its first line from 90 to 96
    picture, middle = toy_study.draw(STUDY, results(file)), toy_study.PANEL[1] + toy_study.TOP + 22
    unit = (toy_study.PANEL[0] - toy_study.LEFT - 50) / 100
    colours = [picture.getpixel((round(toy_study.LEFT + unit * percent), y)) for percent, y in ((92, middle - 8), (94, middle - 8), (95, middle), (97, middle))]
    assert colours == [(70, 130, 180), (255, 255, 255), (0, 0, 0), (255, 255, 255)]


def test_published_results_are_unique_and_their_report_is_the_readmes():
    rows = toy_study.read_results(PUBLISHED)
    keys = [(row["experiment"], row["seed"], row["stage"]) for row in rows]
    assert len(keys) == len(set(keys))
    begin, end = toy_study.MARKS
    assert begin + toy_study.report(STUDY, rows) + end in (ROOT / "README.md").read_text()
