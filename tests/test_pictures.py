"""Pictures: files as described, boxes where they belong, labels whole, and a sentence without matplotlib."""

import builtins
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
from support.config import UserError
from support.video import Video, read_frames


def read(path: Path) -> torch.Tensor:
    return TF.pil_to_tensor(Image.open(path).convert("RGB"))  # (3, H, W)


def plain(colour: tuple[int, int, int], *shape: int) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(*shape[:-2], 3, *shape[-2:])


def inked(picture: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
    """The pixels (H, W) that are about of this colour."""
    return (picture.int() - torch.tensor(colour)[:, None, None]).abs().amax(0) < 60


RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 160, 30), (30, 30, 200), (255, 255, 255)


# ---- videos ----


@pytest.mark.parametrize(
    "frames, height, width, zoom", [(16, 64, 64, 2), (3, 33, 51, 4), (1, 224, 224, 1), (8, 225, 301, 1)]
)
def test_a_picture_with_a_row_for_each_video_and_an_mp4_with_all(frames, height, width, zoom, tmp_path, capsys):
    rows = {
        "red": plain(RED, frames, height, width),
        "a label longer than one line of the mp4: green": plain(GREEN, frames, height, width),
    }
    path = tmp_path / "new" / "my.video"  # the suffix is added, not replaced
    pictures.save_videos(rows, path)
    assert capsys.readouterr().err == f"{path}.png and .mp4\n"
    sheet, shown = read(tmp_path / "new" / "my.video.png"), min(frames, 8)
    for colour in (RED, GREEN):
        assert inked(sheet, colour).sum() == shown * zoom**2 * height * width
    assert inked(sheet, RED).any(1).nonzero().max() < inked(sheet, GREEN).any(1).nonzero().min()
    with Video(tmp_path / "new" / "my.video.mp4") as video:
        assert len(video) == frames
        (frame,) = video.frames([0])
    assert frame.shape[1] % 2 == frame.shape[2] % 2 == 0
    for colour in (RED, GREEN):
        assert inked(frame, colour).sum() == pytest.approx(zoom**2 * height * width, rel=0.02)
    assert inked(frame, RED).any(0).nonzero().max() < inked(frame, GREEN).any(0).nonzero().min()


def test_eight_frames_from_the_first_to_the_last(tmp_path):
    video = torch.arange(0, 160, 10, dtype=torch.uint8)[:, None, None, None].expand(16, 3, 128, 128)
    pictures.save_videos({"grey": video}, tmp_path / "video")
    middle = read(tmp_path / "video.png")[0, -64]
    assert middle[64 :: 128 + 2][:8].tolist() == [0, 20, 40, 60, 90, 110, 130, 150]
    assert read_frames(tmp_path / "video.mp4", [15])[0, 0, -64, 64] == pytest.approx(150, abs=3)


def test_titles_stand_above_their_images_and_are_whole(tmp_path):
    titles = ("detected, a_video_with_a_long_name, second 902", "ground truth")
    for width in (60, 400):
        images = dict(zip(titles, (plain(RED, 90, width), plain(GREEN, 90, width)), strict=True))
        pictures.side_by_side(images, tmp_path / "new" / f"{width}.png")
        sheet = read(tmp_path / "new" / f"{width}.png")
        for colour, left in ((RED, 0), (GREEN, width + 4)):
            rows, columns = inked(sheet, colour).nonzero().T
            assert (int(columns.min()), int(columns.max())) == (left, left + width - 1)
            assert int(rows.max() - rows.min()) == 89
            title = (sheet[:, : rows.min(), left : left + width] < 128).any(0)
            assert title.any() and not title[:, -1].any() and not title[-1].any()  # nothing touches the edges


# ---- persons ----

NAMES = {1: "walk", 2: "carry/hold (an object)", 3: "listen to (a person)", 4: "stand", 5: "sit"}
LIME, BLACK = (0, 255, 0), (0, 0, 0)


def test_boxes_are_drawn_at_fractions_of_an_enlarged_frame():
    frame = plain(BLUE, 72, 96)
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.75]], dtype=torch.float64)
    picture = pictures.draw_persons(frame, boxes, torch.zeros(1, 5), NAMES, "lime")
    assert picture.shape == (3, 432, 576) and picture.dtype == torch.uint8  # six times as large
    rows, columns = inked(picture, LIME).nonzero().T
    assert (int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())) == (144, 108, 288, 324)
    assert not inked(picture, BLACK).any()  # no label below 0.3
    assert torch.equal(frame, plain(BLUE, 72, 96))
    assert pictures.draw_persons(plain(BLUE, 480, 640), boxes, torch.zeros(1, 5), NAMES, "lime").shape == (3, 480, 640)


def test_a_frame_without_persons_stays_as_it_is():
    picture = pictures.draw_persons(plain(BLUE, 500, 600), torch.zeros(0, 4), torch.zeros(0, 5), NAMES, "lime")
    assert torch.equal(picture, plain(BLUE, 500, 600))


