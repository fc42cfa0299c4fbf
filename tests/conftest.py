"""Real video files, made on the spot, and real processes for the tests."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

import support.run
import support.video
from support import toy
from videos import SIZE, audio_only, number_of, numbered_frame, turn_by_90, two_streams, write_numbered  # noqa: F401

# One thread everywhere: the losses of runs are compared to the bit.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
os.environ |= ENVIRONMENT
torch.set_num_threads(1)

@pytest.fixture(scope="session")
def toy_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 toy videos for training, 8 for validation."""
    return toy.render(tmp_path_factory.mktemp("toy") / "videos", {"train": 24, "val": 8})


def command(*arguments: str, processes: int = 0) -> list[str]:
    """The command line that runs a stage: plain python, or torchrun with some processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [sys.executable]
    module = ["-m"] if "/" not in str(arguments[0]) and not str(arguments[0]).endswith(".py") else []
    return [*launcher, *module, *map(str, arguments)]


def run(script: str | Path, *arguments: str, processes: int = 0, cwd: Path = ROOT, ok: bool = True) -> subprocess.CompletedProcess:
    """Run a stage to its end and return what it printed: by torchrun, or in this process, since a new one takes seconds to start."""
    if processes:
        done = subprocess.run(command(script, *arguments, processes=processes), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    else:
        stage, out, err, status = importlib.import_module(Path(script).stem if str(script).endswith(".py") else str(script)), io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr("sys.argv", [str(script), *map(str, arguments)])
            try:
                support.run.launch(stage.main)
            except SystemExit as end:  # with its exit status, or with a sentence
                status = end.code if isinstance(end.code, int) else 1
                err.write("" if isinstance(end.code, int) else f"{end.code}\n")
        done = subprocess.CompletedProcess([script, *arguments], status, out.getvalue(), err.getvalue())
    assert not ok or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def coloured_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of three classes that their colour tells: twelve for training, six for testing."""

    folder, generator = tmp_path_factory.mktemp("coloured"), torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                colour = torch.randint(0, 40, (3,), generator=generator)
                colour[number] += 180
                frames = colour.view(1, 3, 1, 1) + torch.randint(0, 20, (8, 3, 32, 32), generator=generator)
                support.video.write_mp4(folder / split / name / f"{i}.mp4", frames.byte(), rate=8)
    return folder
