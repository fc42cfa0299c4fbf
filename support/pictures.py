"""Everything that draws."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from support.ava import KeyFrame
from support.run import say
from support.video import write_mp4


def save_pictures(rows: dict[str, Tensor], path: Path) -> None:
    """Write videos uint8 (T, 3, H, W) below each other as path.png, eight frames of each, and side by side as path.mp4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames, _, height, width = next(iter(rows.values())).shape
    zoom = max(1, round(128 / height))
    tall, wide, line, font = height * zoom, width * zoom, 18, ImageFont.load_default(12)
    chosen = torch.linspace(0, frames - 1, min(frames, 8)).round().long().tolist()
    sheet = Image.new("RGB", (max(wide * len(chosen), 512), (line + tall) * len(rows)), "white")
    panels = []
    for row, (label, video) in enumerate(rows.items()):
        large = video.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)  # (T, 3, tall, wide)
        ImageDraw.Draw(sheet).text((4, row * (line + tall) + 2), label, "black", font)
        for column, frame in enumerate(chosen):
            sheet.paste(TF.to_pil_image(large[frame]), (column * wide, row * (line + tall) + line))
        heading = Image.new("RGB", (wide, line), "white")
        ImageDraw.Draw(heading).text((4, 2), label.replace("reconstruction (mean and deviation ", "("), "black", font)
        panels.append(torch.cat([TF.pil_to_tensor(heading).expand(frames, -1, -1, -1), large], dim=2))  # (T, 3, line + tall, wide)
    movie = torch.cat(panels, dim=3)
    movie = F.pad(movie, (0, movie.shape[3] % 2, 0, movie.shape[2] % 2), value=255)  # H.264 wants even sizes
    sheet.save(path.with_name(f"{path.name}.png"))
    write_mp4(path.with_name(f"{path.name}.mp4"), movie, rate=8)
    say(f"{path}.png and .mp4")


# ---- pictures ----


def draw_persons(image: Tensor, persons: KeyFrame | None, names: dict[int, str], colour: str) -> Image.Image:
    """A frame uint8 (3, H, W), enlarged if small, with boxes and the up to four most probable actions of each, if above 0.3."""
    zoom = max(1, round(400 / image.shape[1]))
    picture = TF.to_pil_image(image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
    draw, font, line = ImageDraw.Draw(picture), ImageFont.load_default(13), 16
    for box, labels in zip(persons.boxes.tolist(), persons.labels) if persons else []:
        left, top, right, bottom = (edge * side for edge, side in zip(box, picture.size * 2))
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        scores, actions = labels.topk(min(4, len(labels)))
        for row, (score, action) in enumerate(zip(scores.tolist(), (actions + 1).tolist())):
            if score > 0.3:
                text = str(names.get(action, action)) + (f" {score:.2f}" if score < 1 else "")
                where = max(0, min(left + 3, picture.width - font.getlength(text))), top + 2 + row * line
                draw.rectangle(draw.textbbox(where, text, font), fill="black")
                draw.text(where, text, colour, font)
    return picture
