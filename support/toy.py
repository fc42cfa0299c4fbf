"""The toy videos, which every stage runs on by default: one shape that moves in one of eight directions.

    python -m support.toy toy_videos        # renders what is missing; the stages do so on first use
    python -m support.toy toy_ava --ava     # several shapes at a time, annotated as AVA is, for detect_ava.py

Motion tells the class, as in Something-Something: in every frame of every class the shape is anywhere with the same
probability. A single frame gives a hint: the background is lighter towards where the shape goes, give or take 70
degrees, so that the best guess from it is right in a quarter of the videos. Without the hint a classifier stays at
chance level for long and then finds the motion all at once, when is a matter of luck (docs/study.md). Backgrounds and
shapes are smooth colour gradients: a tenth of the cubes tells most about the colours of the others.
"""

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import masks_to_boxes
from tqdm import tqdm

from support.config import UserError
from support.processes import launch
from support.seeds import random_below, sample_generator
from support.video import write_mp4

X, Y, TURN, GROW = torch.eye(4, dtype=torch.float64)  # what a motion changes from frame to frame
WAYS = "right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right"
STEPS = {f"moving {way}": math.cos(math.pi * i / 4) * X + math.sin(math.pi * i / 4) * Y for i, way in enumerate(WAYS)}
CLASSES = tuple(STEPS)
SIZE, FRAMES, RATE = 64, 24, 12  # pixels, frames per video, frames per second
LIGHT, SPREAD = 0.35, math.radians(70)  # brightness from one side to the other; std of its direction
CORNERS = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])  # x and y, in the order of `_gradient`
FOLDER, VIDEOS = Path("toy_videos"), {"train": 4000, "val": 800}

# Toy AVA: moving, turning and growing stand for AVA's three groups of actions.
STEPS |= {"turning left": -TURN, "turning right": TURN, "growing": GROW, "shrinking": -GROW}
GROUPS = ["PERSON_MOVEMENT"] * 8 + ["OBJECT_MANIPULATION"] * 2 + ["PERSON_INTERACTION"] * 2
ACTIONS = dict(zip(STEPS, GROUPS, strict=True))
ROW = "{},{:.3f},{:.3f},{:.3f},{:.3f},{},{:.3g}\n"  # video and second, box, action, person or score
AVA_HEIGHT, AVA_WIDTH, AVA_FRAMES = 72, 96, 60  # five seconds: key frames at seconds 901 to 904
AVA_FOLDER, AVA_VIDEOS = Path("toy_ava"), {"train": 800, "val": 160}


def find(data: SimpleNamespace) -> tuple[str, str, str, str]:
    """A configuration's root and train and, if it has them, val and classes; without a root those of the toy videos."""
    if data.root:
        return data.root, data.train, getattr(data, "val", ""), getattr(data, "classes", "")
    return str(render(FOLDER)), "train", "val", "classes.txt"


def find_ava(data: SimpleNamespace) -> Path:
    """`data.root` of a configuration; without one the folder of the toy videos for action detection."""
    return Path(data.root) if data.root else render_ava(AVA_FOLDER)


def render(folder: Path, videos: dict[str, int] = VIDEOS, seed: int = 0) -> Path:
    """Make sure that `folder` holds the toy videos as split/class/number.mp4 and classes.txt. Returns `folder`.

    Every video depends on (seed, split, number) alone; what an interrupted call has left is used. Under torchrun one
    process of each machine renders while the others wait. Raises UserError if the videos there have other settings.
    """
    settings = dict(seed=seed, videos=videos, size=SIZE, frames=FRAMES, light=LIGHT, spread=SPREAD, classes=CLASSES)
    return _render(folder, settings, False, "classes.txt", "".join(f"{name}\n" for name in CLASSES))


def render_ava(folder: Path, videos: dict[str, int] = AVA_VIDEOS, seed: int = 0) -> Path:
    """Like `render`, but several shapes per video, in AVA's layout: videos/ (from second 900), annotations/, boxes/."""
    settings = dict(seed=seed, videos=videos, size=[AVA_HEIGHT, AVA_WIDTH], frames=AVA_FRAMES, classes=[*ACTIONS])
    label = 'label {{\n  name: "{}"\n  label_id: {}\n  label_type: {}\n}}\n'
    labels = "".join(label.format(name, number, group) for number, (name, group) in enumerate(ACTIONS.items(), 1))
    return _render(folder, settings, True, "annotations/ava_action_list_v2.2.pbtxt", labels)


