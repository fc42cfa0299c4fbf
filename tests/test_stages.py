"""What all stages and the baseline share, as real runs: log, optimizer, processes, memory, broken videos."""

import importlib
import json
import math
import multiprocessing
import re
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import DOWNSTREAM, RANDOM, RESULTS, STAGES, log, losses, run, same_tensors, tensors

import support.run
from support.config import as_dict, load_config
from support.run import warmup_cosine


def module(stage: str):
    return importlib.import_module(stage.replace("/", "."))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_its_log_configuration_and_checkpoint(stage, finished):
    folder = finished(stage, *RANDOM[stage])
    printed, lines = (folder / "said.txt").read_text(), [line for line in log(folder) if "loss" in line]
    steps = len(lines)
    assert steps == (6 if stage == "detect_ava" else 9)  # 21 key frames or 24 videos, 8 in a batch
    assert f"{steps} steps; starting at step 0" in printed
    assert {"loss", "step", "epoch", "lr", "clips_per_second", "waiting_for_data", "memory_gb"} <= set(lines[0])
    assert [line["step"] for line in lines] == list(range(1, steps + 1)) and lines[-1]["epoch"] == 3
    assert [line["step"] for line in log(folder)] == sorted(line["step"] for line in log(folder))
    assert all(math.isfinite(line["loss"]) and line["clips_per_second"] > 0 for line in lines)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    config = load_config(module(stage).DEFAULT, [str(folder / "config.yaml")])
    assert checkpoint["step"] == steps and checkpoint["config"] == as_dict(config)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == as_dict(config)
    assert config.run.folder == str(folder) and config.optim.batch_size == 8
    peak, end = (lr * 8 / 256 for lr in (config.optim.base_lr, getattr(config.optim, "min_lr", 0)))
    assert f"learning rate {config.optim.base_lr:g} x 8 / 256 = {peak:.4g}" in printed
    expected = [warmup_cosine(step, steps, steps // 3, peak, end) for step in range(steps)]
    assert [line["lr"] for line in lines] == pytest.approx(expected) and expected[0] == 0 < max(expected) <= peak
    assert not list(folder.glob("*.tmp")) and not (folder / "broken_videos.txt").exists()
    assert all((folder / name).exists() for name in RESULTS[stage])
    tested = [line[key] for line in log(folder) for key in ("test_top1", "test_mAP") if key in line]
    numbers = [f"{number:.2f}" for number in tested] or [f"loss {lines[-1]['loss']:.4f}"]
    result, _ = printed.splitlines()[-1].split(". Next: python ")
    assert result.startswith(f"{folder}: ") and all(number in result for number in numbers)
    assert (folder / "loss.png").exists() and (folder / "accuracy.png").exists() == (stage in DOWNSTREAM)


def test_repeats_in_pre_training_count_in_the_batch_and_not_in_epochs(settings, tmp_path):
    words = [*settings["pretrain"], "data.repeats=4", "optim.batch_size=16", f"run.folder={tmp_path}"]
    printed = run("pretrain.py", *words).stderr  # 24 videos, four in a step
    assert "batch of 4 videos = 1 processes x 1 accumulated x 4" in printed and "x 16 / 256" in printed
    assert "18 steps" in printed and len(losses(tmp_path)) == 18
    parts = [*words[:-1], "run.batch_per_device=5", "data.workers=2", f"run.folder={tmp_path / 'parts'}"]
    run("pretrain.py", *parts)  # one video, four clips, at a time
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path), rel=1e-4)


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
            lines = [line for line in log(tmp_path / "run") if name in line and line["step"] > step]
            logged = [(line["step"], pytest.approx(line[name])) for line in lines]
            assert [(event.step, event.value) for event in board.Scalars(name)] == logged


