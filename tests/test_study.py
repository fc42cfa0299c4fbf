"""The toy study: its configuration is valid, subsets are balanced and nested, runs are made once, tables are right."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from conftest import run as run_command
from PIL import Image

import pretrain
import support.datasets
from support import study
from support.config import UserError, load_config
from support.study import Run

PUBLISHED = ROOT / "docs" / "toy_study" / "results.csv"
STUDY = study.read_study(study.STUDY)


def planned(seed: int, only: list[str] = (), settings: list[str] = (), **changes: object) -> list[Run]:
    """The runs of a seed in the order of `plan`, each once."""
    chains = study.plan(STUDY | changes, seed, list(only), list(settings))
    return list(dict.fromkeys(run for chain in chains for run in chain if run))


def configuration(run: Run):
    return load_config(ROOT / "configs" / Path(run.stage).parts[0] / "toy.yaml", list(run.settings))


def results(file: Path) -> list[dict]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def write_results(file: Path, rows: list[dict]) -> None:
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, study.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


# ---- the configuration ----


def test_every_run_of_the_study_is_valid_and_differs_from_all_others():
    """`plan` loads each run's configuration, `pretrain.build` makes its model, objective and mask."""
    runs = [*planned(0), *planned(1)]
    assert len(runs) == len({run[:3] for run in runs}) == len({run.folder for run in runs})
    chosen = set()
    for run in runs:
        config = configuration(run)
        assert str(config.run.seed) == run.seed and config.run.folder == str(run.folder)
        if run.stage == "pretrain" and run.seed == "0":
            pretrain.build(config)
        chosen.add((run.stage, *(word for word in run.settings if not word.startswith("run.folder="))))
    assert len(chosen) == len(runs)
    with pytest.raises(UserError, match="mask.ratio"):
        study.plan(STUDY, 0, ["base"], ["mask.ration=0.5"])


def test_a_run_starts_from_the_pre_training_of_its_experiment_or_of_the_one_that_it_names():
    for source, last in study.plan(STUDY, 1, [], []):
        init = STUDY["experiments"][last.experiment].get("init", last.experiment)
        assert configuration(last).init == ("scratch" if init == "scratch" else str(source.folder / "checkpoint.pt"))
        stage = "baselines/moco_v3" if init.startswith("moco") else "pretrain"
        assert source is None if init == "scratch" else source[:3] == (init, "1", stage)
    assert [run[:3] for run in planned(2, ["probe"])] == [("base", "2", "pretrain"), ("probe", "2", "probe")]
    assert configuration(planned(2, ["probe"], ["data.workers=0"])[0]).data.workers == 0


def test_every_experiment_is_in_a_table_and_every_row_names_one():
    named = {row["experiment"] for table in STUDY["tables"] for row in table["rows"]}
    assert named == STUDY["experiments"].keys()
    for table in STUDY["tables"]:
        sides = [claim[side] for claim in table["claims"] for side in ("higher", "lower")]
        names = [name for side in sides for name in (side if isinstance(side, list) else [side])]
        assert names and set(names) <= {row["experiment"] for row in table["rows"]}


def test_rows_have_the_same_steps_whatever_the_number_of_labels():
    """For fewer pre-training videos the 2,000 steps of all, or the same epochs."""
    steps, subsets = {}, set()
    for run in planned(0):
        config = configuration(run)
        if run.stage == "finetune":
            videos = 8 * config.data.per_class or 4000
            steps[run.experiment] = config.optim.epochs * (videos // config.optim.batch_size)
        elif run.stage == "pretrain" and config.optim.base_lr:  # 0: the initial weights
            subsets.add(config.data.train)
            videos = STUDY["subsets"].get(config.data.train, 4000)
            length = config.optim.epochs * (videos // config.optim.batch_size)
            assert length == 2000 or run.experiment == f"videos_{videos}_epochs" and config.optim.epochs == 4
    assert subsets == {"train", *STUDY["subsets"]}
    assert all(steps.pop(f"{side}_{labels}") == 400 for side in ("labels", "scratch") for labels in (1600, 800, 400))
    assert steps.pop("twice") == steps.pop("scratch_twice") == 1000
    assert set(steps.values()) == {500} and len(steps) == 17


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["configs/pretrain/toy.yaml"],
            "configs/pretrain/toy.yaml is no study: it lacks about, experiments, folder, root",
        ),
        (["nowhere.yaml"], "no study can be read from nowhere.yaml"),
        (["LICENSE.yaml"], "no study can be read from LICENSE.yaml"),
        (["--jobs", "0"], "--jobs has to be at least 1"),
        (["--only", "bass"], "--only=bass is not known; choose one of base, scratch"),
        (["mask.ration=0.5"], "unknown key 'mask.ration'; the nearest valid key is 'mask.ratio'"),
    ],
)
def test_mistakes_end_in_a_sentence_before_anything_is_rendered(arguments, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "LICENSE.yaml").write_text((ROOT / "LICENSE").read_text())
    monkeypatch.setattr("sys.argv", ["study.py", *arguments])
    with pytest.raises(UserError) as error:
        study.main()
    assert sentence in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "LICENSE.yaml"}


