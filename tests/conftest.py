"""Fixtures and helpers: real video files, real runs of the stages, real processes."""

import csv
import functools
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
import torch
from torch.distributed import TCPStore
from videos import number_of, numbered_frame, turn_by_90, two_streams, write_numbered  # noqa: F401

import support.processes
import support.toy_ava
import support.video
from model import SIZES, VideoMAE
from support import toy
from support.config import flatten

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = ROOT / "tests" / "signals"

STAGES = ["pretrain", "finetune", "probe", "detect_ava", "baselines/moco_v3"]
DOWNSTREAM = ["finetune", "probe", "detect_ava"]
RESULTS = {"finetune": ["scores.csv"], "probe": ["random/scores.csv"], "detect_ava": ["detections.csv"]}
RESULTS |= {"pretrain": [], "baselines/moco_v3": []}

# One thread everywhere: the losses of runs are compared to the bit.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
torch.set_num_threads(1)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", *(stage.replace("/", ".") for stage in STAGES)])


@pytest.fixture(scope="session")
def toy_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render 24 toy videos for training, 8 for validation."""
    return toy.render(tmp_path_factory.mktemp("toy") / "videos", {"train": 24, "val": 8})


@pytest.fixture(scope="session")
def toy_ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render toy videos for detection: 6 for training, 3 for validation. Tests must not change them."""
    return support.toy_ava.render(tmp_path_factory.mktemp("toy_ava") / "videos", {"train": 6, "val": 3})


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a pre-training checkpoint for clips of 8 x 32 x 32 with random weights, also in the last norm."""
    torch.manual_seed(5)
    model = VideoMAE(**SIZES["tiny"], decoder_depth=1, clip_size=(8, 32, 32), cube=(1, 8, 8), frames_per_token=1)
    for parameter in model.encoder.norm.parameters():
        parameter.data.add_(0.1 * torch.randn(128))
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pt"
    config = dict(optim=dict(epochs=1))
    torch.save(dict(model=model.state_dict(), model_options=model.options, step=3, config=config), path)
    return path


@pytest.fixture(scope="session")
def colored_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write videos of three classes, which are their colors: twelve for training, six for validation."""
    folder = tmp_path_factory.mktemp("colored")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                color = torch.randint(0, 40, (3,), generator=generator)
                color[number] += 180
                frames = color.view(1, 3, 1, 1) + torch.randint(0, 20, (8, 3, 32, 32), generator=generator)
                support.video.write_mp4(folder / split / name / f"{i}.mp4", frames.byte(), rate=8)
    return folder


RANDOM = {  # all that is sampled, in the loader and on the device
    "pretrain": ["data.flip=true", "mask.type=random", "data.scales=[1, 0.75]"],
    "finetune": [
        *("optim.mixup=0.8", "optim.cutmix=1.0", "model.drop_path=0.2", "model.dropout=0.5"),
        *("data.crop_area=[0.3, 1.0]", "data.crop_aspect=[0.75, 1.3333]", "data.erase=0.25"),
    ],
    "probe": ["data.scales=[1, 0.875, 0.75, 0.66]", "model.batch_norm=true"],
    "detect_ava": ["model.drop_path=0.5", "data.jitter_boxes=true", "data.jitter_colors=true"],
    "baselines/moco_v3": ["data.flip=true"],
}


@pytest.fixture(scope="session")
def settings(toy_videos, toy_ava, pretrained) -> dict[str, list[str]]:
    """Return for each stage the settings of nine to twelve steps of eight clips."""
    same = ["optim.batch_size=8", "optim.epochs=3", "optim.warmup_epochs=1"]
    same += ["run.log_every=1", "data.workers=0"]  # without processes: the fastest, for a few batches
    videos = [f"data.root={toy_videos}", "data.train=train", "data.val=val"]
    clips = ["data.frames=4", "data.stride=2"]
    small = [*clips, "data.size=16", "run.batch_per_device=16"]  # positions of 8 x 32 x 32 are interpolated
    augment = ["data.repeats=2", "data.randaugment=[4, 7, 0.5]", "data.flip=true", "run.validate_every=2"]
    augment += ["data.test_clips=2", "data.test_crops=3", "optim.layer_decay=0.7"]
    classes = [f"init={pretrained}", "data.classes=classes.txt", *small]
    detection = ["init=scratch", "data.short_side=36", "optim.layer_decay=0.7"]
    detection += ["run.pictures=1", "run.validate_every=2"]
    return {
        "pretrain": [*same, *videos, *clips, "optim.base_lr=0.02", "run.pictures=1", "run.validate_every=2"],
        "finetune": [*same, *videos, *classes, *augment],
        "probe": [*same, *videos, *classes, "model.batch_norm=false"],  # whose statistics depend on micro-batches
        "detect_ava": [*same, f"data.root={toy_ava}", *clips, *detection],
        "baselines/moco_v3": [*same, *videos[:2], *small, "moco.mlp_dim=32", "moco.dim=16"],
    }


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory) -> Callable[..., Path]:
    """Return finished(stage, *more): the folder of a run to its end by one plain process, made once."""

    @functools.cache
    def finish(stage: str, *more: str) -> Path:
        folder = tmp_path_factory.mktemp(Path(stage).name) / "run"
        done = run(f"{stage}.py", *settings[stage], *more, f"run.folder={folder}")
        (folder / "said.txt").write_text(done.stderr)
        (folder / "printed.txt").write_text(done.stdout)
        return folder

    return finish


