"""The toy videos that every stage runs on by default: one shape on a smooth background, moving in one of eight directions.

    python -m support.toy toy_videos        # renders what is not there yet; the stages do it by themselves on first use
    python -m support.toy toy_ava --ava     # several shapes at a time, annotated as AVA is, for detect_ava.py

Motion alone decides the class, as in Something-Something: in every frame of every class the shape is anywhere with the
same probability (it wraps around), so a single frame is worth chance. Backgrounds and shapes are smooth colour gradients:
a tenth of the cubes tells much about the colours of the others, and what is left to learn is where the shape will be.
"""

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from support.config import UserError
from support.run import (
    launch,
    pick_below,
    sample_generator,
)
from support.video import (
    write_mp4,
)

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
    if _begin(folder, settings, [f"{split}/{name}" for split in videos for name in CLASSES], "classes.txt"):
        wanted = [(split, number) for split, count in videos.items() for number in range(count)]
        with _processes() as pool:
            done = pool.imap_unordered(partial(_render_one, folder, seed), wanted, chunksize=16)
            for _ in tqdm(done, f"rendering toy videos into {folder}", len(wanted), unit="video"):
                pass
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))  # last: it says that all are there
    return folder


def _begin(folder: Path, settings: dict, subfolders: list[str], last: str) -> bool:
    """Whether anything is to be rendered into `folder`: not if the file `last` is there. UserError if it holds other settings."""
    mark = folder / "settings.json"
    if mark.exists() and mark.read_text() != json.dumps(settings):
        raise UserError(f"{folder} holds toy videos of other settings; delete it or choose another folder")
    if mark.exists() and (folder / last).exists():
        return False
    for name in subfolders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(settings))
    return True


def _processes() -> Pool:
    # spawn, not fork: PyTorch's threads may be running already
    return multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,))


def _write_once(path: Path, frames: Tensor) -> None:
    part = path.with_suffix(".part")
    # Nearly lossless: per-cube normalisation would blow up the coding noise of flat areas.
    write_mp4(part, frames, RATE, options={"qp": "10", "preset": "ultrafast"})
    os.replace(part, path)


def find(data: SimpleNamespace, world_size: int) -> tuple[str, str, str]:
    """`data.root`, `data.train` and `data.val` of a configuration as they are; without a root the toy videos, rendered if need be."""
    if data.root:
        return data.root, data.train, data.val
    return on_first_use(render, FOLDER, world_size), "train", "val"


def on_first_use(render: Callable[[Path], Path], folder: Path, world_size: int) -> str:
    """The folder, rendered if need be by one process of each machine while the others wait."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        render(folder)
    if world_size > 1:
        dist.barrier()
    return str(folder)


def _render_one(folder: Path, seed: int, wanted: tuple[str, int]) -> None:
    split, number = wanted
    motion = CLASSES[number % len(CLASSES)]
    path = folder / split / motion / f"{number:05d}.mp4"
    if not path.exists():
        generator = torch.Generator().manual_seed((seed * len(VIDEOS) + list(VIDEOS).index(split)) * 10**7 + number)
        _write_once(path, render_clip(motion, generator))


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def trajectory(motion: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position x and y in pixels, angle in turns and size in pixels of the shape in each frame: four times (FRAMES,).

    The first frame is drawn alike for all classes; as positions wrap around, uniform stays uniform in all others.
    Fast shapes matter: at 1.5 to 3 pixels a frame, hidden cubes can be guessed nearly as well without knowing the way
    that the shape takes, and pre-training takes twice as many clips to learn it.
    """
    uniform = partial(_uniform, generator)
    x, y, turn, size, speed = uniform(0, SIZE), uniform(0, SIZE), uniform(0, 1), uniform(11, 22), uniform(2.5, 4)
    direction = 2 * math.pi * CLASSES.index(motion) / len(CLASSES)
    time, still = torch.arange(FRAMES).float(), torch.ones(FRAMES)
    return x + speed * math.cos(direction) * time, y + speed * math.sin(direction) * time, turn * still, size * still


def render_clip(motion: str, generator: torch.Generator) -> Tensor:
    """One video as uint8 (FRAMES, 3, SIZE, SIZE)."""
    x, y, turn, size = (of_frame[:, None, None] for of_frame in trajectory(motion, generator))
    columns, rows, background = _background(SIZE, SIZE, generator)
    # Nearest copy of the shape on a torus: what leaves on one side comes back on the other.
    dx = (columns - x + SIZE / 2) % SIZE - SIZE / 2  # (FRAMES, SIZE, SIZE)
    dy = (rows - y + SIZE / 2) % SIZE - SIZE / 2
    inside, shape = _shape(dx, dy, turn, size, background, generator)
    return _to_bytes(background + inside * (shape - background))