def test_subsets_are_balanced_and_nested(toy_videos, tmp_path):
    paths = {}
    for count in (8, 16, 24):
        study.write_subset(str(toy_videos), tmp_path / "new" / f"{count}.txt", count)
        entries = support.datasets.list_entries(str(toy_videos), str(tmp_path / "new" / f"{count}.txt"))
        paths[count] = {Path(entry.path) for entry in entries}
        classes = [path.parent.name for path in paths[count]]
        assert len(classes) == count and len(set(classes)) == 8
        assert all(classes.count(name) == count // 8 for name in classes)
    assert paths[8] < paths[16] < paths[24] == set(support.datasets.list_videos(str(toy_videos), "train"))
    # they are the first of each class, as those that fine-tuning takes with data.per_class
    assert {path.name for path in paths[16]} == {f"{number:05d}.mp4" for number in range(16)}


# ---- running ----


def test_a_study_resumes_where_it_stopped_and_a_failure_stops_only_what_needs_it(monkeypatch, tmp_path):
    """With `execute` replaced: which runs are started, in which order, and what stands in the table afterwards."""
    file, started, broken = tmp_path / "new" / "results.csv", [], {("ratio_90", "0", "pretrain")}

    def execute(run: Run) -> tuple[Run, list[dict]]:
        if "init=scratch" not in run.settings and run.stage != "pretrain":
            assert Path(configuration(run).init).exists()
        started.append(run[:3])
        if run[:3] in broken:
            return run, []
        run.folder.mkdir(parents=True)
        (run.folder / "checkpoint.pt").touch()
        return run, [dict(zip(study.COLUMNS[:3], run[:3], strict=True))]

    monkeypatch.setattr(study, "execute", execute)
    chains = study.plan(STUDY | {"folder": str(tmp_path)}, 0, ["base", "scratch", "ratio_90", "probe"], [])
    keys = {run[:3] for chain in chains for run in chain if run}
    assert [run[:3] for run in study.run_all(chains, file, jobs=2)] == [("ratio_90", "0", "pretrain")]
    assert set(started) == keys - {("ratio_90", "0", "finetune")} and len(results(file)) == len(keys) - 2
    broken.clear(), started.clear()
    assert not study.run_all(chains, file, jobs=2)
    assert started == [("ratio_90", "0", "pretrain"), ("ratio_90", "0", "finetune")]
    assert sorted(tuple(row.values())[:3] for row in results(file)) == sorted(keys)  # each once
    assert not study.run_all(chains, file, jobs=2) and len(started) == 2 and len(results(file)) == len(keys)
    # weights that are gone are made again if a run needs them, without a second row
    write_results(file, [row for row in results(file) if row["stage"] != "probe"])
    (tmp_path / "base_seed0" / "pretrain" / "checkpoint.pt").unlink()
    (tmp_path / "base_seed0" / "pretrain").rmdir()
    (tmp_path / "probe_seed0" / "probe" / "checkpoint.pt").unlink()
    (tmp_path / "probe_seed0" / "probe").rmdir()
    assert not study.run_all(chains, file, jobs=2)
    assert started[2:] == [("base", "0", "pretrain"), ("probe", "0", "probe")] and len(results(file)) == len(keys)


def test_a_tiny_study_from_the_command_to_the_chart(toy_videos, tmp_path, monkeypatch):
    """Pre-training on eight of 24 videos, then fine-tuning on all of them, for one epoch."""
    folder, few = tmp_path / "runs", str(tmp_path / "few.txt")
    claims = [dict(says="8, 24", higher="few", lower="other", paper=1)]
    table = dict(title="Tiny", why="Because.", rows=[{"case": "8 videos", "experiment": "few"}], claims=claims)
    settings = {stage: "data.train=train data.val=val" for stage in ("pretrain", "finetune")}
    settings["finetune"] += " data.classes=classes.txt"
    settings["pretrain"] += " run.pictures=0"
    experiments = {"few": {"pretrain": f"data.train={few} mask.ratio=0.5"}, "other": {}}
    described = dict(root=str(toy_videos), folder=str(folder), seeds=[3, 4], subsets={few: 8}, about="# Tiny\n")
    described |= dict(settings=settings, experiments=experiments, tables=[table])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(described))
    words = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.batch_size=8", "data.workers=0"]
    command = ["support.study", tmp_path / "tiny.yaml", *words, "--only", "few", "--seeds", "3"]
    for name in ("OMP_NUM_THREADS", "TQDM_MININTERVAL"):  # restored after the study has set them
        monkeypatch.setenv(name, "1")
    run_command(*command)
    first, second = results(folder / "results.csv")
    assert tuple(first.values())[:4] == ("few", "3", "pretrain", "")
    assert tuple(second.values())[:3] == ("few", "3", "finetune") and second["loss"] == ""
    assert second["curve"].startswith("3:2.")  # three steps
    assert 0.5 < float(first["loss"]) < 5 and 0 <= float(second["top1"]) <= 100
    assert first["command"].startswith("python pretrain.py ") and f"data.train={few}" in first["command"]
    assert all(row["torch"] and row["commit"] and float(row["seconds"]) >= 0 for row in (first, second))
    printed = (folder / "few_seed3/pretrain/output.txt").read_text()
    assert "8 videos" in printed and "32 of 64" in printed
    text = (folder / "study.md").read_text()
    assert text.startswith("# Tiny\n") and "](study.png)" in text and "\nBecause.\n" in text
    assert f"| 8 videos | pretrain: `data.train={few} mask.ratio=0.5` | {float(first['loss']):.3f} | **" in text
    assert Image.open(folder / "study.png").width == 1000
    # a run that fails: the sentence, and where to look
    done = run_command(*command, "init=nowhere.pt", ok=False)
    assert done.returncode == 1 and "nearest valid key" in done.stderr  # pre-training has no such key
    (folder / "results.csv").unlink()
    (folder / "few_seed3/pretrain/checkpoint.pt").write_text("no checkpoint")
    done = run_command(*command, ok=False)
    assert done.returncode == 1 and f"{folder / 'few_seed3/pretrain'}: failed, see output.txt there" in done.stderr
    assert "1 runs failed: the same command tries again" in done.stderr
    assert "is not a whole checkpoint" in (folder / "few_seed3/pretrain/output.txt").read_text()


