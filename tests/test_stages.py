"""What all stages and the baseline share, as real runs: optimizer, processes, memory, mistakes, what a run leaves."""

import importlib
import json
import math
import multiprocessing
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DOWNSTREAM, EVERYTHING_RANDOM, RESULTS, STAGES, log, losses, random_run, run, tensors

import support.run
from support.config import UserError, as_dict, load_config
from support.run import warmup_cosine


def module(stage: str):
    return importlib.import_module(stage.replace("/", "."))


# ---- what a run says and leaves ----


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_its_log_configuration_and_checkpoint(stage, finished):
    folder = random_run(finished, stage)
    said, lines = (folder / "said.txt").read_text(), [line for line in log(folder) if "loss" in line]
    steps = len(lines)
    assert steps % 3 == 0 and f"{steps} steps = 3 epochs x {steps // 3}; starting at step 0" in said
    assert {"loss", "step", "epoch", "lr", "clips_per_second", "waiting_for_data", "memory_gb"} <= set(lines[0])
    assert [line["step"] for line in lines] == list(range(1, steps + 1)) and lines[-1]["epoch"] == 3
    assert [line["step"] for line in log(folder)] == sorted(line["step"] for line in log(folder))
    assert all(math.isfinite(line["loss"]) and line["clips_per_second"] > 0 for line in lines)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    config = load_config(module(stage).DEFAULT, [str(folder / "config.yaml")])
    assert checkpoint["step"] == steps and checkpoint["config"] == as_dict(config)
    assert config.run.folder == str(folder) and config.optim.batch_size == 8
    peak, end = (lr * 8 / 256 for lr in (config.optim.base_lr, getattr(config.optim, "min_lr", 0)))
    assert f"learning rate {config.optim.base_lr:g} x 8 / 256 = {peak:.4g}" in said
    expected = [warmup_cosine(step, steps, steps // 3, peak, end) for step in range(steps)]
    assert [line["lr"] for line in lines] == pytest.approx(expected) and expected[0] == 0 < max(expected) <= peak
    assert not list(folder.glob("*.tmp")) and not (folder / "broken_videos.txt").exists()
    assert all((folder / name).exists() for name in RESULTS[stage])
    assert (folder / "loss.png").exists() and (folder / "accuracy.png").exists() == (stage in DOWNSTREAM)


def test_repeats_in_pre_training_count_in_the_batch_and_not_in_epochs(settings, tmp_path):
    words = [*settings["pretrain"], "data.repeats=4", "optim.batch_size=16", f"run.folder={tmp_path}"]
    said = run("pretrain.py", *words).stderr  # 24 videos, four in a step
    assert "batch 4 = 1 processes x 1 accumulated x 4, 4 clips of each" in said and "x 16 / 256" in said
    assert "18 steps = 3 epochs x 6" in said and len(losses(tmp_path)) == 18
    parts = [*words[:-1], "run.batch_per_device=5", "data.workers=2", f"run.folder={tmp_path / 'parts'}"]
    run("pretrain.py", *parts)  # one video, four clips, at a time
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path), rel=1e-4)
    done = run("pretrain.py", *words, "data.repeats=3", f"run.folder={tmp_path / 'other'}", ok=False)
    assert done.returncode == 1 and "optim.batch_size=16 is not a multiple of data.repeats=3" in done.stderr