def _background(height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pixel's centre lies, x and y (H, W), and the background (H, W, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return columns, rows, _gradient(columns / width, rows / height, torch.rand(4, 3, generator=generator))


def _shape(dx: Tensor, dy: Tensor, turn: Tensor, size: Tensor, background: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How much each pixel, dx and dy (T, H, W) from a shape's centre, belongs to it (T, H, W, 1), and its colours (T, H, W, 3)."""
    angle = 2 * math.pi * turn
    u = (dx * angle.cos() + dy * angle.sin()) / size  # the shape's own axes, about -1 to 1
    v = (dy * angle.cos() - dx * angle.sin()) / size
    outline = _outline(torch.atan2(v, u), int(torch.randint(6, (), generator=generator)))
    inside = ((outline - (u * u + v * v).sqrt()) * size + 0.5).clamp(0, 1)[..., None]  # anti-aliased edge
    other = 0.25 + 0.5 * ((background.mean(dim=(0, 1)) + 0.5) % 1)  # a colour that stands out, and room around it
    colours = other + 0.5 * (torch.rand(4, 3, generator=generator) - 0.5)
    return inside, _gradient((u + 1) / 2, (v + 1) / 2, colours)


def _to_bytes(clip: Tensor) -> Tensor:
    return (clip.clamp(0, 1) * 255).round().byte().permute(0, 3, 1, 2)  # (T, 3, H, W)


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


# ---- toy AVA: several shapes, each doing one or two things at a time, with annotations in AVA's own formats ----

# Shapes do not handle objects: directions, turning and growing stand for AVA's three groups of actions.
KINDS = {
    "PERSON_MOVEMENT": CLASSES,
    "OBJECT_MANIPULATION": ("turning left", "turning right"),
    "PERSON_INTERACTION": ("growing", "shrinking"),
}
ACTIONS = tuple(name for kind in KINDS.values() for name in kind)
AVA_HEIGHT, AVA_WIDTH, AVA_FRAMES = 72, 96, 60  # five seconds: key frames at seconds 901 to 904
RADIUS = 10, 20  # pixels, of the smallest and the largest shape
EXCLUDED, MISSED, FALSE = 0.05, 0.05, 0.2  # shares: key frames excluded, boxes that the detector misses, frames with a false box
AVA_FOLDER = Path("toy_ava")
AVA_VIDEOS = {"train": 800, "val": 160}


def render_ava(folder: Path, videos: dict[str, int] = AVA_VIDEOS, seed: int = 0) -> Path:
    """Make sure that `folder` holds toy videos of several shapes with annotations as AVA distributes them; returns `folder`.

    videos/<split>_<number>.mp4, cut to start at second 900; in annotations/ the ground truth and excluded frames of each
    split and the list of actions; in boxes/ what a person detector might have found, as SlowFast has it.
    """
    settings = dict(seed=seed, videos=videos, size=[AVA_HEIGHT, AVA_WIDTH], frames=AVA_FRAMES, classes=list(ACTIONS))
    last = "annotations/ava_action_list_v2.2.pbtxt"
    if _begin(folder, settings, ["videos", "annotations", "boxes"], last):
        with _processes() as pool:
            for split, count in videos.items():
                done = pool.imap(partial(_render_ava_video, folder, split, seed), range(count), chunksize=4)
                texts = list(tqdm(done, f"rendering toy videos for detection into {folder}", count, unit="video"))
                truth, exclusions, detected = ("".join(text) for text in zip(*texts))
                (folder / f"annotations/ava_{split}_v2.2.csv").write_text(truth)
                (folder / f"annotations/ava_{split}_excluded_timestamps_v2.2.csv").write_text(exclusions)
                (folder / f"boxes/ava_{split}_predicted_boxes.csv").write_text(detected)
        items = enumerate(((name, kind) for kind, names in KINDS.items() for name in names), 1)
        blocks = (f'label {{\n  name: "{name}"\n  label_id: {number}\n  label_type: {kind}\n}}\n' for number, (name, kind) in items)
        (folder / last).write_text("".join(blocks))
    return folder


def _render_ava_video(folder: Path, split: str, seed: int, number: int) -> tuple[str, str, str]:
    """Render one video if it is not there yet; returns its rows of ground truth, excluded frames and detected boxes."""
    generator = sample_generator(seed, list(AVA_VIDEOS).index(split), number)
    frames, shapes = render_scene(generator)
    video = f"{split}_{number:05d}"
    path = folder / "videos" / f"{video}.mp4"
    if not path.exists():
        _write_once(path, frames)

    def chance(probability: float) -> bool:
        return bool(torch.rand((), generator=generator) < probability)

    def row(box: Tensor, action: int | str, last: float) -> str:
        return f"{video},{second:04d},{','.join(f'{edge:.3f}' for edge in box.clamp(0, 1).tolist())},{action},{last:.3g}\n"

    truth, exclusions, detected = "", "", ""
    for second in range(901, 900 + AVA_FRAMES // RATE):
        frame = (second - 900) * RATE
        exclusions += f"{video},{second:04d}\n" if chance(EXCLUDED) else ""
        for person, (motions, boxes) in enumerate(shapes):
            if boxes[frame] is None:
                continue
            box = torch.tensor(boxes[frame]) / torch.tensor([AVA_WIDTH, AVA_HEIGHT] * 2)
            truth += "".join(row(box, ACTIONS.index(motion) + 1, person) for motion in motions[frame])
            if not chance(MISSED):  # each edge up to a tenth of the side too far in or out; a few scores below 0.8
                found = box + 0.2 * (torch.rand(4, generator=generator) - 0.5) * (box[2:] - box[:2]).repeat(2)
                detected += row(found, "", 0.78 + 0.22 * float(torch.rand((), generator=generator)))
        if chance(FALSE):
            corner, sides = torch.rand(2, generator=generator) * 0.7, 0.2 + 0.1 * torch.rand(2, generator=generator)
            detected += row(torch.cat([corner, corner + sides]), "", 0.5 + 0.4 * float(torch.rand((), generator=generator)))
    return truth, exclusions, detected


def render_scene(generator: torch.Generator) -> tuple[Tensor, list[tuple[list[list[str]], list[tuple | None]]]]:
    """Two to four shapes: uint8 (AVA_FRAMES, 3, H, W), and of each shape its motions and its box in every frame.

    A box is (x1, y1, x2, y2) in pixels, or None where the shape's centre is outside or others hide more than half of it.
    """
    columns, rows, background = _background(AVA_HEIGHT, AVA_WIDTH, generator)
    clip = background.expand(AVA_FRAMES, -1, -1, -1)  # (AVA_FRAMES, H, W, 3)
    tracks, masks = [], []
    for _ in range(2 + pick_below(3, generator)):
        motions, *state = track(generator)
        x, y, turn, size = (of_frame[:, None, None] for of_frame in state)
        inside, shape = _shape(columns - x, rows - y, turn, size, background, generator)
        clip = clip + inside * (shape - clip)
        masks.append(inside[..., 0] > 0.5)
        tracks.append((motions, (x >= 0) & (x < AVA_WIDTH) & (y >= 0) & (y < AVA_HEIGHT)))
    shapes = []
    for place, (motions, within) in enumerate(tracks):
        hidden = torch.stack([*masks[place + 1 :], torch.zeros_like(masks[place])]).any(dim=0)  # by those painted later
        boxes = [
            _box_of(mask) if seen and (mask & ~above).sum() > 0.5 * mask.sum() else None
            for mask, above, seen in zip(masks[place], hidden, within)
        ]
        shapes.append((motions, boxes))
    return _to_bytes(clip), shapes


def _box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """The box around the true pixels of a mask (H, W)."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def track(generator: torch.Generator) -> tuple[list[list[str]], Tensor, Tensor, Tensor, Tensor]:
    """The motions of a shape in each frame, then x and y in pixels, angle in turns and size in pixels: four times (AVA_FRAMES,).

    A shape moves in one direction and, in half of the cases, also turns or grows; the second half of the video draws anew.
    Here too a single frame tells nothing about the motions: positions are uniform on a torus, that of the frame and a
    margin as wide as the largest shape, and every angle and size is equally frequent.
    """
    uniform = partial(_uniform, generator)
    movement, *others = KINDS.values()
    halves = []
    for _ in range(2):
        doing = [movement[pick_below(len(movement), generator)]]
        if pick_below(2, generator):
            other = others[pick_below(len(others), generator)]
            doing.append(other[pick_below(len(other), generator)])
        halves.append(doing)
    motions = [halves[2 * frame // AVA_FRAMES] for frame in range(AVA_FRAMES)]

    def path(steps: dict[str, float]) -> Tensor:
        """How far the shape has come since the first frame, given each motion's step per frame: (AVA_FRAMES,)."""
        step = torch.tensor([sum(steps.get(motion, 0.0) for motion in doing) for doing in motions])
        return step.cumsum(0) - step[0]

    speed, turning, growing = uniform(2.5, 4), uniform(1 / 60, 1 / 30), uniform(1 / 40, 1 / 24)  # pixels, turns, cycles a frame
    angles = {name: 2 * math.pi * place / len(CLASSES) for place, name in enumerate(CLASSES)}
    width, height = AVA_WIDTH + 2 * RADIUS[1], AVA_HEIGHT + 2 * RADIUS[1]  # of the torus
    x = path({name: speed * math.cos(angle) for name, angle in angles.items()}) + uniform(0, width)
    y = path({name: speed * math.sin(angle) for name, angle in angles.items()}) + uniform(0, height)
    turn = path({"turning left": -turning, "turning right": turning}) + uniform(0, 1)
    phase = (path({"growing": growing, "shrinking": -growing}) + uniform(0, 1)) % 1
    slow = 0.9  # share of the cycle in which the shape grows; then it is back quickly. Every size is equally frequent both ways.
    growth = torch.where(phase < slow, phase / slow, (1 - phase) / (1 - slow))  # 0 to 1
    size = RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** growth
    return motions, x % width - RADIUS[1], y % height - RADIUS[1], turn, size


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the toy videos.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ava", action="store_true", help="those for action detection")
    arguments = parser.parse_args()
    print((render_ava if arguments.ava else render)(arguments.folder))


if __name__ == "__main__":
    launch(main)