def _render(folder: Path, settings: dict, ava: bool, last: str, text: str) -> Path:
    """Write all videos and their annotations. The file `last`, with `text`, says that everything is there."""
    mark, texts, rank = folder / "settings.json", {}, int(os.environ.get("LOCAL_RANK", 0))
    if rank == 0 and mark.exists() and mark.read_text("utf-8") != json.dumps(settings):
        raise UserError(f"{folder} holds toy videos of other settings; delete it or choose another folder")
    if rank == 0 and not (mark.exists() and (folder / last).exists()):
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(settings), "utf-8")
        wanted = [(split, number) for split, count in settings["videos"].items() for number in range(count)]
        processes = min(os.cpu_count(), math.ceil(len(wanted) / 100))  # starting one takes as long as 100 videos
        # spawn, not fork: PyTorch's threads may be running already
        with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            in_turn = partial(pool.map, chunksize=8) if processes > 1 else map
            done = in_turn(partial(_render_one, folder, settings["seed"], ava), wanted)
            for rows in tqdm(done, f"rendering toy videos into {folder}", len(wanted), unit="video"):
                texts |= {name: texts.get(name, "") + some for name, some in rows.items()}
        for name, content in (texts | {last: text}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content, "utf-8")
    if dist.is_initialized():
        dist.barrier()
    return folder


def _render_one(folder: Path, seed: int, ava: bool, wanted: tuple[str, int]) -> dict[str, str]:
    """Write one video if it is missing. Returns the rows that annotate it, by file."""
    split, number = wanted
    if ava:
        generator, name = sample_generator(seed, list(AVA_VIDEOS).index(split), number), f"{split}_{number:05d}"
        path = folder / "videos" / f"{name}.mp4"
        clip, shapes = render_scene(generator)
        rows = _annotate(name, split, shapes, generator)
    else:
        generator = torch.Generator().manual_seed((seed * len(VIDEOS) + list(VIDEOS).index(split)) * 10**7 + number)
        motion = CLASSES[number % len(CLASSES)]
        path = folder / split / motion / f"{number:05d}.mp4"
        clip, rows = render_clip(motion, generator), {}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = (clip.clamp(0, 1) * 255).round().byte().permute(0, 3, 1, 2)  # (T, 3, H, W)
        # Nearly lossless: dividing by a cube's std would amplify the coding noise of flat areas.
        write_mp4(path.with_suffix(".part"), frames, RATE, options={"qp": "10", "preset": "ultrafast"})
        os.replace(path.with_suffix(".part"), path)
    return rows


def render_clip(motion: str, generator: torch.Generator) -> Tensor:
    """One video, (FRAMES, SIZE, SIZE, 3) in [0, 1]."""
    state, canvas = trajectory(motion, generator), _canvas(SIZE, SIZE, background(motion, generator))
    return _paint(canvas[2], canvas, state, generator, wrap=True)[0]


def trajectory(motion: str, generator: torch.Generator) -> Tensor:
    """x and y in pixels, angle in turns and size in pixels of the shape in each frame: (4, FRAMES).

    The first frame is sampled alike for all classes; as positions wrap around, uniform stays uniform in all others.
    Slower shapes take twice as many clips to learn: masked cubes can be guessed nearly as well without their direction.
    """
    *start, speed = _uniform(generator, (0, SIZE), (0, SIZE), (0, 1), (11, 22), (2.5, 4))
    return torch.tensor(start)[:, None] + (speed * STEPS[motion]).float()[:, None] * torch.arange(FRAMES)


def background(motion: str, generator: torch.Generator) -> Tensor:
    """Colours of the four corners (4, 3), lighter towards where the shape goes, give or take SPREAD."""
    colors = torch.rand(4, 3, generator=generator)
    colors = colors.mean(dim=0) + 0.5 * (colors - colors.mean(dim=0))
    x, y, *_ = STEPS[motion].tolist()
    angle = math.atan2(y, x) + SPREAD * float(torch.randn((), generator=generator))
    towards = torch.tensor([math.cos(angle), math.sin(angle)])
    return (colors + LIGHT * (CORNERS @ towards)[:, None]).clamp(0, 1)


