"""The toy videos, on which every stage runs by default: one shape that moves in one of eight directions.

Motion tells the class, as in Something-Something: in every frame of every class the shape is anywhere with the same
probability. A single frame gives a hint: the background is lighter toward where the shape goes, with a std of 70
degrees, so guessing from the background alone is right 25 % of the time. Without the hint a classifier finds the motion
late and all at once, at a time that depends on luck. A tenth of the cubes tells most about the colors of the others.
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

CLASSES = tuple(f"moving {way}" for way in "right,down-right,down,down-left,left,up-left,up,up-right".split(","))
DIRECTIONS = {name: (math.cos(math.pi * i / 4), math.sin(math.pi * i / 4)) for i, name in enumerate(CLASSES)}  # x, y
SIZE, FRAMES, RATE = 64, 24, 12  # pixels, frames per video, frames per second
LIGHT, SPREAD = 0.35, math.radians(70)  # brightness from one side to the other; std of its direction
CORNERS = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])  # x and y, in the order of `gradient`
FOLDER, VIDEOS = Path("toy_videos"), {"train": 4000, "val": 800}


def find(data: SimpleNamespace) -> tuple[str, str, str, str]:
    """Return a configuration's root, train, val and classes; without a root, those of the toy videos."""
    if data.root:
        train, val = find_splits(data.root, data.train, getattr(data, "val", ""))
        return data.root, train, val, getattr(data, "classes", "")
    return str(render(FOLDER)), "train", "val", "classes.txt"


def render(folder: Path, videos: dict[str, int] = VIDEOS, seed: int = 0) -> Path:
    """Render the missing toy videos, split/class/number.mp4, and classes.txt. Return `folder`."""
    settings = dict(seed=seed, videos=videos, size=SIZE, frames=FRAMES, light=LIGHT, spread=SPREAD, classes=CLASSES)
    return render_folder(folder, settings, render_video, "classes.txt", "".join(f"{name}\n" for name in CLASSES))


def render_video(folder: Path, seed: int, key: tuple[str, int]) -> dict[str, str]:
    """Render the video of a split and number. Return the rows that annotate it, by file: none."""
    split, number = key
    generator = torch.Generator().manual_seed((seed * len(VIDEOS) + list(VIDEOS).index(split)) * 10**7 + number)
    motion = CLASSES[number % len(CLASSES)]
    write_video(folder / split / motion / f"{number:05d}.mp4", render_clip(motion, generator))
    return {}


def render_clip(motion: str, generator: torch.Generator) -> Tensor:
    """Return one video, (FRAMES, SIZE, SIZE, 3) in [0, 1]."""
    state = trajectory(motion, generator)
    x, y = pixels(SIZE, SIZE)
    image = gradient(x / SIZE, y / SIZE, background(motion, generator))
    return paint(image, image, state, generator, True)[0]


def trajectory(motion: str, generator: torch.Generator) -> Tensor:
    """Return x and y in pixels, angle in turns and size in pixels of the shape in each frame: (4, FRAMES).

    The first frame is sampled alike for all classes. Positions wrap around, so uniform stays uniform in all others.
    Slower shapes take twice as many clips to learn: masked cubes can be guessed nearly as well without their direction.
    """
    *start, speed = uniform(generator, (0, SIZE), (0, SIZE), (0, 1), (11, 22), (2.5, 4))
    dx, dy = DIRECTIONS[motion]
    return torch.tensor(start)[:, None] + torch.tensor([speed * dx, speed * dy, 0, 0])[:, None] * torch.arange(FRAMES)


def background(motion: str, generator: torch.Generator) -> Tensor:
    """Return the colors of the four corners (4, 3), lighter toward where the shape goes, with a std of SPREAD."""
    colors = torch.rand(4, 3, generator=generator)
    colors = colors.mean(dim=0) + 0.5 * (colors - colors.mean(dim=0))
    dx, dy = DIRECTIONS[motion]
    angle = math.atan2(dy, dx) + SPREAD * float(torch.randn((), generator=generator))
    light = CORNERS @ torch.tensor([math.cos(angle), math.sin(angle)])
    return (colors + LIGHT * light[:, None]).clamp(0, 1)


