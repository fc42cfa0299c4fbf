"""Resuming, for all stages: a run killed, stopped by a signal, of an older version, with other videos or machines."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RANDOM, RESULTS, ROOT, STAGES, command, log, losses, run, run_with_signal, same_tensors

from support.checkpoint import load_checkpoint
from support.config import UserError, load_config


def run_of(folder: Path, reference: Path, **changes) -> dict:
    """A run's folder with the checkpoint of a finished one, one step earlier and with other content."""
    folder.mkdir()
    content = torch.load(reference / "checkpoint.pt", weights_only=True)
    content |= dict(step=content["step"] - 1) | changes
    torch.save(content, folder / "checkpoint.pt")
    return content


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_it_saves_a_run_resumes_bit_for_bit(stage, settings, finished, tmp_path):
    """The main process alone is killed, and its workers end; everything random is on."""
    reference, folder = finished(stage, *RANDOM[stage]), tmp_path / "run"
    more = [*RANDOM[stage], f"run.folder={folder}", "run.checkpoint_every=4"]  # not a divisor of the steps
    run_with_signal("checkpoint.pt 2 SIGKILL itself", f"{stage}.py", *settings[stage], *more, "data.workers=2")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4  # the next one is not finished
    assert (folder / "checkpoint.tmp").exists()
    done = run(f"{stage}.py", *settings[stage], *more)
    assert "starting at step 4\n" in done.stderr
    assert same_tensors(folder, reference) and losses(folder) == losses(reference)
    assert all((folder / name).read_bytes() == (reference / name).read_bytes() for name in RESULTS[stage])
    again = run(f"{stage}.py", *settings[stage], *more)  # finished: nothing is left to do
    assert f"starting at step {log(reference)[-1]['step']}" in again.stderr and losses(folder) == losses(reference)


@pytest.mark.parametrize("stage", STAGES)
def test_of_another_version_a_run_resumes_and_with_other_videos_on_request(stage, settings, finished, tmp_path):
    reference, folder = finished(stage), tmp_path / "run"
    content = run_of(folder, reference)
    del content["config"]["run"]["profile"]
    content.pop("scaler", None)
    content["config"]["run"]["gone"] = 3
    torch.save(content | dict(videos=dict(count=99, digest="")), folder / "checkpoint.pt")
    done = run(f"{stage}.py", *settings[stage], f"run.folder={folder}", ok=False)
    assert done.returncode == 1 and "99 training videos, which differ from today's" in done.stderr
    assert "resume with run.other_videos=true" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]  # nothing is touched
    done = run(f"{stage}.py", *settings[stage], f"run.folder={folder}", "run.other_videos=true", "run.precision=fp16")
    assert f"starting at step {content['step']}" in done.stderr and "run.gone, run.profile" in done.stderr
    assert len(losses(folder)) == 1


ANOTHER_RUN = [  # stage, what another run's checkpoint holds, a setting, and what is said
    ("finetune", dict(classes=["a", "b"]), "", "other classes: set another run.folder"),
    ("detect_ava", dict(actions={1: "a"}), "", "other actions: set another run.folder"),
    ("probe", dict(encoder="another"), "", "other encoder: set another run.folder"),
    *((stage, {}, "optim.batch_size=4", "optim.batch_size=8, not 4") for stage in STAGES),
    *((stage, {}, "run.seed=7", "run.seed=0, not 7") for stage in STAGES),
]


@pytest.mark.parametrize("stage, changes, setting, sentence", ANOTHER_RUN)
def test_a_folder_holds_one_run_alone(stage, changes, setting, sentence, settings, finished, tmp_path):
    folder = tmp_path / "run"
    run_of(folder, finished(stage), **changes)
    done = run(f"{stage}.py", *settings[stage], f"run.folder={folder}", *setting.split(), ok=False)
    assert done.returncode == 1 and f"{folder} holds a run with {sentence}" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_extended_and_not_shortened(stage, settings, finished, tmp_path):
    """All steps before the end were warm-up: the run equals one that was as long from the start."""
    constant = ["moco.momentum=1"] if stage == "baselines/moco_v3" else []
    short = finished(stage, "optim.warmup_epochs=3", *constant)
    steps = log(short)[-1]["step"]
    longer = [*settings[stage], *constant, f"optim.steps={steps + 2}", f"optim.warmup_steps={steps}"]
    shutil.copytree(short, tmp_path / "extended")
    done = run(f"{stage}.py", *longer, f"run.folder={tmp_path / 'extended'}")
    sentence = f"the run of {steps} steps continues to {steps + 2}; the learning rate follows the new schedule"
    assert sentence in done.stderr and f"{steps + 2} steps; starting at step {steps}\n" in done.stderr
    assert "continues" not in run(f"{stage}.py", *longer, f"run.folder={tmp_path / 'whole'}").stderr
    assert same_tensors(tmp_path / "extended", tmp_path / "whole")
    assert losses(tmp_path / "extended") == losses(tmp_path / "whole")
    done = run(f"{stage}.py", *longer, f"optim.steps={steps}", f"run.folder={tmp_path / 'whole'}", ok=False)
    assert f"a run of {steps + 2} steps, {steps + 2} of them done: {steps} are too few, set optim.steps" in done.stderr


SIGNALS = [("SIGUSR1", "group", 0), ("SIGINT", "group", 0), ("SIGTERM", "parent", 2), ("SIGUSR1", "itself", 2)]


