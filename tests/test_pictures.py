"""Pictures: files as described, boxes where they belong, labels whole, charts of every curve."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
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


NAMES = {1: "walk", 2: "carry/hold (an object)", 3: "listen to (a person)", 4: "stand", 5: "sit"}


def label_of(labels: list[float], names: dict[int, str], box: tuple[float, ...] = (0.1, 0.1, 0.9, 0.9)) -> torch.Tensor:
    """The black rectangle (H, W) behind a person's label."""
    picture = pictures.draw_persons(plain(BLUE, 500, 600), torch.tensor([box]), torch.tensor([labels]), names, "lime")
    left, top, right, bottom = extent(picture, BLACK)
    return picture[:, top : bottom + 1, left : right + 1]


def test_persons_have_boxes_at_fractions_of_an_enlarged_frame_and_whole_labels():
    box = torch.tensor([[0.25, 0.25, 0.5, 0.75]], dtype=torch.float64)
    picture = pictures.draw_persons(plain(BLUE, 72, 96), box, torch.zeros(1, 5), NAMES, "lime")
    assert picture.shape == (3, 432, 576) and extent(picture, LIME) == (144, 108, 288, 324)  # six times as large
    assert extent(picture, BLACK) == (0, 0, 0, 0)  # no label below 0.3
    picture = pictures.draw_persons(plain(BLUE, 500, 600), torch.zeros(0, 4), torch.zeros(0, 5), NAMES, "lime")
    assert torch.equal(picture, plain(BLUE, 500, 600))
    one = label_of([1.0, 0, 0, 0, 0], NAMES)
    assert torch.equal(one, label_of([1.0, 0.29, 0.1, 0, 0], NAMES))  # not those below 0.3
    assert torch.equal(one, label_of([0, 0, 1.0], {3: "walk"}))  # columns are the actions 1, 2, ...
    assert one.shape[2] < label_of([0.99, 0, 0, 0, 0], NAMES).shape[2]  # a score, if it is not 1
    assert torch.equal(label_of([0, 0, 0, 0, 0, 1.0], NAMES), label_of([0, 1.0], {2: "6"}))  # an action without a name
    labels = [0.5, 0.8, 0.9, 0.6, 0.4]
    four = label_of(labels, NAMES)
    assert torch.equal(four, label_of([*labels[:4], 0], NAMES)) and four.shape[1] > 3 * one.shape[1]  # at most four
    for left, top in ((0.97, 0.5), (0.97, 0.97), (0.5, 0.97), (-0.2, -0.2)):  # whole at every edge
        assert label_of(labels, NAMES, (left, top, left + 0.3, top + 0.3)).shape == four.shape


def test_charts_of_a_log(tmp_path):
    lines = [dict(step=1, loss=2.0), dict(step=2, loss=1.0)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pictures.draw_log(tmp_path)
    assert [file.name for file in tmp_path.glob("*.png")] == ["loss.png"]  # not tested yet
    lines += [dict(step=2, top1=20.0), dict(step=2, encoder="random", test_top1=10.0)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pictures.draw_log(tmp_path)
    for name in ("loss.png", "accuracy.png"):
        assert read(tmp_path / name).float().std() > 10


def test_only_charts_import_matplotlib_and_say_so_if_it_is_missing():
    code = (
        "import sys; import support.pictures, tools.study; assert 'matplotlib' not in sys.modules;"
        "sys.modules['matplotlib'] = None; support.pictures.new_figure(1, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.endswith("UserError: charts need matplotlib: pip install -r requirements-docs.txt\n")