def test_results_from_the_logs_of_the_stages(tmp_path):
    """Pre-training: the mean of the last eight lines. A probe: two figures; of a repeated test, the last.

    Fine-tuning: a curve of means over five lines.
    """

    def result(stage: str, lines: list[dict]) -> list[dict]:
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return study.read_log(Run("base", "0", stage, tmp_path, ()))

    losses = [dict(step=step, loss=loss) for step, loss in enumerate([9.0] * 3 + [1.0, 2.0] * 4)]
    assert result("pretrain", losses) == [dict(stage="pretrain", loss="1.5000")]
    lines = [dict(step=10 * i, loss=float(i)) for i in range(1, 8)]
    lines += [dict(step=70, val_top1=9.0), dict(step=70, test_top1=50.0)]
    assert result("finetune", lines) == [dict(stage="finetune", top1="50.00", curve="50:3.000 70:6.500")]
    assert result("baselines/moco_v3", losses) == [dict(stage="baselines/moco_v3", loss="1.5000")]
    found = (("pre-trained", 1.0), ("pre-trained", 14.25), ("random", 13.0))
    tests = [dict(step=3, encoder=name, test_top1=top1) for name, top1 in found]
    both = [dict(stage="probe", top1="14.25"), dict(stage="probe of random weights", top1="13.00")]
    assert result("probe", tests) == both