def _uniform(generator: torch.Generator, *ranges: tuple[float, float]) -> list[float]:
    return [low + (high - low) * float(torch.rand((), generator=generator)) for low, high in ranges]


def _canvas(height: int, width: int, corners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and y of each pixel's centre (H, W, 1), and a background (H, W, 3) of the corners' colours (4, 3)."""
    y, x, _ = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, torch.zeros(1), indexing="ij")
    return x, y, _gradient(x / width, y / height, corners)


def _paint(clip: Tensor, canvas: tuple, state: Tensor, generator: torch.Generator, wrap: bool) -> tuple[Tensor, Tensor]:
    """Paint a shape that moves as `state` (4, T) says. Returns the clip (T, H, W, 3) and the shape's mask (T, H, W)."""
    x, y, turn, size = state[..., None, None, None]  # (T, 1, 1, 1) each
    dx, dy = canvas[0] - x, canvas[1] - y  # from the shape's centre, (T, H, W, 1)
    if wrap:  # to its nearest copy on a torus: what leaves on one side comes back on the other
        dx, dy = ((d + SIZE / 2) % SIZE - SIZE / 2 for d in (dx, dy))
    angle = 2 * math.pi * turn
    u = (dx * angle.cos() + dy * angle.sin()) / size  # along the shape's own axes, about -1 to 1
    v = (dy * angle.cos() - dx * angle.sin()) / size
    outline = _outline(torch.atan2(v, u), random_below(6, generator))
    inside = ((outline - (u * u + v * v).sqrt()) * size + 0.5).clamp(0, 1)  # anti-aliased edge
    other = 0.25 + 0.5 * ((canvas[2].mean(dim=(0, 1)) + 0.5) % 1)  # a colour that stands out, and room around it
    shape = _gradient((u + 1) / 2, (v + 1) / 2, other + 0.5 * (torch.rand(4, 3, generator=generator) - 0.5))
    return clip + inside * (shape - clip), inside[..., 0] > 0.5


def _outline(theta: Tensor, kind: int) -> Tensor:
    """Radius, at most 1, of one of six outlines in the direction theta."""
    if kind < 3:  # triangle, square, pentagon
        sector = 2 * math.pi / (kind + 3)
        return math.cos(sector / 2) / (theta % sector - sector / 2).cos()
    if kind == 3:  # flower of three leaves
        return 0.7 + 0.3 * (3 * theta).cos()
    if kind == 4:  # ellipse
        return 0.5 / (1 - 0.75 * theta.cos() ** 2).sqrt()
    return 0.65 + 0.35 * theta.cos()  # drop


def _gradient(u: Tensor, v: Tensor, corners: Tensor) -> Tensor:
    """Bilinear blend of four corner colours (4, 3) at coordinates (..., 1) from 0 to 1: (..., 3)."""
    return (1 - v) * ((1 - u) * corners[0] + u * corners[1]) + v * ((1 - u) * corners[2] + u * corners[3])


def render_scene(generator: torch.Generator) -> tuple[Tensor, list[tuple[list[list[str]], Tensor]]]:
    """Two to four shapes: the clip (AVA_FRAMES, H, W, 3), and for each shape its motions and its boxes (AVA_FRAMES, 4).

    Boxes are x1, y1, x2, y2 in fractions of width and height; NaN where the centre is outside or half is covered.
    """
    canvas = _canvas(AVA_HEIGHT, AVA_WIDTH, torch.rand(4, 3, generator=generator))
    clip, layers, shapes, covered = canvas[2], [], [], False
    for _ in range(2 + random_below(3, generator)):
        motions, state = track(generator)
        clip, mask = _paint(clip, canvas, state, generator, wrap=False)
        layers.append((motions, state, mask))
    for motions, (x, y, *_), mask in reversed(layers):  # from front to back
        seen = (x >= 0) & (x < AVA_WIDTH) & (y >= 0) & (y < AVA_HEIGHT)  # (AVA_FRAMES,)
        seen &= (mask & ~covered).sum(dim=(1, 2)) > 0.5 * mask.sum(dim=(1, 2))
        boxes = torch.full((AVA_FRAMES, 4), math.nan)
        boxes[seen] = masks_to_boxes(mask[seen]) + torch.tensor([0, 0, 1, 1])
        shapes.insert(0, (motions, boxes / torch.tensor([AVA_WIDTH, AVA_HEIGHT] * 2)))
        covered = mask | covered
    return clip, shapes


def track(generator: torch.Generator) -> tuple[list[list[str]], Tensor]:
    """A shape's motions in each frame, and its x, y, angle and size as in `trajectory`: (4, AVA_FRAMES).

    It moves in one direction and, in half of the cases, also turns or grows; both change halfway. A single frame tells
    nothing here either: every position on a torus, every angle and every size is equally frequent.
    """
    motions = []
    for _ in range(2):
        doing = [CLASSES[random_below(len(CLASSES), generator)]]
        if random_below(2, generator):
            doing.append([*ACTIONS][len(CLASSES) + 2 * random_below(2, generator) + random_below(2, generator)])
        motions += [doing] * (AVA_FRAMES // 2)
    width, height = AVA_WIDTH + 2 * 20, AVA_HEIGHT + 2 * 20  # a torus: the frame and a margin of 20 pixels
    speed, turning, growing = _uniform(generator, (2.5, 4), (1 / 60, 1 / 30), (1 / 40, 1 / 24))  # per frame
    start = torch.tensor(_uniform(generator, (0, width), (0, height), (0, 1), (0, 1)))
    steps = torch.stack([sum(STEPS[name] for name in doing) for doing in motions])  # (AVA_FRAMES, 4)
    steps = (steps * torch.tensor([speed, speed, turning, growing], dtype=torch.float64)).float()
    x, y, turn, phase = (steps.cumsum(dim=0) - steps[0] + start).T  # (AVA_FRAMES,) each
    phase = phase % 1  # 90 % of a cycle one way, then quickly back
    size = 10 * 2 ** torch.where(phase < 0.9, phase / 0.9, (1 - phase) / 0.1)  # 10 to 20 pixels
    return motions, torch.stack([x % width - 20, y % height - 20, turn, size])


def _annotate(video: str, split: str, shapes: list, generator: torch.Generator) -> dict[str, str]:
    """A video's rows of ground truth, of excluded key frames, and of the boxes that a detector might find, by file."""
    rand, truth, excluded, detected = partial(torch.rand, generator=generator), "", "", ""
    for second in range(901, 900 + AVA_FRAMES // RATE):
        frame, key = (second - 900) * RATE, f"{video},{second:04d}"
        excluded += f"{key}\n" if rand(()) < 0.05 else ""
        for person, (motions, boxes) in enumerate(shapes):
            box = boxes[frame]
            if box.isnan().any():
                continue
            for motion in motions[frame]:
                truth += ROW.format(key, *box.clamp(0, 1).tolist(), [*ACTIONS].index(motion) + 1, person)
            if rand(()) >= 0.05:  # detected, each edge up to a tenth of the side off; a few scores below 0.8
                box = box + 0.2 * (rand(4) - 0.5) * (box[2:] - box[:2]).repeat(2)
                detected += ROW.format(key, *box.clamp(0, 1).tolist(), "", 0.78 + 0.22 * float(rand(())))
        if rand(()) < 0.2:  # a false detection
            corner, sides = rand(2) * 0.7, 0.2 + 0.1 * rand(2)
            detected += ROW.format(key, *corner.tolist(), *(corner + sides).tolist(), "", 0.5 + 0.4 * float(rand(())))
    return {
        f"annotations/ava_{split}_v2.2.csv": truth,
        f"annotations/ava_{split}_excluded_timestamps_v2.2.csv": excluded,
        f"boxes/ava_{split}_predicted_boxes.csv": detected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the toy videos.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ava", action="store_true", help="those for action detection")
    arguments = parser.parse_args()
    print((render_ava if arguments.ava else render)(arguments.folder))


if __name__ == "__main__":
    launch(main)
