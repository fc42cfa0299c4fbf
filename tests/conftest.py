"""Real video files, made on the spot, and real processes for the tests."""

import csv
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from videos import SIZE, audio_only, number_of, numbered_frame, turn_by_90, two_streams, write_numbered  # noqa: F401

import support.processes
import support.run
import support.toy_ava
import support.video
from model import SIZES, VideoMAE
from support import toy

ROOT = Path(__file__).resolve().parents[1]

STAGES = ["pretrain", "finetune", "probe", "detect_ava", "baselines/moco_v3"]
DOWNSTREAM = ["finetune", "probe", "detect_ava"]
RESULTS = {"finetune": ["scores.csv"], "probe": ["random/scores.csv"], "detect_ava": ["detections.csv"]}
RESULTS |= {"pretrain": [], "baselines/moco_v3": []}

# One thread everywhere: the losses of runs are compared to the bit.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
os.environ |= ENVIRONMENT
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 toy videos for training, 8 for validation."""
    return toy.render(tmp_path_factory.mktemp("toy") / "videos", {"train": 24, "val": 8})


@pytest.fixture(scope="session")
def toy_ava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy videos for detection: 6 for training, 3 for validation. Not to be changed."""
    return support.toy_ava.render(tmp_path_factory.mktemp("toy_ava") / "videos", {"train": 6, "val": 3})


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training checkpoint for clips of 8 x 64 x 64; its weights are random, its last norm too."""
    torch.manual_seed(5)
    model = VideoMAE(**SIZES["tiny"], decoder_depth=1, clip_size=(8, 64, 64))
    with torch.no_grad():
        model.encoder.norm.weight.add_(0.1 * torch.randn(128)), model.encoder.norm.bias.add_(0.1 * torch.randn(128))
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint.pt"
    config = dict(optim=dict(epochs=1))
    torch.save(dict(model=model.state_dict(), model_options=model.options, step=3, config=config), path)
    return path


@pytest.fixture(scope="session")
def coloured_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of three classes that their color tells: twelve for training, six for testing."""
    folder, generator = tmp_path_factory.mktemp("coloured"), torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                color = torch.randint(0, 40, (3,), generator=generator)
                color[number] += 180
                frames = color.view(1, 3, 1, 1) + torch.randint(0, 20, (8, 3, 32, 32), generator=generator)
                support.video.write_mp4(folder / split / name / f"{i}.mp4", frames.byte(), rate=8)
    return folder


EVERYTHING_RANDOM = {  # what is drawn on the device is drawn by each process
    "pretrain": ["data.flip=true", "mask.type=random", "data.scales=[1, 0.75]"],
    "finetune": [
        *("optim.mixup=0.8", "optim.cutmix=1.0", "model.drop_path=0.2", "model.dropout=0.5"),
        *("data.crop_area=[0.3, 1.0]", "data.crop_aspect=[0.75, 1.3333]", "data.erase=0.25"),
    ],
    "probe": ["data.scales=[1, 0.875, 0.75, 0.66]"],
    "detect_ava": ["model.drop_path=0.5", "data.jitter_boxes=true", "data.jitter_colors=true"],
    "baselines/moco_v3": ["data.flip=true"],
}


@pytest.fixture(scope="session")
def settings(toy_videos, toy_ava, pretrained) -> dict[str, list[str]]:
    """For each stage the settings of nine to twelve steps of eight clips."""
    same = [
        "optim.batch_size=8",
        "optim.epochs=3",
        "optim.warmup_epochs=1",
        "run.log_every=1",
        "run.checkpoint_every=3",
    ]
    videos = [f"data.root={toy_videos}", "data.train=train", "data.val=val"]
    small = ["data.frames=4", "data.size=32", "run.batch_per_device=16"]
    augment = [
        "data.repeats=2",
        "data.randaugment=[4, 7, 0.5]",
        "data.flip=true",
        "data.test_clips=2",
        "data.test_crops=3",
    ]
    classes = [f"init={pretrained}", "data.classes=classes.txt", *small]
    return {
        "pretrain": [*same, *videos, "optim.base_lr=0.02", "run.pictures=1"],
        "finetune": [*same, *videos, *classes, *augment, "optim.layer_decay=0.7", "run.validate_every=2"],
        "probe": [*same, *videos, *classes],
        "detect_ava": [*same, f"data.root={toy_ava}", "init=scratch", "optim.layer_decay=0.7", "run.pictures=1"],
        "baselines/moco_v3": [*same, *videos[:2], *small, "moco.mlp_dim=32", "moco.dim=16"],
    }


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory):
    """Runs to their end by one plain process, each made once: finished(stage, *more) is the folder."""
    done: dict[tuple, Path] = {}

    def make(stage: str, *more: str) -> Path:
        if (stage, more) not in done:
            folder = tmp_path_factory.mktemp(Path(stage).name) / "run"
            said = run(f"{stage}.py", *settings[stage], *more, f"run.folder={folder}")
            (folder / "said.txt").write_text(said.stderr)
            (folder / "printed.txt").write_text(said.stdout)
            done[stage, more] = folder
        return done[stage, more]

    return make


def command(script: str | Path, *arguments: object, processes: int = 0) -> list[str]:
    """The command line of a stage (its file) or of a command of support (its module), perhaps through torchrun."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    module = [] if str(script).endswith(".py") else ["-m"]
    return [*launcher, *module, str(script), *map(str, arguments)]


def run(
    script: str | Path, *arguments: object, processes: int = 0, cwd: Path = ROOT, ok: bool = True
) -> subprocess.CompletedProcess:
    """Run a command to its end: by torchrun, or in this process, since a new one takes seconds to start."""
    if processes:
        words = command(script, *arguments, processes=processes)
        done = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    else:
        name = str(script).removesuffix(".py").replace("/", ".")
        stage, out, err, status = importlib.import_module(name), io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr("sys.argv", [str(script), *map(str, arguments)])
            try:
                support.processes.launch(stage.main)
            except SystemExit as end:  # with its exit status, or with a sentence
                status = end.code if isinstance(end.code, int) else 1
                err.write("" if isinstance(end.code, int) else f"{end.code}\n")
        done = subprocess.CompletedProcess([script, *arguments], status, out.getvalue(), err.getvalue())
    assert not ok or done.returncode == 0, done.stderr[-3000:]
    return done


def run_with_signal(words: list[str], at: str, cwd: Path = ROOT) -> str:
    """Run a command until it ends of a signal, with all processes it has started. Returns what it said.

    at: ending of a file's name, which of the renamings to it, the signal, who gets it; see tests/signals.
    """
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "tests/signals"), "SIGNAL_AT": at}
    more = dict(cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, start_new_session=True, **more)
    _, said = process.communicate(timeout=100)  # until nobody is left to write into the pipe
    until = time.monotonic() + 20
    while in_group(process.pid) and time.monotonic() < until:  # the last ones are ending
        time.sleep(0.05)
    assert process.returncode != 0 and not in_group(process.pid)
    return said


def log(folder: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line]


def random_run(finished, stage: str) -> Path:
    return finished(stage, *EVERYTHING_RANDOM[stage])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a run's checkpoint that is a tensor."""

    def walk(value, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield from walk(item, f"{name}.{key}")
        if isinstance(value, torch.Tensor):
            yield name, value

    return dict(walk(torch.load(folder / "checkpoint.pt", weights_only=True), ""))


def same_tensors(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def in_group(group: int) -> list[str]:
    """Command lines of the living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append((stat.parent / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found