# ---- the report ----


def report_of(file: Path, folder: Path) -> str:
    study.report(STUDY, study.read_results(file), folder / "study.md", folder / "toy_study" / "study.png")
    return (folder / "study.md").read_text("utf-8")


def row(
    experiment: str, seed: int, stage: str, top1: float | str = "", loss: float | str = "", curve: str = ""
) -> dict:
    given = experiment, seed, stage, top1, loss, curve, 9, "2.15", "abc", "python"
    return dict(zip(study.COLUMNS, given, strict=True))


def test_report_of_results_computed_by_hand(tmp_path):
    (tmp_path / "toy_study").mkdir()
    # halfway is 1.5397: between ln 8 and the lowest, 1.0
    curves = "50:2.000 100:1.000", "50:1.900 100:1.8 150:1.400", "50:2.000 100:1.9 150:1.7"
    rows = [row("base", seed, "finetune", top1, "", curves[seed]) for seed, top1 in enumerate((90.0, 93.0, 96.0))]
    rows += [row("base", seed, "pretrain", "", loss) for seed, loss in enumerate((0.61, 0.63))]
    rows += [row("scratch", 0, "finetune", 12.5), row("labels_400", 0, "finetune", 40.0)]
    rows += [row("frame_75", seed, "finetune", top1) for seed, top1 in enumerate((80.0, 92.0, 90.0))]
    rows += [row("random_75", seed, "finetune", top1) for seed, top1 in enumerate((91.0, 95.0, 96.5))]
    rows += [row("depth_4", seed, "finetune", top1) for seed, top1 in enumerate((70.0, 95.0, 80.0))]
    rows += [row("probe", 0, "probe", 14.0), row("probe", 0, "probe of random weights", 13.0)]
    write_results(tmp_path / "results.csv", rows)
    text = report_of(tmp_path / "results.csv", tmp_path).replace("`", "")
    assert round(50 + 50 * (2 - 1.5397)) == 73 and round(100 + 50 * (1.8 - 1.5397) / 0.4) == 133
    assert "| 1 block | – | 0.620 | **93.0** (90.0, 93.0, 96.0) | **133** (73, 133, never) | 68.5 / 79.0 |\n" in text
    assert "| from scratch | init: scratch | – | **12.5** (12.5) | – | 32.6 |\n" in text
    given = "init: base, finetune: data.per_class=50 optim.epochs=8 optim.warmup_epochs=1.6"
    assert f"| 400, VideoMAE | {given} | 0.620 | **40.0** (40.0) | – | 62.6 |\n" in text
    assert "| VideoMAE, probed | init: base | 0.620 | **14.0** (14.0) | – | 38.9 |\n" in text
    assert "| random weights, probed | init: base | – | **13.0** (13.0) | – | – |\n" in text
    assert "mask.ratio=0.9" not in text and "90 %: 14" not in text  # no result yet
    # the claims: each seed ahead; each behind, but by less than the seeds' range; a large difference within the range
    assert (
        "| tube, frame | +8.1 / +3.5 | **+5.7** (+10.0, +1.0, +6.0) | ahead with every seed, below the spread |" in text
    )
    random = "**-1.2** (-1.0, -2.0, -0.5) | behind with every seed, below the spread |"
    assert f"| tube, random | +1.3 / +0.5 | {random}" in text
    assert "| 4 blocks, 1 block | +1.1 / +1.0 | **-11.3** (-20.0, +2.0, -16.0) | no order, below the spread |" in text
    assert "| VideoMAE: fine-tuned, probed | +30.7 | **+76.0** (+76.0) | ahead with every seed |" in text
    held = (
        "1 of 8 agree with the paper in every row; "
        "these do not: Table 2, Figure 3, Table 1b, Table 1c, Table 1f, Table 3, Figure 4."
    )
    assert held in text
    assert text.endswith(f"\n{len(rows)} results of commit abc with torch 2.15.\n")
    assert "](toy_study/study.png)" in text and (tmp_path / "toy_study" / "study.png").exists()