def test_tensorboard_that_is_missing_ends_in_a_sentence(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it was not installed
    done = run("pretrain.py", *settings["pretrain"], "run.tensorboard=true", f"run.folder={tmp_path}", ok=False)
    assert done.returncode == 1 and "run.tensorboard=true needs TensorBoard: pip install tensorboard" in done.stderr


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "detect_ava"])
def test_every_step_is_adamw_of_the_paper(stage, settings, tmp_path, monkeypatch):
    """Each parameter is in one group, with the learning rate, betas and decay of Tables 9, 10 and 12."""
    steps, cleared = [], []

    class AdamW(torch.optim.AdamW):
        def step(self) -> None:
            assert all(parameter.grad is not None for group in self.param_groups for parameter in group["params"])
            steps.append([dict(group) for group in self.param_groups])
            super().step()

        def zero_grad(self) -> None:
            cleared.append(len(steps))
            super().zero_grad()

    groups_of = Mock(side_effect=module(stage).parameter_groups)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    monkeypatch.setattr(module(stage), "parameter_groups", groups_of)
    more = ["optim.betas=[0.8, 0.97]", "optim.min_lr=0.003", "optim.weight_decay=0.3", "data.workers=0"]
    run(f"{stage}.py", *settings[stage], *more, f"run.folder={tmp_path}")
    optim = load_config(module(stage).DEFAULT, [str(tmp_path / "config.yaml")]).optim
    model = groups_of.call_args.args[0]
    depth = len(model.encoder.blocks)
    assert cleared == list(range(1, len(steps) + 1))
    for number, groups in enumerate(steps):
        lr = warmup_cosine(number, len(steps), len(steps) // 3, optim.base_lr * 8 / 256, optim.min_lr * 8 / 256)
        group_of = {parameter: group for group in groups for parameter in group["params"]}
        assert len(group_of) == sum(len(group["params"]) for group in groups)
        for name, parameter in model.named_parameters():
            group = group_of.pop(parameter)
            block = re.match(r"encoder\.blocks\.(\d+)\.", name)  # layer 0 is the cube embedding
            layer = 0 if name.startswith("encoder.patch_embed.") else int(block[1]) + 1 if block else depth + 1
            scale = 1.0 if stage == "pretrain" else 0.7 ** (depth + 1 - layer)
            assert group["lr"] == pytest.approx(lr * scale) and tuple(group["betas"]) == (0.8, 0.97), name
            assert group["weight_decay"] == (0.3 if parameter.ndim > 1 and name != "mask_token" else 0), name
        assert not group_of


@pytest.mark.parametrize(
    "stage, processes, more",
    [
        ("pretrain", 1, ["data.workers=1"]),
        ("pretrain", 2, ["data.workers=2", "run.batch_per_device=3"]),
        ("finetune", 2, ["data.workers=0", "run.batch_per_device=4", "run.recompute=true"]),
        ("probe", 2, ["data.workers=0", "run.batch_per_device=2"]),
        ("detect_ava", 2, ["data.workers=2", "run.batch_per_device=1"]),
    ],
)
def test_processes_workers_and_micro_batches_change_nothing(stage, processes, more, settings, finished, tmp_path):
    """Without what is sampled on each device."""
    done = run(f"{stage}.py", *settings[stage], *more, f"run.folder={tmp_path}", processes=processes)
    accumulated, at_once = (1, 8) if processes == 1 else (4, 1) if stage == "detect_ava" else (2, 2)
    assert f"batch of 8 videos = {processes} processes x {accumulated} accumulated x {at_once}" in done.stderr
    assert done.stderr.count("starting at step 0") == 1 and "Warning" not in done.stderr.replace("OMP_NUM_THREADS", "")
    assert losses(tmp_path) == pytest.approx(losses(finished(stage)), rel=1e-4)
    ours, theirs = tensors(tmp_path), tensors(finished(stage))
    moments = [name for name in theirs if name.endswith((".exp_avg", ".momentum_buffer"))]
    for name in moments:  # gradients: AdamW's steps would not show it if all were twice as large
        assert float((ours[name] - theirs[name]).norm()) <= 1e-2 * float(theirs[name].norm()) + 1e-6, name
    assert moments
    for key in ("val_loss", "reconstruction_error", "copy_error"):  # of pre-training
        ours, theirs = ([x[key] for x in log(folder) if key in x] for folder in (tmp_path, finished(stage)))
        assert ours == pytest.approx(theirs, rel=1e-4) and bool(ours) == (stage == "pretrain")
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


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("fp16", 0.003)])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_rounds_a_little_and_resumes_exactly(stage, precision, tolerance, settings, finished, tmp_path):
    words = [*settings[stage], f"run.precision={precision}", "data.workers=0", "run.keep_every=2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(f"{stage}.py", *words, f"run.folder={whole}")
    ours, theirs = losses(whole), losses(finished(stage))
    assert ours != theirs and ours[0] == pytest.approx(theirs[0], rel=tolerance)
    resumed.mkdir()
    shutil.copy(whole / "checkpoint_0002.pt", resumed / "checkpoint.pt")
    run(f"{stage}.py", *words, f"run.folder={resumed}")
    scalers = [torch.load(folder / "checkpoint.pt", weights_only=True).get("scaler") for folder in (whole, resumed)]
    assert same_tensors(whole, resumed) and scalers[0] == scalers[1]
    assert bool(scalers[0]) == (precision == "fp16" and stage != "probe")  # which has no gradients in fp16


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "detect_ava", "baselines/moco_v3"])
def test_a_step_whose_scaled_gradients_overflow_is_skipped(stage, settings, finished, tmp_path):
    content = torch.load(finished(stage) / "checkpoint.pt", weights_only=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80).state_dict()
    torch.save(content | dict(step=content["step"] - 1, scaler=scaler), tmp_path / "checkpoint.pt")
    run(f"{stage}.py", *settings[stage], "run.precision=fp16", "data.workers=0", f"run.folder={tmp_path}")
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert after["scaler"]["scale"] == 2.0**79 and len(losses(tmp_path)) == 1
    assert all(torch.equal(after["model"][name], content["model"][name]) for name in content["model"])


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "detect_ava"])
def test_activation_checkpointing_and_validation_change_nothing(stage, settings, finished, tmp_path):
    """The run that it is compared with is validated once, after two epochs. Validation turns drop path off."""
    more = [*RANDOM[stage], "run.recompute=true", "run.validate_every=1", f"run.folder={tmp_path}"]
    run(f"{stage}.py", *settings[stage], *more)
    assert same_tensors(tmp_path, finished(stage, *RANDOM[stage])) and len(losses(tmp_path)) >= 6


