"""The toy study: its configuration is valid, subsets are balanced and nested, runs are made once, tables are as computed by hand."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_study
import yaml
from conftest import ROOT
from PIL import Image

import common
import data
import pretrain

SCRIPT = ROOT / "tests" / "toy_study.py"
PUBLISHED = ROOT / "assets" / "toy_study" / "results.csv"
STUDY = yaml.safe_load(toy_study.STUDY.read_text())


# ---- the configuration ----


def test_every_run_of_the_study_is_valid_and_differs_from_all_others():
    """`plan` loads each run's configuration, `pretrain.build` makes its model, objective and mask."""
    runs = toy_study.plan(STUDY, STUDY["seeds"], [], [])
    assert len(runs) == len({run.key for run in runs}) == len({run.folder for run in runs})
    chosen = set()
    for run in runs:
        config = common.load_config(toy_study.STAGES[run.stage].DEFAULT, list(run.settings))
        assert config.run.seed == run.seed and config.run.folder == str(run.folder)
        if run.stage == "pretrain":
            pretrain.build(config)
        chosen.add((run.stage, *(word for word in run.settings if not word.startswith("run.folder="))))
    assert len(chosen) == len(runs)
    with pytest.raises(common.UserError, match="mask.ratio"):
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
    """1,000 steps of fine-tuning for any number of labels; for fewer pre-training videos the 1,875 steps of all to within one percent."""
    for run in toy_study.plan(STUDY, [0], [], []):
        config = common.load_config(toy_study.STAGES[run.stage].DEFAULT, list(run.settings))
        if run.stage == "finetune":
            videos = 8 * config.data.per_class or 4000
            assert config.optim.epochs * (videos // config.optim.batch_size) == 1000
        elif run.experiment.endswith("_steps"):
            videos = STUDY["experiments"][run.experiment]["videos"]
            assert config.optim.epochs * (videos // config.optim.batch_size) == pytest.approx(1875, rel=0.01)


def test_subsets_are_balanced_and_nested(toy_videos, tmp_path):
    study = dict(root=str(toy_videos), folder=str(tmp_path))
    paths = {}
    for count in (8, 16, 24):
        toy_study.write_subset(study, count)
        entries = data.list_entries(study["root"], str(toy_study.subset_file(study, count)))
        paths[count] = {entry.path for entry in entries}
        labels = [entry.label for entry in entries]
        assert len(entries) == count and all(labels.count(label) == count // 8 for label in set(labels)) and len(set(labels)) == 8
    assert paths[8] < paths[16] < paths[24] == set(data.list_videos(study["root"], "train"))
    # those that fine-tuning takes with data.per_class are nested likewise
    videos, _, _ = data.labelled(study["root"], "train", "val", "classes.txt", per_class=2)
    assert {path for path, _ in videos} == paths[16]


# ---- a tiny study ----


TINY = {
    "seeds": [0, 1],
    "settings": {"pretrain": "run.pictures=0"},
    "experiments": {"base": {}, "few": {"videos": 8}, "scratch": {"init": "scratch"}, "probe": {"init": "base", "probe": ""}},
    "tables": [{"title": "Tiny", "paper": "none", "why": "", "rows": [{"case": name, "experiment": name} for name in ("base", "few", "scratch")]}],
}
QUICK = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=8", "data.workers=0", "--jobs", "2"]


def results(file: Path) -> list[dict]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def run_study(study: Path, *arguments: str, ok: bool = True) -> str:
    done = subprocess.run([sys.executable, SCRIPT, study, *QUICK, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_study_goes_on_where_it_stopped(toy_videos, tmp_path):
    study, folder = tmp_path / "tiny.yaml", tmp_path / "runs"
    study.write_text(yaml.safe_dump({**TINY, "root": str(toy_videos), "folder": str(folder)}))
    file = folder / "results.csv"
    run_study(study, "--seeds", "0", "--only", "base")
    first = results(file)
    assert [(row["experiment"], row["stage"]) for row in first] == [("base", "pretrain"), ("base", "finetune")]
    assert float(first[0]["loss"]) > 0 and not first[0]["top1"] and 0 <= float(first[1]["top1"]) <= 100 and not first[1]["loss"]

    # one run that has failed does not stop the others, nor those that it has nothing to do with
    (folder / "few_seed0").write_text("in the way of a folder")
    text = run_study(study, "--seeds", "0", ok=False)
    assert "1 runs failed and 1 could not start" in text
    assert {row["experiment"] for row in results(file)} == {"base", "scratch", "probe"}

    (folder / "few_seed0").unlink()
    finished = os.stat(folder / "base_seed0/finetune/checkpoint.pt").st_mtime_ns
    run_study(study, "--seeds", "0")
    rows = results(file)
    assert rows[:2] == first and os.stat(folder / "base_seed0/finetune/checkpoint.pt").st_mtime_ns == finished  # not run again
    keys = [(row["experiment"], row["seed"], row["stage"]) for row in rows]
    assert len(keys) == len(set(keys)) == 7  # two each of base, few and probe, one of scratch
    few = next(row for row in rows if row["experiment"] == "few" and row["stage"] == "pretrain")
    assert few["command"].startswith("python pretrain.py ") and f"data.train={folder}/videos_8.txt" in few["command"] and few["torch"] and few["seconds"]
    assert "8 videos; clips of 8 frames" in (folder / "few_seed0/pretrain/output.txt").read_text()
    assert Image.open(folder / "study.png").size[0] > 100


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
    rows += [("labels_256", 0, "finetune", 40.0, "")]
    toy_study.add_results(file, [dict(experiment=e, seed=s, stage=t, top1=a, loss=x, seconds=1800, torch="2.15", commit="abc") for e, s, t, a, x in rows])
    text = toy_study.report(STUDY, results(file))
    assert "| 4,000, VideoMAE | – | 0.620 | **93.0** (90.0 to 96.0, 3) | 80.0 |\n" in text
    assert "| 4,000, from scratch | init=scratch | – | **12.5** (12.5 to 12.5, 1) | 68.8 (K400, 240k) |\n" in text.replace("`", "")
    assert "| 256, VideoMAE | finetune.py data.per_class=32 optim.epochs=125 optim.warmup_epochs=16 | 0.620 | **40.0** (40.0 to 40.0, 1) | 62.6 |\n" in text.replace("`", "")
    assert "| linear probe | – | 0.620 | **14.0** (14.0 to 14.0, 1) | 38.9 |\n" in text
    assert "| linear probe of random weights | – | – | **13.0** (13.0 to 13.0, 1) | – |\n" in text
    assert "ratio_90" not in text and "tube 90" not in text  # no result yet
    assert "9 results of commit abc with torch 2.15; the runs' own times sum up to 4.5 hours." in text
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