def label_of(labels: list[float], names: dict[int, str], box: tuple[float, ...] = (0.1, 0.1, 0.9, 0.9)) -> torch.Tensor:
    """The black rectangle (H, W) behind a person's label."""
    picture = pictures.draw_persons(plain(BLUE, 500, 600), torch.tensor([box]), torch.tensor([labels]), names, "lime")
    rows, columns = inked(picture, BLACK).nonzero().T
    return picture[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_labels_are_the_four_most_probable_actions_above_0_3_with_their_scores():
    one = label_of([1.0, 0, 0, 0, 0], NAMES)
    assert torch.equal(one, label_of([1.0, 0.29, 0.1, 0, 0], NAMES))  # not those below 0.3
    assert torch.equal(one, label_of([0, 0, 1.0], {3: "walk"}))  # columns are the actions 1, 2, ...
    assert one.shape[2] < label_of([0.99, 0, 0, 0, 0], NAMES).shape[2]  # a score, if it is not 1
    four = label_of([0.9, 0.8, 0.7, 0.6, 0], NAMES)
    assert torch.equal(four, label_of([0.9, 0.8, 0.7, 0.6, 0.5], NAMES)) and four.shape[1] > 3 * one.shape[1]
    assert torch.equal(label_of([0, 0, 0, 0, 0, 1.0], NAMES), label_of([0, 1.0], {2: "6"}))  # an action without a name


@pytest.mark.parametrize("left, top", [(0.0, 0.0), (0.97, 0.5), (0.5, 0.97), (0.97, 0.97), (-0.2, -0.2)])
def test_labels_are_whole_wherever_the_box_is(left, top):
    labels = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert label_of(labels, NAMES, (left, top, left + 0.3, top + 0.3)).shape == label_of(labels, NAMES).shape


# ---- charts ----


def test_a_comparison_shows_who_is_ahead_in_each_class(tmp_path, capsys):
    rows = [
        (30.0, "juggling $5 and $10"),
        (0.0, "equal"),
        (-60.0, "a class whose name has far more than forty characters"),
    ]
    pictures.draw_comparison(rows, ("runs/a/scores.csv", "runs/b/scores.csv"), tmp_path / "new" / "comparison.png")
    assert capsys.readouterr().err == f"{tmp_path / 'new' / 'comparison.png'}\n"
    sheet = read(tmp_path / "new" / "comparison.png")
    blue, orange = ((sheet == torch.tensor(colour)[:, None, None]).all(0) for colour in ((70, 130, 180), (255, 165, 0)))
    blue[:75], orange[:75] = False, False  # the legend
    (up, right), (down, left) = (mask.nonzero().float().mean(0).tolist() for mask in (blue, orange))
    assert up < down and left < right
    width, twice = (int(mask.any(0).sum()) for mask in (blue, orange))
    assert twice == pytest.approx(2 * width, abs=3)
    border = torch.cat([sheet[:, 0], sheet[:, -1], sheet[:, :, 0], sheet[:, :, -1]], dim=1)
    assert (border == 255).all()  # nothing is cut off


def test_charts_without_matplotlib_end_in_a_sentence(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="^charts need matplotlib: pip install -r requirements-docs.txt$"):
        pictures.draw_comparison([(1.0, "a")], ("a.csv", "b.csv"), tmp_path / "comparison.png")


def test_only_charts_import_matplotlib():
    code = "import sys; import support.pictures, support.study; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_log_is_charted_with_every_curve_it_holds(tmp_path, monkeypatch):
    lines = [dict(step=step, loss=2.0 / step) for step in range(1, 5)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pictures.draw_log(tmp_path)
    assert [file.name for file in tmp_path.glob("*.png")] == ["loss.png"]  # not tested yet
    lines += [dict(step=2, top1=20.0), dict(step=4, top1=30.0)]
    lines += [dict(step=4, encoder="random", test_top1=10.0), dict(step=4, encoder="pre-trained", test_top1=40.0)]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    drawn = {}
    new_figure = pictures.new_figure

    def seen(*size):
        figure = new_figure(*size)
        savefig = figure.savefig
        figure.savefig = lambda path, **more: (drawn.update({path.name: figure.axes[0].lines}), savefig(path, **more))
        return figure

    monkeypatch.setattr(pictures, "new_figure", seen)
    pictures.draw_log(tmp_path)
    curves = {line.get_label(): line.get_xydata().tolist() for lines in drawn.values() for line in lines}
    assert curves.pop("loss") == [[1, 2.0], [2, 1.0], [3, pytest.approx(2 / 3)], [4, 0.5]]
    expected = {"top1": [[2, 20], [4, 30]], "random test_top1": [[4, 10]], "pre-trained test_top1": [[4, 40]]}
    assert curves == expected and drawn.keys() == {"loss.png", "accuracy.png"}
