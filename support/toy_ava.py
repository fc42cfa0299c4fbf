"""The toy videos of action detection: bright squares that move, turn and grow, annotated as AVA is."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from support.seeds import random_below, sample_generator
from support.toy import CLASSES, DARK, RATE, SPEED, coverage, direction, render_folder, uniform, write_video

# What the other actions change from frame to frame: angle, size. Each kind of action stands for one of AVA's groups.
STEPS = {"turning left": (-1, 0), "turning right": (1, 0), "growing": (0, 1), "shrinking": (0, -1)}
ACTIONS = dict.fromkeys(CLASSES, "PERSON_MOVEMENT")
ACTIONS |= dict.fromkeys(("turning left", "turning right"), "OBJECT_MANIPULATION")
ACTIONS |= dict.fromkeys(("growing", "shrinking"), "PERSON_INTERACTION")
HEIGHT, WIDTH, FRAMES = 32, 48, 60  # five seconds: key frames at seconds 901 to 904
MARGIN = 8  # pixels beyond the frame that shapes may reach
RADIUS = 4  # pixels, of a square that has not grown; it doubles
FOLDER, VIDEOS = Path("toy_ava"), {"train": 800, "val": 160}
LABEL = 'label {{\n  name: "{}"\n  label_id: {}\n  label_type: {}\n}}\n'
ROW = "{},{:.3f},{:.3f},{:.3f},{:.3f},{},{:.3g}\n"  # video and second, box, action, person or score


def find(data: SimpleNamespace) -> Path:
    """Return `data.root` of a configuration; without one, the folder of the toy videos."""
    return Path(data.root) if data.root else render(FOLDER)


def render(folder: Path, videos: dict[str, int] = VIDEOS, seed: int = 0) -> Path:
    """Render what is missing, in AVA's layout: videos/ (from second 900), annotations/, boxes/. Return `folder`."""
    settings = dict(seed=seed, videos=videos, looks=[HEIGHT, WIDTH, FRAMES, RADIUS, SPEED], classes=[*ACTIONS])
    labels = "".join(LABEL.format(name, number, group) for number, (name, group) in enumerate(ACTIONS.items(), 1))
    return render_folder(folder, settings, render_video, "annotations/ava_action_list_v2.2.pbtxt", labels)


def render_video(folder: Path, seed: int, key: tuple[str, int]) -> dict[str, str]:
    """Render the video of a split and number. Return the rows that annotate it, by file."""
    split, number = key
    generator = sample_generator(seed, list(VIDEOS).index(split), number)
    name = f"{split}_{number:05d}"
    clip, shapes = render_scene(generator)
    write_video(folder / "videos" / f"{name}.mp4", clip)
    return annotate(name, split, shapes, generator)


def render_scene(generator: torch.Generator) -> tuple[Tensor, list[tuple[list[list[str]], Tensor]]]:
    """Return a clip (FRAMES, H, W) of one to three squares, and each shape's actions and boxes (FRAMES, 4).

    Boxes are x1, y1, x2, y2 in fractions of width and height; NaN where the center is outside or half is covered.
    """
    clip, layers = torch.full((FRAMES, HEIGHT, WIDTH), DARK), []
    for _ in range(1 + random_below(3, generator)):
        actions, state = track(generator)
        inside = coverage("square", state, HEIGHT, WIDTH)  # a disc cannot be seen to turn
        (brightness,) = uniform(generator, (0.5, 1))
        clip = clip + inside * (brightness - clip)
        layers.append((actions, state, inside > 0.5))
    shapes, covered = [], torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    for actions, (x, y, *_), mask in reversed(layers):  # from front to back
        visible = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)  # (FRAMES,)
        visible &= (mask & ~covered).sum(dim=(1, 2)) > 0.5 * mask.sum(dim=(1, 2))
        boxes = torch.full((FRAMES, 4), math.nan)
        boxes[visible] = masks_to_boxes(mask[visible]) + torch.tensor([0, 0, 1, 1])
        shapes.insert(0, (actions, boxes / torch.tensor([WIDTH, HEIGHT] * 2)))
        covered |= mask
    return clip, shapes


def track(generator: torch.Generator) -> tuple[list[list[str]], Tensor]:
    """Return a shape's actions in each frame, and its x, y, angle and radius as in `trajectory`: (4, FRAMES).

    It moves on one line and, in half of the cases, also turns or grows; both change halfway. A single frame tells
    nothing here either: every position on a torus, every angle and every size is equally frequent.
    """
    speed, turning, growing = uniform(generator, SPEED, (1 / 60, 1 / 30), (1 / 40, 1 / 24))  # per frame
    actions, steps = [], []
    for _ in range(2):
        names = [CLASSES[random_below(len(CLASSES), generator)]]
        dx, dy = direction(names[0], generator)
        turn = grow = 0
        if random_below(2, generator):
            names.append([*STEPS][random_below(len(STEPS), generator)])
            turn, grow = STEPS[names[1]]
        actions += [names] * (FRAMES // 2)
        steps += [torch.tensor([speed * dx, speed * dy, turning * turn, growing * grow])] * (FRAMES // 2)
    width, height = WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN  # the torus
    start = torch.tensor(uniform(generator, (0, width), (0, height), (0, 1), (0, 1)))
    steps = torch.stack(steps)  # (FRAMES, 4)
    x, y, turn, phase = (start + steps.cumsum(dim=0) - steps[0]).T  # (FRAMES,) each
    phase = phase % 1  # 90 % of a cycle one way, then quickly back
    radius = RADIUS * 2 ** torch.where(phase < 0.9, phase / 0.9, (1 - phase) / 0.1)
    return actions, torch.stack([x % width - MARGIN, y % height - MARGIN, turn, radius])


def annotate(video: str, split: str, shapes: list, generator: torch.Generator) -> dict[str, str]:
    """Return a video's rows of ground truth, excluded key frames, and boxes that a detector might find, by file."""
    truth, excluded, detected = "", "", ""
    rand = partial(torch.rand, generator=generator)
    for second in range(901, 900 + FRAMES // RATE):
        frame = (second - 900) * RATE
        key = f"{video},{second:04d}"
        if rand(()) < 0.05:
            excluded += f"{key}\n"
        for person, (actions, boxes) in enumerate(shapes):
            box = boxes[frame]
            if box.isnan().any():
                continue
            for action in actions[frame]:
                truth += ROW.format(key, *box.clamp(0, 1).tolist(), [*ACTIONS].index(action) + 1, person)
            if rand(()) >= 0.05:  # detected, each edge up to a tenth of the side off; a few scores below 0.8
                box = box + 0.2 * (rand(4) - 0.5) * (box[2:] - box[:2]).repeat(2)
                detected += ROW.format(key, *box.clamp(0, 1).tolist(), "", 0.78 + 0.22 * float(rand(())))
        if rand(()) < 0.2:  # a false detection
            corner = rand(2) * 0.7
            box = torch.cat([corner, corner + (0.2 + 0.1 * rand(2))])
            detected += ROW.format(key, *box.tolist(), "", 0.5 + 0.4 * float(rand(())))
    return {
        f"annotations/ava_{split}_v2.2.csv": truth,
        f"annotations/ava_{split}_excluded_timestamps_v2.2.csv": excluded,
        f"boxes/ava_{split}_predicted_boxes.csv": detected,
    }
