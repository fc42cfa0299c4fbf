"""The toy videos, on which every stage runs by default: one bright shape that moves in front of a dark background.

How it moves, on one of four lines, is the class, as in Something-Something. What moves, one of three shapes, is a
second set of labels, as in Kinetics: shapes_train.csv and shapes_val.csv. In every frame the shape is anywhere with the
same probability, so a single frame tells nothing about the class.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from support.config import UserError
from support.lists import find_splits
from support.seeds import random_below
from support.video import write_mp4

CLASSES = ("horizontal", "main diagonal", "vertical", "antidiagonal")  # the line on which the shape moves, either way
SHAPES = ("disc", "square", "diamond")
SIZE, FRAMES, RATE = 32, 24, 12  # pixels, frames per video, frames per second
DARK, BRIGHT = 0.1, 0.9  # background and shape
SPEED = (0.9, 1.3)  # pixels per frame
RADIUS = (4.5, 5.5)  # pixels, of the disc; all shapes have the area of the disc
FOLDER, VIDEOS = Path("toy_videos"), {"train": 4000, "val": 800}


def find(data: SimpleNamespace) -> tuple[str, str, str, str]:
    """Return a configuration's root, train, val and classes; without a root, those of the toy videos."""
    if data.root:
        train, val = find_splits(data.root, data.train, getattr(data, "val", ""))
        return data.root, train, val, getattr(data, "classes", "")
    return str(render(FOLDER)), "train", "val", "classes.txt"


def render(folder: Path, videos: dict[str, int] = VIDEOS, seed: int = 0) -> Path:
    """Render the missing toy videos, split/class/number.mp4, with their two sets of labels. Return `folder`."""
    looks = [SIZE, FRAMES, RATE, DARK, BRIGHT, SPEED, RADIUS, SHAPES]
    settings = dict(seed=seed, videos=videos, looks=looks, classes=CLASSES)
    return render_folder(folder, settings, render_video, "classes.txt", "".join(f"{name}\n" for name in CLASSES))


def render_video(folder: Path, seed: int, key: tuple[str, int]) -> dict[str, str]:
    """Render the video of a split and number. Return the rows that annotate it, by file."""
    split, number = key
    generator = torch.Generator().manual_seed((seed * len(VIDEOS) + list(VIDEOS).index(split)) * 10**7 + number)
    motion = CLASSES[number % len(CLASSES)]
    shape = SHAPES[number // len(CLASSES) % len(SHAPES)]
    path = f"{split}/{motion}/{number:05d}.mp4"
    write_video(folder / path, render_clip(motion, shape, generator))
    return {f"shapes_{split}.csv": f"{path},{shape}\n"}


def render_clip(motion: str, shape: str, generator: torch.Generator) -> Tensor:
    """Return the brightness of one video, (FRAMES, SIZE, SIZE) in [0, 1]."""
    return DARK + (BRIGHT - DARK) * coverage(shape, trajectory(motion, generator), SIZE, SIZE, wrap=True)


def trajectory(motion: str, generator: torch.Generator) -> Tensor:
    """Return x and y in pixels, angle in turns and radius in pixels of the shape in each frame: (4, FRAMES).

    The first frame is sampled alike for all classes. Positions wrap around, so uniform stays uniform in all others.
    """
    x, y, radius, speed = uniform(generator, (0, SIZE), (0, SIZE), RADIUS, SPEED)
    dx, dy = direction(motion, generator)
    step = torch.tensor([speed * dx, speed * dy, 0, 0])
    return torch.tensor([x, y, 0, radius])[:, None] + step[:, None] * torch.arange(FRAMES)


# ---- also for toy_ava.py ----


def direction(motion: str, generator: torch.Generator) -> tuple[float, float]:
    """Return x and y of a step of length 1, one way or the other."""
    angle = math.pi * (CLASSES.index(motion) / 4 + random_below(2, generator))
    return math.cos(angle), math.sin(angle)


def coverage(shape: str, state: Tensor, height: int, width: int, wrap: bool = False) -> Tensor:
    """Return how much of each pixel is covered, (T, H, W) in [0, 1], by a shape that moves as `state` (4, T) says.

    wrap: what leaves the frame on one side comes back on the other.
    """
    center_x, center_y, turn, radius = state[..., None, None]  # (T, 1, 1) each
    x = torch.arange(width) + 0.5 - center_x  # (T, 1, W)
    y = torch.arange(height)[:, None] + 0.5 - center_y  # (T, H, 1)
    if wrap:
        x = (x + width / 2) % width - width / 2
        y = (y + height / 2) % height - height / 2
    angle = 2 * math.pi * turn
    u = (x * angle.cos() + y * angle.sin()) / radius  # along the shape's own axes, (T, H, W)
    v = (y * angle.cos() - x * angle.sin()) / radius
    return (depth(shape, u, v) * radius + 0.5).clamp(0, 1)  # an edge of one pixel


def depth(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Return how far a point lies inside a shape with the area of the unit circle; negative outside."""
    if shape == "disc":
        return 1 - (u * u + v * v).sqrt()
    side = math.sqrt(math.pi) / 2  # half of it
    if shape == "square":
        return side - torch.maximum(u.abs(), v.abs())
    return side - (u.abs() + v.abs()) / math.sqrt(2)  # diamond


def uniform(generator: torch.Generator, *ranges: tuple[float, float]) -> list[float]:
    """Sample one number from each range."""
    return [low + (high - low) * float(torch.rand((), generator=generator)) for low, high in ranges]


def write_video(path: Path, brightness: Tensor) -> None:
    """Write a gray video (T, H, W) in [0, 1], unless the file exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = (brightness * 255).round().byte()[:, None].expand(-1, 3, -1, -1)  # (T, 3, H, W)
    write_mp4(path.with_suffix(".part"), frames, RATE, options={"qp": "10", "preset": "ultrafast"})  # nearly lossless
    os.replace(path.with_suffix(".part"), path)


def render_folder(folder: Path, settings: dict, render_video: Callable, last: str, text: str) -> Path:
    """Render the videos of `settings` that are missing in `folder`, by a function like `render_video`. Return `folder`.

    The file `last`, which holds `text`, marks a complete folder. Raises UserError if the folder has other settings.
    """
    mark, described = folder / "settings.json", json.dumps(settings)
    if not (mark.exists() and (folder / last).exists()):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # another process or machine waits, and then finds a complete folder
            if not mark.exists():
                mark.write_text(described, "utf-8")
            if mark.read_text("utf-8") == described and not (folder / last).exists():
                _render_missing(folder, settings, render_video)
                (folder / last).write_text(text, "utf-8")
    if mark.read_text("utf-8") != described:
        raise UserError(f"{folder} holds toy videos of other settings; delete it or choose another folder")
    return folder


def _render_missing(folder: Path, settings: dict, render_video: Callable) -> None:
    keys = [(split, number) for split, count in settings["videos"].items() for number in range(count)]
    render_one = partial(render_video, folder, settings["seed"])
    processes = min(os.cpu_count(), math.ceil(len(keys) / 100))  # starting one takes as long as 100 videos
    annotations = defaultdict(str)
    # spawn, not fork: PyTorch's threads may be running already
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        done = pool.map(render_one, keys, chunksize=8) if processes > 1 else map(render_one, keys)
        for rows in tqdm(done, f"rendering toy videos into {folder}", len(keys), unit="video"):
            for name, lines in rows.items():
                annotations[name] += lines
    for name, lines in annotations.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(lines, "utf-8")