def test_tensorboard_gets_what_the_log_holds_also_when_resumed(settings, finished, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = [*settings["finetune"], "run.tensorboard=true", f"run.folder={tmp_path / 'run'}"]
    shutil.copytree(finished("finetune"), tmp_path / "run")
    content = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    for step in (4, 2):  # it resumes at step 4, then once more, earlier
        torch.save(content | dict(step=step), tmp_path / "run/checkpoint.pt")
        run("finetune.py", *words)
        board = events.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
        for name in ("loss", "lr", "top1", "test_top1"):
            logged = [
                (x["step"], pytest.approx(x[name])) for x in log(tmp_path / "run") if name in x and x["step"] > step
            ]
            assert [(event.step, event.value) for event in board.Scalars(name)] == logged


def test_tensorboard_that_is_missing_ends_in_a_sentence(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it was not installed
    done = run("pretrain.py", *settings["pretrain"], "run.tensorboard=true", f"run.folder={tmp_path}", ok=False)
    assert done.returncode == 1 and "run.tensorboard=true needs TensorBoard: pip install tensorboard" in done.stderr


# ---- the optimizer ----


def paper_layer(name: str, depth: int) -> int:
    """Table 10's layer-wise lr decay: 0 the cube embedding, 1 to depth the blocks, then what follows the encoder."""
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    return 0 if name.startswith("encoder.patch_embed.") else int(block[1]) + 1 if block else depth + 1


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "detect_ava"])
def test_weights_move_as_adamw_of_the_paper_moves_them(stage, settings, tmp_path, monkeypatch):
    """Between any two steps, from the gradient that the first moment reveals: betas, decay, rates (Tables 9, 10)."""
    contents, save = [], support.run.save_checkpoint

    def spy(path: Path, content: dict) -> None:
        save(path, content)
        contents.append(torch.load(path, weights_only=True))

    monkeypatch.setattr(support.run, "save_checkpoint", spy)
    betas, decay, layer_decay = (0.8, 0.97), 0.3, 0.6
    more = ["run.checkpoint_every=1", f"optim.betas={list(betas)}", f"optim.weight_decay={decay}", "run.pictures=0"]
    if stage == "finetune":
        more.remove("run.pictures=0")
    if stage != "pretrain":
        more.append(f"optim.layer_decay={layer_decay}")
    run(f"{stage}.py", *settings[stage], *more, "data.workers=0", f"run.folder={tmp_path}")

    steps, optim = len(contents), contents[0]["config"]["optim"]
    names = list(contents[0]["model"])
    depth = contents[0]["model_options"]["depth"]
    places = {}  # in which group each parameter is, by its number
    groups = contents[0]["optimizer"]["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    assert sorted(numbers) == list(range(len(names)))  # each exactly once
    shapes = {number: contents[-1]["optimizer"]["state"][number]["exp_avg"].shape for number in numbers}
    moved = 0
    for before, after in zip(contents, contents[1:], strict=False):
        t = after["step"]
        lr = warmup_cosine(t - 1, steps, steps // 3, optim["base_lr"] * 8 / 256, optim["min_lr"] * 8 / 256)
        unused = set(numbers)
        for name in names:
            old, new = before["model"][name].double(), after["model"][name].double()
            scale = layer_decay ** (depth + 1 - paper_layer(name, depth)) if stage != "pretrain" else 1.0
            decays = old.ndim > 1 and name != "mask_token"
            found = []
            for number in [places[name]] if name in places else sorted(unused):
                if shapes[number] != old.shape:
                    continue
                first, second = (before["optimizer"]["state"][number], after["optimizer"]["state"][number])
                gradient = (second["exp_avg"].double() - betas[0] * first["exp_avg"].double()) / (1 - betas[0])
                v = betas[1] * first["exp_avg_sq"].double() + (1 - betas[1]) * gradient**2
                if not torch.allclose(v, second["exp_avg_sq"].double(), rtol=2e-2, atol=1e-12):
                    continue
                m_hat, v_hat = (
                    second["exp_avg"].double() / (1 - betas[0] ** t),
                    second["exp_avg_sq"].double() / (1 - betas[1] ** t),
                )
                step = lr * scale * m_hat / (v_hat.sqrt() + 1e-8)
                wanted = old * (1 - lr * scale * (decay if decays else 0)) - step
                if torch.allclose(new, wanted, rtol=0, atol=2e-2 * float(step.abs().max()) + 1e-7):
                    found.append(number)
            assert found, (name, t)
            places.setdefault(name, found[0]) if len(found) == 1 else None
            moved += not torch.equal(old, new)
    assert moved > 2 * len(names)


# ---- processes, workers, accumulation, memory ----


@pytest.mark.parametrize(
    "stage, processes, more",
    [
        ("pretrain", 1, ["data.workers=0"]),
        ("pretrain", 2, ["data.workers=2", "run.batch_per_device=3"]),
        ("finetune", 2, ["data.workers=0", "run.batch_per_device=4", "run.recompute=true"]),
        ("probe", 2, ["data.workers=0", "run.batch_per_device=2"]),
        ("detect_ava", 2, ["data.workers=2", "run.batch_per_device=1"]),
    ],
)
def test_results_do_not_depend_on_processes_workers_or_micro_batches(
    stage, processes, more, settings, finished, tmp_path
):
    """Without what is drawn on each device."""
    done = run(f"{stage}.py", *settings[stage], *more, f"run.folder={tmp_path}", processes=processes)
    parts = {"pretrain": (2, 2), "finetune": (2, 2), "probe": (2, 2), "detect_ava": (4, 1)}
    accumulated, at_once = parts[stage] if processes == 2 else (1, 8)
    assert f"batch 8 = {processes} processes x {accumulated} accumulated x {at_once}" in done.stderr
    assert done.stderr.count("starting at step 0") == 1  # rank 0 alone speaks
    assert losses(tmp_path) == pytest.approx(losses(finished(stage)), rel=1e-4)
    ours, theirs = tensors(tmp_path), tensors(finished(stage))
    moments = [name for name in theirs if name.endswith((".exp_avg", ".momentum_buffer"))]
    for name in moments:  # gradients: AdamW's steps would not show it if all were twice as large
        assert float((ours[name] - theirs[name]).norm()) <= 1e-2 * float(theirs[name].norm()) + 1e-6, name
    assert moments
    for name in RESULTS[stage]:
        ours, theirs = (re.findall(r"[\d.]{5,}", (folder / name).read_text()) for folder in (tmp_path, finished(stage)))
        assert len(ours) == len(theirs)
        assert [*map(float, ours)] == pytest.approx([*map(float, theirs)], abs=2e-2 if stage == "detect_ava" else 1e-4)


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "detect_ava"])  # the others load as these do
def test_loader_workers_that_are_spawned_give_the_same_run(stage, settings, finished, tmp_path):
    """As on macOS and Windows, where there is no fork."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        more = [] if stage == "pretrain" else ["run.validate_every=0"]
        run(f"{stage}.py", *settings[stage], *more, "data.workers=1", f"run.folder={tmp_path}")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert losses(tmp_path) == losses(finished(stage))


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "detect_ava"])
def test_activation_checkpointing_changes_nothing(stage, settings, tmp_path):
    same = [*settings[stage], *EVERYTHING_RANDOM[stage], "optim.epochs=1", "run.batch_per_device=4", "data.workers=0"]
    for name in ("false", "true"):
        run(f"{stage}.py", *same, f"run.recompute={name}", f"run.folder={tmp_path / name}")
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("false", "true")
    )
    assert losses(tmp_path / "false") == losses(tmp_path / "true") and len(losses(tmp_path / "true")) >= 2
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_trace_names_the_work_of_three_steps_and_changes_nothing(settings, finished, tmp_path):
    run("pretrain.py", *settings["pretrain"], "run.profile=true", f"run.folder={tmp_path}")
    events = [event.get("name", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    steps = {name for name in events if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    assert {"aten::addmm", "aten::scaled_dot_product_attention", "aten::_fused_adamw_"} <= set(events)
    assert losses(tmp_path) == losses(finished("pretrain")) and not (finished("pretrain") / "trace.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only where there is a GPU can the loop wait for it")
@pytest.mark.parametrize("compiled", ["never", "always"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_gpu(stage, compiled, settings, tmp_path, monkeypatch):
    """PyTorch raises at any call that waits, from the third step on; the last, which saves a checkpoint, may wait."""
    if (stage, compiled) == ("detect_ava", "always"):
        pytest.skip("compiled again for another number of persons")
    steps_of = support.run.Run.steps

    def strict(self: support.run.Run) -> Iterator[int]:
        for step in steps_of(self):
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < self.total - 1 else "default")
            yield step

    monkeypatch.setattr(support.run.Run, "steps", strict)
    more = [f"run.compile={compiled}", "run.log_every=2", "run.checkpoint_every=1000", f"run.folder={tmp_path}"]
    config = load_config(module(stage).DEFAULT, [*settings[stage], *EVERYTHING_RANDOM[stage], *more])
    try:
        module(stage).train(config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses(tmp_path)) > 1


# ---- broken videos and mistakes ----


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "probe", "baselines/moco_v3"])
def test_broken_videos_are_survived_counted_and_named(stage, settings, toy_videos, tmp_path):
    videos = sorted((toy_videos / "train").rglob("*.mp4"))
    broken = tmp_path / videos[5].parent.name / "broken.mp4"
    broken.parent.mkdir()
    broken.write_bytes(videos[5].read_bytes()[:700])
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*videos[:5], broken, *videos[6:]]))
    more = [f"data.train={tmp_path / 'list.txt'}", "optim.epochs=1", f"run.folder={tmp_path / 'run'}", "data.workers=0"]
    done = run(f"{stage}.py", *settings[stage], *more)
    assert "replaced by another video: " in done.stderr and "1 broken videos were replaced by others" in done.stderr
    assert f"{broken}: " in (tmp_path / "run/broken_videos.txt").read_text()


MISTAKES = [
    (STAGES, "optim.base_lrr=1", "unknown key 'optim.base_lrr'; the nearest valid key is 'optim.base_lr'"),
    (STAGES, "data.frames=sixteen", "data.frames expects int such as"),
    (STAGES, "data.size=40", "40 pixels of height is not a whole number of cubes of 16; choose a multiple of 16"),
    (STAGES, "data.frames=5", "5 frames is not a whole number of cubes of 2"),
    (STAGES, "model.size=XL", "model.size=XL is not known; choose one of tiny, S, B, L, H"),
    (STAGES, "model.cube=[2,8]", "model.cube expects list such as [2, 16, 16]"),
    (STAGES, "run.log_every=0", "run.log_every=0 has to be at least 1"),
    (STAGES, "optim.epochs=0", "optim.epochs=0 has to be at least 1"),
    (STAGES, "run.precision=fp16", "run.precision=fp16 is not known"),
    (STAGES, "optim.batch_size=1000", "are fewer than one batch: set optim.batch_size to"),
    (STAGES, "data.root=/nowhere", "there is no folder"),
    (DOWNSTREAM, "init=none.pt", "no weights at init=none.pt: make them with pretrain.py"),
    (DOWNSTREAM, "init=configs", "no weights at init=configs: make them with"),
    (DOWNSTREAM, "init=", "no weights at init="),
    (["probe"], "init=scratch", "no weights at init=scratch"),
    (["finetune", "probe"], "model.size=S", "does not fit this"),
    (["finetune", "probe"], "data.sampling=tsn", "data.sampling=tsn is not known; choose one of dense, uniform"),
    (["finetune", "probe"], "data.val=train/none.txt", "there is no folder or list file"),
    (["finetune", "probe"], "data.classes=none.txt", "data.classes: no class names can be read from none.txt"),
    (["finetune", "probe"], "data.test_clips=0", "data.test_clips=0 has to be at least 1"),
    (["finetune"], "data.repeats=0", "data.repeats=0 has to be at least 1"),
    (["finetune"], "data.randaugment=no", "data.randaugment expects list"),
    (["finetune"], "data.randaugment=[2]", "data.randaugment expects list"),
    (["finetune"], "data.crop_area=[0.5]", "data.crop_area expects list"),
    (["finetune"], "data.crop_area=[1, 0.5]", "data.crop_area=[1.0, 0.5] has to name the smaller number first"),
    (["finetune"], "mask.ratio=0.5", "unknown key 'mask.ratio'"),
    (["probe"], "optim.layer_decay=0.7", "unknown key 'optim.layer_decay'"),
    (["pretrain"], "mask.ratio=1.0", "a mask ratio of 1 masks 16 of 16 places"),
    (["pretrain"], "mask.type=tubes", "mask.type=tubes is not known; choose one of tube, random, frame"),
    (["pretrain"], "data.root=tests", "there is no folder or list file"),
    (["baselines/moco_v3"], "mask.ratio=0.5", "unknown key 'mask.ratio'"),
    (["baselines/moco_v3"], "run.batch_per_device=8", "set run.batch_per_device=16 (with run.recompute=true"),
    (["baselines/moco_v3"], "optim.batch_size=1", "optim.batch_size=1 leaves a clip without negatives"),
    (["baselines/moco_v3"], "moco.temperature=0", "moco.temperature=0.0 has to be at least 0.001"),
    (["baselines/moco_v3"], "moco.momentum=2", "moco.momentum=2.0 has to be at least 0 and at most 1"),
    (
        ["baselines/moco_v3"],
        "data.crop_area=[1, 0.5]",
        "data.crop_area=[1.0, 0.5] has to name the smaller number first",
    ),
    (
        ["detect_ava"],
        "data.size=80",
        "data.size=80 cannot be cropped from data.short_side=72",
    ),
    (["detect_ava"], "data.mean=[0.5]", "data.mean expects list such as"),
    (["detect_ava"], "data.rate=0", "data.rate=0.0 has to be at least 0.01"),
    (["detect_ava"], "data.actions=11", "unknown action 12, known are 1 to 11"),
    (["detect_ava"], "data.movies=nowhere", "there is no folder"),
    (["detect_ava"], "data.boxes=nowhere.csv", "no rows can be read from"),
    (["detect_ava"], "data.threshold=1.1", "has a score of 1.1 or more"),
    (["detect_ava"], "data.thresold=0.5", "the nearest valid key is 'data.threshold'"),
]


@pytest.mark.parametrize("stage, setting, sentence", [(s, m, t) for stages, m, t in MISTAKES for s in stages])
def test_mistakes_end_in_one_sentence_before_any_work(stage, setting, sentence, settings, tmp_path):
    folder = tmp_path / "run"
    done = run(f"{stage}.py", *settings[stage], "data.workers=0", setting, f"run.folder={folder}", ok=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"{Path(stage).name}.py: ")
    assert sentence in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not folder.exists()


def test_all_processes_end_with_the_sentence_and_torchrun_repeats_it_at_the_end_of_its_report(settings, tmp_path):
    import filelock

    with filelock.FileLock(tmp_path / ".lock"):  # as a run at work there has it
        done = run("pretrain.py", *settings["pretrain"], f"run.folder={tmp_path}", processes=2, ok=False)
    sentence = f"pretrain.py: another run is at work in {tmp_path}: wait for it, stop it, or set another run.folder"
    assert done.returncode != 0 and "Error:" not in done.stderr.replace("ChildFailedError:", "")
    assert f"  traceback : {sentence}" in done.stderr.splitlines()[-3:]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_given_another_stages_file_says_so(stage):
    other = STAGES[STAGES.index(stage) - 1]
    path = module(other).DEFAULT
    with pytest.raises(UserError, match=r"toy.yaml: unknown key '.*is it another stage's\?|toy.yaml: unknown key"):
        load_config(module(stage).DEFAULT, [str(path)])


def test_config_yaml_is_plain_yaml(finished):
    content = yaml.safe_load((finished("pretrain") / "config.yaml").read_text())
    assert content["optim"]["batch_size"] == 8 and content["mask"]["ratio"] == 0.75
