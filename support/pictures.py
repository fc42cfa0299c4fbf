"""Draw videos in rows, boxes with labels, and charts of a run."""

import json
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, make_grid

from support.config import say
from support.video import write_mp4

ACCURACIES = ("top1", "top5", "test_top1", "mAP", "test_mAP")  # in log.jsonl


def save_videos(rows: dict[str, Tensor], path: Path) -> None:
    """Write videos of one size, uint8 (T, 3, H, W), as path.png and path.mp4, small ones enlarged.

    The picture has a row for each of them, its label above eight of its frames; the mp4 has them next to each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    videos = {label: _enlarge(video, 128) for label, video in rows.items()}
    frames = len(next(iter(videos.values())))
    chosen = torch.linspace(0, frames - 1, min(frames, 8)).round().long()
    strips = {label: make_grid(video[chosen], padding=2, pad_value=255) for label, video in videos.items()}
    sheet = torch.cat([_titled({label: strip[None]}) for label, strip in strips.items()], dim=2)
    TF.to_pil_image(sheet[0]).save(path.with_name(f"{path.name}.png"))
    write_mp4(path.with_name(f"{path.name}.mp4"), _titled(videos), rate=8)
    say(f"{path}.png and .mp4")


CAPTIONS = {  # of the videos of pretrain.reconstruct
    "estimated": "reconstruction (mean and std of cubes estimated from visible ones)",
    "oracle": "reconstruction (mean and std of cubes taken from the original)",
}


def with_captions(views: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Return the videos of `pretrain.reconstruct` under the labels that a picture shows."""
    captions = {view: f"{ratio:.0%} masked: {CAPTIONS.get(view, view)}" for view in views}
    captions["original"] = "original"
    return {captions[view]: video for view, video in views.items()}