# ---- also for toy_ava.py ----


def render_folder(folder: Path, settings: dict, render_video: Callable, last: str, text: str) -> Path:
    """Render the videos of `settings` that are missing in `folder`, by a function like `render_video`. Return `folder`.

    The file `last`, with `text`, marks a complete folder. Raises UserError if the folder has other settings.
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


def write_video(path: Path, clip: Tensor) -> None:
    """Write a clip (T, H, W, 3) in [0, 1], unless the file exists."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = (clip.clamp(0, 1) * 255).round().byte().permute(0, 3, 1, 2)  # (T, 3, H, W)
    # Nearly lossless: dividing by a cube's std would amplify the coding noise of flat areas.
    write_mp4(path.with_suffix(".part"), frames, RATE, options={"qp": "10", "preset": "ultrafast"})
    os.replace(path.with_suffix(".part"), path)


def uniform(generator: torch.Generator, *ranges: tuple[float, float]) -> list[float]:
    """Sample one number from each range."""
    return [low + (high - low) * float(torch.rand((), generator=generator)) for low, high in ranges]


def pixels(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return x and y of the pixels' centers, (1, W, 1) and (H, 1, 1)."""
    return torch.arange(width)[None, :, None] + 0.5, torch.arange(height)[:, None, None] + 0.5


def gradient(u: Tensor, v: Tensor, corners: Tensor) -> Tensor:
    """Blend four corner colors (4, 3) bilinearly at coordinates from 0 to 1: (..., 3)."""
    return (1 - v) * ((1 - u) * corners[0] + u * corners[1]) + v * ((1 - u) * corners[2] + u * corners[3])


def paint(clip: Tensor, background: Tensor, state: Tensor, generator: torch.Generator, wrap: bool) -> list[Tensor]:
    """Paint a shape that moves as `state` (4, T) says. Return the clip (T, H, W, 3) and the shape's mask (T, H, W).

    wrap: what leaves the frame on one side comes back on the other.
    """
    center_x, center_y, turn, size = state[..., None, None, None]  # (T, 1, 1, 1) each
    x, y = pixels(*background.shape[:2])
    x, y = x - center_x, y - center_y  # relative to the center, (T, 1, W, 1) and (T, H, 1, 1)
    if wrap:
        x, y = (x + SIZE / 2) % SIZE - SIZE / 2, (y + SIZE / 2) % SIZE - SIZE / 2
    angle = 2 * math.pi * turn
    u = (x * angle.cos() + y * angle.sin()) / size  # along the shape's own axes, about -1 to 1, (T, H, W, 1)
    v = (y * angle.cos() - x * angle.sin()) / size
    outline = _outline(torch.atan2(v, u), random_below(6, generator))
    inside = ((outline - (u * u + v * v).sqrt()) * size + 0.5).clamp(0, 1)  # anti-aliased edge
    contrast = 0.25 + 0.5 * ((background.mean(dim=(0, 1)) + 0.5) % 1)  # a color that stands out, and room around it
    shape = gradient((u + 1) / 2, (v + 1) / 2, contrast + 0.5 * (torch.rand(4, 3, generator=generator) - 0.5))
    return [clip + inside * (shape - clip), inside[..., 0] > 0.5]


def _outline(theta: Tensor, kind: int) -> Tensor:
    """Return the radius, at most 1, of one of six outlines in the direction theta."""
    if kind < 3:  # triangle, square, pentagon
        sector = 2 * math.pi / (kind + 3)
        return math.cos(sector / 2) / (theta % sector - sector / 2).cos()
    if kind == 3:  # flower of three leaves
        return 0.7 + 0.3 * (3 * theta).cos()
    if kind == 4:  # ellipse
        return 0.5 / (1 - 0.75 * theta.cos() ** 2).sqrt()
    return 0.65 + 0.35 * theta.cos()  # drop
