"""The toy videos that every stage runs on by default: one shape on a smooth background, moving in one of eight directions.

    python toy.py toy_videos        # renders what is not there yet; the stages do it by themselves on first use

Motion alone decides the class, as in Something-Something: in every frame of every class the shape is anywhere with the
same probability (it wraps around), so a single frame is worth chance. Backgrounds and shapes are smooth colour gradients:
a tenth of the cubes tells much about the others, and the rest is where the shape will be.
"""

import argparse
import json
import math
import multiprocessing
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import UserError, launch
from data import write_mp4

CLASSES = tuple(f"moving {way}" for way in ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right"))
SIZE, FRAMES, RATE = 64, 24, 12  # pixels, frames a video, frames a second
FOLDER = Path("toy_videos")
VIDEOS = {"train": 4000, "val": 800}


def render(folder: Path, videos: dict[str, int] = VIDEOS, seed: int = 0) -> Path:
    """Make sure that `folder` holds the toy videos as split/class/number.mp4 and classes.txt; returns `folder`.

    Every video depends on (seed, split, number) alone and is renamed into place when whole, so an interrupted rendering
    is finished by the next call. Raises UserError if the folder holds videos of other settings.
    """
    settings = dict(seed=seed, videos=videos, size=SIZE, frames=FRAMES, classes=list(CLASSES))
    mark = folder / "settings.json"
    if mark.exists() and mark.read_text() != json.dumps(settings):
        raise UserError(f"{folder} holds toy videos of other settings; delete it or choose another folder")
    if not mark.exists() or not (folder / "classes.txt").exists():
        for split in videos:
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(settings))
        wanted = [(split, number) for split, count in videos.items() for number in range(count)]
        # spawn, not fork: PyTorch's threads may be running already
        with multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = pool.imap_unordered(partial(_render_one, folder, seed), wanted, chunksize=16)
            for _ in tqdm(done, f"rendering toy videos into {folder}", len(wanted), unit="video"):
                pass
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))  # last: it says that all are there
    return folder


def find(data: SimpleNamespace, world_size: int) -> tuple[str, str, str]:
    """`data.root`, `data.train` and `data.val` of a configuration; the toy videos, rendered if need be, without a root."""
    if data.root:
        return data.root, data.train, data.val
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        render(FOLDER)
    if world_size > 1:
        dist.barrier()
    return str(FOLDER), "train", "val"


def _render_one(folder: Path, seed: int, wanted: tuple[str, int]) -> None:
    split, number = wanted
    motion = CLASSES[number % len(CLASSES)]
    path = folder / split / motion / f"{number:05d}.mp4"
    if not path.exists():
        generator = torch.Generator().manual_seed((seed * len(VIDEOS) + list(VIDEOS).index(split)) * 10**7 + number)
        part = path.with_suffix(".part")
        # Nearly lossless: per-cube normalisation would blow up the coding noise of flat areas.
        write_mp4(part, render_clip(motion, generator), RATE, quantizer=10)
        os.replace(part, path)


def trajectory(motion: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position x and y in pixels, angle in turns and size in pixels of the shape in each frame: four times (FRAMES,).

    The first frame is drawn alike for all classes; as positions wrap around, uniform stays uniform in all others.
    Fast shapes matter: at 1.5 to 3 pixels a frame, hidden cubes can be guessed nearly as well without knowing the way
    that the shape takes, and pre-training takes twice as many clips to learn it.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    x, y, turn, size, speed = uniform(0, SIZE), uniform(0, SIZE), uniform(0, 1), uniform(11, 22), uniform(2.5, 4)
    direction = 2 * math.pi * CLASSES.index(motion) / len(CLASSES)
    time, still = torch.arange(FRAMES).float(), torch.ones(FRAMES)
    return x + speed * math.cos(direction) * time, y + speed * math.sin(direction) * time, turn * still, size * still


def render_clip(motion: str, generator: torch.Generator) -> Tensor:
    """One video as uint8 (FRAMES, 3, SIZE, SIZE)."""
    x, y, turn, size = (of_frame[:, None, None] for of_frame in trajectory(motion, generator))
    rows, columns = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")  # (SIZE, SIZE)
    background = _gradient(columns / SIZE, rows / SIZE, torch.rand(4, 3, generator=generator))  # (SIZE, SIZE, 3)
    # Nearest copy of the shape on a torus: what leaves on one side comes back on the other.
    dx = (columns - x + SIZE / 2) % SIZE - SIZE / 2  # (FRAMES, SIZE, SIZE)
    dy = (rows - y + SIZE / 2) % SIZE - SIZE / 2
    angle = 2 * math.pi * turn
    u = (dx * angle.cos() + dy * angle.sin()) / size  # the shape's own axes, about -1 to 1
    v = (dy * angle.cos() - dx * angle.sin()) / size
    outline = _outline(torch.atan2(v, u), int(torch.randint(6, (), generator=generator)))
    inside = ((outline - (u * u + v * v).sqrt()) * size + 0.5).clamp(0, 1)[..., None]  # anti-aliased edge
    other = 0.25 + 0.5 * ((background.mean(dim=(0, 1)) + 0.5) % 1)  # a colour that stands out, and room around it
    colours = other + 0.5 * (torch.rand(4, 3, generator=generator) - 0.5)
    shape = _gradient((u + 1) / 2, (v + 1) / 2, colours)  # (FRAMES, SIZE, SIZE, 3)
    clip = background + inside * (shape - background)
    return (clip.clamp(0, 1) * 255).round().byte().permute(0, 3, 1, 2)


def _gradient(u: Tensor, v: Tensor, corners: Tensor) -> Tensor:
    """Bilinear blend of four corner colours (4, 3) over coordinates from 0 to 1: (..., 3)."""
    u, v = u[..., None], v[..., None]
    return (1 - v) * ((1 - u) * corners[0] + u * corners[1]) + v * ((1 - u) * corners[2] + u * corners[3])


def _outline(theta: Tensor, kind: int) -> Tensor:
    """Radius, at most about 1, of one of six outlines in the direction theta."""
    if kind < 3:  # triangle, square, pentagon
        sector = 2 * math.pi / (kind + 3)
        return math.cos(sector / 2) / (theta % sector - sector / 2).cos()
    if kind == 3:  # three-leaved flower
        return 0.7 + 0.3 * (3 * theta).cos()
    if kind == 4:  # ellipse
        return 0.5 / (1 - 0.75 * theta.cos() ** 2).sqrt()
    return 0.65 + 0.35 * theta.cos()  # drop


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the toy videos.")
    parser.add_argument("folder", type=Path)
    print(render(parser.parse_args().folder))


if __name__ == "__main__":
    launch(main)
