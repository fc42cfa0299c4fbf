"""Resuming, for all four stages: a run killed, stopped by a signal, of an older version, with other videos."""

import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    EVERYTHING_RANDOM,
    RESULTS,
    ROOT,
    STAGES,
    command,
    in_group,
    log,
    losses,
    random_run,
    run,
    run_with_signal,
    same_tensors,
)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_it_saves_a_run_resumes_bit_for_bit(stage, settings, finished, tmp_path):
    """The main process alone is killed, and its workers end; everything random is on."""
    reference, folder = random_run(finished, stage), tmp_path / "run"
    more = [*EVERYTHING_RANDOM[stage], f"run.folder={folder}", "data.workers=2"]
    run_with_signal(command(f"{stage}.py", *settings[stage], *more), "checkpoint.pt 2 SIGKILL itself")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3  # the next, of step 6, is not finished
    assert log(folder)[-1]["step"] > 3 and (folder / "checkpoint.tmp").exists()
    done = run(f"{stage}.py", *settings[stage], *more)
    assert "starting at step 3\n" in done.stderr
    assert same_tensors(folder, reference) and losses(folder) == losses(reference)
    assert all((folder / name).read_bytes() == (reference / name).read_bytes() for name in RESULTS[stage])
    again = run(f"{stage}.py", *settings[stage], *more)  # finished: nothing is left to do
    assert f"starting at step {log(reference)[-1]['step']}" in again.stderr and losses(folder) == losses(reference)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_an_older_version_resumes(stage, settings, finished, tmp_path):
    """It does not know keys that came later, has one that is gone, and its groups say no lr_scale in pre-training."""
    reference, folder = finished(stage), tmp_path / "run"
    folder.mkdir()
    content = torch.load(reference / "checkpoint.pt", weights_only=True)
    del content["config"]["run"]["profile"]
    content["config"]["run"]["gone"] = 3
    if stage == "pretrain":
        for group in content["optimizer"]["param_groups"]:
            del group["lr_scale"]
    content["step"] -= 1
    torch.save(content, folder / "checkpoint.pt")
    done = run(f"{stage}.py", *settings[stage], f"run.folder={folder}")
    assert f"starting at step {content['step']}" in done.stderr and "run.gone, run.profile" in done.stderr
    assert len(losses(folder)) == 1


@pytest.mark.parametrize("change", [lambda names: [*names, "another"], lambda names: ["renamed", *names[1:]]])
def test_a_run_whose_classes_changed_does_not_resume(change, settings, finished, tmp_path):
    content = torch.load(finished("finetune") / "checkpoint.pt", weights_only=True)
    content["classes"] = change(content["classes"])
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run/checkpoint.pt")
    done = run("finetune.py", *settings["finetune"], f"run.folder={tmp_path / 'run'}", ok=False)
    assert done.returncode == 1 and "holds a run with other classes: set another run.folder" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]  # nothing is touched


@pytest.mark.parametrize(
    "name, receiver, processes", [("SIGUSR1", "group", 0), ("SIGTERM", "parent", 2), ("SIGUSR1", "itself", 2)]
)
def test_a_signal_of_a_cluster_saves_a_checkpoint_from_which_the_run_resumes(
    name, receiver, processes, settings, finished, tmp_path
):
    """Without torchrun, all processes get it, as from Slurm; with it, torchrun gets SIGTERM, one process SIGUSR1."""
    folder = tmp_path / "run"
    words = [*settings["pretrain"], "data.workers=1", "optim.epochs=8", f"run.folder={folder}"]
    line = command("pretrain.py", *words, "run.checkpoint_every=10", processes=processes)
    said = run_with_signal(line, f"checkpoint.pt 1 {name} {receiver}")
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 10 < step < 20 and log(folder)[-1]["step"] == step
    assert f"pretrain.py: stopped by {name} after step {step}: the same command resumes there" in said
    run("pretrain.py", *words, "run.checkpoint_every=10")
    reference = finished("pretrain", "optim.epochs=8")
    assert losses(folder) == pytest.approx(losses(reference), abs=0 if not processes else 1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_whose_list_of_videos_changed_resumes_only_if_told_to(stage, settings, finished, tmp_path):
    content = torch.load(finished(stage) / "checkpoint.pt", weights_only=True)
    content["videos"]["count"] += 1
    content["step"] -= 1
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(content, folder / "checkpoint.pt")
    done = run(f"{stage}.py", *settings[stage], f"run.folder={folder}", ok=False)
    sentence = (
        f"{content['videos']['count']} training videos, which are not the {content['videos']['count'] - 1} of now"
    )
    assert done.returncode == 1 and sentence in done.stderr and "resume by run.other_videos=true" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]  # nothing is touched
    run(f"{stage}.py", *settings[stage], f"run.folder={folder}", "run.other_videos=true")
    assert len(losses(folder)) == 1


@pytest.mark.parametrize("stage", ["finetune", "detect_ava"])
def test_a_run_resumes_without_the_file_it_started_from(stage, settings, pretrained, tmp_path, monkeypatch):
    init, folder = tmp_path / "init.pt", tmp_path / "run"
    shutil.copy(pretrained, init)
    words = [*settings[stage], f"init={init}", "data.frames=8", "data.size=64", f"run.folder={folder}"]
    replace = os.replace

    def interrupt(source: Path, target: Path) -> None:  # the second checkpoint, as ctrl-C would
        if Path(target).name == "checkpoint.pt" and Path(target).exists():
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    assert "interrupted: the same command resumes" in run(f"{stage}.py", *words, ok=False).stderr
    monkeypatch.undo()
    init.unlink()
    assert f"initialized from {folder}" in run(f"{stage}.py", *words).stderr
    start = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    shutil.rmtree(folder)
    shutil.copy(pretrained, init)
    run(f"{stage}.py", *words)
    whole = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(start[name], whole[name]) for name in whole)


@pytest.mark.parametrize("setting, then", [("optim.epochs=4", 3), ("run.seed=7", 0)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_belongs_to_its_configuration(stage, setting, then, settings, finished):
    folder, (key, now) = finished(stage), setting.split("=")
    done = run(f"{stage}.py", *settings[stage], f"run.folder={folder}", setting, ok=False)
    assert done.returncode == 1 and f"{folder} holds a run with {key}={then}, not {now}" in done.stderr


def test_a_folder_belongs_to_one_run_which_control_c_ends_in_a_sentence(settings, tmp_path):
    folder = tmp_path / "run"
    arguments = command("pretrain.py", *settings["pretrain"], "optim.epochs=5000", f"run.folder={folder}")
    # tests started in the background ignore ctrl-C, and so would the run
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        arguments, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=hear
    )
    while not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text():
        time.sleep(0.05)
    second = run(*arguments[1:], ok=False)
    assert second.returncode == 1 and f"another run is at work in {folder}: wait for it" in second.stderr
    assert "Traceback" not in second.stderr
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "interrupted: the same command resumes" in said and "Traceback" not in said
    assert not in_group(process.pid)