def test_a_trace_and_kept_checkpoints_change_nothing(settings, finished, tmp_path):
    run("pretrain.py", *settings["pretrain"], "run.profile=true", "run.keep_every=2", f"run.folder={tmp_path}")
    kept = {path.name: torch.load(path, weights_only=True)["step"] for path in tmp_path.glob("checkpoint*.pt")}
    assert kept == {"checkpoint.pt": 9, "checkpoint_0002.pt": 6}
    events = [event.get("name", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    steps = {name for name in events if name.startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    assert {"aten::addmm", "aten::scaled_dot_product_attention", "aten::_fused_adamw_"} <= set(events)
    assert losses(tmp_path) == losses(finished("pretrain")) and not (finished("pretrain") / "trace.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only where there is a GPU can the loop wait for it")
@pytest.mark.parametrize("compiled", ["never", "always"])
@pytest.mark.parametrize("stage", STAGES)
def test_only_lines_of_the_log_wait_for_the_gpu(stage, compiled, settings, tmp_path, monkeypatch):
    """PyTorch raises at any call that waits, from the third step to the last but one, where nothing is logged."""
    if (stage, compiled) == ("detect_ava", "always"):
        pytest.skip("compiled again for another number of persons")
    progress = support.run.Log.progress

    def strict(log: support.run.Log, steps: range):
        for step in progress(log, steps):
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < steps.stop - 1 else "default")
            yield step

    monkeypatch.setattr(support.run.Log, "progress", strict)
    more = [f"run.compile={compiled}", "run.log_every=1000", "run.checkpoint_every=1000", f"run.folder={tmp_path}"]
    config = load_config(module(stage).DEFAULT, [*settings[stage], *RANDOM[stage], *more])
    if hasattr(config.run, "validate_every"):
        config.run.validate_every = 0
    try:
        module(stage).train(config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(losses(tmp_path)) == 1


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "probe", "baselines/moco_v3"])
def test_broken_videos_are_survived_counted_and_named(stage, settings, toy_videos, tmp_path):
    videos = sorted((toy_videos / "train").rglob("*.mp4"))
    broken = tmp_path / videos[5].parent.name / "broken.mp4"
    broken.parent.mkdir()
    broken.write_bytes(videos[5].read_bytes()[:700])
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*videos[:5], broken, *videos[6:]]))
    more = [f"data.train={tmp_path / 'list.txt'}", "optim.epochs=2", f"run.folder={tmp_path / 'run'}", "data.workers=0"]
    done = run(f"{stage}.py", *settings[stage], *more)
    assert done.stderr.count("replaced by another video: ") == 1
    assert "1 broken videos were replaced by others" in done.stderr
    assert (tmp_path / "run/broken_videos.txt").read_text().startswith(f"{broken}: ")