def estimate_statistics(mean: Tensor, std: Tensor, masked: Tensor, plane: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Estimate mean and std of masked cubes (N_mask, 1, 3) from those of visible ones.

    mean, std: of all cubes (N, 1, 3). masked: positions (N_mask,). plane: the number of cubes in height and width.
    Visible cubes are weighted by one over the fourth power of their distance. Without any, the estimate is mid-gray.
    """
    if len(masked) == len(mean):
        return torch.full_like(mean, 0.5), torch.full_like(std, 0.2)
    grid = (len(mean) // (plane[0] * plane[1]), *plane)
    axes = [torch.arange(length, device=mean.device).float() for length in grid]
    places = torch.cartesian_prod(*axes)  # (N, 3): time, row, column
    weights = 1 / (torch.cdist(places, places) ** 4 + 1e-6)  # (N, N)
    weights[:, masked] = 0
    weights = weights[masked] / weights[masked].sum(dim=1, keepdim=True)  # (N_mask, N)
    return torch.einsum("mn,nkc->mkc", weights, mean), torch.einsum("mn,nkc->mkc", weights, std)


def copy_visible(cubes: Tensor, mask: Tensor, grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """Guess masked cubes by copying visible ones: cubes (N, pixels), mask (N,) to (N_mask, pixels) for each guess.

    The nearest visible cube in space is at the same time or, if there is none, at the nearest time; the nearest in time
    is at the same place or, if there is none, at the nearest place. Cubes at the same distance are averaged.
    """
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid))  # (N, 3): time, row, column
    offsets = places[mask][:, None] - places[~mask]  # (N_mask, N_vis, 3)
    time, row, column = offsets.square().unbind(dim=2)
    space = row + column
    far = 10**6  # no other squared distance is larger
    copies = {}
    for name, distance in (("space", far * time + space), ("time", far * space + time)):
        nearest = (distance == distance.amin(dim=1, keepdim=True)).float()  # (N_mask, N_vis)
        copies[f"nearest visible cube in {name}"] = nearest @ cubes[~mask] / nearest.sum(dim=1, keepdim=True)
    return copies | {"mean of the nearest visible cubes in space and time": sum(copies.values()) / 2}


def side_by_side(images: dict[str, Tensor], path: Path) -> None:
    """Write images of one size, uint8 (3, H, W), next to each other, each below its title."""
    path.parent.mkdir(parents=True, exist_ok=True)
    TF.to_pil_image(_titled({title: image[None] for title, image in images.items()})[0]).save(path)


def draw_persons(image: Tensor, boxes: Tensor, labels: Tensor, names: dict[int, str], color: str) -> Tensor:
    """Draw each person's box and up to four of its most probable actions, over 0.3, on a frame uint8 (3, H, W).

    boxes: (P, 4), x1, y1, x2, y2 in fractions of width and height. labels: (P, actions), probabilities of the actions
    1, 2, ..., whose names are `names`. Return uint8 (3, H', W'), enlarged if the frame is small.
    """
    image = _enlarge(image, 400)
    height, width = image.shape[1:]
    corners = boxes.reshape(-1, 4).cpu() * torch.tensor([width, height] * 2)
    if len(boxes):
        image = draw_bounding_boxes(image, corners, colors=color, width=2)
    picture = TF.to_pil_image(image)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for (left, top, *_), probabilities in zip(corners.tolist(), labels, strict=True):
        lines = []
        for i in probabilities.argsort(descending=True)[:4].tolist():
            name, p = names.get(i + 1, i + 1), float(probabilities[i])
            if p > 0.3:
                lines.append(f"{name} {p:.2f}" if p < 1 else f"{name}")
        if lines:  # keep them inside the frame, unlike the labels of draw_bounding_boxes
            text = "\n".join(lines)
            _, _, right, bottom = draw.multiline_textbbox((0, 0), text, font)
            place = max(0, int(min(left + 3, width - right - 1))), max(0, int(min(top + 2, height - bottom - 1)))
            draw.rectangle(draw.multiline_textbbox(place, text, font), fill="black")
            draw.multiline_text(place, text, color, font)
    return TF.pil_to_tensor(picture)


def draw_log(folder: Path) -> None:
    """Chart a run's log.jsonl as loss.png and, once it was tested, accuracy.png."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    for name, unit, keys in (("loss", "loss", ("loss", "val_loss")), ("accuracy", "percent", ACCURACIES)):
        curves = defaultdict(list)
        for line in lines:
            for key in keys:
                if key in line:
                    curves[f"{line.get('encoder', '')} {key}".strip()].append((line["step"], line[key]))
        if not curves:
            continue
        figure = new_figure(7, 4)
        axes = figure.subplots()
        for label, points in curves.items():  # a probe has two encoders
            axes.plot(*zip(*points, strict=True), marker="" if label.split()[-1] == "loss" else ".", label=label)
        axes.set(xlabel="step", ylabel=unit)
        axes.legend(frameon=False)
        figure.savefig(folder / f"{name}.png", dpi=100)


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, in inches, that keeps labels inside."""
    import matplotlib  # here, since it takes half a second
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names of classes and files may hold $
    return Figure((width, height), layout="constrained")


def _enlarge(images: Tensor, height: int) -> Tensor:
    """Enlarge images (..., H, W) by a whole number, to about `height` pixels if they are smaller."""
    zoom = max(1, round(height / images.shape[-2]))
    return TF.resize(images, [zoom * side for side in images.shape[-2:]], TF.InterpolationMode.NEAREST)


def _titled(videos: dict[str, Tensor]) -> Tensor:
    """Put videos uint8 (T, 3, H, W) next to each other, each below its title: (T, 3, H', W'), even for H.264."""
    font, size = ImageFont.load_default(12), next(iter(videos.values())).shape
    titles = [textwrap.fill(title, max(1, int(size[3] / font.getlength("n")))) for title in videos]
    head = torch.full((3, 6 + 16 * max(1 + title.count("\n") for title in titles), size[3]), 255, dtype=torch.uint8)
    columns = []
    for title, video in zip(titles, videos.values(), strict=True):
        picture = TF.to_pil_image(head)
        ImageDraw.Draw(picture).multiline_text((4, 2), title, "black", font)
        column = torch.cat([TF.pil_to_tensor(picture).expand(len(video), -1, -1, -1), video], dim=2)
        columns.append(F.pad(column, (0, 4), value=255))
    sheet = torch.cat(columns, dim=3)
    return F.pad(sheet, (0, sheet.shape[3] % 2, 0, sheet.shape[2] % 2), value=255)
