"""Pictures: files as described, boxes where they belong, labels whole, charts of every curve."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from support import pictures
from support.video import read_frames

RED, BLUE, LIME, BLACK = (200, 30, 30), (30, 30, 200), (0, 255, 0), (0, 0, 0)


def read(path: Path) -> torch.Tensor:
    return TF.pil_to_tensor(Image.open(path).convert("RGB"))  # (3, H, W)


def plain(color: tuple[int, int, int], *shape: int) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(*shape[:-2], 3, *shape[-2:])


def extent(picture: torch.Tensor, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The first column and row, and the last ones, with pixels of about this color; zeros if there are none."""
    rows, columns = ((picture.int() - torch.tensor(color)[:, None, None]).abs().amax(0) < 60).nonzero().T
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


@pytest.mark.parametrize("frames, height, width, zoom", [(16, 64, 64, 2), (3, 33, 51, 4), (8, 225, 301, 1)])
def test_a_picture_with_a_row_for_each_video_and_an_mp4_with_all(frames, height, width, zoom, tmp_path, capsys):
    label = "a label longer than one line of the mp4: gray"
    gray = torch.arange(40, 40 + 10 * frames, 10, dtype=torch.uint8)[:, None, None, None]
    path = tmp_path / "new" / "my.video"  # the suffix is added, not replaced
    pictures.save_videos({"red": plain(RED, frames, height, width), label: gray.expand(-1, 3, height, width)}, path)
    assert capsys.readouterr().err == f"{path}.png and .mp4\n"
    sheet, shown = read(tmp_path / "new" / "my.video.png"), min(frames, 8)
    left, top, right, bottom = extent(sheet, RED)
    assert [right - left, bottom - top] == [shown * (zoom * width + 2) - 3, zoom * height - 1]
    middle = sheet[0, -zoom * height // 2, left :: zoom * width + 2][:shown].tolist()  # the gray row below
    assert middle == ([40, 60, 80, 100, 130, 150, 170, 190] if frames == 16 else gray.flatten().tolist())
    (*_, frame) = read_frames(tmp_path / "new" / "my.video.mp4", range(frames))
    assert frame.shape[1] % 2 == frame.shape[2] % 2 == 0
    _, _, right, bottom = extent(frame, RED)
    assert frame[0, bottom - 8, right + 16] == pytest.approx(30 + 10 * frames, abs=4)  # the last gray, to the right


def test_persons_have_boxes_at_fractions_of_an_enlarged_frame_and_whole_labels():
    names = {1: "walk", 2: "carry/hold (an object)"}
    box = torch.tensor([[0.25, 0.25, 0.5, 0.75]], dtype=torch.float64)
    picture = pictures.draw_persons(plain(BLUE, 72, 96), box, torch.zeros(1, 2), names, "lime")
    assert picture.shape == (3, 432, 576) and extent(picture, LIME) == (144, 108, 288, 324)  # six times as large
    assert extent(picture, BLACK) == (0, 0, 0, 0)  # no label below 0.3
    sizes = []
    for left, top in ((0.25, 0.25), (0.97, 0.5), (0.97, 0.97), (0.5, 0.97), (-0.2, -0.2)):  # whole at every edge
        box, labels = torch.tensor([[left, top, left + 0.3, top + 0.3]]), torch.tensor([[0.2, 0.9]])
        corners = extent(pictures.draw_persons(plain(BLUE, 500, 600), box, labels, names, "lime"), BLACK)
        sizes.append((corners[2] - corners[0], corners[3] - corners[1]))
    assert len(set(sizes)) == 1 and sizes[0][0] > 100


def test_charts_of_a_log(tmp_path):
    lines = [dict(step=1, loss=2.0), dict(step=2, loss=1.0)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pictures.draw_log(tmp_path)
    assert [file.name for file in tmp_path.glob("*.png")] == ["loss.png"]  # not tested yet
    without = read(tmp_path / "loss.png")
    lines += [dict(step=2, val_loss=1.5), dict(step=2, top1=20.0), dict(step=2, encoder="random", test_top1=10.0)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pictures.draw_log(tmp_path)
    for name in ("loss.png", "accuracy.png"):
        assert read(tmp_path / name).float().std() > 10
    assert not torch.equal(read(tmp_path / "loss.png"), without)  # it has the validation loss


COPIES = [  # grid, pixels of visible cubes (0: masked), copies of masked ones in space and in time
    ((2, 1, 3), [0, 10, 20, 0, 0, 50], [10, 50, 50], [10, 10, 10]),
    ((3, 1, 1), [10, 0, 50], [30], [30]),  # at the same distance: the mean
    ((2, 2, 2), [10, 20, 30, 0, 50, 0, 0, 80], [25, 65, 65], [80, 20, 30]),
]


@pytest.mark.parametrize("grid, pixels, space, time", COPIES)
def test_copies_of_the_nearest_visible_cubes(grid, pixels, space, time):
    cubes = torch.tensor(pixels).float()[:, None]
    copies = [copy.flatten().tolist() for copy in pictures.copy_visible(cubes, cubes[:, 0] == 0, grid).values()]
    assert copies == [space, time, [(s + t) / 2 for s, t in zip(space, time, strict=True)]]