@pytest.mark.parametrize("name, receiver, processes", SIGNALS)
def test_a_signal_saves_a_checkpoint_and_the_run_resumes(name, receiver, processes, settings, finished, tmp_path):
    """Without torchrun, all processes get it, as from Slurm or ctrl-C; torchrun gets SIGTERM, one process SIGUSR1."""
    folder = tmp_path / "run"
    words = [*settings["pretrain"], "data.workers=1", "optim.epochs=8", f"run.folder={folder}"]
    words.append("run.checkpoint_every=10")
    printed = run_with_signal(f"checkpoint.pt 1 {name} {receiver}", "pretrain.py", *words, processes=processes)
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 10 <= step < 20 and log(folder)[-1]["step"] == step
    assert f"pretrain.py: stopped by {name} after step {step}: the same command resumes there" in printed
    if not processes:
        assert "Traceback" not in printed
    run("pretrain.py", *words)
    reference = finished("pretrain", "optim.epochs=8")
    assert losses(folder) == pytest.approx(losses(reference), abs=0 if not processes else 1e-5)


@pytest.mark.parametrize("stage, checkpoint", [("finetune", 2), ("detect_ava", 3)])
def test_a_signal_ends_validation_and_the_test_at_once(stage, checkpoint, settings, tmp_path):
    """The signal comes with the checkpoint before the validation of fine-tuning and before the test of detection."""
    words = [*settings[stage], f"run.folder={tmp_path}", "run.validate_every=1"]
    printed = run_with_signal(f"checkpoint.pt {checkpoint} SIGTERM itself", f"{stage}.py", *words)
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert f"{stage}.py: stopped by SIGTERM" in printed and "Traceback" not in printed
    assert step == log(tmp_path)[-1]["step"] and not (tmp_path / RESULTS[stage][0]).exists()


@pytest.mark.parametrize("stage", ["finetune", "detect_ava"])
def test_a_run_resumes_without_the_file_it_started_from(stage, settings, pretrained, tmp_path):
    init, whole, resumed = tmp_path / "init.pt", tmp_path / "whole", tmp_path / "resumed"
    shutil.copy(pretrained, init)
    words = [*settings[stage], f"init={init}", "data.frames=8", "data.size=32", "run.keep_every=2"]
    run(f"{stage}.py", *words, f"run.folder={whole}")
    init.unlink()
    resumed.mkdir()
    shutil.copy(whole / "checkpoint_0002.pt", resumed / "checkpoint.pt")
    run(f"{stage}.py", *words, f"run.folder={resumed}")
    assert same_tensors(resumed, whole)


def test_weights_that_are_not_finite_are_not_saved_and_a_lower_learning_rate_may_follow(settings, tmp_path):
    words = [*settings["pretrain"], "optim.warmup_epochs=0", f"run.folder={tmp_path}", "run.log_every=100"]
    run("pretrain.py", *words, "optim.epochs=3", "run.checkpoint_every=2")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(content | dict(step=2), tmp_path / "checkpoint.pt")
    done = run("pretrain.py", *words, "optim.base_lr=1e30", "run.checkpoint_every=8", ok=False)
    assert done.returncode == 1 and "weights are not finite at step" in done.stderr
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in saved["model"].values())
    run("pretrain.py", *words, "optim.base_lr=0.01")


def test_a_folder_belongs_to_one_run(settings, tmp_path):
    import filelock

    with filelock.FileLock(tmp_path / ".lock"):
        words = command("pretrain.py", *settings["pretrain"], f"run.folder={tmp_path}", processes=2)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    sentence = f"pretrain.py: another run is at work in {tmp_path}: wait for it, stop it, or set another run.folder"
    assert done.returncode != 0 and "Error:" not in done.stderr.replace("ChildFailedError:", "")
    assert f"  traceback : {sentence}" in done.stderr[-600:]  # torchrun repeats it at the end of its report


def test_two_machines_train_as_one_process_does(settings, finished, tmp_path):
    """Two agents of torchrun, one process each, on the loopback address."""
    words = [*settings["pretrain"], "run.pictures=0", f"run.folder={tmp_path / 'run'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--master_addr=127.0.0.1", "--master_port=29517"]
    lines = [[*launcher, f"--node_rank={rank}", "pretrain.py", *words] for rank in (0, 1)]
    pipes = dict(stderr=subprocess.PIPE, text=True)
    machines = [subprocess.Popen(line, cwd=ROOT, **pipes) for line in lines]
    printed = [machine.communicate(timeout=120)[1] for machine in machines]
    assert not any(machine.returncode for machine in machines), printed[0][-2000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(finished("pretrain")), rel=1e-4)


OTHER_MACHINES = [  # the step of its checkpoint and its number of videos, not 0 and 24, and what is said
    ((8, 24), r"checkpoints of different steps \(0, 8\) in .* has to be on a disk that all machines share"),
    ((0, 23), r"different training videos \(24, 23\): give all machines the same data.root"),
]


@pytest.mark.parametrize("other, sentence", OTHER_MACHINES)
def test_machines_with_different_checkpoints_or_videos_end_with_a_sentence(other, sentence, tmp_path, monkeypatch):
    default, (step, count) = ROOT / "configs/pretrain/toy.yaml", other
    state = step, dict(count=count, digest=f"of {count}")
    monkeypatch.setattr("support.checkpoint.gather", lambda states: [*states, state])  # as of the other machine
    config = load_config(default, [f"run.folder={tmp_path}"])
    with pytest.raises(UserError, match=f"processes find {sentence}"):
        load_checkpoint(config, default, videos=dict(count=24, digest="of 24"))