def command(script: str, *arguments: object, processes: int = 0) -> list[str]:
    """Return the command line of a stage (a file) or a tool (a module), with `processes` through torchrun."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    module = [] if str(script).endswith(".py") else ["-m"]
    return [*launcher, *module, str(script), *map(str, arguments)]


def import_script(script: str) -> ModuleType:
    return importlib.import_module(str(script).removesuffix(".py").replace("/", "."))


def run(script: str, *arguments: object, processes: int = 0, cwd: Path = ROOT, ok: bool = True) -> CompletedProcess:
    """Run a command to its end, in this process or in new ones."""
    if processes:
        done = run_processes(script, *arguments, processes=processes)
    else:
        out, err, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr("sys.argv", [str(script), *map(str, arguments)])
            try:
                support.processes.launch(import_script(script).main)
            except SystemExit as end:
                status = end.code
        if isinstance(status, str):  # a sentence
            err.write(f"{status}\n")
            status = 1
        done = CompletedProcess([script, *arguments], status, out.getvalue(), err.getvalue())
    assert not ok or done.returncode == 0, done.stderr[-3000:]
    return done


def run_processes(script: str | Callable, *arguments: object, processes: int = 1) -> CompletedProcess:
    """Run a command, or a function, in processes as torchrun starts them. test_resume.py starts torchrun itself."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    same = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR=store.host, MASTER_PORT=store.port)
    same |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        ranks = [same | dict(RANK=rank, LOCAL_RANK=rank) for rank in range(processes)]
        forks = [fork(script, *arguments, environment=rank, out=out, err=err) for rank in ranks]
        for each in forks:
            each.join(timeout=300)
            each.kill()
        status = int(any(each.exitcode != 0 for each in forks))  # None of one that hung
        return CompletedProcess([script, *arguments], status, out.read_text(), err.read_text())


def run_with_signal(at: str, script: str | Callable, *arguments: object, processes: int = 0) -> str:
    """Run a command, or a function, until a signal has ended it and all processes it has started. Return its stderr.

    at: end of a file's name, number of the renaming to it, signal, receiver; see tests/signals. processes: torchrun's.
    """
    environment = dict(PYTHONPATH=str(SIGNALS), SIGNAL_AT=at)
    with tempfile.TemporaryDirectory() as folder:
        err = Path(folder, "err")
        if callable(script):
            process = fork(script, *arguments, environment=environment, out=Path(os.devnull), err=err)
            process.join(timeout=100)
            status = process.exitcode
        else:
            words = command(script, *arguments, processes=processes)
            with open(err, "w") as file:
                files = dict(stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
                process = subprocess.Popen(words, cwd=ROOT, env=os.environ | environment, **files)
            status = process.wait(timeout=100)
        until = time.monotonic() + 20
        while is_alive(process.pid) and time.monotonic() < until:  # the last ones are ending
            time.sleep(0.05)
        assert status and not is_alive(process.pid)
        return err.read_text()


def fork(script: str | Callable, *arguments: object, environment: dict, out: Path, err: Path) -> BaseProcess:
    """Start a command, or a function, in a fork of a process that has imported PyTorch, which takes seconds.

    It is not a fork of this one, where autograd's threads may run, or a GPU be in use.
    """
    process = FORKS.Process(target=run_in_fork, args=(script, arguments, environment, out, err))
    process.start()
    return process


def run_in_fork(script: str | Callable, arguments: tuple, environment: dict, out: Path, err: Path) -> None:
    multiprocessing.set_start_method(None, force=True)  # loader workers start as in a command, not by a fork server
    os.setsid()
    os.chdir(ROOT)
    os.environ |= {key: str(value) for key, value in environment.items()}
    sys.stdout, sys.stderr = open(out, "a", buffering=1), open(err, "a", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    sys.argv = [str(script), *map(str, arguments)]
    if "SIGNAL_AT" in environment:
        exec((SIGNALS / "sitecustomize.py").read_text(), {})
    support.processes.launch(script if callable(script) else import_script(script).main)


def log(folder: Path) -> list[dict]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return everything in a run's checkpoint that is a tensor."""
    content = flatten(torch.load(folder / "checkpoint.pt", weights_only=True))
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def same_tensors(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def is_alive(group: int) -> bool:
    """Return whether any process of a process group is alive."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, _, number, *_ = stat.read_text().rpartition(")")[2].split()
            if int(number) == group and state != "Z":
                return True
    return False