def test_a_claim_may_be_about_the_difference_of_two_differences():
    rows = [("a", 50), ("b", 10), ("c", 60), ("d", 45)]
    results = {
        (name, str(seed), "finetune"): row(name, seed, "finetune", top1 + seed)
        for name, top1 in rows
        for seed in (0, 1)
    }
    claim = dict(says="gap", higher=["a", "b"], lower=["c", "d"], paper="+9")
    assert study.compare(results, claim) == ("| gap | +9 | **+25.0** (+25.0, +25.0) | ahead with every seed |", True)
    turned = claim | dict(higher=["c", "d"], lower=["a", "b"])
    assert study.compare(results, turned) == ("| gap | +9 | **-25.0** (-25.0, -25.0) | behind with every seed |", False)
    assert study.compare(results, claim | dict(higher="e")) == ("", False)


def test_bars_end_at_the_mean_and_dots_stand_at_the_seeds(tmp_path, monkeypatch):
    figures, new_figure = [], study.new_figure
    monkeypatch.setattr(study, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    (tmp_path / "toy_study").mkdir()
    report_of(PUBLISHED, tmp_path)
    rows = study.read_results(PUBLISHED)
    for table, axes in zip(STUDY["tables"], figures[0].axes, strict=True):
        assert axes.get_title() == table["title"] and axes.get_xlim() == (0, 100) and axes.yaxis_inverted()
        assert [label.get_text() for label in axes.get_yticklabels()] == [row["case"] for row in table["rows"]]
        for row, bar, dots in zip(table["rows"], axes.patches, axes.lines, strict=True):
            key = row["experiment"], row.get("stage", "finetune")
            seeds = sorted((int(name[1]), float(found["top1"])) for name, found in rows.items() if name[::2] == key)
            top1 = [percent for _, percent in seeds]
            assert list(dots.get_xdata()) == top1 and bar.get_width() == pytest.approx(sum(top1) / len(top1))
            assert len(top1) >= 3


def test_published_results_are_unique_and_docs_study_is_their_report(tmp_path):
    rows = results(PUBLISHED)
    assert len(rows) == len(study.read_results(PUBLISHED))
    (tmp_path / "toy_study").mkdir()
    assert report_of(PUBLISHED, tmp_path) == (ROOT / "docs" / "study.md").read_text("utf-8")


def test_sentences_about_results_agree_with_the_results():
    rows, why = study.read_results(PUBLISHED), {table["title"].split(":")[0]: table["why"] for table in STUDY["tables"]}

    def mean(experiment: str, stage: str = "finetune", column: str = "top1") -> float:
        found = study.values(rows, experiment, stage, column).values()
        return sum(found) / len(found)

    videomae, moco = mean("base", "pretrain", "seconds") / 4, mean("moco", "baselines/moco_v3", "seconds") / 2
    assert f"takes {videomae:.0f} s with VideoMAE and {moco:.0f} s with MoCo v3" in why["Table 3"]
    about = " ".join(STUDY["about"].split())
    untrained, moco_untrained = mean("untrained"), mean("moco_untrained")
    assert f"and gets {mean('scratch'):.1f} %" in about
    assert f"VideoMAE's {untrained:.1f} %, MoCo v3's {moco_untrained:.1f} % (Table 3)" in about
    assert f"gets {mean('base'):.1f} % from its own, MoCo v3's two epochs {mean('moco'):.1f} %" in about
    assert f"twice the steps it gets {mean('scratch_twice'):.1f} % against {mean('twice'):.1f} %" in about
    for of_what in ("probe", "probe of random weights"):
        assert abs(mean("probe", of_what) - 25) < 2  # "no more than the hint (25 %)"
    ten = {"base", "scratch", "labels_400", "scratch_400"}
    for name in STUDY["experiments"]:
        if "probe" not in name:
            assert len(study.values(rows, name, "finetune")) == (10 if name in ten else 3)  # "three seeds", "ten"
    base = study.values(rows, "base", "finetune").values()
    assert max(base) - min(base) < 10  # no lottery
    page = " ".join((ROOT / "README.md").read_text("utf-8").split())
    for name in ten:
        top1 = study.values(rows, name, "finetune").values()
        assert f"{mean(name):.1f} % ({min(top1):.1f} to {max(top1):.1f})" in page
