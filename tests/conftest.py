"""Real video files, made on the spot, and real processes for the tests."""

import importlib
import io
import os
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from av.stream import Disposition

ROOT = Path(__file__).resolve().parents[1]

import support.run
import support.video
from support import toy

# One thread everywhere: the losses of runs are compared to the bit.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
os.environ |= ENVIRONMENT
torch.set_num_threads(1)

SIZE = (96, 64)  # width, height: 6 x 4 black or white squares of 16 pixels, the bits of the frame's number


def numbered_frame(number: int, width: int = SIZE[0], height: int = SIZE[1]) -> av.VideoFrame:
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    columns = width // 16
    for bit in range(12):
        row, column = divmod(bit, columns)
        image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 230 if number >> bit & 1 else 20
    image[32:, :, 0] = torch.arange(width) * 2  # something smooth besides, for the encoder to predict
    image[32:, :, 1] = number * 7 % 200
    return av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")


def number_of(frame: torch.Tensor) -> int:
    """The number that a decoded frame (3, H, W) shows."""
    grey = frame.float().mean(0)
    columns = frame.shape[2] // 16
    bits = (grey[bit // columns * 16 + 4 : bit // columns * 16 + 12, bit % columns * 16 + 4 : bit % columns * 16 + 12].mean() > 125 for bit in range(12))
    return sum(int(bit) << place for place, bit in enumerate(bits))


def write_numbered(path: Path, count: int, codec: str = "libx264", options: dict | None = None, times: list[int] | None = None, pixel_format: str = "yuv420p") -> Path:
    """A video whose every frame shows its own number; `times` are presentation times in 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = SIZE
        stream.pix_fmt = pixel_format
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = numbered_frame(number)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn_by_90(path: Path) -> Path:
    """Set the display matrix in an mp4 file's track header to a quarter turn clockwise, as phones do."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44  # fields of a version 0 track header before the matrix
    content[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, SIZE[1] << 16, 0, 1 << 30)
    path.write_bytes(content)
    return path


def two_streams(path: Path, count: int) -> Path:
    """A small black track first, then the one that the file declares the default."""
    with av.open(str(path), "w") as container:
        other, stream = container.add_stream("libx264", rate=25), container.add_stream("libx264", rate=25)
        other.width, other.height, other.pix_fmt = 32, 32, "yuv420p"
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.disposition = Disposition.default
        still = av.VideoFrame.from_ndarray(torch.zeros(32, 32, 3, dtype=torch.uint8).numpy(), format="rgb24")
        for number in range(count):
            still.pts = None
            container.mux(other.encode(still))
            container.mux(stream.encode(numbered_frame(number)))
        container.mux(other.encode())
        container.mux(stream.encode())
    return path


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


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
